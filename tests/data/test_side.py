"""Side matrices: made when asked for, from training steps alone, and the same space for items that come later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rerankkit.data import side
from rerankkit.data.dataset import Dataset
from rerankkit.data.embed import Tfidf
from rerankkit.data.side import Collaborative, SideMatrices, Spaces
from rerankkit.errors import RunFolderError
from rerankkit.types import Item

Make = Callable[[Mapping[str, Sequence[str]]], Dataset]


def test_a_matrix_is_made_once_and_not_before_somebody_looks() -> None:
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.zeros((2, 3), dtype=np.float32)

    matrices = SideMatrices({"a": make})
    assert list(matrices) == ["a"] and len(matrices) == 1 and "a" in matrices and "b" not in matrices and not made
    assert matrices["a"] is matrices["a"] and made == [1]
    with pytest.raises(KeyError):
        matrices["b"]


def test_counts_are_symmetric_weighted_by_distance_and_of_training_alone(make: Make) -> None:
    # Leave-one-out: u trains on a b c (d validates, e tests), v on b a; w has two items, so all of it is training
    dataset = make({"u": "abcde", "v": "bade", "w": "ca"})
    a, b, c, d, e = (dataset.item_rows[item_id] for item_id in "abcde")
    found = side._beside(dataset, dataset.item_rows).toarray()
    # a-b: 1 (u) + 1 (v); b-c: 1 (u); a-c: 1/2 (u) + 1 (w)
    assert (found[a, b], found[b, c], found[a, c]) == (2, 1, 1.5)
    np.testing.assert_array_equal(found, found.T)
    assert not found[[d, e]].any()


def test_the_window_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side, "WINDOW", 2)
    dataset = make({"u": "abcdxy"})
    rows = dataset.item_rows
    found = side._beside(dataset, rows)
    assert (found[rows["a"], rows["c"]], found[rows["a"], rows["d"]]) == (0.5, 0)


def test_places_are_rows_of_the_damped_counts_turned(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side, "DAMPING", 1.0)
    dataset = make({"u": "abcxy", "v": "abcxy", "w": "abxy"})
    space = Collaborative.fit(dataset, dim=4)
    assert space.axes.shape == (4, 5) and space.vectors(dataset).dtype == np.float32
    # d: a 3 + 1 = 4 (b three times, c twice at distance 2), b 3 + 2 = 5, c 2 + 1 = 3; M[a, b] = 3 / sqrt(5 * 6) ...
    counts = np.array([[0, 3, 1], [3, 0, 2], [1, 2, 0]])
    totals = counts.sum(axis=1)
    assert totals.tolist() == [4, 5, 3] and space.totals.tolist() == [4, 5, 3, 0, 0]
    damped = counts / np.sqrt(np.outer(totals + 1, totals + 1))
    places = space.vectors(dataset).astype(np.float64)
    # turning keeps angles: the cosine of two places is that of the rows of M
    unit = damped / np.linalg.norm(damped, axis=1, keepdims=True)
    np.testing.assert_allclose(places[:3] @ places[:3].T, unit @ unit.T, atol=1e-6)
    assert not places[3:].any()


def test_no_training_history_with_two_items_gives_zeros(make: Make) -> None:
    dataset = make({"u": "abc", "v": "bca"})
    found = Collaborative.fit(dataset, dim=3).vectors(dataset)
    assert found.shape == (3, 3) and not found.any()


def test_an_item_that_comes_later_lands_beside_its_like_in_the_space_that_was_kept(make: Make, tmp_path: Path) -> None:
    groups = ["abcd", "efgh"]
    users = {f"u{n}": "".join(np.random.default_rng(n).permutation(list(groups[n % 2]))) + "xy" for n in range(40)}
    before = make(users)
    space = Collaborative.fit(before, dim=8, seed=1)
    Spaces(None, space).save(tmp_path)
    again = Spaces.load(tmp_path, tfidf=False)
    assert again.tfidf is None and again.collaborative is not None
    np.testing.assert_array_equal(again.collaborative.vectors(before), space.vectors(before))
    after = make({**users, "v1": "azbxy", "v2": "zcdxy", "v3": "xqy"})
    found = dict(zip([item.item_id for item in after.items], again.collaborative.vectors(after), strict=True))
    cosine = {other: float(found["z"] @ found[other]) for other in "abcdefgh"}
    assert min(cosine[x] for x in "abcd") > 0.7 and max(cosine[x] for x in "efgh") < 0.2
    assert not found["q"].any()  # one training step of its own: nothing beside it
    alone = replace(after, items=(Item("new", ""),), histories={}, splits={})
    assert again.collaborative.vectors(alone).shape == (1, 8) and not again.collaborative.vectors(alone).any()


@pytest.mark.parametrize("damage", ["collaborative.json", "collaborative.safetensors", "item_ids"])
def test_a_damaged_space_is_refused(make: Make, tmp_path: Path, damage: str) -> None:
    Spaces(Tfidf.fit(["a word", "two words"]), Collaborative.fit(make({"u": "abcd"}))).save(tmp_path)
    facts = tmp_path / "collaborative.json"
    if damage == "item_ids":
        facts.write_text(facts.read_text().replace('"a", ', ""))
    else:
        (tmp_path / damage).write_text("{")
    with pytest.raises(RunFolderError, match="no whole collaborative space is here"):
        Spaces.load(tmp_path, tfidf=True)

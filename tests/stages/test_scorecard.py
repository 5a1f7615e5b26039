from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rerankkit.config import Sids, make_config
from rerankkit.errors import RunFailed, RunFolderError
from rerankkit.math.sids import sid_scorecard
from rerankkit.plugins import load_plugins
from rerankkit.stages.render import render_scorecard
from rerankkit.stages.scorecard import load_scorecard, make_scorecard, scorecard_facts
from rerankkit.stages.sid_gate import gated, missed_gate
from rerankkit.stages.sids import SidMap
from rerankkit.stages.wording import uniqueness
from rerankkit.store import write_json
from rerankkit.types import Catalog, Item

HOSTILE = '<script>alert("x")</script> <|sid_begin|>'


def catalogue(rows: Mapping[str, tuple[str, ...]], points: Any = None) -> Catalog:
    """Items by title -> category path; points stand on a line where none are given."""
    items = tuple(Item(f"i{n}", title, path) for n, (title, path) in enumerate(rows.items()))
    if points is None:
        points = [[n, 1] for n in range(len(items))]
    return Catalog(items, np.array(points, dtype=np.float32), np.empty((0, 2), dtype=np.int64))


SHOP = catalogue(
    {
        "Norda Shampoo": ("Hair", "Shampoo"),
        "Velis Shampoo": ("Hair", "Shampoo"),
        "Norda Toner": ("Face", "Toner"),
        "Velis Toner": ("Face", "Toner"),
        "Something": (),
    }
)
CODES = np.array([[0, 0], [0, 0], [1, 0], [1, 1], [1, 2]])


def card_of(codes: Any = CODES, catalog: Catalog = SHOP, tokenizer: Any = None) -> dict[str, Any]:
    codes = np.asarray(codes)
    return make_scorecard(codes, tuple((codes.max(axis=0) + 1).tolist()), catalog, tokenizer, seed=0)


def test_collisions_are_told_by_title_the_most_crowded_first() -> None:
    codes = [[0, 0], [0, 1], [0, 1], [0, 1], [0, 0]]
    assert card_of(codes)["collisions"] == [
        {"sid": [0, 1], "num_items": 3, "titles": ["Velis Shampoo", "Norda Toner", "Velis Toner"]},
        {"sid": [0, 0], "num_items": 2, "titles": ["Norda Shampoo", "Something"]},
    ]
    assert card_of([[0, n] for n in range(5)])["collisions"] == []


def test_purity_by_hand_leaves_out_items_without_a_category() -> None:
    # Four items have a category. By first code: {Hair, Hair}, {Face, Face}: all pure. Without meaning every prefix of
    # the four would be half pure at least, whatever the shuffle.
    broad, narrow = card_of()["purity"]
    assert (broad["level"], broad["categories"], broad["num_items"], broad["without"]) == (1, 2, 4, 1)
    assert broad["purity"] == narrow["purity"] == [1.0, 1.0]
    assert 0.5 <= broad["chance"][0] <= 1.0
    # One prefix for all: 2 of 4, and the same by chance.
    mixed = card_of(np.zeros((5, 1), int))["purity"][0]
    assert mixed["purity"] == mixed["chance"] == [0.5]


def test_narrow_categories_of_one_name_are_told_apart_by_their_path() -> None:
    kits = catalogue({"a": ("Hair", "Kits"), "b": ("Face", "Kits"), "c": ("Face", "Kits"), "d": ("Face", "Kits")})
    assert card_of(np.zeros((4, 1), int), kits)["purity"][1]["purity"] == [0.75]


def test_equal_vectors_bound_what_vectors_alone_can_reach() -> None:
    twins = catalogue({"A b": (), "a  B": (), "c": (), "d": ()}, [[1, 0], [1, 0], [1, 0], [0, 1]])
    # three items on one vector: 2 vectors of 4 items, and one item with a vector of its own; "A b" and "a  B" are equal
    equal = {"texts": 2, "vectors": 3, "best_distinct_share": 0.5, "best_own_share": 0.25}
    assert card_of([[0], [1], [2], [3]], twins)["equal"] == equal


def test_the_tree_says_what_codes_mean() -> None:
    kinds = {"Shampoo": "Hair", "Mask": "Hair", "Toner": "Face", "Serum": "Face", "Polish": "Nails"}
    rows = {
        f"{kind} {brand} no{n} {kinds[kind]}": (kinds[kind], kind)
        for kind in kinds
        for brand in "ABCD"
        for n in range(5)
    }
    order = {
        kind: (list(dict.fromkeys(kinds.values())).index(home), n % 2) for n, (kind, home) in enumerate(kinds.items())
    }
    codes = [order[title.split()[0]] for title in rows]
    hair, face, nails = card_of(codes, catalogue(rows))["tree"]

    assert (hair["codes"], hair["num_items"]) == ([0], 40)
    # half of its items are shampoos: the narrow path is shared by half of them
    assert (hair["category"], hair["category_share"]) == (["Hair", "Shampoo"], 0.5)
    assert hair["words"] == ["hair", "mask", "shampoo"]  # all titles, then half of them each
    assert [(one["codes"], one["num_items"], one["category"]) for one in hair["inside"]] == [
        ([0, 0], 20, ["Hair", "Shampoo"]),
        ([0, 1], 20, ["Hair", "Mask"]),
    ]
    assert hair["inside"][0]["words"] == ["shampoo"]  # against the rest of code 0, where all say hair
    assert len(set(hair["titles"])) == 4 and set(hair["titles"]) <= set(rows)
    assert (nails["words"], nails["category_share"]) == (["nails", "polish"], 1.0)
    assert face["num_items"] == 40


def test_titles_are_cleaned_and_stay_text() -> None:
    shop = catalogue({HOSTILE: (HOSTILE,), HOSTILE + " ": (HOSTILE,)})
    told = json.dumps({key: card_of([[0], [0]], shop)[key] for key in ("collisions", "tree")})
    assert "<" not in told and "|" not in told and "script" in told


class Halves:
    """Reconstructs half of the vector's size for code 1, all of it for code 0."""

    def __init__(self, points: NDArray[np.float32], found: Any = None) -> None:
        self.points, self.found = points, found

    def reconstruct(self, codes: NDArray[np.int64]) -> Any:
        return self.found if self.found is not None else self.points[: len(codes)] * np.where(codes == 1, 0.5, 1)

    def facts(self) -> Mapping[str, Any]:
        return {"moved": 3, HOSTILE: "<b>", "rise": float("nan")}


def test_reconstruction_error_by_hand_and_the_tokenizers_account() -> None:
    # x = 0, 2, 4 around 2: variance 4 + 0 + 4. The second is halved: error 1.
    shop = catalogue({"a": (), "b": (), "c": ()}, [[0], [2], [4]])
    card = card_of([[0], [1], [0]], shop, Halves(shop.embeddings))
    assert card["reconstruction_error"] == 1 / 8
    assert card["account"]["moved"] == 3 and card["account"]["rise"] is None
    assert "<" not in json.dumps(card["account"])
    assert card_of()["reconstruction_error"] is None and card_of()["account"] == {}


@pytest.mark.parametrize("found", [np.zeros((3, 2)), np.full((3, 1), np.inf), np.zeros(3)])
def test_a_reconstruction_that_cannot_be_is_the_tokenizers_fault(found: Any) -> None:
    shop = catalogue({"a": (), "b": (), "c": ()}, [[0], [2], [4]])
    with pytest.raises(
        RunFailed, match=r"reconstruct gave .* expected finite numbers \[3, 1\]. Its plugin is at fault"
    ):
        card_of([[0], [1], [0]], shop, Halves(shop.embeddings, found))


def test_neighbours_in_order_of_their_sids_are_kept() -> None:
    # 40 points on a quarter circle, prefixes cut it into four arcs of ten: an item's nine fellows are most of its ten.
    angles = np.linspace(0, math.pi / 2, 40)
    shop = catalogue({f"t{n}": () for n in range(40)}, np.stack([np.cos(angles), np.sin(angles)], axis=1))
    cut = card_of(np.stack([np.arange(40) // 10, np.arange(40) % 10], axis=1), shop)
    shuffled = card_of(np.random.default_rng(0).permutation(np.stack(np.divmod(np.arange(40), 10), axis=1)), shop)
    assert cut["neighbours"]["chance"] == 10 / 39 and cut["neighbours"]["asked"] == 40
    assert cut["neighbours"]["recall"] > 0.7 > 0.4 > shuffled["neighbours"]["recall"]
    assert cut["inside"][0] < 0.1 < 0.5 < shuffled["inside"][0]


def test_one_item_or_no_directions_have_no_neighbours() -> None:
    assert card_of([[0]], catalogue({"a": ()}))["neighbours"] is None
    assert card_of([[0], [0]], catalogue({"a": (), "b": ()}, [[0, 0], [0, 0]]))["neighbours"] is None


FLOATS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=st.integers(0, 4)),
    st.integers(0, 9),
    st.lists(st.tuples(st.text(max_size=12), st.lists(st.sampled_from("AB"), max_size=5)), min_size=30, max_size=30),
    st.data(),
)
def test_any_codes_of_any_catalogue_have_a_scorecard(codes: Any, seed: int, texts: Any, data: Any) -> None:
    n = len(codes)
    points = data.draw(
        hnp.arrays(np.float32, (n, 2), elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False))
    )
    items = tuple(Item(f"i{i}", title, tuple(path)) for i, (title, path) in enumerate(texts[:n]))
    card = make_scorecard(codes, (5,) * codes.shape[1], Catalog(items, points, np.empty((0, 2), np.int64)), seed=seed)

    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert all(math.isfinite(value) and value >= 0 for value in numbers(card))
    shares = [card["distinct_share"], card["own_share"], *(card["inside"] or [])]
    shares += [card["equal"]["best_distinct_share"], card["equal"]["best_own_share"]]
    shares += [depth["sharing"] for depth in card["depths"]]
    shares += [share for level in card["purity"] for share in level["purity"] + level["chance"]]
    shares += [card["neighbours"][key] for key in ("recall", "chance")] if card["neighbours"] else []
    assert all(0 <= share <= 1 for share in shares)
    assert card["own_share"] <= card["distinct_share"]
    assert card["distinct_prefixes"] == sorted(card["distinct_prefixes"])
    for level in card["purity"]:
        assert level["purity"] == sorted(level["purity"])  # a longer prefix is never less pure
    scorecard_facts(card)


CONFIG = make_config({"tokenizer": {"use": "residual-kmeans", "levels": 2, "codes": 3}}, load_plugins(only="gr2"))


def test_the_gate_lets_pass_what_is_good_enough() -> None:
    card = card_of()  # 3 of 5 have a SID of their own
    assert missed_gate(card, Sids(min_unique=0.6), CONFIG.tokenizer) == ""
    assert missed_gate(card, Sids(min_unique=0), CONFIG.tokenizer) == ""


def test_the_gate_says_what_was_asked_and_what_can_be_changed() -> None:
    said = missed_gate(card_of(), Sids(min_unique=0.61), CONFIG.tokenizer)
    assert said.startswith("sids.min_unique = 0.61 asks for 61.0%, so the run stopped.")
    assert "tokenizer.levels (now 2), tokenizer.codes (now 3)" in said and "0 turns the gate off" in said
    assert "vector" not in said


def test_the_gate_says_where_vectors_are_equal() -> None:
    twins = catalogue({"a": (), "A": (), "c": ()}, [[1, 0], [1, 0], [0, 1]])
    said = missed_gate(card_of([[0], [0], [1]], twins), Sids(), CONFIG.tokenizer)
    assert "2 items share their vector (2 their text)" in said
    assert said.endswith("can give 33.3% of items a SID of their own at most.")


def test_a_missed_gate_leaves_the_scorecard_in_the_run_folder(tmp_path: Path) -> None:
    folder: Any = SimpleNamespace(path=tmp_path, config=replace(CONFIG, sids=Sids(min_unique=0.61)))
    sids = SidMap({}, (2, 3), card_of())
    with pytest.raises(RunFailed) as stopped:
        gated(lambda info: sids, folder)(info=None)
    first, second, *_, last = str(stopped.value).splitlines()
    assert first == "sids: only 60.0% of 5 items have a SID of their own. The most crowded SIDs:"
    assert second == "  0, 0: 2 items, such as Norda Shampoo | Velis Shampoo"
    assert f"rerankkit sids report {tmp_path}" in last and str(tmp_path / "sids.html") in last
    write_json(tmp_path / "config.json", {"optimizer": {}})
    assert {**load_scorecard(tmp_path), "missed_gate": ""} == {**sids.scorecard, "missed_gate": ""}
    page = (tmp_path / "sids.html").read_text()
    assert "Norda Shampoo" in page and "60.0%" in page and "<script" not in page

    open_gate: Any = SimpleNamespace(path=tmp_path / "absent", config=replace(CONFIG, sids=Sids(min_unique=0.6)))
    assert gated(lambda info: sids, open_gate)(info=None) is sids


def test_a_scorecard_that_is_not_there_or_damaged_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        load_scorecard(tmp_path)
    write_json(tmp_path / "config.json", {"optimizer": {}})
    with pytest.raises(RunFolderError, match=r"has no SIDs yet; `rerankkit run .*config.json --until sids` draws them"):
        load_scorecard(tmp_path)
    place = tmp_path / "stages" / "2-sids"
    place.mkdir(parents=True)
    (place / "scorecard.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"2-sids.scorecard.json is damaged"):
        load_scorecard(tmp_path)


def test_where_only_codes_were_counted_the_rest_is_missing(tmp_path: Path) -> None:
    write_json(tmp_path / "scorecard.json", sid_scorecard(CODES, (2, 3)))
    card = load_scorecard(tmp_path)
    assert (card["own_share"], card["equal"], card["tree"]) == (0.6, None, [])
    assert scorecard_facts(card)["items with a SID of their own"] == "60.0%"
    assert "60.0% of 5 items" in render_scorecard(card)


def test_nearly_all_is_not_all() -> None:
    assert [uniqueness(share) for share in (1, 0.9999, 0.99999999, 0.5, 0)] == [
        "100%",
        "99.99%",
        "99.999999%",
        "50.0%",
        "0%",
    ]

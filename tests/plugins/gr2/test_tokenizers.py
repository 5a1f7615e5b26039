from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import rerankkit_gr2.kmeans
from rerankkit.errors import DataError, RunFolderError
from rerankkit.math.sids import sid_scorecard
from rerankkit.protocols import Tokenizer
from rerankkit.types import Catalog, Item
from rerankkit_gr2.kmeans import balanced_codes, fit_kmeans, nearest_codes
from rerankkit_gr2.rqvae import Contrast, RqVaeNet, Training, contrastive_loss, diversity_loss, move_codes, train
from rerankkit_gr2.settings import RqVaeConfig
from rerankkit_gr2.tokenizer import ResidualKMeans, RqVae

Make: TypeAlias = Callable[[], Tokenizer]


def catalog_of(embeddings: NDArray[np.float32], first: int = 0) -> Catalog:
    items = tuple(Item(f"item {first + i}", "") for i in range(len(embeddings)))
    return Catalog(items, embeddings, np.empty((0, 2), dtype=np.int64))


def clusters(num: int, seed: int = 0, copies: int = 3) -> NDArray[np.float32]:
    """Points in 12 dimensions around 10 centres, each in some near or exact copies."""
    rng = np.random.default_rng(seed)
    base = 4 * rng.standard_normal((10, 12))[rng.integers(0, 10, num)] + rng.standard_normal((num, 12))
    return np.repeat(base, copies, axis=0)[:num].astype(np.float32)


def take(catalog: Catalog, rows: list[int]) -> Catalog:
    return Catalog(tuple(catalog.items[i] for i in rows), catalog.embeddings[rows], catalog.pairs)


def kmeans() -> ResidualKMeans:
    return ResidualKMeans(levels=3, codes=16, iterations=5)


def rqvae() -> RqVae:
    return RqVae(levels=3, codes=16, latent=4, hidden=(16,), epochs=1, min_steps=20, batch_size=32)


def replace_setting(tokenizer: Tokenizer, **settings: Any) -> Any:
    for name, value in settings.items():
        assert hasattr(tokenizer, name)
        setattr(tokenizer, name, value)
    return tokenizer


both = pytest.mark.parametrize("make", [kmeans, rqvae])


# What the Tokenizer protocol asks


@both
def test_codes_lie_in_their_codebooks_and_are_unique(make: Make) -> None:
    tokenizer = make()
    catalog = catalog_of(clusters(120))
    tokenizer.fit(catalog)
    sids = tokenizer.encode(catalog)
    assert sids.shape == (120, 3)
    assert sids.dtype == np.int64
    assert tokenizer.codebook_sizes == (16, 16, 16)
    assert sid_scorecard(sids, tokenizer.codebook_sizes)["own_share"] == 1


@both
def test_an_item_keeps_its_sid(make: Make, tmp_path: Path) -> None:
    tokenizer = make()
    catalog = catalog_of(clusters(90))
    tokenizer.fit(catalog)
    sids = tokenizer.encode(catalog)
    rows = [7, 3, 80]
    assert np.array_equal(tokenizer.encode(take(catalog, rows)), sids[rows])
    assert np.array_equal(
        tokenizer.encode(replace(catalog, embeddings=-catalog.embeddings)), sids
    )  # a new text encoder
    tokenizer.save(tmp_path)
    loaded = make()
    loaded.load(tmp_path)
    assert np.array_equal(loaded.encode(catalog), sids)


@both
def test_new_items_take_free_codes_and_change_nobody(make: Make, tmp_path: Path) -> None:
    tokenizer = make()
    catalog, newcomers = catalog_of(clusters(90)), catalog_of(clusters(90)[::9].copy(), first=90)  # exact copies
    tokenizer.fit(catalog)
    before = tokenizer.encode(catalog)
    tokenizer.save(tmp_path)
    loaded = make()
    loaded.load(tmp_path)
    new = tokenizer.encode(newcomers)
    assert np.array_equal(loaded.encode(newcomers), new)
    assert np.array_equal(tokenizer.encode(catalog), before)
    assert np.array_equal(tokenizer.encode(take(newcomers, [4, 1])), new[[4, 1]])
    assert sid_scorecard(np.concatenate([before, new]), (16, 16, 16))["own_share"] == 1
    assert np.array_equal(new[:, :2], before[::9, :2])  # a copy of an item lands beside it


@both
def test_seeded_and_without_side_effects(make: Make, tmp_path: Path) -> None:
    embeddings = clusters(60)
    embeddings.flags.writeable = False  # as Arrow hands them out
    state = torch.random.get_rng_state()
    first, second = make(), make()
    first.fit(catalog_of(embeddings))
    torch.rand(3)
    second.fit(catalog_of(embeddings))
    torch.random.set_rng_state(state)
    assert np.array_equal(first.encode(catalog_of(embeddings)), second.encode(catalog_of(embeddings)))
    first.fit(catalog_of(embeddings))
    first.save(tmp_path)
    second.load(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(embeddings, clusters(60))


@both
def test_refusals(make: Make, tmp_path: Path) -> None:
    catalog = catalog_of(clusters(30))
    with pytest.raises(RuntimeError, match="before fit"):
        make().encode(catalog)
    with pytest.raises(DataError, match="'item 3' occurs 2 times"):
        make().fit(take(catalog, [1, 3, 3]))
    with pytest.raises(DataError, match=r"not \(29, 12\)"):
        make().fit(replace(catalog, embeddings=catalog.embeddings[1:]))
    holed = catalog.embeddings.copy()
    holed[4, 2] = np.nan
    with pytest.raises(DataError, match="'item 4' holds NaN"):
        make().fit(replace(catalog, embeddings=holed))
    fitted = make()
    fitted.fit(catalog)
    with pytest.raises(DataError, match="have 5 dimensions; the tokenizer was fitted on 12"):
        fitted.encode(catalog_of(np.ones((2, 5), dtype=np.float32), first=50))
    with pytest.raises(RunFolderError, match="no whole"):
        make().load(tmp_path)
    fitted.save(tmp_path)
    other: Tokenizer = kmeans() if make is rqvae else rqvae()
    with pytest.raises(RunFolderError, match="name the other one"):
        other.load(tmp_path)
    tensors = tmp_path / "tokenizer.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.raises(RunFolderError, match="no whole"):
        make().load(tmp_path)


@both
def test_what_happens_where_a_prefix_is_full(make: Make) -> None:
    catalog = catalog_of(np.ones((20, 12), dtype=np.float32))  # one prefix, 16 codes
    spilling = make()
    spilling.fit(catalog)
    sids = spilling.encode(catalog)
    assert sid_scorecard(sids, (16, 16, 16))["distinct_prefixes"] == [1, 2, 20]
    assert spilling.facts()["of these, items whose prefix was full"] == 4  # type: ignore[attr-defined]
    assert sorted(np.bincount(sids[:, 1])[np.unique(sids[:, 1])].tolist()) == [4, 16]
    sharing = replace_setting(make(), on_full="share")
    sharing.fit(catalog)
    assert sid_scorecard(sharing.encode(catalog), (16, 16, 16))["distinct_prefixes"] == [1, 1, 16]
    with pytest.raises(DataError, match=r"4 items find their prefix full, .* room for 16 items"):
        replace_setting(make(), on_full="refuse").fit(catalog)


@both
def test_new_items_spill_beside_old_ones(make: Make) -> None:
    tokenizer = make()
    catalog = catalog_of(np.ones((10, 12), dtype=np.float32))
    tokenizer.fit(catalog)
    before = tokenizer.encode(catalog)
    new = tokenizer.encode(catalog_of(np.ones((30, 12), dtype=np.float32), first=10))  # 6 places left, then others'
    assert np.array_equal(tokenizer.encode(catalog), before)
    assert len(np.unique(np.concatenate([before, new]), axis=0)) == 40
    assert (new[:, 1] == before[0, 1]).sum() == 6


@both
def test_every_way_to_choose_the_last_code(make: Make) -> None:
    catalog = catalog_of(clusters(120))
    sids = {}
    for how in ("nearest", "reassign", "search", "random", "uniform", "sinkhorn"):
        tokenizer = replace_setting(make(), last_level=how)
        tokenizer.fit(catalog)
        sids[how] = tokenizer.encode(catalog)
        if how != "search":
            assert np.array_equal(sids[how][:, :2], sids["nearest"][:, :2]), how  # only the last code changes
    distinct = {how: len(np.unique(found, axis=0)) for how, found in sids.items()}
    assert distinct["reassign"] == distinct["search"] == distinct["random"] == 120
    assert distinct["nearest"] <= 40  # three copies of each
    assert distinct["nearest"] < distinct["uniform"] < 120


@pytest.mark.parametrize("how", ["reassign", "search"])
def test_dealing_out_last_codes_costs_little(how: str) -> None:
    # Items in no order: rows that collide are looked up prefix by prefix, and each must get the distances of its own.
    embeddings = np.random.default_rng(1).permutation(clusters(200, copies=2))
    error = {}
    for last_level in ("nearest", how):
        tokenizer = ResidualKMeans(levels=2, codes=24, last_level=last_level)  # type: ignore[arg-type]
        tokenizer.fit(catalog_of(embeddings))
        restored = tokenizer.reconstruct(tokenizer.encode(catalog_of(embeddings)))
        error[last_level] = np.square(restored - embeddings).sum() / np.square(embeddings - embeddings.mean(0)).sum()
    assert error[how] < error["nearest"] + 0.05


@both
def test_what_the_sids_remember(make: Make) -> None:
    embeddings = clusters(300, copies=1)
    tokenizer = replace_setting(make(), last_level="nearest")
    if isinstance(tokenizer, RqVae):
        tokenizer.min_steps = 400
    tokenizer.fit(catalog_of(embeddings))
    restored = tokenizer.reconstruct(tokenizer.encode(catalog_of(embeddings)))  # type: ignore[attr-defined]
    assert restored.shape == (300, 12) and restored.dtype == np.float32
    variance = np.square(embeddings - embeddings.mean(axis=0)).sum()
    assert np.square(restored - embeddings).sum() < 0.3 * variance


# k-means


def test_kmeans_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    codebook = fit_kmeans(points, 2, 10, np.random.default_rng(0))
    assert sorted(codebook.squeeze(1).tolist()) == [0.5, 10.5]
    ids = nearest_codes(points, codebook).tolist()
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_clean_clusters_are_found() -> None:
    # 8 clusters in 16 dimensions, one on each of the first 8 axes: few directions do not show them, far seeds do
    rng = np.random.default_rng(0)
    points = torch.from_numpy(np.eye(16)[rng.integers(0, 8, 400)] + 0.01 * rng.standard_normal((400, 16)))
    codebook = fit_kmeans(points.float(), 8, 10, np.random.default_rng(1))
    assert len(set(codebook.argmax(dim=1).tolist())) == 8


def test_empty_codes_move_to_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for start in ("_progressive", "_spread"):
        monkeypatch.setattr(rerankkit_gr2.kmeans, start, lambda points, num_codes, rng: points[[0] * num_codes])
    points = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    codebook = fit_kmeans(points, 8, 3, np.random.default_rng(0))
    assert len(set(nearest_codes(points, codebook).tolist())) == 8


def test_fewer_points_than_codes() -> None:
    points = torch.tensor([[0.0], [5.0]])
    codebook = fit_kmeans(points, 4, 3, np.random.default_rng(0))
    assert set(codebook.squeeze(1).tolist()) == {0.0, 5.0}


def with_codebook(values: list[float], **settings: Any) -> ResidualKMeans:
    """Fitted on one far item (code 0), then given a codebook by hand."""
    tokenizer = ResidualKMeans(levels=1, codes=len(values), iterations=1, **settings)
    tokenizer.fit(catalog_of(np.zeros((1, 1), dtype=np.float32)))
    tokenizer._fitted = torch.tensor(values).reshape(1, -1, 1)
    tokenizer._book.codes[:] = values.index(max(values))  # the only item in the book sits on the highest code
    return tokenizer


def test_reassignment_by_hand() -> None:
    tokenizer = with_codebook([0.0, 1.0, 5.0, 99.0], on_full="share")
    # 0 and .4 are both nearest to 0. (0 -> 0, .4 -> 1) costs 0 + .36; (0 -> 1, .4 -> 0) costs 1 + .16.
    assert tokenizer.encode(catalog_of(np.array([[0.0], [0.4]], dtype=np.float32), first=1)).tolist() == [[0], [1]]
    # 0 and 1 are taken, 99 too: 5 is what is left
    assert tokenizer.encode(catalog_of(np.array([[-0.2]], dtype=np.float32), first=3)).tolist() == [[2]]
    # full: the nearest is shared
    assert tokenizer.encode(catalog_of(np.array([[0.9]], dtype=np.float32), first=4)).tolist() == [[1]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3, width=16), min_size=2, max_size=4))
def test_reassignment_is_optimal(places: list[float]) -> None:
    codes = [-2.0, 0.0, 0.5, 2.0]
    tokenizer = with_codebook([*codes, 99.0])
    got = tokenizer.encode(catalog_of(np.array(places, dtype=np.float32)[:, None], first=1))[:, 0]
    best = min(
        sum((place - codes[code]) ** 2 for place, code in zip(places, order, strict=True))
        for order in itertools.permutations(range(4), len(places))
    )
    assert len(set(got.tolist())) == len(places)
    assert sum((place - codes[code]) ** 2 for place, code in zip(places, got, strict=True)) == pytest.approx(best)


def test_balanced_codes_by_hand() -> None:
    points, codebook = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([[0.0], [10.0]])
    # two points a code: 0 and 1 go to the first; 2, nearer to it as well, is left for the second
    assert balanced_codes(points, codebook).tolist() == [0, 0, 1, 1]


def test_balanced_kmeans_uses_its_codes_more_evenly() -> None:
    rng = np.random.default_rng(0)
    skewed = np.exp(rng.standard_normal((400, 6))).astype(np.float32)
    entropy = {}
    for balanced in (False, True):
        tokenizer = ResidualKMeans(levels=2, codes=8, balanced=balanced, last_level="nearest")
        tokenizer.fit(catalog_of(skewed))
        entropy[balanced] = sid_scorecard(tokenizer.encode(catalog_of(skewed)), (8, 8))["levels"][0]["entropy"]
    assert entropy[True] > entropy[False] + 0.2


# RQ-VAE

HOW = Training(
    epochs=1, min_steps=1, max_steps=100, batch_size=4, learning_rate=1e-3, ema="residuals", decay=0.9,
    kmeans_init=False, diversity=0.0, dead_code_reset=0, commitment=0.25, contrastive=0.0, contrastive_temperature=0.1,
    seed=0,
)  # fmt: skip


def test_ema_by_hand() -> None:
    codebook, unused = torch.tensor([[0.0], [10.0]]), torch.zeros(2, dtype=torch.long)
    move_codes(codebook, unused, torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), HOW)
    # code 0: .9 * 0 + .1 * mean(1, 3) = .2; code 1 has no residual and stays
    assert codebook.squeeze(1).tolist() == pytest.approx([0.2, 10.0])
    assert unused.tolist() == [0, 1]


def test_dead_code_reset_by_hand() -> None:
    how = replace(HOW, ema="off", dead_code_reset=2)
    codebook, unused = torch.tensor([[0.0], [10.0]]), torch.zeros(2, dtype=torch.long)
    residuals, ids = torch.tensor([[1.0], [3.0], [-2.0]]), torch.tensor([0, 0, 0])
    move_codes(codebook, unused, residuals, ids, how)
    assert codebook.squeeze(1).tolist() == [0, 10]  # one batch without use: not yet
    move_codes(codebook, unused, residuals, ids, how)
    assert codebook.squeeze(1).tolist() == [0, 3]  # moved to the residual with the largest error
    assert unused.tolist() == [0, 0]


def test_diversity_by_hand() -> None:
    # both points sure of code 0: 2 * (1 + 0). One sure of each: 2 * (.25 + .25).
    assert diversity_loss(torch.tensor([[0.0, 99.0], [0.0, 99.0]])).item() == pytest.approx(2)
    assert diversity_loss(torch.tensor([[0.0, 99.0], [99.0, 0.0]])).item() == pytest.approx(1)


def test_the_average_of_optimizer_steps() -> None:
    points = clusters(30)
    nets = {}
    for ema in ("off", "optimizer"):
        net = RqVaeNet(12, levels=1, codes=4, latent=3, hidden=())
        torch.manual_seed(0)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter)
        start = net.codebooks.detach().clone()
        train(points, net, replace(HOW, ema=ema, decay=0.75, batch_size=30))
        nets[ema] = net.codebooks.detach() - start
    # one step of one batch: Adam's step, and a quarter of it
    assert nets["off"].abs().max() > 0
    torch.testing.assert_close(nets["optimizer"], 0.25 * nets["off"], rtol=1e-3, atol=1e-7)


def test_contrast_by_hand() -> None:
    # cosines [[1, 0], [0, 1]] over .5 = [[2, 0], [0, 2]]: -log(e^2 / (e^2 + 1)) = .126928 in every row and column
    one, other = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    rows, others = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert contrastive_loss(one, other, rows, others, 0.5).item() == pytest.approx(0.126928, abs=1e-5)
    # the second's partner is the first item itself: no negative for it, so each row is sure of its own
    assert contrastive_loss(one, other, rows, torch.tensor([2, 0]), 0.5).item() == pytest.approx(0.126928 / 2, abs=1e-5)
    # both have the same partner: nothing is negative
    assert contrastive_loss(one, other, rows, torch.tensor([2, 2]), 0.5).item() == 0


def test_partners_are_drawn_from_those_engaged_together() -> None:
    contrast = Contrast.of(np.array([[0, 1], [1, 2], [1, 1]]), 4)
    rng = np.random.default_rng(0)
    drawn: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for _ in range(50):
        places, partners = contrast.draw(np.array([3, 2, 1, 0]), rng)
        assert places.tolist() == [1, 2, 3]  # item 3 has no partner
        for place, partner in zip(places, partners, strict=True):
            drawn[3 - place].add(int(partner))
    assert drawn == {0: {1}, 1: {0, 2}, 2: {1}}


def test_contrast_draws_co_engaged_items_together() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((64, 12)).astype(np.float32)
    pairs = np.stack([np.arange(0, 64, 2), np.arange(1, 64, 2)], axis=1)
    near = {}
    for weight in (0.0, 1.0):
        net = RqVaeNet(12, levels=2, codes=8, latent=4, hidden=(16,))
        how = replace(HOW, epochs=60, batch_size=32, contrastive=weight)
        train(embeddings, net, how, Contrast.of(pairs, 64))
        latents = torch.nn.functional.normalize(net.latents(torch.from_numpy(embeddings)), dim=1)
        near[weight] = (latents[pairs[:, 0]] * latents[pairs[:, 1]]).sum(1).mean().item()
    assert near[1.0] > near[0.0] + 0.3


def test_decks_have_a_size() -> None:
    with pytest.raises(ValueError, match=r"a deck of 256 \*\* 8 codes is too large"):
        RqVaeConfig(levels=10, random_levels=8)
    with pytest.raises(ValueError, match="of 3 levels one must say something"):
        RqVaeConfig(levels=3, random_levels=3)


def test_contrast_needs_pairs() -> None:
    with pytest.raises(DataError, match=r"contrastive = 0.5 needs items that follow one another"):
        RqVae(contrastive=0.5).fit(catalog_of(clusters(30)))


def test_a_large_catalogue_gets_fewer_passes() -> None:
    steps: list[int] = []

    def bar(items: Any, **how: Any) -> Any:
        steps.append(how["total"])
        return iter(items)

    for epochs, least, most in ((2, 0, 99), (2, 50, 99), (40, 0, 30)):
        how = replace(HOW, epochs=epochs, min_steps=least, max_steps=most, batch_size=10)
        train(clusters(100), RqVaeNet(12, levels=1, codes=4, latent=3, hidden=()), how, None, bar)
    assert steps == [20, 50, 30]


def test_the_encoder_learns_from_the_reconstruction() -> None:
    net = RqVaeNet(12, levels=2, codes=4, latent=3, hidden=(8,))
    before = [parameter.detach().clone() for parameter in net.encoder.parameters()]
    train(clusters(30), net, replace(HOW, commitment=0.0))  # no other loss reaches it
    assert not any(torch.equal(*pair) for pair in zip(before, net.encoder.parameters(), strict=True))


@pytest.mark.parametrize("ema", ["residuals", "optimizer", "off"])
def test_training_lowers_the_reconstruction_error(ema: str) -> None:
    embeddings = clusters(300, copies=1)

    def error(steps: int) -> float:
        tokenizer = RqVae(levels=3, codes=16, epochs=1, min_steps=steps, ema=ema, last_level="nearest")
        tokenizer.fit(catalog_of(embeddings))
        return float(np.square(tokenizer.reconstruct(tokenizer.encode(catalog_of(embeddings))) - embeddings).mean())

    assert error(150) < 0.6 * error(2)


@pytest.mark.parametrize(
    "other",
    [
        {"ema": "off"},
        {"ema": "optimizer"},
        {"kmeans_init": False},
        {"diversity": 0.0},
        {"dead_code_reset": 0},
        {"last_level": "nearest"},
        {"contrastive": 0.5},
    ],
)
def test_every_switch_changes_something(other: dict[str, Any]) -> None:
    common: dict[str, Any] = {
        "levels": 3,
        "codes": 16,
        "latent": 8,
        "hidden": (16,),
        "epochs": 80,
        "dead_code_reset": 5,
    }
    catalog = replace(catalog_of(clusters(100, copies=1)), pairs=np.stack([np.arange(99), np.arange(1, 100)], axis=1))
    on, without = RqVae(**common), RqVae(**{**common, **other})
    on.fit(catalog)
    without.fit(catalog)
    assert not np.array_equal(on.encode(catalog), without.encode(catalog))


def test_unique_on_beauty(beauty: Path) -> None:
    import pandas as pd
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    table = pd.read_parquet(beauty / "items.parquet", columns=["title", "categories", "brand"]).fillna("")
    texts = (table["title"] + " " + table["categories"] + " " + table["brand"]).tolist()
    vectors = TfidfVectorizer(min_df=3).fit_transform(texts)
    embeddings = TruncatedSVD(64, n_iter=2, random_state=0).fit_transform(vectors).astype(np.float32)
    catalog = catalog_of(embeddings)
    tokenizers: list[Tokenizer] = [ResidualKMeans(iterations=5), RqVae(epochs=2)]
    for tokenizer in tokenizers:
        tokenizer.fit(catalog)
        assert sid_scorecard(tokenizer.encode(catalog), tokenizer.codebook_sizes)["own_share"] == 1

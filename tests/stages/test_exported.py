from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rerankkit.config import Answering
from rerankkit.stages import exported
from rerankkit.stages.exported import ExportedRankings, position_bias, rank_exported, shuffle_of
from rerankkit.stages.gate import Exported
from rerankkit.stages.rankings import Rankings
from rerankkit.types import Item, Ranking, RerankExample, RunInfo

from .conftest import Shop

SHORT = Answering(max_new_tokens=60)


def ask(name: str, target: int, size: int = 4) -> RerankExample:
    items = tuple(Item(f"{name}{i}", f"item {i}") for i in range(size))
    return RerankExample(name, "u", (), items, tuple(float(i == target) for i in range(size)))


EXAMPLES = [ask(f"e{row}", row % 4) for row in range(40)]


def rankings(orders: Sequence[Sequence[int]]) -> Rankings:
    return Rankings({e.example_id: Ranking(tuple(o)) for e, o in zip(EXAMPLES, orders, strict=True)}, {})


def test_a_shuffle_is_a_permutation_of_its_own_for_each_user_and_round() -> None:
    found = [shuffle_of(example, number, 7) for number in (1, 2) for example in EXAMPLES]
    assert all(sorted(places) == [0, 1, 2, 3] for places in found)
    assert len({tuple(places) for places in found}) > 15  # of 24 there are
    assert found[:40] != found[40:]
    assert shuffle_of(EXAMPLES[3], 1, 7) == found[3] and shuffle_of(EXAMPLES[3], 1, 8) != found[3]


def test_a_policy_that_looks_at_items_alone_is_free_of_bias() -> None:
    same = rankings([(2, 0, 1, 3)] * 40)
    found = position_bias(EXAMPLES, same, [same, same], seed=7)
    assert (found["kendall_tau"], found["same_first"], found["shuffles"], found["n"]) == (1.0, 1.0, 2, 40)
    assert found["metrics"]["R@1"] == {"given": 0.25, "low": 0.25, "mean": 0.25, "high": 0.25}
    # the item chosen was shown anywhere: each place has about a quarter of 80
    assert sum(found["shown_first"]) == pytest.approx(1) and max(found["shown_first"]) < 0.45


def test_a_policy_that_copies_what_it_is_shown_is_all_bias() -> None:
    rounds = [rankings([shuffle_of(e, number, 7) for e in EXAMPLES]) for number in (1, 2)]
    found = position_bias(EXAMPLES, rankings([(0, 1, 2, 3)] * 40), rounds, seed=7)
    assert found["shown_first"] == [1.0, 0.0, 0.0, 0.0]
    assert abs(found["kendall_tau"]) < 0.2 and found["same_first"] < 0.45  # chance: 0 and 1/4
    spread = found["metrics"]["NDCG@5"]
    assert spread["low"] <= spread["mean"] <= spread["high"]


def test_what_is_ranked_already_is_taken_over_and_shuffles_come_back_in_given_places(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.base.save(tmp_path / "policy")
    examples = shop.lists.examples(shop.items, "test")
    asked: list[tuple[str, bool]] = []

    def by_item(*arguments: Any, what: str) -> Rankings:
        some, think = arguments[2], arguments[4]
        asked.append((what, think))
        orders = [sorted(range(4), key=lambda i, e=e: e.candidates[i].item_id) for e in some]
        found = {e.example_id: Ranking(tuple(o)) for e, o in zip(some, orders, strict=True)}
        return Rankings(found, dict.fromkeys(found, ""))

    monkeypatch.setattr(exported, "rank_examples", by_item)
    given = by_item("", None, examples, None, True, what="before")
    facts = {"exported": "rl", "how": "generate"}
    listed = (shop.dataset, shop.sids, shop.lists)
    policy = Exported(tmp_path / "policy", facts)

    found = rank_exported(
        SHORT, "both", 2, *listed, policy, tmp_path / "policy", given, given, given, info=RunInfo(seed=1)
    )

    assert found.name == "rl" and found.rankings == given
    rounds = [("ranking shuffle 1", True), ("ranking shuffle 2", True)]
    assert asked[1:] == [("ranking without reasoning", False), *rounds, *rounds]
    # by item, whatever the order shown: in given places it is the same ranking
    assert found.shuffled["sft"][0].rankings == found.shuffled["rl"][1].rankings == given.rankings
    assert found.position_bias["rl"]["kendall_tau"] == 1.0
    (tmp_path / "out").mkdir()
    found.save(tmp_path / "out")
    back = ExportedRankings.load(tmp_path / "out")
    assert (back.name, back.rankings.rankings, back.position_bias) == ("rl", given.rankings, found.position_bias)
    assert back.no_reasoning is not None and back.no_reasoning.rankings == given.rankings
    assert sorted(path.name for path in (tmp_path / "out" / "shuffled").iterdir()) == ["rl-1", "rl-2", "sft-1", "sft-2"]


def test_a_kept_policy_is_ranked_and_nothing_else_is(shop: Shop, tmp_path: Path) -> None:
    shop.base.save(tmp_path / "policy")
    kept = Exported(tmp_path / "policy", {"exported": "rl@5", "how": "generate"})
    none = Rankings({}, {})
    listed = (shop.dataset, shop.sids, shop.lists)

    found = rank_exported(SHORT, "on", 0, *listed, kept, tmp_path / "none", none, none, none, info=RunInfo(seed=1))

    assert (found.name, found.no_reasoning, found.position_bias) == ("rl@5", None, {})
    assert list(found.rankings.rankings) == [e.example_id for e in shop.lists.examples(shop.items, "test")]

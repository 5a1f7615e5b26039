from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rerankkit.config import Answering
from rerankkit.lm import Policy, score_continuations
from rerankkit.stages import rankings
from rerankkit.stages.rankings import Rankings, rank_users, score
from rerankkit.text.prompts import sequence_prompt
from rerankkit.types import Parse, Ranking, RerankExample, RunInfo

from .conftest import Shop

SHORT = Answering(max_new_tokens=60, batch_size=7)


def asks(shop: Shop) -> list[RerankExample]:
    return shop.lists.examples(shop.items, "test")


def rank(shop: Shop, how: Any, config: Answering = SHORT) -> Rankings:
    return rank_users(how, config, True, shop.dataset, shop.sids, shop.lists, shop.base, info=RunInfo(seed=1))


def test_test_users_whose_target_is_listed_are_ranked_in_batches(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def reverse(policy: Policy, examples: Sequence[RerankExample], *rest: Any) -> list[tuple[Ranking, str]]:
        sizes.append(len(examples))
        return [(Ranking((3, 2, 1, 0)), f"for {example.user_id}") for example in examples]

    monkeypatch.setattr(rankings, "score", reverse)
    found = rank(shop, "score")

    examples = asks(shop)
    assert list(found.rankings) == [example.example_id for example in examples] and len(examples) > 20
    assert sizes == [7] * (len(examples) // 7) + [len(examples) % 7] * (len(examples) % 7 > 0)
    assert found.reasoning[examples[3].example_id] == f"for {examples[3].user_id}"


def test_scoring_orders_by_the_likelihood_of_each_sid_after_the_history(shop: Shop) -> None:
    example = asks(shop)[0]
    policy = shop.base
    prompt = policy.document_ids(sequence_prompt(example.history, policy.surface, policy.style))
    # one candidate at a time, by hand
    logps = [score_continuations(policy, [prompt], [[policy.sid_ids(c.sid)]])[0][0] for c in example.candidates]
    best_first = tuple(sorted(range(4), key=lambda i: -logps[i]))

    [(ranking, said)] = score(policy, [example], SHORT, RunInfo())

    assert len(set(logps)) == 4
    assert (ranking.order, ranking.parse, said) == (best_first, Parse.OK, "")


def test_equal_scores_keep_the_given_order(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rerankkit.lm.score_continuations", lambda *arguments, **how: [[-2.0, -1.0, -2.0, -1.0]])
    [(ranking, _)] = score(shop.base, asks(shop)[:1], SHORT, RunInfo())
    assert ranking.order == (1, 3, 0, 2)


def test_generated_answers_are_greedy_and_do_not_depend_on_the_batch(shop: Shop) -> None:
    small = rank(shop, "generate")
    large = rank(shop, "generate", Answering(max_new_tokens=60, batch_size=64))
    assert small == large == rank(shop, "generate")
    # under the mask even a policy that has learnt nothing gives complete permutations
    assert {ranking.parse for ranking in small.rankings.values()} == {Parse.OK}


def test_free_answers_of_a_policy_that_has_learnt_nothing_are_counted_as_invalid(shop: Shop) -> None:
    found = rank(shop, "generate", Answering(max_new_tokens=12, constrain=False))
    assert {ranking.parse for ranking in found.rankings.values()} == {Parse.FAILED}
    assert all(ranking.identity for ranking in found.rankings.values())


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    found = Rankings(
        {"a/3": Ranking((1, 0)), "b/4": Ranking((0, 1), Parse.REPAIRED, "1 missing")},
        {"a/3": 'because \u2028 "it"\n', "b/4": ""},
    )
    found.save(tmp_path)
    assert Rankings.load(tmp_path) == found


def test_no_rankings_at_all_can_be_saved(tmp_path: Path) -> None:
    Rankings({}, {}).save(tmp_path)
    assert Rankings.load(tmp_path) == Rankings({}, {})

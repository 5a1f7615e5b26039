"""What fine-tuning learns from: the prompt as it is read, and the teacher's order in SIDs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

import rerankkit.lm
from rerankkit.config import Sft
from rerankkit.lm import Policy, TrainSequence
from rerankkit.stages import sft
from rerankkit.stages.traces import Traces
from rerankkit.types import RunInfo, Trace

from .conftest import Shop


def orders_shown(shop: Shop, monkeypatch: pytest.MonkeyPatch, seed: int, **settings: Any) -> list[tuple[int, ...]]:
    """The order of each trace's prompt, as places in the list that was given; what is answered is checked."""
    examples = shop.lists.examples(shop.items, "train", only_with_target=True)[:8]
    told = iter(examples)
    orders = []

    def keep(
        policy: Policy, messages: Sequence[Mapping[str, object]], reasoning: str, ranking: str, *_: float
    ) -> TrainSequence:
        given = [candidate.sid for candidate in next(told).candidates]
        listed = policy.surface.find(str(messages[1]["content"]))[-4:]
        orders.append(tuple(given.index(sid) for sid in listed))
        assert policy.surface.find(ranking) == [given[i] for i in (3, 1, 0, 2)]
        return TrainSequence((1, 2), (0.0, 1.0))

    monkeypatch.setattr(rerankkit.lm, "trace_sequence", keep)
    monkeypatch.setattr(sft, "train", lambda *_, **__: None)
    traces = Traces(tuple(Trace(e.example_id, "because", (3, 1, 0, 2)) for e in examples), ())
    config = Sft(epochs=1, **settings)
    sft.fine_tune(config, shop.dataset, shop.sids, shop.lists, traces, shop.policy(), info=RunInfo(seed=seed))
    return orders


def test_prompts_list_candidates_as_given(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert orders_shown(shop, monkeypatch, 1) == [(0, 1, 2, 3)] * 8


def test_shuffled_prompts_have_an_order_each_and_the_same_answer(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = orders_shown(shop, monkeypatch, 1, shuffle_candidates=True)
    assert len(set(orders)) > 3 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert orders == orders_shown(shop, monkeypatch, 1, shuffle_candidates=True)
    assert orders != orders_shown(shop, monkeypatch, 2, shuffle_candidates=True)


@pytest.mark.parametrize(("reasoning", "learnt"), [(True, "it suits them"), (False, "")])
def test_reasoning_is_learnt_or_left_empty_for_good(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, reasoning: bool, learnt: str
) -> None:
    answers: list[str] = []

    def keep(policy: Policy, batch: Any, *rest: Any, **more: Any) -> None:
        answers.extend(policy.decode(sequence.token_ids) for sequence in batch(1))

    monkeypatch.setattr(sft, "train", keep)
    examples = shop.lists.examples(shop.items, "train", only_with_target=True)[:3]
    traces = Traces(tuple(Trace(e.example_id, "it suits them", (3, 1, 0, 2)) for e in examples), ())
    asked = (shop.dataset, shop.sids, shop.lists, traces, shop.policy())
    policy = sft.fine_tune(Sft(reasoning=reasoning), *asked, info=RunInfo())
    assert policy.thinks is reasoning
    assert len(answers) == 3 and all(f'"explanation": "{learnt}", "recommendations"' in answer for answer in answers)

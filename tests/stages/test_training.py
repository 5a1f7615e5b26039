from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rerankkit.errors import RunFailed
from rerankkit.lm import Policy, TrainSequence, packed_logps
from rerankkit.stages import training
from rerankkit.stages.training import learning_rate_at, train
from rerankkit.types import RunInfo

from .conftest import Shop


@dataclass(frozen=True)
class Plan:
    """A schedule without warm-up."""

    learning_rate: float = 1e-2
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_every: int = 2


def sequence(policy: Policy, text: str, weight: float = 1.0) -> TrainSequence:
    ids = policy.encode(text)
    return TrainSequence(tuple(ids), (0.0, *(weight for _ in ids[1:])))


def batches(policy: Policy) -> Any:
    """Two titles a step, others at each step."""
    texts = ["Norda Luxe Shampoo", "Velis Everyday Toner", "Amaro Luxe Blush", "Oriel Luxe Balm", "Tavi Luxe Wash"]
    return lambda step: [sequence(policy, texts[step % 5]), sequence(policy, texts[(3 * step + 1) % 5], 0.5)]


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return policy.model.state_dict()


def test_the_loss_is_the_weighted_mean_over_tokens(shop: Shop, info: RunInfo) -> None:
    policy, logged = shop.policy(), []
    rows = batches(policy)(1)
    logps = packed_logps(policy, [rows])
    # weights 1 and 1/2: a token of the first sequence counts twice one of the second
    expected = -(logps.weights * logps.logps).sum() / logps.weights.sum()
    train(policy, batches(policy), 1, Plan(), replace(info, log=logged.append), what="training")
    assert logged[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    times = {f"time/{what}" for what in ("forward", "backward", "optimizer", "other")}
    fixed = {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "tflops", "step_time"}
    assert fixed | times == set(logged[0])
    assert sum(logged[0][name] for name in times) == pytest.approx(logged[0]["step_time"], rel=1e-6)


def test_it_learns(shop: Shop) -> None:
    policy, logged = shop.policy(), []
    text = sequence(policy, "Norda Luxe Shampoo")
    train(policy, lambda step: [text], 20, Plan(), RunInfo(log=logged.append), what="training")
    assert logged[-1]["loss"] < 0.2 * logged[0]["loss"]
    assert not policy.model.training


def test_one_large_pass_and_many_small_ones_give_the_same_step(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, calls = shop.policy(), shop.policy(), []

    def counted(policy: Policy, rows: Sequence[Sequence[TrainSequence]], **how: Any) -> Any:
        calls.append(len(rows))
        return packed_logps(policy, rows, **how)

    monkeypatch.setattr("rerankkit.lm.packed_logps", counted)
    many = [sequence(whole, f"Norda Luxe {word}", weight) for word, weight in (("Toner", 1.0), ("Wash", 0.5))] * 3
    monkeypatch.setattr(training, "ROW_TOKENS", 12)
    train(whole, lambda step: many, 1, Plan(), RunInfo(), what="training")
    monkeypatch.setattr(training, "FORWARD_TOKENS", 24)
    train(parts, lambda step: many, 1, Plan(), RunInfo(), what="training")

    assert calls[0] > 2 and max(calls[1:]) <= 2 and sum(calls[1:]) == calls[0]
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(parts)[name], rtol=1e-4, atol=1e-5)


def test_passes_count_padding_at_the_width_of_their_longest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ROW_TOKENS", 10)
    monkeypatch.setattr(training, "FORWARD_TOKENS", 40)
    rows = [[TrainSequence((0,) * n, (1.0,) * n)] for n in (60, 15, 10, 9, 8, 7, 6, 5)]
    # 60 is too long for any pass and gets its own; 15 is padded to: 2 rows; then 4 rows of width 10, then the last.
    found = [[len(row[0]) for row in one] for one in training._passes(rows)]
    assert found == [[60], [15, 10], [9, 8, 7, 6], [5]]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5])
def test_an_interrupted_training_ends_as_an_undisturbed_one(shop: Shop, tmp_path: Path, stop_at: int) -> None:
    whole, broken, resumed = shop.policy(), shop.policy(), shop.policy()
    train(whole, batches(whole), 6, Plan(), RunInfo(), what="training")

    def killed(metrics: Any) -> None:
        if metrics["step"] == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, batches(broken), 6, Plan(), RunInfo(work=tmp_path, log=killed), what="training")
    seen: list[int] = []
    info = RunInfo(work=tmp_path, log=lambda metrics: seen.append(int(metrics["step"])))
    train(resumed, batches(resumed), 6, Plan(), info, what="training")

    # Killed before the checkpoint of its own step: it goes on from the last even step before.
    assert seen == list(range((stop_at - 1) // 2 * 2 + 1, 7))
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


def test_no_steps_leave_the_policy_as_it_is(shop: Shop) -> None:
    policy = shop.policy()
    train(policy, batches(policy), 0, Plan(), RunInfo(), what="training")
    assert all(torch.equal(tensor, weights(shop.base)[name]) for name, tensor in weights(policy).items())


def test_a_loss_that_is_no_number_stops_the_run(shop: Shop) -> None:
    policy = shop.policy()
    with torch.no_grad():
        next(iter(policy.model.parameters())).fill_(math.nan)
    with pytest.raises(RunFailed, match=r"training: the loss is nan at step 1; lower the learning rate \(0\.01\)"):
        train(policy, batches(policy), 3, Plan(), RunInfo(), what="training")


def test_the_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth() -> None:
    rates = [learning_rate_at(step, 14, 1.0, 4) for step in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55)  # half way: 0.1 + 0.9 / 2
    assert rates[13] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate_at(1, 3, 1.0, 0) < 1.0
    assert [learning_rate_at(step, 2, 1.0, 10) for step in (1, 2)] == [0.1, 0.2]  # shorter than its warm-up

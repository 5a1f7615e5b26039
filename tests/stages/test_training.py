from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rerankkit.errors import RunFailed
from rerankkit.lm import Policy, TrainSequence, packed_logps
from rerankkit.math.schedules import learning_rate_at
from rerankkit.stages import training
from rerankkit.stages.training import train
from rerankkit.types import RunInfo

from .conftest import Shop


@dataclass(frozen=True)
class Plan:
    """A schedule without warm-up."""

    learning_rate: float = 1e-2
    warmup_steps: int = 0
    schedule: str = "cosine"
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


@pytest.mark.parametrize("size", [12, 24, 30])
def test_one_large_pass_and_many_small_ones_give_the_same_step(
    size: int, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[list[TrainSequence]]] = []

    def watched(policy: Policy, rows: Any, **how: Any) -> Any:
        calls.append(rows)
        return packed_logps(policy, rows, **how)

    monkeypatch.setattr("rerankkit.lm.packed_logps", watched)
    monkeypatch.setattr(training, "ROW_TOKENS", 12)
    many = [sequence(shop.base, f"Norda Luxe {word}", weight) for word, weight in (("Toner", 1.0), ("Wash", 0.5))] * 3
    found = []
    for tokens in (8192, size):
        policy, log = shop.policy(), []
        info = RunInfo(log=log.append, tokens_per_pass=tokens)
        # a single step of plain clipped gradients, so that weights differ as gradients do
        monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **how: torch.optim.SGD(parameters, lr))
        train(policy, lambda step: many, 1, Plan(), info, what="training")
        found.append((weights(policy), log[0]["loss"], log[0]["grad_norm"]))

    assert len(calls[0]) > 2 and len(calls) > 2
    assert [row for rows in calls[1:] for row in rows] == calls[0]
    assert all(len(rows) * max(sum(map(len, row)) for row in rows) <= size or len(rows) == 1 for rows in calls[1:])
    assert found[1][1:] == pytest.approx(found[0][1:], rel=1e-6)
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(tensor, found[1][0][name], rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_takes_the_same_step(shop: Shop) -> None:
    logs: list[list[Any]] = [[], []]
    plain, thrifty = shop.policy(), shop.policy()
    thrifty.checkpoint_gradients()
    seen: list[int] = []
    packed_logps(thrifty, [batches(thrifty)(1)])  # what is found out once about a model is found out here
    thrifty.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    for policy, log in ((plain, logs[0]), (thrifty, logs[1])):
        train(policy, batches(policy), 2, Plan(), RunInfo(log=log.append), what="training")
    assert len(seen) == 4  # each step's forward pass, and once more for its backward pass
    assert [entry["loss"] for entry in logs[1]] == pytest.approx([entry["loss"] for entry in logs[0]], rel=1e-6)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(thrifty)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_schedule_is_followed(shop: Shop, shape: Any) -> None:
    policy, log = shop.policy(), []
    plan = Plan(warmup_steps=1, schedule=shape)
    train(policy, batches(policy), 3, plan, RunInfo(log=log.append), what="training")
    expected = [learning_rate_at(step, 3, 1e-2, 1, shape) for step in (1, 2, 3)]
    assert [entry["learning_rate"] for entry in log] == expected


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

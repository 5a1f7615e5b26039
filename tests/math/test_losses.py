"""2 prompts x 4 samples. Rows 0-3 are one group, 4-7 a group without variance; row 3 was cut off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rerankkit.math.losses import (
    PRESETS,
    LossSettings,
    loss_denominator,
    mean_stats,
    overlong_penalty,
    policy_loss,
)

#            row 0  1          2    3          4    5    6    7
ROW_IDS = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 6, 7])
LENGTHS = [1, 2, 1, 3, 1, 1, 2, 1]
RATIOS = [1.5, 0.5, 1.1, 0.9, 2.0, 0.3, 1.0, 1.4, 0.7, 1.1, 1.2, 0.5]
LOGPS = torch.tensor([-0.5, -1.0, -2.0, -0.4, -1, -1, -1, -2, -2, -2, -2, -2], dtype=torch.float64)
OLD_LOGPS = LOGPS - torch.tensor(RATIOS, dtype=torch.float64).log()
ADVANTAGES = torch.tensor([2.0, -1.0, -1.0, 5.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
KEEP = torch.tensor([True, True, True, False, False, False, False, False])
SETTINGS = {name: replace(preset, constant=10) for name, preset in PRESETS.items()}


def loss_of(logps: Tensor, settings: LossSettings) -> Tensor:
    return policy_loss(logps, OLD_LOGPS, ROW_IDS, ADVANTAGES, settings, keep=KEEP)[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Token terms: row 0 r = 1.5, A = 2: min(3, 1.28 * 2) = 2.56. Row 1, A = -1: r = .5: min(-.5, -.8) = -.8;
        # r = 1.1: -1.1. Row 2, A = -1, r = .9: -.9. Sum -.24 over 4 tokens.
        ("dapo", 0.06),
        # 1.2 * 2 = 2.4; (-.8 - 1.1) / 2 = -.95; -.9. Sum .55 over 3 rollouts.
        ("grpo", -0.55 / 3),
        # 2.4 - .8 - 1.1 - .9 = -.4 over 3 rollouts x 10 tokens.
        ("dr-grpo", 0.4 / 30),
        # s = 1.5, sqrt(.55) = .74, .9: clipped to 1.0004, .9997, .9997: 2.0008 - .9997 - .9997 = .0014 over 3.
        ("gspo", -0.0014 / 3),
        # r A log pi: 1.5 * 2 * -.5 = -1.5; .5 * -1 * -1 = .5; 1.1 * -1 * -2 = 2.2; .9 * -1 * -.4 = .36. 1.56 over 4.
        ("cispo", -0.39),
    ],
)
def test_presets_by_hand(name: str, expected: float) -> None:
    assert loss_of(LOGPS, SETTINGS[name]).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # d loss / d log pi = -(r A) where the clip is not in force, / denominator
        ("dapo", [0, 0, 1.1 / 4, 0.9 / 4]),
        ("grpo", [0, 0, 1.1 / 2 / 3, 0.9 / 3]),
        ("dr-grpo", [0, 0, 1.1 / 30, 0.9 / 30]),
        ("gspo", [0, 0, 0, 0]),
        ("cispo", [-3 / 4, 0.5 / 4, 1.1 / 4, 0.9 / 4]),
    ],
)
def test_gradients_by_hand(name: str, expected: list[float]) -> None:
    logps = LOGPS.clone().requires_grad_()
    torch.autograd.backward(loss_of(logps, SETTINGS[name]))
    assert logps.grad is not None
    assert logps.grad[:4].tolist() == pytest.approx(expected, abs=1e-12)
    assert not logps.grad[4:].any()  # the rollout that was cut off, and the group without variance


WIDE = {
    **SETTINGS,
    "gspo, wide clip": replace(SETTINGS["gspo"], clip_low=0.2, clip_high=0.8),
    "gspo, token mean": replace(SETTINGS["gspo"], clip_low=0.2, clip_high=0.8, aggregate="token"),
    "on-policy": LossSettings(ratio="none"),
}


@pytest.mark.parametrize("name", WIDE)
def test_gradients_equal_finite_differences(name: str) -> None:
    settings = WIDE[name]
    weights = torch.tensor(RATIOS, dtype=torch.float64).clamp(1 - settings.clip_low, 1 + settings.clip_high)

    def objective(logps: Tensor) -> Tensor:
        if settings.surrogate != "weighted":
            return loss_of(logps, settings)
        # a constant weight cannot be seen by differences: hold it, and let every token be a rollout of its own
        num = torch.arange(len(LOGPS))
        held = weights * ADVANTAGES[ROW_IDS]
        return policy_loss(logps, OLD_LOGPS, num, held, replace(settings, ratio="none"), keep=KEEP[ROW_IDS])[0]

    logps = LOGPS.clone().requires_grad_()
    torch.autograd.backward(loss_of(logps, settings))
    step = 1e-6
    for i in range(len(LOGPS)):
        up, down = LOGPS.clone(), LOGPS.clone()
        up[i] += step
        down[i] -= step
        slope = (objective(up) - objective(down)).item() / (2 * step)
        assert logps.grad is not None
        assert logps.grad[i].item() == pytest.approx(slope, abs=1e-8), i


@pytest.mark.parametrize("name", WIDE)
def test_dropped_rollouts_leave_the_denominator(name: str) -> None:
    alone = policy_loss(LOGPS[:4], OLD_LOGPS[:4], ROW_IDS[:4], ADVANTAGES[:3], WIDE[name])[0]
    assert loss_of(LOGPS, WIDE[name]).item() == pytest.approx(alone.item(), abs=1e-15)


@pytest.mark.parametrize("name", WIDE)
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    settings = WIDE[name]
    whole = LOGPS.clone().requires_grad_()
    loss, stats = policy_loss(whole, OLD_LOGPS, ROW_IDS, ADVANTAGES, settings, keep=KEEP)
    torch.autograd.backward(loss)

    denominator = loss_denominator(LENGTHS, KEEP.tolist(), settings)
    parts = LOGPS.clone().requires_grad_()
    total, all_stats = 0.0, []
    for first, last in ((0, 1), (1, 5), (5, 8)):  # the last holds nothing that counts
        mine = torch.isin(ROW_IDS, torch.arange(first, last))
        one, one_stats = policy_loss(
            parts[mine], OLD_LOGPS[mine], ROW_IDS[mine] - first, ADVANTAGES[first:last], settings,
            keep=KEEP[first:last], denominator=denominator,
        )  # fmt: skip
        torch.autograd.backward(one)
        total += one.item()
        all_stats.append(one_stats)
    assert total == pytest.approx(loss.item(), abs=1e-15)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-15)
    assert mean_stats(all_stats) == pytest.approx(stats)


def test_denominators_by_hand() -> None:
    keep = KEEP.tolist()
    assert loss_denominator(LENGTHS, keep, PRESETS["dapo"]) == 4
    assert loss_denominator(LENGTHS, keep, PRESETS["grpo"]) == 3
    assert loss_denominator(LENGTHS, keep, SETTINGS["dr-grpo"]) == 30


def test_stats_by_hand() -> None:
    _, stats = policy_loss(LOGPS, OLD_LOGPS, ROW_IDS, ADVANTAGES, PRESETS["dapo"], keep=KEEP)
    # kept ratios 1.5, .5, 1.1, .9. r - 1 - ln r: .094535 + .193147 + .004690 + .005361 = .297733
    assert stats["ratio_mean"] == pytest.approx(1.0)
    assert stats["clip_ratio/low_mean"] == stats["clip_ratio/high_mean"] == 0.25
    assert stats["approx_kl"] == pytest.approx(0.297733 / 4, abs=1e-6)
    assert stats["num_tokens"] == 4


def test_a_ratio_that_moves_against_its_advantage_is_not_clipped() -> None:
    # r = 1.5 with A = -1, and r = .5 with A = 1: the minimum keeps -1.5 and .5
    old = torch.zeros(2)
    logps = torch.tensor([1.5, 0.5]).log()
    loss, stats = policy_loss(logps, old, torch.tensor([0, 1]), torch.tensor([-1.0, 1.0]), PRESETS["dapo"])
    assert loss.item() == pytest.approx(0.5)
    assert stats["clip_ratio/low_mean"] == stats["clip_ratio/high_mean"] == 0


def test_nothing_kept_is_zero_with_a_zero_gradient() -> None:
    for settings in SETTINGS.values():
        logps = torch.full((2,), torch.nan, requires_grad=True)
        loss, stats = policy_loss(
            logps, torch.zeros(2), torch.tensor([0, 0]), torch.zeros(1), settings, keep=torch.tensor([False])
        )
        torch.autograd.backward(loss)
        assert loss.item() == 0
        assert logps.grad is not None
        assert logps.grad.tolist() == [0, 0]
        assert stats["num_tokens"] == 0


def test_extreme_ratios_stay_finite() -> None:
    for settings in SETTINGS.values():
        logps = torch.tensor([-1.0, -500.0], requires_grad=True)
        loss, _ = policy_loss(
            logps, torch.tensor([-500.0, -1.0]), torch.tensor([0, 1]), torch.tensor([1.0, -1.0]), settings
        )
        torch.autograd.backward(loss)
        assert torch.isfinite(loss)
        assert logps.grad is not None
        assert torch.isfinite(logps.grad).all()


@pytest.mark.parametrize(
    ("length", "expected"),
    # limit 100, buffer 20: free up to 80, then -1/20 a token
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (101, -1.0), (500, -1.0)],
)
def test_overlong_penalty_by_hand(length: int, expected: float) -> None:
    assert overlong_penalty(length, 100, 20) == pytest.approx(expected)


def test_overlong_without_a_buffer_is_a_step() -> None:
    assert [overlong_penalty(length, 100, 0) for length in (100, 101)] == [0, -1]
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(1, 100, 101)


def test_the_sequence_ratio_is_a_geometric_mean() -> None:
    # s = 1.5, sqrt(.5 * 1.1) = .741620, .9, none of them clipped: 1.5 * 2 - .741620 - .9 = 1.358380 over 3 rollouts
    settings = replace(PRESETS["gspo"], clip_low=0.5, clip_high=0.8)
    assert loss_of(LOGPS, settings).item() == pytest.approx(-1.358380 / 3, abs=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\[12\], \[11\]"):
        policy_loss(LOGPS, OLD_LOGPS[1:], ROW_IDS, ADVANTAGES, PRESETS["dapo"])
    with pytest.raises(ValueError, match=r"keep must be \[8\] bool"):
        policy_loss(LOGPS, OLD_LOGPS, ROW_IDS, ADVANTAGES, PRESETS["dapo"], keep=KEEP[1:])
    with pytest.raises(ValueError, match="constant"):
        policy_loss(LOGPS, OLD_LOGPS, ROW_IDS, ADVANTAGES, PRESETS["dr-grpo"])
    with pytest.raises(ValueError, match="aggregate: 'tokens'"):
        LossSettings(aggregate="tokens")  # type: ignore[arg-type]  # a config's typo

"""2 prompts x 4 samples. Rows 0-3 are one group, 4-7 a group without variance; row 3 was cut off."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rerankkit.math.advantages import group_advantages
from rerankkit.math.losses import (
    PRESETS,
    LossSettings,
    kl_estimates,
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
# ln(ref / pi) of the four kept tokens: ln 2, ln .5, 0, ln 2
REF_LOGPS = LOGPS + torch.tensor([2, 0.5, 1, 2] + [3.0] * 8, dtype=torch.float64).log()
ENTROPIES = torch.tensor([0.5, 1.0, 2.0, 0.1] + [9.0] * 8, dtype=torch.float64)


def loss_of(logps: Tensor, settings: LossSettings) -> Tensor:
    return policy_loss(
        logps, OLD_LOGPS, ROW_IDS, ADVANTAGES, settings, keep=KEEP, ref_logps=REF_LOGPS, entropies=ENTROPIES
    )[0]


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Rewards 1, 0, 0 of those kept: z-scores 2 a, -a, -a with a = 1 / sqrt(3), and centred with a = 1 / 3: a times
        # the advantages above, and so is the loss.
        ("dapo", 0.06 / 3**0.5),
        ("grpo", -0.55 / 3 / 3**0.5),
        ("dr-grpo", 0.4 / 30 / 3),
        ("gspo", -0.0014 / 3 / 3**0.5),
        ("cispo", -0.39 / 3**0.5),
    ],
)
def test_from_rewards_to_loss_by_hand(name: str, expected: float) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 7.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    judged = torch.tensor([[True, True, True, False], [True] * 4])  # row 3 was cut off
    values, has_signal = group_advantages(rewards, judged, SETTINGS[name].advantage, eps=0.0)
    keep = (judged & has_signal[:, None]).flatten()
    assert keep.tolist() == KEEP.tolist()
    loss = policy_loss(LOGPS, OLD_LOGPS, ROW_IDS, values.flatten(), SETTINGS[name], keep=keep)[0]
    assert loss.item() == pytest.approx(expected, abs=1e-12)


WIDE = {
    **SETTINGS,
    "dapo, dual clip": replace(SETTINGS["dapo"], clip_high=0.05, clip_dual=1.08),
    "grpo, k3": replace(SETTINGS["grpo"], kl_weight=0.5),
    "dr-grpo, k2": replace(SETTINGS["dr-grpo"], kl_weight=0.5, kl_estimator="k2"),
    "gspo, k3 and entropy": replace(SETTINGS["gspo"], kl_weight=0.5, entropy_weight=0.1),
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
    four = slice(4)
    alone = policy_loss(
        LOGPS[four], OLD_LOGPS[four], ROW_IDS[four], ADVANTAGES[:3], WIDE[name],
        ref_logps=REF_LOGPS[four], entropies=ENTROPIES[four],
    )[0]  # fmt: skip
    assert loss_of(LOGPS, WIDE[name]).item() == pytest.approx(alone.item(), abs=1e-15)


@pytest.mark.parametrize("name", WIDE)
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    settings = WIDE[name]
    whole = LOGPS.clone().requires_grad_()
    loss, stats = policy_loss(
        whole, OLD_LOGPS, ROW_IDS, ADVANTAGES, settings, keep=KEEP, ref_logps=REF_LOGPS, entropies=ENTROPIES
    )
    torch.autograd.backward(loss)

    denominator = loss_denominator(LENGTHS, KEEP.tolist(), settings)
    parts = LOGPS.clone().requires_grad_()
    total, all_stats = 0.0, []
    for first, last in ((0, 1), (1, 5), (5, 8)):  # the last holds nothing that counts
        mine = torch.isin(ROW_IDS, torch.arange(first, last))
        one, one_stats = policy_loss(
            parts[mine], OLD_LOGPS[mine], ROW_IDS[mine] - first, ADVANTAGES[first:last], settings,
            keep=KEEP[first:last], denominator=denominator, ref_logps=REF_LOGPS[mine], entropies=ENTROPIES[mine],
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


def test_kl_by_hand() -> None:
    # ln q = ln 2, -ln 2, 0, ln 2 with ln 2 = .693147. k1 = -ln q. k2 = .240227 where q is not 1. k3 = q - 1 - ln q:
    # 2 - 1 - .693147 = .306853, .5 - 1 + .693147 = .193147, 0, .306853.
    ln2 = math.log(2)
    four = LOGPS[:4], REF_LOGPS[:4]
    assert kl_estimates(*four, "k1").tolist() == pytest.approx([-ln2, ln2, 0, -ln2])
    assert kl_estimates(*four, "k2").tolist() == pytest.approx([ln2**2 / 2, ln2**2 / 2, 0, ln2**2 / 2])
    assert kl_estimates(*four, "k3").tolist() == pytest.approx([1 - ln2, ln2 - 0.5, 0, 1 - ln2])


@pytest.mark.parametrize(
    ("estimator", "value", "slopes"),
    [
        # d k3 / d log pi = 1 - q; d k2 = -ln q; k1 is r * sg(-ln q), whose slope is itself. Kept r: 1.5, .5, 1.1, .9.
        ("k3", 1.5 - math.log(2), [-1, 0.5, 0, -1]),
        ("k2", 1.5 * math.log(2) ** 2, [-math.log(2), math.log(2), 0, -math.log(2)]),
        ("k1", -1.9 * math.log(2), [-1.5 * math.log(2), 0.5 * math.log(2), 0, -0.9 * math.log(2)]),
    ],
)
def test_the_kl_term_by_hand(estimator: Any, value: float, slopes: list[float]) -> None:
    settings = replace(PRESETS["dapo"], kl_weight=0.1, kl_estimator=estimator)
    logps = LOGPS.clone().requires_grad_()
    loss, stats = policy_loss(logps, OLD_LOGPS, ROW_IDS, ADVANTAGES, settings, keep=KEEP, ref_logps=REF_LOGPS)
    torch.autograd.backward(loss)
    assert logps.grad is not None
    assert loss.item() == pytest.approx(0.06 + 0.1 * value / 4, abs=1e-12)  # .06 is DAPO's own, see above
    plain = [0, 0, 1.1 / 4, 0.9 / 4]
    expected = [own + 0.1 * slope / 4 for own, slope in zip(plain, slopes, strict=True)]
    assert logps.grad[:4].tolist() == pytest.approx(expected, abs=1e-12)
    assert not logps.grad[4:].any()  # those that do not count are not held back either
    assert stats["kl"] == pytest.approx((1.5 - math.log(2)) / 4)  # k3, whatever is trained on


def test_the_entropy_bonus_by_hand() -> None:
    # aggregated like all else: under dapo (.5 + 1 + 2 + .1) / 4, under grpo (.5 + (1 + 2) / 2 + .1) / 3
    for name, own, mean, slopes in (
        ("dapo", 0.06, 0.9, [0.25] * 4),
        ("grpo", -0.55 / 3, 0.7, [1 / 3, 1 / 6, 1 / 6, 1 / 3]),
    ):
        entropies = ENTROPIES.clone().requires_grad_()
        settings = replace(PRESETS[name], entropy_weight=0.01)
        loss, _ = policy_loss(LOGPS, OLD_LOGPS, ROW_IDS, ADVANTAGES, settings, keep=KEEP, entropies=entropies)
        torch.autograd.backward(loss)
        assert loss.item() == pytest.approx(own - 0.01 * mean, abs=1e-12)
        assert entropies.grad is not None
        assert entropies.grad.tolist() == pytest.approx([-0.01 * slope for slope in slopes] + [0] * 8)


def test_the_dual_clip_bounds_what_moves_away() -> None:
    # A = -1 with r = 2, 4: -2 and, beyond the bound of 3, -3; A = 1 with r = 4: 1.28 as ever. -(-2 - 3 + 1.28) / 3
    logps = torch.tensor([2.0, 4.0, 4.0], dtype=torch.float64).log().requires_grad_()
    loss, stats = policy_loss(
        logps,
        torch.zeros(3, dtype=torch.float64),
        torch.arange(3),
        torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64),
        replace(PRESETS["dapo"], clip_dual=3.0),
    )
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(3.72 / 3)
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([2 / 3, 0, 0])
    assert stats["clip_ratio/dual_mean"] == pytest.approx(1 / 3)


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
    with pytest.raises(ValueError, match=r"ref_logps must be \[K\] = \[12\] for a weight of 0.1, but is missing"):
        policy_loss(LOGPS, OLD_LOGPS, ROW_IDS, ADVANTAGES, LossSettings(kl_weight=0.1))
    with pytest.raises(ValueError, match=r"entropies must be .*, but is \[11\]"):
        policy_loss(LOGPS, OLD_LOGPS, ROW_IDS, ADVANTAGES, PRESETS["dapo"], entropies=ENTROPIES[1:])
    with pytest.raises(ValueError, match=r"clip_dual: 1.2 must lie above 1 \+ clip_high = 1.2"):
        LossSettings(clip_dual=1.2)
    with pytest.raises(ValueError, match="clip_dual"):
        replace(PRESETS["cispo"], clip_dual=9.0)
    with pytest.raises(ValueError, match="must not be negative, not -1 and 0"):
        LossSettings(kl_weight=-1)
    with pytest.raises(ValueError, match="kl_estimator: 'k4'"):
        LossSettings(kl_estimator="k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aggregate: 'tokens'"):
        LossSettings(aggregate="tokens")  # type: ignore[arg-type]  # a config's typo

"""Rewards of a group, turned into advantages."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

AdvantageKind: TypeAlias = Literal["zscore", "centred", "batch", "leave-one-out"]
"""What a reward is compared with: see `group_advantages`."""

SAME = 1e-6
"""Rewards closer than this are one reward: sums of weighted parts differ in the last bits."""


class Advantages(NamedTuple):
    """Advantages, and which groups have any."""

    values: Tensor
    """[P, G], in the rewards' dtype; 0 where not kept, and throughout a group without signal."""
    has_signal: Tensor
    """[P] bool: at least two rollouts kept, and their rewards differ."""


def group_advantages(
    rewards: Tensor, keep: Tensor | None = None, kind: AdvantageKind = "zscore", eps: float = 1e-6
) -> Advantages:
    """How much better each rollout is than its group: rewards [P, G] of P prompts with G rollouts each,
    `keep` [P, G] bool for those that count (default: all).

    With mean and standard deviation over the n kept rollouts of the group:

        zscore         A_i = (R_i - mean) / (std + eps)            GRPO, Shao et al. 2024, 2402.03300, section 4.1.2
        centred        A_i = R_i - mean                            Dr. GRPO, Liu et al. 2025, 2503.20783, section 3.2
        batch          A_i = (R_i - mean) / (std of all + eps)     Liu et al. 2025, 2508.08221; "batch" in TRL
        leave-one-out  A_i = R_i - mean of the others
                           = (R_i - mean) * n / (n - 1)            RLOO, Ahmadian et al. 2024, 2402.14740, section 2.3

    The std of all is that of the kept rewards of all groups that have signal: others leave the batch whole. The papers
    do not say which standard deviation; ours divides by n - 1, as TRL and verl do. Rollouts that are not kept,
    for want of a reward or by a filter, leave mean and deviation (their rewards may be NaN). Rows without signal must
    leave the loss and its denominator: give `has_signal` on as `policy_loss(..., keep=)`.
    Raises ValueError for a kept reward that is not finite.
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(get_args(AdvantageKind))}")
    keep = _checked(rewards, keep)
    rewards = torch.where(keep, rewards, torch.zeros_like(rewards))
    num = keep.sum(dim=1, keepdim=True)  # [P, 1]
    mean = rewards.sum(dim=1, keepdim=True) / num.clamp(min=1)
    centred = torch.where(keep, rewards - mean, torch.zeros_like(rewards))
    has_signal = (centred.abs().amax(dim=1) > SAME) & (num.squeeze(1) > 1)
    others = (num - 1).clamp(min=1)
    values = centred
    if kind == "leave-one-out":
        values = centred * num / others
    elif kind == "zscore":
        values = centred / ((centred.square().sum(dim=1, keepdim=True) / others).sqrt() + eps)
    elif kind == "batch" and has_signal.any():
        values = centred / (rewards[keep & has_signal[:, None]].std() + eps)
    return Advantages(torch.where(has_signal[:, None], values, torch.zeros_like(values)), has_signal)


def pass_at_k_bonus(values: Tensor, k: int, keep: Tensor | None = None) -> Tensor:
    """What each of `values` [P, G] adds to the best of k: [P, G], never negative, 0 where not kept or where
    fewer than k are.

        B_i = k * mean over all sets S of k - 1 other kept rollouts of max(0, V_i - max over S of V)

    Added to a mean over rollouts of A log pi, it is an unbiased estimate of the gradient of E[max of k samples], which
    is pass@k where values are 0 and 1 (Walder and Karkhanis 2025, 2505.15201, with their baseline over the k - 1
    others). `values` may be rewards or advantages: shifting a group changes nothing, and scaling it scales B.
    Raises ValueError unless k is at least 2: for k = 1 it is the advantage itself.
    """
    if k < 2:
        raise ValueError(f"k must be at least 2, not {k}")
    keep = _checked(values, keep)
    bonus = torch.zeros_like(values)
    for row, kept in enumerate(keep):
        num = int(kept.sum())
        if num < k:
            continue
        sorted_values, order = values[row, kept].sort()
        # the j-th smallest is the best of a set: k - 2 of the j before it are in the set, too
        shares = [math.comb(j, k - 2) / math.comb(num - 1, k - 1) for j in range(num)]
        gaps = (sorted_values[:, None] - sorted_values[None, :]).tril()  # [n, n], to each that is smaller
        bonus[row, kept.nonzero()[:, 0][order]] = k * (gaps * gaps.new_tensor(shares)).sum(dim=1)
    return bonus


def _checked(rewards: Tensor, keep: Tensor | None) -> Tensor:
    keep = torch.ones_like(rewards, dtype=torch.bool) if keep is None else keep
    if rewards.ndim != 2 or keep.shape != rewards.shape or keep.dtype != torch.bool:
        raise ValueError(f"rewards and keep (bool) must be [P, G], not {_show(rewards)} and {_show(keep)}")
    if not torch.isfinite(rewards[keep]).all():
        raise ValueError("a kept reward is NaN or infinite; give keep=False for rollouts that have no reward")
    return keep


def _show(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"

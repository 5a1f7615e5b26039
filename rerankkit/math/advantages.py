"""Rewards of a group, turned into advantages."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

AdvantageKind: TypeAlias = Literal["zscore", "centred", "leave-one-out"]

_SAME = 1e-6  # rewards closer than this are one reward: sums of weighted parts differ in the last bits


class Advantages(NamedTuple):
    """Advantages, and which groups have any."""

    values: Tensor
    """[P, G], in the rewards' dtype; 0 where not kept, and throughout a group without signal."""
    has_signal: Tensor
    """[P] bool: at least two rollouts kept, and their rewards differ."""


def group_advantages(
    rewards: Tensor, keep: Tensor | None = None, kind: AdvantageKind = "zscore", eps: float = 1e-6
) -> Advantages:
    """How much better each rollout is than its group: rewards [P, G] of P prompts with G rollouts each.

    With mean and standard deviation over the n kept rollouts of the group:

        zscore         A_i = (R_i - mean) / (std + eps)            GRPO, Shao et al. 2024, 2402.03300, section 4.1.2
        centred        A_i = R_i - mean                            Dr. GRPO, Liu et al. 2025, 2503.20783, section 3.2
        leave-one-out  A_i = R_i - mean of the others
                           = (R_i - mean) * n / (n - 1)            RLOO, Ahmadian et al. 2024, 2402.14740, section 2.3

    The papers do not say which standard deviation; ours divides by n - 1, as TRL and verl do. `keep` [P, G] bool:
    rollouts that have no reward, or were filtered, leave mean and deviation (their rewards may be NaN). Rows without
    signal must leave the loss and its denominator: give `has_signal` on as `policy_loss(..., keep=)`.
    Raises ValueError for a kept reward that is not finite.
    """
    keep = torch.ones_like(rewards, dtype=torch.bool) if keep is None else keep
    if rewards.ndim != 2 or keep.shape != rewards.shape or keep.dtype != torch.bool:
        raise ValueError(f"rewards and keep (bool) must be [P, G], not {_show(rewards)} and {_show(keep)}")
    rewards = torch.where(keep, rewards, torch.zeros_like(rewards))
    if not torch.isfinite(rewards).all():
        raise ValueError("a kept reward is NaN or infinite; give keep=False for rollouts that have no reward")
    num = keep.sum(dim=1, keepdim=True)  # [P, 1]
    mean = rewards.sum(dim=1, keepdim=True) / num.clamp(min=1)
    centred = torch.where(keep, rewards - mean, torch.zeros_like(rewards))
    has_signal = (centred.abs().amax(dim=1) > _SAME) & (num.squeeze(1) > 1)
    others = (num - 1).clamp(min=1)
    if kind == "centred":
        values = centred
    elif kind == "leave-one-out":
        values = centred * num / others
    elif kind == "zscore":
        values = centred / ((centred.square().sum(dim=1, keepdim=True) / others).sqrt() + eps)
    else:
        raise ValueError(f"kind must be zscore, centred or leave-one-out, not {kind!r}")
    return Advantages(torch.where(has_signal[:, None], values, torch.zeros_like(values)), has_signal)


def _show(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"

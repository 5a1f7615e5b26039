"""Policy-gradient losses: one function, and the published ones as settings of it.

Layout: the T_i tokens of N rollouts lie in one flat vector [K], K = sum T_i, with `row_ids` [K] naming each token's
rollout. Tokens that are not to be trained (prompt, padding, a part the reward does not judge) are simply not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from rerankkit.math.advantages import AdvantageKind

KlEstimator: TypeAlias = Literal["k1", "k2", "k3"]
"""See `kl_estimates`."""

_MAX_LOG_RATIO = 20.0  # exp() of more is inf, and a clipped inf has the gradient 0 * inf = NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What tells one policy-gradient method from another."""

    advantage: AdvantageKind = "zscore"
    ratio: Literal["token", "sequence", "none"] = "token"
    """pi / pi_old of each token; the geometric mean of these over the rollout; or none (on-policy, -A log pi)."""
    surrogate: Literal["clipped", "weighted"] = "clipped"
    """clipped: min(r A, clip(r) A), Schulman et al. 2017 eq. 7. weighted: the clipped ratio is a constant weight of
    A log pi, so that no token loses its gradient (CISPO)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    clip_dual: float = 0.0
    """Where A < 0 the ratio counts as at most this, which lies above 1 + clip_high (Ye et al. 2020, 1912.09729, eq. 5):
    otherwise nothing bounds the step away. 0 is off; surrogate "clipped" only."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens; mean over rollouts of their token means; or mean over rollouts of token sum / constant."""
    constant: float | None = None
    """Tokens by which a rollout's sum is divided under aggregate = "constant": the completion limit."""
    kl_weight: float = 0.0
    """Weight of the divergence from a reference policy (beta); 0 is off."""
    kl_estimator: KlEstimator = "k3"
    """How that is estimated, see `kl_estimates`."""
    entropy_weight: float = 0.0
    """Weight of the entropy of each next-token distribution, which is rewarded; 0 is off."""

    def __post_init__(self) -> None:
        known = {
            "ratio": ("token", "sequence", "none"),
            "surrogate": ("clipped", "weighted"),
            "aggregate": ("token", "sequence", "constant"),
            "advantage": get_args(AdvantageKind),
            "kl_estimator": get_args(KlEstimator),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(f"clip_low and clip_high must not be negative, not {self.clip_low} and {self.clip_high}")
        if self.constant is not None and self.constant <= 0:
            raise ValueError(f"constant must be positive, not {self.constant}")
        if self.clip_dual and (self.surrogate != "clipped" or self.clip_dual <= 1 + self.clip_high):
            raise ValueError(
                f"clip_dual: {self.clip_dual} must lie above 1 + clip_high = {1 + self.clip_high}, "
                'and needs surrogate = "clipped"'
            )
        if self.kl_weight < 0 or self.entropy_weight < 0:
            raise ValueError(
                f"kl_weight and entropy_weight must not be negative, not {self.kl_weight} and {self.entropy_weight}"
            )


PRESETS: Mapping[str, LossSettings] = MappingProxyType(
    {
        # Shao et al. 2024, 2402.03300, eq. 3, without its KL term.
        "grpo": LossSettings(aggregate="sequence"),
        # Yu et al. 2025, 2503.14476, eq. 8; its dynamic sampling and overlong rules are the optimizer's.
        "dapo": LossSettings(clip_high=0.28),
        # Liu et al. 2025, 2503.20783, section 3.2; `constant` is the completion limit, given by the optimizer.
        "dr-grpo": LossSettings(advantage="centred", aggregate="constant"),
        # Zheng et al. 2025, 2507.18071, eq. 5 and 7.
        "gspo": LossSettings(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregate="sequence"),
        # MiniMax 2025, 2506.13585, eq. 4 and 5. It has no lower bound and does not print the upper; 5 is our choice.
        "cispo": LossSettings(surrogate="weighted", clip_low=1.0, clip_high=4.0),
    }
)
"""The published ones by name: grpo, dapo, dr-grpo, gspo, cispo."""


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    row_ids: Tensor,
    advantages: Tensor,
    settings: LossSettings,
    *,
    keep: Tensor | None = None,
    denominator: float | None = None,
    ref_logps: Tensor | None = None,
    entropies: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss to minimise (a scalar), and what to log about it, of K tokens in N rollouts: logps, old_logps [K],
    row_ids [K] (the rollout of each token), advantages [N]; only logps is differentiated.

    `keep` [N] bool: rollouts that count. Those of a group without signal, truncated or without reward must be False:
    they then leave the sum *and* the denominator, where leaving them in with advantage 0 would shrink the step. With r
    the ratio of pi to pi_old:

        J = sum over kept tokens of w_t * (S - kl_weight * KL + entropy_weight * H) / denominator;  loss = -J
        S = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and at least clip_dual * A where A < 0

        aggregate     w_t       denominator
        token         1         kept tokens              DAPO, 2503.14476 eq. 8
        sequence      1 / T_i   kept rollouts            GRPO, 2402.03300 eq. 3
        constant      1         kept rollouts * constant Dr. GRPO, 2503.20783 section 3.2

    KL is estimated from `ref_logps` [K], any reference's, by `kl_estimates`. "k1" stands in the loss as r * sg(k1): its
    own gradient is 0 on average, so it has to act as a penalty on each token's reward. H is `entropies` [K], which is
    differentiated too. Both are read only where their weight is not 0, but with `ref_logps` `kl` is logged anyway.

    Gradient accumulation: give every micro-batch (of whole rollouts) the `loss_denominator` of the whole batch, and add
    the losses up. With nothing kept the loss is 0, with a zero gradient.

    The second value has `ratio_mean`, `clip_ratio/low_mean`, `clip_ratio/high_mean` (share of tokens whose clip is in
    force), `clip_ratio/dual_mean` where there is a third clip, `approx_kl` (mean of r - 1 - log r over token ratios:
    Schulman's k3 estimate of KL(pi_old || pi)), with `ref_logps` `kl` (mean of k3, whatever the loss takes), and
    `num_tokens`, the weight with which `mean_stats` joins micro-batches.
    """
    num_rows = advantages.shape[0] if advantages.ndim == 1 else -1
    keep = torch.ones_like(advantages, dtype=torch.bool) if keep is None else keep
    if logps.ndim != 1 or not logps.shape == old_logps.shape == row_ids.shape or num_rows < 0:
        shapes = [list(tensor.shape) for tensor in (logps, old_logps, row_ids, advantages)]
        raise ValueError(f"logps, old_logps, row_ids must be [K] and advantages [N], not {shapes}")
    if keep.shape != advantages.shape or keep.dtype != torch.bool:
        raise ValueError(f"keep must be [{num_rows}] bool, not {list(keep.shape)} {keep.dtype}")

    for name, values, weight in (
        ("ref_logps", ref_logps, settings.kl_weight),
        ("entropies", entropies, settings.entropy_weight),
    ):
        if (values is None and weight) or (values is not None and values.shape != logps.shape):
            shape = "missing" if values is None else list(values.shape)
            raise ValueError(f"{name} must be [K] = {list(logps.shape)} for a weight of {weight}, but is {shape}")

    lengths = torch.zeros_like(advantages, dtype=torch.long).index_add(0, row_ids, torch.ones_like(row_ids))
    if denominator is None:
        denominator = loss_denominator(lengths.tolist(), keep.tolist(), settings)
    chosen = keep[row_ids]
    logps, old_logps, row_ids = logps[chosen], old_logps[chosen].detach(), row_ids[chosen]
    token_advantages = advantages.detach()[row_ids]
    ref_logps = None if ref_logps is None else ref_logps[chosen].detach()

    log_ratio = (logps - old_logps).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = _ratio(log_ratio, row_ids, lengths, settings)
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    if settings.ratio == "none":
        objective = token_advantages * logps
    elif settings.surrogate == "weighted":
        objective = clipped.detach() * token_advantages * logps
    else:
        objective = torch.minimum(ratio * token_advantages, clipped * token_advantages)
        if settings.clip_dual:
            floor = torch.where(token_advantages < 0, settings.clip_dual * token_advantages, -torch.inf)
            objective = torch.maximum(objective, floor)
    if settings.kl_weight and ref_logps is not None:
        away = kl_estimates(logps, ref_logps, settings.kl_estimator)
        if settings.kl_estimator == "k1":
            away = log_ratio.exp() * away.detach()
        objective = objective - settings.kl_weight * away
    if settings.entropy_weight and entropies is not None:
        objective = objective + settings.entropy_weight * entropies[chosen]
    if settings.aggregate == "sequence":
        objective = objective / lengths[row_ids]
    loss = -objective.sum() / max(denominator, 1e-12)
    stats = _stats(log_ratio.detach(), ratio.detach(), token_advantages, settings)
    if ref_logps is not None:
        stats["kl"] = float(kl_estimates(logps.detach(), ref_logps, "k3").sum()) / max(len(logps), 1)
    return loss, stats


def kl_estimates(logps: Tensor, ref_logps: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates [K] of KL(pi || reference) from tokens drawn from pi (Schulman 2020, *Approximating KL divergence*).

    k1   log pi - log ref              unbiased, of either sign
    k2   (log pi - log ref)^2 / 2      biased a little; its gradient is that of the KL divergence
    k3   q - 1 - log q, q = ref / pi   unbiased, never negative: GRPO's, Shao et al. 2024, eq. 4
    """
    log_q = (ref_logps - logps).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_q
    if estimator == "k2":
        return 0.5 * log_q.square()
    if estimator == "k3":
        return torch.expm1(log_q) - log_q
    raise ValueError(f"kl_estimator: {estimator!r} is not one of {', '.join(get_args(KlEstimator))}")


def loss_denominator(lengths: Sequence[int], keep: Sequence[bool], settings: LossSettings) -> float:
    """What the sum of a whole batch is divided by: `lengths` [N] in tokens, `keep` [N] the rollouts that count."""
    if len(lengths) != len(keep):
        raise ValueError(f"lengths and keep must both be [N], not [{len(lengths)}] and [{len(keep)}]")
    if settings.aggregate == "token":
        return float(sum(length for length, kept in zip(lengths, keep, strict=True) if kept))
    if settings.aggregate == "sequence":
        return float(sum(keep))
    if settings.constant is None:
        raise ValueError('aggregate = "constant" needs settings.constant, a number of tokens (the completion limit)')
    return float(sum(keep)) * settings.constant


def mean_stats(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The statistics of several micro-batches as of one: means weighted by `num_tokens`, which itself is summed."""
    total = sum(part["num_tokens"] for part in parts)
    names = parts[0] if parts else ()
    means = {name: sum(part[name] * part["num_tokens"] for part in parts) / max(total, 1) for name in names}
    return {**means, "num_tokens": total}


def overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO's soft punishment of long answers, all in tokens, to be added to the reward (Yu et al. 2025,
    2503.14476, eq. 13).

        0                                           length <= max_length - buffer
        ((max_length - buffer) - length) / buffer   up to max_length
        -1                                          beyond

    Raises ValueError unless 0 <= buffer <= max_length.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(f"buffer must lie between 0 and max_length = {max_length} tokens, not {buffer}")
    if length > max_length:
        return -1.0
    return min(0.0, (max_length - buffer - length) / buffer) if buffer else 0.0


def _ratio(log_ratio: Tensor, row_ids: Tensor, lengths: Tensor, settings: LossSettings) -> Tensor:
    """[K]: the importance ratio that stands at each token."""
    if settings.ratio == "token":
        return log_ratio.exp()
    if settings.ratio == "none":
        return torch.ones_like(log_ratio)
    sums = log_ratio.new_zeros(lengths.shape).index_add(0, row_ids, log_ratio)
    return (sums / lengths.clamp(min=1)).exp()[row_ids]


def _stats(log_ratio: Tensor, ratio: Tensor, advantages: Tensor, settings: LossSettings) -> dict[str, float]:
    num = log_ratio.numel()
    low, high = ratio < 1 - settings.clip_low, ratio > 1 + settings.clip_high
    if settings.surrogate == "clipped":  # the minimum lets a ratio through that moves against its advantage
        low, high = low & (advantages < 0), high & (advantages > 0)
    sums = {
        "ratio_mean": ratio.sum(),
        "clip_ratio/low_mean": low.sum(),
        "clip_ratio/high_mean": high.sum(),
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
    }
    if settings.clip_dual:
        sums["clip_ratio/dual_mean"] = ((ratio > settings.clip_dual) & (advantages < 0)).sum()
    return {**{name: float(value) / max(num, 1) for name, value in sums.items()}, "num_tokens": float(num)}

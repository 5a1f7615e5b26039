"""Policy-gradient updates on judged groups: what every group-based optimizer does once it has advantages."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean

import torch
from torch import Tensor

from rerankkit import processes
from rerankkit.errors import RunFailed
from rerankkit.lm.forward import TokenLogps, group_logps
from rerankkit.lm.meter import spent_on
from rerankkit.lm.policy import Policy
from rerankkit.lm.reference import Reference
from rerankkit.lm.update import accumulate, apply_gradients, passes
from rerankkit.math.losses import LossSettings, kl_estimates, loss_denominator, mean_stats, policy_loss
from rerankkit.types import Rollout, RunInfo


def update_on_groups(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Sequence[Rollout]],
    prompts: Sequence[Sequence[int]],
    advantages: Tensor,
    keep: Tensor,
    settings: LossSettings,
    *,
    info: RunInfo,
    updates: Sequence[Sequence[int]] | None = None,
    reference: Reference | None = None,
    temperature: float = 1.0,
    max_grad_norm: float = 1.0,
    max_logp_gap: float = math.inf,
    groups_per_pass: int = sys.maxsize,
) -> dict[str, float]:
    """Optimizer steps down `policy_loss` on P groups of at most G rollouts; returns what to log about them.
    prompts: [P], the token ids that each group continues. advantages, keep (bool): [P, G].

    A smaller group fills the beginning of its row; rollouts that are not kept leave the loss and its denominator.
    `updates` has, for each optimizer step, the indices of the groups that it is on: all of them in one step, unless
    given. A step whose groups have nothing kept is left out.

    Log-probabilities are taken as the rollouts were drawn: at `temperature`, under the mask of `allowed_ids`, and
    tokens that the mask forced count nowhere. `Rollout.logps` are those of the policy that sampled. Give a
    `reference` for `settings.kl_weight`, or to have `kl` logged. Work is cut by `info.tokens_per_pass` and
    `groups_per_pass`, and shared among the processes, each of which must hold all groups.

    The log has `num_updates`; means over the updates of `loss`, `grad_norm` (before it is cut to `max_grad_norm`),
    `entropy` (nats a chosen token), `kl` (k3 estimate; without a reference, from the policy that sampled: `approx_kl`)
    and the statistics of `policy_loss`; and `logp_gap`, `logp_gap_max`, nats a token by which trainer and sampler
    differ before the first update. With nothing kept at all it has the same names, and what can be told without a pass
    of the trainer: entropy from what was drawn, `kl` from the first group.

    Raises ValueError for shapes that do not fit, and RunFailed, before the update is made, for a gradient that is not
    finite and for a mean `logp_gap` of more than `max_logp_gap`, where what is learnt would be noise.
    """
    sizes = [len(group) for group in groups]
    if keep.shape != advantages.shape or keep.ndim != 2 or not len(groups) == len(prompts) == len(keep):
        shapes = f"{list(advantages.shape)} and {list(keep.shape)}"
        counts = f"{len(groups)} groups and {len(prompts)} prompts"
        raise ValueError(f"advantages and keep must be [P, G] for {counts}, not {shapes}")
    if max(sizes, default=0) > keep.shape[1]:
        raise ValueError(f"a group has {max(sizes)} rollouts, but advantages are {list(advantages.shape)}")

    def said(model: Policy, chosen: Sequence[int], entropies: bool = False) -> TokenLogps:
        return group_logps(
            model,
            [prompts[i] for i in chosen],
            [[rollout.token_ids for rollout in groups[i]] for i in chosen],
            temperature=temperature,
            entropies=entropies,
            autocast=torch.bfloat16 if info.precision == "bfloat16" else None,
            allowed=[[rollout.allowed_ids for rollout in groups[i]] for i in chosen],
        )

    def referred(known: Reference, chosen: Sequence[int]) -> Tensor:
        with spent_on("reference"):
            return known(lambda model: said(model, chosen).logps)

    def rows(table: Tensor, chosen: Sequence[int]) -> Tensor:
        return torch.cat([table[i, : sizes[i]] for i in chosen])

    def gradients(share: Sequence[int]) -> list[dict[str, float]]:
        """Added up over the groups `share`; logs of the passes."""
        lengths = [rollout.num_chosen for i in share for rollout in groups[i]]
        denominator = loss_denominator(lengths, rows(keep, share).tolist(), settings)

        def forward(chosen: list[int]) -> tuple[Tensor, dict[str, float]]:
            tokens = said(policy, chosen, entropies=True)
            assert tokens.entropies is not None
            old = _sampled_logps([groups[i] for i in chosen], policy.device)
            free = tokens.weights > 0  # what the mask forced was no choice: nothing to learn, nothing to count
            logps, old, entropies = tokens.logps[free], old[free], tokens.entropies[free]
            loss, stats = policy_loss(
                logps,
                old,
                tokens.sequence_ids[free],
                rows(advantages, chosen).to(policy.device),
                settings,
                keep=rows(keep, chosen).to(policy.device),
                denominator=denominator,
                ref_logps=referred(reference, chosen)[free] if reference else None,
                entropies=entropies if settings.entropy_weight else None,
            )
            gaps = (logps.detach() - old).abs()
            return loss, {
                **stats,
                "loss": loss.item(),
                "num_chosen": float(len(gaps)),
                "entropy": entropies.sum().item(),
                "logp_gap": gaps.sum().item(),
                "logp_gap_max": gaps.max().item() if len(gaps) else 0.0,
            }

        own = share[processes.rank() :: processes.count()]
        widths = [len(prompts[i]) + sum(len(rollout.token_ids) for rollout in groups[i]) for i in own]
        cut = passes(widths, info.tokens_per_pass, groups_per_pass)
        return accumulate(policy, [[own[i] for i in some] for some in cut], forward, idle=[share[0]])

    logs: list[dict[str, float]] = []
    policy.model.train()
    for chosen in [range(len(groups))] if updates is None else updates:
        share = [i for i in chosen if sizes[i]]  # a pass on no token has no gradient
        if share and bool(rows(keep, share).any()):
            log = _joined(gradients(share))
            if not logs:
                _check_gap(log, max_logp_gap)
            norm = apply_gradients(policy, optimizer, max_grad_norm)
            if not math.isfinite(norm):
                rate = optimizer.param_groups[0]["lr"]
                raise RunFailed(f"optimizer: the gradient is {norm}; lower optimizer.learning_rate ({rate:g}).")
            logs.append({**log, "grad_norm": norm})
    policy.model.eval()
    if not logs:
        first = groups[:1]
        return _unlearned(groups, referred(reference, range(len(first))) if reference else None, settings)
    means = {name: fmean(log[name] for log in logs) for name in logs[0]}
    # Only before the first update are sampler and trainer the same policy: any gap there is numerical.
    return {**means, **{k: logs[0][k] for k in ("logp_gap", "logp_gap_max")}, "num_updates": float(len(logs))}


def _unlearned(
    groups: Sequence[Sequence[Rollout]], ref_logps: Tensor | None, settings: LossSettings
) -> dict[str, float]:
    """The log where nothing was kept; `ref_logps` [K] are the reference's of the first group."""
    rollouts = list(chain.from_iterable(groups))
    kl = 0.0
    if ref_logps is not None:
        away = kl_estimates(_sampled_logps(groups[:1], ref_logps.device), ref_logps, "k3")
        kl = float(away.sum()) / max(1, sum(rollout.num_chosen for group in groups[:1] for rollout in group))
    clips = ("low", "high", "dual") if settings.clip_dual else ("low", "high")
    zero = ("loss", "grad_norm", "approx_kl", "logp_gap", "logp_gap_max", "num_updates")
    drawn = sum(logp for rollout in rollouts for logp in rollout.logps)
    return {
        **dict.fromkeys((*zero, *(f"clip_ratio/{name}_mean" for name in clips)), 0.0),
        "ratio_mean": 1.0,
        "entropy": -drawn / max(1, sum(rollout.num_chosen for rollout in rollouts)),
        "kl": kl,
    }


def _sampled_logps(groups: Sequence[Sequence[Rollout]], device: torch.device) -> Tensor:
    """[K]: what the sampler said of each token."""
    return torch.tensor([logp for group in groups for r in group for logp in r.logps], device=device)


def _joined(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What to log about the passes of all processes: sums, means over tokens, the largest gap."""
    means, count = mean_stats(passes), max(1.0, sum(one["num_chosen"] for one in passes))
    return {
        "loss": sum(one["loss"] for one in passes),
        **{name: sum(one[name] for one in passes) / count for name in ("entropy", "logp_gap")},
        "logp_gap_max": max(one["logp_gap_max"] for one in passes),
        "kl": means.get("kl", means["approx_kl"]),
        **{name: means[name] for name in means if name.startswith(("ratio_mean", "approx_kl", "clip_ratio/"))},
    }


def _check_gap(log: Mapping[str, float], limit: float) -> None:
    if math.isfinite(limit) and not log["logp_gap"] <= limit:
        raise RunFailed(
            "optimizer: before the first update on its rollouts, the log-probabilities of the sampler and of the "
            f"trainer differ by {log['logp_gap']:.3g} nats a token on average ({log['logp_gap_max']:.3g} at most), "
            f"more than {limit:.3g}. Set policy.precision to float32, or raise optimizer.max_logp_gap (0 is no limit)."
        )

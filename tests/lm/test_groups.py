"""The update on groups against `policy_loss` on the same tokens, put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rerankkit.errors import RunFailed
from rerankkit.lm import Policy, group_logps, reference_of, update_on_groups
from rerankkit.math.losses import PRESETS, LossSettings, policy_loss
from rerankkit.testing import make_example
from rerankkit.types import Ranking, Rollout, RunInfo

Make = Callable[..., Policy]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
SAID = [[(20, 21, 22), (23, 24), (20, 25, 26, 27)], [(30, 31), (32, 33, 34)]]
"""The second group has a beam less than the first."""
ADVANTAGES = torch.tensor([[1.0, -0.5, -0.5], [0.75, -0.75, 9.0]])
KEEP = torch.tensor([[True, True, False], [True, True, False]])


def groups_of(policy: Policy) -> list[list[Rollout]]:
    """As if `policy` had drawn them, the second token of all from three."""
    drawn = [[tuple((t - 1, t, t + 1) if i == 1 else None for i, t in enumerate(ids)) for ids in g] for g in SAID]
    with torch.no_grad():
        parts = iter(group_logps(policy, PROMPTS, SAID, allowed=drawn).split())
    base = Rollout(make_example(3), "", "", Ranking((0,)))
    return [
        [
            replace(base, token_ids=ids, allowed_ids=some, logps=tuple(next(parts).tolist()), group=g)
            for ids, some in zip(group, options, strict=True)
        ]
        for g, (group, options) in enumerate(zip(SAID, drawn, strict=True))
    ]


def sgd(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.SGD(policy.model.parameters(), lr=1.0)


def moved(policy: Policy, start: Policy) -> list[Tensor]:
    """With SGD at a rate of 1: the gradient."""
    pairs = zip(start.model.parameters(), policy.model.parameters(), strict=True)
    return [(before - after).detach() for before, after in pairs]


def by_hand(policy: Policy, rollouts: Sequence[Rollout], chosen: Sequence[int], settings: LossSettings) -> list[Tensor]:
    """The gradient of `policy_loss` on the groups `chosen`, with the old logps as they are in the rollouts."""
    some = [[r for r in rollouts if r.group == g] for g in chosen]
    tokens = group_logps(
        policy, [PROMPTS[g] for g in chosen], [[r.token_ids for r in group] for group in some],
        allowed=[[r.allowed_ids for r in group] for group in some], entropies=True,
    )  # fmt: skip
    rows = [(g, i) for g in chosen for i in range(len(SAID[g]))]
    loss, _ = policy_loss(
        tokens.logps,
        torch.tensor([logp for group in some for r in group for logp in r.logps]),
        tokens.sequence_ids,
        torch.stack([ADVANTAGES[row] for row in rows]),
        settings,
        keep=torch.stack([KEEP[row] for row in rows]),
        entropies=tokens.entropies,
    )
    return list(torch.autograd.grad(loss, list(policy.model.parameters())))


@pytest.mark.parametrize("name", ["dapo", "grpo"])
@pytest.mark.parametrize("cut", [9, 1])
def test_the_step_is_down_the_loss_of_the_whole_batch(make: Make, name: str, cut: int) -> None:
    policy, start = make(), make()
    groups, settings = groups_of(start), replace(PRESETS[name], entropy_weight=0.1)
    log = update_on_groups(
        policy,
        sgd(policy),
        groups,
        PROMPTS,
        ADVANTAGES,
        KEEP,
        settings,
        info=RunInfo(),
        max_grad_norm=1e9,
        groups_per_pass=cut,
    )

    expected = by_hand(start, [r for group in groups for r in group], [0, 1], settings)
    torch.testing.assert_close(moved(policy, start), expected, rtol=1e-3, atol=1e-6)
    assert log["grad_norm"] == pytest.approx(torch.stack([g.norm() for g in expected]).norm().item(), rel=1e-4)
    assert log["num_updates"] == 1 and log["logp_gap_max"] < 1e-5 and not policy.model.training


def test_updates_are_on_their_groups_and_those_with_nothing_kept_are_left_out(make: Make) -> None:
    policy, start, settings = make(), make(), PRESETS["grpo"]
    groups, none_of_0 = groups_of(start), KEEP & torch.tensor([[False], [True]])
    for keep, updates, number in ((KEEP, [[], [1]], 1), (none_of_0, [[0]], 0), (KEEP, [[0], [1]], 2)):
        log = update_on_groups(
            policy, sgd(policy), groups, PROMPTS, ADVANTAGES, keep, settings, info=RunInfo(), updates=updates,
            max_grad_norm=1e9,
        )  # fmt: skip
        assert log["num_updates"] == number
        if number < 2:
            expected = by_hand(start, groups[1], [1], settings)
            torch.testing.assert_close(moved(policy, start), expected, rtol=1e-3, atol=1e-6)


def test_the_distance_from_the_reference_is_measured_and_penalised(make: Make) -> None:
    logs = {}
    for weight in (0.0, 5.0):
        policy = make()
        groups, settings = groups_of(policy), replace(PRESETS["grpo"], kl_weight=weight)
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.05)
        with reference_of(policy) as reference:
            logs[weight] = [
                update_on_groups(
                    policy, optimizer, groups, PROMPTS, ADVANTAGES, KEEP, settings, info=RunInfo(), reference=reference
                )
                for _ in range(4)
            ]
    assert abs(logs[0.0][0]["kl"]) < 1e-6 and logs[0.0][-1]["kl"] > 1e-4
    assert logs[5.0][-1]["kl"] < 0.8 * logs[0.0][-1]["kl"]
    nothing = torch.zeros_like(KEEP)
    with reference_of(policy) as reference:
        log = update_on_groups(
            policy, optimizer, groups, PROMPTS, ADVANTAGES, nothing, settings, info=RunInfo(), reference=reference
        )
    assert log.keys() == logs[5.0][0].keys() and (log["num_updates"], log["loss"]) == (0, 0)
    drawn = [rollout.logps for group in groups for rollout in group]
    assert log["entropy"] == pytest.approx(-sum(map(sum, drawn)) / sum(map(len, drawn)))


def test_what_would_be_noise_is_not_learnt(make: Make) -> None:
    policy, start = make(), make()
    groups = [[replace(r, logps=tuple(p - 0.25 for p in r.logps)) for r in group] for group in groups_of(start)]
    given = (groups, PROMPTS, ADVANTAGES, KEEP, PRESETS["grpo"])
    with pytest.raises(RunFailed, match=r"differ by 0\.25 nats a token on average \(0\.25 at most\), more than 0\.2\."):
        update_on_groups(policy, sgd(policy), *given, info=RunInfo(), max_logp_gap=0.2)
    assert all(not change.any() for change in moved(policy, start))
    update_on_groups(policy, sgd(policy), *given, info=RunInfo(), max_logp_gap=0.3)


def test_no_groups_and_groups_without_rollouts_change_nothing(make: Make) -> None:
    policy, start, settings = make(), make(), replace(PRESETS["grpo"], kl_weight=0.1)
    full = groups_of(start)
    with reference_of(policy) as reference:
        # what is kept of rollouts that are not there is nothing
        for groups, prompts in (([], []), ([[], []], PROMPTS), ([[], full[1]], PROMPTS)):
            keep = torch.ones(len(groups), 3, dtype=torch.bool)
            updates = [[0]] if groups else None
            log = update_on_groups(
                policy, sgd(policy), groups, prompts, torch.ones(keep.shape), keep, settings, info=RunInfo(),
                updates=updates, reference=reference,
            )  # fmt: skip
            assert (log["num_updates"], log["kl"], log["loss"]) == (0, 0, 0)
    assert all(not change.any() for change in moved(policy, start))
    log = update_on_groups(
        policy, sgd(policy), [[], full[1]], PROMPTS, ADVANTAGES, KEEP, PRESETS["grpo"], info=RunInfo(),
        max_grad_norm=1e9, groups_per_pass=1,
    )  # fmt: skip
    assert log["num_updates"] == 1
    expected = by_hand(start, full[1], [1], PRESETS["grpo"])
    torch.testing.assert_close(moved(policy, start), expected, rtol=1e-3, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused(make: Make) -> None:
    policy = make()
    groups = groups_of(policy)
    for prompts, advantages, keep, words in (
        (PROMPTS[:1], ADVANTAGES, KEEP, r"\[P, G\] for 2 groups and 1 prompts, not \[2, 3\] and \[2, 3\]"),
        (PROMPTS, ADVANTAGES, KEEP[:, :2], r"not \[2, 3\] and \[2, 2\]"),
        (PROMPTS, ADVANTAGES.flatten(), KEEP.flatten(), r"not \[6\] and \[6\]"),
        (PROMPTS, ADVANTAGES[:, :2], KEEP[:, :2], r"a group has 3 rollouts, but advantages are \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            update_on_groups(policy, sgd(policy), groups, prompts, advantages, keep, PRESETS["grpo"], info=RunInfo())

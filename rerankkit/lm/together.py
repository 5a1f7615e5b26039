"""Rollouts of several processes: each samples and judges its share of the prompts, and all of them see everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from rerankkit import processes
from rerankkit.lm.ask import ask
from rerankkit.lm.meter import spent_on, spent_waiting
from rerankkit.lm.policy import Policy
from rerankkit.lm.shard import whole_weights
from rerankkit.protocols import RewardFn
from rerankkit.types import Failed, NotApplicable, Outcome, Parse, Ranking, RerankExample, Reward, Rollout

OUTCOMES: Mapping[str, Any] = {kind.__name__: kind for kind in (Reward, NotApplicable, Failed)}
TUPLES = ("token_ids", "logps", "shown")


def judged_rollouts(
    policy: Policy,
    examples: Sequence[RerankExample],
    reward: RewardFn,
    *,
    group_size: int,
    first_group: int = 0,
    **asking: Any,
) -> list[tuple[Rollout, Outcome]]:
    """`ask` and then `reward`, shared among the processes by prompt; every process gets the whole, in the same order.

    `asking` is what else `ask` takes. A reward sees whole groups, but only those of its own process.
    """
    own = processes.share(range(len(examples)))

    def sampled(mine: list[RerankExample]) -> list[Rollout]:
        return ask(policy, mine, group_size=group_size, first_group=first_group + own[0], **asking)

    def work() -> list[Any]:
        if not own:
            return []
        mine = [examples[i] for i in own]
        with spent_on("rollout"):  # the sampler tells prefill and decoding apart, inside
            rollouts = hold(partial(sampled, mine))
        with spent_on("reward"):
            outcomes = reward(rollouts)
        return [_told(rollout, outcome) for rollout, outcome in zip(rollouts, outcomes, strict=True)]

    by_group = dict(enumerate(examples, start=first_group))
    with spent_waiting(), whole_weights(policy) as hold:
        records = processes.gathered(work)
    return [_heard(record, by_group) for record in records]


def _told(rollout: Rollout, outcome: Outcome) -> list[Any]:
    """One rollout as JSON; its example is known to everybody, and stays out."""
    plain = {f.name: getattr(rollout, f.name) for f in fields(rollout) if f.name not in ("example", "ranking")}
    order, parse, problem = rollout.ranking.order, str(rollout.ranking.parse), rollout.ranking.problem
    judged = {"value": outcome.value, "parts": dict(outcome.parts)} if isinstance(outcome, Reward) else asdict(outcome)
    return [plain, [order, parse, problem], type(outcome).__name__, judged]


def _heard(record: Sequence[Any], by_group: Mapping[int, RerankExample]) -> tuple[Rollout, Outcome]:
    plain, (order, parse, problem), kind, outcome = record
    allowed = tuple(None if ids is None else tuple(ids) for ids in plain["allowed_ids"])
    whole = {**plain, **{name: tuple(plain[name]) for name in TUPLES}, "allowed_ids": allowed}
    ranking = Ranking(tuple(order), Parse(parse), problem)
    return Rollout(example=by_group[plain["group"]], ranking=ranking, **whole), OUTCOMES[kind](**outcome)

"""Asking the policy to rerank: prompts in, structured rollouts out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch

from rerankkit.errors import UsageError
from rerankkit.lm.cache import bfloat16_pays
from rerankkit.lm.permutation import answer_mask
from rerankkit.lm.policy import Policy
from rerankkit.lm.rollout import Sample, roll_out
from rerankkit.text.answers import RANKING_KEY, parse_answer
from rerankkit.text.prompts import rerank_messages
from rerankkit.types import RerankExample, Rollout, RunInfo


def ask(
    policy: Policy,
    examples: Sequence[RerankExample],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    info: RunInfo,
    top_p: float = 1.0,
    salt: str = "",
    first_group: int = 0,
    constrain: bool = True,
    think: bool | None = None,
    shuffle: bool = False,
) -> list[Rollout]:
    """`group_size` rollouts of each example, group after group, the groups numbered from `first_group`.

    What is sampled for an example depends on (`info.seed`, `salt`, its id), not on its neighbours. With `constrain`,
    reasoning is free and every answer is a complete permutation; raises UsageError if `max_new_tokens` cannot hold it.
    With `shuffle` each prompt lists the candidates in an order of its own (`Rollout.shown`), drawn from the same key;
    examples, and rankings with them, stay in the order that was given. Without `think` the explanation is empty, by the
    mask; None does as the policy was trained.
    """
    if think is False and not constrain:
        raise UsageError("an empty explanation is forced by the mask: think = false needs constrain = true.")
    reasons = policy.thinks if think is None else think
    shown = [_shuffled(example, info.seed, salt) if shuffle else () for example in examples]
    groups = roll_out(
        policy,
        [prompt_of(policy, example, order) for example, order in zip(examples, shown, strict=True)],
        group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seeds=[seed_of(info.seed, salt, example.example_id) for example in examples],
        autocast=torch.bfloat16 if info.precision == "bfloat16" and bfloat16_pays(policy.device) else None,
        masks=[answer_mask(policy, example, max_new_tokens, reasons) for example in examples] if constrain else None,
    )
    return [
        as_rollout(policy, example, sample, first_group + number, order)
        for number, (example, samples, order) in enumerate(zip(examples, groups, shown, strict=True))
        for sample in samples
    ]


def prompt_of(policy: Policy, example: RerankExample, shown: Sequence[int] = ()) -> list[int]:
    """Token ids of the ask; `shown` is the order in which it lists the candidates (`Rollout.shown`)."""
    return policy.prompt_ids(
        rerank_messages(example.in_order(shown) if shown else example, policy.surface, policy.style)
    )


def _shuffled(example: RerankExample, *key: object) -> tuple[int, ...]:
    places = range(len(example.candidates))
    return tuple(random.Random(seed_of("shown", *key, example.example_id)).sample(places, len(places)))


def as_rollout(
    policy: Policy, example: RerankExample, sample: Sample, group: int, shown: Sequence[int] = ()
) -> Rollout:
    """A sample, taken apart."""
    text = policy.decode(sample.token_ids)
    answer = parse_answer(text, example, policy.surface)
    return Rollout(
        example=example,
        text=text,
        reasoning=answer.reasoning,
        ranking=answer.ranking,
        token_ids=sample.token_ids,
        logps=sample.logps,
        allowed_ids=sample.allowed,
        num_reasoning_tokens=_boundary(policy, sample.token_ids),
        group=group,
        shown=tuple(shown),
        truncated=sample.truncated,
    )


def seed_of(*key: object) -> int:
    """A seed in [0, 2^63) that depends on every part of the key and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def _boundary(policy: Policy, token_ids: Sequence[int]) -> int:
    """How many tokens come before the last ranking key begins; all of them if there is none."""
    if RANKING_KEY not in policy.decode(token_ids):
        return len(token_ids)
    low, high = 0, len(token_ids)  # the fewest tokens from whose end on no whole key is left
    while low < high:
        middle = (low + high) // 2
        if RANKING_KEY in policy.decode(token_ids[middle:]):
            low = middle + 1
        else:
            high = middle
    return max(0, low - 1)

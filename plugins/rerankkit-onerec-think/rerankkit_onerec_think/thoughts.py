"""Think, then score: rationales are sampled, and what follows them is scored instead of being written out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rerankkit import Ranking, RerankExample, RunInfo
from rerankkit.lm import Policy, answer_mask, roll_out, score_candidates
from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import rerank_messages


@dataclass(frozen=True, slots=True)
class Thought:
    """A rationale as the policy wrote it: the beginning of an answer, up to where the first candidate would stand."""

    text: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    allowed_ids: tuple[tuple[int, ...] | None, ...]
    """As `Rollout.allowed_ids`: the JSON around the rationale is forced."""
    num_reasoning_tokens: int


def think(
    policy: Policy,
    examples: Sequence[RerankExample],
    prompts: Sequence[Sequence[int]],
    num: int,
    *,
    max_new_tokens: int,
    temperature: float,
    info: RunInfo,
    salt: str,
) -> list[list[Thought]]:
    """`num` rationales for each example, asked by the prompt [token ids] beside it.

    They depend on (`info.seed`, `salt`, the example's id) and on nothing else. Nothing is spent on lists: an answer
    about one candidate is known as soon as its reasoning has ended.
    """
    ones = [replace(e, candidates=e.candidates[:1], relevance=e.relevance[:1]) for e in examples]
    masks = [answer_mask(policy, one, max_new_tokens) for one in ones]
    seeds = [
        int.from_bytes(hashlib.sha256(repr((info.seed, salt, e.example_id)).encode()).digest()[:8], "big") >> 1
        for e in examples
    ]
    groups = roll_out(
        policy,
        prompts,
        num,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seeds=seeds,
        masks=masks,
        autocast=torch.bfloat16 if info.precision == "bfloat16" else None,
    )
    thoughts = []
    for one, mask, group in zip(ones, masks, groups, strict=True):
        rest = len(mask.spellings[0]) + len(mask.pieces.closing)
        thoughts.append(
            [
                Thought(
                    parse_answer(policy.decode(sample.token_ids), one, policy.surface).reasoning,
                    sample.token_ids[:-rest],
                    sample.logps[:-rest],
                    sample.allowed[:-rest],
                    len(sample.token_ids) - rest - len(mask.pieces.opening),
                )
                for sample in group
            ]
        )
    return thoughts


def rerank_prompts(policy: Policy, examples: Sequence[RerankExample]) -> list[list[int]]:
    """The asks, as every stage puts them."""
    return [policy.prompt_ids(rerank_messages(example, policy.surface, policy.style)) for example in examples]


def scores_after(
    policy: Policy,
    examples: Sequence[RerankExample],
    beginnings: Sequence[Sequence[Sequence[int]]],
    aggregate: Literal["max", "mean"],
) -> list[list[float]]:
    """log P(name | ask, beginning) of each candidate, over all of an example's beginnings of answers.

    Its name is what answers call it: its SID, or its place in the prompt.
    """
    names = [policy.name_ids(example) for example in examples]
    return score_candidates(policy, rerank_prompts(policy, examples), beginnings, names, aggregate=aggregate)


def best_first(scores: Sequence[float]) -> tuple[int, ...]:
    """Places by falling score; equal ones as they stand."""
    return tuple(sorted(range(len(scores)), key=lambda i: (-scores[i], i)))


def think_then_score(
    policy: Policy,
    examples: Sequence[RerankExample],
    num_rationales: int,
    *,
    aggregate: Literal["max", "mean"] = "max",
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    info: RunInfo | None = None,
) -> list[tuple[Ranking, tuple[str, ...]]]:
    """Rankings by log P(candidate's name | ask, rationale) over `num_rationales` sampled rationales, and these.

    With 0 nothing is thought: the answer begins with an empty explanation, and costs one pass. The paper merges by the
    largest (`max`); `mean` is over probabilities. The pipeline's own `rl` row generates one rationale and the list.
    """
    info = info or RunInfo()
    if num_rationales:
        thoughts = think(
            policy,
            examples,
            rerank_prompts(policy, examples),
            num_rationales,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            info=info,
            salt="think then score",
        )
    else:
        pieces = [answer_mask(policy, example, 10**6).pieces for example in examples]
        thoughts = [[Thought("", piece.head + piece.opening, (), (), 0)] for piece in pieces]
    scores = scores_after(policy, examples, [[t.token_ids for t in group] for group in thoughts], aggregate)
    return [
        (Ranking(best_first(row)), tuple(t.text for t in group)) for row, group in zip(scores, thoughts, strict=True)
    ]

"""How likely the policy finds given continuations, without generating."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rerankkit.lm.forward import Row, row_logps
from rerankkit.lm.policy import Policy
from rerankkit.lm.rollout import training_off


def score_continuations(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    autocast: torch.dtype | None = None,
    max_rows: int = 8,
) -> list[list[float]]:
    """log P(continuation | prompt) in nats, summed over its tokens; `continuations[p][c]` follows `prompts[p]`.

    As `score_candidates` without reasoning.
    """
    nothing: list[list[list[int]]] = [[[]] for _ in prompts]
    return score_candidates(policy, prompts, nothing, continuations, autocast=autocast, max_rows=max_rows)


@torch.no_grad()
def score_candidates(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    reasonings: Sequence[Sequence[Sequence[int]]],
    candidates: Sequence[Sequence[Sequence[int]]],
    *,
    aggregate: Literal["mean", "max"] = "mean",
    autocast: torch.dtype | None = None,
    max_rows: int = 8,
) -> list[list[float]]:
    """log P(candidate | prompt, reasoning) in nats for `candidates[p][c]`, over all of `reasonings[p]`.

    `aggregate` is the mean of the probabilities, in logs (log-mean-exp), or the largest. Every prompt is read once,
    every reasoning once, and so is every beginning that candidates have in common: they are a trie, and one forward
    pass scores all of it. `max_rows` prompts run at once. An empty candidate scores 0. Raises ValueError for an empty
    prompt
    or for no reasoning (an empty one is none at all: `[[]]`).
    """
    if not all(prompts) or not all(reasonings):
        raise ValueError("an empty prompt, or no reasoning, not even an empty one: [[]]")
    scores: list[list[float]] = [[] for _ in prompts]
    sizes = [
        len(prompt) + sum(map(len, some)) + len(some) * sum(map(len, c))
        for prompt, some, c in zip(prompts, reasonings, candidates, strict=True)
    ]
    order = sorted(range(len(prompts)), key=lambda p: (sizes[p], p))
    with training_off(policy):
        for start in range(0, len(order), max_rows):
            chosen = order[start : start + max_rows]
            tries = [_Trie(candidates[p]) for p in chosen]
            rows: list[Row] = []
            targets: list[int] = []
            owners: list[int] = []
            for trie, p in zip(tries, chosen, strict=True):
                row = Row()
                row.add(prompts[p], range(len(prompts[p])))
                for reasoning in reasonings[p]:
                    trie.append_to(row, len(prompts[p]), reasoning)
                    targets += trie.token_ids
                    owners += [len(rows)] * len(trie.token_ids)
                policy.check_length(1 + max(row.position_ids))
                rows.append(row)
            result = row_logps(policy, rows, targets, [1.0] * len(targets), owners, len(rows), autocast=autocast)
            for p, trie, logps in zip(chosen, tries, result.split(), strict=True):
                table = logps.double().view(len(reasonings[p]), len(trie.token_ids))
                each = torch.stack([table[:, path].sum(-1) for path in trie.paths], dim=-1) if trie.paths else table
                scores[p] = (each.amax(0) if aggregate == "max" else each.logsumexp(0) - math.log(len(each))).tolist()
    return scores


class _Trie:
    """Continuations as a tree: node i is `token_ids[i]` after node `parents[i]`; -1 is what comes before them."""

    def __init__(self, continuations: Sequence[Sequence[int]]) -> None:
        known: dict[tuple[int, int], int] = {}
        self.paths: list[list[int]] = []
        for continuation in continuations:
            path = [-1]
            for token_id in continuation:
                path.append(known.setdefault((path[-1], token_id), len(known)))
            self.paths.append(path[1:])
        self.parents = [parent for parent, _ in known]
        self.token_ids = [token_id for _, token_id in known]
        self.inner = sorted(set(self.parents) - {-1})
        """Nodes that something follows: the others are only predicted."""
        self.depths: list[int] = []
        for parent in self.parents:
            self.depths.append(0 if parent < 0 else self.depths[parent] + 1)

    def append_to(self, row: Row, num_shared: int, reasoning: Sequence[int]) -> None:
        """A part: `reasoning`, and the tree after it, of which each node sees its ancestors. It reads every node."""
        num, places = len(reasoning), {node: len(reasoning) + i for i, node in enumerate(self.inner)}
        keep = torch.ones(num + len(places), num + len(places), dtype=torch.bool).tril()
        keep[num:, num:] = torch.eye(len(places), dtype=torch.bool)
        for node, place in places.items():
            if self.parents[node] >= 0:
                keep[place] |= keep[places[self.parents[node]]]
        mask: Tensor | None = keep if len(self.inner) > max(self.depths, default=0) else None  # a chain is causal
        positions = [*range(num), *(num + self.depths[node] for node in self.inner)]
        start = row.add(
            [*reasoning, *(self.token_ids[node] for node in self.inner)],
            [num_shared + position for position in positions],
            (0, num_shared),
            mask,
        )
        before = start + num - 1 if num else num_shared - 1
        row.reads += [start + places[parent] if parent >= 0 else before for parent in self.parents]

"""The catalogue as a prefix trie over token ids, and beam search that can only spell what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rerankkit.lm.cache import Branches, Prefill
from rerankkit.lm.forward import casting
from rerankkit.lm.policy import Policy
from rerankkit.types import Sid

ROOT = 0


class SidTrie:
    """Every catalogue SID spelled as tokens. Nodes are ints, `ROOT` the first; there is no way to leave the trie."""

    depth: int
    """Tokens of each SID."""

    def __init__(self, spellings: Iterable[tuple[Sid, Sequence[int]]]) -> None:
        """Raises ValueError unless all spellings are equally long, not empty, and no two SIDs are spelled alike."""
        branches: list[dict[int, int]] = [{}]
        self._sids: dict[int, Sid] = {}
        lengths = set()
        for sid, token_ids in spellings:
            node = ROOT
            for token_id in token_ids:
                if token_id not in branches[node]:
                    branches[node][token_id] = len(branches)
                    branches.append({})
                node = branches[node][token_id]
            if self._sids.setdefault(node, sid) != sid:
                raise ValueError(f"SIDs {self._sids[node]} and {sid} are spelled by the same tokens {list(token_ids)}")
            lengths.add(len(token_ids))
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"spellings must be equally long and not empty; got lengths {sorted(lengths)}")
        (self.depth,) = lengths
        self._branches = branches
        self._tokens = [np.fromiter(b.keys(), np.int64, len(b)) for b in branches]
        self._children = [np.fromiter(b.values(), np.int64, len(b)) for b in branches]

    def __len__(self) -> int:
        """Number of SIDs."""
        return len(self._sids)

    def next_ids(self, node: int) -> NDArray[np.int64]:
        """Tokens that may follow; empty at a leaf."""
        return self._tokens[node]

    def children(self, node: int) -> NDArray[np.int64]:
        """Nodes that `next_ids` lead to, aligned with it."""
        return self._children[node]

    def step(self, node: int, token_id: int) -> int:
        """The node after `token_id`. Raises KeyError if it may not follow."""
        return self._branches[node][token_id]

    def sid(self, node: int) -> Sid | None:
        """The SID that ends here, or None inside the trie."""
        return self._sids.get(node)


def build_trie(sids: Iterable[Sid], policy: Policy) -> SidTrie:
    """The trie over `sids` as `policy` spells them; duplicates are one entry. Raises DataError for an unknown code."""
    return SidTrie((sid, policy.sid_ids(sid)) for sid in dict.fromkeys(tuple(map(int, sid)) for sid in sids))


@torch.no_grad()
def beam_sids(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    trie: SidTrie,
    num_beams: int,
    *,
    autocast: torch.dtype | None = None,
    max_rows: int = 32,
) -> list[list[tuple[Sid, float]]]:
    """The likeliest SIDs after each prompt and log P(SID | prompt), best first; fewer than `num_beams` if fewer exist.

    The score is over the whole vocabulary, what `score_continuations` gives for the same SID; with at least
    `len(trie)` beams the search is exact. `max_rows` prompts run at once.
    """
    if num_beams < 1:
        raise ValueError(f"{num_beams=} must be >= 1")
    training = policy.model.training
    policy.model.eval()
    found: list[list[tuple[Sid, float]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
    try:
        for start in range(0, len(order), max_rows):
            chosen = order[start : start + max_rows]
            with casting(policy.device, autocast):
                beams = _search(policy, [prompts[p] for p in chosen], trie, num_beams)
            for p, result in zip(chosen, beams, strict=True):
                found[p] = result
    finally:
        policy.model.train(training)
    return found


def _search(
    policy: Policy, prompts: Sequence[Sequence[int]], trie: SidTrie, num_beams: int
) -> list[list[tuple[Sid, float]]]:
    # The beams of a prompt are queries of one row against one cache: a beam sees the prompt and its own ancestors'
    # places through the mask, so nothing is copied and nothing is reordered.
    device, num = policy.device, len(prompts)
    prefill = Prefill(policy, prompts)
    branches = Branches(prefill, range(num), trie.depth * num_beams)
    lengths = prefill.lengths[:, None]
    nodes: list[NDArray[np.int64]] = [np.array([ROOT]) for _ in prompts]
    scores = [np.zeros(1) for _ in prompts]
    paths = [np.zeros((1, 0), dtype=np.int64) for _ in prompts]  # places of each beam's ancestors in the cache
    hidden, filled = prefill.hidden[:, None], 0
    for step in range(trie.depth):
        logits = policy.logits(hidden).float()
        logps = (logits - logits.logsumexp(-1, keepdim=True)).cpu().numpy()
        token_ids: list[NDArray[np.int64]] = []
        for p in range(num):
            parents, tokens, children, totals = _expand(trie, nodes[p], scores[p], logps[p])
            best = np.argsort(-totals, kind="stable")[:num_beams]
            nodes[p], scores[p], paths[p] = children[best], totals[best], paths[p][parents[best]]
            token_ids.append(tokens[best])
        if step + 1 == trie.depth:
            break
        width = max(map(len, token_ids))
        fed = np.zeros((num, width), dtype=np.int64)
        seen = np.zeros((num, width, filled + width), dtype=bool)
        places = filled + np.arange(width)
        seen[:, np.arange(width), places] = True  # itself; unused beams too: a softmax over nothing is NaN
        for p, tokens in enumerate(token_ids):
            fed[p, : len(tokens)] = tokens
            np.put_along_axis(seen[p, : len(tokens)], paths[p], True, axis=1)
            paths[p] = np.column_stack([paths[p], places[: len(tokens)]])
        hidden = branches.step(
            torch.from_numpy(fed).to(device), (lengths + step).expand(num, width), torch.from_numpy(seen).to(device)
        )
        filled += width
    return [_named(trie, nodes[p], scores[p]) for p in range(num)]


def _expand(
    trie: SidTrie, nodes: NDArray[np.int64], scores: NDArray[np.float64], logps: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Every child of every beam: parent beam, token, node, score."""
    tokens = [trie.next_ids(int(node)) for node in nodes]
    parents = np.repeat(np.arange(len(nodes)), [len(t) for t in tokens])
    flat = np.concatenate(tokens)
    children = np.concatenate([trie.children(int(node)) for node in nodes])
    return parents, flat, children, scores[parents] + logps[parents, flat]


def _named(trie: SidTrie, nodes: NDArray[np.int64], scores: NDArray[np.float64]) -> list[tuple[Sid, float]]:
    pairs = [(trie.sid(int(node)), float(score)) for node, score in zip(nodes, scores, strict=True)]
    return [(sid, score) for sid, score in pairs if sid is not None]

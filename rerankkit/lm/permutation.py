"""The answer mask: free reasoning, then a list that can only be a complete permutation, within one generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rerankkit.errors import UsageError
from rerankkit.lm.policy import Policy
from rerankkit.text.prompts import CLOSING, HEAD, OPENING, SEPARATOR
from rerankkit.types import Item, RerankExample

Allowed: TypeAlias = tuple[int, ...] | None
"""The ids that a token was drawn from; None is reasoning: the vocabulary but for `AnswerPieces.barred_ids`. A token
with one allowed id is forced: it has probability 1 and teaches nothing."""

_ROOT, _FREE, _END = 0, -1, -2


class State(NamedTuple):
    """Where in its answer a sample is."""

    forced: tuple[int, ...]
    """What comes next, before there is anything to choose."""
    node: int
    """Then: a node of the trie, or free reasoning, or the end."""
    room: int
    """Reasoning tokens that still fit."""
    left: int
    """Candidates not yet listed, a bit each."""

    @property
    def settled(self) -> bool:
        """True once `forced` is all that can follow; after it the answer is finished."""
        return self.node == _END


@dataclass(frozen=True)
class AnswerPieces:
    """How one policy spells an answer around reasoning and SIDs, in token ids."""

    head: tuple[int, ...]
    opening: tuple[int, ...]
    separator: tuple[int, ...]
    closing: tuple[int, ...]
    """With the token that ends the turn."""
    barred_ids: frozenset[int]
    """What reasoning cannot contain: stop and control tokens, ids that spell nothing, and whatever would end or break
    the JSON string it stands in: quotes, backslashes, line breaks. Except `opening[0]`, which ends it as it should."""

    def barred(self, policy: Policy) -> Tensor:
        """`barred_ids` as [V] bool, True = barred."""
        mask = torch.zeros(policy.num_logits, dtype=torch.bool)
        mask[sorted(self.barred_ids)] = True
        return mask.to(policy.device)


@dataclass(frozen=True)
class AnswerMask:
    """The answers to one example: head, reasoning, opening, every candidate once in any order, closing.

    The first token of `pieces.opening` ends the reasoning, by choice or, when `max_reasoning_tokens` are spent, by
    force. Candidates that share a SID are listed as often as there are of them.
    """

    pieces: AnswerPieces
    spellings: tuple[tuple[int, ...], ...]
    """Token ids of each candidate's SID; none is the beginning of another."""
    max_reasoning_tokens: int
    _branches: list[dict[int, int]] = field(init=False, repr=False, compare=False)
    _below: list[int] = field(init=False, repr=False, compare=False)
    _choices: dict[tuple[int, int], tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Build the trie: `_below[node]` has the bits of the candidates whose SIDs pass through `node`."""
        branches: list[dict[int, int]] = [{}]
        below = [0]
        for number, spelling in enumerate(self.spellings):
            node = _ROOT
            for token_id in spelling:
                if token_id not in branches[node]:
                    branches[node][token_id] = len(branches)
                    branches.append({})
                    below.append(0)
                node = branches[node][token_id]
                below[node] |= 1 << number
            if branches[node]:
                raise ValueError(f"spelling {number}, {list(spelling)}, is the beginning of another, or empty")
        if not self.spellings or self.max_reasoning_tokens < 0:
            raise ValueError(f"{len(self.spellings)} candidates and {self.max_reasoning_tokens=}: need >= 1 and >= 0")
        object.__setattr__(self, "_branches", branches)
        object.__setattr__(self, "_below", below)
        object.__setattr__(self, "_choices", {})

    @property
    def num_fixed_tokens(self) -> int:
        """Tokens of every answer, reasoning apart."""
        parts = [self.pieces.head, self.pieces.opening, self.pieces.closing, *self.spellings]
        return sum(map(len, parts)) + len(self.pieces.separator) * (len(self.spellings) - 1)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest answer."""
        return self.num_fixed_tokens + self.max_reasoning_tokens

    def start(self) -> State:
        """Before the first token."""
        return self._reason(self.pieces.head, self.max_reasoning_tokens)

    def allowed(self, state: State) -> Allowed:
        """What may come next; () when the answer is finished."""
        if state.forced:
            return state.forced[:1]
        if state.node < 0:
            return None if state.node == _FREE else ()
        key = state.node, state.left
        if key not in self._choices:
            branches = self._branches[state.node]
            self._choices[key] = tuple(t for t, child in branches.items() if self._below[child] & state.left)
        return self._choices[key]

    def advance(self, state: State, token_id: int) -> State:
        """The state after `token_id`. Raises ValueError if it may not come."""
        forced, node, room, left = state
        if forced:
            if token_id != forced[0]:
                raise ValueError(f"token {token_id} where only {forced[0]} may come")
            return State(forced[1:], node, room, left)
        if node == _FREE:
            if token_id == self.pieces.opening[0]:
                return self._list(self.pieces.opening[1:], left)
            if token_id in self.pieces.barred_ids:
                raise ValueError(f"token {token_id} may not come in reasoning")
            return self._reason((), room - 1)
        child = self._branches[node].get(token_id) if node >= 0 else None
        if child is None or not self._below[child] & left:
            raise ValueError(f"token {token_id} where only {self.allowed(state)} may come")
        if self._branches[child]:
            return State((), child, room, left)
        same = self._below[child] & left
        return self._list(self.pieces.separator, left ^ (same & -same))

    def _reason(self, forced: tuple[int, ...], room: int) -> State:
        everyone = (1 << len(self.spellings)) - 1
        if room:
            return State(forced, _FREE, room, everyone)
        return self._list(forced + self.pieces.opening, everyone)

    def _list(self, forced: tuple[int, ...], left: int) -> State:
        """`forced`, and then one of those that are left; if only one is, all the rest is known."""
        if left & (left - 1):
            return State(forced, _ROOT, 0, left)
        return State(forced + self.spellings[left.bit_length() - 1] + self.pieces.closing, _END, 0, 0)


def answer_mask(policy: Policy, example: RerankExample, max_new_tokens: int, think: bool = True) -> AnswerMask:
    """The mask for one example: reasoning gets whatever the list leaves of `max_new_tokens`, or nothing.

    Raises UsageError if not even the list fits, ValueError for an example without candidates.
    """
    spellings = tuple(map(tuple, policy.name_ids(example)))
    mask = AnswerMask(answer_pieces(policy), spellings, 0)
    if mask.num_fixed_tokens > max_new_tokens:
        raise UsageError(
            f"max_new_tokens: {max_new_tokens} is too small; a list of {len(spellings)} candidates alone takes "
            f"{mask.num_fixed_tokens} tokens of this policy, and reasoning comes on top."
        )
    return AnswerMask(mask.pieces, spellings, max_new_tokens - mask.num_fixed_tokens) if think else mask


def answer_pieces(policy: Policy) -> AnswerPieces:
    """The policy's own spelling of an answer, as `answer_parts` and `trace_sequence` would give it."""
    key = (len(policy.text_tokenizer), policy.surface, policy.codebook_sizes, policy.stop_ids, policy.num_logits)
    known = _PIECES.get(policy)
    if known is None or known[0] != key:
        known = _PIECES[policy] = (key, _answer_pieces(policy))
    return known[1]


_PIECES: WeakKeyDictionary[Policy, tuple[object, AnswerPieces]] = WeakKeyDictionary()


def _answer_pieces(policy: Policy) -> AnswerPieces:
    # Cut from one whole list, because some tokenizers spell the beginning of a text unlike its middle.
    some = Item("", "", sid=(0,) * len(policy.codebook_sizes))
    example = RerankExample("", "", (), (some,), (0.0,))
    (text,), (spelling,) = policy.surface.names(example), policy.name_ids(example)
    opening, separator, closing = _split(policy.encode(f"{OPENING}{text}{SEPARATOR}{text}{CLOSING}"), spelling)
    tokenizer = policy.text_tokenizer
    barred = {
        i
        for i in range(len(tokenizer))
        if _breaks(tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    }
    while opening[0] not in barred:  # a mark of the beginning of a text: it does not end the reasoning yet
        opening = opening[1:]
    barred |= {int(i) for i in tokenizer.all_special_ids} | policy.stop_ids
    barred |= set(range(len(tokenizer), policy.num_logits))  # rows that no token has: tables are padded
    return AnswerPieces(
        head=tuple(policy.encode(HEAD)),
        opening=opening,
        separator=separator,
        closing=(*closing, policy.end_id),
        barred_ids=frozenset(i for i in barred if i < policy.num_logits) - {opening[0]},
    )


def allowed_table(allowed: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Allowed ids of N tokens as [N, W], and the mask [N, W] of those that are no padding."""
    width = max(map(len, allowed))
    table = torch.tensor([ids + (ids[0],) * (width - len(ids)) for ids in allowed], device=device)
    lengths = torch.tensor([len(ids) for ids in allowed], device=device)
    return table, torch.arange(width, device=device) < lengths[:, None]


def _breaks(text: str) -> bool:
    """Whether a JSON string cannot contain `text` as it is."""
    return any(char in '"\\' or char < " " for char in text)


def _split(token_ids: Sequence[int], spelling: Sequence[int]) -> list[tuple[int, ...]]:
    """`token_ids` cut at every `spelling`."""
    parts: list[tuple[int, ...]] = []
    start = place = 0
    while place < len(token_ids):
        if list(token_ids[place : place + len(spelling)]) == list(spelling):
            parts.append(tuple(token_ids[start:place]))
            start = place = place + len(spelling)
        else:
            place += 1
    return [*parts, tuple(token_ids[start:])]

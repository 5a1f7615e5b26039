"""What a policy is trained on: token ids with a loss weight each, and how they share rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rerankkit.lm.policy import Policy

if TYPE_CHECKING:
    from rerankkit.text.prompts import Document


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """Token ids and, aligned with them, the loss weight of predicting each; 0 is context."""

    token_ids: tuple[int, ...]
    weights: tuple[float, ...]
    """`weights[0]` is never used: nothing predicts the first token."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.weights):
            raise ValueError(f"{len(self.token_ids)} token ids but {len(self.weights)} weights")

    def __len__(self) -> int:
        return len(self.token_ids)


def document_sequence(policy: Policy, document: Document) -> TrainSequence:
    """A mid-training document between bos (context) and eos (weighted as the last segment)."""
    token_ids, weights = [policy.bos_id], [0.0]
    for segment in document:
        ids = policy.encode(segment.text)
        token_ids += ids
        weights += [segment.weight] * len(ids)
    token_ids.append(policy.eos_id)
    weights.append(document[-1].weight if document else 0.0)
    return TrainSequence(tuple(token_ids), tuple(weights))


def trace_sequence(
    policy: Policy,
    messages: Sequence[Mapping[str, object]],
    reasoning_part: str,
    ranking_part: str,
    reasoning_weight: float,
    ranking_weight: float,
) -> TrainSequence:
    """A conversation and the answer to learn; the token that closes the turn is weighted as the ranking."""
    prompt = policy.prompt_ids(messages)
    reasoning = policy.encode(reasoning_part)
    ranking = [*policy.encode(ranking_part), policy.end_id]
    weights = [0.0] * len(prompt) + [reasoning_weight] * len(reasoning) + [ranking_weight] * len(ranking)
    return TrainSequence((*prompt, *reasoning, *ranking), tuple(weights))


def pack(sequences: Sequence[TrainSequence], max_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each row: first-fit decreasing, ties by index, so the same input packs the same.

    No row exceeds `max_tokens` tokens, except that a longer sequence gets a row of its own.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    rows: list[list[int]] = []
    free: list[int] = []
    for index in order:
        length = len(sequences[index])
        place = next((row for row, room in enumerate(free) if room >= length), None)
        if place is None:
            rows.append([index])
            free.append(max_tokens - length)
        else:
            rows[place].append(index)
            free[place] -= length
    return rows

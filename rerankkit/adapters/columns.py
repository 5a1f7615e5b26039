"""What a foreign reward function is told about a rollout besides prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rerankkit.text.prompts import Message, PromptStyle, rerank_messages
from rerankkit.types import Rollout, SidSurface

COLUMNS: Mapping[str, str] = {
    "example_id": "the ask, `user/step`",
    "user_id": "whose it is",
    "history": "item ids, oldest first",
    "candidates": "item ids, in the order they were given",
    "candidate_sids": "their SIDs as the policy writes them",
    "relevance": "grades, aligned with `candidates`",
    "target": "the most relevant candidate's SID, as the policy writes it; empty text if none is relevant",
    "target_id": "its item id; empty text if none is relevant",
    "answer": "the same as `target`, by the name that many functions expect",
    "solution": "likewise",
    "ground_truth": "likewise",
    "order": "the answer's order as positions in `candidates`, best first: always complete",
    "parse": "`ok`, `repaired` or `failed`; when it failed, `order` is the given one and nobody chose it",
    "reasoning": "what was said before the ranking",
    "group": "rollouts of one number share a prompt",
    "truncated": "whether the length limit ended it",
}
"""Name -> what it is. One value a rollout; in a TRL function a list of them."""


def columns_of(rollout: Rollout, surface: SidSurface) -> dict[str, Any]:
    """The row of `COLUMNS`."""
    example, place = rollout.example, rollout.example.target_index
    sids = [surface.text(item.sid) for item in example.candidates]
    target = "" if place is None else sids[place]
    return {
        "example_id": example.example_id,
        "user_id": example.user_id,
        "history": [item.item_id for item in example.history],
        "candidates": [item.item_id for item in example.candidates],
        "candidate_sids": sids,
        "relevance": list(example.relevance),
        "target": target,
        "target_id": "" if place is None else example.candidates[place].item_id,
        "answer": target,
        "solution": target,
        "ground_truth": target,
        "order": list(rollout.ranking.order),
        "parse": str(rollout.ranking.parse),
        "reasoning": rollout.reasoning,
        "group": rollout.group,
        "truncated": rollout.truncated,
    }


def chat(rollout: Rollout, surface: SidSurface) -> tuple[list[Message], list[Message]]:
    """Prompt and completion as messages. The prompt is in the default style: a reward is not told the run's."""
    return rerank_messages(rollout.example, surface, PromptStyle()), [{"role": "assistant", "content": rollout.text}]


def flat(messages: Any) -> str:
    """The text of a completion or a prompt, whether it is text, messages, or messages of parts."""
    if isinstance(messages, str):
        return messages
    if isinstance(messages, Mapping):
        return flat(messages.get("content", messages.get("text", "")) or "")
    return "".join(map(flat, messages))

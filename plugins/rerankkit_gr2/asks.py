"""Where sampling strategies and chat backends meet: a request, what comes back, and the one method of a backend."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import Message, PromptStyle, clean_reasoning, rerank_messages, targeted_messages
from rerankkit.types import Parse, RerankExample, RunInfo, SidSurface

MAX_WORDS = 400
"""Words of reasoning above which a reply is refused: GR2's are about 130 tokens long."""


@dataclass(frozen=True)
class Request:
    """One ask. A backend may use no more of `example` than `style` shows, and its relevance only if told to."""

    example: RerankExample
    style: PromptStyle
    surface: SidSurface
    temperature: float
    seed: int
    """Of this example and this attempt, whatever else is asked."""
    reveal_target: bool = False
    """Targeted sampling: the answer is given away, and the question is why."""

    @property
    def messages(self) -> list[Message]:
        """The chat that asks for it; made when it is needed, as not every backend reads it."""
        make = targeted_messages if self.reveal_target else rerank_messages
        return make(self.example, self.surface, self.style)


@dataclass(frozen=True)
class Reply:
    """A usable answer."""

    reasoning: str
    """Clean: SIDs of the example's own items, and harmless text."""
    order: tuple[int, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """No usable answer, and why."""

    reason: str


class Backend(Protocol):
    """Answers requests, each exactly once, in any order, as the answers come; a bad reply is a Failure."""

    def ask(self, requests: Sequence[Request], info: RunInfo) -> Iterator[tuple[int, Reply | Failure]]:
        """Pairs of (position in `requests`, answer). The answer to a request must not depend on the others'."""


def derived_seed(seed: int, example_id: str, attempt: int) -> int:
    """A seed in [0, 2^63) for one attempt at one example: neither order nor company matters."""
    digest = hashlib.blake2b(f"{seed}/{attempt}/{example_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read_reply(text: str, request: Request, provenance: Mapping[str, str]) -> Reply | Failure:
    """A language model's reply, which nobody vouches for: thoughts and fences around the JSON go, the rest is parsed.

    A ranking that had to be repaired is taken, and its provenance says so.
    """
    thought, found, rest = text.partition("</think>")
    # Some servers open the thought themselves, so only its end is seen; but an answer may quote the mark.
    body = rest if found and not thought.lstrip().startswith(("{", "`")) else text
    answer = parse_answer(body[max(body.find("{"), 0) : body.rfind("}") + 1 or None], request.example, request.surface)
    ranking = answer.ranking
    if ranking.parse is Parse.FAILED:
        return Failure(f"unreadable reply: {ranking.problem}")
    reasoning = clean_reasoning(answer.reasoning, request.example, request.surface)
    num_words = len(reasoning.split())
    if not 0 < num_words <= MAX_WORDS:
        return Failure(f"explanation of {num_words} words; between 1 and {MAX_WORDS} can be used")
    repaired = {"repaired": ranking.problem} if ranking.parse is Parse.REPAIRED else {}
    return Reply(reasoning, ranking.order, {**provenance, **repaired})

"""The nouns that stages, plugins and reports exchange. Frozen, plain, and free of heavy imports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from rerankkit.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

Sid: TypeAlias = tuple[int, ...]
"""A semantic ID: one code per level, coarse to fine."""


@dataclass(frozen=True, slots=True)
class Item:
    """One catalogue item. `sid` is empty until the sids stage has drawn it."""

    item_id: str
    title: str
    categories: tuple[str, ...] = ()
    """Broad to narrow."""
    description: str = ""
    brand: str = ""
    price: float | None = None
    sid: Sid = ()


@dataclass(frozen=True, slots=True)
class Interaction:
    """One user's engagement with one item; `timestamp` may be any number that orders a user's own rows."""

    user_id: str
    item_id: str
    timestamp: float
    rating: float | None = None


@dataclass(frozen=True)
class Catalog:
    """What a Tokenizer may look at. Row i of every array belongs to `items[i]`."""

    items: tuple[Item, ...]
    embeddings: NDArray[np.float32]
    """[N, D], one row an item. It may be a map of a file: read it in chunks."""
    pairs: NDArray[np.int64]
    """[E, 2], row numbers of items that follow one another in a training history."""
    side: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Further matrices [N, *] by name, each made at the first look. In a run `collaborative` is always among them: what
    is bought beside what in training histories, as unit rows, zero for items that no history has."""


@dataclass(frozen=True, slots=True)
class RerankExample:
    """One ask: put these candidates in order for a user with this history."""

    example_id: str
    """Stable across runs; per-example seeds derive from it."""
    user_id: str
    history: tuple[Item, ...]
    """Oldest first."""
    candidates: tuple[Item, ...]
    """In the order the pre-ranker gave, best first."""
    relevance: tuple[float, ...]
    """Graded relevance, aligned with `candidates`; 0 is irrelevant. All zero when the target is not listed."""
    evidence: tuple[Mapping[str, int], ...] = ()
    """Facts about each candidate that the prompt shows, by name (see `policy.prompt.evidence`); empty without any."""

    @property
    def target_index(self) -> int | None:
        """Position of the most relevant candidate, or None if none is relevant."""
        best = max(range(len(self.relevance)), key=self.relevance.__getitem__, default=None)
        return best if best is not None and self.relevance[best] > 0 else None

    def in_order(self, order: Sequence[int]) -> RerankExample:
        """The same ask in another order: what was at `order[i]` is candidate i, and what is aligned goes with it."""
        candidates, relevance = tuple(self.candidates[i] for i in order), tuple(self.relevance[i] for i in order)
        evidence = tuple(self.evidence[i] for i in order) if self.evidence else ()
        return replace(self, candidates=candidates, relevance=relevance, evidence=evidence)


class Parse(StrEnum):
    """How an answer was read."""

    OK = "ok"
    """Well formed, and a complete permutation of the candidates."""
    REPAIRED = "repaired"
    """Some candidates could be read; duplicates and strangers dropped, the missing appended in input order."""
    FAILED = "failed"
    """Nothing usable: the order is the input order, and must not be mistaken for a choice."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """A complete permutation: `order[0]` is the position, in the input list, of the candidate put first."""

    order: tuple[int, ...]
    parse: Parse = Parse.OK
    problem: str = ""
    """Why it is not OK, in words; empty when it is."""

    @property
    def identity(self) -> bool:
        """True when the order is the one that was given."""
        return self.order == tuple(range(len(self.order)))


@dataclass(frozen=True, slots=True)
class Trace:
    """A teacher's worked answer for one example."""

    example_id: str
    reasoning: str
    order: tuple[int, ...]
    """A permutation of candidate positions, best first."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Strategy, backend, model, attempt: whatever says where this came from."""


@dataclass(frozen=True, slots=True)
class TraceFailure:
    """A teacher's typed shrug: no trace for this example, and why."""

    example_id: str
    reason: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion of the policy, already taken apart, so that a reward is a pure function of it."""

    example: RerankExample
    text: str
    reasoning: str
    ranking: Ranking
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    """The sampler's own log-probability of each token in `token_ids`."""
    allowed_ids: tuple[tuple[int, ...] | None, ...] = ()
    """What each token of `token_ids` was drawn from under the permutation mask: the ids it allowed (a single one: the
    token was forced, its log-probability is 0), or None for free reasoning. Empty when there was no mask."""
    num_reasoning_tokens: int = 0
    """`token_ids[:n]` is reasoning, the rest is the answer."""
    group: int = 0
    """Rollouts of one group share one prompt and are compared with one another."""
    origin: Literal["sample", "beam"] = "sample"
    beam_rank: int = 0
    """0 is the best beam; meaningless for samples."""
    truncated: bool = False
    """True when the length limit, not the model, ended it."""
    shown: tuple[int, ...] = ()
    """The order in which the prompt listed the candidates, as positions in `example.candidates`; empty: as given. The
    ranking is of the example's own positions either way."""

    @property
    def num_chosen(self) -> int:
        """Tokens that the policy chose: all but those that a mask forced."""
        forced = sum(ids is not None and len(ids) == 1 for ids in self.allowed_ids)
        return len(self.token_ids) - forced


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward that could be given, and the named parts it is made of (for the log)."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """The reward has nothing to say about this rollout; it leaves the group, it does not count as 0."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Judging went wrong (a server, a bug in the data); it leaves the group, and is counted."""

    reason: str


Outcome: TypeAlias = Reward | NotApplicable | Failed
"""What a RewardFn returns for each rollout."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What an optimizer yields after each step."""

    step: int
    metrics: Mapping[str, float]
    rollouts: tuple[Rollout, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    """Aligned with `rollouts`."""


@dataclass(frozen=True, slots=True)
class SidSurface:
    """How SIDs are spelled: `<|sid_begin|><s_a_57><s_b_7><s_c_23><|sid_end|>`.

    The one place that knows; prompts, vocabulary, tries and the parser ask here.
    """

    begin: str = "<|sid_begin|>"
    end: str = "<|sid_end|>"
    prefix: str = "s"
    """The first letters of every level token."""
    places: int = 0
    """If not 0, candidates are cited by their place in the prompt, `<c_1>` to as many as this, and not by their SIDs:
    ten tokens that every example has are sooner learned than ten thousand that few have."""

    facts: tuple[str, ...] = ()
    """Evidence that prompts show, by name, each value of it a token of its own: `<alike_0>` to `<alike_9>`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", tuple(self.facts))  # JSON knows lists alone

    def names(self, example: RerankExample) -> list[str]:
        """What each candidate is called in a prompt that shows them in the example's order, and in its answer."""
        if not self.places:
            return [self.text(item.sid) for item in example.candidates]
        if len(example.candidates) > self.places:
            raise UsageError(
                f"{example.example_id}: {len(example.candidates)} candidates, but the policy cites them by place and "
                f"knows {self.places} places; give shorter lists, or train with candidates.size that large."
            )
        return [self.place(place) for place in range(len(example.candidates))]

    def place(self, place: int) -> str:
        """`<c_1>` for the first candidate, place 0."""
        return f"<c_{place + 1}>"

    def told(self, evidence: Mapping[str, int]) -> str:
        """What is known about a candidate, always all of it and in one order: `<alike_7><together_2>`."""
        return "".join(self.fact(name, min(9, max(0, evidence.get(name, 0)))) for name in self.facts)

    def fact(self, name: str, value: int) -> str:
        """`<alike_7>`."""
        return f"<{name}_{value}>"

    def token(self, level: int, code: int) -> str:
        """`<s_a_57>` for level 0 and code 57."""
        return f"<{self.prefix}_{chr(ord('a') + level)}_{code}>"

    def text(self, sid: Sid) -> str:
        """The SID as the policy reads and writes it."""
        return self.begin + "".join(self.token(level, code) for level, code in enumerate(sid)) + self.end

    def tokens(self, codebook_sizes: Sequence[int]) -> list[str]:
        """Every token that SIDs over these codebooks need, in a fixed order."""
        codes = [self.token(level, code) for level, size in enumerate(codebook_sizes) for code in range(size)]
        facts = [self.fact(name, value) for name in self.facts for value in range(10)]
        return [self.begin, self.end, *codes, *map(self.place, range(self.places)), *facts]

    def find(self, text: str) -> list[Sid]:
        """Every well-formed SID in `text`, in order of appearance."""
        return [sid for sid, _ in self._cited(text) if sid]

    def citations(self, text: str) -> list[str]:
        """Every well-formed SID, and every place if they are in use, as they are spelled, in order of appearance."""
        return [spelled for _, spelled in self._cited(text)]

    def marks(self, text: str) -> list[str]:
        """As `citations`, with evidence."""
        return [spelled for _, spelled in self._cited(text, self.facts)]

    def _cited(self, text: str, facts: Sequence[str] = ()) -> list[tuple[Sid, str]]:
        level = rf"<{re.escape(self.prefix)}_([a-z])_(\d{{1,9}})>"
        whole = re.escape(self.begin) + rf"((?:{level})+)" + re.escape(self.end)
        found: list[tuple[Sid, str]] = []
        others = [r"<c_\d{1,9}>"] if self.places else []
        others += [rf"<(?:{'|'.join(map(re.escape, facts))})_\d>"] if facts else []
        for match in re.finditer("|".join([whole, *others]), text):
            codes = re.findall(level, match.group(1) or "")
            if codes and [letter for letter, _ in codes] == [chr(ord("a") + i) for i in range(len(codes))]:
                sid = tuple(int(code) for _, code in codes)
                found.append((sid, self.text(sid)))
            elif not codes:
                found.append(((), match.group()))
        return found


def _silent(items: Iterable[T], total: int | None = None, what: str = "") -> Iterator[T]:
    return iter(items)


def _unlogged(metrics: Mapping[str, float]) -> None:
    """Where metrics go when nobody keeps them."""


@dataclass(frozen=True)
class RunInfo:
    """What a part is told about the run it serves: plain values only."""

    seed: int = 0
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products in training and sampling; weights stay float32."""
    work: Path | None = None
    """A folder of the part's own for checkpoints and caches; kept until its stage is finished."""
    surface: SidSurface = field(default_factory=SidSurface)
    progress: Callable[..., Iterator[Any]] = _silent
    """`for x in info.progress(xs, total=len(xs), what="sampling")` draws a bar where there is a terminal."""
    log: Callable[[Mapping[str, float]], None] = _unlogged
    """Appends one record to metrics.jsonl; give `step`, and a step logged twice counts once, the last time."""
    tokens_per_pass: int = 8192
    """Tokens in one forward and backward pass, padding counted; a larger batch adds up the gradients of several."""

"""GR2's two ways of getting reasoning traces from a backend: rejection sampling and targeted sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rerankkit.text.prompts import PromptStyle
from rerankkit.types import RerankExample, RunInfo, Trace, TraceFailure
from rerankkit_gr2.asks import Backend, Failure, Reply, Request, derived_seed

_NO_TARGET = "no candidate is relevant: there is nothing to teach"


@dataclass(frozen=True)
class RejectionSampling:
    """Asks without the answer, up to `samples` times, and keeps the first reply with the target in its first `accept`.

    Goes in rounds, so that a backend always has many requests in flight. Seeds derive from (info.seed, example,
    attempt): an example's answer does not depend on which others are asked, as far as the backend's does not. The
    first round asks for every example that has a target.
    """

    backend: Backend
    samples: int = 8
    temperature: float = 1.0
    style: PromptStyle = field(default_factory=PromptStyle)
    accept: int = 1

    def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
        """A trace or a failure for each example, as they come."""
        yield from _without_target(examples)
        pending = [example for example in examples if example.target_index is not None]
        problems: dict[str, str] = {}
        rejected: Counter[str] = Counter()
        for attempt in range(self.samples):
            left = []
            what = f"teacher, sample {attempt + 1} of {self.samples}"
            for example, reply in _ask(self, pending, attempt, info, what):
                if isinstance(reply, Reply) and example.target_index in reply.order[: self.accept]:
                    yield _trace(example, reply.reasoning, reply.order, reply, "rejection", attempt)
                    continue
                left.append(example)
                if isinstance(reply, Failure):
                    problems[example.example_id] = reply.reason
                else:
                    rejected[example.example_id] += 1
            place = {example.example_id: i for i, example in enumerate(pending)}
            pending = sorted(left, key=lambda example: place[example.example_id])
        for example in pending:
            others = "another candidate" if self.accept == 1 else f"{self.accept} other candidates"
            reason = f"rejected: {rejected[example.example_id]} of {self.samples} replies put {others} first"
            problem = problems.get(example.example_id)
            yield TraceFailure(example.example_id, f"{reason}; {problem}" if problem else reason, self.samples)


@dataclass(frozen=True)
class Targeted:
    """Gives the answer away and asks why. The target goes first, the rest in the backend's order."""

    backend: Backend
    temperature: float = 1.0
    style: PromptStyle = field(default_factory=PromptStyle)

    def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
        """A trace or a failure for each example, as they come."""
        yield from _without_target(examples)
        listed = [example for example in examples if example.target_index is not None]
        for example, reply in _ask(self, listed, 0, info, "teacher"):
            target = example.target_index
            if isinstance(reply, Failure):
                yield TraceFailure(example.example_id, reply.reason)
            elif target is not None:
                order = (target, *(i for i in reply.order if i != target))
                yield _trace(example, reply.reasoning, order, reply, "targeted", 0)


def acceptance_by_position(
    examples: Sequence[RerankExample], answers: Sequence[Trace | TraceFailure]
) -> dict[int, tuple[int, int]]:
    """Target position (0 = the pre-ranker had it first) -> (traces, asks).

    Rejection drops the hard examples, those whose target stood low, without a word: log this. Examples without a
    target are not counted.
    """
    position = {example.example_id: example.target_index for example in examples}
    asked: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for answer in answers:
        place = position.get(answer.example_id)
        if place is not None:
            asked[place] += 1
            accepted[place] += isinstance(answer, Trace)
    return {place: (accepted[place], asked[place]) for place in sorted(asked)}


def _without_target(examples: Sequence[RerankExample]) -> Iterator[TraceFailure]:
    for example in examples:
        if example.target_index is None:
            yield TraceFailure(example.example_id, _NO_TARGET, attempts=0)


def _ask(
    strategy: RejectionSampling | Targeted, examples: Sequence[RerankExample], attempt: int, info: RunInfo, what: str
) -> Iterator[tuple[RerankExample, Reply | Failure]]:
    """Each example with its reply; one that the backend forgot comes last, as a failure."""
    if not examples:
        return
    # A teacher is asked at full length, also where the policy's own prompts are terse.
    style = replace(strategy.style, terse=False)
    requests = [
        Request(
            example,
            style,
            info.surface,
            strategy.temperature,
            derived_seed(info.seed, example.example_id, attempt),
            reveal_target=isinstance(strategy, Targeted),
        )
        for example in examples
    ]
    open_ids = set(range(len(requests)))
    for i, reply in info.progress(strategy.backend.ask(requests, info), total=len(requests), what=what):
        if i in open_ids:
            open_ids.remove(i)
            yield examples[i], reply
    for i in sorted(open_ids):
        yield examples[i], Failure("the backend gave no answer")


def _trace(
    example: RerankExample, reasoning: str, order: tuple[int, ...], reply: Reply, strategy: str, attempt: int
) -> Trace:
    provenance = {
        **reply.provenance,
        "strategy": strategy,
        "attempt": str(attempt + 1),
        "target_position": str(example.target_index),
    }
    return Trace(example.example_id, reasoning, order, provenance)

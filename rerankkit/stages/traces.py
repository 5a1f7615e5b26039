"""Reasoning traces: a teacher answers training lists, and the store keeps every answer (GR2, stage 2)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerankkit.errors import RunFailed
from rerankkit.protocols import Teacher
from rerankkit.store import drop_half_line
from rerankkit.types import RerankExample, RunInfo, SidSurface, Trace, TraceFailure

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.stages.sids import SidMap


@dataclass(frozen=True)
class Traces:
    """What the teacher wrote: traces that were kept, and failures with their reasons."""

    kept: tuple[Trace, ...]
    failures: tuple[TraceFailure, ...]
    acceptance: tuple[dict[str, Any], ...] = ()
    """Per position of the target in the given list: asked, kept. Rejection drops the hardest asks; this shows it."""

    def save(self, folder: Path) -> None:
        """traces.jsonl, failures.jsonl and acceptance.jsonl, in the order of the examples."""
        for name, rows in (("traces", self.kept), ("failures", self.failures)):
            _write_lines(folder / f"{name}.jsonl", [asdict(row) for row in rows])
        _write_lines(folder / "acceptance.jsonl", list(self.acceptance))

    @classmethod
    def load(cls, folder: Path) -> Traces:
        """Read what `save` wrote."""
        kept = tuple(_trace(row) for row in _read_lines(folder / "traces.jsonl"))
        failures = tuple(TraceFailure(**row) for row in _read_lines(folder / "failures.jsonl"))
        return cls(kept, failures, tuple(_read_lines(folder / "acceptance.jsonl")))


def write_traces(teacher: Teacher, dataset: Dataset, sids: SidMap, lists: CandidateLists, *, info: RunInfo) -> Traces:
    """Ask the teacher about every training list that holds its target; each answer is on disk before the next.

    Raises RunFailed if not one trace was kept, with the commonest reason.
    """
    examples = lists.examples(sids.attach(dataset.items), "train", only_with_target=True)
    if not examples:
        raise RunFailed(
            "teacher: no training list holds its target, so there is nothing to explain; raise candidates.size or "
            "candidates.earlier_steps, or choose another pre-ranker."
        )
    answers: dict[str, Trace | TraceFailure] = {}
    store = info.work / "answers.jsonl" if info.work else None
    if store and store.exists():
        drop_half_line(store)
        for row in _read_lines(store):
            answers[row["example_id"]] = TraceFailure(**row) if "reason" in row else _trace(row)
    missing = [example for example in examples if example.example_id not in answers]
    asked = {example.example_id: example for example in missing}
    for given in teacher.write(missing, info):
        answer = _checked(given, asked, info.surface)
        answers[answer.example_id] = answer
        if store:
            with store.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
    ordered = [
        answers.get(example.example_id, TraceFailure(example.example_id, "the teacher gave no answer"))
        for example in examples
    ]
    kept = tuple(answer for answer in ordered if isinstance(answer, Trace))
    failures = tuple(answer for answer in ordered if isinstance(answer, TraceFailure))
    if not kept:
        reasons = [failure.reason for failure in failures]
        common = max(set(reasons), key=reasons.count)
        raise RunFailed(f"teacher: no trace was kept out of {len(examples)} asks; commonest reason: {common}")
    return Traces(kept, failures, tuple(_acceptance(examples, kept)))


def _checked(
    answer: Trace | TraceFailure, asked: Mapping[str, RerankExample], surface: SidSurface
) -> Trace | TraceFailure:
    """The answer, or a failure in place of a trace that nobody could learn from. Raises RunFailed for a stranger's.

    What it cites by place is cited by SID from here on: fine-tuning may list the candidates in another order.
    """
    if answer.example_id not in asked:
        raise RunFailed(f"teacher: answered {answer.example_id!r}, which it was not asked. Its plugin is at fault.")
    size = len(asked[answer.example_id].candidates)
    if isinstance(answer, Trace) and sorted(answer.order) != list(range(size)):
        return TraceFailure(answer.example_id, f"the teacher's order is no permutation of {size} candidates")
    if isinstance(answer, Trace) and surface.places:
        example, said = asked[answer.example_id], answer.reasoning
        for name, item in zip(surface.names(example), example.candidates, strict=True):
            said = said.replace(name, surface.text(item.sid))
        return replace(answer, reasoning=said)
    return answer


def _acceptance(examples: list[RerankExample], kept: tuple[Trace, ...]) -> Iterator[dict[str, Any]]:
    accepted = {trace.example_id for trace in kept}
    for position in range(max((len(example.candidates) for example in examples), default=0)):
        here = [example.example_id for example in examples if example.target_index == position]
        if here:
            yield {"position": position + 1, "asked": len(here), "kept": sum(i in accepted for i in here)}


def _trace(row: dict[str, Any]) -> Trace:
    return Trace(row["example_id"], row["reasoning"], tuple(row["order"]), row["provenance"])


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    # Not splitlines: a title's U+2028 is no end of a line.
    return (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)

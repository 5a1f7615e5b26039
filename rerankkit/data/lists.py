"""Candidate lists: made once by a pre-ranker, then frozen, hashed and stored, so that a report's rows compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from rerankkit.data.dataset import SPLITS, Split
from rerankkit.errors import DataError
from rerankkit.types import Item, RerankExample


@dataclass(frozen=True, slots=True)
class CandidateList:
    """What the pre-ranker put before one user at one step."""

    example_id: str
    """`user/step`: the same in every run on the same data."""
    user_id: str
    step: int
    """Position of the target in the user's full history."""
    split: Split
    history: tuple[str, ...]
    """Item ids, oldest first: the last few before `step`."""
    candidates: tuple[str, ...]
    """Item ids, best first, none twice."""
    scores: tuple[float, ...]
    """Aligned with `candidates`, as the pre-ranker gave them; the order is that of `candidates`."""
    relevance: tuple[float, ...]
    """Aligned with `candidates`; 1 for the target unless the lists came with grades of their own."""
    target: str
    """The item engaged with at `step`, in the list or not."""
    evidence: tuple[Mapping[str, int], ...] = ()
    """Aligned with `candidates`: facts for the prompt, by name; empty if the run looks none up."""


@dataclass(frozen=True)
class CandidateLists:
    """All lists of a run, and how they came to be."""

    lists: tuple[CandidateList, ...]
    made_by: Mapping[str, str] = field(default_factory=dict)
    """Split -> the pre-ranker, its settings, what it was fitted on and how leaks are kept out."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What tuning tried, how many lists were filled up, users without a list: JSON values, for the report."""

    def __len__(self) -> int:
        return len(self.lists)

    def __iter__(self) -> Iterator[CandidateList]:
        return iter(self.lists)

    def of(self, split: Split) -> tuple[CandidateList, ...]:
        """The lists of one split, in the order they were made."""
        return tuple(one for one in self.lists if one.split == split)

    @cached_property
    def digest(self) -> str:
        """sha256 of every list's content, order included."""
        sha = hashlib.sha256()
        for one in self.lists:
            parts = [one.split, one.user_id, one.step, one.history, one.candidates]
            sha.update(json.dumps([*parts, one.scores, one.relevance, one.target]).encode())
        return sha.hexdigest()

    def recall_at(self, k: int, split: Split = "test") -> float:
        """Share of a split's lists with their target among the first k; 0 when there are no lists."""
        lists = self.of(split)
        return sum(one.target in one.candidates[:k] for one in lists) / max(1, len(lists))

    def protocol(self, split: Split = "test") -> str:
        """One line that says which lists a number was measured on."""
        lists = self.of(split)
        sizes = sorted({len(one.candidates) for one in lists})
        length = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}" if sizes else "0"
        users = len({one.user_id for one in lists})
        hits = sum(one.target in one.candidates for one in lists)
        listed = f"{hits:,} ({hits / max(1, len(lists)):.1%})"
        return (
            f"{split}: {len(lists):,} lists of {length} for {users:,} users, target in the list for {listed}; "
            f"pre-ranker: {self.made_by.get(split, 'not stated')}; lists {self.digest[:12]}"
        )

    def examples(
        self, items_by_id: Mapping[str, Item], split: Split, only_with_target: bool = True
    ) -> list[RerankExample]:
        """The split's lists as asks for the policy; without those that lack the target, unless told otherwise."""
        return [
            RerankExample(
                one.example_id,
                one.user_id,
                tuple(items_by_id[item_id] for item_id in one.history),
                tuple(items_by_id[item_id] for item_id in one.candidates),
                one.relevance,
                one.evidence,
            )
            for one in self.of(split)
            if not only_with_target or any(grade > 0 for grade in one.relevance)
        ]

    def trec_run(self, split: Split = "test", tag: str = "pre-rank") -> str:
        """TREC run, `qid Q0 docid rank score tag` a line.

        The score is the list's length minus the position, not the pre-ranker's: evaluators sort by score and break
        ties by document id, so that equal scores would bring back an order by id.
        """
        return "".join(
            f"{_trec(one.example_id)} Q0 {_trec(item_id)} {place + 1} {len(one.candidates) - place} {_trec(tag)}\n"
            for one in self.of(split)
            for place, item_id in enumerate(one.candidates)
        )

    def trec_qrels(self, split: Split = "test") -> str:
        """TREC qrels, `qid 0 docid relevance` a line: every relevant item, also the target that no list holds."""
        lines = []
        for one in self.of(split):
            grades = dict(zip(one.candidates, one.relevance, strict=True))
            grades.setdefault(one.target, 1.0)
            lines += [
                f"{_trec(one.example_id)} 0 {_trec(item_id)} {round(grade)}\n"
                for item_id, grade in grades.items()
                if grade > 0
            ]
        return "".join(lines)

    def export_trec(self, folder: Path) -> None:
        """Write {split}.run and {split}.qrels for every split that has lists."""
        folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            if self.of(split):
                (folder / f"{split}.run").write_text(self.trec_run(split), encoding="utf-8")
                (folder / f"{split}.qrels").write_text(self.trec_qrels(split), encoding="utf-8")

    def save(self, folder: Path) -> None:
        """Write lists.parquet and lists.json into an existing folder; equal lists, equal bytes."""
        strings, floats = pa.list_(pa.string()), pa.list_(pa.float64())
        columns = {
            "example_id": pa.array([one.example_id for one in self.lists], pa.string()),
            "user_id": pa.array([one.user_id for one in self.lists], pa.string()),
            "step": pa.array([one.step for one in self.lists], pa.int64()),
            "split": pa.array([one.split for one in self.lists], pa.string()),
            "history": pa.array([list(one.history) for one in self.lists], strings),
            "candidates": pa.array([list(one.candidates) for one in self.lists], strings),
            "scores": pa.array([list(one.scores) for one in self.lists], floats),
            "relevance": pa.array([list(one.relevance) for one in self.lists], floats),
            "target": pa.array([one.target for one in self.lists], pa.string()),
        }
        if names := sorted({name for one in self.lists for facts in one.evidence for name in facts}):
            kind = pa.list_(pa.struct({name: pa.int64() for name in names}))
            columns["evidence"] = pa.array([list(map(dict, one.evidence)) for one in self.lists], kind)
        pq.write_table(pa.table(columns), folder / "lists.parquet")
        facts = {"digest": self.digest, "made_by": dict(self.made_by), "notes": dict(self.notes)}
        text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "lists.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> CandidateLists:
        """Take back what `save` wrote; DataError if the lists are not the ones that were hashed."""
        rows = pq.read_table(folder / "lists.parquet").to_pylist()
        many = (
            "history",
            "candidates",
            "scores",
            "relevance",
            *(["evidence"] if rows and "evidence" in rows[0] else []),
        )
        facts = json.loads((folder / "lists.json").read_text(encoding="utf-8"))
        lists = tuple(CandidateList(**{**row, **{name: tuple(row[name]) for name in many}}) for row in rows)
        loaded = cls(lists, facts["made_by"], facts["notes"])
        if loaded.digest != facts["digest"]:
            raise DataError(
                f"{folder}: lists.parquet has the digest {loaded.digest[:12]}, but lists.json says "
                f"{facts['digest'][:12]}: the lists were changed after they were made; make them again"
            )
        return loaded


def relevance_of(candidates: Sequence[str], target: str) -> tuple[float, ...]:
    """1 for the target, 0 for the others, aligned with `candidates`."""
    return tuple(float(item_id == target) for item_id in candidates)


def _trec(name: str) -> str:
    """A name as one TREC field: white space and control characters percent-encoded, so that two names never meet."""
    return quote(name, safe="/:;,.+-_~!@#$&*()[]{}<>=?|^'\"`\\")

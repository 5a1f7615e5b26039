"""Two finished runs, compared on the same test users."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rerankkit.errors import RunFolderError, UsageError
from rerankkit.stages.report import COMPARED
from rerankkit.stages.wording import plain
from rerankkit.types import Parse, Ranking, RerankExample


@dataclass(frozen=True, slots=True)
class UserRanking:
    """One system's answer for one test user, with what is needed to score it again."""

    example_id: str
    ranking: Ranking
    relevance: tuple[float, ...]
    """In the order of the candidates as given, as in RerankExample."""


def save_rankings(path: Path, examples: Sequence[RerankExample], systems: Mapping[str, Sequence[Ranking]]) -> None:
    """Write every system's rankings of `examples` as one parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "system": system,
            "example_id": example.example_id,
            "order": list(ranking.order),
            "parse": str(ranking.parse),
            "relevance": list(example.relevance),
        }
        for system, rankings in systems.items()
        for example, ranking in zip(examples, rankings, strict=True)
    ]
    schema = pa.schema(
        {
            "system": pa.string(),
            "example_id": pa.string(),
            "order": pa.list_(pa.int32()),
            "parse": pa.string(),
            "relevance": pa.list_(pa.float64()),
        }
    )
    aside = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), aside)
    with aside.open("rb") as stream:
        os.fsync(stream.fileno())
    aside.replace(path)


def load_rankings(path: Path) -> dict[str, list[UserRanking]]:
    """What `save_rankings` wrote, by system. Raises RunFolderError when it is missing or not such a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise RunFolderError(f"{path}: no rankings here; finish the run first (`rerankkit run`), then compare.")
    found: dict[str, list[UserRanking]] = {}
    try:
        for row in pq.read_table(path).to_pylist():
            ranking = Ranking(tuple(row["order"]), Parse(row["parse"]))
            user = UserRanking(row["example_id"], ranking, tuple(row["relevance"]))
            if sorted(ranking.order) != list(range(len(user.relevance))):
                raise ValueError(
                    f"{user.example_id}: {list(ranking.order)} does not order {len(user.relevance)} candidates"
                )
            found.setdefault(row["system"], []).append(user)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path}: damaged, or not a file of rankings ({error}). Run the evaluation again."
        ) from error
    return found


def compare_runs(
    report_a: Mapping[str, Any],
    report_b: Mapping[str, Any],
    per_user_a: Mapping[str, Sequence[UserRanking]],
    per_user_b: Mapping[str, Sequence[UserRanking]],
    *,
    samples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """b minus a with paired 95% intervals, for every system and metric that both runs have, on the same test users.

    Both runs must have evaluated the same users; only when their frozen lists are equal (`lists_digest`) may one have
    evaluated fewer, and then the shared ones count. Raises UsageError otherwise, naming what differs.
    """
    from rerankkit.math.metrics import ranking_metrics
    from rerankkit.math.statistics import paired_bootstrap

    systems = [name for name in per_user_a if name in per_user_b]
    if not systems:
        raise UsageError(f"The runs share no system: {', '.join(per_user_a)} against {', '.join(per_user_b)}.")
    differing = {
        key: (report_a.get(key), report_b.get(key))
        for key in ("lists_digest", "protocol", "condition")
        if report_a.get(key) != report_b.get(key)
    }
    notes = [f"{key} differs: {a!r} against {b!r}" for key, (a, b) in differing.items()]
    rows, comparisons = [], []
    num_users = 0
    for name in systems:
        users_a, users_b = _by_id(name, per_user_a[name]), _by_id(name, per_user_b[name])
        shared = [example_id for example_id in users_a if example_id in users_b]
        if not shared or (users_a.keys() != users_b.keys() and "lists_digest" in differing):
            raise UsageError(_different_users(name, len(users_a), len(users_b), len(shared), notes))
        num_users = len(shared)
        scores = [ranking_metrics([_ranked(users[i]) for i in shared]) for users in (users_a, users_b)]
        means = [{metric: float(values.mean()) for metric, values in score.items()} for score in scores]
        rows.append({"name": name, "n": len(shared), "a": means[0], "b": means[1]})
        for metric in COMPARED:
            interval = paired_bootstrap(scores[1][metric], scores[0][metric], samples=samples, seed=seed)
            numbers = {"difference": interval.difference, "low": interval.low, "high": interval.high}
            comparisons.append({"name": name, "metric": metric, **numbers})
    only = {"a": [n for n in per_user_a if n not in systems], "b": [n for n in per_user_b if n not in systems]}
    if "lists_digest" in differing:
        notes.append("the candidate lists differ: this compares pre-ranker and re-ranker together")
    result: dict[str, Any] = plain(
        {"n": num_users, "rows": rows, "comparisons": comparisons, "notes": notes, "only_in": only}
    )
    return result


def _by_id(system: str, users: Sequence[UserRanking]) -> dict[str, UserRanking]:
    found = {user.example_id: user for user in users}
    if len(found) != len(users):
        raise UsageError(f"System {system!r} has ranked some test user twice; the run's rankings are damaged.")
    return found


def _ranked(user: UserRanking) -> list[float]:
    return [user.relevance[position] for position in user.ranking.order]


def _different_users(system: str, num_a: int, num_b: int, num_shared: int, notes: Sequence[str]) -> str:
    why = "; ".join(notes) or "lists, protocol and condition are said to be the same"
    return (
        f"The runs were not evaluated on the same test users: {system} has {num_a:,} and {num_b:,}, of which "
        f"{num_shared:,} are shared ({why}). Only runs on the same frozen lists can be compared: give both the same "
        "`data`, `candidates` and `evaluate` blocks."
    )

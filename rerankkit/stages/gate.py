"""The gate: after reinforcement, the policy that ranks validation users best is the one that is exported."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerankkit.config import Answering, Gate
from rerankkit.stages.rankings import How, Rankings, rank_examples
from rerankkit.stages.report import COMPARED
from rerankkit.stages.wording import change, label, number, plain
from rerankkit.store import link_tree, read_json, write_json
from rerankkit.types import RerankExample, RunInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.stages.sids import SidMap

    PerUser = Mapping[str, Mapping[str, NDArray[np.float64]]]


@dataclass(frozen=True)
class Exported:
    """The policy that a run hands out, and why it is this one."""

    policy: Path
    """A saved policy."""
    facts: Mapping[str, Any]
    """`exported` (its name), `how` it ranks, `metric`, `users`, `reason`; `rows`, `comparisons` on validation users."""

    def save(self, folder: Path) -> None:
        """The policy's files, and gate.json."""
        link_tree(self.policy, folder, leave_out=("kept", "stage.json", "gate.json"))
        write_json(folder / "gate.json", dict(self.facts))

    @classmethod
    def load(cls, folder: Path) -> Exported:
        """Read gate.json; the policy stays on disk."""
        return cls(folder, read_json(folder / "gate.json"))


def choose_policy(
    config: Gate,
    answering: Answering,
    think: bool,
    dataset: Dataset,
    sids: SidMap,
    lists: CandidateLists,
    mid: Path,
    sft: Path,
    rl: Path,
    *,
    info: RunInfo,
) -> Exported:
    """Rank validation users by every candidate, one policy in memory at a time, and take the best by `config.metric`.

    Candidates, in the order of the run: mid-training (which ranks by score), SFT, RL's kept policies, RL's end. An
    exact tie goes to the earlier one: it is the simpler.
    """
    examples = lists.examples(sids.attach(dataset.items), "valid", only_with_target=True)
    found: dict[str, Any] = {"metric": config.metric, "users": 0, "of": len(examples), "rows": [], "comparisons": []}
    if not config.max_users or not examples:
        why = "the gate is off (gate.max_users = 0)" if examples else "no validation list holds its target"
        return Exported(rl, {"exported": "rl", "how": "generate", **found, "reason": f"RL was exported untried: {why}"})
    if len(examples) > config.max_users:
        chosen = random.Random(f"{info.seed} gate").sample(range(len(examples)), config.max_users)
        examples = [examples[i] for i in sorted(chosen)]
    scores = {"pre-rank": _metrics(examples, None)}
    rows: list[dict[str, Any]] = [_row("pre-rank", scores["pre-rank"], 1.0)]
    policies = dict(_candidates(mid, sft, rl))
    for name, (how, saved) in policies.items():
        answers = _rank(how, saved, examples, answering, think, info)
        scores[name] = _metrics(examples, answers)
        identity = sum(ranking.identity for ranking in answers.rankings.values()) / len(examples)
        rows.append(_row(name, scores[name], identity))
    best = best_of({name: float(scores[name][config.metric].mean()) for name in policies})
    comparisons = [c for name in policies for c in _compared(scores, name, info.seed)]
    how, saved = policies[best]
    facts = {"exported": best, "how": how, **found, "users": len(examples), "rows": rows, "comparisons": comparisons}
    facts = plain(facts)
    return Exported(saved, {**facts, "reason": reason(facts)})


def best_of(means: Mapping[str, float]) -> str:
    """The name with the highest mean; of equal ones the first."""
    return max(means, key=lambda name: means[name])


def reason(facts: Mapping[str, Any]) -> str:
    """Why this policy is exported, in a sentence about validation users."""
    best, metric = facts["exported"], facts["metric"]
    means = {row["name"]: row["metrics"][metric] for row in facts["rows"]}
    tried = [name for name in means if name != "pre-rank"]
    among = f"the best {metric} of {len(tried)} policies on {facts['users']:,} validation users, {number(means[best])}"
    if best.startswith("rl"):
        return f"{label(best)} was exported: {among}, against {_against(facts, best, 'sft')}"
    rival = best_of({name: means[name] for name in tried if name.startswith("rl")})
    return f"{label(best)} was exported, not RL: {among}, against {_against(facts, rival, best)}"


def _against(facts: Mapping[str, Any], a: str, b: str) -> str:
    """The one of the two that was not exported, its mean, and the difference a - b where the two were compared."""
    other = b if facts["exported"] == a else a
    mean = next(row["metrics"][facts["metric"]] for row in facts["rows"] if row["name"] == other)
    pairs = {(c["a"], c["b"]): c for c in facts["comparisons"] if c["metric"] == facts["metric"]}
    told = f"; {label(a)} less {label(b)} is {change(pairs[a, b])} points" if (a, b) in pairs else ""
    return f"{number(mean)} of {label(other)}{told}"


def _candidates(mid: Path, sft: Path, rl: Path) -> Iterator[tuple[str, tuple[How, Path]]]:
    yield "mid-train", ("score", mid)
    yield "sft", ("generate", sft)
    for folder in sorted((rl / "kept").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-"))):
        yield f"rl@{int(folder.name.removeprefix('step-'))}", ("generate", folder)
    yield "rl", ("generate", rl)


def _rank(
    how: How, saved: Path, examples: Sequence[RerankExample], answering: Answering, think: bool, info: RunInfo
) -> Rankings:
    from rerankkit.lm import Policy

    policy = Policy.load(saved, device=info.device)
    return rank_examples(how, policy, examples, answering, think, info, what="ranking validation users")


def _metrics(examples: Sequence[RerankExample], answers: Rankings | None) -> Mapping[str, NDArray[np.float64]]:
    """Metric -> [N]; without answers, those of the given order."""
    from rerankkit.math.metrics import ranking_metrics

    if answers is None:
        return ranking_metrics([example.relevance for example in examples])
    orders = [answers.rankings[example.example_id].order for example in examples]
    return ranking_metrics([[e.relevance[i] for i in order] for e, order in zip(examples, orders, strict=True)])


def _row(name: str, scores: Mapping[str, NDArray[np.float64]], identity: float) -> dict[str, Any]:
    means = {metric: float(values.mean()) for metric, values in scores.items()}
    return {"name": name, "metrics": means, "identity_rate": identity}


def _compared(scores: PerUser, name: str, seed: int) -> Iterator[dict[str, Any]]:
    """A policy against the given order, against SFT and against mid-training, where it is neither."""
    from rerankkit.math.statistics import paired_bootstrap

    rivals = {"mid-train": ("pre-rank",), "sft": ("pre-rank", "mid-train")}.get(name, ("pre-rank", "mid-train", "sft"))
    for other in rivals:
        for metric in (*COMPARED, "R@10"):
            drawn = paired_bootstrap(scores[name][metric], scores[other][metric], seed=seed)
            interval = {"difference": drawn.difference, "low": drawn.low, "high": drawn.high}
            yield {"a": name, "b": other, "metric": metric, **interval}

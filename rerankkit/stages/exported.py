"""What the exported policy does on test users: as it is, without reasoning, and with the candidates shuffled."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from rerankkit.config import Answering
from rerankkit.stages.gate import Exported
from rerankkit.stages.rankings import How, Rankings, rank_examples
from rerankkit.stages.report import COMPARED
from rerankkit.stages.watch import tau
from rerankkit.stages.wording import plain
from rerankkit.store import read_json, write_json
from rerankkit.types import Ranking, RerankExample, RunInfo

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.lm import Policy
    from rerankkit.stages.sids import SidMap

NO_REASONING, BIAS = "no-reasoning", "position-bias.json"


@dataclass(frozen=True)
class ExportedRankings:
    """The exported policy's answers on test users, and what its behaviour was tried for."""

    name: str
    """As in the gate: `sft`, `rl`, `rl@40`, `mid-train`."""
    rankings: Rankings
    no_reasoning: Rankings | None = None
    """The same policy with an empty explanation."""
    shuffled: Mapping[str, Sequence[Rankings]] = field(default_factory=dict)
    """System -> its answers to each shuffle of the same lists; orders are of the candidates as given, not as shown."""
    position_bias: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """System -> what `position_bias` finds."""

    def save(self, folder: Path) -> None:
        """rankings.parquet, no-reasoning/ and shuffled/SYSTEM-K/ likewise, position-bias.json."""
        self.rankings.save(folder)
        more = {NO_REASONING: self.no_reasoning} if self.no_reasoning is not None else {}
        for name, rounds in self.shuffled.items():
            more |= {f"shuffled/{name}-{number}": one for number, one in enumerate(rounds, start=1)}
        for path, rankings in more.items():
            (folder / path).mkdir(parents=True)
            rankings.save(folder / path)
        write_json(folder / BIAS, {"exported": self.name, "systems": self.position_bias})

    @classmethod
    def load(cls, folder: Path) -> ExportedRankings:
        """Take back what `save` wrote, but for the shuffled answers, of which `position_bias` tells."""
        told = read_json(folder / BIAS)
        quiet = Rankings.load(folder / NO_REASONING) if (folder / NO_REASONING).is_dir() else None
        return cls(told["exported"], Rankings.load(folder), quiet, {}, told["systems"])


def rank_exported(
    config: Answering,
    think: Literal["on", "off", "both"],
    shuffles: int,
    dataset: Dataset,
    sids: SidMap,
    lists: CandidateLists,
    exported: Exported,
    sft: Path,
    ranked_mid: Rankings,
    ranked_sft: Rankings,
    ranked_rl: Rankings,
    *,
    info: RunInfo,
) -> ExportedRankings:
    """The exported policy's rankings, taken over where they are there already; and what the config asks beside them."""
    from rerankkit.lm import Policy

    name, how = exported.facts["exported"], exported.facts["how"]
    examples = lists.examples(sids.attach(dataset.items), "test", only_with_target=True)
    known = {"mid-train": ranked_mid, "sft": ranked_sft, "rl": ranked_rl}
    policy: Policy | None = None
    if name not in known or think == "both" or shuffles:
        policy = Policy.load(exported.policy, device=info.device)
    rankings = known.get(name)
    if rankings is None:
        assert policy is not None
        rankings = rank_examples(how, policy, examples, config, think != "off", info, what="ranking test users")
    quiet = None
    if think == "both" and how == "generate" and policy is not None and policy.thinks:
        quiet = rank_examples(how, policy, examples, config, False, info, what="ranking without reasoning")
    shuffled: dict[str, list[Rankings]] = {}
    bias: dict[str, Mapping[str, Any]] = {}
    if shuffles:
        tried: dict[str, tuple[How, Path, Rankings]] = {"sft": ("generate", sft, ranked_sft)}
        tried[name] = (how, exported.policy, rankings)
        for system, (way, saved, given) in tried.items():
            one = Policy.load(saved, device=info.device)
            rounds = [
                _ranked_shuffled(way, one, examples, config, think != "off", number, info)
                for number in range(1, shuffles + 1)
            ]
            shuffled[system] = rounds
            bias[system] = position_bias(examples, given, rounds, info.seed)
    return ExportedRankings(name, rankings, quiet, shuffled, bias)


def shuffle_of(example: RerankExample, number: int, seed: int) -> list[int]:
    """Given places in the order that shuffle `number` shows them; it depends on (seed, number, example) alone."""
    places = list(range(len(example.candidates)))
    random.Random(f"{seed} shuffle {number} {example.example_id}").shuffle(places)
    return places


def _ranked_shuffled(
    how: How,
    policy: Policy,
    examples: Sequence[RerankExample],
    config: Answering,
    think: bool,
    number: int,
    info: RunInfo,
) -> Rankings:
    places = {example.example_id: shuffle_of(example, number, info.seed) for example in examples}
    other = [example.in_order(places[example.example_id]) for example in examples]
    found = rank_examples(how, policy, other, config, think, info, what=f"ranking shuffle {number}")
    back = {
        name: Ranking(tuple(places[name][i] for i in ranking.order), ranking.parse, ranking.problem)
        for name, ranking in found.rankings.items()
    }
    return Rankings(back, found.reasoning)


def position_bias(
    examples: Sequence[RerankExample], given: Rankings, rounds: Sequence[Rankings], seed: int
) -> dict[str, Any]:
    """How far a system's order depends on the order in which the candidates are shown.

    Over all pairs of the lists' k + 1 presentations (as given, and k shuffles): the mean Kendall tau and the share with
    the same first choice. Then every metric as given and its least, mean and largest value over the shuffles, and where
    the first choice was *shown* in the shuffles: without bias each place has the same share.
    """
    orders = [[one.rankings[e.example_id].order for one in (given, *rounds)] for e in examples]
    pairs = [(a, b) for some in orders for a, b in combinations(some, 2)]
    values = [_means(examples, one) for one in (given, *rounds)]
    size = max(len(example.candidates) for example in examples)
    places = [
        shuffle_of(e, number, seed).index(one.rankings[e.example_id].order[0])
        for number, one in enumerate(rounds, start=1)
        for e in examples
    ]
    found: dict[str, Any] = plain(
        {
            "shuffles": len(rounds),
            "n": len(examples),
            "kendall_tau": fmean(tau(a, b) for a, b in pairs),
            "same_first": fmean(a[0] == b[0] for a, b in pairs),
            "metrics": {
                metric: {
                    "given": values[0][metric],
                    "low": min(v[metric] for v in values[1:]),
                    "mean": fmean(v[metric] for v in values[1:]),
                    "high": max(v[metric] for v in values[1:]),
                }
                for metric in COMPARED
            },
            "shown_first": [places.count(place) / len(places) for place in range(size)],
        }
    )
    return found


def _means(examples: Sequence[RerankExample], answers: Rankings) -> dict[str, float]:
    from rerankkit.math.metrics import ranking_metrics

    orders = [answers.rankings[example.example_id].order for example in examples]
    scores = ranking_metrics([[e.relevance[i] for i in order] for e, order in zip(examples, orders, strict=True)])
    return {metric: float(scores[metric].mean()) for metric in COMPARED}

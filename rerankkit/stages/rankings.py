"""Rankings: a policy puts test users' candidates in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from rerankkit import processes
from rerankkit.config import Answering
from rerankkit.types import Parse, Ranking, RerankExample, RunInfo

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.lm import Policy
    from rerankkit.stages.sids import SidMap

How: TypeAlias = Literal["score", "generate"]


@dataclass(frozen=True)
class Rankings:
    """One system's answers, aligned by example id."""

    rankings: dict[str, Ranking]
    """example_id -> ranking."""
    reasoning: dict[str, str]
    """example_id -> what the system said; empty where it only scores."""

    def save(self, folder: Path) -> None:
        """rankings.parquet, one row an example."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "example_id": example_id,
                "order": list(ranking.order),
                "parse": str(ranking.parse),
                "problem": ranking.problem,
                "reasoning": self.reasoning[example_id],
            }
            for example_id, ranking in self.rankings.items()
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rankings.parquet")

    @classmethod
    def load(cls, folder: Path) -> Rankings:
        """Read rankings.parquet."""
        import pyarrow.parquet as pq

        rows = pq.read_table(folder / "rankings.parquet").to_pylist()
        return cls(
            {row["example_id"]: Ranking(tuple(row["order"]), Parse(row["parse"]), row["problem"]) for row in rows},
            {row["example_id"]: row["reasoning"] for row in rows},
        )


def rank_users(
    how: How,
    config: Answering,
    think: bool,
    dataset: Dataset,
    sids: SidMap,
    lists: CandidateLists,
    policy: Policy,
    *,
    info: RunInfo,
) -> Rankings:
    """Answers for the test users whose target is listed."""
    examples = lists.examples(sids.attach(dataset.items), "test", only_with_target=True)
    return rank_examples(how, policy, examples, config, think, info, what="ranking test users")


def rank_examples(
    how: How,
    policy: Policy,
    examples: Sequence[RerankExample],
    config: Answering,
    think: bool,
    info: RunInfo,
    *,
    what: str,
) -> Rankings:
    """One policy's answers, shared among the processes; each of them gets all.

    `generate`: the greedy answer, reasoning first, or without `think` none. `score`: candidates by log P(SID |
    history), for a policy that has not yet learned to answer; ties keep the given order.
    """
    rank = partial(generate, think=think) if how == "generate" else score
    own = processes.share(examples)

    def answer() -> list[tuple[tuple[int, ...], str, str, str]]:
        starts = range(0, len(own), config.batch_size)
        answers = []
        for start in info.progress(starts, total=len(starts), what=what):
            answers += rank(policy, own[start : start + config.batch_size], config, info)
        return [(r.order, str(r.parse), r.problem, said) for r, said in answers]

    answers = dict(zip((e.example_id for e in examples), processes.gathered(answer), strict=True))
    rankings = {name: Ranking(tuple(order), Parse(parse), why) for name, (order, parse, why, _) in answers.items()}
    reasoning = {name: said for name, (_, _, _, said) in answers.items()}
    return Rankings(rankings, reasoning)


def generate(
    policy: Policy, examples: Sequence[RerankExample], config: Answering, info: RunInfo, think: bool = True
) -> list[tuple[Ranking, str]]:
    """The policy's greedy answers; without `think` with an empty explanation, else as it was trained."""
    from rerankkit.lm import ask

    rollouts = ask(
        policy,
        examples,
        group_size=1,
        max_new_tokens=config.max_new_tokens,
        temperature=0.0,
        info=info,
        salt="evaluate",
        constrain=config.constrain,
        think=None if think else False,
    )
    return [(rollout.ranking, rollout.reasoning) for rollout in rollouts]


def score(
    policy: Policy, examples: Sequence[RerankExample], config: Answering, info: RunInfo
) -> list[tuple[Ranking, str]]:
    """Candidates by the policy's log P of their SIDs after the history."""
    from rerankkit.lm import score_continuations
    from rerankkit.text.prompts import sequence_prompt

    scores = score_continuations(
        policy,
        [policy.document_ids(sequence_prompt(example.history, policy.surface, policy.style)) for example in examples],
        [[policy.sid_ids(item.sid) for item in example.candidates] for example in examples],
    )
    return [(Ranking(tuple(sorted(range(len(row)), key=lambda i: (-row[i], i)))), "") for row in map(list, scores)]

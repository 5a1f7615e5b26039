"""The pipeline composed in Python, with one part swapped for a reward of ten lines.

python examples/quickstart.py            # the whole run, as `rerankkit run examples/configs/quickstart.toml`
python examples/quickstart.py --look     # a few stages alone, called as the functions they are; seconds
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rerankkit import Outcome, Parse, Pipeline, Reward, Rollout, RunInfo

CONFIG = Path(__file__).parent / "configs" / "quickstart.toml"


@dataclass(frozen=True)
class ReciprocalRank:
    """1 with the target first, 1/2 with it second, and so on; `unreadable` for an answer that cannot be read."""

    unreadable: float = -1.0

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(self.of(rollout)) for rollout in rollouts]

    def of(self, rollout: Rollout) -> float:
        target = rollout.example.target_index
        if target is None or rollout.ranking.parse is Parse.FAILED:
            return self.unreadable
        return 1 / (1 + rollout.ranking.order.index(target))


def main(out: str = "runs/quickstart-own-reward") -> None:
    """All stages, from the shipped world to a report; run it again and it continues."""
    report = Pipeline(config=CONFIG, reward=ReciprocalRank()).run(out)
    print(report["headline"])
    for row in report["rows"]:
        print(f"{row['name']:<12}{row['metrics']['NDCG@5']:.3f}")


def look(num_users: int = 200) -> float:
    """Stages are plain functions from artifacts to an artifact: here data, then candidate lists; no language model."""
    from rerankkit.config import KnnLists, WorldData
    from rerankkit.stages.candidates import make_candidates
    from rerankkit.stages.data import make_dataset

    info = RunInfo(seed=0)
    world = WorldData(num_users=num_users)
    dataset = make_dataset(world, {}, info=info)
    lists = make_candidates(KnnLists(size=10), world.max_history, {}, dataset, None, None, info=info)

    one = lists.of("test")[0]
    titles = {item.item_id: item.title for item in dataset.items}
    print("bought: ", ", ".join(titles[item_id] for item_id in one.history))
    print("listed: ", ", ".join(titles[item_id] for item_id in one.candidates))
    print("next:   ", titles[one.target])
    print(f"target among the ten: {lists.recall_at(10):.0%} of {len(lists.of('test'))} test users")
    return lists.recall_at(10)


if __name__ == "__main__":
    look() if "--look" in sys.argv else main()

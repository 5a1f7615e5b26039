"""The shipped world in its smallest size, with SIDs, popularity lists and a policy of a few thousand weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rerankkit.config import PopularityLists, Prompt, ScratchPolicy, WorldData
from rerankkit.data.dataset import Dataset
from rerankkit.data.lists import CandidateLists
from rerankkit.lm import Policy
from rerankkit.stages.candidates import make_candidates
from rerankkit.stages.data import make_dataset
from rerankkit.stages.midtrain import open_policy
from rerankkit.stages.sids import SidMap
from rerankkit.types import Item, RunInfo

SIZES = (16, 16)
SMALL = ScratchPolicy(
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=64,
    vocab_size=400,
    max_positions=2048,
    prompt=Prompt(fields=("title",), max_history=3, terse=True),
)


@dataclass(frozen=True)
class Shop:
    """What the stages hand to one another. Shared: tests must not change it."""

    dataset: Dataset
    sids: SidMap
    lists: CandidateLists
    items: dict[str, Item]
    base: Policy

    def policy(self) -> Policy:
        """One of the test's own."""
        return copy.deepcopy(self.base)


@pytest.fixture(scope="session")
def shop() -> Shop:
    info = RunInfo(seed=1)
    dataset = make_dataset(WorldData(num_users=60), {}, info=info)
    # item n -> (n // 16, n % 16): 240 items, no two alike
    sids = SidMap({item.item_id: divmod(n, 16) for n, item in enumerate(dataset.items)}, SIZES, {})
    lists = make_candidates(PopularityLists(size=4), 6, {}, dataset, None, None, info=info)
    lists = replace(lists, lists=tuple(_with_target(one) for one in lists.lists))
    items = sids.attach(dataset.items)
    histories = [tuple(items[i] for i in h) for h in dataset.train_sequences().values()]
    base = open_policy(SMALL, histories, tuple(items.values()), info)
    base.extend(SIZES, info.surface, seed=1)
    return Shop(dataset, sids, lists, items, base)


def _with_target(one):  # type: ignore[no-untyped-def]
    """The list with its target second, where popularity missed it, for every other user."""
    if one.target in one.candidates or int(one.user_id.removeprefix("user")) % 2:
        return one
    candidates = (one.candidates[0], one.target, *one.candidates[1:-1])
    return replace(one, candidates=candidates, relevance=(0.0, 1.0, 0.0, 0.0))


@pytest.fixture
def info(tmp_path: Path) -> RunInfo:
    """A run with a work folder of its own."""
    work = tmp_path / "work"
    work.mkdir()
    return RunInfo(seed=1, work=work)

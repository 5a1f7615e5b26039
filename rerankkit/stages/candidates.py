"""Candidate lists: what the re-ranker is given, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rerankkit.config import FileLists, KnnLists, PolicyLists, PopularityLists
from rerankkit.errors import DataError
from rerankkit.types import RunInfo

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.data.prerankers import PreRanker
    from rerankkit.lm import Policy
    from rerankkit.stages.sids import SidMap

Lists = KnnLists | PopularityLists | PolicyLists | FileLists


def make_candidates(
    config: Lists,
    max_history: int,
    digests: dict[str, str],
    dataset: Dataset,
    sids: SidMap | None,
    policy: Policy | None,
    facts: Sequence[str] = (),
    *,
    info: RunInfo,
) -> CandidateLists:
    """Lists for training, validation and test, with the evidence that prompts show (`facts`, by name).

    `sids` and `policy` are for lists that the policy itself makes."""
    from rerankkit.data.prerankers import Knn, KnnSettings, Popularity, from_file, make_lists

    preranker: PreRanker
    match config:
        case KnnLists():
            settings = KnnSettings(transitions=config.transitions)
            preranker = Knn(dataset, settings, tune=config.tune, refit=config.refit, seed=info.seed)
        case PopularityLists():
            preranker = Popularity(dataset, refit=config.refit, seed=info.seed)
        case FileLists():
            files = {split: getattr(config, split) for split in ("train", "valid", "test") if getattr(config, split)}
            if {"train", "test"} - files.keys():
                raise DataError("candidates: lists from files need both candidates.train and candidates.test.")
            preranker = from_file(files, dataset, config.size)
        case PolicyLists():
            if sids is None or policy is None:
                raise ValueError("lists made by the policy need the policy and its SIDs")
            preranker = _by_policy(config, dataset, sids, policy, info)
    limits = {"train": config.max_train, "valid": config.max_valid, "test": config.max_test}
    lists = make_lists(
        dataset,
        preranker,
        size=config.size,
        max_history=max_history,
        earlier_steps=config.earlier_steps,
        max_users={split: limit for split, limit in limits.items() if limit is not None},
        seed=info.seed,
    )
    if facts:
        from rerankkit.data.evidence import Evidence

        refit = config.refit if isinstance(config, KnnLists | PopularityLists) else True
        lists = Evidence(dataset, facts, refit=refit).attached(lists)
    longest = max((len(one.candidates) for one in lists), default=0)
    if longest < config.size:
        advice = f"set candidates.size = {longest}, or " if longest >= 2 else ""
        raise DataError(
            f"candidates.size is {config.size}, but of {len(dataset.items):,} items in the catalogue no user has more "
            f"than {longest} new ones; {advice}give more items (a lower data.k_core keeps more)."
        )
    return lists


def _by_policy(config: PolicyLists, dataset: Dataset, sids: SidMap, policy: Policy, info: RunInfo) -> PreRanker:
    """The paper's lists: the mid-trained policy's best items, by beam search over the catalogue's trie."""
    import torch

    from rerankkit.data.prerank_base import seeded_hash
    from rerankkit.data.prerankers import from_scores
    from rerankkit.lm import beam_sids, build_trie
    from rerankkit.text.prompts import sequence_prompt

    items = sids.attach(dataset.items)
    trie = build_trie([item.sid for item in items.values()], policy)
    holders: dict[tuple[int, ...], list[str]] = {}
    for item in items.values():
        holders.setdefault(item.sid, []).append(item.item_id)
    for sharing in holders.values():  # items of one SID tie: a seeded order, never the catalogue's
        sharing.sort(key=lambda item_id: seeded_hash(info.seed, item_id))

    def rank(histories: Sequence[Sequence[str]]) -> list[tuple[list[str], list[float]]]:
        prompts = [
            policy.document_ids(sequence_prompt([items[i] for i in history], policy.surface, policy.style))
            for history in histories
        ]
        autocast = torch.bfloat16 if info.precision == "bfloat16" else None
        found = []
        for beams in beam_sids(policy, prompts, trie, config.num_beams, autocast=autocast):
            ranked = [(item_id, logp) for sid, logp in beams for item_id in holders[sid]]
            found.append(([item_id for item_id, _ in ranked], [logp for _, logp in ranked]))
        return found

    return from_scores(dataset, rank, name="policy", fitted_on="training steps before those of the training lists")

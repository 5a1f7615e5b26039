from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rerankkit.config import Answering, Gate, Schedule
from rerankkit.data.lists import CandidateLists
from rerankkit.lm import Policy, trace_sequence
from rerankkit.stages import gate
from rerankkit.stages.gate import Exported, best_of, choose_policy, reason
from rerankkit.stages.rankings import Rankings
from rerankkit.stages.rl import reinforce
from rerankkit.stages.training import train
from rerankkit.text.prompts import answer_parts, rerank_messages
from rerankkit.types import Ranking, RerankExample, Reward, RunInfo, StepReport

from .conftest import Shop

SHORT = Answering(max_new_tokens=60)
BEST, GIVEN, WORST = (1, 0, 2, 3), (0, 1, 2, 3), (0, 2, 3, 1)
"""Orders of four candidates of which the second is the target: at rank 1, 2 and 4."""


@pytest.fixture
def saved(shop: Shop, tmp_path: Path) -> dict[str, Path]:
    """Folders that stand in for stages; what is in them is never read where `ranks` stands in for the policies."""
    folders = {name: tmp_path / name for name in ("mid", "sft", "rl")}
    for folder in (*folders.values(), *(tmp_path / "rl" / "kept" / f"step-{n:05d}" for n in (5, 10))):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(folder.name)
        (folder / "stage.json").write_text("{}")
    return folders


def ranks(monkeypatch: pytest.MonkeyPatch, **orders: tuple[int, ...] | Sequence[tuple[int, ...]]) -> list[str]:
    """Every policy answers with a fixed order (or one for each user in turn), by the name of its folder."""
    asked: list[str] = []

    def rank(how: str, folder: Path, examples: Sequence[RerankExample], *rest: Any) -> Rankings:
        asked.append(f"{folder.name} {how} {len(examples)}")
        given = orders[folder.name.replace("-", "_")]
        several = [given] * len(examples) if isinstance(given[0], int) else given
        pairs = zip(examples, [several[i % len(several)] for i in range(len(examples))], strict=True)
        return Rankings({e.example_id: Ranking(tuple(order)) for e, order in pairs}, {})  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "_rank", rank)
    return asked


def choose(shop: Shop, saved: dict[str, Path], **settings: Any) -> Exported:
    lists = CandidateLists(
        tuple(one for one in shop.lists.lists if one.relevance[1]),  # whose target is given second
        shop.lists.made_by,
    )
    asked = (shop.dataset, shop.sids, lists, saved["mid"], saved["sft"], saved["rl"])
    return choose_policy(Gate(**settings), SHORT, True, *asked, info=RunInfo(seed=1))


def test_the_best_on_validation_users_is_exported_whichever_step_it_is_of(
    shop: Shop, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = ranks(monkeypatch, mid=WORST, sft=GIVEN, step_00005=BEST, step_00010=GIVEN, rl=WORST)

    found = choose(shop, saved, max_users=12)

    assert asked == [
        "mid score 12",
        "sft generate 12",
        "step-00005 generate 12",
        "step-00010 generate 12",
        "rl generate 12",
    ]
    assert (found.facts["exported"], found.facts["how"], found.facts["users"]) == ("rl@5", "generate", 12)
    rows = {row["name"]: row for row in found.facts["rows"]}
    assert list(rows) == ["pre-rank", "mid-train", "sft", "rl@5", "rl@10", "rl"]
    assert rows["pre-rank"]["metrics"] == rows["sft"]["metrics"]
    # rank 2 is 1 / log2(3), rank 4 is 1 / log2(5)
    assert rows["sft"]["metrics"]["NDCG@5"] == pytest.approx(0.630930, abs=1e-6)
    assert rows["rl"]["metrics"]["NDCG@5"] == pytest.approx(0.430677, abs=1e-6)
    assert (rows["sft"]["identity_rate"], rows["rl@5"]["identity_rate"]) == (1.0, 0.0)
    assert found.facts["reason"] == (
        "RL at step 5 was exported: the best NDCG@5 of 5 policies on 12 validation users, 1.000, against 0.631 of SFT; "
        "RL at step 5 less SFT is +36.9 [36.9, 36.9] points"
    )
    (tmp_path / "out").mkdir()
    found.save(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["gate.json", "model.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_text() == "step-00005"
    assert Exported.load(tmp_path / "out") == Exported(tmp_path / "out", json.loads(json.dumps(found.facts)))


def test_rl_that_hurts_is_not_exported(shop: Shop, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, mid=WORST, sft=BEST, step_00005=GIVEN, step_00010=WORST, rl=WORST)
    found = choose(shop, saved)
    assert (found.facts["exported"], found.policy) == ("sft", saved["sft"])
    assert "SFT was exported, not RL: the best NDCG@5 of 5 policies" in found.facts["reason"]
    # RL's best, not its end, is what SFT is compared with
    rival = "against 0.631 of RL at step 5; RL at step 5 less SFT is -36.9 [-36.9, -36.9] points"
    assert found.facts["reason"].endswith(rival)


def test_an_exact_tie_goes_to_the_simpler_policy(
    shop: Shop, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, mid=WORST, sft=BEST, step_00005=BEST, step_00010=BEST, rl=BEST)
    assert choose(shop, saved).facts["exported"] == "sft"


def test_a_policy_that_only_scores_can_win_and_says_how_it_ranks(
    shop: Shop, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(monkeypatch, mid=BEST, sft=GIVEN, step_00005=GIVEN, step_00010=GIVEN, rl=GIVEN)
    facts = choose(shop, saved).facts
    assert (facts["exported"], facts["how"]) == ("mid-train", "score")
    assert "RL at step 5 less mid-training is -36.9" in facts["reason"]  # of equal ones the first


def test_the_chosen_metric_decides(shop: Shop, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # SFT: always rank 2. RL: half at rank 1, half at rank 4. R@1 0 against .5, R@3 1 against .5.
    ranks(monkeypatch, mid=WORST, sft=GIVEN, step_00005=WORST, step_00010=WORST, rl=(BEST, WORST))
    assert choose(shop, saved, metric="R@1", max_users=12).facts["exported"] == "rl"
    assert choose(shop, saved, metric="R@3", max_users=12).facts["exported"] == "sft"


def test_without_a_choice_the_end_of_rl_is_exported(shop: Shop, saved: dict[str, Path]) -> None:
    off = choose(shop, saved, max_users=0)
    assert (off.policy, off.facts["exported"], off.facts["users"]) == (saved["rl"], "rl", 0)
    assert off.facts["reason"] == "RL was exported untried: the gate is off (gate.max_users = 0)"
    untargeted = replace(shop, lists=CandidateLists(tuple(one for one in shop.lists if one.split != "valid")))
    assert choose(untargeted, saved).facts["reason"].endswith("no validation list holds its target")


def test_the_users_are_a_sample_of_the_seed(
    shop: Shop, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def rank(how: str, folder: Path, examples: Sequence[RerankExample], *rest: Any) -> Rankings:
        seen.append([e.example_id for e in examples])
        return Rankings({e.example_id: Ranking(GIVEN) for e in examples}, {})

    monkeypatch.setattr(gate, "_rank", rank)
    choose(shop, saved, max_users=6)
    assert len(seen[0]) == 6 and all(ids == seen[0] for ids in seen)
    assert set(seen[0]) <= {one.example_id for one in shop.lists.of("valid")}


def test_best_of_takes_the_first_of_equals() -> None:
    assert best_of({"sft": 0.5, "rl": 0.5}) == "sft"
    assert best_of({"sft": 0.5, "rl": 0.5000001}) == "rl"


def test_a_reason_without_a_comparison_is_only_a_mean() -> None:
    rows = [{"name": name, "metrics": {"MRR": mean}} for name, mean in (("pre-rank", 0.9), ("sft", 0.5), ("rl", 0.25))]
    facts = {"exported": "sft", "metric": "MRR", "users": 1500, "rows": rows, "comparisons": []}
    assert reason(facts) == (
        "SFT was exported, not RL: the best MRR of 2 policies on 1,500 validation users, 0.500, against 0.250 of RL"
    )


@dataclass(frozen=True)
class Harmful:
    """An optimizer that scatters the weights, a little more with every step."""

    scale: float

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: Any, info: RunInfo
    ) -> Iterator[StepReport]:
        for step in (1, 2, 3, 4):
            generator = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(self.scale * step * parameter.std().nan_to_num() * noise)
            yield StepReport(step, {"reward": 1.0 * step})


def test_kept_policies_are_those_of_their_steps_and_load_as_ever(shop: Shop, info: RunInfo, tmp_path: Path) -> None:
    asked = (shop.dataset, shop.sids, shop.lists)

    def end_after(steps: int) -> Policy:
        policy = shop.policy()
        for report in Harmful(0.1).optimize(policy, [], None, info):
            if report.step == steps:
                break
        return policy

    reward = (1.0, "a", lambda rollouts: [Reward(1.0)] * len(rollouts))
    found = reinforce(Harmful(0.1), [reward], *asked, shop.policy(), None, 2, info=info)
    (tmp_path / "rl").mkdir()
    found.save(tmp_path / "rl")

    assert [folder.name for folder in (tmp_path / "rl" / "kept").iterdir()] == ["step-00002"]  # step 4 is the end
    for folder, steps in ((tmp_path / "rl" / "kept" / "step-00002", 2), (tmp_path / "rl", 4)):
        loaded, expected = Policy.load(folder), end_after(steps)
        pairs = zip(loaded.model.state_dict().values(), expected.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert loaded.codebook_sizes == expected.codebook_sizes


@pytest.mark.slow
def test_a_policy_made_worse_by_its_optimizer_is_caught(shop: Shop, info: RunInfo, tmp_path: Path) -> None:
    """With real policies: one that has learnt these users' targets, and an optimizer that scatters its weights."""
    policy = shop.policy()
    policy.thinks = False
    examples = shop.lists.examples(shop.items, "valid")
    lessons = [
        trace_sequence(
            policy,
            rerank_messages(e, policy.surface, policy.style),
            *answer_parts("", sorted(range(4), key=lambda i, e=e: -e.relevance[i]), e, policy.surface),
            0.0,
            1.0,
        )
        for e in examples
    ]
    schedule = Schedule(learning_rate=1e-2, warmup_steps=5, checkpoint_every=1000)
    train(policy, lambda step: lessons, 80, schedule, RunInfo(seed=1), what="learning by heart")
    policy.save(tmp_path / "sft")
    shop.base.save(tmp_path / "mid")

    reward = (1.0, "a", lambda rollouts: [Reward(1.0)] * len(rollouts))
    ended = reinforce(
        Harmful(0.3), [reward], shop.dataset, shop.sids, shop.lists, Policy.load(tmp_path / "sft"), None, 2, info=info
    )
    (tmp_path / "rl").mkdir()
    ended.save(tmp_path / "rl")
    folders = [tmp_path / name for name in ("mid", "sft", "rl")]
    facts = choose_policy(Gate(), SHORT, True, shop.dataset, shop.sids, shop.lists, *folders, info=info).facts

    means = {row["name"]: row["metrics"]["NDCG@5"] for row in facts["rows"]}
    assert facts["exported"] == "sft" and list(means) == ["pre-rank", "mid-train", "sft", "rl@2", "rl"]
    assert means["sft"] > 0.9 and means["rl"] < means["sft"] - 0.1
    assert facts["reason"].startswith("SFT was exported, not RL: the best NDCG@5 of 4 policies on ")

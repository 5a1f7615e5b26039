"""What a test's processes do together: torchrun --nproc_per_node N -m tests.together WHAT OUT

Trains or reinforces a policy of a few thousand weights and writes OUT/RANK.json and OUT/RANK.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from rerankkit import processes
from rerankkit.lm import Policy, TrainSequence, scratch_policy
from rerankkit.plugins import load_plugins
from rerankkit.stages.training import train
from rerankkit.text.prompts import PromptStyle
from rerankkit.types import Item, Outcome, RerankExample, Reward, Rollout, RunInfo, SidSurface

WORDS = ("red", "blue", "soap", "cream", "brush", "comb")


@dataclass(frozen=True)
class Plan:
    """A schedule, gradients clipped at every step."""

    learning_rate: float = 1e-3
    warmup_steps: int = 1
    schedule: str = "cosine"
    weight_decay: float = 0.1
    max_grad_norm: float = 0.1
    checkpoint_every: int = 2


def make_policy(tie: bool = True) -> Policy:
    corpus = [" ".join(WORDS), '{"explanation": "", "recommendations": ["", ""]}'] * 20
    policy = scratch_policy(
        corpus, seed=1, hidden_size=32, num_layers=2, num_heads=2, vocab_size=320, tie_embeddings=tie
    )
    policy.extend((4, 4), SidSurface(), seed=1)
    policy.style = PromptStyle(fields=("title",), max_history=2, terse=True)
    return policy


def supervised(work: Path) -> tuple[Policy, list[Any]]:
    """Steps of one to four sequences of unlike lengths and weights: some processes have nothing to do in some."""
    policy, log = make_policy(tie=False), []
    policy.checkpoint_gradients()

    def batch(step: int) -> list[TrainSequence]:
        lengths = [250 - 60 * step, 200, 90, 260][: 1 + step % 4]
        rows = [[(7 * step + 3 * n + 5 * i) % 300 for i in range(length)] for n, length in enumerate(lengths)]
        return [TrainSequence(tuple(row), tuple(1.0 / (1 + i % 3) for i in range(len(row)))) for row in rows]

    train(policy, batch, 4, Plan(), RunInfo(seed=2, work=work, log=log.append), what="training")
    return policy, log


def item(number: int) -> Item:
    return Item(f"i{number}", f"{WORDS[number % 6]} {WORDS[number % 5]}", sid=(number % 4, number // 4))


EXAMPLES = [
    RerankExample(
        f"e{n}", f"u{n}", (item(n), item(n + 4)), tuple(item(n + k) for k in (5, 6, 7)), (0.0, n % 2, 1.0 - n % 2)
    )
    for n in range(5)
]


def first_is_target(rollouts: Sequence[Rollout]) -> list[Outcome]:
    return [Reward(float(r.ranking.order[0] == r.example.target_index), {"first": 1.0}) for r in rollouts]


def reinforced(work: Path) -> tuple[Policy, list[Any]]:
    """Two prompts a step, groups without signal replaced from three more, two updates a batch."""
    policy = make_policy()
    spec = load_plugins(only="gr2").part("optimizer", "dapo", "")
    also = {"kl_weight": 0.2, "entropy_weight": 0.01, "shuffle_candidates": True}
    settings = {"steps": 4, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 60, "learning_rate": 1e-3}
    optimizer: Any = spec.build(spec.config(**settings, updates_per_batch=2, checkpoint_every=2, **also), RunInfo())
    log = []
    for report in optimizer.optimize(policy, EXAMPLES, first_is_target, RunInfo(seed=3, work=work)):
        said = [[r.group, r.example.example_id, r.text, r.logps, o.value] for r, o in _judged(report)]
        log.append({**report.metrics, "said": said})
    return policy, log


def _judged(report: Any) -> list[tuple[Rollout, Any]]:
    return list(zip(report.rollouts, report.outcomes, strict=True))


if __name__ == "__main__":
    what, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    PartialState(cpu=True)
    (out / "work").mkdir(exist_ok=True)
    seen: set[bool] = set()
    stepped: set[int] = set()

    class Watched(torch.optim.AdamW):
        def __init__(self, params: Any, **settings: Any) -> None:
            params = list(params)
            seen.update(isinstance(parameter, DTensor) for parameter in params)
            super().__init__(params, **settings)

        def step(self, *arguments: Any) -> Any:
            stepped.add(sum(parameter.numel() for group in self.param_groups for parameter in group["params"]))
            return super().step(*arguments)

    torch.optim.AdamW = Watched  # type: ignore[misc]
    policy, log = {"supervised": supervised, "reinforced": reinforced}[what](out / "work")
    weights = {name: tensor.detach().clone() for name, tensor in policy.model.named_parameters()}
    save_file(weights, out / f"{processes.rank()}.safetensors")
    facts = {
        "count": processes.count(),
        "pid": os.getpid(),
        "log": log,
        "sharded": seen == {True},
        "stepped": max(stepped),
    }
    (out / f"{processes.rank()}.json").write_text(json.dumps(facts))
    processes.leave()

"""How a step grows with the group, the prompt and the vocabulary: python benchmarks/growth.py docs/growth.svg

One prompt, random weights (8.9M outside the embeddings), float32, one thread. Shared: `roll_out`, `group_logps` and its
backward pass. Repeated: the same, told G prompts that happen to be equal. CPU seconds, medians of alternating runs.
Needs matplotlib.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib
import torch
import transformers
from matplotlib import pyplot

from rerankkit.lm import Policy, group_logps, roll_out, scratch_policy

NEW = 64
SERIES = {
    "samples a prompt": [(g, {"group": g}) for g in (2, 4, 8, 16, 32)],
    "prompt tokens": [(s, {"prompt": s}) for s in (100, 300, 1000, 2000, 4000)],
    "vocabulary": [(v, {"vocabulary": v}) for v in (4096, 16384, 50000, 150000)],
}


def main(target: Path, runs: int = 3) -> None:
    """Measure every series, print it, plot it."""
    torch.set_num_threads(1)
    measured = {}
    for name, settings in SERIES.items():
        measured[name] = [(x, *measure(runs, **setting)) for x, setting in settings]
        print(f"{name:18s} shared, s   repeated, s")
        for x, shared, repeated in measured[name]:
            print(f"{x:18d} {shared:9.2f} {repeated:13.2f}   {repeated / shared:.1f}x", flush=True)
    plot(measured, target)


def measure(runs: int, group: int = 8, prompt: int = 300, vocabulary: int = 4096) -> tuple[float, float]:
    """CPU seconds of a step, prompt shared and repeated."""
    policy = policy_of(vocabulary)
    draw = random.Random(0)
    ids = [draw.randrange(3, 4000) for _ in range(prompt)]

    def step(prompts: list[list[int]], size: int) -> None:
        groups = roll_out(policy, prompts, size, max_new_tokens=NEW, temperature=1.0, seeds=list(range(len(prompts))))
        for one, samples in zip(prompts, groups, strict=True):
            group_logps(policy, [one], [[sample.token_ids for sample in samples]]).logps.sum().backward()
        policy.model.zero_grad(set_to_none=True)

    def seconds(work: Callable[[], None]) -> float:
        begun = time.process_time()
        work()
        return time.process_time() - begun

    times: list[list[float]] = [[], []]
    for _ in range(runs):
        times[0].append(seconds(lambda: step([ids], group)))
        times[1].append(seconds(lambda: step([ids] * group, 1)))
    return statistics.median(times[0]), statistics.median(times[1])


def policy_of(vocabulary: int) -> Any:
    """The benchmark's model with a vocabulary of this size; its text tokenizer is not used."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=320, num_hidden_layers=7, intermediate_size=896, num_attention_heads=5,
        head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192, attn_implementation="sdpa",
    )  # fmt: skip
    return Policy(
        transformers.LlamaForCausalLM(config), scratch_policy(["a b c"], seed=0, hidden_size=8).text_tokenizer
    )


def plot(measured: dict[str, list[tuple[int, float, float]]], target: Path) -> None:
    """A panel a series, both axes logarithmic."""
    matplotlib.use("svg")
    figure, panels = pyplot.subplots(1, len(measured), figsize=(10, 3), sharey=True, layout="constrained")
    for panel, (name, rows) in zip(panels, measured.items(), strict=True):
        xs, shared, repeated = zip(*rows, strict=True)
        panel.loglog(xs, repeated, "o--", color="0.6", label="prompt repeated")
        panel.loglog(xs, shared, "o-", color="tab:blue", label="prompt shared")
        panel.set_xlabel(name)
        panel.set_xticks(xs, [str(x) for x in xs], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("CPU seconds a step")
    panels[0].legend(frameon=False)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    with patch.object(Policy, "stop_ids", frozenset()):
        main(Path(sys.argv[1]))

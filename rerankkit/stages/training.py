"""The supervised loop that mid-training and SFT share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rerankkit import processes
from rerankkit.config import Schedule
from rerankkit.errors import RunFailed
from rerankkit.types import RunInfo

if TYPE_CHECKING:
    from rerankkit.lm import Policy, TrainSequence

ROW_TOKENS = 256
"""Sequences are packed into rows of this many tokens, a longer one alone: attention grows with the square of a row."""
FORWARD_TOKENS = 8192
"""Tokens in one forward and backward pass; a larger batch accumulates gradients."""


def train(
    policy: Policy,
    batch: Callable[[int], Sequence[TrainSequence]],
    num_steps: int,
    schedule: Schedule,
    info: RunInfo,
    *,
    what: str,
) -> None:
    """Train in place on `batch(1) .. batch(num_steps)`, continuing from the checkpoint in `info.work` if there is one.

    The loss of a step is the weighted mean of -log P over its tokens. Several processes share the rows of a batch; all
    hold the whole policy and take the same step, with the gradient of the whole batch. `batch` must depend on the step
    alone: that is what makes a continued run end where an undisturbed one does. Raises RunFailed when the loss is not
    finite.
    """
    import torch

    from rerankkit.lm import load_checkpoint, pack, packed_logps, save_checkpoint

    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay
    )
    found = load_checkpoint(info.work / "checkpoint", policy, optimizer) if info.work else None
    done = found[0] if found else 0
    autocast = torch.bfloat16 if info.precision == "bfloat16" else None
    policy.model.train()
    for step in info.progress(range(done + 1, num_steps + 1), total=num_steps - done, what=what):
        started = time.monotonic()
        sequences = list(batch(step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, num_steps, schedule.learning_rate, schedule.warmup_steps)
        total = sum(sum(sequence.weights[1:]) for sequence in sequences)
        rows = [[sequences[i] for i in row] for row in pack(sequences, ROW_TOKENS)]
        loss = 0.0
        # longest first, so that every process gets as many long ones; each part is divided by the whole batch's weight
        for some in _passes(rows[processes.rank() :: processes.count()]):
            tokens = packed_logps(policy, some, autocast=autocast)
            part = -(tokens.weights * tokens.logps).sum() / total
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        processes.sum_gradients(policy.model.parameters())
        [loss] = processes.total([loss])
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), schedule.max_grad_norm).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise RunFailed(
                f"{what}: the loss is {loss} at step {step}; lower the learning rate ({schedule.learning_rate})."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        size = sum(len(sequence) for sequence in sequences)
        info.log(
            {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "tokens_per_second": size / seconds,
                "step_time": seconds,
            }
        )
        if info.work and step % schedule.checkpoint_every == 0 and step < num_steps:
            save_checkpoint(info.work / "checkpoint", step, policy, optimizer, {})
    policy.model.eval()


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak`, then cosine decay to a tenth of it; steps count from 1."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def _passes(rows: Sequence[Sequence[TrainSequence]]) -> list[list[Sequence[TrainSequence]]]:
    """Rows cut into passes of at most FORWARD_TOKENS, padding counted; rows longer than ROW_TOKENS come first."""
    passes: list[list[Sequence[TrainSequence]]] = []
    width = ROW_TOKENS
    for row in rows:
        if not passes or (len(passes[-1]) + 1) * width > FORWARD_TOKENS:
            passes.append([])
            width = max(ROW_TOKENS, sum(len(sequence) for sequence in row))
        passes[-1].append(row)
    return passes

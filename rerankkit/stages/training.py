"""The supervised loop that mid-training and SFT share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from rerankkit import processes
from rerankkit.config import Schedule
from rerankkit.errors import RunFailed
from rerankkit.types import RunInfo

if TYPE_CHECKING:
    from rerankkit.lm import Policy, TrainSequence

    Rows: TypeAlias = list[list[TrainSequence]]

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

    from rerankkit.lm import (
        apply_gradients,
        load_checkpoint,
        metered,
        needed_flops,
        pack,
        packed_logps,
        save_checkpoint,
        sequence_work,
        spent_on,
        spent_waiting,
    )

    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay
    )
    found = load_checkpoint(info.work / "checkpoint", policy, optimizer) if info.work else None
    done = found[0] if found else 0
    autocast = torch.bfloat16 if info.precision == "bfloat16" else None

    def accumulate(passes: Sequence[Rows], total: float) -> list[float]:
        """Add up gradients over passes; gives each one's part of the loss. `total` is the whole batch's weight."""
        losses = []
        for rows in passes:
            with spent_on("forward"):
                tokens = packed_logps(policy, rows, autocast=autocast)
                part = -(tokens.weights * tokens.logps).sum() / total
            if part.requires_grad:  # a pass may hold nothing but context
                with spent_on("backward"):
                    part.backward()  # type: ignore[no-untyped-call]
                    losses.append(part.item())
        return losses

    policy.model.train()
    for step in info.progress(range(done + 1, num_steps + 1), total=num_steps - done, what=what):
        with metered() as meter:
            sequences = list(batch(step))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, num_steps, schedule.learning_rate, schedule.warmup_steps)
            total = sum(sum(sequence.weights[1:]) for sequence in sequences)
            rows: Rows = [[sequences[i] for i in row] for row in pack(sequences, ROW_TOKENS)]
            # longest first, so that every process gets as many long ones
            own = _passes(rows[processes.rank() :: processes.count()])
            with spent_waiting():
                loss = sum(processes.gathered(partial(accumulate, own, total)))
            norm = apply_gradients(policy, optimizer, schedule.max_grad_norm)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise RunFailed(
                    f"{what}: the loss is {loss} at step {step}; lower the learning rate ({schedule.learning_rate})."
                )
            num_logits = sum(weight != 0 for sequence in sequences for weight in sequence.weights[1:])
            work = sequence_work(map(len, sequences), num_logits)
            meter.flops += needed_flops(policy, work, training=True)
        record = {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
        info.log({**record, **meter.metrics(work.tokens)})
        if info.work and step % schedule.checkpoint_every == 0 and step < num_steps:
            save_checkpoint(info.work / "checkpoint", step, policy, optimizer, {})
    policy.model.eval()


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak`, then cosine decay to a tenth of it; steps count from 1."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def _passes(rows: Rows) -> list[Rows]:
    """Rows cut into passes of at most FORWARD_TOKENS, padding counted; rows longer than ROW_TOKENS come first."""
    passes: list[Rows] = []
    width = ROW_TOKENS
    for row in rows:
        if not passes or (len(passes[-1]) + 1) * width > FORWARD_TOKENS:
            passes.append([])
            width = max(ROW_TOKENS, sum(len(sequence) for sequence in row))
        passes[-1].append(row)
    return passes

"""The supervised loop that mid-training and SFT share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from rerankkit import processes
from rerankkit.config import Lora, Schedule
from rerankkit.errors import RunFailed
from rerankkit.types import RunInfo

if TYPE_CHECKING:
    from rerankkit.lm import Policy, TrainSequence

    Rows: TypeAlias = list[list[TrainSequence]]

ROW_TOKENS = 256
"""Sequences are packed into rows of this many tokens, a longer one alone: attention grows with the square of a row."""


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
    hold the whole policy and take the same step, with the gradient of the whole batch, which is gathered in passes of
    `info.tokens_per_pass`. `batch` must depend on the step alone: that is what makes a continued run end where an
    undisturbed one does. Raises RunFailed when the loss is not finite.
    """
    from rerankkit.lm import sharded

    with sharded(policy):
        _train(policy, batch, num_steps, schedule, info, what)


def _train(
    policy: Policy,
    batch: Callable[[int], Sequence[TrainSequence]],
    num_steps: int,
    schedule: Schedule,
    info: RunInfo,
    what: str,
) -> None:
    import torch

    from rerankkit.lm import (
        accumulate,
        adamw,
        apply_gradients,
        metered,
        needed_flops,
        pack,
        packed_logps,
        passes,
        resumable_steps,
        sequence_work,
    )

    optimizer = adamw(policy, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    autocast = torch.bfloat16 if info.precision == "bfloat16" else None

    def forward(total: float, rows: Rows) -> tuple[torch.Tensor, float]:
        tokens = packed_logps(policy, rows, autocast=autocast)
        loss = -(tokens.weights * tokens.logps).sum() / total
        return loss, loss.item()

    policy.model.train()
    for step in resumable_steps(
        policy,
        optimizer,
        num_steps,
        info,
        what=what,
        checkpoint_every=schedule.checkpoint_every,
        warmup_steps=schedule.warmup_steps,
        schedule=schedule.schedule,
    ):
        with metered() as meter:
            sequences = [sequence for sequence in batch(step) if any(sequence.weights[1:])]
            total = sum(sum(sequence.weights[1:]) for sequence in sequences)
            rows: Rows = [[sequences[i] for i in row] for row in pack(sequences, ROW_TOKENS)]
            # rows come longest first, so that every process gets as many long ones
            share = rows[processes.rank() :: processes.count()]
            sizes = [sum(map(len, row)) for row in share]
            own = [[share[i] for i in some] for some in passes(sizes, info.tokens_per_pass)]
            loss = sum(accumulate(policy, own, partial(forward, total), idle=rows[-1:]))
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
    policy.model.eval()


def adapting(policy: Policy, lora: Lora | None, info: RunInfo) -> AbstractContextManager[None]:
    """Train adapters within, if the config says so, and have them merged at the end."""
    from rerankkit.lm import adapted

    return adapted(policy, info.seed, **lora.model_dump()) if lora is not None else nullcontext()

"""Supervised fine-tuning on traces, reasoning and ranking weighted apart (GR2, stage 3a)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rerankkit.config import Lora, Sft
from rerankkit.stages.training import adapting, train
from rerankkit.text.prompts import answer_parts, rerank_messages
from rerankkit.types import RunInfo

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.lm import Policy, TrainSequence
    from rerankkit.stages.sids import SidMap
    from rerankkit.stages.traces import Traces


def fine_tune(
    config: Sft,
    dataset: Dataset,
    sids: SidMap,
    lists: CandidateLists,
    traces: Traces,
    policy: Policy,
    lora: Lora | None = None,
    *,
    info: RunInfo,
) -> Policy:
    """Teach the mid-trained policy to answer as the teacher did.

    L = -lambda_r * sum log P(reasoning tokens) - lambda_o * sum log P(ranking tokens), over answer tokens only, divided
    by the weights' sum so that the step size does not depend on the batch. Without `config.reasoning` explanations are
    empty, and the policy remembers it.
    """
    from rerankkit.lm import trace_sequence

    examples = {e.example_id: e for e in lists.examples(sids.attach(dataset.items), "train", only_with_target=True)}
    sequences: list[TrainSequence] = []
    for trace in traces.kept:
        example = examples[trace.example_id]
        shown: Sequence[int] = range(len(example.candidates))
        if config.shuffle_candidates:
            shown = random.Random(f"{info.seed} shown {trace.example_id}").sample(shown, len(shown))
        sequences.append(
            trace_sequence(
                policy,
                rerank_messages(example.in_order(shown), policy.surface, policy.style),
                *answer_parts(trace.reasoning if config.reasoning else "", trace.order, example, policy.surface),
                config.reasoning_weight,
                config.ranking_weight,
            )
        )
    size = sum(len(sequence) for sequence in sequences) / len(sequences)
    per_step = min(len(sequences), max(1, round(config.tokens_per_step / size)))
    steps_per_epoch = math.ceil(len(sequences) / per_step)

    def batch(step: int) -> list[TrainSequence]:
        epoch, place = divmod(step - 1, steps_per_epoch)
        order = list(range(len(sequences)))
        random.Random(f"{info.seed} sft {epoch}").shuffle(order)
        return [sequences[i] for i in order[place * per_step : (place + 1) * per_step]]

    policy.thinks = config.reasoning
    steps = steps_per_epoch * config.epochs
    with adapting(policy, lora, info):
        train(policy, batch, steps, config, info, what="fine-tuning")
    return policy

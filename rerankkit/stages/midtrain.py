"""Mid-training: the policy learns what SIDs mean and how they follow one another (GR2, stage 1b)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rerankkit.config import Midtrain, PretrainedPolicy, ScratchPolicy
from rerankkit.errors import RunFailed
from rerankkit.stages.training import adapting, train
from rerankkit.text.prompts import (
    Document,
    PromptStyle,
    caption_document,
    item_line,
    language_document,
    persona_document,
    rerank_messages,
    sequence_document,
)
from rerankkit.types import Item, RerankExample, RunInfo, SidSurface

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.lm import Policy, TrainSequence
    from rerankkit.stages.sids import SidMap


def midtrain(
    config: Midtrain,
    base: ScratchPolicy | PretrainedPolicy,
    dataset: Dataset,
    sids: SidMap,
    held_out: int,
    *,
    info: RunInfo,
) -> Policy:
    """Open or make the base model, teach it the SID vocabulary, and train it on the task mix.

    `held_out` is how many training steps at the end of each history will stand in training lists: they are left out
    here, since a policy that has seen the targets looks better on its training lists than it will ever be again.
    """
    items = sids.attach(dataset.items)
    histories = [
        tuple(items[item_id] for item_id in sequence[: len(sequence) - held_out])
        for sequence in dataset.train_sequences().values()
    ]
    histories = [history for history in histories if len(history) >= 2]
    if not histories:
        listed = f"the {held_out} listed ones" if held_out > 1 else "the listed one"
        advice = "lower candidates.earlier_steps" if held_out > 1 else "give users of five interactions or more"
        raise RunFailed(f"midtrain: no user has two training steps before {listed}; {advice}.")
    policy = open_policy(base, histories, tuple(items.values()), info)
    policy.extend(sids.codebook_sizes, info.surface, info.seed)
    documents = histories, tuple(items.values())
    if config.new_tokens.steps:
        _teach_new_tokens(policy, config, documents, info)
    draw = TaskDrawer(policy, config, *documents)

    def batch(step: int) -> list[TrainSequence]:
        return draw.batch(random.Random(f"{info.seed} midtrain {step}"), config.tokens_per_step)

    with adapting(policy, base.lora if isinstance(base, PretrainedPolicy) else None, info):
        train(policy, batch, config.steps, config, info, what="mid-training")
    return policy


def _teach_new_tokens(
    policy: Policy, config: Midtrain, documents: tuple[Sequence[Sequence[Item]], Sequence[Item]], info: RunInfo
) -> None:
    """The rows of SID tokens learn alone, before everything learns. Its steps are not logged: they would be counted
    as the first of mid-training. After a kill it is done again, if it was not done, or for nothing.
    """
    from rerankkit.lm import only_sid_rows

    new = config.new_tokens
    # a decay would pull at the rows that are to stay
    changes = {"steps": new.steps, "learning_rate": new.learning_rate, "mix": new.mix, "weight_decay": 0.0}
    schedule = config.model_copy(update=changes)
    draw = TaskDrawer(policy, schedule, *documents)

    def batch(step: int) -> list[TrainSequence]:
        return draw.batch(random.Random(f"{info.seed} new tokens {step}"), config.tokens_per_step)

    apart = replace(info, work=info.work / "new-tokens" if info.work else None, log=lambda metrics: None)
    with only_sid_rows(policy):
        train(policy, batch, new.steps, schedule, apart, what="new tokens")


def open_policy(
    base: ScratchPolicy | PretrainedPolicy, histories: Sequence[Sequence[Item]], items: Sequence[Item], info: RunInfo
) -> Policy:
    """The base model as the config has it, without SIDs."""
    from rerankkit.lm import pretrained_policy, scratch_policy

    prompt = base.prompt
    style = PromptStyle(prompt.fields, prompt.max_title_words, prompt.max_history, prompt.knowledge, prompt.terse)
    if isinstance(base, PretrainedPolicy):
        policy = pretrained_policy(base.model, base.gguf_file or None, device=info.device)
    else:
        policy = scratch_policy(
            _corpus(histories, items, info.surface, style),
            seed=info.seed,
            architecture=base.architecture,
            hidden_size=base.hidden_size,
            num_layers=base.num_layers,
            num_heads=base.num_heads,
            num_kv_heads=base.num_kv_heads,
            intermediate_size=base.intermediate_size,
            vocab_size=base.vocab_size,
            max_positions=base.max_positions,
            tie_embeddings=base.tie_embeddings,
            device=info.device,
        )
    policy.style = style
    if base.gradient_checkpointing:
        policy.checkpoint_gradients()
    return policy


class TaskDrawer:
    """Draws training documents: the paper's four tasks."""

    def __init__(self, policy: Policy, config: Midtrain, histories: Sequence[Sequence[Item]], items: Sequence[Item]):
        self.policy, self.histories, self.items = policy, histories, items
        self.tasks = {name: share for name, share in config.mix.model_dump().items() if share > 0}

    def batch(self, dice: random.Random, num_tokens: int) -> list[TrainSequence]:
        """Documents of about `num_tokens` tokens, tasks mixed by their share of *documents*."""
        from rerankkit.lm import document_sequence

        sequences: list[TrainSequence] = []
        size = 0
        while size < num_tokens:
            task = dice.choices(list(self.tasks), list(self.tasks.values()))[0]
            sequence = document_sequence(self.policy, self._document(task, dice))
            sequences.append(sequence)
            size += len(sequence)
        return sequences

    def _document(self, task: str, dice: random.Random) -> Document:
        surface, style = self.policy.surface, self.policy.style
        if task == "caption":
            return caption_document(dice.choice(self.items), surface, style)
        if task == "language":
            return language_document(dice.choice(self.items), style)
        history = dice.choice(self.histories)
        if task == "persona":
            return persona_document(history, surface, style)
        end = dice.randint(1, len(history) - 1)
        return sequence_document(history[:end], history[end], surface, style, history_weight=1.0)


def _corpus(
    histories: Sequence[Sequence[Item]], items: Sequence[Item], surface: SidSurface, style: PromptStyle
) -> Iterator[str]:
    """Texts as the policy will meet them, for training a text tokenizer; SIDs are added tokens and stay out."""
    bare = [Item(i.item_id, i.title, i.categories, i.description, i.brand, i.price) for i in items]
    empty = SidSurface(begin="", end="")
    for item in bare:
        documents = [caption_document(item, empty, style), language_document(item, style)]
        yield from (segment.text for document in documents for segment in document)
        yield item_line(item, empty, style)
    for history in histories[:2000]:
        shown = tuple(Item(i.item_id, i.title, i.categories, i.description, i.brand, i.price) for i in history)
        yield from (segment.text for segment in persona_document(shown, empty, style))
        example = RerankExample("", "", shown, shown, ())
        yield from (message["content"] for message in rerank_messages(example, empty, style))

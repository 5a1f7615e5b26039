from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rerankkit.config import Midtrain, NewTokens, TaskMix
from rerankkit.errors import RunFailed
from rerankkit.lm import packed_logps
from rerankkit.lm.sequences import document_sequence
from rerankkit.stages.midtrain import TaskDrawer, midtrain
from rerankkit.text.prompts import sequence_document
from rerankkit.types import RunInfo, SidSurface

from .conftest import SMALL, Shop


def only(task: str) -> Midtrain:
    return Midtrain(mix=TaskMix(**{name: float(name == task) for name in TaskMix.model_fields}))


def drawer(shop: Shop, config: Midtrain) -> TaskDrawer:
    histories = [tuple(shop.items[i] for i in h) for h in shop.dataset.train_sequences().values() if len(h) > 1]
    return TaskDrawer(shop.base, config, histories, tuple(shop.items.values()))


def test_a_policy_comes_out_with_sids_and_the_prompt_of_the_config(shop: Shop, info: RunInfo) -> None:
    logged: list[float] = []
    info = replace(info, log=lambda metrics: logged.append(metrics["loss"]))
    config = Midtrain(steps=12, tokens_per_step=300, learning_rate=5e-3, warmup_steps=0, mix=TaskMix(sequence=1))

    policy = midtrain(config, SMALL, shop.dataset, shop.sids, 1, info=info)

    assert policy.codebook_sizes == (16, 16) and policy.style.fields == ("title",) and policy.style.terse
    assert len(policy.sid_ids((3, 15))) == 4
    assert sum(logged[-3:]) < sum(logged[:3])


def test_the_same_seed_makes_the_same_policy_and_another_seed_another(shop: Shop) -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        config = Midtrain(steps=1, tokens_per_step=100)
        weights: dict[str, torch.Tensor] = midtrain(
            config, SMALL, shop.dataset, shop.sids, 1, info=RunInfo(seed=seed)
        ).model.state_dict()
        return weights

    first, again, other = made(1), made(1), made(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_steps_that_training_lists_ask_for_are_left_out(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, ...]] = []

    class Spy(TaskDrawer):
        def __init__(self, policy, config, histories, items):  # type: ignore[no-untyped-def]
            super().__init__(policy, config, histories, items)
            drawn.extend(tuple(item.item_id for item in history) for history in histories)

    monkeypatch.setattr("rerankkit.stages.midtrain.TaskDrawer", Spy)
    midtrain(Midtrain(steps=0), SMALL, shop.dataset, shop.sids, 2, info=RunInfo())

    sequences = shop.dataset.train_sequences()
    assert drawn == [history[:-2] for history in sequences.values() if len(history) >= 4]
    # and with them every target of a training list with one earlier step
    targets = {(user, history[t]) for user, t in shop.dataset.steps("train", 1) for history in [sequences[user]]}
    seen = {(user, item) for (user, _), history in zip(sequences.items(), drawn, strict=True) for item in history}
    assert len(targets) > 60 and not targets & seen


def test_histories_too_short_to_learn_from_are_a_failure_in_words(shop: Shop) -> None:
    with pytest.raises(RunFailed, match=r"no user has two training steps before the 20 .*; lower candidates\.earlier"):
        midtrain(Midtrain(steps=1), SMALL, shop.dataset, shop.sids, 20, info=RunInfo())
    short = replace(shop.dataset, splits=dict.fromkeys(shop.dataset.splits, (2, 3)))  # two training items, one listed
    with pytest.raises(RunFailed, match=r"before the listed one; give users of five interactions or more"):
        midtrain(Midtrain(steps=1), SMALL, short, shop.sids, 1, info=RunInfo())


def test_a_batch_depends_on_its_dice_alone_and_is_about_as_large_as_asked(shop: Shop) -> None:
    draw = drawer(shop, Midtrain())
    one, two = (draw.batch(random.Random("7"), 500) for _ in range(2))
    assert one == two != draw.batch(random.Random("8"), 500)
    sizes = [len(sequence) for sequence in one]
    assert 500 <= sum(sizes) < 500 + sizes[-1]


def test_tasks_come_in_their_shares(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = drawer(
        shop, Midtrain(mix=TaskMix(**dict.fromkeys(TaskMix.model_fields, 0.0) | {"caption": 3, "language": 1}))
    )
    counts: Counter[str] = Counter()
    document = draw._document

    def counted(task: str, dice: random.Random):  # type: ignore[no-untyped-def]
        counts[task] += 1
        return document(task, dice)

    monkeypatch.setattr(draw, "_document", counted)
    draw.batch(random.Random("shares"), 12_000)
    # 3 : 1, and a binomial of some 400 draws strays from .75 by .02 or so
    assert set(counts) == {"caption", "language"}
    assert counts["caption"] / counts.total() == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize("task", list(TaskMix.model_fields))
def test_every_task_gives_documents_with_something_to_learn(shop: Shop, task: str) -> None:
    sequences = drawer(shop, only(task)).batch(random.Random(task), 200)
    assert all(sum(sequence.weights[1:]) > 0 for sequence in sequences)
    assert torch.isfinite(packed_logps(shop.base, [sequences]).logps).all()


def test_the_sequence_task_asks_for_the_step_after_a_history(shop: Shop) -> None:
    draw = drawer(shop, only("sequence"))
    [found] = draw.batch(random.Random("x"), 1)
    possible = [
        document_sequence(
            shop.base,
            sequence_document(history[:end], history[end], SidSurface(), shop.base.style, history_weight=1.0),
        )
        for history in draw.histories
        for end in range(1, len(history))
    ]
    assert found in possible


def test_new_tokens_learn_first_and_alone(shop: Shop) -> None:
    """With no mid-training after it: the rows of SID tokens have moved, everything else is as the base has it."""
    first = NewTokens(steps=4, learning_rate=1e-2)
    config = Midtrain(steps=0, tokens_per_step=200, warmup_steps=0, new_tokens=first)

    bare = midtrain(Midtrain(steps=0), SMALL, shop.dataset, shop.sids, 1, info=RunInfo(seed=1))
    policy = midtrain(config, SMALL, shop.dataset, shop.sids, 1, info=RunInfo(seed=1))

    old = len(policy.text_tokenizer) - len(SidSurface().tokens((16, 16)))
    before, after = bare.model.state_dict(), policy.model.state_dict()
    for name, tensor in after.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(tensor[:old], before[name][:old])
            assert (tensor[old:] != before[name][old:]).any(1).float().mean() > 0.9
        else:
            assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in policy.model.parameters())


def test_new_tokens_are_taught_the_same_after_a_kill(shop: Shop, tmp_path: Path) -> None:
    config = Midtrain(steps=4, tokens_per_step=150, warmup_steps=0, checkpoint_every=2, new_tokens=NewTokens(steps=4))
    made = [
        midtrain(config, SMALL, shop.dataset, shop.sids, 1, info=RunInfo(seed=1, work=work)).model.state_dict()
        for work in (None, tmp_path, tmp_path)  # the third finds the checkpoints of the second
    ]

    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "new-tokens"}
    for other in made[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in made[0].items())

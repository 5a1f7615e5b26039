"""Our rewards called as TRL calls reward functions: by hand, and by TRL's own code where it is installed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from rerankkit import Failed, NotApplicable, Reward, load_plugins
from rerankkit.adapters import as_trl, from_trl, trl_rows
from rerankkit.errors import DataError, RunFailed
from rerankkit.testing import make_example, make_rollout
from rerankkit.types import RunInfo

EXAMPLES = [make_example(3), make_example(3), make_example(None), make_example(0)]
ROLLOUTS = [
    make_rollout(EXAMPLES[0], (3, 0, 1, 2, 4, 5, 6, 7, 8, 9)),
    make_rollout(EXAMPLES[1]),
    make_rollout(EXAMPLES[2]),
    make_rollout(EXAMPLES[3], text="I cannot say."),
]
COMPLETIONS = [[{"role": "assistant", "content": rollout.text}] for rollout in ROLLOUTS]


def ours(name: str) -> Any:
    spec = load_plugins(only="gr2").part("reward", name, "here")
    return spec.build(spec.config(), RunInfo())


def call(function: Any, completions: Any = COMPLETIONS, **more: Any) -> Any:
    rows = trl_rows(EXAMPLES)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    prompts = [row["prompt"] for row in rows]
    ids = [list(rollout.token_ids) for rollout in ROLLOUTS]
    return function(prompts=prompts, completions=completions, completion_ids=ids, **columns, **more)


@pytest.mark.parametrize("name", ["ndcg", "gr2", "format", "rank-promotion"])
def test_gives_what_the_reward_gives(name: str) -> None:
    expected = [outcome.value if isinstance(outcome, Reward) else None for outcome in ours(name)(ROLLOUTS)]

    assert call(as_trl(ours(name))) == expected
    assert call(as_trl(ours(name)), [rollout.text for rollout in ROLLOUTS]) == expected  # plain text, too


def test_rows_survive_a_data_set(tmp_path: Any) -> None:
    from datasets import Dataset

    rows = Dataset.from_list(trl_rows(EXAMPLES))

    assert [json.loads(row)["example_id"] for row in rows["rerank_example"]] == [e.example_id for e in EXAMPLES]
    values = as_trl(ours("ndcg"))(completions=COMPLETIONS, rerank_example=rows["rerank_example"])
    assert values == call(as_trl(ours("ndcg")))


def test_the_reward_is_told_groups_tokens_and_reasoning() -> None:
    seen: list[Any] = []

    def spy(rollouts: Any) -> Any:
        seen.extend(rollouts)
        return [Reward(0.0)] * len(rollouts)

    call(as_trl(spy))
    call(as_trl(spy, count_tokens=lambda text: 7))

    assert [rollout.group for rollout in seen[:4]] == [0, 0, 1, 2]
    assert seen[0].example == EXAMPLES[0] and seen[0].token_ids == ROLLOUTS[0].token_ids
    # 'Brand and kind fit best.' and the head are 41 of 540 characters: 60 tokens * 41 / 540 = 4.6
    text = ROLLOUTS[0].text
    assert seen[0].num_reasoning_tokens == round(60 * 41 / len(text)) and text[:41].endswith("best.")
    assert seen[4].num_reasoning_tokens == 7


def test_failures_and_parts_are_logged_and_none_is_returned() -> None:
    logged: dict[str, float] = {}

    def reward(rollouts: Any) -> Any:
        return [Reward(1.0, {"part": 2.0}), Reward(0.0, {"part": 4.0}), NotApplicable("none"), Failed("server")]

    assert call(as_trl(reward, name="mine"), log_metric=logged.__setitem__) == [1.0, 0.0, None, None]
    assert logged == {"rewards/mine/failed": 0.25, "rewards/mine/part": 3.0}
    assert as_trl(reward, name="mine").__name__ == "mine"
    with pytest.raises(RunFailed, match="judging failed for every completion; the first says: down"):
        call(as_trl(lambda rollouts: [Failed("down")] * len(rollouts)))


def test_a_data_set_without_the_column_is_named() -> None:
    with pytest.raises(
        DataError, match=r"ndcg: the data set has no column 'rerank_example'; make its rows with trl_rows"
    ):
        as_trl(ours("ndcg"), name="ndcg")(completions=COMPLETIONS)


def test_there_and_back_is_the_same() -> None:
    """Ours as TRL's as ours: the column travels under a name of its own."""
    function = as_trl(ours("ndcg"))
    rows = trl_rows(EXAMPLES)

    def theirs(completions: Any, completion_ids: Any, example_id: Any) -> Any:
        by_id = {example.example_id: row["rerank_example"] for example, row in zip(EXAMPLES, rows, strict=True)}
        return function(
            completions=completions, completion_ids=completion_ids, rerank_example=[by_id[one] for one in example_id]
        )

    values = [outcome.value for outcome in from_trl(theirs)(ROLLOUTS) if isinstance(outcome, Reward)]

    assert values == [outcome.value for outcome in ours("ndcg")(ROLLOUTS) if isinstance(outcome, Reward)]


def test_trl_itself_calls_it() -> None:
    """TRL's own method on a stub of its trainer: what it passes and what it makes of the result."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    torch = pytest.importorskip("torch")
    logged: dict[str, float] = {}
    pytest.importorskip("accelerate").PartialState()  # TRL's logger asks for one
    stub = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=False, gather=None),
        args=SimpleNamespace(report_to=[]),
        state=SimpleNamespace(global_step=0),
        environments=None,
        reward_funcs=[as_trl(ours("ndcg"), name="ndcg")],
        reward_func_names=["ndcg"],
        reward_processing_classes=[None],
        _log_completion_extra=None,
        _log_metric=logged.__setitem__,
    )
    rows = trl_rows(EXAMPLES)

    found = trainer._calculate_rewards(
        stub, rows, [row["prompt"] for row in rows], COMPLETIONS, [list(rollout.token_ids) for rollout in ROLLOUTS]
    )

    values = [outcome.value if isinstance(outcome, Reward) else float("nan") for outcome in ours("ndcg")(ROLLOUTS)]
    assert torch.allclose(found[:, 0], torch.tensor(values), equal_nan=True)
    assert logged["rewards/ndcg/failed"] == 0.0

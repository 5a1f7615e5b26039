"""Our rewards as TRL reward functions, and the data set that they need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rerankkit.adapters.columns import flat
from rerankkit.errors import DataError, RunFailed
from rerankkit.protocols import RewardFn
from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import HEAD, PromptStyle, rerank_messages
from rerankkit.types import Failed, Item, RerankExample, Reward, Rollout, SidSurface

COLUMN = "rerank_example"
"""The one column that `as_trl` reads: the example as JSON text, which every data set can hold."""


def trl_rows(
    examples: Iterable[RerankExample], surface: SidSurface | None = None, style: PromptStyle | None = None
) -> list[dict[str, Any]]:
    """Rows for a prompt-only data set: `prompt` (messages) and the column that `as_trl` reads.

    `datasets.Dataset.from_list(trl_rows(examples))` goes into a GRPOTrainer.
    """
    surface, style = surface or SidSurface(), style or PromptStyle()
    return [
        {"prompt": rerank_messages(example, surface, style), COLUMN: json.dumps(asdict(example))}
        for example in examples
    ]


def as_trl(
    reward: RewardFn,
    *,
    name: str = "",
    surface: SidSurface | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> Callable[..., list[float | None]]:
    """`reward` as TRL calls it: `function(prompts, completions, completion_ids, **columns) -> list[float | None]`.

    The data set's rows come from `trl_rows`. Not applicable and failed become None, which TRL leaves out; if every
    completion fails, RunFailed is raised. Parts of a reward, and the share that failed, go to TRL's log. `name` is what
    TRL logs it under. `count_tokens` counts the tokens of the reasoning, for rewards that look at its length; without
    it, they are taken as the reasoning's share of the text.
    """
    spelled, logged = surface or SidSurface(), name or getattr(reward, "__name__", type(reward).__name__)

    def function(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
    ) -> list[float | None]:
        if COLUMN not in columns:
            raise DataError(f"{logged}: the data set has no column {COLUMN!r}; make its rows with trl_rows.")
        examples = [_example(text) for text in columns[COLUMN]]
        groups = {example_id: n for n, example_id in enumerate(dict.fromkeys(one.example_id for one in examples))}
        rollouts = []
        for row, (completion, example) in enumerate(zip(completions, examples, strict=True)):
            text = flat(completion)
            answer = parse_answer(text, example, spelled)
            ids = tuple(completion_ids[row]) if completion_ids is not None else ()
            spoken = HEAD + answer.reasoning
            if count_tokens is not None:
                reasoning = min(len(ids), count_tokens(spoken))
            else:
                reasoning = round(len(ids) * min(1.0, len(spoken) / max(1, len(text))))
            rollouts.append(
                Rollout(
                    example=example,
                    text=text,
                    reasoning=answer.reasoning,
                    ranking=answer.ranking,
                    token_ids=ids,
                    num_reasoning_tokens=reasoning,
                    group=groups[example.example_id],
                )
            )
        outcomes = list(reward(rollouts))
        failures = [outcome.reason for outcome in outcomes if isinstance(outcome, Failed)]
        if failures and len(failures) == len(outcomes):
            raise RunFailed(f"{logged}: judging failed for every completion; the first says: {failures[0]}")
        if (log := columns.get("log_metric")) is not None and outcomes:
            log(f"rewards/{logged}/failed", len(failures) / len(outcomes))
            given = [outcome for outcome in outcomes if isinstance(outcome, Reward)]
            for part in sorted({part for outcome in given for part in outcome.parts}):
                values = [outcome.parts[part] for outcome in given if part in outcome.parts]
                log(f"rewards/{logged}/{part}", sum(values) / len(values))
        return [outcome.value if isinstance(outcome, Reward) else None for outcome in outcomes]

    function.__name__ = function.__qualname__ = logged
    return function


def _example(text: str) -> RerankExample:
    told = json.loads(text)
    history, candidates = ([_item(row) for row in told[key]] for key in ("history", "candidates"))
    return RerankExample(
        told["example_id"], told["user_id"], tuple(history), tuple(candidates), tuple(told["relevance"])
    )


def _item(row: dict[str, Any]) -> Item:
    return Item(**{**row, "categories": tuple(row["categories"]), "sid": tuple(row["sid"])})

"""Parts that are functions: settings from the signature, and what is called for one thing at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, ValidationError

from rerankkit import (
    Catalog,
    Failed,
    Item,
    NotApplicable,
    Outcome,
    PluginConfig,
    PluginError,
    Register,
    RerankExample,
    Reward,
    RewardFn,
    Rollout,
    RunInfo,
    StepReport,
    Trace,
    TraceFailure,
)
from rerankkit.functions import ByNames
from rerankkit.part_config import describe_settings
from rerankkit.testing import (
    check_reward,
    check_teacher,
    check_tokenizer,
    make_example,
    make_item,
    make_rollout,
    part_of,
)

if TYPE_CHECKING:
    from rerankkit.lm import Policy  # not there when the program runs: first arguments are not looked up


def early(
    rollout: Rollout, unread: Annotated[float, Field(le=0)] = -1.0, *, how: Literal["linear", "steep"] = "linear"
) -> float | Outcome:
    """1 / the place of the target.

    It is dense.

    Args:
        unread: value of an answer
            that cannot be read
        how: shape of the fall
    """
    target = rollout.example.target_index
    if target is None:
        return NotApplicable("no target")
    return 1 / (1 + rollout.ranking.order.index(target)) if not rollout.ranking.problem else unread


def by_brand(item: Item) -> list[str]:
    """Category, then brand."""
    return [*item.categories[:1], item.brand]


def as_given(example: RerankExample, info: RunInfo, refuse: bool = False) -> Trace | TraceFailure:
    """The order as given.

    refuse: say nothing at all
    """
    if refuse:
        return TraceFailure(example.example_id, "refused")
    return Trace(example.example_id, "As given.", tuple(range(len(example.candidates))))


def idle(
    policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo, steps: PositiveInt = 2
) -> Iterator[StepReport]:
    """Does nothing.

    steps: so often
    """
    for step in range(1, steps + 1):
        yield StepReport(step, {"seed": float(info.seed)})


def module(*add: Callable[[Register], None]) -> ModuleType:
    """A plugin's module."""
    made: Any = ModuleType("made")
    made.rerankkit_register = lambda register: [one(register) for one in add]
    return made  # type: ignore[no-any-return]


def reward_of(function: Any, **settings: Any) -> Any:
    return part_of(module(lambda register: register.rewards.add_function("mine", function)), **settings)


def tokenizer_of(function: Any, **settings: Any) -> Any:
    return part_of(module(lambda register: register.tokenizers.add_function("mine", function)), **settings)


def config_of(function: Any) -> type[PluginConfig]:
    register = Register()
    register.rewards.add_function("two-words", function)
    return register.rewards.parts["two-words"].config


# --- settings ------------------------------------------------------------------------------------------------------


def test_arguments_after_the_first_are_settings_and_the_docstring_tells_what_they_are() -> None:
    config = config_of(early)

    assert config.__name__ == "TwoWordsConfig"
    assert config.__doc__ == "1 / the place of the target.\n\nIt is dense."
    assert describe_settings(config) == [
        {
            "name": "unread",
            "type": "float",
            "default": "-1.0",
            "documentation": "value of an answer that cannot be read",
        },
        {
            "name": "how",
            "type": "Literal['linear', 'steep']",
            "default": '"linear"',
            "documentation": "shape of the fall",
        },
    ]


def test_settings_are_checked_like_any_others() -> None:
    config = config_of(early)

    assert config(unread=-2).model_dump() == {"unread": -2.0, "how": "linear"}  # type: ignore[call-arg]
    for wrong in ({"unread": 1.0}, {"unread": "low"}, {"unread": float("-inf")}, {"how": "flat"}, {"hwo": "linear"}):
        with pytest.raises(ValidationError):
            config.model_validate(wrong)


def test_a_setting_without_a_default_must_be_given() -> None:
    def at(rollout: Rollout, place: int) -> float:
        return float(place)

    assert describe_settings(config_of(at))[0]["default"] == "required"
    assert reward_of(at, place=3)([make_rollout(make_example())]) == [Reward(3.0)]


def test_a_description_in_the_annotation_counts_too() -> None:
    def at(rollout: Rollout, place: Annotated[int, Field(description="counted from 0")] = 1) -> float:
        return float(place)

    assert describe_settings(config_of(at))[0]["documentation"] == "counted from 0"


def test_types_are_those_of_the_module_that_wrote_the_function() -> None:
    source = "from __future__ import annotations\nfrom decimal import Decimal as Mine\ndef f(rollout, x: Mine = 1): ..."
    scope: dict[str, Any] = {"__name__": "elsewhere"}
    exec(source, scope)

    @wraps(scope["f"])
    def wrapped(*args: Any, **kwargs: Any) -> float:
        return float(scope["f"](*args, **kwargs))

    for function in (scope["f"], wrapped):
        assert config_of(function).model_fields["x"].annotation.__name__ == "Decimal"  # type: ignore[union-attr]


def no_arguments() -> float: ...  # type: ignore[empty-body]
def only_by_name(*, rollout: Rollout) -> float: ...  # type: ignore[empty-body]
def untyped(rollout, place=1): ...  # type: ignore[no-untyped-def]
def anything(rollout: Rollout, **rest: int) -> float: ...  # type: ignore[empty-body]
def reserved(rollout: Rollout, weight: float = 1.0) -> float: ...  # type: ignore[empty-body]
def forgotten(weight: float = 1.0) -> float: ...  # type: ignore[empty-body]
def field_as_default(rollout: Rollout, at: float = Field(1.0, ge=0)) -> float: ...  # type: ignore[empty-body]
def nowhere(rollout: Rollout, policy: Policy | None = None) -> float: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (no_arguments, r"mine: its first arguments must be rollout, without defaults, not \(\); those that follow"),
        (only_by_name, r"mine: its first arguments must be rollout, without defaults, not \(rollout\)"),
        (forgotten, r"mine: its first arguments must be rollout, without defaults, not \(weight\)"),
        (untyped, "mine: the setting 'place' has no type; write `place: float`"),
        (anything, r"mine: \*\*rest: .*int.* is no setting"),
        (reserved, "'mine': a block keeps 'weight' for itself"),
        (field_as_default, r"mine: the default of 'at' is pydantic's Field.*write `at: Annotated\[float, Field"),
        (nowhere, "mine: name 'Policy' is not defined.*import it where the program runs"),
    ],
)
def test_signatures_that_tell_no_settings_are_refused(function: Any, fault: str) -> None:
    with pytest.raises(PluginError, match=fault):
        reward_of(function)


def test_first_arguments_may_be_given_by_place_alone() -> None:
    def at(rollout: Rollout, /, place: int = 2) -> float:
        return float(place)

    assert reward_of(at, place=3)([make_rollout(make_example())]) == [Reward(3.0)]


def test_a_teacher_without_info_is_refused_before_a_setting_is_taken_for_it() -> None:
    def write(example: RerankExample, only_hits: bool = False) -> TraceFailure:
        return TraceFailure(example.example_id, "")

    with pytest.raises(PluginError, match=r"must be example, info, without defaults, not \(example, only_hits\)"):
        Register().teachers.add_function("mine", write)  # type: ignore[arg-type]


def test_a_tokenizer_cannot_have_a_second_setting_codes() -> None:
    def mine(item: Item, codes: int = 3) -> list[str]:
        return []

    with pytest.raises(PluginError, match="every such part has a setting 'codes' already; rename yours"):
        tokenizer_of(mine)


# --- rewards, teachers, optimizers ---------------------------------------------------------------------------------


def test_a_reward_keeps_its_contract_and_gets_its_settings() -> None:
    check_reward(reward_of(early))

    told = make_rollout(make_example(1), (0, 1, *range(2, 10)))
    unread, pointless = make_rollout(make_example(0), text="no idea"), make_rollout(make_example(None))

    assert reward_of(early, unread=-3.0)([told, unread, pointless]) == [
        Reward(0.5),
        Reward(-3.0),
        NotApplicable("no target"),
    ]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (1, Reward(1.0)),
        (True, Reward(1.0)),
        (np.float32(0.5), Reward(0.5)),
        (Reward(2.0, {"a": 1.0}), Reward(2.0, {"a": 1.0})),
        (Failed("away"), Failed("away")),
    ],
)
def test_a_number_is_a_reward_and_an_outcome_stays_what_it_is(answer: Any, outcome: Outcome) -> None:
    assert reward_of(lambda rollout: answer)([make_rollout(make_example())]) == [outcome]


def test_what_is_neither_is_refused_by_the_contract_under_the_name_of_the_part() -> None:
    with pytest.raises(AssertionError, match="mine: returned None; an outcome is Reward, NotApplicable or Failed"):
        check_reward(reward_of(lambda rollout: None))


def test_a_teacher_answers_one_example_at_a_time() -> None:
    plugin = module(lambda register: register.teachers.add_function("mine", as_given))
    check_teacher(part_of(plugin))
    asked: list[tuple[int | None, str]] = []

    def bar(examples: Any, total: int | None = None, what: str = "") -> Iterator[Any]:
        asked.append((total, what))
        return iter(examples)

    answers = part_of(plugin, refuse=True).write([make_example(0), make_example(1)], RunInfo(progress=bar))

    assert [next(answers), *answers] == [TraceFailure(f"user{i}/3", "refused") for i in range(2)]
    assert asked == [(2, "mine")]


def test_an_optimizer_is_a_generator_with_its_settings() -> None:
    optimizer = part_of(module(lambda register: register.optimizers.add_function("mine", idle)), steps=3)

    reports = optimizer.optimize(None, [], reward_of(early), RunInfo(seed=7))

    assert list(reports) == [StepReport(step, {"seed": 7.0}) for step in (1, 2, 3)]


# --- tokenizers ----------------------------------------------------------------------------------------------------


def shop(*items: tuple[str, str, str]) -> Catalog:
    """(id, category, brand) of each item."""
    made = tuple(replace(make_item(), item_id=i, categories=(c,), brand=b) for i, c, b in items)
    return Catalog(made, np.zeros((len(made), 2), dtype=np.float32), np.empty((0, 2), dtype=np.int64))


def test_a_tokenizer_keeps_its_contract() -> None:
    check_tokenizer(tokenizer_of(by_brand))


def test_names_take_the_next_code_below_those_before_and_items_the_next_number() -> None:
    tokenizer = tokenizer_of(by_brand, codes=8)
    old = shop(("a", "Care", "Norda"), ("b", "Care", "Velis"), ("c", "Home", "Velis"), ("d", "Care", "Velis"))

    tokenizer.fit(old)

    assert tokenizer.codebook_sizes == (8, 8, 8)
    assert tokenizer.encode(old).tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1]]
    # later: one more Velis of Care, and a brand that Care had not
    assert tokenizer.encode(shop(("f", "Care", "Amaro"), ("e", "Care", "Velis"))).tolist() == [[0, 2, 0], [0, 1, 2]]


def test_what_was_given_is_kept_on_the_disk(tmp_path: Path) -> None:
    first, second = tokenizer_of(by_brand, codes=8), tokenizer_of(by_brand)
    first.fit(shop(("a", "Care", "Norda"), ("b", "Care", "Velis")))
    first.save(tmp_path)

    second.load(tmp_path)

    assert second.codebook_sizes == (8, 8, 8)
    later = shop(("c", "Care", "Velis"), ("a", "Care", "Norda"))
    assert second.encode(later).tolist() == first.encode(later).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert [file.name for file in tmp_path.iterdir()] == ["names.json"]


def test_without_names_items_are_numbered() -> None:
    tokenizer = tokenizer_of(lambda item: [], codes=2)
    tokenizer.fit(shop(("a", "", ""), ("b", "", "")))

    assert tokenizer.codebook_sizes == (2,)
    with pytest.raises(ValueError, match=r"mine: 2 codes are too few at the first level; set tokenizer.codes higher"):
        tokenizer.encode(shop(("c", "", "")))


def test_where_codes_run_out_is_said_and_others_are_placed_still() -> None:
    tokenizer = tokenizer_of(by_brand, codes=2)
    tokenizer.fit(shop(("a", "Care", "Norda"), ("b", "Care", "Velis")))

    for _ in range(2):
        with pytest.raises(ValueError, match=r"2 codes are too few at Care; set tokenizer.codes higher"):
            tokenizer.encode(shop(("c", "Care", "Amaro")))
    assert tokenizer.encode(shop(("d", "Care", "Velis"))).tolist() == [[0, 1, 1]]


def test_each_item_has_as_many_names() -> None:
    tokenizer = tokenizer_of(lambda item: list(item.categories))
    with pytest.raises(ValueError, match="mine: 2 names for item0, and 1 for those before it; give as many for each"):
        tokenizer.fit(replace(shop(), items=(*shop(("a", "Care", "")).items, make_item())))


@pytest.mark.parametrize("names", ["Care", [7], [None], ["Care", 0.5]], ids=str)
def test_names_are_a_list_of_texts(names: Any) -> None:
    """A text is not taken for its letters, nor a number for a name: read again from JSON, it would be another one."""
    with pytest.raises(TypeError, match=r"mine: .* for a; give a list of texts, one a level"):
        tokenizer_of(lambda item: names).fit(shop(("a", "Care", "Norda")))


words = st.text(max_size=4)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=12), st.integers(0, 12))
def test_no_two_items_share_a_sid_whatever_they_are_called(names: list[tuple[str, str]], split: int) -> None:
    every = shop(*((f"item{i}", *pair) for i, pair in enumerate(names)))
    tokenizer = ByNames("mine", by_brand, {"codes": 64})

    tokenizer.fit(every)
    sids = [tuple(sid) for sid in tokenizer.encode(every).tolist()]

    assert len(set(sids)) == len(sids)
    again = ByNames("mine", by_brand, {"codes": 64})
    part = replace(every, items=every.items[:split])
    again.fit(part)
    assert [tuple(sid) for sid in again.encode(every).tolist()] == sids  # as they come, in one go or in two
    alike = {json.dumps(pair): sid[:2] for pair, sid in zip(names, sids, strict=True)}
    assert len(set(alike.values())) == len(alike)


# --- part_of -------------------------------------------------------------------------------------------------------


def test_a_part_is_found_by_name_and_kind() -> None:
    plugin = module(
        lambda register: register.rewards.add_function("mine", early),
        lambda register: register.teachers.add_function("mine", as_given),
    )

    assert part_of(plugin, "reward/mine")([make_rollout(make_example(None))]) == [NotApplicable("no target")]
    for name in ("", "mine", "other"):
        with pytest.raises(PluginError, match=f"made registers teacher/mine, reward/mine; say which, not '{name}'"):
            part_of(plugin, name)
    with pytest.raises(PluginError, match="made registers nothing"):
        part_of(module())

"""From prompts to structured rollouts, and where in them the reasoning ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankkit.errors import UsageError
from rerankkit.lm import Policy, Sample
from rerankkit.lm.ask import _boundary, as_rollout, ask, prompt_of, seed_of
from rerankkit.text.answers import RANKING_KEY
from rerankkit.text.prompts import HEAD, PromptStyle, answer_parts
from rerankkit.types import Item, Parse, RerankExample, RunInfo

from .conftest import make_policy

POLICY = make_policy(num_kv_heads=2)
POLICY.style = PromptStyle(fields=("title",), max_history=2, terse=True)


def item(n: int) -> Item:
    return Item(f"i{n}", "red soap", sid=(n % 4, n % 3, n % 5))


def example(name: str = "e1") -> RerankExample:
    return RerankExample(name, "u", (item(7), item(8)), (item(0), item(1), item(2)), (0.0, 1.0, 0.0))


def asked(examples: Sequence[RerankExample], **how: object) -> list[tuple[int, ...]]:
    settings = {"group_size": 2, "max_new_tokens": 60, "temperature": 1.0, "info": RunInfo(seed=3), **how}
    return [rollout.token_ids for rollout in ask(POLICY, examples, **settings)]  # type: ignore[arg-type]


def test_groups_come_one_after_another_and_are_numbered() -> None:
    rollouts = ask(
        POLICY,
        [example("a"), example("b")],
        group_size=3,
        max_new_tokens=60,
        temperature=1.0,
        info=RunInfo(seed=3),
        first_group=5,
    )
    assert [(r.example.example_id, r.group) for r in rollouts] == [("a", 5)] * 3 + [("b", 6)] * 3
    for rollout in rollouts:
        assert len(rollout.logps) == len(rollout.token_ids) and rollout.origin == "sample"
        assert rollout.ranking.parse is Parse.OK and sorted(rollout.ranking.order) == [0, 1, 2]


def test_what_is_sampled_depends_on_seed_salt_and_id_and_not_on_neighbours() -> None:
    alone = asked([example("a")])
    assert asked([example("b"), example("a")])[2:] == alone
    assert asked([example("c")]) != alone
    assert asked([example("a")], salt="step 2") != alone
    assert asked([example("a")], info=RunInfo(seed=4)) != alone
    assert alone[0] != alone[1]


def test_without_thinking_an_answer_begins_behind_an_empty_explanation() -> None:
    quiet = ask(
        POLICY, [example()], group_size=4, max_new_tokens=60, temperature=1.0, info=RunInfo(seed=3), think=False
    )
    empty = POLICY.encode(HEAD)
    for rollout in quiet:
        assert rollout.reasoning == "" and rollout.text.startswith(
            '{"explanation": "", "recommendations": ["<|sid_begin|>'
        )
        assert rollout.num_reasoning_tokens == len(empty)
        # all of it is forced: nothing that a policy could be praised or blamed for
        first = next(i for i, ids in enumerate(rollout.allowed_ids) if ids is None or len(ids) > 1)
        assert POLICY.decode(rollout.token_ids[:first]).endswith("<|sid_begin|>")
        assert sum(rollout.logps[:first]) == 0.0
    assert len({rollout.ranking.order for rollout in quiet}) > 1


def test_a_policy_that_learnt_no_reasoning_gives_none_and_says_so_when_it_is_loaded(tmp_path: Path) -> None:
    policy = make_policy(num_kv_heads=2)
    policy.thinks = False
    policy.save(tmp_path)
    loaded = Policy.load(tmp_path)
    assert loaded.thinks is False
    asking = {"group_size": 1, "max_new_tokens": 60, "temperature": 0.0, "info": RunInfo(seed=3)}
    assert ask(loaded, [example()], **asking)[0].reasoning == ""  # type: ignore[arg-type]
    assert ask(loaded, [example()], think=True, **asking)[0].reasoning != ""  # type: ignore[arg-type]
    (tmp_path / "rerankkit.json").write_text(
        (tmp_path / "rerankkit.json").read_text().replace('"thinks": false', '"x": 1')
    )
    assert Policy.load(tmp_path).thinks  # as all did before there was a choice


def test_an_empty_explanation_without_the_mask_is_refused() -> None:
    with pytest.raises(UsageError, match="think = false needs constrain = true"):
        asked([example()], constrain=False, think=False)


def test_shuffled_prompts_change_what_is_read_and_not_what_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    prompt_ids = POLICY.prompt_ids

    def reading(messages: Sequence[Mapping[str, object]]) -> list[int]:
        lines = str(messages[1]["content"]).splitlines()
        sids = {POLICY.surface.text(c.sid): i for i, c in enumerate(example().candidates)}
        candidates = lines[lines.index("Candidates:") + 1 : -1]
        read.append([sids[line.split(" ")[0]] for line in candidates])
        return prompt_ids(messages)

    monkeypatch.setattr(POLICY, "prompt_ids", reading)
    plan: dict[str, Any] = {"group_size": 2, "max_new_tokens": 60, "temperature": 1.0, "shuffle": True}
    examples = [example(name) for name in "abcdef"]
    rollouts = ask(POLICY, examples, info=RunInfo(seed=3), salt="step 1", **plan)
    assert [list(rollout.shown) for rollout in rollouts[::2]] == read and rollouts[0].shown == rollouts[1].shown
    assert len({rollout.shown for rollout in rollouts}) > 2
    for rollout in rollouts:  # the example is the one that was given, and the ranking speaks of its places
        assert rollout.example == example(rollout.example.example_id)
        listed = POLICY.surface.find(rollout.text)[-3:]
        assert [rollout.example.candidates[i].sid for i in rollout.ranking.order] == listed
        assert prompt_of(POLICY, rollout.example, rollout.shown) == prompt_of(
            POLICY, rollout.example.in_order(rollout.shown)
        )
    again = ask(POLICY, examples[::-1], info=RunInfo(seed=3), salt="step 1", **plan)
    assert {r.example.example_id: r.shown for r in again} == {r.example.example_id: r.shown for r in rollouts}
    other = ask(POLICY, examples, info=RunInfo(seed=3), salt="step 2", **plan)
    assert [r.shown for r in other] != [r.shown for r in rollouts]


def test_an_example_in_another_order() -> None:
    turned = example().in_order((1, 2, 0))
    assert [candidate.item_id for candidate in turned.candidates] == ["i1", "i2", "i0"]
    assert turned.relevance == (1.0, 0.0, 0.0) and turned.target_index == 0 and turned.history == example().history


def test_greedy_answers_are_all_alike() -> None:
    assert len(set(asked([example("a"), example("a")], temperature=0.0))) == 1


def test_seeds_are_told_apart_by_every_part_and_by_where_parts_end() -> None:
    keys = [(1, "step 1", "e"), (2, "step 1", "e"), (1, "step 11", "e"), (1, "step 1", "1e"), (1, "step ", "11e")]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    # The same on every machine and in every version of Python: a change would change every run.
    assert seed_of(0, "step 1", "user0/3") == 8971109579600910066


def sample(text: str) -> Sample:
    ids = tuple(POLICY.encode(text))
    return Sample(ids, (0.0,) * len(ids), False)


def whole(reasoning: str) -> tuple[str, str]:
    return answer_parts(reasoning, (1, 0, 2), example(), POLICY.surface)


def test_the_reasoning_ends_where_the_ranking_key_begins() -> None:
    first, second = whole("soap for hair")
    rollout = as_rollout(POLICY, example(), sample(first + second), 4)

    before = POLICY.decode(rollout.token_ids[: rollout.num_reasoning_tokens])
    after = POLICY.decode(rollout.token_ids[rollout.num_reasoning_tokens :])
    assert RANKING_KEY not in before and RANKING_KEY in after
    assert before.startswith(first) and set(before.removeprefix(first)) <= set('", ')
    assert (rollout.reasoning, rollout.ranking.order, rollout.group) == ("soap for hair", (1, 0, 2), 4)
    # one token later the key would no longer be whole
    assert RANKING_KEY not in POLICY.decode(rollout.token_ids[rollout.num_reasoning_tokens + 1 :])


def test_without_a_ranking_key_everything_is_reasoning() -> None:
    rollout = as_rollout(POLICY, example(), replace(sample('{"explanation": "soap'), truncated=True), 0)
    assert rollout.num_reasoning_tokens == len(rollout.token_ids) and rollout.truncated
    assert rollout.ranking.parse is Parse.FAILED
    assert as_rollout(POLICY, example(), Sample((), (), True), 0).num_reasoning_tokens == 0


def test_the_last_key_counts_as_it_does_for_the_parser() -> None:
    text = f"{{{RANKING_KEY}: [], soap {RANKING_KEY}: []"
    ids = POLICY.encode(text)
    place = _boundary(POLICY, ids)
    assert POLICY.decode(ids[place:]).count(RANKING_KEY) == 1
    assert POLICY.decode(ids[:place]).count(RANKING_KEY) == 1


pieces = st.lists(
    st.sampled_from(['"recommendations"', '"', "recommend", "ations", "soap", " ", "é", "日", '", ', "<s_a_1>", "\n"]),
    max_size=12,
)


@settings(deadline=None, max_examples=150)
@given(pieces.map("".join))
def test_the_boundary_is_the_token_in_which_the_last_key_begins(text: str) -> None:
    ids = POLICY.encode(text)
    place = _boundary(POLICY, ids)
    # by hand: the longest beginning after which a whole key is still to come
    expected = max((n for n in range(len(ids)) if RANKING_KEY in POLICY.decode(ids[n:])), default=len(ids))
    assert place == expected


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_make_no_sense_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="group_size"):
        asked([example()], group_size=size)

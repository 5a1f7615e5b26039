"""The pytest classes, run as an author would run them: in a file of their own, by pytest itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from rerankkit import Outcome, Reward, Rollout, RunInfo, load_plugins
from rerankkit.testing import RewardContract, TeacherContract, TokenizerContract
from rerankkit.testing.rules import CONTRACT_VERSION, RULES, RewardTrial, judge, order_independent

pytest_plugins = ("pytester",)


def part(kind: str, name: str, **settings: object):  # type: ignore[no-untyped-def]
    spec = load_plugins().part(kind, name, "here")
    return spec.build(spec.config(**settings), RunInfo())


class TestNdcg(RewardContract):
    part = part("reward", "ndcg")


class TestResidualKMeans(TokenizerContract):
    part = part("tokenizer", "residual-kmeans", levels=2, codes=8)


class TestRejection(TeacherContract):
    part = part("teacher", "rejection")


class TestTargeted(TeacherContract):
    part = part("teacher", "targeted")


HEAD = """
from rerankkit import Reward
from rerankkit.testing import RewardContract

def place(rollout):
    target = rollout.example.target_index
    return -1.0 if rollout.ranking.parse == "failed" or target is None else -float(rollout.ranking.order.index(target))

def by_row(rollouts):
    return [Reward(place(rollout) + 0.001 * row) for row, rollout in enumerate(rollouts)]

def honest(rollouts):
    return [Reward(place(rollout)) for rollout in rollouts]
"""


def outcomes(pytester: pytest.Pytester, body: str) -> pytest.RunResult:
    pytester.makepyfile(HEAD + body)
    return pytester.runpytest_subprocess("-q", "-rsxf", "-p", "no:cacheprovider")


def test_every_rule_is_a_test_and_a_broken_one_is_named(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, "class TestMine(RewardContract):\n    part = by_row\n")

    found.assert_outcomes(passed=3, failed=2)
    found.stdout.fnmatch_lines(
        ["*AssertionError: by_row: the outcomes depend on row order*", "FAILED*test_contract?order_independent?*"]
    )


def test_a_declared_failure_is_expected_and_fails_once_it_holds(pytester: pytest.Pytester) -> None:
    declared = '    known_failures = {"order_independent": "sums are by row"}\n'
    both = declared.replace("}", ', "own_group": "sums are by row"}')
    body = f"class TestA(RewardContract):\n    part = by_row\n{both}"
    body += f"class TestB(RewardContract):\n    part = honest\n{declared}"

    found = outcomes(pytester, body)

    found.assert_outcomes(passed=7, xfailed=2, failed=1)
    found.stdout.fnmatch_lines(["*known failure (sums are by row) and holds; undeclare it*", "XFAIL*sums are by row*"])


def test_a_declared_failure_that_is_no_rule_is_refused(pytester: pytest.Pytester) -> None:
    found = outcomes(
        pytester, 'class TestA(RewardContract):\n    part = honest\n    known_failures = {"order_independant": "x"}\n'
    )

    found.assert_outcomes(errors=1)
    found.stdout.fnmatch_lines(
        ["*no rule for a reward is named 'order_independant'*Did you mean 'order_independent'?*"]
    )


def test_a_class_without_a_part_says_so(pytester: pytest.Pytester) -> None:
    found = outcomes(pytester, "class TestA(RewardContract):\n    pass\n")

    found.stdout.fnmatch_lines(["*TestA says nothing of what to try: give it `part = ...`*"])


def test_what_a_part_raises_is_a_broken_rule_with_its_place() -> None:
    def raising(rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [Reward(1.0 / rollout.example.relevance[20]) for rollout in rollouts]

    verdict = judge(order_independent, RewardTrial(raising))

    assert verdict.state == "broken"
    assert "raising: raised IndexError: tuple index out of range for gold; say Failed" in verdict.note
    assert "(test_contracts.py:" in verdict.note


def test_rules_are_documented_named_once_and_the_version_moves_with_them() -> None:
    names = {kind: [rule.__name__ for rule in rules] for kind, rules in RULES.items()}

    assert all(rule.__doc__ for rules in RULES.values() for rule in rules)
    assert all(len(set(those)) == len(those) for those in names.values())
    # Changing these lists means a new CONTRACT_VERSION and a line in docs/compatibility.md.
    assert CONTRACT_VERSION == 1
    assert names == {
        "tokenizer": [
            "codes_in_range", "same_sids_again", "any_company", "no_pickles", "survives_saving",
            "leaves_the_catalogue", "new_items", "reconstruction", "own_facts",
        ],
        "teacher": [
            "typed_answers", "answers_each_once", "reasons_for_failures", "complete_orders", "told_in_words",
            "asked_alone",
        ],
        "reward": ["typed_outcomes", "same_again", "order_independent", "own_group", "prefers_the_best"],
        "optimizer": [
            "steps_count_up", "aligned_reports", "metrics_are_numbers", "finite_weights", "changes_the_policy",
            "continues_where_it_stopped",
        ],
    }  # fmt: skip


def test_a_teacher_that_draws_by_place_in_the_batch_is_found() -> None:
    from rerankkit.testing import check_teacher
    from rerankkit.types import Trace

    class ByPlace:
        def write(self, examples, info):  # type: ignore[no-untyped-def]
            dice = random.Random(info.seed)
            for example in examples:
                yield Trace(example.example_id, f"I drew {dice.random()}", tuple(range(len(example.candidates))))

    with pytest.raises(AssertionError, match=r"ByPlace: asked alone, .* got another answer"):
        check_teacher(ByPlace())

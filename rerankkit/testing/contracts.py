"""The contracts as pytest classes: subclass one, say which part, and every rule is a test.

    from rerankkit.testing import RewardContract

    class TestBrevity(RewardContract):
        part = Brevity(limit=200)
        known_failures = {"prefers_the_best": "length has nothing to do with the order"}

A declared failure is reported as expected (xfail); once the rule holds, the test fails until the declaration is gone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer
from rerankkit.testing.rules import (
    RULES,
    OptimizerTrial,
    RewardTrial,
    Rule,
    TeacherTrial,
    TokenizerTrial,
    check_known,
    judge,
)


class _Contract:
    kind: ClassVar[str]
    known_failures: ClassVar[Mapping[str, str]] = {}
    """Rule -> why it cannot be kept."""
    _trial: Any = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "kind"):
            check_known(cls.kind, cls.known_failures)

    @classmethod
    def trial(cls) -> Any:
        """The part and what it is tried on; made once for all rules."""
        raise NotImplementedError

    @classmethod
    def _own_part(cls) -> Any:
        # Looked up on the class: a function would turn into a method of an instance. A copy: a trial may change it.
        if "part" not in {name for owner in cls.__mro__ for name in vars(owner)}:
            raise AttributeError(f"{cls.__name__} says nothing of what to try: give it `part = ...`")
        return copy.deepcopy(cls.part)  # type: ignore[attr-defined]

    def _check(self, rule: Rule) -> None:
        cls = type(self)
        if "_trial" not in vars(cls):
            cls._trial = cls.trial()
        verdict = judge(rule, cls._trial, cls.known_failures)
        match verdict.state:
            case "not tried":
                pytest.skip(verdict.note)
            case "known":
                pytest.xfail(verdict.note)
            case "mended":
                pytest.fail(verdict.note, pytrace=False)
            case "broken":
                raise AssertionError(verdict.note) from verdict.error


def _each_rule(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rule", RULES[kind], ids=lambda rule: rule.__name__)


class RewardContract(_Contract):
    """`part` is a reward; made rollouts are what it is tried on."""

    kind = "reward"
    part: ClassVar[RewardFn]

    @classmethod
    def trial(cls) -> RewardTrial:
        """Override to try it on rollouts of your own."""
        return RewardTrial(cls._own_part())

    @_each_rule("reward")
    def test_contract(self, rule: Rule) -> None:
        """Each rule is a test."""
        self._check(rule)


class TokenizerContract(_Contract):
    """`part` is a tokenizer that is not fitted yet."""

    kind = "tokenizer"
    part: ClassVar[Tokenizer]
    places_new_items: ClassVar[bool] = True
    """False for one that raises when it meets an item it was not fitted on."""

    @classmethod
    def trial(cls) -> TokenizerTrial:
        """Override to fit it on a catalogue of your own."""
        return TokenizerTrial(cls._own_part(), places_new_items=cls.places_new_items)

    @_each_rule("tokenizer")
    def test_contract(self, rule: Rule) -> None:
        """Each rule is a test."""
        self._check(rule)


class TeacherContract(_Contract):
    """`part` is a teacher."""

    kind = "teacher"
    part: ClassVar[Teacher]

    @classmethod
    def trial(cls) -> TeacherTrial:
        """Override to ask it examples of your own."""
        return TeacherTrial(cls._own_part())

    @_each_rule("teacher")
    def test_contract(self, rule: Rule) -> None:
        """Each rule is a test."""
        self._check(rule)


class OptimizerContract(_Contract):
    """`part` is an optimizer, built small: three steps, a few short answers. Imports torch."""

    kind = "optimizer"
    part: ClassVar[PolicyOptimizer]

    @classmethod
    def trial(cls) -> OptimizerTrial:
        """Override to give it another reward."""
        return OptimizerTrial(cls._own_part())

    @_each_rule("optimizer")
    def test_contract(self, rule: Rule) -> None:
        """Each rule is a test."""
        self._check(rule)

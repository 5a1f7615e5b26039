"""For plugin authors: made records to try a part on, and the contracts of `rerankkit.protocols` as plain checks.

    from rerankkit.testing import check_reward, make_example, make_rollout

    def test_keeps_the_contract() -> None:
        check_reward(Brevity(limit=200), judges_order=False)

A check returns nothing, or raises AssertionError with a message that names the fault. `RewardContract` and its sisters
are the same rules as pytest classes, a test a rule. Either says that the contract is kept on made records, not that
the part is any good. `check_imports` looks at a package. `rerankkit.testing.zoo` has policies that cheat, and
`audit_reward` plays them; `rerankkit.testing.strategies` has hypothesis strategies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rerankkit.testing.packages import check_imports
from rerankkit.testing.records import (
    make_catalog,
    make_example,
    make_item,
    make_policy,
    make_rollout,
    make_world,
)
from rerankkit.testing.registered import part_of
from rerankkit.testing.rules import CONTRACT_VERSION, check_optimizer, check_reward, check_teacher, check_tokenizer
from rerankkit.testing.zoo import audit_reward

if TYPE_CHECKING:
    from rerankkit.testing.contracts import OptimizerContract, RewardContract, TeacherContract, TokenizerContract

__all__ = [
    "CONTRACT_VERSION",
    "OptimizerContract",
    "RewardContract",
    "TeacherContract",
    "TokenizerContract",
    "audit_reward",
    "check_imports",
    "check_optimizer",
    "check_reward",
    "check_teacher",
    "check_tokenizer",
    "make_catalog",
    "make_example",
    "make_item",
    "make_policy",
    "make_rollout",
    "make_world",
    "part_of",
]


def __getattr__(name: str) -> Any:
    # The classes need pytest, which nobody but tests has.
    if not name.endswith("Contract"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rerankkit.testing import contracts

    return getattr(contracts, name)

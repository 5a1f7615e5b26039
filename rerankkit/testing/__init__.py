"""For plugin authors: made records to try a part on, and the contracts of `rerankkit.protocols` as plain checks.

    from rerankkit.testing import check_reward, make_example, make_rollout

    def test_keeps_the_contract() -> None:
        check_reward(Brevity(limit=200), judges_order=False)

A check returns nothing, or raises AssertionError with a message that names the fault. It says that the contract is
kept on made records, not that the part is any good.
"""

from __future__ import annotations

from rerankkit.testing.checks import check_optimizer, check_reward, check_teacher, check_tokenizer
from rerankkit.testing.records import make_catalog, make_example, make_item, make_policy, make_rollout
from rerankkit.testing.zoo import audit_reward

__all__ = [
    "audit_reward",
    "check_optimizer",
    "check_reward",
    "check_teacher",
    "check_tokenizer",
    "make_catalog",
    "make_example",
    "make_item",
    "make_policy",
    "make_rollout",
]

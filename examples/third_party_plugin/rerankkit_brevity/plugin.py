"""The reward, and the hook that offers it. Loaded for every `rerankkit` command: heavy imports belong into functions."""

from __future__ import annotations

from pydantic import PositiveInt
from rerankkit import Register, Rollout, hookimpl


def brevity(rollout: Rollout, limit: PositiveInt = 200) -> float:
    """1 for a short completion, falling to 0 for one that is twice too long.

    limit: Completion length, in tokens, above which the reward falls.
    """
    return min(1.0, max(0.0, 2 - len(rollout.token_ids) / limit))


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer the reward under the name that configs use."""
    register.rewards.add_function("brevity", brevity)

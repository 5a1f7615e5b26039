"""Tells rerankkit about the reward. Loaded for every `rerankkit` command, so nothing heavy is imported here."""

from __future__ import annotations

from pydantic import PositiveInt
from rerankkit import PluginConfig, Register, RewardFn, RunInfo, hookimpl


class BrevityConfig(PluginConfig):
    """1 for a short completion, falling to 0 for one that is twice too long."""

    limit: PositiveInt = 200
    """Completion length, in tokens, above which the reward falls."""


def build(config: BrevityConfig, info: RunInfo) -> RewardFn:
    """`brevity`"""
    from rerankkit_brevity.brevity import Brevity  # imported only when a run has chosen it

    return Brevity(config.limit)


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer the reward under the name that configs use."""
    register.rewards.add("brevity", BrevityConfig, build)

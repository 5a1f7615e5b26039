"""MiniOneRec's parts (arXiv 2510.24431): settings, and how each is made from them; torch is imported when it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from rerankkit import PluginConfig, PolicyOptimizer, Register, RewardFn, RunInfo, hookimpl


class RankAwareConfig(PluginConfig):
    """1 for the beam that is the target; below 0 for the others of its search, the more the higher they stand."""

    hit: NonNegativeFloat = 1.0
    """Weight of the exact hit."""
    penalty: NonNegativeFloat = 1.0
    """Weight of the penalty; it is for misses of a search that also found the target."""


class BeamGroupsConfig(PluginConfig):
    """GRPO whose groups are the beams of one constrained search for the item that goes first."""

    steps: PositiveInt = 40
    """Batches of searches."""
    prompts_per_step: PositiveInt = 8
    """Prompts in a batch, each searched once."""
    num_beams: PositiveInt = Field(default=8, ge=2)
    """Beams of a search, the size of a group; fewer where fewer items are to be had."""
    beams_over: Literal["candidates", "catalogue"] = "candidates"
    """What can be found: the items of the list, or all items that training lists and their histories hold (not by
    policies whose answers cite places)."""
    think: bool = True
    """Search after a rationale that the policy has sampled, as its answers begin; off: at once, as MiniOneRec does."""
    learning_rate: PositiveFloat = 1e-5
    """Of AdamW, constant."""
    clip: PositiveFloat = 0.2
    """The ratio is clipped to 1 - clip and 1 + clip."""
    kl: NonNegativeFloat = 0.001
    """Weight of the distance to the policy that RL started from, of which a copy is kept; 0 keeps none."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps on each batch, each on its share of the prompts; beyond 1 the clip starts to matter."""
    max_grad_norm: PositiveFloat = 1.0
    """Longer gradients are scaled down to this length."""
    temperature: PositiveFloat = 1.0
    """Of the rationale. The search itself draws nothing."""
    max_new_tokens: PositiveInt = 128
    """Longest rationale, with the few tokens of JSON around it."""
    checkpoint_every: PositiveInt = 10
    """Steps between checkpoints."""


def rank_aware(config: RankAwareConfig, info: RunInfo) -> RewardFn:
    """`rank-aware`"""
    from rerankkit_minionerec.reward import RankAware

    return RankAware(config.hit, config.penalty)


def beam_groups(config: BeamGroupsConfig, info: RunInfo) -> PolicyOptimizer:
    """`minionerec`"""
    from rerankkit_minionerec.optimizer import BeamGroups

    return BeamGroups(config)


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer both under the names that configs use."""
    register.rewards.add("rank-aware", RankAwareConfig, rank_aware)
    register.optimizers.add("minionerec", BeamGroupsConfig, beam_groups)

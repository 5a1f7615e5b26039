"""Settings, and how each part is made from them; what is heavy is imported when it happens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from rerankkit import PluginConfig, PolicyOptimizer, RewardFn, RunInfo, Teacher


class TemplateConfig(PluginConfig):
    """The rationale that is published for Amazon: one sentence that names the target's category path."""


class SelfRationaleConfig(PluginConfig):
    """The aligned policy itself is told the target, and asked why it fits; kept with the full history."""

    preset: Literal["paper", "release"] = "paper"
    """`paper`: one rationale a list, kept as it is. `release`: two, kept only if the target is among the best five that
    follow it (in the published code; the paper does not say so). Settings given beside it count more."""
    policy: str
    """Folder of the aligned policy: `RUN/stages/3-midtrain` of this run (or of another)."""
    top_k: PositiveInt = 10
    """Items of the history that are shown: the nearest to the target, by the words about them."""
    samples: PositiveInt = 1
    """Rationales that are tried for a list."""
    beams: NonNegativeInt = 0
    """The hit filter: the target must be among so many candidates, ranked after the rationale; 0 is no filter."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature."""
    max_new_tokens: PositiveInt = 160
    """Longest rationale, with the few tokens of JSON around it."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        release = {"samples": 2, "beams": 5}
        return {**release, **given} if isinstance(given, dict) and given.get("preset") == "release" else given


class RolloutBeamConfig(PluginConfig):
    """For the best of the first K items of an answer: how many codes of the target's SID it has, 0 to L."""

    beams: PositiveInt = 1
    """K. The paper's 32 are beams of a whole catalogue (`beams_over`). Of a list of ten, ten always hold the target and
    the reward is flat: take 1 to 4."""
    match: Literal["positional", "prefix"] = "positional"
    """`positional`, the paper's: every code in its place counts. `prefix`: only those before the first that differs."""


class OptimizerConfig(PluginConfig):
    """GRPO on rationales alone. After each sampled rationale the items are ranked by beams, which the reward judges."""

    preset: Literal["paper"] = "paper"
    """The paper's: 16 rationales, clip 0.2, KL 0.001, learning rate 1e-5. The published code has no RL to be had."""
    steps: PositiveInt = 40
    """Batches of rollouts. (The paper goes twice over its data.)"""
    prompts_per_step: PositiveInt = 8
    """Prompts in a batch."""
    group_size: PositiveInt = Field(default=16, ge=2)
    """Rationales of each prompt (G)."""
    beams_over: Literal["candidates", "catalogue"] = "candidates"
    """`candidates`: the list's own items, all of them ranked, so that any reward of an order will do. `catalogue`: the
    likeliest of all items that training lists and their histories hold, as in the paper; for `rollout-beam` alone, and
    not for policies whose answers cite places."""
    num_beams: PositiveInt = 32
    """Of `catalogue`: beams that are kept at each level."""
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
    """Sampling temperature; the loss is computed at the same one."""
    max_new_tokens: PositiveInt = 128
    """Longest rationale, with the few tokens of JSON around it."""
    checkpoint_every: PositiveInt = 10
    """Steps between checkpoints."""


def template(config: TemplateConfig, info: RunInfo) -> Teacher:
    """`onerec-think-template`"""
    from rerankkit_onerec_think.teachers import Template

    return Template()


def self_rationale(config: SelfRationaleConfig, info: RunInfo) -> Teacher:
    """`onerec-think-self`"""
    from rerankkit_onerec_think.teachers import SelfRationale

    return SelfRationale(config)


def rollout_beam(config: RolloutBeamConfig, info: RunInfo) -> RewardFn:
    """`rollout-beam`"""
    from rerankkit_onerec_think.reward import RolloutBeam

    return RolloutBeam(config.beams, config.match, info.surface)


def optimizer(config: OptimizerConfig, info: RunInfo) -> PolicyOptimizer:
    """`onerec-think`"""
    from rerankkit_onerec_think.optimizer import RationaleOptimizer

    return RationaleOptimizer(config)

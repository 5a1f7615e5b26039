"""TRL's GRPOTrainer as an optimizer: its settings, and how it is made. TRL is imported when a run has chosen it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from rerankkit import PluginConfig, PolicyOptimizer, Register, RunInfo, hookimpl


class TrlConfig(PluginConfig):
    """TRL's GRPOTrainer on rerankkit's rollouts and rewards. Fields of TRL that are not here have a fixed value."""

    steps: PositiveInt = 40
    """Batches of rollouts."""
    prompts_per_step: PositiveInt = 8
    """Prompts in a batch."""
    group_size: PositiveInt = Field(default=8, ge=2)
    """Rollouts of each prompt; TRL's num_generations."""
    groups_per_pass: PositiveInt = 1
    """Groups in one forward and backward pass; a divisor of prompts_per_step. TRL pads them and repeats the prompt."""
    num_iterations: PositiveInt = 1
    """Optimizer steps on each batch; beyond 1 the clips start to matter."""
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] = "dapo"
    """What the sum over tokens is divided by (`dapo` is no more than that in TRL), or CISPO's loss."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group, of the batch, or nothing."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """One ratio a token, or one a completion (GSPO)."""
    epsilon: NonNegativeFloat = 0.2
    """The ratio is clipped below at 1 - epsilon."""
    epsilon_high: NonNegativeFloat = 0.28
    """The ratio is clipped above at 1 + epsilon_high; under `cispo` at epsilon_high itself."""
    beta: NonNegativeFloat = 0.0
    """Weight of the distance to the policy that RL started from, of which a copy is kept; 0 keeps none."""
    mask_truncated_completions: bool = True
    """Leave completions that the limit has cut out of the loss."""
    learning_rate: PositiveFloat = 1e-4
    """Of AdamW, constant."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, decoupled from the gradient."""
    max_grad_norm: PositiveFloat = 1.0
    """Longer gradients are scaled down to this length."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss is computed at the same one."""
    max_new_tokens: PositiveInt = 256
    """Longest completion."""
    constrain: bool = True
    """Decode answers under the permutation mask. TRL knows of no mask: what was forced leaves its loss, and where there
    was a choice it trains probabilities within the whole vocabulary."""
    checkpoint_every: PositiveInt = 10
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.prompts_per_step % self.groups_per_pass:
            raise ValueError(f"groups_per_pass is {self.groups_per_pass}, no divisor of prompts_per_step")
        return self


def build(config: TrlConfig, info: RunInfo) -> PolicyOptimizer:
    """`trl`"""
    from rerankkit_trl.optimizer import TrlOptimizer

    return TrlOptimizer(config)


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer the optimizer under the name that configs use."""
    register.optimizers.add("trl", TrlConfig, build)

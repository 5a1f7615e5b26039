"""How each of GR2's parts is made from its settings; what is heavy is imported when it happens."""

from __future__ import annotations

from dataclasses import fields

from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer
from rerankkit.types import RunInfo
from rerankkit_gr2 import settings as s


def rqvae(config: s.RqVaeConfig, info: RunInfo) -> Tokenizer:
    """`rqvae`"""
    from rerankkit_gr2.tokenizer import RqVae

    return RqVae(seed=info.seed, bar=info.progress, **config.model_dump())


def residual_kmeans(config: s.ResidualKMeansConfig, info: RunInfo) -> Tokenizer:
    """`residual-kmeans`"""
    from rerankkit_gr2.tokenizer import ResidualKMeans

    return ResidualKMeans(seed=info.seed, **config.model_dump())


def rejection(config: s.RejectionConfig, info: RunInfo) -> Teacher:
    """`rejection`"""
    from rerankkit_gr2.teacher import RejectionSampling

    return RejectionSampling(
        _backend(config.backend), config.samples, config.temperature, _style(config), config.accept
    )


def targeted(config: s.TargetedConfig, info: RunInfo) -> Teacher:
    """`targeted`"""
    from rerankkit_gr2.teacher import Targeted

    return Targeted(_backend(config.backend), config.temperature, _style(config))


def conditional(config: s.RewardConfig, info: RunInfo) -> RewardFn:
    """`gr2`"""
    from rerankkit_gr2.rewards import gr2

    return gr2(config.format_weight, config.unparsable)


def unconditional(config: s.UnconditionalConfig, info: RunInfo) -> RewardFn:
    """`gr2-unconditional`"""
    from rerankkit_gr2.rewards import gr2_unconditional

    return gr2_unconditional(config.format_weight, config.unparsable)


def rank_promotion(config: s.RankPromotionConfig, info: RunInfo) -> RewardFn:
    """`rank-promotion`"""
    from rerankkit_gr2.rewards import RankPromotion

    return RankPromotion(config.unparsable)


def format_only(config: s.FormatConfig, info: RunInfo) -> RewardFn:
    """`format`"""
    from rerankkit_gr2.rewards import Format

    return Format()


def ndcg(config: s.NdcgConfig, info: RunInfo) -> RewardFn:
    """`ndcg`"""
    from rerankkit_gr2.rewards import Ndcg

    return Ndcg(config.k)


def reciprocal_rank(config: s.ReciprocalRankConfig, info: RunInfo) -> RewardFn:
    """`reciprocal-rank`"""
    from rerankkit_gr2.rewards import ReciprocalRank

    return ReciprocalRank()


def auc(config: s.AucConfig, info: RunInfo) -> RewardFn:
    """`auc`"""
    from rerankkit_gr2.rewards import Auc

    return Auc()


def exact_first(config: s.ExactFirstConfig, info: RunInfo) -> RewardFn:
    """`exact-first`"""
    from rerankkit_gr2.rewards import ExactFirst

    return ExactFirst()


def target_logp(config: s.TargetLogpConfig, info: RunInfo) -> RewardFn:
    """`target-logp`"""
    from rerankkit_gr2.rewards import TargetLogp

    return TargetLogp(config.floor)


def reasoning_length(config: s.ReasoningLengthConfig, info: RunInfo) -> RewardFn:
    """`reasoning-length`"""
    from rerankkit_gr2.rewards import ReasoningLength

    return ReasoningLength(config.low, config.high)


def citations(config: s.CitationsConfig, info: RunInfo) -> RewardFn:
    """`citations`"""
    from rerankkit_gr2.rewards import Citations

    return Citations(info.surface, config.uncited)


def dapo(config: s.DapoConfig, info: RunInfo) -> PolicyOptimizer:
    """`dapo`"""
    return _group_optimizer(config)


def grpo(config: s.GrpoConfig, info: RunInfo) -> PolicyOptimizer:
    """`grpo`"""
    return _group_optimizer(config)


def dr_grpo(config: s.DrGrpoConfig, info: RunInfo) -> PolicyOptimizer:
    """`dr-grpo`"""
    return _group_optimizer(config)


def gspo(config: s.GspoConfig, info: RunInfo) -> PolicyOptimizer:
    """`gspo`"""
    return _group_optimizer(config)


def cispo(config: s.CispoConfig, info: RunInfo) -> PolicyOptimizer:
    """`cispo`"""
    return _group_optimizer(config)


def _group_optimizer(config: s.GroupConfig) -> PolicyOptimizer:
    """The one loop; its settings tell which of its relatives it is."""
    from rerankkit.math.losses import LossSettings
    from rerankkit_gr2.dapo import GroupOptimizer

    shared = {field.name for field in fields(LossSettings)} - {"constant"}
    return GroupOptimizer(config, LossSettings(**config.model_dump(include=shared), constant=config.max_new_tokens))


def _style(config: s.TargetedConfig):  # type: ignore[no-untyped-def]
    from rerankkit.text.prompts import PromptStyle

    return PromptStyle(fields=config.fields, knowledge=config.knowledge)


def _backend(config: s.FeaturesBackend | s.TransformersBackend | s.OpenAIBackend):  # type: ignore[no-untyped-def]
    from rerankkit_gr2 import backends, features

    match config:
        case s.FeaturesBackend():
            return features.FeatureBackend(config.learn)
        case s.TransformersBackend():
            return backends.TransformersBackend(
                config.model, config.gguf_file or None, max_new_tokens=config.max_new_tokens
            )
        case s.OpenAIBackend():
            return backends.OpenAIBackend(
                config.model,
                config.base_url,
                api_key_env=config.api_key_env,
                concurrency=config.concurrency,
                timeout=config.timeout,
                max_retries=config.retries,
                max_tokens=config.max_new_tokens,
            )

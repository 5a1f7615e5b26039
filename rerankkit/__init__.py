"""rerankkit: reranking with reasoning language models, from parts that anybody can swap.

What a plugin or a script needs is here; anything deeper may move between versions. See `rerankkit.run` for the
pipeline, `rerankkit.protocols` for the four parts, `rerankkit.types` for the nouns.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rerankkit.errors import (
        ConfigError,
        DataError,
        PluginError,
        RerankkitError,
        RunFailed,
        RunFolderError,
        UsageError,
    )
    from rerankkit.part_config import PluginConfig
    from rerankkit.pipeline import Pipeline
    from rerankkit.plugins import Register, hookimpl, load_plugins
    from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer
    from rerankkit.stages.rank_asks import Ranker
    from rerankkit.stages.sids import SidMap
    from rerankkit.types import (
        Catalog,
        Failed,
        Interaction,
        Item,
        NotApplicable,
        Outcome,
        Parse,
        Ranking,
        RerankExample,
        Reward,
        Rollout,
        RunInfo,
        Sid,
        SidSurface,
        StepReport,
        Trace,
        TraceFailure,
    )

__version__ = "0.1.0"

_HOMES = {
    "errors": "ConfigError DataError PluginError RerankkitError RunFailed RunFolderError UsageError",
    "pipeline": "Pipeline",
    "part_config": "PluginConfig",
    "plugins": "Register hookimpl load_plugins",
    "protocols": "PolicyOptimizer RewardFn Teacher Tokenizer",
    "stages.rank_asks": "Ranker",
    "stages.sids": "SidMap",
    "types": "Catalog Failed Interaction Item NotApplicable Outcome Parse Ranking RerankExample Reward Rollout RunInfo "
    "Sid SidSurface StepReport Trace TraceFailure",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Catalog", "ConfigError", "DataError", "Failed", "Interaction", "Item", "NotApplicable", "Outcome", "Parse",
    "Pipeline", "PluginConfig", "PluginError", "PolicyOptimizer", "Ranker", "Ranking", "Register", "RerankExample",
    "RerankkitError", "Reward", "RewardFn", "Rollout", "RunFailed", "RunFolderError", "RunInfo", "Sid", "SidMap",
    "SidSurface", "StepReport", "Teacher", "Tokenizer", "Trace", "TraceFailure", "UsageError", "hookimpl",
    "load_plugins",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Looked up when asked for: `rerankkit --help` pays for none of them.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rerankkit' has no attribute {name!r}")
    return getattr(import_module(f"rerankkit.{_HOME_OF[name]}"), name)

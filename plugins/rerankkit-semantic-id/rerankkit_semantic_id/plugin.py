"""Tells rerankkit about the tokenizer. Loaded for every `rerankkit` command, so nothing heavy is imported here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt
from rerankkit import PluginConfig, Register, RunInfo, Tokenizer, hookimpl


class SemanticIdConfig(PluginConfig):
    """semantic-id's residual k-means, and a last code that tells items of the same codes apart."""

    levels: PositiveInt = Field(default=3, le=25)
    """Codes that semantic-id gives; the last one comes on top."""
    codes: PositiveInt = 256
    """Codes to choose from at each level, the last one too."""
    implementation: Literal["kmeans", "constrained"] = "kmeans"
    """`constrained` makes clusters equally large, and takes much longer."""
    num_starts: PositiveInt = 1
    """k-means is started so often at each level, and the best is kept (semantic-id's own default is 10)."""


def build(config: SemanticIdConfig, info: RunInfo) -> Tokenizer:
    """`semantic-id`"""
    from rerankkit_semantic_id.tokenizer import SemanticId

    return SemanticId(config.levels, config.codes, config.implementation, config.num_starts, info.seed)


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer the tokenizer under the name that configs use."""
    register.tokenizers.add("semantic-id", SemanticIdConfig, build)

"""Tells rerankkit about the tokenizer. Loaded for every `rerankkit` command, so nothing heavy is imported here."""

from __future__ import annotations

from pydantic import Field, PositiveInt
from rerankkit import PluginConfig, Register, RunInfo, Tokenizer, hookimpl


class RecTokensConfig(PluginConfig):
    """RecTokens' mini-batch residual k-means, and a last code that tells items of the same codes apart."""

    levels: PositiveInt = Field(default=3, le=25)
    """Codes that RecTokens gives; the last one comes on top."""
    codes: PositiveInt = 256
    """Codes to choose from at each level, the last one too."""
    epochs: PositiveInt = 10
    """Passes over the catalogue."""
    batch_size: PositiveInt = 4096
    """Items in a batch. The first batch also starts the codes, so it should hold many more items than `codes`."""


def build(config: RecTokensConfig, info: RunInfo) -> Tokenizer:
    """`rectokens`"""
    from rerankkit_rectokens.tokenizer import RecTokens

    return RecTokens(config.levels, config.codes, config.epochs, config.batch_size, info.seed)


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer the tokenizer under the name that configs use."""
    register.tokenizers.add("rectokens", RecTokensConfig, build)

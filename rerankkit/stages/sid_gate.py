"""The gate of `[sids]`: a run whose semantic IDs collide stops before a policy is trained on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rerankkit.config import ChosenPart, Sids
from rerankkit.errors import RunFailed
from rerankkit.stages.render import render_scorecard
from rerankkit.stages.scorecard import scorecard_headline
from rerankkit.stages.wording import uniqueness, value_text
from rerankkit.store import FAILED_SIDS, write_json, write_text

if TYPE_CHECKING:
    from rerankkit.stages.sids import SidMap
    from rerankkit.store import RunFolder


def gated(draw: Callable[..., SidMap], folder: RunFolder) -> Callable[..., SidMap]:
    """`draw`, stopped by the config's gate: then the scorecard lies in the run folder, as JSON and as a page."""

    def drawn(*arguments: Any, **more: Any) -> SidMap:
        sids = draw(*arguments, **more)
        advice = missed_gate(sids.scorecard, folder.config.sids, folder.config.tokenizer)
        if not advice:
            return sids
        card = {**sids.scorecard, "missed_gate": advice}
        data, page = (folder.path / name for name in FAILED_SIDS)
        write_json(data, card)
        write_text(page, render_scorecard(card))
        crowded = [
            f"  {value_text(one['sid'])}: {one['num_items']:,} items, such as {' | '.join(one['titles'][:2])}"
            for one in card["collisions"][:3]
        ]
        lines = [f"sids: only {scorecard_headline(card)}. The most crowded SIDs:", *crowded, advice]
        raise RunFailed(
            "\n".join([*lines, f"The whole scorecard: `rerankkit sids report {folder.path}`, or {page} in a browser."])
        )

    return drawn


def missed_gate(card: Mapping[str, Any], asked: Sids, tokenizer: ChosenPart) -> str:
    """Empty if `min_unique` of the items have a SID of their own; else what was asked, and what can be changed."""
    if card["own_share"] >= asked.min_unique:
        return ""
    settings = {f"tokenizer.{name}": value for name, value in tokenizer.resolved().items() if name in _MATTER}
    named = ", ".join(f"{name} (now {value_text(value)})" for name, value in settings.items())
    said = (
        f"sids.min_unique = {asked.min_unique:g} asks for {uniqueness(asked.min_unique)}, so the run stopped. "
        f"What can be changed: {named}, or sids.min_unique itself (0 turns the gate off)."
    )
    equal = card["equal"]
    if equal["vectors"]:
        said += (
            f" {equal['vectors']:,} items share their vector ({equal['texts']:,} their text): a tokenizer that goes by "
            f"vectors alone can give {uniqueness(equal['best_own_share'])} of items a SID of their own at most."
        )
    return said


_MATTER = ("use", "levels", "codes", "last_level", "on_full")
"""Settings that tokenizers commonly have and that decide on collisions, to be named where a block has them."""

"""The same pipeline, composed in Python: swap one part, keep the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rerankkit import processes
from rerankkit.config import ChosenPart, find_plugins, load_config, make_config, overridden
from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer
from rerankkit.run import run


@dataclass(frozen=True)
class Pipeline:
    """A run in the making. Parts given here take the place of the config's; everything else comes from `config`.

        Pipeline(config="examples/configs/quickstart.toml", reward=MyReward()).run("runs/mine")

    A part's source and `repr` mark its stage: change either, and the stage is done again. A dataclass has a `repr`
    that tells its settings; give other classes one.
    """

    tokenizer: Tokenizer | None = None
    teacher: Teacher | None = None
    reward: RewardFn | None = None
    optimizer: PolicyOptimizer | None = None
    config: str | Path | Mapping[str, Any] = field(default_factory=dict)
    """A config file, or its blocks as a mapping; empty is the shipped world with default settings."""
    overrides: Sequence[str] = ()
    """`a.b=c` settings over the config's."""

    def run(self, out: str | Path, *, until: str = "", progress: bool = True) -> dict[str, Any]:
        """Run into the folder `out` (again: continue) and return the report: `report.json` as a dict.

        Raises what `rerankkit run` would exit with: UsageError and its kinds, or RunFailed.
        """
        from rerankkit.cli.console import announce, progress_bar
        from rerankkit.system import prepare

        if isinstance(self.config, Mapping):
            raw, where = overridden(self.config, self.overrides), None
        else:
            raw, where = load_config(self.config, self.overrides)
        plugins = find_plugins(raw, where)
        resolved = make_config(raw, plugins, where)
        own: dict[str, Any] = {
            kind: ChosenPart.given(kind, getattr(self, kind))
            for kind in ("tokenizer", "teacher", "reward", "optimizer")
            if getattr(self, kind) is not None
        }
        if "reward" in own:
            own["reward"] = (own["reward"],)
        resolved = replace(resolved, **own)
        main = processes.launched()[0] == 0
        with progress_bar() if main else nullcontext() as bar, prepare(resolved, Path(out)) as (device, track):
            shown = {"progress": bar, "announce": announce} if progress else {}
            return run(resolved, Path(out), device=device, track=track, hooks=plugins.hooks, until=until, **shown)

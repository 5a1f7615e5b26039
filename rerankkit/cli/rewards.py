"""`rerankkit rewards`"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rerankkit.config import ChosenPart, RunConfig
    from rerankkit.protocols import RewardFn
    from rerankkit.types import RerankExample

app = typer.Typer(
    help="See what a reward pays for, before anything is trained.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    """Makes `audit` a verb of a group, even while it is the only one."""


@app.command("audit")
def audit(
    what: Annotated[
        str, typer.Argument(metavar="NAME|CONFIG", help="A reward's name, or a config whose rewards are added up.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE ...]", help="Settings, such as reward.format_weight=0.5"),
    ] = None,
    *,
    fail_on_exploit: Annotated[
        bool, typer.Option("--fail-on-exploit", help="Exit with 1 if an exploit pays, or the order is not judged.")
    ] = False,
    examples: Annotated[int, typer.Option(min=100, metavar="N", help="Asks that every policy answers.")] = 500,
    group_size: Annotated[int, typer.Option(min=2, metavar="G", help="Answers in a group; an exploit is one.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A run folder: its training lists are asked. Default: the config's, if done."),
    ] = None,
    file: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Also load this single-file plugin.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Play a zoo of exploits against a reward, and name those that pay.

    Some exploits hand back the given order, or one that nobody thought about; others are tricks that dress up an
    honest answer. An exploit pays, and is named, if it ranks no better than the given order and by more than three
    standard errors either earns more than honest answers that rank better than the given order (gain), or would be
    made more likely by a group-normalised optimizer in a group of honest answers that rank just as well as the given
    order (advantage: its mean z-score). A trick is compared with the same answer without it.
    """
    from rerankkit.cli.console import print_audit, progress_bar
    from rerankkit.testing.zoo import play_zoo

    config, default = _config(what, overrides or [], file or [])
    asks, counts, source = _asks(out, default, examples, seed)
    with progress_bar() as bar:
        found = play_zoo(asks, counts=counts, group_size=group_size, seed=seed, progress=bar).audit(_reward(config))
    if as_json:
        print(json.dumps({"reward": config.resolved()["reward"], "asks": len(asks), "source": source, **found.plain()}))
    else:
        print_audit(found, " + ".join(map(_label, config.reward)), f"{len(asks):,} {source}")
    if fail_on_exploit and not found.passed:
        raise typer.Exit(1)


def _config(what: str, overrides: Sequence[str], files: Sequence[str]) -> tuple[RunConfig, Path | None]:
    """The config to audit, and the run folder that goes with it: of a name alone, none."""
    from rerankkit.config import find_plugins, load_config, make_config, overridden, strings_in

    path = Path(what)
    if path.suffix in (".toml", ".json") or path.is_file():
        raw, where = load_config(path, overrides)
        folder = path.parent if path.name == "config.json" else Path("runs") / path.stem
    else:
        raw, where, folder = overridden({"reward": {"use": what}}, overrides), None, None
    if files:
        raw["plugin_files"] = [*strings_in(raw.get("plugin_files")), *files]
    return make_config(raw, find_plugins(raw, where), where), folder


def _reward(config: RunConfig) -> RewardFn:
    from rerankkit.stages.rewards import combine
    from rerankkit.types import RunInfo

    info = RunInfo(seed=config.seed)
    return combine([(part.weight, part.spec.name, part.build(info)) for part in config.reward])


def _asks(
    out: Path | None, default: Path | None, count: int, seed: int
) -> tuple[list[RerankExample], Mapping[str, float] | None, str]:
    """Asks, how often their items were bought, and where they come from: a run's training lists, or made ones."""
    import random

    from rerankkit.errors import RunFailed, RunFolderError
    from rerankkit.store import finished_stage
    from rerankkit.testing.zoo import make_asks

    folder = out or default
    try:
        if folder is None:
            raise RunFolderError("")
        data, sids, lists = (finished_stage(folder, stage) for stage in ("data", "sids", "candidates"))
    except RunFolderError:
        if out is not None:
            raise
        return make_asks(count, seed=seed), None, "made asks"
    from collections import Counter

    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.stages.sids import SidMap

    dataset = Dataset.load(data)
    found = CandidateLists.load(lists).examples(SidMap.load(sids).attach(dataset.items), "train")
    if len(found) < 2:
        raise RunFailed(f"{folder}: {len(found)} training lists hold their target; the audit needs some.")
    counts = Counter(item_id for history in dataset.train_sequences().values() for item_id in history)
    chosen = random.Random(f"{seed} audit").sample(found, min(count, len(found)))
    return chosen, {item_id: float(times) for item_id, times in counts.items()}, f"training lists of {folder}"


def _label(part: ChosenPart) -> str:
    """A part of the sum in words: `0.2 format [earned]`."""
    return " ".join([f"{part.weight:g}", part.spec.name, *([f"[{', '.join(part.gates)}]"] if part.gates else [])])

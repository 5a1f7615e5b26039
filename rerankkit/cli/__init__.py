"""The command line: one file a verb. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import Annotated

import typer

from rerankkit import processes
from rerankkit.cli import compare, doctor, plugins, rank, rewards, run, sids, status
from rerankkit.errors import RerankkitError

app = typer.Typer(
    name="rerankkit",
    help="Rerank with reasoning language models: semantic IDs, mid-training, traces, reinforcement, report.",
    epilog="Start with: rerankkit run examples/configs/quickstart.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("rank", epilog=rank.EPILOG)(rank.rank)
app.command("status")(status.status)
app.command("compare")(compare.compare)
app.command("doctor")(doctor.doctor)
app.add_typer(sids.app, name="sids")
app.add_typer(plugins.app, name="plugins")
app.add_typer(rewards.app, name="rewards")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from rerankkit import __version__

        print(__version__)
        raise typer.Exit()


def main() -> None:
    """The `rerankkit` command. Exits with 0: done; 1: the run failed; 2: the call can be mended; 130: interrupted."""
    # Importing makes many objects and no garbage: looking for some would take a fifth of the time of a short verb.
    gc.disable()
    atexit.register(gc.freeze)
    try:
        app()
    except RerankkitError as error:
        number, several = processes.launched()
        print(f"{f'process {number}: ' if several > 1 else ''}error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `rerankkit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    finally:
        gc.enable()

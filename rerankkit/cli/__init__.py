"""The command line: one file a verb. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import sys

import typer

from rerankkit.cli import compare, doctor, plugins, run, status
from rerankkit.errors import RerankkitError

app = typer.Typer(
    name="rerankkit",
    help="Rerank with reasoning language models: semantic IDs, mid-training, reasoning traces, reinforcement, report.",
    epilog="Start with: rerankkit run examples/configs/quickstart.toml --out runs/quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("status")(status.status)
app.command("compare")(compare.compare)
app.command("doctor")(doctor.doctor)
app.add_typer(plugins.app, name="plugins")


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from rerankkit import __version__

        typer.echo(__version__)
        raise typer.Exit()


def main() -> None:
    """The `rerankkit` command. Exits with 0: done; 1: the run failed; 2: the call can be mended; 130: interrupted."""
    try:
        app()
    except RerankkitError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)

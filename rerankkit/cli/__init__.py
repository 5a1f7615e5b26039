"""The command line: one file a verb. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Sequence

from rerankkit import __version__
from rerankkit.cli import compare, doctor, plugins, run, status
from rerankkit.errors import RerankkitError


def parser() -> argparse.ArgumentParser:
    """Every verb and its options."""
    top = argparse.ArgumentParser(
        prog="rerankkit",
        description="Rerank with reasoning language models: semantic IDs, mid-training, reasoning traces, "
        "reinforcement, report.",
        epilog="Start with: rerankkit run examples/configs/quickstart.toml",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=__version__)
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in (run, status, compare, doctor, plugins):
        verb.add_to(verbs)
    return top


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What the user asks for: `do`, the verb's function, and its arguments. Exits with 2 if it is no call."""
    top = parser()
    asked, rest = top.parse_known_args(words or ["--help"])
    # argparse ends a list of positionals at the first option: overrides that come after one are handed back.
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in asked):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        asked.overrides += rest
    return asked


def main() -> None:
    """The `rerankkit` command. Exits with 0: done; 1: the run failed; 2: the call can be mended; 130: interrupted."""
    # Importing makes many objects and no garbage: looking for some would take a fifth of the time of a short verb.
    gc.disable()
    atexit.register(gc.freeze)
    try:
        asked = vars(parse(sys.argv[1:]))
        sys.exit(asked.pop("do")(**asked))
    except RerankkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `rerankkit ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    finally:
        gc.enable()

"""Every error that rerankkit raises on purpose.

RerankkitError                 exit code 1
├── UsageError                 exit code 2: the user can mend it, and the message says how
│   ├── ConfigError            a config key or value
│   ├── DataError              a table, a row, a list
│   ├── PluginError            a plugin that cannot be loaded, or a part nobody registered
│   └── RunFolderError         a run folder that is locked, foreign or damaged
├── RunFailed                  a stage could not do its work (all rewards failed, a gate was missed, NaN)
└── PeerFailed                 another process of the run failed: its own error tells why
"""

from __future__ import annotations

from collections.abc import Iterable


class RerankkitError(Exception):
    """Root of all of rerankkit's own errors."""

    exit_code = 1


class UsageError(RerankkitError):
    """Something the user wrote or pointed at; nothing was changed."""

    exit_code = 2


class ConfigError(UsageError):
    """A config key or value that cannot be used."""


class DataError(UsageError):
    """A table, row or list that cannot be used."""


class PluginError(UsageError):
    """A plugin that cannot be loaded, or a part that nobody registered."""


class RunFolderError(UsageError):
    """A run folder that is in use, not ours, or damaged."""


class RunFailed(RerankkitError):  # noqa: N818 (a run fails; the name says so)
    """A stage could not do its work."""


class PeerFailed(RerankkitError):  # noqa: N818
    """Another process of the run failed; exits with that one's code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence naming what was possible, and the likeliest spelling if there is one."""
    import difflib

    choices = sorted(set(known))
    listed = f"known: {', '.join(choices)}" if choices else "none is known"
    close = difflib.get_close_matches(word, choices, n=1)
    return f"{listed}. Did you mean {close[0]!r}?" if close else f"{listed}."

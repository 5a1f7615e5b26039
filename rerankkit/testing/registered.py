"""A plugin's part as a run would build it, for tests."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from rerankkit.errors import PluginError
from rerankkit.plugins import Register
from rerankkit.types import RunInfo


def part_of(plugin: ModuleType, name: str = "", /, **settings: Any) -> Any:
    """The part that a plugin's module registers, built; settings that are not given have their defaults.

    `name` says which, where it registers several: NAME, or KIND/NAME. Raises PluginError if that is not one part, or if
    no block of a config could hold its settings.
    """
    register = Register()
    plugin.rerankkit_register(register)
    parts = {f"{part.kind}/{part.name}": part for slot in register.slots() for part in slot.parts.values()}
    chosen = [part for path, part in parts.items() if name in ("", part.name, path)]
    if len(chosen) != 1:
        raise PluginError(f"{plugin.__name__} registers {', '.join(parts) or 'nothing'}; say which, not {name!r}.")
    return chosen[0].build(chosen[0].config(**settings), RunInfo())

"""What a plugin's package may import, and when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PRIVATE = ("cli", "run", "pipeline", "store", "stages", "system")
"""What of rerankkit is the run's own, and may change without a word."""


def check_imports(package: str, *heavy: str) -> None:
    """The package imports of rerankkit what is public, no other plugin's package, and nothing heavy to register.

    `heavy` are the modules that must not be there when `PACKAGE.plugin` has been imported: every command imports it.
    Raises AssertionError that names file and import, ModuleNotFoundError if there is no such package, and SyntaxError.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package!r} is no package that is installed here", name=package)
    files = [file for folder in spec.submodule_search_locations for file in sorted(Path(folder).rglob("*.py"))]
    found = [(file, module) for file in files for module in _imported(file)]
    ours = [(file, module) for file, module in found if module.split(".")[0].startswith("rerankkit")]
    assert ours, f"{package}: no file imports rerankkit"
    for file, module in ours:
        first, *rest = module.split(".")
        if first == package:
            continue
        assert first == "rerankkit", f"{file}: {module} is another plugin's; plugins meet in a config"
        assert not any(part.startswith("_") for part in rest), f"{file}: {module} is private"
        assert not rest or rest[0] not in PRIVATE, f"{file}: {module} is the run's own; import what the reference lists"
    code = f"import sys, {package}.plugin; print(*sorted({set(heavy)!r} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    *_, reason = ["", *done.stderr.splitlines()]
    assert not done.returncode, f"{package}.plugin cannot be imported: {reason}"
    loaded = done.stdout.split()
    assert not loaded, f"{package}.plugin imports {', '.join(loaded)}, for which every command waits; do so in `build`"


def _imported(file: Path) -> Iterator[str]:
    """`a.b.c` for `from a.b import c`."""
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)

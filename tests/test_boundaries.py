"""Who may import whom: types <- protocols <- plugins, config <- stages <- run <- cli; maths stands alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "rerankkit").rglob("*.py"))
PLUGIN = sorted((ROOT / "plugins" / "rerankkit_gr2").rglob("*.py"))

LAYERS = {
    "errors": -1,
    "types": 0,
    "math": 0,
    "part_config": 0,
    "protocols": 1,
    "text": 1,
    "processes": 1,
    "functions": 1,
    "plugins": 2,
    "gates": 2,
    "config": 3,
    "data": 3,
    "lm": 3,
    "store": 4,
    "stages": 5,
    "run": 6,
    "system": 6,
    "adapters": 6,
    "testing": 6,
    "pipeline": 7,
    "cli": 7,
    "__main__": 8,
}
"""Part of rerankkit -> its height. A module imports what lies lower, and from its own part."""

LEANINGS = {("pipeline", "cli")}
"""Imports within one height, or upwards, that have a reason: a composed run shows the same progress bars."""


def name_of(path: Path) -> str:
    """`rerankkit.stages.sids` of rerankkit/stages/sids.py."""
    base = ROOT / "plugins" if "plugins" in path.relative_to(ROOT).parts[:1] else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, imported name or empty) of every import that is carried out, inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for block in ast.walk(tree):
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            block.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield from ((node.module or "", alias.name) for alias in node.names)


def part_of(module: str) -> str:
    """`stages` of rerankkit.stages.sids; empty for rerankkit itself and for strangers."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "rerankkit" else ""


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_core_looks_only_downwards_and_never_at_a_plugin(path: Path) -> None:
    own = part_of(name_of(path))
    for module, name in imports(path):
        assert not module.startswith("rerankkit_"), f"{module} is a plugin"
        other = part_of(module if module != "rerankkit" else f"rerankkit.{name}")
        if own and other and other != own and (own, other) not in LEANINGS and name != "__version__":
            assert LAYERS[other] < LAYERS[own], f"{own} (height {LAYERS[own]}) imports {other} ({LAYERS[other]})"


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_core_does_not_name_a_plugin(path: Path) -> None:
    assert "rerankkit_gr2" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PLUGIN, ids=name_of)
def test_the_plugin_imports_only_what_is_public(path: Path) -> None:
    for module, name in imports(path):
        if module.split(".")[0] == "rerankkit":
            assert not any(part.startswith("_") for part in [*module.split("."), name]), f"{module}.{name} is private"
            assert part_of(module) not in ("cli", "run", "pipeline", "store", "stages", "system")


@pytest.mark.parametrize("path", sorted((ROOT / "rerankkit" / "math").glob("*.py")), ids=name_of)
def test_maths_imports_nothing_of_ours_but_maths(path: Path) -> None:
    assert all(module.startswith("rerankkit.math") for module, _ in imports(path) if module.startswith("rerankkit"))


@pytest.mark.parametrize("path", sorted((ROOT / "rerankkit" / "stages").glob("*.py")), ids=name_of)
def test_stages_meet_in_run_and_share_only_nouns(path: Path) -> None:
    """A stage may name another's artifact (SidMap, Traces, Exported) and the helpers of `SHARED`, nothing else."""
    if path.stem == "rank_asks":  # no stage: it puts a finished run's stages to use, as run does
        return
    artifacts = {"SidMap", "Traces", "Exported", "ExportedRankings"}
    shared = {
        "training",
        "rewards",
        "report",
        "render",
        "compare",
        "wording",
        "charts",
        "scorecard",
        "sid_gate",
        "watch",
        "rankings",
    }
    for module, name in imports(path):
        if part_of(module) == "stages" and module.rpartition(".")[2] not in shared:
            assert name in artifacts, f"{module}.{name}"


def test_every_part_has_its_height() -> None:
    assert {part_of(name_of(path)) for path in CORE} - {""} == set(LAYERS)


def test_no_file_of_the_command_line_or_the_spine_imports_anything_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "pandas", "pyarrow", "datasets", "sklearn", "scipy", "accelerate"}
    light = [path for path in CORE if part_of(name_of(path)) in ("types", "errors", "protocols", "plugins", "config")]
    light += [path for path in CORE if part_of(name_of(path)) in ("cli", "store", "run", "system", "pipeline", "")]
    for path in light:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not heavy & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "module", ["rerankkit", "rerankkit.data", "rerankkit.text", "rerankkit.config", "rerankkit.run"]
)
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'pandas', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

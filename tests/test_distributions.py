"""The distributions under plugins/, installed together from their own pyproject files, as their users would.

One command for all of them: `pytest tests/test_distributions.py`. It makes a virtual environment that sees the packages
of the one that runs it, installs rerankkit and every distribution there, and runs in it. A distribution whose own
requirements are missing is installed and listed all the same, and its tests are skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "plugins").glob("rerankkit-*/pyproject.toml"))
CONFIGS = [
    path
    for path in sorted((ROOT / "examples" / "configs").glob("*.toml"))
    if "pip install ./plugins/" in path.read_text()
]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check"]
SMALL = [
    "data.num_users=60",
    "candidates.tune=false",
    "candidates.max_test=20",
    "policy.hidden_size=32",
    "policy.num_layers=1",
    "policy.intermediate_size=64",
    "midtrain.steps=2",
    "midtrain.tokens_per_step=512",
    "sft.epochs=1",
    "optimizer.steps=2",
    "optimizer.prompts_per_step=2",
    "evaluate.bootstrap_samples=100",
]
by_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@dataclass(frozen=True)
class Environment:
    """A virtual environment with everything in it."""

    python: Path
    site: Path

    def run(self, *arguments: str, cwd: Path) -> str:
        """Standard output of its Python; fails with everything it said if that did not go well."""
        variables = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(self.python), *arguments], cwd=cwd, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def rerankkit(self, *arguments: str, cwd: Path) -> str:
        return self.run("-c", "from rerankkit.cli import main; main()", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Fresh, with rerankkit and all distributions; no network."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    [site] = (folder / "lib").glob("python3*/site-packages")
    others = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--ignore-installed", *OFFLINE]
    done = subprocess.run([*pip, str(ROOT), *map(str, FOLDERS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Environment(python, site)


def described(folder: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def skip_without(folder: Path) -> None:
    """Skip unless what the distribution requires beside rerankkit is installed."""
    for requirement in described(folder)["dependencies"]:
        name = re.split(r"[<>=!~; \[]", requirement)[0]
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{folder.name} needs {requirement}")


def test_there_are_five() -> None:
    assert [folder.name for folder in FOLDERS] == [
        "rerankkit-minionerec",
        "rerankkit-onerec-think",
        "rerankkit-rectokens",
        "rerankkit-semantic-id",
        "rerankkit-trl",
    ]


def test_rerankkit_itself_holds_none_of_them(environment: Environment) -> None:
    [record] = environment.site.glob("rerankkit-*.dist-info/RECORD")
    tops = {line.split(",")[0].split("/")[0] for line in record.read_text().splitlines()}

    assert {top for top in tops if top.startswith("rerankkit") and "dist-info" not in top} == {
        "rerankkit",
        "rerankkit_gr2",
    }


def test_all_are_listed_and_in_order(environment: Environment, tmp_path: Path) -> None:
    found = json.loads(environment.rerankkit("plugins", "list", "--json", cwd=tmp_path))

    plugins = {plugin["distribution"]: plugin for plugin in found["plugins"]}
    assert {folder.name for folder in FOLDERS} <= {*plugins}
    for folder in FOLDERS:
        plugin = plugins[folder.name]
        assert (plugin["error"], plugin["warning"], plugin["version"]) == ("", "", described(folder)["version"])
        assert [part for part in found["parts"] if part["plugin"] == plugin["name"]]


@by_folder
def test_own_tests_pass(folder: Path, environment: Environment) -> None:
    skip_without(folder)
    said = environment.run("-m", "pytest", "-p", "no:cacheprovider", cwd=folder)

    assert re.search(r"\d+ passed", said)
    assert not re.search(r"\d+ (skipped|xfailed)", said)


@by_folder
def test_readme_configs_and_example_configs_are_accepted(
    folder: Path, environment: Environment, tmp_path: Path
) -> None:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    texts = re.findall(r"^```toml\n(.*?)^```$", readme, re.M | re.S)
    texts += [path.read_text(encoding="utf-8") for path in CONFIGS if f"./plugins/{folder.name}\n" in path.read_text()]
    assert len(texts) >= 3  # one of the README, the shop's and Beauty's
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.toml").write_text(text, encoding="utf-8")
    code = (
        "import sys; from rerankkit.config import load_config, make_config; from rerankkit import load_plugins\n"
        "for path in sys.argv[1:]:\n"
        "    resolved = make_config(load_config(path)[0], load_plugins()).resolved()\n"
        "    assert make_config(resolved, load_plugins()).resolved() == resolved\n"
    )

    environment.run("-c", code, *(f"{number}.toml" for number in range(len(texts))), cwd=tmp_path)


def test_every_config_says_what_it_needs() -> None:
    names = {folder.name for folder in FOLDERS}
    for path in CONFIGS:
        [needed] = re.findall(r"^#   pip install \./plugins/(\S+)$", path.read_text(encoding="utf-8"), re.M)
        assert needed in names


@pytest.mark.parametrize("config", [c for c in CONFIGS if "beauty" not in c.name], ids=lambda config: config.name)
def test_example_runs_to_a_report(config: Path, environment: Environment, tmp_path: Path) -> None:
    skip_without(ROOT / "plugins" / f"rerankkit-{config.stem}")
    environment.rerankkit("run", str(config), *SMALL, "--out", "run", cwd=tmp_path)

    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert report["n"] > 0
    assert f"rerankkit-{config.stem}" in json.dumps(manifest)

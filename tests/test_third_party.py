"""The example plugin, installed as a stranger's would be: its own distribution, found by its entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "examples" / "third_party_plugin"
CLI = [sys.executable, "-c", "from rerankkit.cli import main; main()"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables under which the plugin is installed, built by its own pyproject; no network."""
    target = tmp_path_factory.mktemp("site")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(target), str(PLUGIN)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}


def test_it_is_listed_with_its_distribution(installed: dict[str, str]) -> None:
    done = subprocess.run(
        [*CLI, "plugins", "list", "--json"], env=installed, capture_output=True, text=True, check=True
    )

    found = json.loads(done.stdout)

    [plugin] = [plugin for plugin in found["plugins"] if plugin["name"] == "brevity"]
    assert (plugin["distribution"], plugin["version"]) == ("rerankkit-brevity", "0.1.0")
    assert (plugin["error"], plugin["warning"]) == ("", "")
    [part] = [part for part in found["parts"] if part["plugin"] == "brevity"]
    assert (part["kind"], part["name"]) == ("reward", "brevity")


def test_its_settings_and_their_meaning_are_shown(installed: dict[str, str]) -> None:
    command = [*CLI, "plugins", "show", "brevity"]

    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=True)

    assert "limit = 200" in done.stdout
    assert "Completion length, in tokens, above which the reward falls." in done.stdout


def test_a_config_can_choose_it(installed: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "short.toml"
    config.write_text('[[reward]]\nuse = "gr2"\n\n[[reward]]\nuse = "brevity"\nweight = 0.1\nlimit = 150\n')
    command = [*CLI, "run", str(config), "--dry-run", "--json", "--out", str(tmp_path / "out")]

    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=True)

    assert json.loads(done.stdout)["config"]["reward"][1] == {"use": "brevity", "weight": 0.1, "limit": 150}


def test_its_own_tests_pass(installed: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest"], cwd=PLUGIN, env=installed, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout

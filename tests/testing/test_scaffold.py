"""What `rerankkit plugins new` writes works as it is: generated, installed by its own pyproject, tested, typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rerankkit.cli import app
from rerankkit.errors import PluginError, UsageError
from rerankkit.testing.examine import examine
from rerankkit.testing.scaffold import KINDS, make_file, make_plugin

CLI = [sys.executable, "-c", "from rerankkit.cli import main; main()"]


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mypy's cache: the first package pays for rerankkit and what it imports, the others use it."""
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_installed_tested_typed_and_in_order(kind: str, tmp_path: Path, types: Path) -> None:
    folder, target = make_plugin(kind, f"my-own-{kind}", tmp_path), tmp_path / "site"
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check"]
    installed = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}

    def shell(*command: str, cwd: Path = folder) -> str:
        done = subprocess.run(command, cwd=cwd, env=installed, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    python = [sys.executable, "-m"]
    shell(*python, "pip", "install", "-q", *offline, "--target", str(target), str(folder))
    passed = shell(*python, "pytest")
    shell(*python, "mypy", "--cache-dir", str(types))
    shell(*python, "ruff", "check", ".")
    shell(*python, "ruff", "format", "--check", ".")
    report = shell(*CLI, "plugins", "check", f"my-own-{kind}", cwd=tmp_path)

    assert " passed" in passed and "failed" not in passed
    assert f"rerankkit-my-own-{kind} 0.1.0" in report and "**in order**" in report
    assert (target / f"rerankkit_my_own_{kind}" / "py.typed").is_file()


@pytest.mark.parametrize("kind", ["reward", "teacher", "tokenizer"])
def test_a_single_file_is_in_order(kind: str, tmp_path: Path) -> None:
    file = make_file(kind, "quick-try", tmp_path)

    assert file == tmp_path / "quick_try.py"
    assert examine("quick-try", [str(file)]).exit_code == 0


def test_the_verb_says_what_it_wrote_and_what_comes_next(tmp_path: Path) -> None:
    package = CliRunner().invoke(app, ["plugins", "new", "reward", "quick-try", "--out", str(tmp_path)])
    single = CliRunner().invoke(app, ["plugins", "new", "teacher", "quick-try", "--file", "--out", str(tmp_path)])

    assert package.exit_code == single.exit_code == 0
    assert f"{tmp_path}/rerankkit-quick-try/rerankkit_quick_try/plugin.py" in package.output
    assert "$ rerankkit plugins check quick-try" in package.output
    assert f'plugin_files = ["{tmp_path}/quick_try.py"]\n\n[teacher]\nuse = "quick-try"' in single.output


@pytest.mark.parametrize(
    ("kind", "name", "fault"),
    [
        ("rewards", "mine", r"no kind of part is called 'rewards'; .*Did you mean 'reward'\?"),
        ("reward", "My Reward", r"'My Reward' cannot be a part's name: .*'my-reward' would do"),
        ("reward", "../../evil", r"cannot be a part's name: .*'evil' would do"),
        ("reward", "9lives", r"'lives' would do"),
        ("reward", "x" * 41, "at most 40 letters"),
        ("reward", "class", "'class' is a word of Python's own; choose another name, 'class-reward' say"),
        ("reward", "ndcg", "a reward is called 'ndcg' already, by the plugin gr2"),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_written(
    kind: str, name: str, fault: str, tmp_path: Path
) -> None:
    for make in (make_plugin, make_file):
        with pytest.raises((UsageError, PluginError), match=fault):
            make(kind, name, tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    folder, file = make_plugin("reward", "mine", tmp_path), make_file("reward", "mine", tmp_path)
    file.write_text("precious")

    with pytest.raises(UsageError, match="rerankkit-mine is there already; choose another name, or another folder"):
        make_plugin("teacher", "mine", tmp_path)
    with pytest.raises(UsageError, match=r"mine\.py is there already"):
        make_file("reward", "mine", tmp_path)
    assert file.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", folder.name]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")

    with pytest.raises(UsageError, match=r"--out .*taken: no folder can be made there"):
        make_plugin("reward", "mine", tmp_path / "taken")


@pytest.mark.parametrize("name", ["policy", "reward", "plugin", "trace", "rollout-optimizer"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_look_like_ours_do_not_shadow_what_is_imported(kind: str, name: str, tmp_path: Path) -> None:
    import ast

    tree = ast.parse(make_file(kind, name, tmp_path).read_text())

    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert len(defined) >= 2 and not imported & defined

from __future__ import annotations

from pathlib import Path

import pytest

from rerankkit.testing import check_imports

GOOD = "import json\nfrom rerankkit import Register, hookimpl\nfrom rerankkit_mine.parts import _own\n"


def package(path: Path, plugin: str, parts: str = "_own = 1\n") -> None:
    folder = path / "rerankkit_mine"
    folder.mkdir()
    for name, text in (("__init__", ""), ("plugin", plugin), ("parts", parts)):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


def test_a_package_that_imports_what_is_public_passes(path: Path) -> None:
    package(path, GOOD, "_own = 1\ndef late() -> None:\n    import decimal\n    from rerankkit.lm import Policy\n")
    check_imports("rerankkit_mine", "torch", "decimal")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("from rerankkit.lm.forward import _hidden", r"plugin.py: rerankkit.lm.forward._hidden is private"),
        ("from rerankkit.stages.rl import reinforce", r"rerankkit.stages.rl.reinforce is the run's own"),
        (
            "def f():\n    from rerankkit import (\n        Reward,\n        store,\n    )",
            "rerankkit.store is",
        ),
        ("import rerankkit.cli", "rerankkit.cli is the run's own"),
        (
            "def f():\n    from rerankkit_theirs.plugin import build",
            "plugin.build is another plugin's",
        ),
        ("import decimal, fractions", "rerankkit_mine.plugin imports decimal, fractions, for which"),
    ],
)
def test_what_is_not_public_and_what_is_heavy_is_named(path: Path, line: str, words: str) -> None:
    package(path, GOOD + line + "\n")
    with pytest.raises(AssertionError, match=words):
        check_imports("rerankkit_mine", "decimal", "fractions")


def test_a_plugin_module_that_is_not_there_or_broken_is_named(path: Path) -> None:
    package(path, "import rerankkit\nraise OSError('no such table')\n")
    with pytest.raises(AssertionError, match=r"rerankkit_mine\.plugin cannot be imported: OSError: no such table"):
        check_imports("rerankkit_mine")
    (path / "rerankkit_mine" / "plugin.py").unlink()
    (path / "rerankkit_mine" / "other.py").write_text("import rerankkit\n")
    with pytest.raises(AssertionError, match="cannot be imported: ModuleNotFoundError: No module named 'rerankkit_m"):
        check_imports("rerankkit_mine")


def test_a_file_that_is_no_python_is_named(path: Path) -> None:
    package(path, GOOD, "def f(:\n")
    with pytest.raises(SyntaxError) as raised:
        check_imports("rerankkit_mine")
    assert str(raised.value.filename).endswith("parts.py")


def test_a_package_that_is_no_plugins_or_not_there_is_refused(path: Path) -> None:
    package(path, "import json\n")
    with pytest.raises(AssertionError, match="rerankkit_mine: no file imports rerankkit"):
        check_imports("rerankkit_mine")
    with pytest.raises(ModuleNotFoundError, match="'rerankkit_none' is no package that is installed here"):
        check_imports("rerankkit_none")

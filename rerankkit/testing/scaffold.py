"""A new plugin, ready to be changed: `rerankkit plugins new` writes what `make_plugin` and `make_file` make."""

from __future__ import annotations

import keyword
import re
import shutil
import tempfile
from pathlib import Path

from rerankkit import __version__
from rerankkit.errors import PluginError, UsageError, did_you_mean
from rerankkit.plugins import load_plugins

KINDS = ("tokenizer", "teacher", "reward", "optimizer")
LONGEST = 40
"""Letters in a name."""


def make_plugin(kind: str, name: str, out: Path) -> Path:
    """Write a package whose tests pass into the new folder `out`/rerankkit-NAME, and return that folder.

    Raises UsageError for a kind, a name or a folder that will not do; then nothing was written.
    """
    words = _words(kind, name)
    package, folder = words["package"], out / words["distribution"]
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        ".github/workflows/ci.yml": "ci.yml",
        f"{package}/plugin.py": f"{kind}.py",
        f"tests/test_{package.removeprefix('rerankkit_')}.py": f"test_{kind}.py",
    }
    texts = {path: _render(template, words) for path, template in files.items()}
    texts |= {
        f"{package}/__init__.py": f'"""{words["distribution"]}: see `plugin.py`."""\n',
        f"{package}/py.typed": "",
        ".gitignore": "__pycache__/\n*.egg-info/\ndist/\n.mypy_cache/\n.ruff_cache/\n",
    }
    if folder.exists():
        raise UsageError(f"{folder} is there already; choose another name, or another folder with --out.")
    _make(out)
    aside = Path(tempfile.mkdtemp(dir=out, prefix=f".{folder.name}-"))
    try:
        for path, text in texts.items():
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / path).write_text(text, encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp's own are for nobody else
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def make_file(kind: str, name: str, out: Path) -> Path:
    """Write a single-file plugin, `out`/NAME.py, and return its path. Raises UsageError as `make_plugin`."""
    words = _words(kind, name)
    file = out / f"{words['package'].removeprefix('rerankkit_')}.py"
    if file.exists():
        raise UsageError(f"{file} is there already; choose another name, or another folder with --out.")
    text = _render(f"{kind}.py", words)
    _make(out)
    file.write_text(text, encoding="utf-8")
    return file


def block(kind: str) -> str:
    """How a config opens the block of such a part."""
    return "[[reward]]" if kind == "reward" else f"[{kind}]"


def _words(kind: str, name: str) -> dict[str, str]:
    """What the templates are filled with."""
    if kind not in KINDS:
        raise UsageError(f"no kind of part is called {kind!r}; {did_you_mean(kind, KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST:
        better = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-0123456789")
        hint = f" {better[:LONGEST].strip('-')!r} would do." if better else ""
        raise UsageError(
            f"{name!r} cannot be a part's name: small letters and digits, words joined by -, a letter first, at most "
            f"{LONGEST} letters.{hint}"
        )
    snake = name.replace("-", "_")
    if keyword.iskeyword(snake):
        raise UsageError(f"{name!r} is a word of Python's own; choose another name, {name + '-' + kind!r} say.")
    slot = next(slot for slot in load_plugins().register.slots() if slot.kind == kind)
    if name in slot.parts:
        raise PluginError(
            f"a {kind} is called {name!r} already, by the plugin {slot.parts[name].plugin}; choose another."
        )
    camel = "".join(word.capitalize() for word in (name.removesuffix(f"-{kind}")).split("-")) + kind.capitalize()
    return {
        "kind": kind,
        "name": name,
        "cls": camel,
        "distribution": f"rerankkit-{name}",
        "package": f"rerankkit_{snake}",
        "module": f"rerankkit_{snake}.plugin",
        "block": block(kind),
        "version": ".".join(__version__.split(".")[:2]),
    }


def _render(template: str, words: dict[str, str]) -> str:
    import jinja2

    loader = jinja2.PackageLoader("rerankkit.testing")
    how = {"keep_trailing_newline": True, "autoescape": False}  # what is filled in has been checked; it is not HTML
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **how)  # type: ignore[arg-type]
    return environment.get_template(f"{template}.j2").render(words)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: no folder can be made there ({error.strerror}).") from error

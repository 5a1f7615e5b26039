"""Core favours nobody: no rival and no plugin is named in it, but for the exceptions here, each with its reason."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from rerankkit.plugins import load_plugins

CORE = Path(__file__).parent.parent / "rerankkit"
FILES = sorted(path for path in CORE.rglob("*") if path.suffix in (".py", ".j2"))
PYTHON = [path for path in FILES if path.suffix == ".py"]

RIVALS = (
    "onerec",
    "openonerec",
    "minionerec",
    "rectokens",
    "lc-?rec",
    "gream",
    "srpo",
    "tiger",
    "rank_?llm",
    "rankgpt",
)
"""Other methods, and packages that implement them."""
LIBRARIES = ("trl", "verl", "verifiers", "rerankers", "openrlhf", "distilabel", "vllm")
"""Other frameworks. Docstrings and comments may say whose convention a name or a formula follows."""
PLUGINS = tuple(re.sub(r"[-_]", "[-_]", folder.name) for folder in sorted((CORE.parent / "plugins").iterdir()))
"""Those that live beside core."""
COMMON = {"format", "ndcg", "auc", "random", "last", "score", "reciprocal-rank", "citations", "length"}
"""Part names that are words of the trade as well."""

EXCEPTIONS = {
    "adapters": "bridges to TRL, verifiers, verl and rerankers are named after them",
    "config.py": "the parts that a config gets when it names none",
    "math/losses.py": "presets are called as their papers call them",
}
"""File or folder of core -> why it may name what others may not."""


def excepted(path: Path) -> bool:
    inside = path.relative_to(CORE).as_posix()
    return any(inside == name or inside.startswith(f"{name}/") for name in EXCEPTIONS)


def named(words: tuple[str, ...], text: str) -> list[str]:
    """The lines of `text` that hold one of the words, whole."""
    pattern = re.compile(rf"(?<![a-z0-9])({'|'.join(words)})(?![a-z0-9])", re.I)
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


def code(path: Path) -> str:
    """The file without comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    prose = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.start[1]
    lines = enumerate(source.splitlines(), start=1)
    return "\n".join(line[: comments.get(number, len(line))] for number, line in lines if number not in prose)


def strings(path: Path) -> Iterator[str]:
    """The text constants of the code, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CORE).as_posix())
def test_no_rival_is_named(path: Path) -> None:
    assert named(RIVALS, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(CORE).as_posix())
def test_no_code_names_another_framework_or_a_plugin(path: Path) -> None:
    if not excepted(path):
        assert named((*LIBRARIES, *PLUGINS, "gr2"), code(path)) == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.relative_to(CORE).as_posix())
def test_no_code_asks_for_a_part_by_name(path: Path) -> None:
    parts = {part for slot in load_plugins(only="gr2").register.slots() for part in slot.parts} - COMMON
    assert len(parts) >= 10

    if not excepted(path):
        assert parts & set(strings(path)) == set()


def test_every_exception_is_needed() -> None:
    words = (*LIBRARIES, "gr2", "dapo", "rqvae")

    for name in EXCEPTIONS:
        files = [path for path in PYTHON if path.relative_to(CORE).as_posix().startswith(name)]
        assert any(named(words, code(path)) for path in files), f"{name} needs no exception"

"""The documentation is true: its code runs, its configs parse, its commands exist, its links lead somewhere.

Marks in the Markdown, on the line above a fence: `<!-- file: NAME -->` writes the block to that file, `<!-- run -->`
runs it (Python in one namespace a page; console lines as commands) in the folder of those files. Every other TOML block
is a config, and every `$ rerankkit ...` line is checked against the command line.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from rerankkit.cli import app
from rerankkit.config import load_config, make_config
from rerankkit.plugins import HookSpecs, load_plugins

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")], key=lambda page: page.name
)
by_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@dataclass(frozen=True)
class Block:
    """A fenced block: `mark` is the comment above it, without brackets."""

    language: str
    text: str
    mark: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"(?:^<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
    return [
        Block(found["language"], found["text"], found["mark"] or "", text[: found.start()].count("\n") + 2)
        for found in pattern.finditer(text)
    ]


@pytest.fixture
def folder(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with the page's files in it, and with the examples."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for block in blocks(page):
        if block.mark.startswith("file: "):
            file = tmp_path / block.mark.removeprefix("file: ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@by_page
def test_marked_code_runs(page: Path, folder: Path) -> None:
    names: dict[str, Any] = {"__name__": f"{page.stem}_docs"}
    imported = set(sys.modules)
    try:
        for block in blocks(page):
            if block.mark == "run" and block.language == "python":
                exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
            elif block.mark == "run":
                for line in commands(block):
                    _shell(line)
    finally:
        for name in sys.modules.keys() - imported:  # brevity.py of one page is not that of the next
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def _shell(line: str) -> None:
    program = [sys.executable, "-c", "from rerankkit.cli import main; main()"]
    words = shlex.split(line)
    assert words[0] == "rerankkit", f"only rerankkit's own commands are run, not {line}"
    done = subprocess.run([*program, *words[1:]], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert "broken" not in done.stdout


@by_page
def test_configs_parse(page: Path, folder: Path) -> None:
    for number, block in enumerate(block for block in blocks(page) if block.language == "toml"):
        if block.mark.startswith("file: ") and not _is_config(block.text):
            tomllib.loads(block.text)
            continue
        file = folder / f"config-{number}.toml"
        file.write_text(block.text, encoding="utf-8")
        raw, where = load_config(file)
        plugins = load_plugins(raw.get("plugin_files", []))
        assert not [plugin for plugin in plugins.loaded if plugin.error], f"{page}:{block.line}"
        make_config(raw, plugins, where)


def _is_config(text: str) -> bool:
    return "[project]" not in text


@by_page
def test_commands_exist(page: Path, folder: Path) -> None:
    group: Any = get_command(app)
    for block in blocks(page):
        for line in commands(block):
            for part in re.split(r"&&|\|\|?|;", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["rerankkit"]:
                    _check_command(group, words[1:], f"{page.name}:{block.line}: {line}")
                elif len(words) > 1 and words[0] == "python" and words[1].endswith(".py"):
                    assert (ROOT / words[1]).is_file(), f"{page.name}: {line}"


def commands(block: Block) -> list[str]:
    return [line[2:] for line in block.text.splitlines() if block.language == "console" and line.startswith("$ ")]


def _check_command(command: Any, words: list[str], where: str) -> None:
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{where}: no verb {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    options = {name: parameter for parameter in command.params for name in parameter.opts}
    positional = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            assert word == "--help" or word in options, f"{where}: no option {word}"
            if word != "--help" and not options[word].is_flag:
                words.pop(0)
        else:
            positional.append(word)
    if command.name == "run" and positional:
        _check_run(positional, where)


def _check_run(positional: list[str], where: str) -> None:
    """Named configs of ours exist and take the overrides."""
    config, *overrides = positional
    if config.startswith("examples/"):
        raw, known = load_config(ROOT / config, overrides)
        make_config(raw, load_plugins(), known)


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {_slug(heading) for heading in headings}, f"{page.name}: no heading for {target}"


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_hook_is_documented() -> None:
    page = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")

    for hook in vars(HookSpecs):
        assert not hook.startswith("rerankkit_") or f"`{hook}`" in page


def test_every_verb_is_documented() -> None:
    group: Any = get_command(app)
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)

    for name, command in group.commands.items():
        for verb in [f"{name} {inner}" for inner in command.commands] if hasattr(command, "commands") else [name]:
            assert f"rerankkit {verb}" in text, f"no page shows `rerankkit {verb}`"


def test_the_config_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], check=False)

    assert done.returncode == 0, "docs/config.md is out of date: run `python docs/generate.py`"


OWN_CONFIGS = [  # the others name parts of distributions under plugins/: tests/test_distributions.py has them
    path for path in sorted((ROOT / "examples" / "configs").glob("*.toml")) if "./plugins/" not in path.read_text()
]


@pytest.mark.parametrize("config", OWN_CONFIGS, ids=lambda path: path.name)
def test_example_configs_parse_and_come_back_from_their_resolved_form(config: Path) -> None:
    raw, where = load_config(config)
    resolved = make_config(raw, load_plugins(), where).resolved()

    assert make_config(resolved, load_plugins()).resolved() == resolved


def test_the_ci_script_finds_the_readme_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    for name in ("run", "test"):
        assert re.search(rf"<!-- command: {name} -->\n```console\n\$ .+\n```", readme)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)

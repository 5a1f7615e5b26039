"""Real installed plugins, most of them broken: each is named, and none costs another anything."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rerankkit.config import make_config
from rerankkit.errors import ConfigError, PluginError
from rerankkit.plugins import ONLY, LoadedPlugin, PluginConfig, Plugins, Register, describe_settings, load_plugins

Install = Callable[..., None]

HEAD = """
from rerankkit.plugins import PluginConfig, Register, hookimpl

class Settings(PluginConfig):
    '''Says nothing.'''
    limit: int = 3
    '''Tokens.'''

def build(config, info):
    return lambda rollouts: []
"""
GOOD = HEAD + "\n@hookimpl\ndef rerankkit_register(register):\n    register.rewards.add('good', Settings, build)\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install("my-plugin", source)` puts a package and its .dist-info where pip would."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.delenv(ONLY, raising=False)
    modules: list[str] = []

    def install(name: str, source: str, *, entry: str = "", entry_points: str = "") -> None:
        module = name.replace("-", "_")
        (site / module).mkdir()
        (site / module / "__init__.py").write_text(textwrap.dedent(source))
        info = site / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(entry_points or f"[rerankkit]\n{entry or name} = {module}\n")
        modules.append(module)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def one(plugins: Plugins, name: str) -> LoadedPlugin:
    """The plugin of that name; there must be exactly one."""
    [found] = [plugin for plugin in plugins.loaded if plugin.name == name]
    return found


def test_a_plugin_in_working_order_is_loaded_after_our_own(install: Install) -> None:
    install("aa-good", GOOD)

    plugins = load_plugins()

    assert [plugin.name for plugin in plugins.loaded] == ["adapters", "gr2", "aa-good"]
    assert one(plugins, "aa-good") == LoadedPlugin("aa-good", "aa_good", "aa-good", "1.2")
    spec = plugins.part("reward", "good", "reward.use")
    assert (spec.plugin, spec.distribution, spec.version) == ("aa-good", "aa-good", "1.2")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import numpy_of_another_world", "ModuleNotFoundError: No module named 'numpy_of_another_world'"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("class Panic(BaseException): pass\nraise Panic('rust')", "Panic: rust"),
        ("def broken(:", "SyntaxError"),
        (HEAD + "@hookimpl\ndef rerankkit_register(registre): pass", "PluginValidationError"),
        (HEAD + "@hookimpl\ndef rerankkit_register(register): 1 / 0", "ZeroDivisionError"),
        (
            HEAD + "@hookimpl\ndef rerankkit_register(register): register.rewards.add('x', dict, build)",
            "reward 'x': its settings must be a subclass of PluginConfig, not <class 'dict'>.",
        ),
        (
            HEAD + "class S(PluginConfig):\n    weight: int = 1\n"
            "@hookimpl\ndef rerankkit_register(register): register.rewards.add('x', S, build)",
            "reward 'x': a block keeps 'weight' for itself; rename that setting.",
        ),
    ],
)
def test_a_broken_plugin_is_named_and_costs_nobody_anything(install: Install, source: str, said: str) -> None:
    install("aa-broken", source)
    install("good", GOOD)

    plugins = load_plugins()

    assert said in one(plugins, "aa-broken").error
    assert one(plugins, "good").error == "" == one(plugins, "gr2").error
    assert plugins.part("reward", "good", "") and plugins.part("optimizer", "dapo", "")
    assert all(plugin.error == "" for plugin in load_plugins(only="gr2,good").loaded)


def test_the_error_says_where_in_the_plugin_it_was_raised(install: Install) -> None:
    install("broken", "\n\nraise ValueError('early')")
    error = one(load_plugins(), "broken").error
    assert error.startswith("ValueError: early (") and error.endswith("broken/__init__.py:3)")


def test_a_plugin_that_breaks_halfway_leaves_no_part_and_no_hook(install: Install) -> None:
    steps = "\n@hookimpl\ndef rerankkit_step(stage): raise AssertionError('called')\n"
    install("half", HEAD + steps + GOOD.removeprefix(HEAD) + "    raise RuntimeError('after the first')\n")

    plugins = load_plugins()

    assert "after the first" in one(plugins, "half").error
    with pytest.raises(PluginError, match="no reward is named 'good'"):
        plugins.part("reward", "good", "reward.use")
    plugins.hooks.rerankkit_step(stage="rl", report=None)


def test_a_duplicate_name_is_an_error_that_names_both_and_displaces_nobody(install: Install) -> None:
    install("aa-copycat", GOOD.replace("'good'", "'gr2'"))

    plugins = load_plugins()

    assert one(plugins, "aa-copycat").error.startswith("two plugins register the reward 'gr2': gr2 and aa-copycat.")
    assert plugins.part("reward", "gr2", "").plugin == "gr2"


def test_two_distributions_with_one_entry_point_name(install: Install) -> None:
    install("first", GOOD, entry="same")
    install("second", GOOD.replace("'good'", "'other'"), entry="same")

    plugins = load_plugins()

    errors = {p.distribution: p.error for p in plugins.loaded if p.name == "same"}
    assert errors == {"first": "", "second": "another plugin has this name: first. Rename one, or uninstall one."}
    assert "other" not in plugins.register.rewards.parts
    # taking the second out again must not take the first's hooks along
    assert len(plugins.hooks.rerankkit_register.get_hookimpls()) == 3


def test_an_older_copy_further_down_the_path_does_not_count(install: Install, tmp_path: Path) -> None:
    install("good", GOOD)
    (tmp_path / "old" / "good-0.9.dist-info").mkdir(parents=True)
    (tmp_path / "old" / "good-0.9.dist-info" / "entry_points.txt").write_text("[rerankkit]\ngood = good\n")
    sys.path.append(str(tmp_path / "old"))
    try:
        assert one(load_plugins(), "good").version == "1.2"
    finally:
        sys.path.remove(str(tmp_path / "old"))


def test_a_misspelt_hook_is_named_with_what_was_meant(install: Install) -> None:
    install("slip", GOOD + "\n@hookimpl\ndef rerankkit_stepp(stage): pass\n")

    plugins = load_plugins()

    assert one(plugins, "slip").warning == (
        "rerankkit_stepp is not a hook and is never called; known: rerankkit_register, rerankkit_report, "
        "rerankkit_step. Did you mean 'rerankkit_step'?"
    )
    assert plugins.part("reward", "good", "")


def test_a_hook_without_hookimpl_is_named_where_its_part_is_missed(install: Install) -> None:
    install("bare", GOOD.replace("@hookimpl\n", ""))

    plugins = load_plugins()

    said = "rerankkit_register lacks the @hookimpl decorator and is never called; add it."
    assert one(plugins, "bare").warning == said
    with pytest.raises(ConfigError, match="plugin bare") as caught:
        make_config({"reward": {"use": "good"}}, plugins)
    assert said in str(caught.value)


def test_a_config_that_names_a_part_of_a_broken_plugin_says_so(install: Install) -> None:
    install("my-rewards", "import torch_of_another_world")

    with pytest.raises(ConfigError) as caught:
        make_config({"reward": [{"use": "gr2"}, {"use": "brevity"}]}, load_plugins())

    message = str(caught.value)
    assert message.startswith("config: reward[1].use: no reward is named 'brevity'; known: auc, citations,")
    assert "plugin my-rewards (my-rewards) is not in order: ModuleNotFoundError" in message


@pytest.mark.parametrize("text", ["[rerankkit]\nno equals sign\n", "[rerankkit]\nx = not a reference\n"])
def test_entry_points_that_cannot_be_read(install: Install, text: str) -> None:
    install("mangled", "", entry_points=text)
    plugins = load_plugins()
    [broken] = [plugin for plugin in plugins.loaded if plugin.error]
    assert broken.distribution == "mangled"
    assert plugins.part("reward", "gr2", "")


def test_damage_in_somebody_elses_distribution_is_not_ours(install: Install, tmp_path: Path) -> None:
    other = tmp_path / "site" / "other-1.dist-info"
    other.mkdir()
    (other / "entry_points.txt").write_bytes(b"\xff\xfe")
    assert [plugin.name for plugin in load_plugins().loaded] == ["adapters", "gr2"]


def test_printing_at_import_goes_to_stderr(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("loud", "print('hello')\n" + GOOD)
    load_plugins()
    assert capsys.readouterr() == ("", "hello\n")


def test_the_variable_limits_what_is_loaded(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("good", GOOD)
    install("never", "raise AssertionError('imported')")
    monkeypatch.setenv(ONLY, "gr2, goood")

    plugins = load_plugins()

    assert [(plugin.name, bool(plugin.error)) for plugin in plugins.loaded] == [("gr2", False), ("goood", True)]
    assert "Did you mean 'good'?" in one(plugins, "goood").error
    monkeypatch.setenv(ONLY, "")
    assert load_plugins().loaded == ()


def test_a_single_file_is_a_plugin_for_one_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(GOOD)

    plugins = load_plugins([file])

    spec = plugins.part("reward", "good", "")
    assert (spec.plugin, spec.distribution) == ("mine", str(file))
    changed = file.write_text(GOOD + "# a word\n")
    assert changed and load_plugins([file]).part("reward", "good", "").version != spec.version


def test_single_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "gr2.py").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("text")
    files = [tmp_path / "absent.py", tmp_path / "notes.txt", tmp_path, tmp_path / "gr2.py"]

    plugins = load_plugins(files)

    adapters, gr2, *errors = (plugin.error for plugin in plugins.loaded)
    assert adapters == gr2 == ""
    said = ["does not exist", "is not a Python file", "does not exist", "another plugin has this name: rerankkit"]
    assert all(part in error for part, error in zip(said, errors, strict=True))
    assert len(plugins.hooks.rerankkit_register.get_hookimpls()) == 2  # our own two


def test_hooks_are_called_with_what_they_ask_for(tmp_path: Path) -> None:
    file = tmp_path / "watcher.py"
    file.write_text(HEAD + "seen = []\n@hookimpl\ndef rerankkit_step(stage): seen.append(stage)\n")
    plugins = load_plugins([file])
    plugins.hooks.rerankkit_step(stage="rl", report=None)
    assert sys.modules["rerankkit_file_watcher"].seen == ["rl"]


def test_a_name_is_taken_once_within_one_plugin_too() -> None:
    register = Register()
    register.rewards.add("x", PluginConfig, lambda config, info: list)  # type: ignore[arg-type, return-value]
    with pytest.raises(PluginError, match="'x'"):
        register.rewards.add("x", PluginConfig, lambda config, info: list)  # type: ignore[arg-type, return-value]


class Base(PluginConfig):
    limit: int = 3
    """Tokens."""
    other: float = 0.5


class Derived(Base):
    limit: int = 4
    other: float = 0.25
    """Share, said
    only here."""
    name: str


def test_settings_are_described_from_the_strings_under_them() -> None:
    assert describe_settings(Derived) == [
        {"name": "limit", "type": "int", "default": "4", "documentation": "Tokens."},
        {"name": "other", "type": "float", "default": "0.25", "documentation": "Share, said only here."},
        {"name": "name", "type": "str", "default": "required", "documentation": ""},
    ]


LAZY = """
from rerankkit.plugins import Register, hookimpl

@hookimpl
def rerankkit_register(register: Register) -> None:
    register.rewards.lazy("later", "{module}:build", "made when asked for")
"""


def test_a_lazy_part_is_imported_only_when_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "later_parts.py").write_text(
        "from rerankkit import PluginConfig, RewardFn, RunInfo\n"
        "class S(PluginConfig):\n    k: int = 3\n"
        "def build(config: S, info: RunInfo) -> RewardFn:\n    return config.k\n"
    )
    (tmp_path / "lazy.py").write_text(LAZY.format(module="later_parts"))
    found = load_plugins([tmp_path / "lazy.py"], only="")
    spec = found.register.rewards.parts["later"]
    assert spec.summary == "made when asked for" and "later_parts" not in sys.modules
    assert spec.config.__name__ == "S" and "later_parts" in sys.modules
    assert make_config({"reward": {"use": "later", "k": 5}}, load_plugins([tmp_path / "lazy.py"])).reward[
        0
    ].config.model_dump() == {"k": 5}


def test_a_lazy_part_that_cannot_be_imported_is_a_fault_of_the_config_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "lazy.py").write_text(LAZY.format(module="nowhere_to_be_found"))
    with pytest.raises(PluginError, match="nowhere_to_be_found"):
        make_config({"reward": {"use": "later"}}, load_plugins([tmp_path / "lazy.py"]))

"""What docs/compatibility.md promises: old plugins and old configs go on working."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from rerankkit import protocols, types
from rerankkit.config import make_config
from rerankkit.errors import ConfigError
from rerankkit.plugins import HookSpecs, PluginConfig, load_plugins

RECORDS = {
    "Item": "item_id title categories description brand price sid",
    "Interaction": "user_id item_id timestamp rating",
    "Catalog": "items embeddings pairs side",
    "RerankExample": "example_id user_id history candidates relevance",
    "Ranking": "order parse problem",
    "Trace": "example_id reasoning order provenance",
    "TraceFailure": "example_id reason attempts",
    "Rollout": "example text reasoning ranking token_ids logps allowed_ids num_reasoning_tokens group origin beam_rank "
    "truncated",
    "Reward": "value parts",
    "NotApplicable": "reason",
    "Failed": "reason",
    "StepReport": "step metrics rollouts outcomes",
    "SidSurface": "begin end prefix",
    "RunInfo": "seed device precision work surface progress log tokens_per_pass",
}
"""Fields as version 0.1 had them, in order."""
HOOKS = {"rerankkit_register": "register", "rerankkit_step": "stage report", "rerankkit_report": "report"}
"""Arguments as version 0.1 had them."""
METHODS = {
    "Tokenizer": "codebook_sizes encode fit load save",
    "Teacher": "write",
    "RewardFn": "__call__",
    "PolicyOptimizer": "optimize",
}
"""All that a part must have: more would break every part there is."""


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_only_grows_at_its_end_and_by_fields_with_defaults(name: str) -> None:
    fields = dataclasses.fields(getattr(types, name))
    old = RECORDS[name].split()

    assert [field.name for field in fields[: len(old)]] == old
    for field in fields[len(old) :]:
        assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING, field.name


def test_hooks_lose_no_argument() -> None:
    for hook, arguments in HOOKS.items():
        assert set(arguments.split()) <= set(inspect.signature(getattr(HookSpecs, hook)).parameters)


def test_a_hook_written_before_an_argument_existed_is_called(tmp_path: Path) -> None:
    """`rerankkit_step` has two arguments; this plugin knows of one, as if the other had come later."""
    plugin = tmp_path / "old.py"
    plugin.write_text(
        "from rerankkit import hookimpl\nseen = []\n\n@hookimpl\ndef rerankkit_step(report):\n    seen.append(report)\n"
    )
    plugins = load_plugins([plugin], only="")

    plugins.hooks.rerankkit_step(stage="rl", report=types.StepReport(1, {}))

    import sys

    assert [report.step for report in sys.modules["rerankkit_file_old"].seen] == [1]


@pytest.mark.parametrize("name", METHODS)
def test_protocols_ask_for_no_more_methods(name: str) -> None:
    protocol = getattr(protocols, name)
    own = [method for method in vars(protocol) if not method.startswith("_") or method == "__call__"]

    assert sorted(own) == METHODS[name].split()


class Renamed(PluginConfig):
    """Settings, one of which was called limit."""

    renamed: ClassVar[Mapping[str, str]] = {"limit": "max_tokens"}
    max_tokens: int = 200
    """Tokens."""


def test_an_old_name_is_read_with_a_warning_and_the_new_one_without() -> None:
    with pytest.warns(FutureWarning, match="Renamed: the setting 'limit' is called 'max_tokens' now; use the new name"):
        assert Renamed.model_validate({"limit": 7}).max_tokens == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Renamed.model_validate({"max_tokens": 7}).max_tokens == 7
    with pytest.raises(ValueError, match="'limit' is the old name of 'max_tokens'; give one of them"):
        Renamed.model_validate({"limit": 7, "max_tokens": 8})


def test_a_config_with_an_old_name_runs_and_is_resolved_under_the_new_one(tmp_path: Path) -> None:
    plugin = tmp_path / "old_name.py"
    plugin.write_text(
        "from __future__ import annotations\nfrom collections.abc import Mapping\nfrom typing import ClassVar\n"
        "from rerankkit import PluginConfig, hookimpl\n\nclass Settings(PluginConfig):\n    '''Mine.'''\n"
        "    renamed: ClassVar[Mapping[str, str]] = {'limit': 'max_tokens'}\n    max_tokens: int = 200\n\n"
        "@hookimpl\ndef rerankkit_register(register):\n    register.rewards.add('old-name', Settings, build)\n\n"
        "def build(config, info):\n    return None\n"
    )
    plugins = load_plugins([plugin])
    block = {"use": "old-name", "limit": 7}

    with pytest.warns(FutureWarning, match="is called 'max_tokens' now"):
        config = make_config({"reward": [block]}, plugins)

    assert config.reward[0].resolved() == {"use": "old-name", "weight": 1.0, "max_tokens": 7}
    with pytest.raises(ConfigError, match=r"reward\[0\]\.lmit: no such key"):
        make_config({"reward": [{"use": "old-name", "lmit": 7}]}, plugins)

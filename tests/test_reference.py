"""Nothing that a plugin may rely on is missing from the documentation."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import rerankkit
from rerankkit import protocols, types
from rerankkit.adapters import COLUMNS
from rerankkit.config import RunConfig
from rerankkit.math.metrics import METRICS
from rerankkit.part_config import PluginConfig, describe_settings
from rerankkit.plugins import HookSpecs, load_plugins
from rerankkit.testing import make_catalog
from rerankkit.testing.rules import RULES

DOCS = Path(__file__).parent.parent / "docs"
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["rerankkit", "rerankkit.testing", "rerankkit.adapters", "rerankkit.lm"])
def test_every_public_name_is_there_and_can_be_imported(module: str) -> None:
    home = import_module(module)
    section = REFERENCE.partition(f"\n### {module}\n")[2].partition("\n### ")[0]

    assert [name for name in home.__all__ if f"| `{name}` |" not in section] == []
    assert all(getattr(home, name) is not None for name in home.__all__)


def test_every_hook_method_record_rule_metric_and_column_is_there() -> None:
    hooks = [name for name in vars(HookSpecs) if name.startswith("rerankkit_")]
    methods = [
        name
        for protocol in vars(protocols).values()
        if getattr(protocol, "__module__", "") == "rerankkit.protocols"
        for name in vars(protocol)
        if not name.startswith("_") or name == "__call__"
    ]
    records = [value for value in vars(types).values() if hasattr(value, "__dataclass_fields__")]
    fields = [name for record in records for name in record.__dataclass_fields__]
    rules = [rule.__name__ for rules in RULES.values() for rule in rules]

    for name in [*hooks, *methods, *fields, *rules, *METRICS, *COLUMNS]:
        assert f"| `{name}` |" in REFERENCE, name
    for record in records:
        assert f"\n### {record.__name__}\n" in REFERENCE
    assert len(records) >= 14


def test_what_is_public_says_what_it_is() -> None:
    for name in rerankkit.__all__:
        if name != "Sid" and name != "Outcome":  # aliases
            assert (getattr(rerankkit, name).__doc__ or "").strip(), name


def blocks() -> list[type[PluginConfig]]:
    """Every class of settings: core's blocks, all shipped parts, and the blocks inside them."""
    from typing import get_args, get_type_hints

    found: list[type[PluginConfig]] = []

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, PluginConfig) and annotation not in found:
            found.append(annotation)
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for argument in get_args(annotation):
            visit(argument)

    for hint in get_type_hints(RunConfig).values():
        visit(hint)
    for slot in load_plugins(only="gr2,adapters").register.slots():
        for part in slot.parts.values():
            visit(part.config)
    return found


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.__name__)
def test_every_setting_is_documented_and_in_the_reference(block: type[PluginConfig]) -> None:
    page = (DOCS / "config.md").read_text(encoding="utf-8")

    for row in describe_settings(block):
        if row["name"] != "use":
            assert row["documentation"], f"{block.__name__}.{row['name']} has no string under it"
            assert f"| `{row['name']}` |" in page or f".{row['name']}]" in page, f"{block.__name__}.{row['name']}"


def test_every_key_of_a_scorecard_is_documented() -> None:
    import numpy as np

    from rerankkit.stages.scorecard import make_scorecard

    class Telling:
        def reconstruct(self, codes: Any) -> Any:
            return np.zeros((len(codes), 8), dtype=np.float32)

        def facts(self) -> dict[str, int]:
            return {"mine": 1}

    catalog = make_catalog(48)
    codes = np.array([divmod(n // 2, 8) for n in range(48)])  # pairs share a SID: there are collisions
    card = make_scorecard(codes, (8, 8), catalog, Telling(), seed=0)  # type: ignore[arg-type]
    page = (
        (DOCS / "semantic-ids.md").read_text(encoding="utf-8").partition("## The same as JSON")[2].partition("\n## ")[0]
    )

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for inner in value.values() for key in keys(inner)}
        return {key for inner in value for key in keys(inner)} if isinstance(value, list) else set()

    assert card["collisions"] and card["tree"] and card["purity"] and card["equal"]
    assert {key for key in keys(card) - {"mine"} if f"`{key}`" not in page} == set()
    assert set(re.findall(r"^\| `(\w+)`", page, re.M)) <= set(card)


def test_every_metric_that_a_shipped_optimizer_logs_is_documented() -> None:
    """In a page's table, by its name: `entropy`, `rewards/NAME/mean` or `time/*`."""
    from rerankkit.testing import make_example, make_policy
    from rerankkit.testing.rules import _even
    from rerankkit.types import RunInfo

    if not (DOCS / "reinforcement.md").is_file():
        pytest.skip("the page that documents them is not here yet")
    told = {name for page in DOCS.glob("*.md") for name in re.findall(r"`([^`\s]+)`", page.read_text(encoding="utf-8"))}
    patterns = [re.sub(r"\\\*|[A-Z]{3,}", "[^ ]+", re.escape(name)) for name in told]
    few = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 90}

    for spec in load_plugins(only="gr2").register.optimizers.parts.values():
        optimizer = spec.build(spec.config(**few), RunInfo())
        [report] = optimizer.optimize(make_policy(), [make_example(0), make_example(3)], _even, RunInfo())
        missing = [name for name in report.metrics if not any(re.fullmatch(pattern, name) for pattern in patterns)]
        assert missing == [], f"{spec.name} logs what no page explains"

"""Nothing that a plugin may rely on is missing from the documentation."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest

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


PACKAGES = ["rerankkit", "rerankkit.testing", "rerankkit.adapters", "rerankkit.lm"]
MODULES = ["rerankkit.gates"] + [
    f"{package}.{inner.name}"
    for package in ("rerankkit.math", "rerankkit.text")
    for inner in iter_modules(import_module(package).__path__)
]
NOT_EXPLAINED = {
    *("Any", "Callable", "ClassVar", "ContextManager", "False", "Iterable", "Iterator", "Literal", "Mapping", "None"),
    *(
        "Concatenate",
        "ModuleType",
        "NDArray",
        "Path",
        "Sequence",
        "Tensor",
        "True",
        "AdamW",
        "Optimizer",
        "Module",
    ),  # others' types
    *("C", "F", "P", "R", "T"),  # type variables
    *("Evaluate", "SidTable", "Spaces", "Dataset", "CandidateLists", "Mean"),  # fields for ourselves
    *("AnswerPieces", "State"),  # of a mask: to be handed back
    *("OptimizerTrial", "RewardTrial", "TeacherTrial", "TokenizerTrial"),  # RULES take them apart
}


def public(module: str) -> dict[str, Any]:
    home = import_module(module)
    if module in PACKAGES:
        return {name: getattr(home, name) for name in home.__all__}
    own = {name for name, value in vars(home).items() if getattr(value, "__module__", "") == module and callable(value)}
    return {name: getattr(home, name) for name in own | set(home.__annotations__) if not name.startswith("_")}


def members(kind: Any) -> dict[str, Any]:
    """Public methods and properties of a class and of our own classes that it builds on, as functions."""
    found: dict[str, Any] = {}
    owners = kind.__mro__ if inspect.isclass(kind) else ()
    for owner in [owner for owner in owners if owner.__module__.startswith("rerankkit")]:
        for name, value in list(vars(owner).items()):
            function = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
            is_field = name in getattr(kind, "__dataclass_fields__", ())
            is_public = name == "__call__" or not name.startswith(("_", "test_"))
            if inspect.isfunction(function) and is_public and not is_field:
                found.setdefault(name, function)
    return found


def entries(module: str) -> dict[str, str]:
    """Name -> all that its section says of it, for a section of the public names; each name is there once."""
    section = REFERENCE.partition(f"\n### {module}\n")[2].partition("\n### ")[0]
    found = re.findall(r"^- `(\w+)(.*(?:\n  .*)*)", section, re.M)
    names = [name for name, _ in found] + re.findall(r"\[`(\w+)`\]\(#\w+\)", section)
    assert [name for name, count in Counter(names).items() if count > 1] == []
    return {**dict.fromkeys(names, ""), **dict(found)}


@pytest.mark.parametrize("module", [*PACKAGES, *MODULES])
def test_every_public_name_is_there_once_and_can_be_imported(module: str) -> None:
    known, told = public(module), entries(module)

    assert [name for name in known if name not in told] == []
    assert all(value is not None for value in known.values())


@pytest.mark.parametrize("module", [*PACKAGES, *MODULES])
def test_what_is_public_says_what_it_is(module: str) -> None:
    told = entries(module)

    for name, value in public(module).items():
        if not inspect.isclass(value) and not inspect.isroutine(value):
            assert told[name].partition("\n")[2].strip(), f"{name} has no string under it"
            continue
        inside = {f"{name}.{inner}": function for inner, function in members(value).items()}
        for path, part in {name: value, **inside}.items():
            assert (part.__doc__ or "").strip(), f"{path} has no docstring"
            assert not part.__doc__.startswith(f"{name}("), f"{path} has the docstring that a dataclass makes"


@pytest.mark.parametrize("module", [*PACKAGES, *MODULES])
def test_signatures_are_python_and_those_of_the_code(module: str) -> None:
    told = entries(module)
    above = REFERENCE.partition("\n## Public names\n")[0]

    def arguments(typed: str, function: Any) -> None:
        [shown] = ast.parse(f"def {typed}: ...").body
        assert isinstance(shown, ast.FunctionDef)
        names = {arg.arg for arg in ast.walk(shown.args) if isinstance(arg, ast.arg)}
        assert names == set(inspect.signature(function).parameters) - {"self", "cls"}, typed

    for name, value in public(module).items():
        if inspect.isroutine(value):
            arguments(name + told[name].partition("`")[0], value)
        for inner, function in members(value).items():
            if told[name]:
                [typed] = re.findall(rf"^  - `(?:{name}\.)?({inner}\b.*)`", told[name], re.M)
            else:  # a record or a protocol: it has a table
                section = above.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
                [typed] = re.findall(rf"^\| `{inner}` \| `(.*?)` \|", section, re.M)
                typed = (inner if typed.startswith("(") else f"{inner}: ") + typed.replace("\\|", "|")
            if typed.startswith(f"{inner}("):
                arguments(typed, function)
            else:
                ast.parse(typed)


def test_every_function_and_type_in_a_signature_is_explained() -> None:
    names = REFERENCE.partition("\n## Public names\n")[2]
    typed = " ".join(re.findall(r"^ *- `(.*)`", names, re.M))
    types_named = set(re.findall(r"\b[A-Z]\w*", re.sub(r'"[^"]*"', "", typed)))
    explained = {*re.findall(r"^### (\w+)", REFERENCE, re.M), *re.findall(r"^- `(\w+)", names, re.M)}

    assert types_named - explained == NOT_EXPLAINED
    assert re.findall(r"^ *- `[\w.]+\(.*`$", names, re.M) == []  # a function, and nothing below it


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

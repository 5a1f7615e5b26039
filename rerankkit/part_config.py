"""The base of every part's settings, and how they describe themselves. The one light module that needs pydantic."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class PluginConfig(BaseModel):
    """Base of every part's settings: frozen, unknown keys refused, the string under a field is its documentation."""

    # The strings under fields are read by `describe_settings` when somebody asks: pydantic's own way of reading them,
    # and building validators at once, would double the time of `rerankkit plugins list`.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Old name of a setting -> what it is called now: the old one is read, with a FutureWarning."""

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, given: Any) -> Any:
        if not cls.renamed or not isinstance(given, dict):
            return given
        for old, new in cls.renamed.items():
            if old in given:
                if new in given:
                    raise ValueError(f"{old!r} is the old name of {new!r}; give one of them")
                told = f"{cls.__name__}: the setting {old!r} is called {new!r} now; use the new name"
                warnings.warn(told, FutureWarning, stacklevel=2)
                given = {**{key: value for key, value in given.items() if key != old}, new: given[old]}
        return given


def describe_settings(config: type[PluginConfig]) -> list[dict[str, str]]:
    """name, type, default and documentation (the string under the field) of every setting."""
    about = _field_documentation(config)
    rows: list[dict[str, str]] = []
    for name, setting in config.model_fields.items():
        required = setting.is_required()
        default = "required" if required else _shown(setting.get_default(call_default_factory=True))
        kind = str(getattr(setting.annotation, "__name__", "")) if isinstance(setting.annotation, type) else ""
        kind = kind or re.sub(r"\b\w+\.", "", str(setting.annotation))
        documentation = setting.description or about.get(name, "")
        rows.append({"name": name, "type": kind, "default": default, "documentation": documentation})
    return rows


def _field_documentation(config: type[PluginConfig]) -> dict[str, str]:
    """Field -> the string literal under it, in the class or the nearest base that documents it."""
    import ast
    import inspect
    import textwrap

    found: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not issubclass(owner, PluginConfig) or owner is PluginConfig:
            continue
        try:
            [tree] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, ValueError, SyntaxError):
            continue
        for field_, text in pairwise(getattr(tree, "body", [])):
            if isinstance(field_, ast.AnnAssign) and isinstance(field_.target, ast.Name) and isinstance(text, ast.Expr):
                value = getattr(text.value, "value", None)
                if isinstance(value, str):
                    found[field_.target.id] = " ".join(value.split())
    return found


def _shown(value: Any) -> str:
    import json

    return json.dumps(value.model_dump(mode="json") if isinstance(value, BaseModel) else value, default=str)

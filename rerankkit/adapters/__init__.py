"""Bridges to other libraries' shapes, both ways; none of them is imported, and none has to be installed.

- `as_trl`, `trl_rows`: our rewards as TRL reward functions, and the data set rows they read;
- `from_trl`, `from_verifiers`, `from_verl`: reward functions written for those libraries, as ours;
- `Reranker`: a trained run behind the interface that the rerankers library made common.

In a config the three are `use = "trl"`, `"verifiers"` and `"verl"`, with `function = "module:name"`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rerankkit.adapters.columns import COLUMNS
    from rerankkit.adapters.rank import Document, RankedResults, Reranker, Result
    from rerankkit.adapters.rewards_in import from_trl, from_verifiers, from_verl
    from rerankkit.adapters.rewards_out import as_trl, trl_rows

_HOMES = {
    "columns": "COLUMNS",
    "rank": "Document RankedResults Reranker Result",
    "rewards_in": "from_trl from_verifiers from_verl",
    "rewards_out": "as_trl trl_rows",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "COLUMNS",
    "Document",
    "RankedResults",
    "Reranker",
    "Result",
    "as_trl",
    "from_trl",
    "from_verifiers",
    "from_verl",
    "trl_rows",
]


def __getattr__(name: str) -> Any:
    # Looked up when asked for: the plugin of this package is loaded for every command, and pays for none of them.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rerankkit.adapters.{_HOME_OF[name]}"), name)

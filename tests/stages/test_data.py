"""The data stage: what tables must hold to be worth a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from rerankkit.config import TableData
from rerankkit.errors import DataError
from rerankkit.stages.data import make_dataset
from rerankkit.types import RunInfo


def test_a_catalogue_of_one_item_cannot_be_ranked(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\ncomb,Comb\n")
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\nann,comb,1\nben,comb,2\n")
    with pytest.raises(DataError, match="the catalogue has 1 item; there must be two"):
        make_dataset(TableData(use="tables", folder=str(tmp_path), k_core=0), {}, info=RunInfo())

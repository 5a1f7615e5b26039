from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rerankkit import Catalog, RunInfo
from rerankkit.testing import check_imports, check_tokenizer, make_catalog

import rerankkit_rectokens
from rerankkit_rectokens.plugin import RecTokensConfig, build
from rerankkit_rectokens.tokenizer import RecTokens

SOURCES = sorted(Path(rerankkit_rectokens.__file__).parent.glob("*.py"))


def small(**settings: object) -> RecTokens:
    tokenizer = build(RecTokensConfig.model_validate({"levels": 2, "codes": 8, **settings}), RunInfo())
    assert isinstance(tokenizer, RecTokens)
    return tokenizer


def part(catalog: Catalog, start: int, end: int) -> Catalog:
    return Catalog(catalog.items[start:end], catalog.embeddings[start:end], np.empty((0, 2), dtype=np.int64))


def test_keeps_the_contract() -> None:
    check_tokenizer(small())


def test_nobody_shares_a_sid_and_like_items_share_all_but_the_last_code() -> None:
    whole = make_catalog(48)
    vectors = whole.embeddings.copy()
    vectors[5] = vectors[3]  # no quantiser can tell these two apart

    tokenizer = small()
    tokenizer.fit(Catalog(whole.items, vectors, whole.pairs))
    codes = tokenizer.encode(Catalog(whole.items, vectors, whole.pairs))

    assert len({tuple(row) for row in codes.tolist()}) == 48
    assert codes[3, :2].tolist() == codes[5, :2].tolist()
    assert codes[3, 2] < codes[5, 2]  # the earlier item, the lower number


def test_new_items_take_what_is_free_and_move_nobody(tmp_path: Path) -> None:
    whole, tokenizer = make_catalog(48), small()
    tokenizer.fit(part(whole, 0, 40))
    before = tokenizer.encode(part(whole, 0, 40))
    tokenizer.save(tmp_path)
    later = small()
    later.load(tmp_path)

    codes = later.encode(whole)

    assert codes[:40].tolist() == before.tolist()
    assert len({tuple(row) for row in codes.tolist()}) == 48
    assert later.encode(part(whole, 40, 48)).tolist() == codes[40:].tolist()


def test_codes_gather_like_items() -> None:
    """Two clumps far apart: the first code tells them from one another, whatever else it does."""
    whole, tokenizer = make_catalog(48), small()
    vectors = whole.embeddings * 0.1
    vectors[:24, 0] += 10
    tokenizer.fit(Catalog(whole.items, vectors, whole.pairs))

    first = tokenizer.encode(Catalog(whole.items, vectors, whole.pairs))[:, 0].tolist()

    assert not {*first[:24]} & {*first[24:]}


def test_says_which_setting_to_change() -> None:
    same = Catalog(make_catalog(20).items, np.ones((20, 4), dtype=np.float32), np.empty((0, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"over 8 items at .*; set tokenizer\.codes higher"):
        small().fit(same)


def test_leaves_the_precision_of_matrix_products_alone() -> None:
    code = "import torch, rerankkit_rectokens.tokenizer; print(torch.get_float32_matmul_precision())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "highest\n"


def test_imports_only_what_is_public_and_nothing_heavy_to_register() -> None:
    check_imports("rerankkit_rectokens", "torch", "numpy", "rectokens")


def test_is_under_sixty_lines_of_code() -> None:
    """Lines with code on them: neither blank, nor comment, nor docstring."""
    lines = 0
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        told = {
            line
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for line in range(node.lineno, (node.end_lineno or 0) + 1)
        }
        text = path.read_text(encoding="utf-8").splitlines()
        lines += sum(bool(line.split("#")[0].strip()) and number not in told for number, line in enumerate(text, 1))
    assert lines < 60, lines

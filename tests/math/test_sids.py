from __future__ import annotations

import json

import numpy as np
import pytest

from rerankkit.math.sids import sid_scorecard


def test_by_hand() -> None:
    # items 0 and 1 share a SID: 3 distinct of 4, 2 of 4 own theirs
    card = sid_scorecard(np.array([[0, 0], [0, 0], [0, 1], [1, 0]]), (2, 4))
    assert card["num_items"] == 4
    assert card["distinct_share"] == 0.75
    assert card["own_share"] == 0.5
    assert card["largest_collision"] == 2
    assert card["distinct_prefixes"] == [2, 3]
    # both levels hold 3/4 and 1/4: entropy .75 * log2(4/3) + .25 * 2 = .811278
    for level, size in zip(card["levels"], (2, 4), strict=True):
        assert (level["size"], level["used"]) == (size, 2)
        assert level["entropy"] == pytest.approx(0.811278, abs=1e-6)
        assert level["perplexity"] == pytest.approx(2**0.811278, abs=1e-5)
    assert json.loads(json.dumps(card)) == card


def test_all_unique_and_even() -> None:
    card = sid_scorecard(np.array([[a, b] for a in range(4) for b in range(2)]), (4, 2))
    assert card["distinct_share"] == card["own_share"] == card["largest_collision"] == 1
    assert [level["entropy"] for level in card["levels"]] == [2.0, 1.0]


@pytest.mark.parametrize("sids", [np.zeros((0, 2), int), np.zeros((3, 1), int), np.zeros(3, int)])
def test_shapes_are_named(sids: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\[N, L\]"):
        sid_scorecard(sids, (2, 2))


@pytest.mark.parametrize("code", [-1, 2])
def test_a_code_outside_its_codebook_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="codebook"):
        sid_scorecard(np.array([[0, code]]), (2, 2))

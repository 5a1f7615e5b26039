"""What candidates are made from, where there are too few."""

from __future__ import annotations

import pytest

from rerankkit.config import PopularityLists
from rerankkit.errors import DataError
from rerankkit.stages.candidates import make_candidates
from rerankkit.types import RunInfo
from tests.data.conftest import Make, make

__all__ = ["make"]


def test_a_catalogue_too_small_for_the_lists_is_told_with_the_size_that_fits(make: Make) -> None:
    # Eight items. Fewest are known to who is listed at the first training step: a, b -> six are new.
    dataset = make({"u1": "abcde", "u2": "abcfg", "u3": "abcdh"})
    info = RunInfo(seed=1)
    with pytest.raises(DataError, match=r"size is 7, but of 8 items .* no user has more than 6 .*candidates\.size = 6"):
        make_candidates(PopularityLists(size=7), 6, {}, dataset, None, None, info=info)
    lists = make_candidates(PopularityLists(size=6), 6, {}, dataset, None, None, info=info)
    assert max(len(one.candidates) for one in lists) == 6

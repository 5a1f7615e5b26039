from __future__ import annotations

import numpy as np
import pytest

from rerankkit.testing import make_catalog, make_example, make_item, make_rollout, make_world
from rerankkit.types import Parse


def test_items_differ_in_id_title_and_sid() -> None:
    items = [make_item(number) for number in range(512)]

    # three codes of eight each: 8 * 8 * 8 = 512 different SIDs
    assert len({item.sid for item in items}) == len({item.item_id for item in items}) == 512
    assert len({item.title for item in items}) == 512


def test_an_example_has_its_target_where_it_was_asked_for() -> None:
    assert make_example(3).target_index == 3
    assert make_example(None).target_index is None
    assert make_example(relevance=(0, 1, 2)).target_index == 2
    with pytest.raises(ValueError, match="target 5 is not a place in a list of 4"):
        make_example(5, num_candidates=4)


def test_a_rollout_is_read_as_a_run_would_read_it() -> None:
    example = make_example(1, num_candidates=3)

    told = make_rollout(example, (1, 0, 2), reasoning="Same brand.", num_tokens=7)
    unread = make_rollout(example, text="no idea")
    repaired = make_rollout(example, text=make_rollout(example, (2, 0, 1)).text.replace("}", ""))

    assert (told.ranking.order, told.ranking.parse, told.reasoning) == ((1, 0, 2), Parse.OK, "Same brand.")
    assert (len(told.token_ids), told.num_reasoning_tokens) == (7, 3)
    assert make_rollout(example).ranking.identity
    assert unread.ranking.parse is Parse.FAILED
    assert (repaired.ranking.parse, repaired.ranking.order) == (Parse.REPAIRED, (2, 0, 1))


def test_a_catalogue_is_the_same_every_time() -> None:
    first, second = make_catalog(20, dim=4), make_catalog(20, dim=4)

    assert first.embeddings.shape == (20, 4)
    assert np.array_equal(first.embeddings, second.embeddings)
    assert first.pairs.tolist()[:2] == [[0, 1], [1, 2]]


def test_the_tiny_world_has_what_parts_are_given() -> None:
    world = make_world(30)

    examples = world.examples()

    assert len(world.catalog.items) == len(world.dataset.items) == len(world.catalog.embeddings)
    assert examples and all(example.target_index is not None and len(example.candidates) == 10 for example in examples)
    assert all(item.sid for example in examples for item in (*example.history, *example.candidates))
    assert world.examples()[0] == make_world(30).examples()[0]

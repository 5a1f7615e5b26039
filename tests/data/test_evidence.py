"""Evidence by hand, its leak-proof training lists, and what it is worth on real data."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rerankkit.data.dataset import Dataset
from rerankkit.data.evidence import Evidence
from rerankkit.data.lists import CandidateList, CandidateLists
from rerankkit.data.prerankers import Popularity, make_lists
from rerankkit.types import Item
from tests.data.conftest import Make

ALL = ("alike", "last", "together", "brand", "kind")
NEAR = ("beside", "follows", "taste")


def told(dataset: Dataset, **items: Item) -> Dataset:
    return replace(dataset, items=tuple(items.get(item.item_id, item) for item in dataset.items))


def test_by_hand(make: Make) -> None:
    # training sequences: abc, abc, bd; at test also the validation step: abcd, abce, bda
    dataset = make({"u1": "abcdx", "u2": "abcex", "u3": "bdax"})
    dataset = told(
        dataset,
        a=Item("a", "rose soap", ("Bath", "Soap"), brand="Norda"),
        b=Item("b", "rose water", ("Bath", "Water"), brand="norda"),
        c=Item("c", "comb", ("Hair", "Comb"), brand="Velis"),
        d=Item("d", "rose soap", ("Bath", "Soap"), brand="Norda"),
        e=Item("e", "", ()),
    )
    ((d, e),) = Evidence(dataset, ALL).about([("a", "b", "c")], [("d", "e")])
    # d is a's twin: a cosine of 1 is cut to 9; c, the last item, shares no word and no category with it
    assert d["alike"] == 9 and d["last"] == 0 and d["kind"] == 0
    assert d["brand"] == 2  # a and b, whatever the case
    # d within five steps of a: u1, u3; of b: u1, u3; of c: u1: log2(1 + 5) = 2.58
    assert d["together"] == 2
    # e with each of a, b, c once (u2): log2(1 + 3) = 2
    assert e == {"alike": 0, "last": 0, "together": 2, "brand": 0, "kind": 0}


def test_categories_are_shared_from_the_broadest_on(make: Make) -> None:
    dataset = make({"u1": "abcd"})
    dataset = told(
        dataset,
        a=Item("a", "", ("Bath", "Soap", "Bar")),
        b=Item("b", "", ("Bath", "Soap", "Gel")),
        c=Item("c", "", ("Hair", "Soap", "Bar")),
    )
    ((b, c),) = Evidence(dataset, ("kind",)).about([("a",)], [("b", "c")])
    assert (b["kind"], c["kind"]) == (2, 0)


@pytest.mark.parametrize("max_history", [1, 2, 50])
def test_training_lists_know_nothing_of_the_listed_step_or_later(max_history: int, shop: Dataset) -> None:
    """Attached evidence equals what a dataset without the user's steps from the listed one on says."""
    popular = Popularity(shop, refit=False)
    lists = make_lists(shop, popular, size=4, max_history=max_history, earlier_steps=2, splits=("train",))
    made = Evidence(shop, ALL).attached(lists)
    assert made.of("train")
    for one in made.of("train"):
        histories = {
            user: history[: one.step] if user == one.user_id else history[: shop.splits[user][0]]
            for user, history in shop.histories.items()
        }
        cut = Dataset(shop.items, histories, {user: (len(h), len(h)) for user, h in histories.items()})
        (facts,) = Evidence(cut, ALL).about([one.history], [one.candidates])
        assert one.evidence == facts


def test_near_by_hand(make: Make) -> None:
    # two islands: whoever buys of a, b, c buys nothing of x, y, z; in each, the three lie in one direction
    dataset = make({f"u{n}": "abcab"[n % 3 :][:3] + "bd" for n in range(6)} | {f"v{n}": "xyzw" for n in range(6)})
    evidence = Evidence(dataset, NEAR)
    ((b, x),) = evidence.about([("a", "c")], [("b", "x")])
    assert x == {"beside": 0, "follows": 0, "taste": 0} and min(b.values()) >= 1
    space = evidence._space("train+valid", None)
    row = dataset.item_rows
    cosines = [float(space[row["b"]] @ space[row[seen]]) for seen in "ac"]
    # c is the last item and counts 1, a counts .7
    for name, cosine in zip(NEAR, [max(cosines), cosines[1], (0.7 * cosines[0] + cosines[1]) / 1.7], strict=True):
        assert b[name] == int(min(9, -1.5 * math.log2(1 - cosine)))


def test_near_knows_nothing_of_the_users_whose_training_lists_it_serves(make: Make) -> None:
    """What a user does at the listed step and later changes no fact of the list; for another's it does."""
    random = np.random.default_rng(0)
    shop = make({f"u{n}": [str(i) for i in random.choice(30, 9, replace=False)] for n in range(40)})
    lists = make_lists(shop, Popularity(shop), size=4, max_history=5, earlier_steps=2, splits=("train", "valid"))
    listed = max(lists.of("train"), key=lambda one: shop.splits[one.user_id][0] - one.step)
    end = shop.splits[listed.user_id][0]
    assert end - listed.step >= 2
    own = shop.histories[listed.user_id]
    turned = (*own[: listed.step], *reversed(own[listed.step : end]), *own[end:])
    other = replace(shop, histories={**shop.histories, listed.user_id: turned})
    facts = [{one.example_id: one.evidence for one in Evidence(some, NEAR).attached(lists)} for some in (shop, other)]
    mine = {one.example_id for one in lists if one.user_id == listed.user_id and one.step <= listed.step}
    assert mine and all(facts[0][name] == facts[1][name] for name in mine)
    assert facts[0] != facts[1]


def test_new_items_change_nothing_for_the_others(make: Make) -> None:
    dataset = told(
        make({"u1": "abcd", "u2": "abcd"}),
        a=Item("a", "rose soap"),
        b=Item("b", "rose water"),
        c=Item("c", "lime soap bar"),
        d=Item("d", "comb"),
    )
    asked = [("a", "b")], [("c", "d")]
    alone = Evidence(dataset, ALL).about(*asked)
    new = [Item(f"n{i}", "soap bar, a new one", brand="Norda") for i in range(9)]
    # nine more soap bars would make "soap" a common word: c would be less like a
    beside = Evidence(dataset, ALL, new=new)
    assert beside.about(*asked) == alone and alone[0][0]["alike"] > 0
    ((fresh,),) = beside.about([("n1",)], [("n2",)])
    assert fresh == {"alike": 9, "last": 9, "together": 0, "brand": 1, "kind": 0}


def test_new_items_do_not_widen_the_space_of_the_others(make: Make) -> None:
    # a space has one direction less than items: a third would have given that of these two a second
    dataset = make({f"u{n}": "ab" for n in range(3)} | {"v": "ba"})
    dataset = replace(dataset, splits=dict.fromkeys(dataset.histories, (2, 2)))
    asked = [("a",)], [("b", "a")]
    alone = Evidence(dataset, NEAR).about(*asked)
    beside = Evidence(dataset, NEAR, new=[Item("n", "new")])
    assert beside.about(*asked) == alone
    assert beside.about([("n",)], [("a", "n")]) == [(dict.fromkeys(NEAR, 0),) * 2]


@pytest.mark.parametrize("refit", [True, False])
def test_a_test_list_has_the_evidence_that_is_looked_up_for_its_history(refit: bool, shop: Dataset) -> None:
    """What `rerankkit rank` looks up of a stranger is what the run attached to its own test lists."""
    names = (*ALL, *NEAR)
    lists = make_lists(shop, Popularity(shop, refit=refit), size=4, max_history=4, splits=("test",))
    made = Evidence(shop, names, refit=refit).attached(lists).lists
    looked_up = Evidence(shop, names, refit=refit).about([o.history for o in made], [o.candidates for o in made])
    assert made and [one.evidence for one in made] == looked_up
    assert any(facts["taste"] for one in looked_up for facts in one)


def test_survives_saving_and_leaves_the_digest_alone(shop: Dataset, tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    lists = make_lists(shop, Popularity(shop), size=4)
    made = Evidence(shop, ("brand", "alike")).attached(lists)
    made.save(folder)
    again = CandidateLists.load(folder)
    assert again.lists == made.lists and made.digest == lists.digest


def test_no_texts_and_strangers_are_no_error(make: Make) -> None:
    dataset = make({"u1": "abcd", "u2": "abcd"})
    bare = replace(dataset, items=tuple(Item(item.item_id, "") for item in dataset.items))
    assert Evidence(bare, ALL).about([()], [("a", "b")]) == [(dict.fromkeys(ALL, 0),) * 2]
    assert Evidence(bare, ALL).about([], []) == []


@pytest.mark.slow
def test_orders_real_lists_better_than_the_order_given(beauty_dataset: Dataset) -> None:
    """Rank and one fact, no fitting: on Beauty's validation lists the target moves up on average."""
    lists = make_lists(beauty_dataset, Popularity(beauty_dataset), size=10, splits=("valid",))
    some: list[CandidateList] = [one for one in lists if one.target in one.candidates]
    assert len(some) > 100
    made = Evidence(beauty_dataset, ("together",)).attached(CandidateLists(tuple(some)))
    gained = 0
    for one in made:
        order = sorted(range(10), key=lambda place: -one.evidence[place]["together"])
        gained += one.candidates.index(one.target) - order.index(one.candidates.index(one.target))
    assert gained / len(some) > 0.5

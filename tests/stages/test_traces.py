from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from rerankkit.errors import RunFailed
from rerankkit.stages.traces import Traces, write_traces
from rerankkit.types import RerankExample, RunInfo, SidSurface, Trace, TraceFailure

from .conftest import Shop


@dataclass
class Scripted:
    """A teacher that answers with the target first, shrugs at some users, and may die after a number of answers."""

    shrugs: frozenset[str] = frozenset()
    dies_after: int | None = None
    order: tuple[int, ...] | None = None
    asked: list[str] = field(default_factory=list)

    def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
        self.asked = [example.example_id for example in examples]
        for number, example in enumerate(reversed(examples)):
            if number == self.dies_after:
                raise KeyboardInterrupt
            if example.example_id in self.shrugs:
                yield TraceFailure(example.example_id, "no idea", 3)
                continue
            first = example.target_index or 0
            order = self.order or (first, *(i for i in range(len(example.candidates)) if i != first))
            said = f"{example.user_id} says \u2028 \x85 \u2029 é <|im_end|>"  # what str.splitlines would split at
            yield Trace(example.example_id, said, order, {"model": "made"})


def ids(shop: Shop) -> list[str]:
    return [example.example_id for example in shop.lists.examples(shop.items, "train")]


def write(teacher: Scripted, shop: Shop, info: RunInfo) -> Traces:
    return write_traces(teacher, shop.dataset, shop.sids, shop.lists, info=info)


def test_every_list_that_holds_its_target_is_asked_and_kept_in_its_order(shop: Shop, info: RunInfo) -> None:
    every = ids(shop)
    shrugged = frozenset(every[1:3])

    traces = write(teacher := Scripted(shrugged), shop, info)

    assert teacher.asked == every and len(every) > 20
    assert [trace.example_id for trace in traces.kept] == [one for one in every if one not in shrugged]
    assert [(f.example_id, f.reason, f.attempts) for f in traces.failures] == [(i, "no idea", 3) for i in every[1:3]]
    # `_with_target` puts the target second, popularity may have put it anywhere
    assert sum(row["asked"] for row in traces.acceptance) == len(every)
    assert sum(row["kept"] for row in traces.acceptance) == len(every) - 2


def test_what_is_cited_by_place_is_kept_by_sid_since_places_change_with_the_order(shop: Shop, info: RunInfo) -> None:
    class Cites:
        def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
            for example in examples:
                yield Trace(example.example_id, "not <c_1>, but <c_2>. <c_77>", tuple(range(len(example.candidates))))

    surface = SidSurface(places=20)
    kept = write_traces(Cites(), shop.dataset, shop.sids, shop.lists, info=replace(info, surface=surface)).kept
    asked = {example.example_id: example for example in shop.lists.examples(shop.items, "train")}
    for trace in kept:
        first, second = (surface.text(item.sid) for item in asked[trace.example_id].candidates[:2])
        assert trace.reasoning == f"not {first}, but {second}. <c_77>"


@pytest.mark.parametrize("half", ["", '{"example_id": "user', "{"])
def test_a_restart_asks_only_for_what_is_missing(shop: Shop, info: RunInfo, tmp_path: Path, half: str) -> None:
    every = ids(shop)
    shrugs = frozenset(every[-2:-1])
    with pytest.raises(KeyboardInterrupt):
        write(Scripted(shrugs, dies_after=3), shop, info)
    assert info.work is not None
    store = info.work / "answers.jsonl"
    assert store.read_text().count("\n") == 3  # each answer was on disk before the next was asked for
    with store.open("a") as file:
        file.write(half)

    with pytest.raises(KeyboardInterrupt):
        write(second := Scripted(shrugs, dies_after=2), shop, info)
    resumed = write(third := Scripted(shrugs), shop, info)

    assert (len(second.asked), len(third.asked)) == (len(every) - 3, len(every) - 5)
    undisturbed = write(Scripted(shrugs), shop, RunInfo(seed=1))
    assert resumed == undisturbed


def test_what_is_saved_is_what_is_loaded(shop: Shop, info: RunInfo, tmp_path: Path) -> None:
    traces = write(Scripted(frozenset(ids(shop)[:1])), shop, info)
    traces.save(tmp_path)
    assert Traces.load(tmp_path) == traces
    assert "\u2028" in Traces.load(tmp_path).kept[0].reasoning
    assert all(json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().split("\n")[:-1])


@pytest.mark.parametrize("order", [(0, 1), (0, 0, 1, 2), (1, 2, 3, 4)])
def test_an_order_that_is_no_permutation_is_a_failure_of_that_trace(
    shop: Shop, info: RunInfo, order: tuple[int, ...]
) -> None:
    with pytest.raises(RunFailed, match=r"no trace was kept .*: the teacher's order is no permutation of 4 candidates"):
        write(Scripted(order=order), shop, info)


def test_an_answer_that_never_came_is_counted(shop: Shop, info: RunInfo) -> None:
    class Lazy(Scripted):
        def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
            yield from super().write(examples[:1], info)

    traces = write(Lazy(), shop, info)
    assert len(traces.kept) == 1
    assert {failure.reason for failure in traces.failures} == {"the teacher gave no answer"}


def test_an_answer_to_what_was_not_asked_is_the_teachers_fault(shop: Shop, info: RunInfo) -> None:
    class Confused(Scripted):
        def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
            yield TraceFailure("nobody/3", "?")

    with pytest.raises(RunFailed, match="teacher: answered 'nobody/3', which it was not asked"):
        write(Confused(), shop, info)


def test_no_trace_at_all_is_a_failure_with_the_commonest_reason(shop: Shop, info: RunInfo) -> None:
    with pytest.raises(RunFailed, match=r"no trace was kept out of .* asks; commonest reason: no idea"):
        write(Scripted(frozenset(ids(shop))), shop, info)


def test_without_a_list_that_holds_its_target_nobody_is_asked(shop: Shop, info: RunInfo) -> None:
    missed = replace(shop.lists, lists=tuple(replace(one, relevance=(0.0,) * 4) for one in shop.lists))
    with pytest.raises(RunFailed, match=r"teacher: no training list holds its target.*; raise candidates\.size"):
        write_traces(Scripted(), shop.dataset, shop.sids, missed, info=info)

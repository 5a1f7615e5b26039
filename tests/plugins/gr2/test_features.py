"""The offline teacher: right more often than the input order, honest, cross-fitted, and the same after a restart."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import PromptStyle, answer_parts
from rerankkit.types import Item, Parse, RerankExample, RunInfo, SidSurface, Trace
from rerankkit_gr2.asks import Request
from rerankkit_gr2.features import FeatureBackend, Lessons, _kept, answer, conditional_logit, fit, fold_of, prior, see
from rerankkit_gr2.teacher import RejectionSampling, Targeted, acceptance_by_position

STYLE = PromptStyle()
ALL = PromptStyle(fields=("title", "categories", "brand", "price"))
KINDS = ("Shampoo", "Conditioner", "Mask", "Gel", "Comb", "Spray")
_NOBODY = Trace("", "", (), {})
BRANDS = ("Norda", "Velis", "Amaro")


def thing(kind: int, brand: int) -> Item:
    name = f"{BRANDS[brand]} {KINDS[kind]}"
    return Item(name, name, ("Hair", KINDS[kind]), "", BRANDS[brand], 5.0 + 10 * brand, (kind, brand))


def shop(num_users: int) -> list[RerankExample]:
    """Users who keep to a brand, and walk along KINDS nine times in ten; the target stands anywhere in six."""
    examples = []
    for user in range(num_users):
        dice = random.Random(f"user {user}")
        brand, kind, bought = dice.randrange(3), dice.randrange(6), []
        for _ in range(6):
            bought.append(thing(kind, brand))
            kind = (kind + 1) % 6 if dice.random() < 0.9 else dice.randrange(6)
        others = [thing(k, b) for k in range(6) for b in range(3) if thing(k, b) != bought[-1]]
        candidates = [bought[-1], *dice.sample(others, 5)]
        dice.shuffle(candidates)
        relevance = tuple(float(item == bought[-1]) for item in candidates)
        examples.append(RerankExample(f"e{user}", f"u{user}", tuple(bought[:-1]), tuple(candidates), relevance))
    return examples


@pytest.fixture(scope="module")
def asks() -> list[RerankExample]:
    return shop(300)


def test_conditional_logit_finds_the_weights_that_made_the_choices() -> None:
    random = np.random.default_rng(0)
    true = np.array([0.5, 1.0, -1.0, 2.0, 0.0, -2.0, 1.5])
    x = random.normal(size=(3000, 6, 7))
    y = (x @ true + random.gumbel(size=(3000, 6))).argmax(1)
    found = conditional_logit([(x[n], int(y[n])) for n in range(3000)])
    # standard errors are about 1 / sqrt(3000 * variance of the chosen row's features), below .05
    assert np.abs(found - true).max() < 0.2
    assert (conditional_logit([]) == prior()).all()


def test_only_what_the_style_shows_is_seen() -> None:
    item = Item("i", "Norda Deep Mask 50ml", ("Hair", "Mask"), brand="Norda", price=5.0)
    assert see(item, STYLE) == see(item, PromptStyle(fields=("title",)))  # kind and brand stand in the title
    bare = see(item, PromptStyle(fields=("categories",)))
    assert (bare.kind, bare.brand, bare.price, dict(bare.words)) == ("Mask", "", 0.0, {})
    assert see(replace(item, brand="Velis"), STYLE).brand == ""  # has to be a field of its own
    assert see(replace(item, brand="Velis"), ALL).brand == "Velis"
    assert see(item, PromptStyle(fields=("title",), max_title_words=2)).kind == ""  # cut off


def test_lift_by_hand() -> None:
    # a -> b three times, c -> b once, c -> d twice: base rates (with one added to each) b 5/8, d 3/8
    lessons = Lessons(tuple(prior()), {"a": Counter(b=3), "c": Counter(b=1, d=2)}, (0.0, 0.0))
    # smoothing is worth 5 transitions: (3 + 5 * 5/8) / (3 + 5) / (5/8) = 6.125 / 8 / .625
    assert lessons.lift("a", "b") == pytest.approx(np.log(6.125 / 8 / 0.625))
    assert lessons.lift("a", "d") < 0 < lessons.lift("c", "d")
    assert lessons.lift("a", "unknown") == lessons.lift("", "b") == lessons.lift("unknown", "b") == 0.0
    assert replace(lessons, knowledge=False).lift("a", "b") == 0.0


def test_it_beats_the_input_order_and_is_still_rejected_at_times(asks: list[RerankExample]) -> None:
    answers = list(RejectionSampling(FeatureBackend(), samples=2).write(asks, RunInfo()))
    counts = acceptance_by_position(asks, answers)
    accepted = sum(a for a, _ in counts.values())
    first_try = sum(isinstance(a, Trace) and a.provenance["attempt"] == "1" for a in answers)
    # the input order is a shuffle: 1/6 of 300 = 50 by luck. With perfect knowledge about nine in ten.
    assert 180 < first_try < accepted < 300
    assert sorted(counts) == [0, 1, 2, 3, 4, 5]


def test_what_counts_as_a_hit_is_a_choice(asks: list[RerankExample]) -> None:
    """At temperature 0 a try is the teacher's best order; a deeper bar keeps more of the same answers."""
    kept: dict[int, dict[str, Trace]] = {}
    for accept in (1, 3, 6):
        teacher = RejectionSampling(FeatureBackend(), samples=1, temperature=0.0, accept=accept)
        answers = list(teacher.write(asks, RunInfo(seed=3)))
        kept[accept] = {one.example_id: one for one in answers if isinstance(one, Trace)}
        hits = [one for one in asks if one.target_index in kept[accept].get(one.example_id, _NOBODY).order[:accept]]
        assert len(hits) == len(kept[accept])
        refused = [one for one in answers if not isinstance(one, Trace)]
        assert all("put" in one.reason and "first" in one.reason for one in refused)
    assert 0 < len(kept[1]) < len(kept[3]) < len(kept[6]) == len(asks)
    assert kept[1].items() <= kept[3].items() <= kept[6].items()


def test_without_knowledge_sequences_are_not_used(asks: list[RerankExample]) -> None:
    def hits(style: PromptStyle) -> int:
        lessons = fit(asks, style)
        return sum(int(lessons[fold_of(e.user_id)].scores(e, style).argmax()) == e.target_index for e in asks)

    assert hits(replace(STYLE, knowledge=False)) + 30 < hits(STYLE)


def test_an_own_target_never_informs_the_answer(asks: list[RerankExample]) -> None:
    # the same asks, but user 5 chose something else and the next thing in their history is another
    changed = list(asks)
    other = asks[5]
    changed[5] = replace(other, relevance=(*other.relevance[1:], other.relevance[0]), history=other.history[::-1])
    mine = fold_of(other.user_id)
    before, after = fit(asks, STYLE), fit(changed, STYLE)
    assert before[mine] == after[mine]
    assert all(before[i] != after[i] for i in range(5) if i != mine)
    request = Request(other, STYLE, SidSurface(), 1.0, 3)
    blind = replace(request, example=replace(other, relevance=changed[5].relevance))
    backend = FeatureBackend()
    list(backend.ask([Request(e, STYLE, SidSurface(), 1.0, 3) for e in asks], RunInfo()))
    assert list(backend.ask([request], RunInfo())) == list(backend.ask([blind], RunInfo()))


def test_only_the_top_choice_is_random(asks: list[RerankExample]) -> None:
    lessons = fit(asks, STYLE)[fold_of(asks[0].user_id)]
    backend = FeatureBackend()
    requests = [Request(asks[0], STYLE, SidSurface(), 3.0, seed) for seed in range(50)]
    list(backend.ask([Request(e, STYLE, SidSurface(), 1.0, 0) for e in asks], RunInfo()))
    orders = {reply.order for _, reply in backend.ask(requests, RunInfo()) if hasattr(reply, "order")}
    by_score = sorted(range(6), key=lambda i: -lessons.scores(asks[0], STYLE)[i])
    assert len({order[0] for order in orders}) > 1
    for order in orders:
        assert list(order[1:]) == [i for i in by_score if i != order[0]]
    (cold,) = backend.ask([replace(requests[0], temperature=0.0)], RunInfo())
    assert cold[1].order == tuple(by_score)  # type: ignore[union-attr]


def test_reasoning_is_short_true_and_cites_the_choice(asks: list[RerankExample]) -> None:
    surface = SidSurface()
    for teacher in (RejectionSampling(FeatureBackend(), samples=1, style=ALL), Targeted(FeatureBackend(), style=ALL)):
        for trace in teacher.write(asks, RunInfo()):
            if not isinstance(trace, Trace):
                continue
            example = next(e for e in asks if e.example_id == trace.example_id)
            chosen, last = example.candidates[trace.order[0]], example.history[-1]
            assert trace.order[0] == example.target_index
            assert len(trace.reasoning.split()) <= 35
            assert surface.find(trace.reasoning) == [chosen.sid]
            pattern, following, match = _steps(trace)
            assert pattern.startswith(last.brand)  # these users keep to one brand
            assert following.endswith(chosen.categories[-1])
            assert (
                following.startswith(f"after {last.categories[-1]} comes")
                or following.startswith("again ")
                or (following == chosen.categories[-1])
            )
            assert (last.brand in match) == (chosen.brand == last.brand)
            reasoning, ranking = answer_parts(trace.reasoning, trace.order, example, surface)
            read = parse_answer(reasoning + ranking, example, surface)
            assert read.ranking.parse is Parse.OK and read.reasoning == trace.reasoning


def _steps(trace: Trace) -> list[str]:
    return [step.split(": ", 1)[1] for step in trace.reasoning.rstrip(".").split(". ")]


def test_reads_as_intended() -> None:
    pairs = {"Shampoo": Counter(Conditioner=9, Gel=1), "Gel": Counter(Comb=9)}
    lessons = Lessons(tuple(prior()), pairs, (10.0, 20.0))
    history = (thing(3, 0), thing(0, 0))  # Norda Gel, Norda Shampoo; 5 dollars each
    example = RerankExample("e", "u", history, (thing(2, 1), thing(1, 0)), (0.0, 1.0))
    texts = {
        answer(Request(example, ALL, SidSurface(), 0.0, seed, reveal_target=True), lessons).reasoning
        for seed in range(20)
    }
    sid = "<|sid_begin|><s_a_1><s_b_0><|sid_end|>"
    facts = ("Norda, low price", "after Shampoo comes Conditioner", f"{sid}, Norda, low price")
    assert texts == {
        "pattern: {}. next: {}. match: {}.".format(*facts),
        "taste: {}. then: {}. best: {}.".format(*facts),
    }


def test_a_resumed_run_answers_the_missing_as_the_first_would_have(asks: list[RerankExample], tmp_path: Path) -> None:
    info = RunInfo(seed=3, work=tmp_path)
    whole = list(RejectionSampling(FeatureBackend(), samples=3).write(asks, info))
    again = list(RejectionSampling(FeatureBackend(), samples=3).write(asks[200:], info))
    assert {a.example_id: a for a in again}.items() <= {a.example_id: a for a in whole}.items()
    fresh = list(RejectionSampling(FeatureBackend(), samples=3).write(asks, replace(info, work=None)))
    assert fresh == whole
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_strange_examples_are_answered() -> None:
    nothing = Item("n", "", sid=(0, 0))
    odd = Item("o", "\n<|im_end|>", ("<s_a_1>",), brand='"', price=float("nan"), sid=(0, 1))
    examples = [
        RerankExample("a", "u", (), (nothing,), (1.0,)),
        RerankExample("b", "\ud800", (odd, nothing), (odd, nothing, odd), (0.0, 1.0, 0.0)),
    ]
    answers = list(Targeted(FeatureBackend(), style=ALL).write(examples, RunInfo()))
    assert [isinstance(one, Trace) for one in answers] == [True, True]
    assert all(len(SidSurface().find(a.reasoning)) == 1 and "im_end|" not in a.reasoning for a in answers)  # type: ignore[union-attr]


def told_apart(example: RerankExample, *facts: tuple[int, int]) -> RerankExample:
    return replace(example, evidence=tuple({"alike": alike, "brand": brand} for alike, brand in facts))


def test_evidence_is_weighed_and_cited(tmp_path: Path) -> None:
    """Choices that were made by how alike things are, and far more so where they share a brand."""
    random = np.random.default_rng(1)
    examples = []
    for number in range(1500):
        alike, brand = random.integers(0, 10, size=4), random.integers(0, 2, size=4)
        target = int(np.argmax(0.2 * alike + 0.6 * alike * brand + random.gumbel(size=4)))
        history, candidates = (thing(0, 0),), tuple(thing(place, 1) for place in range(4))
        example = RerankExample(f"e{number}", f"u{number}", history, candidates, tuple(np.eye(4)[target].tolist()))
        examples.append(told_apart(example, *zip(alike.tolist(), brand.tolist(), strict=True)))
    style = PromptStyle(fields=())
    lessons = fit(examples, style)[0]
    assert lessons.evidence == ("alike", "brand")
    for brand, worth in ((0, 0.2), (1, 0.8)):  # what one more of alike is worth
        scores = [lessons.scores(told_apart(examples[0], *[(n, brand)] * 4), style)[1] for n in (2, 7)]
        assert (scores[1] - scores[0]) / 5 == pytest.approx(worth, abs=0.1)
    example = told_apart(examples[0], (2, 0), (9, 1), (0, 0), (0, 0))
    surface = SidSurface(facts=("alike", "brand"))
    reply = answer(Request(example, style, surface, 0.0, 0), lessons)
    names = [surface.text(item.sid) for item in example.candidates]
    assert reply.order == (1, 0, 2, 3)
    marks = lessons.marks(lessons.scores(example, style))
    assert marks[1] > marks[0] > marks[2] >= marks[3] == 0
    told = "".join(f"{name}{mark}" for name, mark in zip(names, marks, strict=True))
    assert reply.reasoning == f"match: {told}. best: {names[1]}."
    assert _kept(examples, style, tmp_path)[0] == lessons  # `brand` is a name of NAMES too


def test_marks_are_the_shares_of_candidates_that_score_less() -> None:
    lessons = Lessons((), {}, (0.0, 0.0), marked=(-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert lessons.marks(np.array([-9.0, -2.0, 0.5, 5.9, 6.0])) == [0, 1, 3, 8, 9]


def test_a_teacher_that_learns_nothing_from_targets_counts_every_fact_alike() -> None:
    """Whoever was chosen: the given order, and .35 of a fact over 4."""
    bare = [RerankExample(f"e{n}", f"u{n}", (), (thing(0, 1), thing(1, 1)), (0.0, 1.0)) for n in range(20)]
    flipped = [replace(one, relevance=(1.0, 0.0)) for one in bare]
    scores = []
    for examples in (bare, flipped):
        lessons = fit([told_apart(one, (4, 1), (8, 0)) for one in examples], PromptStyle(fields=()), learn=False)[0]
        scores.append(lessons.scores(told_apart(bare[0], (4, 1), (8, 0)), PromptStyle(fields=())))
    assert scores[0] == pytest.approx([0.35 * 5 / 4, -np.log(2) + 0.35 * 8 / 4])
    assert scores[1] == pytest.approx(scores[0])


def test_examples_without_evidence_among_others_count_as_having_none_of_it() -> None:
    """As a prompt shows it; whichever comes first."""
    style, target = PromptStyle(fields=()), (1.0, 0.0)
    bare = [RerankExample(f"e{n}", f"u{n}", (), (thing(0, 1), thing(1, 1)), target) for n in range(20)]
    told = [told_apart(example, (9, 0), (0, 0)) for example in bare[10:]]
    for examples in (told + bare[:10], bare[:10] + told):
        lessons = fit(examples, style)[0]
        assert lessons.evidence == ("alike", "brand")
        none = told_apart(bare[0], (0, 0), (0, 0))
        assert (lessons.scores(bare[0], style) == lessons.scores(none, style)).all()
        assert lessons.scores(told[0], style)[0] > lessons.scores(bare[0], style)[0]
        assert lessons.features(RerankExample("e", "u", (), (), ()), style).shape == (0, len(lessons.weights))

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import permutations
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankkit.errors import UsageError
from rerankkit.lm import AnswerMask, Policy, answer_mask, ask, group_logps, roll_out
from rerankkit.lm.permutation import AnswerPieces, State, answer_pieces
from rerankkit.text.answers import RANKING_KEY
from rerankkit.text.prompts import answer_parts, rerank_messages
from rerankkit.types import Item, Parse, RerankExample, RunInfo

# head, opening, separator and closing in ids that no SID uses; reasoning cannot use 99
PIECES = AnswerPieces((10,), (11, 12), (13,), (14, 15), frozenset([99, 15]))
SIDS = [(0, 0, 0), (0, 0, 1), (0, 2, 4), (3, 1, 2), (3, 1, 2), (1, 0, 0)]


def example(sids: list[tuple[int, ...]], name: str = "e") -> RerankExample:
    items = tuple(Item(f"i{n}", f"red soap {n}", sid=sid) for n, sid in enumerate(sids))
    return RerankExample(name, "u", items[:2], items, tuple(float(n == 0) for n in range(len(items))))


def prompts(policy: Policy, examples: list[RerankExample]) -> list[list[int]]:
    return [policy.prompt_ids(rerank_messages(e, policy.surface, policy.style)) for e in examples]


def walk(mask: AnswerMask, state: State, reasoning: int = 7) -> list[tuple[int, ...]]:
    """Every answer that the mask lets through; where reasoning is free, `reasoning` and the end of it are tried."""
    options = mask.allowed(state)
    if options == ():
        return [()]
    tried = (reasoning, mask.pieces.opening[0]) if options is None else options
    return [(token, *rest) for token in tried for rest in walk(mask, mask.advance(state, token), reasoning)]


def spelled(mask: AnswerMask, order: tuple[int, ...], reasoning: tuple[int, ...]) -> tuple[int, ...]:
    head, opening, separator, closing = PIECES.head, PIECES.opening, PIECES.separator, PIECES.closing
    listed: tuple[int, ...] = ()
    for place, candidate in enumerate(order):
        listed += (separator if place else ()) + mask.spellings[candidate]
    return head + reasoning + opening + listed + closing


@pytest.fixture
def ending() -> Iterator[None]:
    """Reasoning ends with a chance of an eighth at every token: left alone, random weights reason to the limit."""
    plain = Policy.logits

    def logits(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
        scores = plain(policy, hidden)
        place = torch.tensor([answer_pieces(policy).opening[0]])
        return scores.index_copy(-1, place, scores.logsumexp(-1, keepdim=True) - 2)

    with patch.object(Policy, "logits", logits):
        yield


SPELLINGS = st.lists(st.tuples(st.just(20), st.integers(0, 2), st.integers(0, 1), st.just(21)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SPELLINGS, st.integers(0, 2))
def test_the_mask_lets_through_permutations_and_nothing_else(spellings: list[tuple[int, ...]], room: int) -> None:
    mask = AnswerMask(PIECES, tuple(spellings), room)
    paths = walk(mask, mask.start())
    orders = permutations(range(len(spellings)))
    wanted = {spelled(mask, order, (7,) * n) for order in orders for n in range(room + 1)}
    assert len(paths) == len(set(paths)) and set(paths) == wanted
    assert max(map(len, paths)) == mask.max_tokens and min(map(len, paths)) == mask.num_fixed_tokens


def test_the_mask_by_hand() -> None:
    mask = AnswerMask(PIECES, ((1, 2), (1, 3), (4, 5)), 1)
    state = mask.start()
    seen = []
    for token in (10, 7, 11, 12, 1, 3, 13, 4, 5, 13, 1, 2, 14, 15):
        seen.append(mask.allowed(state))
        state = mask.advance(state, token)
    # the one reasoning token is spent, so the opening is forced; 1 begins two SIDs, then, one of them gone, only one
    assert seen == [
        (10,), None, (11,), (12,), (1, 4), (2, 3), (13,), (1, 4), (5,), (13,), (1,), (2,), (14,), (15,),
    ]  # fmt: skip
    assert mask.allowed(state) == () and state.settled
    assert mask.num_fixed_tokens == 13 and mask.max_tokens == 14


def test_what_may_not_come_is_refused() -> None:
    mask = AnswerMask(PIECES, ((1, 2), (1, 3), (4, 5)), 1)
    free = mask.advance(mask.start(), 10)
    for barred in PIECES.barred_ids:
        with pytest.raises(ValueError, match="may not come in reasoning"):
            mask.advance(free, barred)
    with pytest.raises(ValueError, match="token 5 where only 10"):
        mask.advance(mask.start(), 5)
    state = mask.advance(mask.advance(free, 11), 12)
    with pytest.raises(ValueError, match=r"token 9 where only \(1, 4\)"):
        mask.advance(state, 9)
    for token in (4, 5, 13):
        state = mask.advance(state, token)
    with pytest.raises(ValueError, match=r"token 4 where only \(1,\)"):
        mask.advance(state, 4)
    with pytest.raises(ValueError, match="beginning of another"):
        AnswerMask(PIECES, ((1, 2), (1, 2, 3), (1, 2)), 0)
    with pytest.raises(ValueError, match="0 candidates"):
        AnswerMask(PIECES, (), 0)


def test_pieces_are_those_of_a_trace(tiny) -> None:
    """A permutation spelled by the mask is, id by id, what `trace_sequence` teaches."""
    asked = example(SIDS[:4])
    reasoning, ranking = answer_parts("red soap for hair", (2, 0, 3, 1), asked, tiny.surface)
    taught = [*tiny.encode(reasoning), *tiny.encode(ranking), tiny.end_id]
    mask = answer_mask(tiny, asked, 200)
    state = mask.start()
    for token in taught:
        options = mask.allowed(state)
        assert options is None or token in options
        state = mask.advance(state, token)
    assert mask.allowed(state) == ()


def test_reasoning_keeps_all_words_and_loses_what_breaks_json(tiny) -> None:
    pieces = answer_pieces(tiny)
    texts = {i: tiny.text_tokenizer.decode([i]) for i in range(len(tiny.text_tokenizer))}
    for i, text in texts.items():
        plain = not set('"\\\n\t') & set(text) and text.isprintable() and i not in tiny.text_tokenizer.all_special_ids
        if plain or i == pieces.opening[0]:
            assert i not in pieces.barred_ids, text
        elif '"' in text or "\\" in text or "\n" in text:
            assert i in pieces.barred_ids, text
    assert tiny.stop_ids <= pieces.barred_ids and not set(tiny.sid_ids((0, 0, 0))) & pieces.barred_ids


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("num", [1, 2, 6])
def test_every_answer_of_a_random_policy_is_a_permutation(make, temperature: float, num: int) -> None:
    policy = make(seed=3)
    asked = example(SIDS[:num])
    least = answer_mask(policy, asked, 200).num_fixed_tokens
    for room in (0, 1, 20):
        info = RunInfo(seed=room)
        rollouts = ask(policy, [asked], group_size=8, max_new_tokens=least + room, temperature=temperature, info=info)
        for rollout in rollouts:
            assert rollout.ranking.parse is Parse.OK and not rollout.truncated, rollout.text
            assert len(rollout.token_ids) == len(rollout.logps) == len(rollout.allowed_ids) <= least + room
            n = rollout.num_reasoning_tokens
            assert RANKING_KEY in policy.decode(rollout.token_ids[n:])
            assert RANKING_KEY not in policy.decode(rollout.token_ids[n + 1 :])
    with pytest.raises(UsageError, match=f"max_new_tokens: {least - 1} is too small.* takes {least} tokens"):
        ask(policy, [asked], group_size=1, max_new_tokens=least - 1, temperature=1.0, info=RunInfo())


def test_without_the_mask_nothing_has_changed(tiny) -> None:
    asked = example(SIDS[:4])
    rollouts = ask(tiny, [asked], group_size=4, max_new_tokens=20, temperature=1.0, info=RunInfo(), constrain=False)
    (group,) = roll_out(tiny, prompts(tiny, [asked]), 4, max_new_tokens=20, temperature=1.0, seeds=[0])
    assert all(rollout.allowed_ids == () for rollout in rollouts) and all(sample.allowed == () for sample in group)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logps_are_what_the_trainer_recomputes(make, ending, shape, temperature: float) -> None:
    policy = make(**shape)
    examples = [example(SIDS, "a"), example(SIDS[:3], "b"), example(SIDS[3:4], "c")]
    asked = prompts(policy, examples)
    masks = [answer_mask(policy, e, 120) for e in examples]
    groups = roll_out(policy, asked, 3, max_new_tokens=120, temperature=temperature, seeds=[4, 2, 3], masks=masks)
    free = roll_out(policy, asked[:1], 2, max_new_tokens=9, temperature=temperature, seeds=[5])  # and no mask beside
    groups, asked = [*groups, *free], [*asked, asked[0]]
    samples = [sample for group in groups for sample in group]
    completions = [[sample.token_ids for sample in group] for group in groups]
    allowed = [[sample.allowed for sample in group] for group in groups]
    for chunk in (1024, 7):
        again = group_logps(
            policy, asked, completions, temperature=temperature, entropies=True, allowed=allowed, chunk=chunk
        )
        drawn = torch.tensor([logp for sample in samples for logp in sample.logps])
        assert torch.allclose(again.logps, drawn, atol=1e-4)
        assert len({len(s.token_ids) for s in samples}) > 3
        forced = [
            bool(s.allowed) and s.allowed[i] is not None and len(s.allowed[i]) == 1
            for s in samples
            for i in range(len(s.token_ids))
        ]
        assert again.weights.tolist() == [0.0 if f else 1.0 for f in forced]
        assert again.entropies is not None and bool((again.entropies[again.weights == 0] == 0).all())
        assert bool(again.entropies.isfinite().all()) and bool((again.logps[again.weights == 0] == 0).all())


def test_masked_logps_and_entropies_against_the_plain_model(tiny) -> None:
    """Whole-vocabulary logits, by a plain forward pass, narrowed by hand."""
    asked = example(SIDS)
    (prompt,), mask = prompts(tiny, [asked]), answer_mask(tiny, asked, 90)
    (group,) = roll_out(tiny, [prompt], 2, max_new_tokens=90, temperature=0.7, seeds=[4], masks=[mask])
    got = group_logps(
        tiny, [prompt], [[s.token_ids for s in group]], temperature=0.7, entropies=True,
        allowed=[[s.allowed for s in group]],
    )  # fmt: skip
    logps, entropies = [], []
    barred = answer_pieces(tiny).barred_ids
    for sample in group:
        with torch.no_grad():
            logits = tiny.model(input_ids=torch.tensor([[*prompt, *sample.token_ids]])).logits[0] / 0.7
        for i, (token, options) in enumerate(zip(sample.token_ids, sample.allowed, strict=True)):
            ids = [v for v in range(logits.shape[1]) if v not in barred] if options is None else list(options)
            row = logits[len(prompt) - 1 + i, ids].log_softmax(-1)
            logps.append(float(row[ids.index(token)]))
            entropies.append(float(-(row.exp() * row).sum()))
    assert torch.allclose(got.logps, torch.tensor(logps), atol=1e-4)
    assert got.entropies is not None and torch.allclose(got.entropies, torch.tensor(entropies), atol=1e-3)
    got.entropies.sum().backward()  # what is barred has a log-probability of -1e30, and must not make it NaN
    slopes = [p.grad for p in tiny.model.parameters() if p.grad is not None]
    tiny.model.zero_grad()
    assert all(bool(slope.isfinite().all()) for slope in slopes) and any(bool(slope.any()) for slope in slopes)


def test_forced_tokens_have_no_gradient(make) -> None:
    policy = make()
    asked = example(SIDS[:1])
    (prompt,), mask = prompts(policy, [asked]), answer_mask(policy, asked, 30)
    (group,) = roll_out(policy, [prompt], 2, max_new_tokens=30, temperature=1.0, seeds=[4], masks=[mask])
    tokens = group_logps(policy, [prompt], [[s.token_ids for s in group]], allowed=[[s.allowed for s in group]])
    tokens.logps[tokens.weights == 0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.model.parameters())


def test_sampling_follows_the_renormalised_distribution(tiny) -> None:
    """Chi-square over the six orders of three candidates, no reasoning: P(order) from the trainer's logps."""
    sids = [(0, 0, 0), (0, 0, 1), (3, 1, 2)]
    asked = example(sids)
    (prompt,) = prompts(tiny, [asked])
    room = answer_mask(tiny, asked, 200).num_fixed_tokens
    mask = answer_mask(tiny, asked, room)
    paths = walk(mask, mask.start())
    options = []
    for path in paths:
        state, seen = mask.start(), []
        for token in path:
            seen.append(mask.allowed(state))
            state = mask.advance(state, token)
        options.append(seen)
    with torch.no_grad():
        tokens = group_logps(tiny, [prompt], [paths], allowed=[options], temperature=2.0)
    chances = [float(part.sum().exp()) for part in tokens.split()]
    assert len(paths) == 6 and sum(chances) == pytest.approx(1, abs=1e-4)
    groups = roll_out(
        tiny, [prompt] * 20, 100, max_new_tokens=room, temperature=2.0, seeds=list(range(20)), masks=[mask] * 20
    )
    counts = Counter(sample.token_ids for group in groups for sample in group)
    assert sum(counts[path] for path in paths) == 2000
    cells = [(counts[path], 2000 * chance) for path, chance in zip(paths, chances, strict=True)]
    chi_square = sum((o - e) ** 2 / e for o, e in cells if e > 5)
    assert sum(e > 5 for _, e in cells) >= 4
    assert chi_square < 20.5  # 0.1% point of chi-square with 5 degrees of freedom


def test_greedy_takes_the_likeliest_allowed(tiny) -> None:
    asked = example(SIDS)
    (prompt,), mask = prompts(tiny, [asked]), answer_mask(tiny, asked, 90)
    ((sample, other),) = roll_out(tiny, [prompt], 2, max_new_tokens=90, temperature=0, seeds=[4], masks=[mask])
    assert sample == other
    barred = answer_pieces(tiny).barred_ids
    with torch.no_grad():
        logits = tiny.model(input_ids=torch.tensor([[*prompt, *sample.token_ids]])).logits[0]
    for i, (token, options) in enumerate(zip(sample.token_ids, sample.allowed, strict=True)):
        ids = [v for v in range(logits.shape[1]) if v not in barred] if options is None else list(options)
        assert float(logits[len(prompt) - 1 + i, token]) >= float(logits[len(prompt) - 1 + i, ids].max()) - 1e-4


def test_samples_do_not_depend_on_the_batch(tiny, ending) -> None:
    dice = random.Random(0)
    examples = [example(dice.sample(SIDS, n), f"e{n}") for n in (6, 1, 3, 5)]
    asked = prompts(tiny, examples)
    masks = [answer_mask(tiny, e, 110) for e in examples]
    how = {"max_new_tokens": 110, "temperature": 1.0}
    together = roll_out(tiny, asked, 4, **how, seeds=[1, 2, 3, 4], masks=masks)
    assert len({len(s.token_ids) for group in together for s in group}) > 3  # they do end at different times
    for p in range(4):
        alone = roll_out(tiny, asked[p : p + 1], 4, **how, seeds=[p + 1], masks=masks[p : p + 1])[0]
        assert [(s.token_ids, s.allowed) for s in alone] == [(s.token_ids, s.allowed) for s in together[p]]
    small = roll_out(tiny, asked, 4, **how, seeds=[1, 2, 3, 4], masks=masks, max_rows=4)
    assert [s.token_ids for g in small for s in g] == [s.token_ids for g in together for s in g]


def test_bfloat16_and_a_nucleus_answer_too(tiny) -> None:
    asked = example(SIDS)
    (prompt,), mask = prompts(tiny, [asked]), answer_mask(tiny, asked, 90)
    how = {"max_new_tokens": 90, "temperature": 1.0, "seeds": [1], "masks": [mask]}
    for extra in ({"autocast": torch.bfloat16}, {"top_p": 0.5}):
        (group,) = roll_out(tiny, [prompt], 4, **how, **extra)
        assert all(sample.token_ids[-1] == tiny.end_id and not sample.truncated for sample in group)


def test_stop_tokens_cannot_end_the_reasoning(tiny) -> None:
    """Half of the vocabulary is a stop: a sample still reaches the end of its answer."""
    asked = example(SIDS[:3])
    (prompt,), own = prompts(tiny, [asked]), tiny.stop_ids
    fixed = set(tiny.encode("".join(answer_parts("", (0, 1, 2), asked, tiny.surface))))
    with patch.object(Policy, "stop_ids", own | (frozenset(range(0, 400, 2)) - fixed)):
        mask = answer_mask(tiny, asked, 80)
        (group,) = roll_out(tiny, [prompt], 8, max_new_tokens=80, temperature=1.0, seeds=[1], masks=[mask])
        assert all(not set(s.token_ids[:-1]) & tiny.stop_ids and not s.truncated for s in group)


def test_masks_that_do_not_fit_are_refused(tiny) -> None:
    asked = example(SIDS[:3])
    (prompt,), mask = prompts(tiny, [asked]), answer_mask(tiny, asked, 90)
    with pytest.raises(ValueError, match="answers of 90 of max_new_tokens=89"):
        roll_out(tiny, [prompt], 1, max_new_tokens=89, temperature=1.0, seeds=[1], masks=[mask])
    with pytest.raises(ValueError, match="1 masks for 2 prompts"):
        roll_out(tiny, [prompt] * 2, 1, max_new_tokens=90, temperature=1.0, seeds=[1, 2], masks=[mask])
    with pytest.raises(ValueError, match="2 tokens but 1 allowed"):
        group_logps(tiny, [[1]], [[[1, 2]]], allowed=[[[None]]])

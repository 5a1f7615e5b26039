from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankkit.errors import DataError
from rerankkit.lm import SidTrie, beam_sids, build_trie, score_continuations
from rerankkit.lm.trie import ROOT

PROMPTS = [[5, 6, 7, 8, 9], [11], [20, 21, 22]]
CODES = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 4))
SIDS = st.lists(CODES, min_size=1, max_size=25)


@given(SIDS)
@settings(deadline=None)
def test_the_trie_spells_exactly_the_catalogue(tiny, sids) -> None:
    trie = build_trie(sids, tiny)
    spelled = {}
    todo = [(ROOT, ())]
    while todo:
        node, prefix = todo.pop()
        sid = trie.sid(node)
        if sid is not None:
            spelled[prefix] = sid
            assert len(trie.next_ids(node)) == 0
        for token_id, child in zip(trie.next_ids(node).tolist(), trie.children(node).tolist(), strict=True):
            assert trie.step(node, token_id) == child
            todo.append((child, (*prefix, token_id)))
    assert spelled == {tuple(tiny.sid_ids(sid)): sid for sid in sids}
    assert len(trie) == len(set(sids))


@given(SIDS, st.lists(st.integers(0, 420), max_size=6))
@settings(deadline=None)
def test_a_step_is_possible_exactly_when_some_sid_starts_so(tiny, sids, path: list[int]) -> None:
    trie = build_trie(sids, tiny)
    real = tiny.sid_ids(sids[0])
    spelled = [tuple(tiny.sid_ids(sid)) for sid in sids]
    for tokens in (path, real[: len(path)], [*real[:2], *path[:1]]):
        possible = any(s[: len(tokens)] == tuple(tokens) for s in spelled)
        node: int | None = ROOT
        try:
            for token_id in tokens:
                node = trie.step(node, token_id)
        except KeyError:
            node = None
        assert (node is not None) is possible


def test_spellings_must_be_distinct_and_equally_long() -> None:
    with pytest.raises(ValueError, match="same tokens"):
        SidTrie([((1,), [5]), ((2,), [5])])
    with pytest.raises(ValueError, match=r"got lengths \[1, 2\]"):
        SidTrie([((1,), [5]), ((2, 3), [5, 6])])
    with pytest.raises(ValueError, match=r"got lengths \[\]"):
        SidTrie([])


def test_a_sid_that_cannot_be_spelled_is_refused(tiny) -> None:
    with pytest.raises(DataError, match="<s_c_5>"):
        build_trie([(0, 0, 5)], tiny)


def test_enough_beams_find_the_exact_order(make, shape) -> None:
    policy = make(**shape)
    sids = [s for s in itertools.product(range(4), range(3), range(5)) if sum(s) % 3]
    trie = build_trie(sids, policy)
    scores = score_continuations(policy, PROMPTS, [[policy.sid_ids(s) for s in sids]] * 3)
    for found, expected in zip(beam_sids(policy, PROMPTS, trie, len(sids)), scores, strict=True):
        order = np.argsort(-np.array(expected), kind="stable")
        assert [sid for sid, _ in found] == [sids[i] for i in order]
        assert np.allclose([score for _, score in found], np.array(expected)[order], atol=1e-4)


def brute_force(policy, prompt: list[int], spelled: dict[tuple[int, ...], tuple[int, ...]], num_beams: int):
    """Beam search by running the whole sequence again at every step."""
    beams = [((), 0.0)]
    for step in range(5):
        grown = []
        for path, score in beams:
            logps = policy.model(input_ids=torch.tensor([prompt + list(path)])).logits[0, -1].log_softmax(-1)
            nexts = {s[step] for s in spelled if s[:step] == path}
            grown += [((*path, t), score + logps[t].item()) for t in nexts]
        beams = sorted(grown, key=lambda b: -b[1])[:num_beams]
    return [(spelled[path], score) for path, score in beams]


@given(SIDS, st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_beam_search_against_brute_force(tiny, sids, num_beams: int) -> None:
    spelled = {tuple(tiny.sid_ids(sid)): sid for sid in sids}
    with torch.no_grad():
        expected = [brute_force(tiny, prompt, spelled, num_beams) for prompt in PROMPTS]
    for found, wanted in zip(beam_sids(tiny, PROMPTS, build_trie(sids, tiny), num_beams), expected, strict=True):
        assert [sid for sid, _ in found] == [sid for sid, _ in wanted]
        assert np.allclose([s for _, s in found], [s for _, s in wanted], atol=1e-4)


def test_batches_do_not_change_beams(tiny) -> None:
    trie = build_trie([(0, 0, 0), (1, 2, 3), (3, 1, 4), (3, 1, 2)], tiny)
    whole = beam_sids(tiny, PROMPTS, trie, 3)
    single = beam_sids(tiny, PROMPTS, trie, 3, max_rows=1)
    assert [[s for s, _ in beams] for beams in whole] == [[s for s, _ in beams] for beams in single]
    assert [len(beams) for beams in whole] == [3, 3, 3]
    assert [len(beams) for beams in beam_sids(tiny, PROMPTS, trie, 9)] == [4, 4, 4]

"""Rows that continue prompts, against the model run on each row's whole sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rerankkit.lm import Policy, group_logps, roll_out
from rerankkit.lm import cache as cache_module
from rerankkit.lm.cache import Branches, Prefill, bfloat16_pays, lowered


def plain(policy: Policy, token_ids: list[int]) -> Tensor:
    """Hidden states [T, H] of one sequence alone."""
    with torch.no_grad():
        states: Tensor = policy.decoder(input_ids=torch.tensor([token_ids]), use_cache=False).last_hidden_state[0]
    return states


PROMPTS = st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=9), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(PROMPTS, st.data())
@torch.no_grad()
def test_rows_come_and_go_and_see_their_own_prompt(tiny, prompts: list[list[int]], data: st.DataObject) -> None:
    owners = data.draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=7))
    prefill = Prefill(tiny, prompts)
    for prompt, hidden in zip(prompts, prefill.hidden, strict=True):
        assert torch.allclose(hidden, plain(tiny, prompt)[-1], atol=1e-4)
    branches = Branches(prefill, owners, 4)
    rows = [list(prompts[owner]) for owner in owners]
    for step in range(4):
        new = [(7 * step + 3 * i) % 300 for i in range(len(rows))]
        position_ids = torch.tensor([[len(row)] for row in rows])
        hidden = branches.step(torch.tensor(new)[:, None], position_ids)
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
        for row, state in zip(rows, hidden[:, 0], strict=True):
            assert torch.allclose(state, plain(tiny, row)[-1], atol=1e-4)
        done = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
        if done.all():
            break
        alive = branches.leave(done)
        rows = [rows[i] for i in alive.tolist()]
        assert sorted(alive.tolist()) == np.flatnonzero(~done).tolist()


@torch.no_grad()
def test_several_places_a_row_see_what_they_are_told(make, shape) -> None:
    policy = make(**shape)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    branches = Branches(Prefill(policy, prompts), [0, 1], 5)
    lengths = torch.tensor([[3], [5]])
    # two children of each prompt, then three grandchildren: two of the first child, one of the second
    first = branches.step(torch.tensor([[1, 2], [3, 4]]), lengths.expand(2, 2), torch.eye(2).bool().expand(2, 2, 2))
    keep = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1]]).bool()
    second = branches.step(torch.tensor([[20, 21, 22], [23, 24, 25]]), (lengths + 1).expand(2, 3), keep.expand(2, 3, 5))
    children, grandchildren = [[1, 2], [3, 4]], [[(1, 20), (1, 21), (2, 22)], [(3, 23), (3, 24), (4, 25)]]
    for p, prompt in enumerate(prompts):
        for state, child in zip(first[p], children[p], strict=True):
            assert torch.allclose(state, plain(policy, [*prompt, child])[-1], atol=1e-4)
        for state, path in zip(second[p], grandchildren[p], strict=True):
            assert torch.allclose(state, plain(policy, [*prompt, *path])[-1], atol=1e-4)


@torch.no_grad()
def test_a_prompts_keys_are_held_once_and_go_with_its_rows(tiny) -> None:
    prompts = [[1, 2, 3]] * 3 + [[4] * 9]
    prefill = Prefill(tiny, prompts)
    branches = Branches(prefill, [0, 0, 0, 1, 1, 2, 3], 2)
    assert [keys.shape[::2] for keys in branches.keys] == [(4, 9), (4, 9)]  # not a row for each of the seven
    assert branches.keys[0] is prefill.keys[0]
    branches.leave(np.array([False, False, True, True, True, True, True]))
    assert [keys.shape[::2] for keys in branches.keys] == [(1, 3), (1, 3)]


@torch.no_grad()
def test_prompts_may_be_read_in_several_goes(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11]]
    whole = Prefill(tiny, prompts)
    monkeypatch.setattr(cache_module, "PREFILL_TOKENS", 4)
    parts = Prefill(tiny, prompts)
    assert torch.allclose(whole.hidden, parts.hidden, atol=1e-5)
    for a, b in zip(whole.keys + whole.values, parts.keys + parts.values, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_lowered_weights_are_given_back_untouched(make) -> None:
    policy = make()
    before = {name: p.data_ptr() for name, p in policy.model.named_parameters()}
    copies = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    kinds: dict[str, torch.dtype] = {}

    def fail() -> None:
        with lowered(policy, torch.bfloat16):
            kinds.update({name: p.dtype for name, p in policy.model.named_parameters()})
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        fail()
    assert {kind for name, kind in kinds.items() if "embed" not in name} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if "embed" in name} == {torch.float32}
    for name, parameter in policy.model.named_parameters():
        assert parameter.data_ptr() == before[name] and torch.equal(parameter, copies[name])
    assert policy.decoder(input_ids=torch.tensor([[1, 2]])).last_hidden_state.dtype == torch.float32


def test_the_gap_of_bfloat16_sampling_is_small_and_stated(make) -> None:
    """Weights of a usual size: sampled in bfloat16, recomputed in float32, a token's logp is off by .02 on average."""
    policy = make(num_kv_heads=2)
    for parameter in policy.model.parameters():
        if parameter.ndim == 2:
            parameter.data.div_(3)
    prompts = [[5, 6, 7], [8, 9]]
    groups = roll_out(policy, prompts, 8, max_new_tokens=16, temperature=1.0, seeds=[1, 2], autocast=torch.bfloat16)
    again = group_logps(policy, prompts, [[s.token_ids for s in group] for group in groups]).logps.detach()
    gap = (again - torch.tensor([x for group in groups for s in group for x in s.logps])).abs()
    assert 0 < float(gap.mean()) < 0.02 and float(gap.max()) < 0.2


@pytest.mark.parametrize(
    ("able", "pays"),
    [({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_bfloat16_pays_where_the_processor_multiplies_it(able, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert bfloat16_pays(torch.device("cpu")) is pays
    assert bfloat16_pays(torch.device("cuda"))

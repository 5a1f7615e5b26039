from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.lm import Policy, apply_gradients, passes


def test_passes_count_padding_at_the_width_of_their_longest_row() -> None:
    # 60 is too long for any pass and gets its own; 15 is padded to: 2 rows; then 4 rows of width 9, then the last.
    assert passes([60, 15, 10, 9, 8, 7, 6, 5], 40) == [[0], [1, 2], [3, 4, 5, 6], [7]]
    assert passes([5, 9, 9, 2], 20) == [[0, 1], [2, 3]]  # the second row widens the first
    assert passes([3, 3, 3], 100, max_rows=2) == [[0, 1], [2]]
    assert passes([], 10) == []


@given(st.lists(st.integers(1, 50)), st.integers(1, 120), st.integers(1, 5))
def test_every_row_is_in_one_pass_that_fits(sizes: list[int], max_tokens: int, max_rows: int) -> None:
    found = passes(sizes, max_tokens, max_rows)
    assert [index for some in found for index in some] == list(range(len(sizes)))
    for some in found:
        assert 1 <= len(some) <= max_rows
        assert len(some) == 1 or len(some) * max(sizes[i] for i in some) <= max_tokens


def test_gradients_are_clipped_applied_and_cleared(make) -> None:  # type: ignore[no-untyped-def]
    policy: Policy = make()
    weights = list(policy.model.parameters())
    before = [weight.detach().clone() for weight in weights]
    weights[1].grad = torch.full_like(weights[1], 3.0)
    norm = apply_gradients(policy, torch.optim.SGD(weights, lr=0.5), max_grad_norm=2.0)
    # all entries alike: clipped to length 2, each is 2 / sqrt(n)
    assert norm == pytest.approx(3.0 * weights[1].numel() ** 0.5)
    torch.testing.assert_close(weights[1], before[1] - 0.5 * 2.0 / weights[1].numel() ** 0.5)
    assert torch.equal(weights[0], before[0]) and all(weight.grad is None for weight in weights)


def test_a_gradient_that_is_no_number_makes_no_step(make) -> None:  # type: ignore[no-untyped-def]
    policy: Policy = make()
    weight = next(iter(policy.model.parameters()))
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, torch.nan)
    assert not apply_gradients(policy, torch.optim.SGD([weight], lr=1.0), 1.0) < torch.inf
    assert torch.equal(weight, before) and weight.grad is None

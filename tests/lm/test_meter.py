from __future__ import annotations

import pytest

from rerankkit.lm import group_work, metered, needed_flops, sequence_work, spent_on
from rerankkit.lm import meter as module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`clock[0]` is what the clock shows."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_blocks_count_for_themselves_and_the_rest_is_other(clock: list[float]) -> None:
    with metered() as meter:
        clock[0] += 1
        with spent_on("rollout"):
            clock[0] += 2
            with spent_on("prefill"):
                clock[0] += 4
            clock[0] += 8
        with spent_on("prefill"):
            clock[0] += 16
        clock[0] += 32
    meter.flops = 5e12
    clock[0] += 1000  # after the step: nobody's
    assert meter.metrics(num_tokens=126) == {
        "time/other": 33.0,
        "time/rollout": 10.0,
        "time/prefill": 20.0,
        "step_time": 63.0,
        "tokens_per_second": 2.0,
        "tflops": 5 / 63,
    }


def test_an_error_closes_what_it_passes_through(clock: list[float]) -> None:
    def failing() -> None:
        clock[0] += 3
        raise KeyError

    with pytest.raises(KeyError), metered() as outer, spent_on("reward"):
        failing()
    assert outer.seconds == {"other": 0.0, "reward": 3.0}
    with spent_on("reward"):  # outside a step it is nobody's
        clock[0] += 5
    assert outer.seconds["reward"] == 3.0


def test_work_counts_tokens_places_and_pairs() -> None:
    assert sequence_work([2, 3], num_logits=4) == (5, 4, 3 + 6)
    # prompt of 3: 6 pairs; answers of 1 and 2: 1 + 3 among themselves, 3 * (1 + 2) with the prompt
    assert group_work(3, [1, 2]) == (6, 3, 6 + 4 + 9)
    assert sequence_work([2], 1) + sequence_work([1], 1) == (3, 2, 4)


@pytest.mark.parametrize("tie", [True, False])
def test_flops_by_hand(make, tie: bool) -> None:  # type: ignore[no-untyped-def]
    policy = make(tie_embeddings=tie, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12)
    rows = policy.model.get_input_embeddings().weight.shape[0]
    # q, k, v, o: 4 * 8 * 8; gate, up, down: 3 * 8 * 12; norms are no matrices
    body, head = 256 + 288, 8 * rows
    work = sequence_work([3], num_logits=2)  # 6 pairs, each 2 * 2 * 8 operations in the one layer
    forward = 2 * (body * 3 + head * 2) + 32 * 6
    assert needed_flops(policy, work, training=False) == forward
    assert needed_flops(policy, work, training=True) == 3 * forward
    for parameter in policy.decoder.parameters():
        parameter.requires_grad_(False)
    trained = 0 if tie else 2 * head * 2  # frozen weights need no gradient, but the gradient passes through them
    assert needed_flops(policy, work, training=True) == 2 * forward + trained + 32 * 6

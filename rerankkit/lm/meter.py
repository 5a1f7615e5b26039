"""What a step costs: seconds by what they were spent on, and the floating-point operations that it needed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from rerankkit import processes
from rerankkit.lm.policy import Policy

OTHER = "other"


@dataclass
class Meter:
    """A step's bill, open while `metered` is."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By what `spent_on` said, and the rest as `other`."""
    flops: float = 0.0
    """What the step needed, all processes together; whoever knows adds to it."""
    _open: list[str] = field(default_factory=lambda: [OTHER])
    _since: float = 0.0

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """For the log: `time/*`, which add up to `step_time` (seconds), `tokens_per_second` and `tflops`.

        tflops = `flops` / `step_time` / 1e12: what was useful, as in model FLOPs utilisation; padding, recomputed
        activations and the optimizer's own work are not in it.
        """
        step_time = sum(self.seconds.values())
        times = {f"time/{what}": seconds for what, seconds in self.seconds.items()}
        speed = {"tokens_per_second": num_tokens / step_time, "tflops": self.flops / step_time / 1e12}
        return {**times, "step_time": step_time, **speed}

    def _turn(self) -> None:
        """Charge the time since the last turn to what is innermost now."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # kernels run on after the call that started them
        now = time.perf_counter()
        what = self._open[-1]
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._since
        self._since = now


_METERS: list[Meter] = []


@contextmanager
def metered() -> Iterator[Meter]:
    """Measure a step: within it, code anywhere may say `with spent_on(...)`."""
    meter = Meter(_since=time.perf_counter())
    _METERS.append(meter)
    try:
        yield meter
    finally:
        meter._turn()
        _METERS.remove(meter)


@contextmanager
def spent_on(what: str) -> Iterator[None]:
    """Count the time within towards `time/WHAT`; blocks inside it count for themselves alone. Free outside a step."""
    if not _METERS:
        yield
        return
    meter = _METERS[-1]
    meter._turn()
    meter._open.append(what)
    try:
        yield
    finally:
        meter._turn()
        meter._open.pop()


def spent_waiting() -> AbstractContextManager[None]:
    """`spent_on` for exchanges with other processes: `time/sync`, or `other` where there are none."""
    return spent_on("sync" if processes.count() > 1 else OTHER)


class Work(NamedTuple):
    """What a forward pass has to do, padding left out."""

    tokens: int
    """Tokens that go through the decoder."""
    logits: int
    """Places whose next token is asked for."""
    pairs: int
    """(query, key) pairs that the mask lets see one another."""

    def __add__(self, other: Work) -> Work:  # type: ignore[override]  # not a tuple's: these are sums
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def sequence_work(lengths: Iterable[int], num_logits: int) -> Work:
    """The work of separate sequences: n tokens see n (n + 1) / 2 pairs."""
    sizes = list(lengths)
    return Work(sum(sizes), num_logits, sum(n * (n + 1) // 2 for n in sizes))


def group_work(prompt_length: int, completion_lengths: Sequence[int]) -> Work:
    """The work of completions that share their prompt: it is read once, and every completion sees it and itself."""
    shared = sum(prompt_length * n for n in completion_lengths)
    prompt = sequence_work([prompt_length], 0)
    return prompt + sequence_work(completion_lengths, sum(completion_lengths)) + Work(0, 0, shared)


def needed_flops(policy: Policy, work: Work, *, training: bool) -> float:
    """Floating-point operations that some work needs, a multiplication and an addition counted apart.

        forward    2 (N tokens + V H logits) + 4 L A pairs
        training   forward, once more for the gradient of activations, and once more for that of weights:
                   2 (N' tokens + (V H)' logits) + 4 L A pairs, where ' counts trained weights only

    N: weights of the decoder's matrices, embeddings left out; V H: the output layer's; L layers, A = heads * head size.
    """
    table = policy.model.get_input_embeddings()
    skipped = {id(parameter) for parameter in table.parameters()}
    matrices = [p for p in policy.decoder.parameters() if p.ndim >= 2 and id(p) not in skipped]
    head = list(policy.model.get_output_embeddings().parameters())
    heads = [p for p in head if p.ndim >= 2]
    config = policy.model.config
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention: float = 4.0 * config.num_hidden_layers * config.num_attention_heads * width * work.pairs

    def products(trained_only: bool) -> float:
        body, output = (
            sum(getattr(p, "ds_numel", p.numel()) for p in some if p.requires_grad or not trained_only)
            for some in (matrices, heads)
        )
        return 2.0 * (body * work.tokens + output * work.logits)

    forward = products(False) + attention
    return 2 * forward + products(True) + attention if training else forward

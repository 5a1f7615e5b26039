"""The CPU kernel of attention's backward pass, in bfloat16 and cast to float32: python benchmarks/backward.py

Four heads of 32, causal, one thread; CPU milliseconds, medians of alternating runs. `rerankkit.lm.attention` casts for
up to 512 queries.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch


def main() -> None:
    torch.set_num_threads(1)
    aten: Any = torch.ops.aten
    print("queries  bfloat16, ms  cast to float32, ms  ratio")
    for length in (32, 57, 128, 256, 512, 1024, 2048):
        q, k, v, grad = (torch.randn(4, 1, length, 32, dtype=torch.bfloat16) for _ in range(4))
        out, total = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward

        def own(states: Any = (grad, q, k, v, out), total: Any = total, backward: Any = backward) -> None:
            backward(*states, total, 0.0, True)

        def cast(states: Any = (grad, q, k, v, out), total: Any = total, backward: Any = backward) -> None:
            backward(*(x.float() for x in states), total, 0.0, True)

        times = [(milliseconds(own), milliseconds(cast)) for _ in range(5)]
        a, b = (statistics.median(one) for one in zip(*times, strict=True))
        print(f"{length:7d}  {a:12.3f}  {b:19.3f}  {a / b:5.1f}", flush=True)


def milliseconds(work: Callable[[], None], runs: int = 10) -> float:
    work()
    started = time.process_time()
    for _ in range(runs):
        work()
    return (time.process_time() - started) / runs * 1e3


if __name__ == "__main__":
    main()

"""Tiny policies of every shape that the mathematics must hold for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from rerankkit.lm import Policy, scratch_policy
from rerankkit.types import SidSurface

WORDS = ["red", "blue", "green", "soap", "cream", "brush", "for", "hair", "skin", "the", "and", "with", "price"]
SIZES = (4, 3, 5)


def make_policy(seed: int = 0, **settings: Any) -> Policy:
    """A policy of a few thousand weights, extended with SIDs; embeddings scaled up so that its choices are not flat."""
    draw = random.Random(seed)
    corpus = [" ".join(draw.choice(WORDS) for _ in range(12)) for _ in range(40)]
    shape: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 400}
    policy = scratch_policy(corpus, seed=seed, **(shape | settings))
    policy.extend(SIZES, SidSurface(), seed=seed)
    for parameter in policy.model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return policy


@pytest.fixture(scope="session")
def make() -> Callable[..., Policy]:
    return make_policy


@pytest.fixture(scope="session")
def tiny() -> Policy:
    """Shared: tests must not change it."""
    return make_policy(num_kv_heads=2)


SHAPES = [
    pytest.param(
        {"architecture": a, "num_kv_heads": k, "tie_embeddings": t}, id=f"{a}-kv{k}-{'tied' if t else 'untied'}"
    )
    for a in ("llama", "qwen3")
    for k in (2, 4)
    for t in (True, False)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SHAPES)

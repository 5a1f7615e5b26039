"""How many rollouts reinforcement needs where nothing but reinforcement is in the way: a linear policy over evidence.

    python benchmarks/linear_rl.py RUN [--seeds 0 1 2]

RUN is a run whose lists hold evidence, made at least up to its candidates. The policy is a Plackett-Luce distribution
over orders, its logits linear in log rank, facts and their products (54 weights for eight facts). It starts from equal
weights, as a teacher that learned nothing, or from a conditional logit on the targets of 4,000 lists, and is reinforced
by the policy gradient of NDCG@5 with centred advantages of groups (Adam, cosine), on training lists. Printed: NDCG@5 of
its best order on the validation lists, a column a start, range over seeds. Its own mistakes are few, so that what a
language model falls short of it is the model's, and what it falls short of the logit is reinforcement's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from rerankkit.data.lists import CandidateLists

Floats = NDArray[np.float64]
NUM_FIT = 4000
EQUAL = 0.35 / 4
SETTINGS = (  # temperature, learning rate, prompts a step, group, steps
    (1.0, 0.003, 32, 8, 150),
    (1.0, 0.01, 32, 8, 150),
    (0.3, 0.003, 128, 4, 50),
    (0.3, 0.003, 128, 4, 100),
    (0.3, 0.03, 128, 4, 150),
    (0.3, 0.03, 128, 4, 300),
    (0.3, 0.03, 128, 8, 300),
)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("run", type=Path)
    asked.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = asked.parse_args()
    (folder,) = options.run.glob("stages/*-candidates")
    lists = CandidateLists.load(folder)
    train, valid = features(lists, "train"), features(lists, "valid")
    width, facts = train[0].shape[2], len(lists.of("train")[0].evidence[0])
    equal = np.array([1.0, *[EQUAL] * facts, *[0.0] * (width - 1 - facts)])
    learned = logit(train[0][:NUM_FIT], train[1][:NUM_FIT], equal)
    print(
        f"{len(train[1])} training and {len(valid[1])} validation lists; NDCG@5 {gain(valid[0][:, :, 0], valid[1]):.4f}"
    )
    print("| temperature | learning rate | prompts x group x steps | rollouts | from equal weights | from the logit |")
    print("| --- " * 6 + "|")
    starts = [f"{gain(valid[0] @ start, valid[1]):.4f}" for start in (equal, learned)]
    print(f"| | | none | 0 | {starts[0]} | {starts[1]} |")
    for temperature, rate, prompts, group, steps in SETTINGS:
        cells = []
        for start in (equal, learned):
            ends = [reinforced(start, *train, temperature, rate, prompts, group, steps, seed) for seed in options.seeds]
            reached = [gain(valid[0] @ end, valid[1]) for end in ends]
            cells.append(f"{min(reached):.4f} to {max(reached):.4f}")
        amount = f"{prompts} x {group} x {steps} | {prompts * group * steps:,}"
        print(f"| {temperature} | {rate} | {amount} | {cells[0]} | {cells[1]} |", flush=True)


def features(lists: CandidateLists, split: str) -> tuple[Floats, NDArray[np.int64]]:
    """[N, C, F] and the place of each target, of the full lists that hold it."""
    size = max(len(one.candidates) for one in lists.of(split))
    some = [one for one in lists.of(split) if one.target in one.candidates and len(one.candidates) == size]
    told = [[(-np.log(1 + k), *facts.values()) for k, facts in enumerate(one.evidence)] for one in some]
    known = np.array(told, dtype=np.float64)
    first, second = np.triu_indices(known.shape[2])
    scaled = np.concatenate([known[:, :, :1], known[:, :, 1:] / 4], axis=2)
    products = scaled[:, :, first] * scaled[:, :, second]
    return np.concatenate([known, products], axis=2), np.array([one.candidates.index(one.target) for one in some])


def gain(scores: Floats, targets: NDArray[np.int64]) -> float:
    order = np.argsort(-scores, axis=1, kind="stable")
    return float(ndcg5(np.argmax(order == targets[:, None], axis=1)).mean())


def ndcg5(places: NDArray[np.int64]) -> Floats:
    return np.where(places < 5, 1 / np.log2(places + 2), 0.0)


def logit(x: Floats, targets: NDArray[np.int64], start: Floats) -> Floats:
    """McFadden's conditional logit, with a ridge of 1 about `start`."""
    apart = x - x[np.arange(len(x)), targets][:, None]

    def loss(weights: Floats) -> tuple[float, Floats]:
        logits = apart @ weights
        peak = logits.max(axis=1, keepdims=True)
        p = np.exp(logits - peak)
        total = p.sum(axis=1, keepdims=True)
        value = float((np.log(total) + peak).sum()) + 0.5 * float((weights - start) @ (weights - start))
        return value, np.einsum("nc,ncf->f", p / total, apart) + weights - start

    found: Floats = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return found


def reinforced(
    start: Floats,
    x: Floats,
    targets: NDArray[np.int64],
    temperature: float,
    rate: float,
    prompts: int,
    group: int,
    steps: int,
    seed: int,
) -> Floats:
    random = np.random.default_rng(seed)
    weights, mean, square = start.copy(), np.zeros_like(start), np.zeros_like(start)
    queue: list[int] = []
    for step in range(1, steps + 1):
        if len(queue) < prompts:
            queue = random.permutation(len(x)).tolist()
        rows, queue = queue[:prompts], queue[prompts:]
        logits = x[rows] @ weights / temperature  # [B, C]
        order = np.argsort(-(logits[:, None] + random.gumbel(size=(prompts, group, logits.shape[1]))), axis=2)
        reward = ndcg5(np.argmax(order == targets[rows][:, None, None], axis=2))  # [B, G]
        advantage = reward - reward.mean(axis=1, keepdims=True)
        chosen = np.take_along_axis(np.repeat(logits[:, None], group, axis=1), order, axis=2)
        e = np.exp(chosen - chosen.max(axis=2, keepdims=True))
        left = np.cumsum(e[:, :, ::-1], axis=2)[:, :, ::-1]
        slope = (1 - e * np.cumsum(1 / left, axis=2)) * advantage[:, :, None]  # d log P(order) / d logit, by place
        by_candidate = np.zeros_like(slope)
        np.put_along_axis(by_candidate, order, slope, axis=2)
        ascent = np.einsum("bc,bcf->f", by_candidate.sum(axis=1), x[rows]) / temperature / (prompts * group)
        mean, square = 0.9 * mean + 0.1 * ascent, 0.999 * square + 0.001 * ascent * ascent
        now = rate * (0.1 + 0.45 * (1 + np.cos(np.pi * step / steps)))
        weights += now * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return weights


if __name__ == "__main__":
    main()

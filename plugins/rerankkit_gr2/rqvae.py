"""The residual-quantised autoencoder behind GR2's semantic IDs, and its training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from rerankkit_gr2.kmeans import CHUNK, fit_residual_kmeans, sample_rows

_INIT_ITERATIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How an `RqVaeNet` is trained; the fields are `RqVae`'s."""

    epochs: int
    min_steps: int
    max_steps: int
    batch_size: int
    learning_rate: float
    ema: str
    """`residuals`: codes move towards the mean of their residuals. `optimizer`: codes learn by gradient and move only a
    share (1 - decay) of each optimizer step. `off`: codes learn by gradient."""
    decay: float
    kmeans_init: bool
    diversity: float
    dead_code_reset: int
    commitment: float
    contrastive: float
    contrastive_temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Contrast:
    """Who is engaged together with whom, as the rows of a sparse matrix."""

    starts: NDArray[np.int64]
    """[N + 1]; the partners of item i are `partners[starts[i] : starts[i + 1]]`."""
    partners: NDArray[np.int64]

    @classmethod
    def of(cls, pairs: NDArray[np.int64], num_items: int) -> Contrast:
        """From pairs [E, 2] in either order; a pair that occurs twice is drawn twice as often."""
        both = np.concatenate([pairs, pairs[:, ::-1]])
        both = both[both[:, 0] != both[:, 1]]
        both = both[np.argsort(both[:, 0], kind="stable")]
        return cls(np.searchsorted(both[:, 0], np.arange(num_items + 1)), both[:, 1].copy())

    def draw(self, rows: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions in `rows` of the items that have a partner, and for each a partner at random."""
        counts = self.starts[rows + 1] - self.starts[rows]
        places = np.flatnonzero(counts)
        picks = self.starts[rows[places]] + (rng.random(len(places)) * counts[places]).astype(np.int64)
        return places, self.partners[picks]


class RqVaeNet(nn.Module):
    """Encoder [*, D] -> [*, Z], L codebooks of C codes in Z dimensions, decoder [*, Z] -> [*, D]."""

    centre: Tensor
    scale: Tensor

    def __init__(self, dimensions: int, levels: int, codes: int, latent: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.encoder = _mlp([dimensions, *hidden, latent])
        self.decoder = _mlp([latent, *reversed(hidden), dimensions])
        self.codebooks = nn.Parameter(torch.randn(levels, codes, latent))
        # inputs are centred and brought to unit variance over all, so that loss weights mean the same for any encoder
        self.register_buffer("centre", torch.zeros(dimensions))
        self.register_buffer("scale", torch.ones(()))

    def latents(self, points: Tensor) -> Tensor:
        """[B, D] -> [B, Z]."""
        latents: Tensor = self.encoder((points - self.centre) / self.scale)
        return latents

    def restored(self, latents: Tensor) -> Tensor:
        """[B, Z] -> [B, D]."""
        restored: Tensor = self.decoder(latents) * self.scale + self.centre
        return restored


def train(
    embeddings: NDArray[np.float32],
    net: RqVaeNet,
    how: Training,
    contrast: Contrast | None = None,
    bar: Callable[..., Iterator[Any]] = lambda items, **how: iter(items),
) -> None:
    """Train in place, from embeddings [N, D] of which only batches and a sample are ever copied.

    Loss of a batch, with r_1 = encoder(x), e_k the code nearest to r_k, r_{k+1} = r_k - e_k, and z the straight-through
    sum of the e_k:

        |decoder(z) - x|^2 + commitment * sum_k |r_k - sg(e_k)|^2          (means over dimensions; sg: stop gradient)
        + sum_k |sg(r_k) - e_k|^2                                          unless codes follow residuals by EMA
        + diversity * sum_k C * sum_j p_kj^2,  p_k = batch mean of softmax(-|r_k - e|^2)
        + contrastive * InfoNCE(r_1, r_1 of a co-engaged item)             see `contrastive_loss`

    RQ-VAE: Lee et al. 2022, 2203.01941; for recommendation: Rajput et al. 2023, 2305.05065. EMA, diversity loss,
    dead-code reset and contrastive loss as readers of GR2 (Liang et al. 2026, 2602.07774) report them; their weights,
    and how partners are drawn, are our choice.
    """
    rng = np.random.default_rng(how.seed)
    _standardise(net, embeddings)
    net.codebooks.requires_grad_(how.ema != "residuals")
    if how.kmeans_init:
        _init_codebooks(net, embeddings, how, rng)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=how.learning_rate, fused=True)
    unused = torch.zeros(net.codebooks.shape[:2], dtype=torch.long)  # [L, C] batches since a code was last used
    batch_size = min(how.batch_size, len(embeddings))
    epoch_steps = -(-len(embeddings) // batch_size)
    num_steps = min(max(how.epochs * epoch_steps, how.min_steps), max(how.max_steps, how.min_steps))
    batches = _batches(len(embeddings), batch_size, rng)
    for _, rows in zip(bar(range(num_steps), total=num_steps, what="training the RQ-VAE"), batches, strict=False):
        points = _standard(net, embeddings, rows)
        partners = None
        if contrast is not None and how.contrastive:
            places, others = contrast.draw(rows, rng)
            partners = torch.from_numpy(places), torch.from_numpy(others), _standard(net, embeddings, others)
        before = net.codebooks.detach().clone() if how.ema == "optimizer" else None
        residuals, ids = _step(net, points, torch.from_numpy(rows), partners, how, optimizer)
        with torch.no_grad():
            if before is not None:
                net.codebooks.copy_(torch.lerp(net.codebooks, before, how.decay))
            for level in range(len(unused)):
                move_codes(net.codebooks[level], unused[level], residuals[level], ids[level], how)


def diversity_loss(distances: Tensor) -> Tensor:
    """C * sum_j p_j^2 for squared distances [B, C]: 1 when the batch uses all codes alike, C when only one."""
    use = distances.neg().softmax(dim=1).mean(dim=0)
    return len(use) * use.square().sum()


def contrastive_loss(latents: Tensor, others: Tensor, rows: Tensor, other_rows: Tensor, temperature: float) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, 1807.03748, eq. 4) of latents [B, Z] and their partners' [B, Z], both ways.

    Cosines over `temperature`; the negatives of a row are the partners of the other rows, but for those that are the
    row's own item or its partner again (`rows`, `other_rows`: [B] item numbers).
    """
    cosines = normalize(latents, dim=1) @ normalize(others, dim=1).T / temperature
    same = (other_rows[None, :] == other_rows[:, None]) | (other_rows[None, :] == rows[:, None])
    same |= rows[None, :] == rows[:, None]
    same.fill_diagonal_(False)
    logits = cosines.masked_fill(same, -torch.inf)
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def move_codes(codebook: Tensor, unused: Tensor, residuals: Tensor, ids: Tensor, how: Training) -> None:
    """EMA and dead-code reset of one level, in place: codebook [C, Z], unused [C], residuals [B, Z], ids [B]."""
    counts = torch.bincount(ids, minlength=len(codebook))
    if how.ema == "residuals":
        # GR2's reading: a code moves towards the mean of this batch's residuals; one without any stays
        means = torch.zeros_like(codebook).index_add_(0, ids, residuals) / counts.clamp(min=1)[:, None]
        codebook.copy_(torch.where(counts[:, None] > 0, torch.lerp(means, codebook, how.decay), codebook))
    unused.add_(1).masked_fill_(counts > 0, 0)
    if not how.dead_code_reset:
        return
    dead = (unused >= how.dead_code_reset).nonzero().squeeze(1)
    if len(dead):
        errors = (residuals - codebook[ids]).square().sum(dim=1)
        worst = errors.topk(min(len(dead), len(errors))).indices
        codebook[dead[: len(worst)]] = residuals[worst]
        unused[dead[: len(worst)]] = 0


def _batches(num_items: int, batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Item numbers, batch by batch, each epoch in an order of its own, without end."""
    while True:
        order = rng.permutation(num_items)
        for start in range(0, num_items, batch_size):
            yield order[start : start + batch_size]


def _standard(net: RqVaeNet, embeddings: NDArray[np.float32], rows: NDArray[np.int64]) -> Tensor:
    points = torch.from_numpy(np.asarray(embeddings[rows], dtype=np.float32))
    return points.sub_(net.centre).div_(net.scale)


def _step(
    net: RqVaeNet,
    inputs: Tensor,
    rows: Tensor,
    partners: tuple[Tensor, Tensor, Tensor] | None,
    how: Training,
    optimizer: torch.optim.Optimizer,
) -> tuple[list[Tensor], list[Tensor]]:
    """One gradient step; each level's residuals [B, Z] and codes [B]."""
    latents = net.encoder(inputs)
    residual, quantised, loss = latents, torch.zeros_like(latents), torch.zeros(())
    residuals, ids = [], []
    for codebook in net.codebooks:
        with torch.set_grad_enabled(how.diversity > 0):
            distances = residual.square().sum(1, keepdim=True) - 2 * residual @ codebook.T + codebook.square().sum(1)
        chosen = torch.from_numpy(distances.detach().numpy().argmin(axis=1))
        code = codebook[chosen]
        loss = loss + how.commitment * mse_loss(residual, code.detach())
        if how.ema != "residuals":
            loss = loss + mse_loss(code, residual.detach())
        if how.diversity:
            loss = loss + how.diversity * diversity_loss(distances)
        residuals.append(residual.detach())
        ids.append(chosen)
        residual = residual - code.detach()
        quantised = quantised + code.detach()
    straight_through = latents + (quantised - latents).detach()
    loss = loss + mse_loss(net.decoder(straight_through), inputs)
    if partners is not None and len(partners[0]) > 1:
        places, other_rows, other_inputs = partners
        other_latents = net.encoder(other_inputs)
        loss = loss + how.contrastive * contrastive_loss(
            latents[places], other_latents, rows[places], other_rows, how.contrastive_temperature
        )
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return residuals, ids


def _standardise(net: RqVaeNet, embeddings: NDArray[np.float32]) -> None:
    """Set the net's centre [D] to the mean, and its scale to the deviation over all dimensions."""
    starts = range(0, len(embeddings), CHUNK)
    centre = sum(embeddings[i : i + CHUNK].sum(axis=0, dtype=np.float64) for i in starts) / len(embeddings)
    total = sum(np.square(embeddings[i : i + CHUNK] - centre, dtype=np.float64).sum() for i in starts)
    net.centre.copy_(torch.from_numpy(np.asarray(centre)))
    net.scale.fill_(float(np.sqrt(total / embeddings.size)) or 1.0)


@torch.no_grad()
def _init_codebooks(net: RqVaeNet, embeddings: NDArray[np.float32], how: Training, rng: np.random.Generator) -> None:
    """k-means, level by level, on the latents of a sample."""
    num_levels, num_codes, _ = net.codebooks.shape
    rows = sample_rows(len(embeddings), num_codes, rng)
    parts = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    latents = torch.cat([net.encoder(_standard(net, embeddings, part)) for part in parts])
    net.codebooks.copy_(fit_residual_kmeans(latents, num_levels, num_codes, _INIT_ITERATIONS, how.seed))


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

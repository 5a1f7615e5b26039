"""The residual-quantised autoencoder behind GR2's semantic IDs, and its training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from rerankkit_gr2.kmeans import CHUNK, POINTS_PER_CODE, fit_residual_kmeans, residual_codes

_INIT_ITERATIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How an `RqVaeNet` is trained; the fields are `RqVae`'s."""

    epochs: int
    min_steps: int
    batch_size: int
    learning_rate: float
    ema: bool
    decay: float
    kmeans_init: bool
    diversity: float
    dead_code_reset: int
    commitment: float
    seed: int


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

    @torch.inference_mode()
    def codes(self, points: Tensor) -> Tensor:
        """Nearest codes [B, L] of inputs [B, D]."""
        return residual_codes(self.latents(points), self.codebooks)

    @torch.inference_mode()
    def reconstruct(self, codes: Tensor) -> Tensor:
        """Inputs [B, D] as the codes [B, L] remember them."""
        quantised = sum(self.codebooks[level][codes[:, level]] for level in range(codes.shape[1]))
        restored: Tensor = self.decoder(quantised) * self.scale + self.centre
        return restored


def train(embeddings: NDArray[np.float32], net: RqVaeNet, how: Training) -> None:
    """Fit `net` to embeddings [N, D], which are read in batches and never copied whole.

    Loss of a batch, with r_1 = encoder(x), e_k the code nearest to r_k, r_{k+1} = r_k - e_k, and z the straight-through
    sum of the e_k:

        |decoder(z) - x|^2 + commitment * sum_k |r_k - sg(e_k)|^2          (means over dimensions; sg: stop gradient)
        + sum_k |sg(r_k) - e_k|^2                                          without EMA
        + diversity * sum_k C * sum_j p_kj^2,  p_k = batch mean of softmax(-|r_k - e|^2)

    RQ-VAE: Lee et al. 2022, 2203.01941; for recommendation: Rajput et al. 2023, 2305.05065. EMA, diversity loss and
    dead-code reset as readers of GR2 (Liang et al. 2026, 2602.07774) report them; their weights are our choice.
    """
    rng = np.random.default_rng(how.seed)
    num_items = len(embeddings)
    _standardise(net, embeddings)
    net.codebooks.requires_grad_(not how.ema)
    if how.kmeans_init:
        _init_codebooks(net, embeddings, how, rng)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=how.learning_rate, fused=True)
    unused = torch.zeros(net.codebooks.shape[:2], dtype=torch.long)  # [L, C] batches since a code was last used
    batch_size = min(how.batch_size, num_items)
    batches = -(-num_items // batch_size)
    epochs = max(how.epochs, -(-how.min_steps // batches))
    for _ in range(epochs):
        order = rng.permutation(num_items)
        for start in range(0, num_items, batch_size):
            batch = torch.from_numpy(np.asarray(embeddings[order[start : start + batch_size]], dtype=np.float32))
            residuals, ids = _step(net, batch, how, optimizer)
            with torch.no_grad():
                for level in range(len(unused)):
                    move_codes(net.codebooks[level], unused[level], residuals[level], ids[level], how)


def diversity_loss(distances: Tensor) -> Tensor:
    """C * sum_j p_j^2 for squared distances [B, C]: 1 when the batch uses all codes alike, C when only one."""
    use = distances.neg().softmax(dim=1).mean(dim=0)
    return len(use) * use.square().sum()


def move_codes(codebook: Tensor, unused: Tensor, residuals: Tensor, ids: Tensor, how: Training) -> None:
    """EMA and dead-code reset of one level, in place: codebook [C, Z], unused [C], residuals [B, Z], ids [B]."""
    counts = torch.bincount(ids, minlength=len(codebook))
    if how.ema:
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


def _step(
    net: RqVaeNet, batch: Tensor, how: Training, optimizer: torch.optim.Optimizer
) -> tuple[list[Tensor], list[Tensor]]:
    """One gradient step; each level's residuals [B, Z] and codes [B]."""
    inputs = (batch - net.centre) / net.scale
    latents = net.encoder(inputs)
    residual, quantised, loss = latents, torch.zeros_like(latents), torch.zeros(())
    residuals, ids = [], []
    for codebook in net.codebooks:
        distances = residual.square().sum(1, keepdim=True) - 2 * residual @ codebook.T + codebook.square().sum(1)
        chosen = distances.detach().argmin(dim=1)
        code = codebook[chosen]
        loss = loss + how.commitment * mse_loss(residual, code.detach())
        if not how.ema:
            loss = loss + mse_loss(code, residual.detach())
        if how.diversity:
            loss = loss + how.diversity * diversity_loss(distances)
        residuals.append(residual.detach())
        ids.append(chosen)
        residual = residual - code.detach()
        quantised = quantised + code.detach()
    straight_through = latents + (quantised - latents).detach()
    loss = loss + mse_loss(net.decoder(straight_through), inputs)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return residuals, ids


def _standardise(net: RqVaeNet, embeddings: NDArray[np.float32]) -> None:
    """Set the net's centre [D] to the mean, and its scale to the deviation over all dimensions."""
    centre = embeddings.mean(axis=0, dtype=np.float64)
    total = sum(
        np.square(embeddings[i : i + CHUNK] - centre, dtype=np.float64).sum() for i in range(0, len(embeddings), CHUNK)
    )
    net.centre.copy_(torch.from_numpy(centre))
    net.scale.fill_(float(np.sqrt(total / embeddings.size)) or 1.0)


@torch.no_grad()
def _init_codebooks(net: RqVaeNet, embeddings: NDArray[np.float32], how: Training, rng: np.random.Generator) -> None:
    """k-means, level by level, on the latents of a sample."""
    num_levels, num_codes, _ = net.codebooks.shape
    most = num_codes * POINTS_PER_CODE
    rows = np.arange(len(embeddings))
    if len(rows) > most:
        rows = np.sort(rng.choice(rows, most, replace=False))
    parts = [embeddings[rows[i : i + CHUNK]] for i in range(0, len(rows), CHUNK)]
    latents = torch.cat([net.latents(torch.from_numpy(np.asarray(part, dtype=np.float32))) for part in parts])
    net.codebooks.copy_(fit_residual_kmeans(latents, num_levels, num_codes, _INIT_ITERATIONS, how.seed))


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])

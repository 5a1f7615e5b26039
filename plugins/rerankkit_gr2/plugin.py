"""GR2's parts, registered like anybody's: names and a line each; `parts.py` makes them when a run has chosen them."""

from __future__ import annotations

from rerankkit.plugins import Register, hookimpl

PARTS = "rerankkit_gr2.parts:"


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer everything under the names that configs use."""
    tokenizers, teachers, rewards, optimizers = register.slots()
    tokenizers.lazy("rqvae", PARTS + "rqvae", "RQ-VAE with GR2's techniques, each a switch")
    tokenizers.lazy("residual-kmeans", PARTS + "residual_kmeans", "residual k-means: fast and deterministic")
    teachers.lazy("rejection", PARTS + "rejection", "no answer given; kept if the target comes first, or near")
    teachers.lazy("targeted", PARTS + "targeted", "the answer given; the teacher says why")
    rewards.lazy("gr2", PARTS + "conditional", "rank promotion, and format only where the target moved up")
    rewards.lazy("gr2-unconditional", PARTS + "unconditional", "the ablation that copying the input order hacks")
    rewards.lazy("rank-promotion", PARTS + "rank_promotion", "(rank given - rank answered) / list length")
    rewards.lazy("format", PARTS + "format_only", "1 for a well-formed, complete answer, else 0")
    rewards.lazy("ndcg", PARTS + "ndcg", "NDCG@k of the answered order")
    rewards.lazy("reciprocal-rank", PARTS + "reciprocal_rank", "1 / place of the first relevant candidate")
    rewards.lazy("auc", PARTS + "auc", "share of pairs of unlike relevance in the right order")
    rewards.lazy("exact-first", PARTS + "exact_first", "1 if the target is put first, else 0")
    rewards.lazy("target-logp", PARTS + "target_logp", "log P(target first) from the sampler's own choices")
    rewards.lazy("reasoning-length", PARTS + "reasoning_length", "1 for a reasoning whose length lies in a band")
    rewards.lazy("citations", PARTS + "citations", "share of the SIDs cited in the reasoning that are the ask's own")
    optimizers.lazy("dapo", PARTS + "dapo", "clip-higher, token-level loss, dynamic sampling (2503.14476)")
    optimizers.lazy("grpo", PARTS + "grpo", "group z-scores, mean over each completion (2402.03300)")
    optimizers.lazy("dr-grpo", PARTS + "dr_grpo", "centred rewards, constant divisor (2503.20783)")
    optimizers.lazy("gspo", PARTS + "gspo", "one ratio a sequence (2507.18071)")
    optimizers.lazy("cispo", PARTS + "cispo", "the clipped ratio weighs the gradient (2506.13585)")

"""What semantic IDs are worth to a policy: next-item prediction on Beauty, one policy for each tokenizer.

    python benchmarks/sid_next_item.py PATH/TO/beauty vectors.npy --out runs/next-item --seeds 0 1

Each policy (Llama, 1.1M parameters beside the SID tokens) is made from nothing and trained on SID sequences alone, the
same steps and the same histories for all. Then: the ten likeliest items of the catalogue by beam search, after the
history up to each user's validation step. R@10 and NDCG@10 over `--users` validation users, items of the history left
in. Runs that are there are not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TOKENIZERS: dict[str, list[str]] = {
    "rqvae": ["tokenizer.use=rqvae"],
    "rqvae, contrastive": ["tokenizer.use=rqvae", "tokenizer.contrastive=0.1"],
    "rqvae, search": ["tokenizer.use=rqvae", "tokenizer.last_level=search"],
    "rqvae, contrastive, search": [
        "tokenizer.use=rqvae",
        "tokenizer.contrastive=0.1",
        "tokenizer.last_level=search",
    ],
    "residual-kmeans": ["tokenizer.use=residual-kmeans"],
    "residual-kmeans, random": ["tokenizer.use=residual-kmeans", "tokenizer.last_level=random"],
}


def train(folder: Path, vectors: Path, out: Path, tokenizer: list[str], seed: int, steps: int) -> None:
    """Run the stages up to mid-training."""
    from rerankkit import Pipeline

    config: dict[str, Any] = {
        "seed": seed,
        "data": {
            "use": "tables",
            "folder": str(folder),
            "columns": {"timestamp": "position"},
            "split": "column",
            "k_core": 0,
            "embeddings": {"use": "file", "path": str(vectors)},
        },
        "candidates": {"earlier_steps": 0},
        "policy": {"use": "scratch", "threads": 1, "precision": "bfloat16", "prompt": {"fields": []}},
        "sids": {"min_unique": 0},
        "midtrain": {
            "steps": steps,
            "tokens_per_step": 4096,
            "mix": {"sequence": 1, "caption": 0, "persona": 0, "language": 0},
        },
    }
    Pipeline(config=config, overrides=tokenizer).run(out, until="midtrain", progress=False)


def judge(out: Path, num_users: int) -> dict[str, float]:
    """R@10, NDCG@10 and the SIDs' uniqueness."""
    import math
    import random

    import torch

    from rerankkit import SidMap
    from rerankkit.data.dataset import Dataset
    from rerankkit.lm import Policy, beam_sids, build_trie
    from rerankkit.text.prompts import sequence_prompt

    dataset, sids = Dataset.load(out / "stages/1-data"), SidMap.load(out / "stages/2-sids")
    policy = Policy.load(out / "stages/3-midtrain")
    items = sids.attach(dataset.items)
    steps = list(dataset.steps("valid"))
    steps = random.Random(0).sample(steps, min(num_users, len(steps)))
    trie = build_trie(sids.sids.values(), policy)
    prompts = []
    for user_id, t in steps:
        history = [items[item_id] for item_id in dataset.histories[user_id][:t]]
        prompts.append(policy.document_ids(sequence_prompt(history[-20:], policy.surface, policy.style)))
    found = beam_sids(policy, prompts, trie, 20, autocast=torch.bfloat16)
    hits = gains = 0.0
    for (user_id, t), beams in zip(steps, found, strict=True):
        target = items[dataset.histories[user_id][t]].sid
        ranks = [rank for rank, (sid, _) in enumerate(beams[:10]) if sid == target]
        if ranks:
            # where items share the SID, the target is one of them
            share = 1 / len(sids.items_of(target))
            hits, gains = hits + share, gains + share / math.log2(ranks[0] + 2)
    own = sids.scorecard["own_share"]
    return {"R@10": hits / len(steps), "NDCG@10": gains / len(steps), "own": own, "users": len(steps)}


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/next-item"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--tokenizers", nargs="+", default=list(TOKENIZERS))
    a = parser.parse_args()
    for seed in a.seeds:
        for name in a.tokenizers:
            out = a.out / f"{name.replace(', ', '-')}-{seed}"
            train(a.folder, a.vectors, out, TOKENIZERS[name], seed, a.steps)
            print(json.dumps({"tokenizer": name, "seed": seed, **judge(out, a.users)}), flush=True)


if __name__ == "__main__":
    main()

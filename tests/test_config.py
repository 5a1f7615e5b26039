"""Every fault of a config is found before anything runs, and told by the user's own path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerankkit import config as c
from rerankkit.config import ChosenPart, RunConfig, load_config, make_config, overridden
from rerankkit.errors import ConfigError, PluginError
from rerankkit.plugins import PluginConfig, describe_settings, load_plugins
from rerankkit.types import RunInfo

EXAMPLES = Path(__file__).parent.parent / "examples" / "configs"
PLUGINS = load_plugins(only="gr2")


def read(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A config file, checked."""
    raw, where = load_config(file, overrides)
    return make_config(raw, PLUGINS, where)


def faults(path: Path, text: str, *overrides: str) -> list[str]:
    """What is said about a config file, without its path: a line a fault."""
    file = path / "run.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read(file, overrides)
    return str(caught.value).replace(f"{file}:", "").splitlines()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = 1\n[dta]\n", "2: dta: no such block; "),
        ("[sft]\nepocs = 2\n", "2: sft.epocs: no such key; |Did you mean 'epochs'?"),
        ("[midtrain.mix]\n\nsequnce = 1\n", "3: midtrain.mix.sequnce: no such key; |Did you mean 'sequence'?"),
        ("[midtrain]\nmix = { sequnce = 1 }\n", "2: midtrain.mix.sequnce: no such key; |Did you mean 'sequence'?"),
        ("midtrain.mix.sequnce = 1\n", "1: midtrain.mix.sequnce: no such key; |Did you mean 'sequence'?"),
        ("[data.embeddings]\nuse = 'tfid'\n", "2: data.embeddings.use: 'tfid' cannot be used; |mean 'tfidf'?"),
        ("[data]\nuse = 'wrld'\n", "2: data.use: nothing is named 'wrld'; known: tables, world. |mean 'world'?"),
        ("[tokenizer]\nuse = 'rqvea'\n", "2: tokenizer.use: no tokenizer is named 'rqvea'; |mean 'rqvae'?"),
        ("[tokenizer]\nuze = 'rqvae'\n", "2: tokenizer.uze: no such key; |Did you mean 'use'?"),
        ("[teacher.backend]\nuse = 'opnai'\n", "2: teacher.backend.use: nothing is named 'opnai'; |mean 'openai'?"),
        ("[teacher.backend]\nmodel = 'x'\n", "1: teacher.backend.use: missing; say which is meant."),
        (
            "[teacher.backend]\nuse = 'openai'\nmodle = 'x'\nmodel = 'y'\n",
            "3: teacher.backend.modle: no such key; |concurrency, max_new_tokens, model, retries|mean 'model'?",
        ),
        ("[policy]\nuse = 'pretrained'\n", "1: policy.model: missing; it has no default."),
        ("[[reward]]\nuse = 'gr2'\n[[reward]]\nuse = 'ndcg'\nkk = 3\n", "5: reward[1].kk: no such key; |mean 'k'?"),
        ("[[reward]]\nuse = 'ndgc'\n", "2: reward[0].use: no reward is named 'ndgc'; |mean 'ndcg'?"),
        ("reward = [{ use = 'gr2', wieght = 2 }]\n", "1: reward[0].wieght: no such key; |mean 'weight'?"),
        ("[[reward]]\nweight = inf\n", "2: reward[0].weight: inf is not a number"),
        ("[[reward]]\ngate = 'earnd'\n", "2: reward[0].gate: no condition is named 'earnd'; |Did you mean 'earned'?"),
        ("[[reward]]\ngate = ['valid', 'x']\n", "2: reward[0].gate: no condition is named 'x'; known: earned,"),
        ("[[reward]]\ngate = 3\n", "2: reward[0].gate: 3 is not a condition"),
        ("[[reward]]\ngat = 'valid'\n", "2: reward[0].gat: no such key; |Did you mean 'gate'?"),
        ("[[reward]]\nuse='gr2'\n[[reward]]\nuse='gr2'\n", "2: reward[0].use: 'gr2' is chosen twice"),
        ("reward = []\n", "1: reward: an empty list"),
        ("reward = [3]\n", "1: reward[0]: 3 is not a block"),
        ("sft = 3\n", "1: sft: 3 is not a block; write it as [sft]."),
        ("[sft]\nepochs = 'two'\n", "2: sft.epochs: 'two' cannot be used: Input should be a valid integer"),
        (
            "[policy.prompt]\nfields = 'title'\n",
            "2: policy.prompt.fields: 'title' is no list; put it in brackets: [\"title\"]",
        ),
        ("[sft]\nepochs = 0\n", "2: sft.epochs: 0 cannot be used: Input should be greater than 0."),
        ("[sft]\nlearning_rate = inf\n", "2: sft.learning_rate: inf cannot be used: |finite"),
        ("[policy.prompt]\nfields = ['titel']\n", "2: policy.prompt.fields.0: 'titel' cannot be used; |mean 'title'?"),
        ("[policy]\nhidden_size = 30\n", "1: policy: hidden_size must be a multiple of 2 * num_heads, and"),
        (
            "[midtrain.mix]\n" + "".join(f"{task} = 0\n" for task in c.TaskMix.model_fields),
            "1: midtrain.mix: all shares are 0; ",
        ),
        ("[optimizer]\noverlong_buffer = 300\n", "1: optimizer: overlong_buffer is 300, more than max_new_tokens."),
        ("[candidates]\nuse = 'file'\ntrain = 'a.parquet'\n", "1: candidates: lists from files need both train and"),
        ("[data.embeddings]\nuse = 'file'\n", '1: data.embeddings: use = "file" needs a path'),
        ("[evaluate]\nbootstrap_samples = 99\n", "2: evaluate.bootstrap_samples: 99 cannot be used: |equal to 100"),
        ("seed = -1\n", "1: seed: -1 is not a whole number from 0 to 4294967295."),
        ("seed = true\n", "1: seed: True is not a whole number"),
        ("device = 3\n", "1: device: 3 is not a string"),
        ("plugin_files = 'a.py'\n", "1: plugin_files: 'a.py' is not a list of strings."),
        ("trackers = ['wandb', 3]\n", "1: trackers: ['wandb', 3] is not a list of strings."),
    ],
)
def test_a_fault_is_told_with_its_line_its_path_and_what_was_possible(tmp_path: Path, text: str, said: str) -> None:
    told = faults(tmp_path, text)[0]
    start, *parts = said.split("|")
    assert told.startswith(start)
    assert all(part in told for part in parts), told


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    told = faults(tmp_path, "sed = 1\n[sft]\nepocs = 2\nlearning_rate = -1.0\n[teacher]\nuse = 'oracle'\n")
    assert [line.split(":")[1].strip() for line in told] == ["sed", "sft.learning_rate", "sft.epocs", "teacher.use"]


def test_tables_of_a_list_are_told_apart(tmp_path: Path) -> None:
    text = "[[reward]]\nuse = 'gr2'\n[reward.a]\nx = 1\n[[reward]]\nuse = 'ndcg'\n[reward.a]\nx = 1\n"
    told = faults(tmp_path, text)
    assert [line.split(" no ")[0] for line in told] == ["3: reward[0].a:", "7: reward[1].a:"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.epocs=2", "command line: sft.epocs: no such key; "),
        ("teacher.backend.modle=x", "command line: teacher.backend.modle: no such key; "),
        ("reward.0.kk=1", "command line: reward[0].kk: no such key; "),
        ("optimizer={ use = 'dpo' }", "command line: optimizer.use: no optimizer is named 'dpo'; "),
        ("sft", "command line: 'sft' is not an override; write it as block.key=value."),
        ("=3", "command line: '=3' is not an override"),
        ("reward.7.k=1", "command line: reward.7.k: reward is a list of 1; write its number, from 0."),
        ("seed.x=1", "command line: seed.x: seed is a value and has no keys."),
    ],
)
def test_overrides_are_told_as_the_user_typed_them(tmp_path: Path, override: str, said: str) -> None:
    text = "seed = 3\n[[reward]]\nuse = 'ndcg'\n[teacher.backend]\nuse = 'openai'\nmodel = 'm'\n"
    assert faults(tmp_path, text, override)[0].startswith(said)


def test_overrides_are_toml_values_and_otherwise_strings(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[sft]\nepochs = 1\n[[reward]]\nuse = 'ndcg'\n")
    given = [
        "sft.epochs=2",
        "policy.prompt.terse=true",
        'data.embeddings={use="file",path="v.npy"}',
        "reward.0.k=3",
        "device=cuda:0",
        "trackers=[]",
        "seed= 7 ",
        "tokenizer.use=a=b",
        "teacher.use=",
    ]
    assert load_config(file, given)[0] == {
        "sft": {"epochs": 2},
        "policy": {"prompt": {"terse": True}},
        "data": {"embeddings": {"use": "file", "path": "v.npy"}},
        "reward": [{"use": "ndcg", "k": 3}],
        "device": "cuda:0",
        "trackers": [],
        "seed": 7,
        "tokenizer": {"use": "a=b"},
        "teacher": {"use": ""},
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[sft\n", "at line 1, column 5"),
        (b"seed = 1\nseed = 2\n", "line 2"),
        (b"title = '\xff'\n", "not UTF-8 text (invalid start byte at byte 9)"),
        (b"x = " + b"[" * 5000, "recursion|nested"),
    ],
)
def test_text_that_is_no_toml(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert any(part in str(caught.value) for part in said.split("|"))


def test_each_kind_of_evidence_is_named_once(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "[policy.prompt]\nevidence = ['alike', 'brand', 'alike']\n")
    assert fault == "1: policy.prompt: evidence is ['alike', 'brand', 'alike']: name each fact once."


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b"\xef\xbb\xbfseed = 4\n")
    assert load_config(file)[0] == {"seed": 4}


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "absent.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=reason):
            load_config(path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"holds a list; a config is a table of blocks\."):
        load_config(tmp_path / "config.json")


def test_what_was_resolved_is_accepted_back_and_means_the_same() -> None:
    raw = {
        "seed": 7,
        "data": {"use": "tables", "folder": "f", "columns": {"timestamp": "t"}},
        "policy": {"use": "pretrained", "model": "m"},
        "candidates": {"use": "popularity", "max_test": 5},
        "teacher": {"use": "targeted", "backend": {"use": "openai", "model": "m"}},
        "reward": [{"use": "gr2", "weight": 0.5}, {"use": "ndcg", "k": 3, "gate": "valid"}],
        "optimizer": {"use": "gspo", "steps": 3},
    }
    first = make_config(raw, PLUGINS)
    stored = json.loads(json.dumps(first.resolved()))

    again = make_config(stored, PLUGINS)

    assert again == first and again.resolved() == first.resolved()
    assert stored["reward"] == [
        {"use": "gr2", "weight": 0.5, "format_weight": 0.2, "unparsable": -1.0},
        {"use": "ndcg", "weight": 1.0, "gate": ["valid"], "k": 3},
    ]
    assert stored["teacher"]["backend"]["api_key_env"] == "OPENAI_API_KEY"
    assert isinstance(again.policy, c.PretrainedPolicy) and again.policy.model == "m"


def test_an_empty_config_is_the_shipped_world_with_defaults() -> None:
    config = make_config({}, PLUGINS)
    parts = [part.spec.name for part in (config.tokenizer, config.teacher, *config.reward, config.optimizer)]
    assert isinstance(config.data, c.WorldData) and parts == ["rqvae", "rejection", "gr2", "dapo"]


OWN_EXAMPLES = [path for path in sorted(EXAMPLES.glob("*.toml")) if "./plugins/" not in path.read_text()]
"""The others name parts of distributions under plugins/."""


@pytest.mark.parametrize("path", OWN_EXAMPLES, ids=lambda path: path.stem)
def test_every_example_can_be_run(path: Path) -> None:
    config = read(path)
    assert make_config(config.resolved(), PLUGINS) == config


BLOCKS = [value for value in vars(c).values() if isinstance(value, type) and issubclass(value, PluginConfig)]
SETTINGS = [
    *BLOCKS,
    *dict.fromkeys(part.config for slot in PLUGINS.register.slots() for part in slot.parts.values()),
]


@pytest.mark.parametrize("block", [b for b in SETTINGS if b is not PluginConfig], ids=lambda block: block.__name__)
def test_every_setting_says_what_it_means(block: type[PluginConfig]) -> None:
    assert block.__name__.startswith("_") or (block.__doc__ or "") != (PluginConfig.__doc__ or "")
    rows = [row for row in describe_settings(block) if row["name"] != "use"]  # which the block itself explains
    assert [row["name"] for row in rows if not row["documentation"].endswith((".", "(likewise)."))] == []


def test_a_plugins_own_faulty_settings_are_its_fault(tmp_path: Path) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(
        "from pydantic import field_validator\n"
        "from rerankkit.plugins import PluginConfig, hookimpl\n"
        "class S(PluginConfig):\n"
        "    k: int = 1\n"
        "    @field_validator('k')\n"
        "    @classmethod\n"
        "    def check(cls, value): raise TypeError('oops')\n"
        "@hookimpl\n"
        "def rerankkit_register(register): register.rewards.add('faulty', S, lambda config, info: None)\n"
    )
    with pytest.raises(PluginError, match=r"plugin faulty: the settings of reward 'faulty' are broken: oops"):
        make_config({"reward": {"use": "faulty", "k": 3}}, load_plugins([file]))


class Fixed:
    """A live part without a `repr` of its own."""

    def __init__(self, value: float) -> None:
        self.value = value


def one_function(rollouts: Any) -> list[Any]:
    return []


def other_function(rollouts: Any) -> list[Any]:
    return [None]


def test_live_parts_are_marked_by_source_and_settings_not_by_address() -> None:
    def version(part: Any) -> str:
        return ChosenPart.given("reward", part).spec.version

    assert version(Fixed(1.0)) == version(Fixed(1.0)) != version(Fixed(2.0))
    assert version(one_function) == version(one_function) != version(other_function)
    # no address of this process may have got in
    assert version(one_function) == ChosenPart.given("teacher", one_function).spec.version
    assert str(id(one_function)) not in version(one_function)
    part = Fixed(1.0)
    assert ChosenPart.given("reward", part).build(RunInfo()) is part


words = st.one_of(st.sampled_from(sorted(c._TOP)), st.text(max_size=6))
keys = st.one_of(words, st.sampled_from(["use", "weight", "backend", "mix", "prompt", "embeddings", "steps"]))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["world", "tables", "knn", "file", "rqvae", "gr2", "ndcg", "dapo", "openai", "pretrained"]),
)
values = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)), max_leaves=8
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.one_of(words, st.integers()), values, max_size=5))
def test_any_mapping_resolves_or_is_refused_in_words(raw: dict[Any, Any]) -> None:
    with suppress(ConfigError, PluginError):
        config = make_config(raw, PLUGINS, c.Where("run.toml", "[sft]\n[[reward]]\n", ("sft.x=1",)))
        assert make_config(json.loads(json.dumps(config.resolved())), PLUGINS) == config


@settings(deadline=None, max_examples=200)
@given(st.text(), st.text(max_size=30))
def test_any_text_and_any_override_are_read_or_refused_in_words(text: str, override: str) -> None:
    raw: dict[str, Any] = {"seed": 1, "reward": [{"use": "gr2"}], "sft": {}}
    with suppress(ConfigError):
        c.overridden(raw, [override])
    assert c._line_of(text, "reward[0].use") >= 0


IN_FILE: dict[str, Any] = {
    "tokenizer": {"use": "rqvae", "levels": 2},
    "teacher": {"backend": {"use": "openai", "model": "m"}},
    "candidates": {"size": 7, "tune": False},
    "data": {"embeddings": {"use": "file", "path": "x.npy", "dim": 8}},
}


@pytest.mark.parametrize(
    ("overrides", "block", "left"),
    [
        (["tokenizer.use=hashed"], "tokenizer", {"use": "hashed"}),
        (["tokenizer.use=rqvae"], "tokenizer", {"use": "rqvae", "levels": 2}),
        (["tokenizer.levels=3", "tokenizer.use=hashed"], "tokenizer", {"use": "hashed", "levels": 3}),
        (["teacher.use=rejection"], "teacher", {"use": "rejection", **IN_FILE["teacher"]}),  # the default, so no change
        (["teacher.use=other"], "teacher", {"use": "other"}),
        (["teacher.backend.use=hf"], "teacher", {"backend": {"use": "hf"}}),
        (["teacher.backend.use=hf", "teacher.use=other"], "teacher", {"use": "other", "backend": {"use": "hf"}}),
        # `size` means the same in both, `tune` is the nearest neighbours' alone
        (["candidates.use=popularity"], "candidates", {"use": "popularity", "size": 7}),
        (["candidates.use=typo"], "candidates", {"use": "typo", "size": 7, "tune": False}),
        (["data.embeddings.use=tfidf"], "data", {"embeddings": {"use": "tfidf", "path": "x.npy", "dim": 8}}),
    ],
)
def test_choosing_another_part_drops_the_settings_of_the_one_before(
    overrides: list[str], block: str, left: dict[str, Any]
) -> None:
    assert overridden(IN_FILE, overrides)[block] == left


def test_one_reward_is_a_list_of_one_and_a_bare_file_too() -> None:
    assert overridden({}, ["reward.0.weight=0.5"])["reward"] == [{"weight": 0.5}]
    table = {"reward": {"use": "ndcg", "k": 3, "weight": 2}}
    assert overridden(table, ["reward.0.weight=0.5"])["reward"] == [{"use": "ndcg", "k": 3, "weight": 0.5}]
    assert overridden(table, ["reward.0.use=gr2"])["reward"] == [{"use": "gr2", "weight": 2}]
    with pytest.raises(ConfigError, match="reward is a list of 1"):
        overridden(table, ["reward.1.weight=0.5"])
    (reward,) = make_config(overridden({}, ["reward.0.weight=0.5"]), PLUGINS).reward
    assert (reward.spec.name, reward.weight) == ("gr2", 0.5)
    assert overridden({}, ["plugin_files=a.py"])["plugin_files"] == ["a.py"]
    assert overridden({}, ['plugin_files=["a.py", "b.py"]'])["plugin_files"] == ["a.py", "b.py"]

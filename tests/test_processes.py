"""Several processes do what one does: under torchrun, with gloo, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rerankkit import processes
from rerankkit.errors import ConfigError, UsageError
from rerankkit.pipeline import Pipeline

from . import together

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.toml"
LOSS, WEIGHT = 1e-5, 1e-5
"""How far losses and weights may lie from those of one process: sums are taken in another order, in float32."""


FSDP = {"ACCELERATE_USE_FSDP": "true"}


def zero(stage: int) -> dict[str, str]:
    """What accelerate's launcher hands on for a config that asks for this stage of DeepSpeed's ZeRO."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def launch(number: int, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """torchrun, on a port that it finds itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--rdzv-backend", "c10d"]
    return subprocess.Popen(
        [*launcher, "--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(number), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout: float = 300) -> str:
    """What it said on stderr. Nothing here may hang."""
    try:
        _, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, err
    return err


def largest_difference(a: Path, b: dict[str, torch.Tensor]) -> float:
    saved = load_file(a)
    assert saved.keys() == b.keys()
    return max((saved[name] - b[name]).abs().max().item() for name in b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("supervised", {}),
        ("supervised", FSDP),
        ("supervised", zero(1)),
        ("supervised", zero(3)),
        ("reinforced", {}),
        ("reinforced", FSDP),
        ("reinforced", zero(2)),
        ("reinforced", zero(3)),
    ],
    ids=lambda how: how if isinstance(how, str) else "-".join(how.values()) or "whole",
)
def test_three_processes_with_uneven_shares_train_as_one(what: str, how: dict[str, str], tmp_path: Path) -> None:
    """Batches have one to four rows, or two prompts: in most steps somebody has less to do, or nothing."""
    if "ACCELERATE_USE_DEEPSPEED" in how:
        pytest.importorskip("deepspeed")
    out, alone = tmp_path / "three", tmp_path / "one"
    (out / "work").mkdir(parents=True)
    alone.mkdir()
    process = launch(3, "-m", "tests.together", what, out, **how)
    policy, log = getattr(together, what)(alone)
    finish(process, timeout=600)  # DeepSpeed compiles something when it first meets a machine

    facts = [json.loads((out / f"{rank}.json").read_text()) for rank in range(3)]
    assert [fact["count"] for fact in facts] == [3, 3, 3] and len({fact["pid"] for fact in facts}) == 3
    expected = dict(policy.model.named_parameters())
    size = sum(parameter.numel() for parameter in expected.values())
    if "ACCELERATE_USE_DEEPSPEED" in how:  # each steps a third of the weights, and what fills them up to equal parts
        assert all(size / 3 <= fact["stepped"] < size / 3 + 500 for fact in facts)
    else:
        assert all(fact["stepped"] == size for fact in facts)
    start = dict(together.make_policy(tie=what == "reinforced").model.named_parameters())
    assert max((expected[k] - start[k]).abs().max().item() for k in start) > 100 * WEIGHT
    for rank in range(3):
        assert largest_difference(out / f"{rank}.safetensors", expected) < WEIGHT
        assert largest_difference(out / f"{rank}.safetensors", load_file(out / "0.safetensors")) == 0
    for ours, theirs in zip(log, facts[0]["log"], strict=True):
        same = [k for k in ours if "time" not in k and k not in ("tokens_per_second", "tflops", "said")]
        assert {k: theirs[k] for k in same} == pytest.approx({k: ours[k] for k in same}, rel=1e-3, abs=LOSS)
    if what == "reinforced":
        said = [[row[:3] for row in step["said"]] for step in facts[2]["log"]]
        assert said == [[row[:3] for row in step["said"]] for step in log]
        assert any(len(step) > 8 for step in said)  # groups without signal were replaced, by the same ones

    # Another number of processes goes on from the checkpoint of step 2, and ends the same.
    finish(launch(2, "-m", "tests.together", what, out, **how))
    facts = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(fact["count"], len(fact["log"]), fact["sharded"]) for fact in facts] == [(2, 2, how == FSDP)] * 2
    for rank in range(2):
        assert largest_difference(out / f"{rank}.safetensors", expected) < WEIGHT

    # And so does one that is alone.
    policy, log = getattr(together, what)(out / "work")
    assert len(log) == 2 and largest_difference(out / "0.safetensors", dict(policy.model.named_parameters())) < WEIGHT


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "two"
    finish(launch(2, "-m", "rerankkit", "run", TINY, "--out", out))
    return out


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(two: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    subprocess.run([sys.executable, "-m", "rerankkit", "run", TINY, "--out", one], check=True, capture_output=True)

    assert json.loads((two / "manifest.json").read_text())["processes"] == 2
    assert (two / "log.txt").read_text().count("started on 2 processes") == 12
    for stage in ("3-midtrain", "6-sft", "7-rl"):
        weights = load_file(one / "stages" / stage / "model.safetensors")
        assert largest_difference(two / "stages" / stage / "model.safetensors", weights) < WEIGHT
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert len(logs[0]) > 20
    for ours, theirs in zip(*logs, strict=True):
        assert (ours["stage"], ours["step"]) == (theirs["stage"], theirs["step"])
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=LOSS)
    assert (two / "report.json").read_bytes() == (one / "report.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", [FSDP, zero(3)], ids=["fsdp", "deepspeed"])
def test_a_sharded_run_is_that_of_two_whole_policies(how: dict[str, str], two: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if "ACCELERATE_USE_DEEPSPEED" in how:
        pytest.importorskip("deepspeed")
    finish(launch(2, "-m", "rerankkit", "run", TINY, "--out", out, **how), timeout=600)
    for stage in ("3-midtrain", "6-sft", "7-rl", "7-rl/kept/step-00004"):
        weights = load_file(two / "stages" / stage / "model.safetensors")
        assert largest_difference(out / "stages" / stage / "model.safetensors", weights) < WEIGHT
    assert (out / "report.json").read_bytes() == (two / "report.json").read_bytes()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_adapters_are_not_sharded(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ConfigError, match=rf"policy\.lora: adapters are not trained under {name}"):
        Pipeline(config={"policy": {"use": "pretrained", "model": "x", "lora": {}}}).run(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_train_adapters_as_one(two: Path, tmp_path: Path) -> None:
    """With everything that saves memory: small passes, adapters, activations computed again."""
    pytest.importorskip("peft")
    saving = ["policy.lora.rank=4", "policy.tokens_per_pass=600", "policy.gradient_checkpointing=true"]
    words = [TINY, "policy.use=pretrained", f"policy.model={two / 'stages' / '3-midtrain'}", *saving, "--until", "rl"]
    first = launch(2, "-m", "rerankkit", "run", *words, "--out", tmp_path / "a")
    one = subprocess.run([sys.executable, "-m", "rerankkit", "run", *words, "--out", tmp_path / "b"], check=True)
    finish(first)
    assert one.returncode == 0
    before = load_file(two / "stages" / "3-midtrain" / "model.safetensors")
    for stage in ("3-midtrain", "6-sft", "7-rl"):
        weights = load_file(tmp_path / "b" / "stages" / stage / "model.safetensors")
        assert largest_difference(tmp_path / "a" / "stages" / stage / "model.safetensors", weights) < WEIGHT
        assert largest_difference(two / "stages" / "3-midtrain" / "model.safetensors", weights) > 100 * WEIGHT
        assert before.keys() == weights.keys()


@pytest.mark.slow
def test_a_run_of_two_processes_is_gone_on_with_by_one(two: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(two), str(copy)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "rerankkit", "run", TINY, "--out", copy], check=True, capture_output=True, text=True
    )
    assert done.stderr.count("skipped") == 12


BREAKING = """
import os
from rerankkit import PluginConfig, Reward, hookimpl
from rerankkit.errors import RunFailed

class Config(PluginConfig):
    "Fails in one process."
    how: str

def judge(how):
    def reward(rollouts):
        if os.environ["RANK"] == "1":
            if how == "raise":
                raise RunFailed("no such price")  # any other exception would fail its group alone
            os.kill(os.getpid(), 9)
        return [Reward(float(i % 2)) for i, _ in enumerate(rollouts)]
    return reward

@hookimpl
def rerankkit_register(register):
    register.rewards.add("breaking", Config, lambda config, info: judge(config.how))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "die"])
def test_what_fails_in_one_process_ends_all(how: str, two: Path, tmp_path: Path) -> None:
    plugin, copy = tmp_path / "breaking.py", tmp_path / "copy"
    plugin.write_text(BREAKING)
    subprocess.run(["cp", "-r", str(two), str(copy)], check=True)
    changed = [f"plugin_files={plugin}", "reward.use=breaking", f"reward.how={how}"]
    started = time.monotonic()

    err = finish(launch(2, "-m", "rerankkit", "run", TINY, *changed, "--out", copy), code=1, timeout=120)

    assert time.monotonic() - started < 100  # most of it is imports; a hang would last half an hour
    if how == "raise":
        assert "process 1: error: no such price" in err
        assert "process 0 stops: process 1 failed: " in err
    assert (copy / "stages" / "7-rl.work").exists()
    assert not (copy / "report.json").exists()


@pytest.mark.slow
def test_what_fails_in_the_main_process_is_told_to_those_that_wait(two: Path, tmp_path: Path) -> None:
    err = finish(launch(2, "-m", "rerankkit", "run", TINY, "candidates.size=400", "--out", tmp_path / "run"), code=1)
    assert "process 0: error: candidates.size is 400" in err
    assert "exitcode  : 2" in err.replace("\t", " ")  # torchrun tells the process's code and itself exits with 1


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_all(tmp_path: Path) -> None:
    first = launch(2, "-m", "rerankkit", "run", TINY, "midtrain.steps=100000", "--out", tmp_path / "run")
    while not (tmp_path / "run" / "holder.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    err = finish(launch(2, "-m", "rerankkit", "run", TINY, "--out", tmp_path / "run"), code=1)
    assert "is in use by process" in err
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # some clusters set it for every job
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.launched() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.launched() == (3, 4)


def test_shares_are_slices_that_make_up_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(4):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "count", lambda: 4)
        shares.append(list(processes.share("abcdef")))
    # 6 / 4: cut at 0, 1.5, 3, 4.5, 6, rounded down
    assert shares == [["a"], ["b", "c"], ["d"], ["e", "f"]]
    monkeypatch.setattr(processes, "rank", lambda: 0)
    assert list(processes.share([7])) == []  # the last of the four has it


def test_alone_everything_is_as_without_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    processes.sum_gradients([parameter])
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert (processes.count(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.decide(lambda: {"a": 1}) == {"a": 1}
    assert processes.gathered(lambda: [1, 2]) == [1, 2]
    assert processes.share([1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "rerankkit"], 2),
        (["python", "/bin/accelerate", "launch", "--num-processes=4", "-m", "rerankkit"], 4),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "3", "x.py"], 3),
        (["python", "/bin/accelerate", "launch", "-m", "rerankkit"], 1),
        (["python", "/bin/accelerate", "launch", "--num_processes", "many"], 1),
        (["bash", "-c", "rerankkit run --num_processes 2"], 1),
        ([], 1),
    ],
)
def test_what_a_launcher_was_asked_for_is_read_from_its_command(words: Sequence[str], asked: int) -> None:
    assert processes._asked_for(words) == asked


@pytest.mark.slow
def test_the_launcher_that_starts_one_process_is_warned_of(tmp_path: Path) -> None:
    """The trap itself: should accelerate one day start two, this test says so."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "-m", "rerankkit", "run", TINY, "--until", "data", "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "`accelerate launch` was asked for 2 processes and started one" in done.stderr
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["processes"] == 1


def test_what_several_processes_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rerankkit.system import _join

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"'cuda:1' is one device, and 2 processes run"):
        _join("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(ConfigError, match=r"9 processes on this machine and \d GPUs"):
        _join("cuda")
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(UsageError, match=r"asks for MEGATRON_LM, which is not supported: choose multi-GPU .* or FSDP"):
        _join("cpu")
    monkeypatch.delenv("ACCELERATE_USE_MEGATRON_LM")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("rerankkit.lm.zero.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"asks for DeepSpeed, which is not installed: pip install deepspeed; or"):
        _join("cpu")


def test_buckets_keep_types_apart_and_sizes_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "BUCKET", 5)
    kinds: list[Any] = [(2, torch.float32), (3, torch.float32), (1, torch.float32), (9, torch.float32)]
    kinds += [(1, torch.bfloat16), (1, torch.float32)]
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=kind)) for size, kind in kinds]
    found = [[p.numel() for p in bucket] for bucket in processes._buckets(parameters)]
    assert found == [[2, 3], [1], [9], [1], [1]]

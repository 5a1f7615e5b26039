"""The run folder: what is done, what it was made from, and how to go on after a kill.

    config.json  manifest.json  metrics.jsonl  completions/*.parquet  log.txt  report.{html,md,json}
    stages/3-midtrain/       a finished stage: its artifact, and stage.json with its fingerprint
    stages/3-midtrain.work/  an unfinished one: its checkpoints

A stage is written aside and renamed whole, so what bears a stage's name is complete. Its fingerprint covers the
settings it reads, the parts it uses and the fingerprints of its inputs; the same fingerprint means: done.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from rerankkit import processes
from rerankkit.config import ChosenPart, RunConfig, check_reward_names
from rerankkit.errors import RerankkitError, RunFailed, RunFolderError
from rerankkit.types import RunInfo, SidSurface

if TYPE_CHECKING:
    from filelock import FileLock

PACKAGES = ("rerankkit", "torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "pydantic", "pluggy")
"""What a result depends on most, for the manifest."""
REPORTS = ("report.json", "report.md", "report.html")
RESULTS = (*REPORTS, "rankings.parquet")
FAILED_SIDS = ("scorecard.json", "sids.html")
"""Left by a gate that the SIDs missed; the next attempt drops them."""
STOPPED_RL = ("watch.json", "watch.html")
"""Left by a watch that stopped reinforcement; the next attempt drops them."""
FORMAT = 2
"""Raised when a stage's artifact changes its meaning, so that old run folders are not mistaken for new ones."""


class Savable(Protocol):
    """An artifact: writes itself into an empty folder."""

    def save(self, folder: Path) -> None:
        """Write everything that its loader needs."""


A = TypeVar("A", bound=Savable)


class StoppedEarlyError(Exception):
    """Not a failure: the stage that the user wanted last is done."""


@dataclass(frozen=True)
class Artifact(Generic[A]):
    """A finished stage's result, on disk. `load` reads it afresh, so that nobody shares a mutable policy."""

    folder: Path
    fingerprint: str
    loader: Callable[[Path], A]

    @property
    def name(self) -> str:
        """The stage's: `sft` of stages/6-sft."""
        return self.folder.name.partition("-")[2]

    def on_disk(self) -> Artifact[Any]:
        """The same for a stage that wants to know where it lies, and not to have it read."""
        return Artifact(self.folder, self.fingerprint, Path)

    def load(self) -> A:
        """Read the artifact. Raises RunFolderError if it cannot be read."""
        try:
            return self.loader(self.folder)
        except MemoryError:
            raise
        except Exception as error:
            what = str(error) if isinstance(error, RerankkitError) else f"{type(error).__name__}: {error}"
            raise RunFolderError(
                f"{self.folder}: this finished stage cannot be read ({what}); delete it and run again."
            ) from error


@dataclass
class RunFolder:
    """An open, locked run folder. `stage` is its one important method."""

    path: Path
    config: RunConfig
    device: str = "cpu"
    progress: Callable[..., Iterator[Any]] | None = None
    announce: Callable[[str, str, float], None] = lambda name, state, seconds: None
    """Told of every stage: its name; `skipped`, `started`, `continued` or `done`; and the seconds it took. With
    `warning` a sentence stands in place of the name."""
    track: Callable[[Mapping[str, float]], None] = lambda metrics: None
    """Told of every logged record, for other trackers."""
    hooks: Any = None
    """Plugins' hooks, to be told of training steps and of the report."""
    until: str = ""
    """The name of the last stage to do; empty means all."""
    plan: bool = False
    """Do nothing and write nothing: `announce` is told of each stage whether it is `done`, `unfinished` or `to do`."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the stages so far, in order."""

    def stage(
        self,
        name: str,
        make: Callable[..., A],
        loader: Callable[[Path], A],
        *arguments: Any,
        together: bool = False,
        told: Sequence[Any] = (),
    ) -> Artifact[A]:
        """Do a stage, or find it done.

        `make(*arguments, info)` is called with every Artifact among the arguments loaded and every ChosenPart built:
        by the main process while the others wait, or, with `together`, by all of them. Only the main one writes.
        `told` is what the result depends on besides, since `info` tells of it.
        """
        if self.until and self.until in self.fingerprints:
            raise StoppedEarlyError(self.until)
        number = len(self.fingerprints) + 1
        folder = self.path / "stages" / f"{number}-{name}"
        work = folder.with_suffix(".work")
        fingerprint = _digest([FORMAT, name, self.config.seed, *map(self._identity, arguments), *told])
        artifact = Artifact(folder, fingerprint, loader)
        self.fingerprints[name] = fingerprint
        if self.plan:
            self.announce(name, _state(folder, work, fingerprint), 0.0)
            return artifact
        if not processes.decide(lambda: self._begin(name, folder, work, fingerprint)):
            return artifact
        started = time.monotonic()
        info = self.info(name, work)

        def made() -> A:
            return make(*[self._ready(argument, info, built) for argument in arguments], info=info)

        def keep(result: A) -> None:
            seconds = time.monotonic() - started
            inputs = {a.name: a.fingerprint for a in arguments if isinstance(a, Artifact)}
            record = {"name": name, "fingerprint": fingerprint, "seconds": round(seconds, 3), "inputs": inputs}

            def write(aside: Path) -> None:
                result.save(aside)
                write_json(aside / "stage.json", record)

            publish(folder, write)
            shutil.rmtree(work, ignore_errors=True)
            self._tell(name, "done", seconds)

        with self._blaming() as built:
            if together:
                result = made()
                processes.decide(lambda: keep(result))
            else:
                processes.decide(lambda: keep(made()))
        return artifact

    def together(
        self, name: str, make: Callable[..., A], loader: Callable[[Path], A], *arguments: Any, told: Sequence[Any] = ()
    ) -> Artifact[A]:
        """`stage`, for one that shares its work among all processes of the run."""
        return self.stage(name, make, loader, *arguments, together=True, told=told)

    def _begin(self, name: str, folder: Path, work: Path, fingerprint: str) -> bool:
        """Say how a stage stands and make its work folder ready; False if there is nothing to do."""
        state = _state(folder, work, fingerprint)
        if state == "done":
            self.announce(name, "skipped", 0.0)
            return False
        for file in RESULTS:  # it tells of other results than those to come
            (self.path / file).unlink(missing_ok=True)
        shutil.rmtree(self.path / "trec", ignore_errors=True)
        if state == "to do":
            shutil.rmtree(work, ignore_errors=True)
            self._forget(name)
            work.mkdir(parents=True)
            write_json(work / "stage.json", {"name": name, "fingerprint": fingerprint})
        drop_half_line(self.path / "metrics.jsonl")
        self._tell(name, "continued" if state == "unfinished" else "started", 0.0)
        return True

    def _tell(self, name: str, state: str, seconds: float) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        number = processes.count()
        how = f" after {seconds:.1f} s" if seconds else f" on {number} processes" if number > 1 else ""
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{now}  {name}: {state}{how}\n")
        self.announce(name, state, seconds)

    def warn(self, stage: str, sentence: str) -> None:
        """Tell the user something at once, and log.txt."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{now}  {stage}: warning: {sentence}\n")
        self.announce(f"{stage}: {sentence}", "warning", 0.0)

    def seconds(self) -> dict[str, float]:
        """How long each finished stage took."""
        return {status.name: status.seconds for status in read_status(self.path) if status.seconds is not None}

    @property
    def surface(self) -> SidSurface:
        """How items, places and evidence are spelled in this run."""
        prompt = self.config.policy.prompt
        places = self.config.candidates.size if prompt.cite == "place" else 0
        return SidSurface(places=places, facts=prompt.evidence)

    def info(self, stage: str, work: Path) -> RunInfo:
        """What the stage's parts are told."""

        def log(metrics: Mapping[str, float]) -> None:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": stage, **metrics}) + "\n")
            self.track({f"{stage}/{key}": value for key, value in metrics.items()})

        surface, precision = self.surface, self.config.policy.precision
        told: dict[str, Any] = {}
        if processes.is_main():
            told = {"log": log} if self.progress is None else {"log": log, "progress": self.progress}
        size = self.config.policy.tokens_per_pass
        return RunInfo(self.config.seed, self.device, precision, work, surface=surface, tokens_per_pass=size, **told)

    def _ready(self, argument: Any, info: RunInfo, built: list[tuple[ChosenPart, Any]]) -> Any:
        if isinstance(argument, Artifact):
            return argument.load()
        if isinstance(argument, tuple):  # rewards: (weight, name, live part) each
            return tuple((part.weight, part.spec.name, self._ready(part, info, built)) for part in argument)
        if not isinstance(argument, ChosenPart):
            return argument
        built.append((argument, None))  # while it is being made
        built[-1] = (argument, argument.build(info))
        return built[-1][1]

    @contextmanager
    def _blaming(self) -> Iterator[list[tuple[ChosenPart, Any]]]:
        """Turn what a plugin's part raises into RunFailed that names it. Yields the list of parts to watch.

        rerankkit's own errors pass, and so do bugs of its own: they are told best by their traceback.
        """
        built: list[tuple[ChosenPart, Any]] = []
        try:
            yield built
        except RerankkitError:
            raise
        except Exception as error:
            part = _culprit(error, built)
            if part is None or part.spec.distribution == "rerankkit":
                raise
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.writelines(traceback.format_exception(error))
            spec = part.spec
            whose = ", ".join(filter(None, (f"plugin {spec.plugin}", f"{spec.distribution} {spec.version}".strip())))
            raise RunFailed(
                f"{spec.kind} {spec.name!r} ({whose}): {type(error).__name__}: {error}. "
                f"The traceback is in {self.path / 'log.txt'}."
            ) from error

    def _identity(self, argument: Any) -> Any:
        if isinstance(argument, Artifact):
            return argument.fingerprint
        if isinstance(argument, ChosenPart):
            return [argument.resolved(), argument.provenance()]
        if isinstance(argument, BaseModel):
            neutral = getattr(type(argument), "neutral", None)
            return [type(argument).__name__, argument.model_dump(mode="json", exclude=neutral)]
        if isinstance(argument, tuple | list):
            return [self._identity(entry) for entry in argument]
        return argument

    def _forget(self, stage: str) -> None:
        """Drop what an earlier attempt at a stage logged."""
        if stage == "rl":
            shutil.rmtree(self.path / "completions", ignore_errors=True)
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [
                line for line in path.read_text(encoding="utf-8").splitlines() if _stage_of(line) not in (stage, None)
            ]
            write_text(path, "".join(line + "\n" for line in kept))


@contextmanager
def open_run(path: Path, config: RunConfig, **how: Any) -> Iterator[RunFolder]:
    """Lock `path` for this run and record what is about to run. Raises RunFolderError if it is taken or foreign.

    Of several processes the main one holds the lock, and the others hear of it.
    """
    from filelock import FileLock

    lock = FileLock(path / ".lock")
    try:
        processes.decide(lambda: _take(path, config, lock))
        yield RunFolder(path, config, **how)
    finally:
        if lock.is_locked:
            (path / "holder.json").unlink(missing_ok=True)
            lock.release()


def _take(path: Path, config: RunConfig, lock: FileLock) -> None:
    from filelock import Timeout

    check_free(path)
    check_reward_names(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be made ({error.strerror}); choose another --out.") from error
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _in_use(path) from None
    for file in (*FAILED_SIDS, *STOPPED_RL):
        (path / file).unlink(missing_ok=True)
    write_json(path / "holder.json", {"pid": os.getpid(), "host": socket.gethostname()})
    write_json(path / "config.json", config.resolved())
    write_json(path / "manifest.json", manifest(config))


def check_free(path: Path) -> None:
    """Raise at once what `open_run` would, and write nothing: a file, somebody else's folder, a run at work."""
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be looked at ({error.strerror}); choose another --out.") from error
    if not there.is_dir():
        raise RunFolderError(f"{there} is a file; --out names a folder.")
    if path.is_dir() and any(path.iterdir()) and not is_run_folder(path):
        raise RunFolderError(f"{path} holds other files and is not a run folder; name a new or empty one with --out.")
    for file in (*RESULTS, *FAILED_SIDS, *STOPPED_RL):
        if (path / file).is_dir():
            raise RunFolderError(f"{path / file} is a folder, but a file of this name is to be written; move it away.")
    if holder_of(path):
        raise _in_use(path)


def _in_use(path: Path) -> RunFolderError:
    holder = _holder(path)
    who = f"process {holder['pid']} on {holder['host']}"
    return RunFolderError(f"{path} is in use by {who}; wait for it, stop it, or choose another --out.")


def _holder(path: Path) -> dict[str, Any]:
    return {"pid": "unknown", "host": "an unknown host", **read_json(path / "holder.json")}


def manifest(config: RunConfig) -> dict[str, Any]:
    """Everything that a result depends on: parts and their distributions, versions, seed, machine."""
    return {
        "seed": config.seed,
        "device": config.device,
        "processes": processes.count(),
        "parts": [p.provenance() for p in (config.tokenizer, config.teacher, *config.reward, config.optimizer)],
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpu_count": os.cpu_count()},
    }


def _versions() -> dict[str, str]:
    """Of what a result depends on; of extras, where they are installed."""
    found = {name: version_of(name) for name in (*PACKAGES, "peft")}
    return {name: known for name, known in found.items() if name in PACKAGES or known != "not installed"}


def is_run_folder(path: Path) -> bool:
    """Whether a run was started here. A config.json alone does not tell: every saved model has one."""
    return (path / ".lock").exists() or "optimizer" in read_json(path / "config.json")


@dataclass(frozen=True)
class StageStatus:
    """One stage as `rerankkit status` shows it."""

    name: str
    state: str
    """`done` or `unfinished`."""
    seconds: float | None = None
    step: int | None = None
    """Of an unfinished stage: the last step it logged."""


def read_status(path: Path) -> list[StageStatus]:
    """The stages of a run folder, in order. Raises RunFolderError if it is none."""
    if not is_run_folder(path):
        raise RunFolderError(f"{path} is not a run folder. `rerankkit run CONFIG --out {path}` makes one.")
    logged = {record["stage"]: record.get("step") for record in read_metrics(path)}
    found = []
    for folder in (path / "stages").glob("*-*"):
        record = read_json(folder / "stage.json")
        if not record or ".tmp" in folder.name:
            continue
        done = folder.suffix != ".work"
        step = None if done else logged.get(record["name"])
        status = StageStatus(record["name"], "done" if done else "unfinished", record.get("seconds"), step)
        found.append((int(folder.name.split("-")[0]), done, status))
    latest = {number: status for number, _, status in sorted(found, key=lambda row: row[:2])}
    return list(latest.values())


def finished_stage(run: Path, name: str) -> Path:
    """The folder that holds a finished stage of a run. Raises RunFolderError if there is none."""
    if not is_run_folder(run):
        raise RunFolderError(f"{run} is not a run folder. `rerankkit run CONFIG --out {run}` makes one.")
    if folder := _stage_folder(run, name):
        return folder
    state = "unfinished" if _stage_folder(run, f"{name}.work") else "still to do"
    raise RunFolderError(
        f"{run}: its stage {name} is {state}; `rerankkit run {run / 'config.json'} --until {name}` finishes it."
    )


def current_stage(run: Path, name: str) -> Path:
    """`finished_stage`, made from what the run's other stages hold now. Raises RunFolderError if it is not.

    A run that was changed and then stopped keeps its later stages until it comes to them. Inputs that somebody deleted
    are not missed: what was made from them is whole.
    """
    folder = finished_stage(run, name)
    for other, fingerprint in read_json(folder / "stage.json").get("inputs", {}).items():
        made = _stage_folder(run, other)
        if made and (_fingerprint_of(made) != fingerprint or current_stage(run, other) != made):
            raise RunFolderError(
                f"{run}: its stage {name} was made from another {other} than the one it holds now; "
                f"`rerankkit run {run / 'config.json'} --until {name}` makes it anew."
            )
    return folder


def holder_of(path: Path) -> dict[str, Any]:
    """`pid` and `host` of the process that is at work on a run folder; empty if none is."""
    from filelock import FileLock, Timeout

    if not (path / ".lock").exists():
        return {}
    try:
        with FileLock(path / ".lock", timeout=0):
            return {}
    except Timeout:
        return _holder(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, each (stage, step) once: after a kill, steps are logged again, and the last time counts."""
    file = path / "metrics.jsonl"
    records: dict[tuple[str, Any], dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else ()):
        if _stage_of(line) is not None:  # a kill can leave half a line
            record = json.loads(line)
            records[record["stage"], record.get("step", f"line {number}")] = record
    return sorted(records.values(), key=lambda record: (record["stage"], record.get("step", 0)))


def publish(folder: Path, write: Callable[[Path], object]) -> None:
    """Fill a folder aside, then rename it whole into place; an older one of that name gives way."""
    aside = folder.with_name(folder.name + ".tmp")
    old = folder.with_name(folder.name + ".tmp-old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    for file in aside.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def link_tree(source: Path, target: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Copy a folder of finished files into an existing one, by further names for them where the file system can.

    Nothing in a run folder is changed in place, so that sharing is safe, and weights take their space once.
    """

    def link(old: str, new: str) -> str:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)
        return new

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*leave_out))


def drop_half_line(path: Path) -> None:
    """Cut off what a kill left behind the last newline of a file of lines, so that the next line stands alone."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def write_text(path: Path, text: str) -> None:
    """Replace a file whole: a reader sees the old text or the new, never half."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of readable JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one if there is none to read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _state(folder: Path, work: Path, fingerprint: str) -> str:
    """How a stage stands: `done`, `unfinished` (its work goes on) or `to do`."""
    if _fingerprint_of(folder) == fingerprint:
        return "done"
    return "unfinished" if _fingerprint_of(work) == fingerprint else "to do"


def _stage_folder(run: Path, name: str) -> Path | None:
    """stages/6-sft for `sft`, and not stages/9-rank-sft; None if there is none, or only a damaged one."""
    folders = (run / "stages").glob(f"[0-9]*-{name}")
    return next((f for f in folders if f.name.partition("-")[2] == name and _fingerprint_of(f)), None)


def _fingerprint_of(folder: Path) -> str:
    return str(read_json(folder / "stage.json").get("fingerprint", ""))


def _culprit(error: BaseException, built: Sequence[tuple[ChosenPart, Any]]) -> ChosenPart | None:
    """The part in whose code, or in what it called, an error came up: the innermost, if one part called another."""
    if built and built[-1][1] is None:
        return built[-1][0]
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        first = frame.f_code.co_varnames[:1]  # `self`, by whatever name
        for part, live in built:
            if any(frame.f_locals.get(name) is live for name in first) or frame.f_code is getattr(
                live, "__code__", None
            ):
                return part
    return None


def _digest(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _stage_of(line: str) -> str | None:
    try:
        return str(json.loads(line)["stage"])
    except (ValueError, KeyError, TypeError):
        return None


def version_of(package: str) -> str:
    """An installed package's version, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

"""The contracts of the four protocols, a rule a function: its name is the rule's, its first line says what is asked.

A rule takes a *trial*, which holds the part and does the costly work once for all of them, and raises AssertionError
(the rule is broken) or NotTried (nothing to judge by). `judge` turns that into a verdict, for reports.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rerankkit.errors import did_you_mean
from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer
from rerankkit.testing.checks import (
    _check_gold,
    _examples_with_target,
    _judged,
    _made_rollouts,
    _name,
    _require,
    _same_again,
)
from rerankkit.testing.records import make_catalog, make_example, make_policy
from rerankkit.types import Catalog, Outcome, RerankExample, Reward, Rollout, RunInfo, Trace, TraceFailure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONTRACT_VERSION = 1
"""Raised by one whenever a rule is added or asks for more; docs/compatibility.md says when that may happen."""


class NotTried(Exception):  # noqa: N818 (nothing went wrong)
    """There is nothing to judge this rule by; the message says why."""


# --- rewards -------------------------------------------------------------------------------------------------------


class RewardTrial:
    """A reward, and made rollouts (or yours) to try it on.

    The made ones are the answers of `rerankkit.testing.zoo` to asks with a target in front, in the middle and at the
    end, with graded relevance, with two candidates and with no target.
    """

    def __init__(self, part: RewardFn, *, rollouts: Sequence[Rollout] | None = None, judges_order: bool = True) -> None:
        self.part, self.name, self.judges_order = part, _name(part), judges_order
        made = _made_rollouts() if rollouts is None else [(f"rollout {i}", row) for i, row in enumerate(rollouts)]
        self.rows = made
        """What each is, for messages, and the rollout."""

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """Of the rows as they stand; each is typed and finite."""
        return _judged(self.name, self.part, self.rows)

    def again(self, places: Sequence[int], fault: str) -> None:
        """Judge only the rows at `places`, in that order: the outcomes must be those that they had."""
        rows, had = [self.rows[i] for i in places], [self.outcomes[i] for i in places]
        _same_again(rows, had, _judged(self.name, self.part, rows), f"{self.name}: {fault}")


def typed_outcomes(trial: RewardTrial) -> None:
    """One typed, finite outcome a rollout, in order, whatever the answer; the rollouts are left as they were."""
    assert len(trial.outcomes) == len(trial.rows)


def same_again(trial: RewardTrial) -> None:
    """The same rollouts get the same outcomes a second time."""
    fault = "a second call on the same rollouts gave other outcomes; a reward is a pure function of the records"
    trial.again(range(len(trial.rows)), fault)


def order_independent(trial: RewardTrial) -> None:
    """The outcomes do not depend on the order of the rows."""
    shuffled = random.Random(0).sample(range(len(trial.rows)), len(trial.rows))
    trial.again(shuffled, "the outcomes depend on row order; judge each rollout by its own record and group")


def own_group(trial: RewardTrial) -> None:
    """The outcomes of a group do not depend on which other groups are judged with it."""
    for group in sorted({row.group for _, row in trial.rows}):
        own = [i for i, (_, row) in enumerate(trial.rows) if row.group == group]
        trial.again(own, "the outcomes of a group depend on what other groups are judged with it")


def prefers_the_best(trial: RewardTrial) -> None:
    """The best order gets more than the order as given, its reverse, and an answer that cannot be read."""
    if not trial.judges_order:
        raise NotTried("it says that it does not judge the order")
    for example in _examples_with_target():
        _check_gold(trial.name, trial.part, example)


# --- tokenizers ----------------------------------------------------------------------------------------------------


class TokenizerTrial:
    """A fresh tokenizer, fitted at the first look, and the catalogue (default: 48 made items) it is tried on."""

    def __init__(self, part: Tokenizer, *, catalog: Catalog | None = None, places_new_items: bool = True) -> None:
        self.part, self.name = part, _name(part)
        self.blank = copy.deepcopy(part)
        self.catalog = catalog or make_catalog()
        self.vectors = self.catalog.embeddings.copy()
        self.places_new_items = places_new_items

    @cached_property
    def codes(self) -> NDArray[np.int64]:
        """[N, L] of the catalogue, right after fitting."""
        self.part.fit(self.catalog)
        return _codes(self.name, self.part, self.catalog)

    @contextmanager
    def saved(self) -> Iterator[Path]:
        """The folder that the fitted one saved into."""
        assert self.codes is not None  # fitted
        with tempfile.TemporaryDirectory() as folder:
            self.part.save(Path(folder))
            yield Path(folder)

    def loaded(self) -> Tokenizer:
        """A blank one after `load`."""
        fresh = copy.deepcopy(self.blank)
        with self.saved() as folder:
            fresh.load(folder)
        return fresh

    @cached_property
    def newcomers(self) -> Catalog:
        """Eight items that were not there: relatives of known ones, with vectors near theirs."""
        import numpy as np

        dice, rows = np.random.default_rng(1), list(range(min(8, len(self.catalog.items))))

        def near(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
            moved = matrix[rows] + 0.3 * dice.standard_normal((len(rows), matrix.shape[1])).astype(np.float32)
            return np.asarray(moved / np.linalg.norm(moved, axis=1, keepdims=True), dtype=np.float32)

        items = tuple(
            replace(self.catalog.items[row], item_id=f"new{row}", title=f"{self.catalog.items[row].title} II")
            for row in rows
        )
        side = {name: near(self.catalog.side[name]) for name in self.catalog.side}
        return Catalog(items, near(self.catalog.embeddings), np.empty((0, 2), dtype=np.int64), side)


def codes_in_range(trial: TokenizerTrial) -> None:
    """Whole numbers [items, levels], each inside its level's codebook."""
    assert len(trial.codes) == len(trial.catalog.items)


def same_sids_again(trial: TokenizerTrial) -> None:
    """An item has the SID it had before."""
    import numpy as np

    again = _codes(trial.name, trial.part, trial.catalog) if trial.codes is not None else None
    _require(np.array_equal(trial.codes, again), f"{trial.name}: encode gave other SIDs the second time")


def any_company(trial: TokenizerTrial) -> None:
    """An item has the same SID whichever others are encoded with it, and in whatever order."""
    import numpy as np

    codes, rows = trial.codes, list(range(len(trial.catalog.items)))[::-2]
    part = Catalog(
        tuple(trial.catalog.items[i] for i in rows),
        trial.catalog.embeddings[rows],
        np.empty((0, 2), dtype=np.int64),
        {name: matrix[rows] for name, matrix in trial.catalog.side.items()},
    )
    _require(
        np.array_equal(codes[rows], _codes(trial.name, trial.part, part)),
        f"{trial.name}: an item's SID depends on which others are encoded with it, or on their order",
    )


def no_pickles(trial: TokenizerTrial) -> None:
    """`save` writes no pickle."""
    with trial.saved() as folder:
        pickles = [file.name for file in sorted(folder.rglob("*")) if _is_pickle(file)]
    _require(not pickles, f"{trial.name}: save wrote a pickle ({', '.join(pickles)}); write JSON or safetensors")


def survives_saving(trial: TokenizerTrial) -> None:
    """After `save` and `load` an item has the SID it had."""
    import numpy as np

    fresh = trial.loaded()
    _require(
        tuple(fresh.codebook_sizes) == tuple(trial.part.codebook_sizes),
        f"{trial.name}: codebook_sizes differ after save and load",
    )
    _require(
        np.array_equal(trial.codes, _codes(trial.name, fresh, trial.catalog)),
        f"{trial.name}: SIDs differ after save and load",
    )


def leaves_the_catalogue(trial: TokenizerTrial) -> None:
    """The embeddings of the catalogue are left as they were."""
    import numpy as np

    assert trial.codes is not None
    _require(
        np.array_equal(trial.vectors, trial.catalog.embeddings),
        f"{trial.name}: changed the embeddings of the catalogue",
    )


def new_items(trial: TokenizerTrial) -> None:
    """Items that come later get a SID of their own for good, and change nobody's."""
    import numpy as np

    both, old = _joined(trial.catalog, trial.newcomers), trial.codes
    fresh = trial.loaded()
    if not trial.places_new_items:
        try:
            fresh.encode(both)
        except Exception as refused:
            raise NotTried(f"it says that it places no new items, and raises: {type(refused).__name__}") from refused
        raise AssertionError(f"{trial.name}: places_new_items is False, and it encoded items it was not fitted on")
    try:
        codes = _codes(trial.name, fresh, both)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"{trial.name}: raised {type(error).__name__}: {error} for items it was not fitted on; place them, or "
            "pass places_new_items=False"
        ) from error
    _require(np.array_equal(codes[: len(old)], old), f"{trial.name}: new items changed the SIDs of old ones")
    _require(
        np.array_equal(codes[len(old) :], _codes(trial.name, fresh, trial.newcomers)),
        f"{trial.name}: a new item was given another SID when it was asked for again, without the old ones",
    )


def reconstruction(trial: TokenizerTrial) -> None:
    """If it can `reconstruct`: finite vectors [n, D] in the space of the embeddings."""
    import numpy as np

    if not hasattr(trial.part, "reconstruct"):
        raise NotTried("it has no method reconstruct")
    codes = trial.codes.copy()
    vectors = np.asarray(trial.part.reconstruct(codes))
    expected = trial.catalog.embeddings.shape
    _require(
        vectors.shape == expected,
        f"{trial.name}: reconstruct gave shape {vectors.shape} instead of {expected}, [items, dimensions]",
    )
    _require(bool(np.isfinite(vectors).all()), f"{trial.name}: reconstruct gave numbers that are not finite")
    _require(np.array_equal(codes, trial.codes), f"{trial.name}: reconstruct changed the codes it was given")


def own_facts(trial: TokenizerTrial) -> None:
    """If it has `facts`: labels in words, and values that are text or finite numbers."""
    if not hasattr(trial.part, "facts"):
        raise NotTried("it has no method facts")
    assert trial.codes is not None
    facts = dict(trial.part.facts())
    bad = {
        label: value
        for label, value in facts.items()
        if not isinstance(label, str)
        or not (isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)))
    }
    _require(not bad, f"{trial.name}: facts holds {bad}; a value is text or a finite number")


def _joined(one: Catalog, other: Catalog) -> Catalog:
    import numpy as np

    side = {name: np.concatenate([one.side[name], other.side[name]]) for name in other.side}
    vectors = np.concatenate([one.embeddings, other.embeddings])
    return Catalog((*one.items, *other.items), vectors, one.pairs, side)


def _codes(name: str, tokenizer: Tokenizer, catalog: Catalog) -> NDArray[np.int64]:
    import numpy as np

    sizes = tuple(tokenizer.codebook_sizes)
    codes = np.asarray(tokenizer.encode(catalog))
    expected = (len(catalog.items), len(sizes))
    _require(
        len(sizes) > 0 and all(size > 0 for size in sizes),
        f"{name}: codebook_sizes is {sizes}; one positive number a level",
    )
    _require(np.issubdtype(codes.dtype, np.integer), f"{name}: codes are {codes.dtype}, not integers")
    _require(codes.shape == expected, f"{name}: codes of shape {codes.shape} instead of {expected}, [items, levels]")
    inside = (codes >= 0) & (codes < np.array(sizes))
    _require(
        bool(inside.all()),
        f"{name}: a code lies outside its level's range; sizes {sizes}, codes from {codes.min()} to {codes.max()}",
    )
    return codes.copy()


def _is_pickle(file: Path) -> bool:
    if not file.is_file():
        return False
    if zipfile.is_zipfile(file):  # what torch.save writes
        with zipfile.ZipFile(file) as archive:
            return any(entry.endswith(".pkl") for entry in archive.namelist())
    with file.open("rb") as opened:
        start = opened.read(2)
    return file.suffix in (".pkl", ".pickle") or (
        start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    )


# --- teachers ------------------------------------------------------------------------------------------------------


class TeacherTrial:
    """A teacher, and what it answered to made examples (or yours); of the made ones, one has no relevant candidate."""

    def __init__(
        self, part: Teacher, *, examples: Sequence[RerankExample] | None = None, info: RunInfo | None = None
    ) -> None:
        self.part, self.name, self.info = part, _name(part), info or RunInfo()
        self.asked = list(examples) if examples is not None else [make_example(target) for target in (0, 3, 9, None)]
        self.by_id = {example.example_id: example for example in self.asked}
        self.changed = False

    @cached_property
    def answers(self) -> list[Any]:
        """In the order it gave them."""
        before, given = copy.deepcopy(self.asked), list(self.asked)
        answers = list(self.part.write(given, self.info))
        self.changed = given != before
        return answers

    def traces(self) -> list[Trace]:
        """Raises NotTried if there is none."""
        traces = [answer for answer in self.answers if isinstance(answer, Trace) and answer.example_id in self.by_id]
        if not traces:
            reasons = [answer.reason for answer in self.answers if isinstance(answer, TraceFailure)]
            raise NotTried(f"it wrote no trace; the first failure says: {reasons[0]}" if reasons else "it wrote none")
        return traces


def typed_answers(trial: TeacherTrial) -> None:
    """Every answer is a Trace or a TraceFailure; the examples are left as they were."""
    for answer in trial.answers:
        _require(
            isinstance(answer, Trace | TraceFailure),
            f"{trial.name}: yielded {answer!r}; an answer is Trace or TraceFailure",
        )
    _require(not trial.changed, f"{trial.name}: changed the examples it was given")


def answers_each_once(trial: TeacherTrial) -> None:
    """Each example is answered exactly once, and nothing else is."""
    times = Counter(answer.example_id for answer in trial.answers if isinstance(answer, Trace | TraceFailure))
    strangers = sorted(times.keys() - trial.by_id.keys())
    _require(not strangers, f"{trial.name}: answered {strangers[:3]}, which nobody asked")
    missing = [example_id for example_id in trial.by_id if example_id not in times]
    _require(not missing, f"{trial.name}: no answer for {missing[:3]}; what cannot be answered is a TraceFailure")
    twice = [example_id for example_id, count in times.items() if count > 1]
    _require(not twice, f"{trial.name}: answered {twice[:3]} more than once")


def reasons_for_failures(trial: TeacherTrial) -> None:
    """A failure says why."""
    for answer in trial.answers:
        if isinstance(answer, TraceFailure):
            _require(bool(answer.reason), f"{trial.name}: a failure for {answer.example_id} gives no reason")


def complete_orders(trial: TeacherTrial) -> None:
    """The order of a trace holds each candidate's place once."""
    for trace in trial.traces():
        size = len(trial.by_id[trace.example_id].candidates)
        _require(
            sorted(trace.order) == list(range(size)),
            f"{trial.name}: the order for {trace.example_id} is {trace.order}; it must hold each of the {size} places "
            "once",
        )


def told_in_words(trial: TeacherTrial) -> None:
    """A trace has reasoning, and its provenance is text."""
    for trace in trial.traces():
        _require(bool(trace.reasoning.strip()), f"{trial.name}: a trace for {trace.example_id} without reasoning")
        told = all(isinstance(text, str) for pair in trace.provenance.items() for text in pair)
        _require(told, f"{trial.name}: provenance holds other things than text: {dict(trace.provenance)}")


def asked_alone(trial: TeacherTrial) -> None:
    """An answer does not depend on which examples are asked with it: after a kill only the missing ones are."""
    expected = {trace.example_id: trace for trace in trial.traces()}
    for example in reversed(trial.asked):
        [answer] = trial.part.write([example], trial.info)
        before = expected.get(example.example_id)
        same = (
            isinstance(answer, Trace) and before is not None and (answer.order, answer.reasoning)
            == (before.order, before.reasoning)
        )  # fmt: skip
        _require(
            same or (before is None and isinstance(answer, TraceFailure)),
            f"{trial.name}: asked alone, {example.example_id} got another answer; derive what is drawn from info.seed "
            "and example_id",
        )


# --- optimizers ----------------------------------------------------------------------------------------------------


class OptimizerTrial:
    """An optimizer on a tiny random policy: run on, and stopped after `stop_after` steps and continued.

    It is run to its end, or with `max_steps` only so far, which is for settings that were not chosen to be small.
    """

    def __init__(
        self,
        part: PolicyOptimizer,
        *,
        reward: RewardFn | None = None,
        stop_after: int = 2,
        max_steps: int | None = None,
        info: RunInfo | None = None,
    ) -> None:
        self.part, self.name = part, _name(part)
        self.examples = [make_example(target) for target in (0, 3, 9)]
        self.reward, self.info = reward or _even, info or RunInfo()
        self.stop_after, self.max_steps = stop_after, max_steps

    @cached_property
    def whole(self) -> tuple[list[Any], dict[str, Any]]:
        """Its reports, and the weights after the last of them."""
        policy = make_policy()
        reports = self._run(policy, self.info, self.max_steps)
        return reports, _weights(policy)

    def _run(self, policy: Any, info: RunInfo, last: int | None) -> list[Any]:
        running = self.part.optimize(policy, self.examples, self.reward, info)
        reports = []
        for report in running:
            reports.append(report)
            if last is not None and report.step >= last:
                if hasattr(running, "close"):
                    running.close()  # what a kill does: nothing after this step is run
                break
        return reports

    @cached_property
    def continued(self) -> dict[str, Any]:
        """The weights where `whole` ends, of a run that was stopped and taken up by a fresh copy of the policy."""
        with tempfile.TemporaryDirectory() as work:
            here = replace(self.info, work=Path(work))
            self._run(make_policy(), here, self.stop_after)
            policy = make_policy()
            self._run(policy, here, self.max_steps)
            return _weights(policy)


def steps_count_up(trial: OptimizerTrial) -> None:
    """Steps are numbered from 1, one report each."""
    steps = [report.step for report in trial.whole[0]]
    _require(steps == list(range(1, len(steps) + 1)), f"{trial.name}: steps are {steps}; they count up from 1")


def aligned_reports(trial: OptimizerTrial) -> None:
    """A report has an outcome for each of its rollouts."""
    for report in trial.whole[0]:
        _require(
            len(report.rollouts) == len(report.outcomes),
            f"{trial.name}: step {report.step} reports {len(report.rollouts)} rollouts and {len(report.outcomes)} "
            "outcomes",
        )


def metrics_are_numbers(trial: OptimizerTrial) -> None:
    """What a report logs are numbers."""
    for report in trial.whole[0]:
        bad = {key: value for key, value in report.metrics.items() if not isinstance(value, int | float)}
        _require(not bad, f"{trial.name}: step {report.step} logs {bad}, which are no numbers")


def finite_weights(trial: OptimizerTrial) -> None:
    """The policy's weights are finite at the end."""
    import torch

    finite = all(bool(torch.isfinite(tensor).all()) for tensor in trial.whole[1].values())
    _require(finite, f"{trial.name}: weights are not finite at the end")


def changes_the_policy(trial: OptimizerTrial) -> None:
    """The policy's weights change."""
    import torch

    start, end = _weights(make_policy()), trial.whole[1]
    _require(
        any(not torch.equal(start[key], end[key]) for key in start),
        f"{trial.name}: the policy's weights did not change",
    )


def continues_where_it_stopped(trial: OptimizerTrial) -> None:
    """Stopped and called again, it ends with the very weights of a run that was not stopped."""
    import torch

    reports, end = trial.whole
    if len(reports) <= trial.stop_after:
        raise AssertionError(
            f"{trial.name}: took {len(reports)} steps; build it with more than stop_after={trial.stop_after} to try "
            "continuing"
        )
    _require(
        all(torch.equal(end[key], trial.continued[key]) for key in end),
        f"{trial.name}: stopped after step {trial.stop_after} and continued, it ends with other weights; what a step "
        "draws must depend on (info.seed, step) alone, and the checkpoint in info.work must hold all other state",
    )


def _even(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """The share of even token ids: something that a random policy gets more or less of."""
    return [Reward(sum(i % 2 == 0 for i in row.token_ids) / max(1, len(row.token_ids))) for row in rollouts]


def _weights(policy: Any) -> dict[str, Any]:
    return {key: tensor.detach().clone() for key, tensor in policy.model.state_dict().items()}


# --- all of them ---------------------------------------------------------------------------------------------------

Rule = Callable[[Any], None]

RULES: Mapping[str, tuple[Rule, ...]] = {
    "tokenizer": (
        codes_in_range,
        same_sids_again,
        any_company,
        no_pickles,
        survives_saving,
        leaves_the_catalogue,
        new_items,
        reconstruction,
        own_facts,
    ),
    "teacher": (
        typed_answers,
        answers_each_once,
        reasons_for_failures,
        complete_orders,
        told_in_words,
        asked_alone,
    ),
    "reward": (typed_outcomes, same_again, order_independent, own_group, prefers_the_best),
    "optimizer": (
        steps_count_up,
        aligned_reports,
        metrics_are_numbers,
        finite_weights,
        changes_the_policy,
        continues_where_it_stopped,
    ),
}
"""Kind of part -> the rules of its contract, in the order they are tried."""

TRIALS: Mapping[str, Callable[..., Any]] = {
    "tokenizer": TokenizerTrial,
    "teacher": TeacherTrial,
    "reward": RewardTrial,
    "optimizer": OptimizerTrial,
}
"""Kind of part -> what its rules are tried with."""


@dataclass(frozen=True)
class Verdict:
    """What became of one rule."""

    rule: str
    says: str
    state: Literal["kept", "broken", "known", "mended", "not tried"]
    """`known`: broken, as was declared. `mended`: declared as broken, and kept: the declaration must go."""
    note: str = ""
    error: BaseException | None = None


def judge(rule: Rule, trial: Any, known: Mapping[str, str] | None = None) -> Verdict:
    """Try one rule. An exception of the part's own counts as broken, and the note says where it was raised."""
    reason = (known or {}).get(rule.__name__)
    error: BaseException | None = None
    try:
        rule(trial)
    except NotTried as nothing:
        return Verdict(rule.__name__, _says(rule), "not tried", str(nothing))
    except AssertionError as fault:
        error, note = fault, str(fault)
        if fault.__cause__ is not None:
            note += f" ({_place(fault.__cause__, trial.part)})"
    except Exception as raised:
        error, note = raised, f"{trial.name}: raised {type(raised).__name__}: {raised} ({_place(raised, trial.part)})"
    if error is None and reason is None:
        return Verdict(rule.__name__, _says(rule), "kept")
    if error is None:
        note = f"{trial.name}: {rule.__name__} is declared as a known failure ({reason}) and holds; undeclare it"
        return Verdict(rule.__name__, _says(rule), "mended", note)
    if reason is not None:
        return Verdict(rule.__name__, _says(rule), "known", f"{reason} [{note}]", error)
    return Verdict(rule.__name__, _says(rule), "broken", note, error)


def check_known(kind: str, known: Mapping[str, str]) -> None:
    """Raises ValueError for a declared failure that no rule of the kind is called."""
    names = [rule.__name__ for rule in RULES[kind]]
    for name in known:
        if name not in names:
            raise ValueError(f"no rule for a {kind} is named {name!r}; {did_you_mean(name, names)}")


def _place(error: BaseException, part: object) -> str:
    """file:line of the last frame in the folder of the part's own module, or of the last of all."""
    module = sys.modules.get(str(getattr(part, "__module__", "")))
    home = str(Path(getattr(module, "__file__", None) or "?").parent)
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if str(Path(frame.filename).parent) == home] or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _says(rule: Rule) -> str:
    return (rule.__doc__ or "").strip().splitlines()[0]


def _keep(kind: str, trial: Any) -> None:
    """All rules of the contract. Raises AssertionError for the first that is broken."""
    for rule in RULES[kind]:
        verdict = judge(rule, trial)
        if verdict.state == "broken":
            raise AssertionError(verdict.note) from verdict.error


def check_reward(reward: RewardFn, *, judges_order: bool = True, rollouts: Sequence[Rollout] | None = None) -> None:
    """One typed, finite outcome a row, whatever the answer; the same again, in any row order, in any company; input
    left alone.

    With `judges_order` also: the best order gets more than the order as given, its reverse, and an answer that cannot
    be read. `rollouts` are tried in place of the made ones; RewardTrial says which these are.
    """
    _keep("reward", RewardTrial(reward, rollouts=rollouts, judges_order=judges_order))


def check_tokenizer(tokenizer: Tokenizer, catalog: Catalog | None = None, *, places_new_items: bool = True) -> None:
    """Codes of the right shape and range; an item's SID the same again, in other company, and after save and load.

    `tokenizer` is fresh: not fitted yet. `catalog` (default: 48 made items) is what it is fitted on. Items that come
    later get SIDs and change nobody's; `places_new_items=False` is for one that raises instead. `reconstruct` and
    `facts` are tried where there are such methods.
    """
    _keep("tokenizer", TokenizerTrial(tokenizer, catalog=catalog, places_new_items=places_new_items))


def check_teacher(
    teacher: Teacher, examples: Sequence[RerankExample] | None = None, info: RunInfo | None = None
) -> None:
    """One answer for each example, the same when it is asked alone: a trace whose order is complete, or a failure.

    `examples` are asked in place of the made ones, among which one has no relevant candidate.
    """
    _keep("teacher", TeacherTrial(teacher, examples=examples, info=info))


def check_optimizer(
    optimizer: PolicyOptimizer, reward: RewardFn | None = None, *, stop_after: int = 2, info: RunInfo | None = None
) -> None:
    """Steps counted up by one; the policy changed and finite; outcomes aligned; stopped and continued, the same end.

    Runs it to its end on a tiny random policy: build it with few steps (more than `stop_after`), two or three rollouts
    a group and short completions. The default reward is one that random text gets more or less of. Imports torch.
    """
    _keep("optimizer", OptimizerTrial(optimizer, reward=reward, stop_after=stop_after, info=info))

"""The contracts of the four protocols, tried on made records."""

from __future__ import annotations

import copy
import math
import random
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rerankkit.protocols import PolicyOptimizer, RewardFn, Teacher, Tokenizer
from rerankkit.testing.records import make_catalog, make_example, make_policy, make_rollout
from rerankkit.testing.zoo import Honest, exploits
from rerankkit.types import (
    Catalog,
    Failed,
    NotApplicable,
    Outcome,
    RerankExample,
    Reward,
    Rollout,
    RunInfo,
    StepReport,
    Trace,
    TraceFailure,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def check_reward(reward: RewardFn, *, judges_order: bool = True, rollouts: Sequence[Rollout] | None = None) -> None:
    """One typed, finite outcome a row, whatever the answer; the same again, in any row order, in any company; input
    left alone.

    With `judges_order` also: the best order gets more than the order as given, its reverse, and an answer that cannot
    be read. `rollouts` are tried in place of the made ones, which are the answers of `rerankkit.testing.zoo` to asks
    with a target in front, in the middle and at the end, with graded relevance, with two candidates and with no target.
    """
    name = _name(reward)
    rows = _made_rollouts() if rollouts is None else [(f"rollout {i}", row) for i, row in enumerate(rollouts)]
    outcomes = _judged(name, reward, rows)
    _same_again(
        rows,
        outcomes,
        _judged(name, reward, rows),
        f"{name}: a second call on the same rollouts gave other outcomes; a reward is a pure function of the records",
    )
    places = random.Random(0).sample(range(len(rows)), len(rows))
    again = _judged(name, reward, [rows[i] for i in places])
    _same_again(
        [rows[i] for i in places],
        [outcomes[i] for i in places],
        again,
        f"{name}: the outcomes depend on row order; judge each rollout by its own record and group",
    )
    for group in sorted({row.group for _, row in rows}):
        own = [i for i, (_, row) in enumerate(rows) if row.group == group]
        _same_again(
            [rows[i] for i in own],
            [outcomes[i] for i in own],
            _judged(name, reward, [rows[i] for i in own]),
            f"{name}: the outcomes of a group depend on what other groups are judged with it",
        )
    if judges_order:
        for example in _examples_with_target():
            _check_gold(name, reward, example)


Row: TypeAlias = tuple[str, Rollout]
"""A rollout and what it is, for messages."""


def _made_rollouts() -> list[Row]:
    examples = [*_examples_with_target(), make_example(None), make_example(1, num_candidates=2, num_history=0)]
    cheats = exploits(examples)
    rows: list[Row] = []
    for group, example in enumerate(examples):
        for what, order in _orders(example).items():
            rows.append((what, make_rollout(example, order, group=group)))
        # half a list: read, but repaired
        half = make_rollout(example).text[:-60] + '"]}'
        rows.append(("half a list", make_rollout(example, text=half, num_tokens=400, group=group, truncated=True)))
        bare = replace(make_rollout(example, group=group), token_ids=(), logps=(), num_reasoning_tokens=0)
        rows.append(("an answer without its tokens", bare))
        rows.append(
            ("an answer out of a beam", replace(make_rollout(example, group=group), origin="beam", beam_rank=1))
        )
        honest = Honest(skill=1.0).play(example, random.Random(group), group)
        rows.append(("an honest answer", honest))
        rows += [(f"an answer that {c.about}", c.play(honest, random.Random(group))) for c in cheats]
    return rows


def _examples_with_target() -> list[RerankExample]:
    graded = make_example(relevance=(0, 1, 0, 3, 2, 0), example_id="graded/3")
    return [*(make_example(target) for target in (0, 3, 9)), graded]


def _orders(example: RerankExample) -> dict[str, tuple[int, ...]]:
    """What an answer may look like: the best order, the rest as given; and orders that nobody thought about."""
    given = tuple(range(len(example.candidates)))
    gold = tuple(sorted(given, key=lambda place: -example.relevance[place]))
    return {"gold": gold, "the order as given": given, "the reversed order": given[::-1]}


def _check_gold(name: str, reward: RewardFn, example: RerankExample) -> None:
    orders = _orders(example)
    probes = {
        **{what: make_rollout(example, order) for what, order in orders.items() if order[0] != orders["gold"][0]},
        "an answer that cannot be read": make_rollout(example, text="I cannot say."),
    }
    rows = [("the best answer", make_rollout(example, orders["gold"])), *probes.items()]
    gold, *others = _judged(name, reward, rows)
    where = f"when the target is given in place {example.target_index}"
    if not isinstance(gold, Reward):
        raise AssertionError(f"{name}: the best answer was not rewarded {where}: {gold}")
    known = {what: outcome.value for what, outcome in zip(probes, others, strict=True) if isinstance(outcome, Reward)}
    flipped = len(known) > 1 and all(gold.value < value for value in known.values())
    hint = ": the sign looks flipped" if flipped else ""
    for what, value in known.items():
        _require(
            gold.value > value,
            f"{name}: {what} gets {value:g}, the best answer {gold.value:g} {where}{hint}; it must get more "
            "(or pass judges_order=False for a reward that does not judge the order)",
        )


def _judged(name: str, reward: RewardFn, rows: Sequence[Row]) -> list[Outcome]:
    """The outcomes, each of the right kind and finite; the rollouts must be as they were."""
    rollouts = [row for _, row in rows]
    before, given = copy.deepcopy(rollouts), list(rollouts)
    try:
        outcomes = list(reward(given))
    except Exception as error:
        raise AssertionError(
            f"{name}: raised {type(error).__name__}: {error}{_raised_for(reward, rows)}; say Failed(reason) for what "
            "cannot be judged"
        ) from error
    _require(
        len(given) == len(rollouts) and all(a is b for a, b in zip(given, rollouts, strict=True)) and given == before,
        f"{name}: changed the rollouts it was given",
    )
    _require(
        len(outcomes) == len(rollouts),
        f"{name}: {len(outcomes)} outcomes for {len(rollouts)} rollouts; give one for each, in order",
    )
    for (what, _), outcome in zip(rows, outcomes, strict=True):
        _require(
            isinstance(outcome, Reward | NotApplicable | Failed),
            f"{name}: returned {outcome!r}; an outcome is Reward, NotApplicable or Failed",
        )
        if isinstance(outcome, Reward):
            numbers = {"value": outcome.value, **outcome.parts}
            bad = {part: value for part, value in numbers.items() if not _finite(value)}
            _require(
                not bad,
                f"{name}: {bad} is not finite for {what}; say Failed(reason) where there is nothing to judge by",
            )
        else:
            _require(bool(outcome.reason), f"{name}: {type(outcome).__name__} without a reason for {what}")
    return outcomes


def _raised_for(reward: RewardFn, rows: Sequence[Row]) -> str:
    """Of which answer it was, where one alone brings it about."""
    for what, row in rows:
        try:
            list(reward([row]))
        except Exception:
            return f" for {what}"
    return ""


def _finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _same_again(rows: Sequence[Row], these: Sequence[Outcome], those: Sequence[Outcome], fault: str) -> None:
    for (what, _), this, that in zip(rows, these, those, strict=True):
        _require(_same(this, that), f"{fault}. For {what}: {_short(this)}, then {_short(that)}")


def _short(outcome: Outcome) -> str:
    return f"{outcome.value:g}" if isinstance(outcome, Reward) else str(outcome)


def _same(a: Outcome, b: Outcome) -> bool:
    if not isinstance(a, Reward) or not isinstance(b, Reward):
        return type(a) is type(b)
    # Sums over a group may be added up in another order: the last bits may differ.
    return a.parts.keys() == b.parts.keys() and all(
        math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
        for x, y in [(a.value, b.value), *((a.parts[part], b.parts[part]) for part in a.parts)]
    )


def check_tokenizer(tokenizer: Tokenizer, catalog: Catalog | None = None) -> None:
    """Codes of the right shape and range; an item's SID the same again, in another order, and after save and load.

    `tokenizer` is fresh: not fitted yet. `catalog` (default: 48 made items) is what it is fitted on.
    """
    import numpy as np

    name = _name(tokenizer)
    catalog = catalog or make_catalog()
    fresh, vectors = copy.deepcopy(tokenizer), catalog.embeddings.copy()
    tokenizer.fit(catalog)
    codes = _codes(name, tokenizer, catalog)
    _require(np.array_equal(codes, _codes(name, tokenizer, catalog)), f"{name}: encode gave other SIDs the second time")
    rows = list(range(len(catalog.items)))[::-2]
    part = Catalog(
        tuple(catalog.items[i] for i in rows),
        catalog.embeddings[rows],
        np.empty((0, 2), dtype=np.int64),
        {name: matrix[rows] for name, matrix in catalog.side.items()},
    )
    _require(
        np.array_equal(codes[rows], _codes(name, tokenizer, part)),
        f"{name}: an item's SID depends on which others are encoded with it, or on their order",
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        for file in Path(folder).rglob("*"):
            _require(not _is_pickle(file), f"{name}: save wrote a pickle ({file.name}); write JSON or safetensors")
        fresh.load(Path(folder))
    _require(
        tuple(fresh.codebook_sizes) == tuple(tokenizer.codebook_sizes),
        f"{name}: codebook_sizes differ after save and load",
    )
    _require(np.array_equal(codes, _codes(name, fresh, catalog)), f"{name}: SIDs differ after save and load")
    _require(np.array_equal(vectors, catalog.embeddings), f"{name}: changed the embeddings of the catalogue")


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


def check_teacher(
    teacher: Teacher, examples: Sequence[RerankExample] | None = None, info: RunInfo | None = None
) -> None:
    """One answer for each example: a trace whose order is a permutation of the candidates, or a failure with a reason.

    `examples` are asked in place of the made ones, among which one has no relevant candidate.
    """
    name = _name(teacher)
    asked = list(examples) if examples is not None else [make_example(target) for target in (0, 3, 9, None)]
    before, given = copy.deepcopy(asked), list(asked)
    answers = list(teacher.write(given, info or RunInfo()))
    _require(given == before, f"{name}: changed the examples it was given")
    for answer in answers:
        _require(
            isinstance(answer, Trace | TraceFailure), f"{name}: yielded {answer!r}; an answer is Trace or TraceFailure"
        )
    times = Counter(answer.example_id for answer in answers)
    by_id = {example.example_id: example for example in asked}
    strangers = sorted(times.keys() - by_id.keys())
    _require(not strangers, f"{name}: answered {strangers[:3]}, which nobody asked")
    missing = [example_id for example_id in by_id if example_id not in times]
    _require(not missing, f"{name}: no answer for {missing[:3]}; what cannot be answered is a TraceFailure")
    twice = [example_id for example_id, count in times.items() if count > 1]
    _require(not twice, f"{name}: answered {twice[:3]} more than once")
    for answer in answers:
        if isinstance(answer, TraceFailure):
            _require(bool(answer.reason), f"{name}: a failure for {answer.example_id} gives no reason")
            continue
        size = len(by_id[answer.example_id].candidates)
        _require(
            sorted(answer.order) == list(range(size)),
            f"{name}: the order for {answer.example_id} is {answer.order}; it must hold each of the {size} places once",
        )
        _require(bool(answer.reasoning.strip()), f"{name}: a trace for {answer.example_id} without reasoning")
        told = all(isinstance(text, str) for pair in answer.provenance.items() for text in pair)
        _require(told, f"{name}: provenance holds other things than text: {dict(answer.provenance)}")


def check_optimizer(
    optimizer: PolicyOptimizer, reward: RewardFn | None = None, *, stop_after: int = 2, info: RunInfo | None = None
) -> None:
    """Steps counted up by one; the policy changed and finite; outcomes aligned; stopped and continued, the same end.

    Runs it to its end on a tiny random policy: build it with few steps (more than `stop_after`), two or three rollouts
    a group and short completions. The default reward is one that random text gets more or less of. Imports torch.
    """
    import torch

    name, info = _name(optimizer), info or RunInfo()
    examples = [make_example(target) for target in (0, 3, 9)]
    reward = reward or _even
    start = _weights(make_policy())
    policy = make_policy()
    reports = list(optimizer.optimize(policy, examples, reward, info))
    end = _weights(policy)
    _require(
        [report.step for report in reports] == list(range(1, len(reports) + 1)),
        f"{name}: steps are {[report.step for report in reports]}; they count up from 1",
    )
    for report in reports:
        _check_report(name, report)
    _require(
        all(bool(torch.isfinite(tensor).all()) for tensor in end.values()), f"{name}: weights are not finite at the end"
    )
    _require(
        any(not torch.equal(start[key], end[key]) for key in start), f"{name}: the policy's weights did not change"
    )
    if len(reports) <= stop_after:
        raise AssertionError(
            f"{name}: took {len(reports)} steps; build it with more than stop_after={stop_after} to try continuing"
        )
    with tempfile.TemporaryDirectory() as work:
        here = RunInfo(info.seed, info.device, info.precision, Path(work), info.surface)
        first = optimizer.optimize(make_policy(), examples, reward, here)
        for _ in range(stop_after):
            next(first)
        if hasattr(first, "close"):
            first.close()  # what a kill does: nothing after this step is run
        continued = make_policy()
        for _ in optimizer.optimize(continued, examples, reward, here):
            pass
        found = _weights(continued)
    _require(
        all(torch.equal(end[key], found[key]) for key in end),
        f"{name}: stopped after step {stop_after} and continued, it ends with other weights; what a step draws must "
        "depend on (info.seed, step) alone, and the checkpoint in info.work must hold all other state",
    )


def _check_report(name: str, report: StepReport) -> None:
    _require(
        len(report.rollouts) == len(report.outcomes),
        f"{name}: step {report.step} reports {len(report.rollouts)} rollouts and {len(report.outcomes)} outcomes",
    )
    bad = {key: value for key, value in report.metrics.items() if not isinstance(value, int | float)}
    _require(not bad, f"{name}: step {report.step} logs {bad}, which are no numbers")


def _even(rollouts: Sequence[Rollout]) -> list[Outcome]:
    """The share of even token ids: something that a random policy gets more or less of."""
    return [Reward(sum(i % 2 == 0 for i in row.token_ids) / max(1, len(row.token_ids))) for row in rollouts]


def _weights(policy: Any) -> dict[str, Any]:
    return {key: tensor.detach().clone() for key, tensor in policy.model.state_dict().items()}


def _name(part: object) -> str:
    return getattr(part, "__qualname__", None) or type(part).__name__


def _require(kept: bool, fault: str) -> None:
    if not kept:
        raise AssertionError(fault)

"""Asks from outside a run: a trained run ranks lists that it has never seen."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError

from rerankkit.config import Evaluate, RunConfig, find_plugins, make_config
from rerankkit.errors import DataError, RunFolderError, UsageError, did_you_mean
from rerankkit.stages.rankings import generate, score
from rerankkit.stages.sids import SidMap, add_items, like_those_of
from rerankkit.store import current_stage, finished_stage, read_json
from rerankkit.types import Item, Parse, Ranking, RerankExample, RunInfo

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.evidence import Evidence
    from rerankkit.lm import Policy

Unknown: TypeAlias = Literal["refuse", "text", "last"]
"""What becomes of an item that the run does not know. `refuse`: an error. `text`: an item that is given with its text
gets a SID from the run's own tokenizer, and is ranked like any other. `last`: it goes behind all others, in the given
order; in a history it is left out."""

POLICIES: Mapping[str, tuple[str, ...]] = {
    "exported": ("gate", "rl", "sft", "midtrain"),
    "rl": ("rl",),
    "sft": ("sft",),
    "mid-train": ("midtrain",),
}
"""What a user calls a policy -> the stages that may hold it; the first that is finished does."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A list to be ranked, before anybody has looked its items up: they have no SID, and maybe no text."""

    ask_id: str | int
    history: tuple[Item, ...]
    """Oldest first."""
    candidates: tuple[Item, ...]
    """In the order that the pre-ranker gave, best first."""
    scores: tuple[float, ...] = ()
    """The pre-ranker's, aligned with `candidates`; empty where there are none."""
    where: str = "ask"
    """Where it stands, for errors: `asks.jsonl:3`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of an ask. `asdict` gives the line that `rerankkit rank` writes."""

    id: str | int
    ranking: tuple[str, ...]
    """Item ids, best first: every candidate once."""
    order: tuple[int, ...]
    """The same as positions in the given list, from 0."""
    parse: str
    """`ok`, `repaired` or `failed`, as `Parse` has them."""
    problem: str
    """Why it is not `ok`; empty when it is."""
    identity: bool
    """Whether the order is the one that was given."""
    reasoning: str
    """What the policy said first; items are named by their SIDs. Empty where it only scores."""
    cited: Mapping[str, str]
    """SID (or place) as written in `reasoning` -> item id, for those of the history and the list."""
    unknown: tuple[str, ...]
    """Items that the run did not know: ranked by their text, put last or left out, as was chosen."""


@dataclass(frozen=True)
class Ranker:
    """A policy of a finished run, ready to rank. `Ranker.load("runs/mine").rank(asks)`."""

    run: Path
    name: str
    """Which policy it is: `rl`, `sft`, `mid-train`, or what the gate calls the one that it chose."""
    how: str
    """`generate`: it answers; `score`: it knows items, and has not learned to answer."""
    policy: Policy
    sids: SidMap
    evaluate: Evaluate
    """How the run itself answered its test users."""
    max_history: int
    info: RunInfo = field(default_factory=RunInfo)

    @classmethod
    def load(
        cls,
        run: str | Path,
        policy: str = "exported",
        *,
        device: str = "auto",
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        **info: Any,
    ) -> Ranker:
        """A run's policy by name: `exported` is what its gate chose, or the last finished one of rl, sft, mid-train.

        Of the run folder only the stages data, sids and the policy's own are read. `info` sets fields of RunInfo.
        Raises RunFolderError if the policy is not finished, ConfigError for settings that cannot be used.
        """
        import torch

        from rerankkit.lm import Policy

        run = Path(run)
        name, how, folder = find_policy(run, policy)
        settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        config = config_of(run, {key: value for key, value in settings.items() if value is not None})
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        sids = SidMap.load(current_stage(run, "sids"))
        told = RunInfo(config.seed, device, config.policy.precision, surface=sids.surface, **info)
        loaded = Policy.load(folder, device=device)
        return cls(run, name, how, loaded, sids, config.evaluate, config.data.max_history, told)

    def rank(self, asks: Sequence[Ask | Mapping[str, Any]], unknown: Unknown = "refuse") -> list[Answer]:
        """An answer for each ask, in order; a mapping is read as a line of an asks file.

        Answers do not depend on one another, but for the SIDs that `unknown = "text"` gives to new items. Raises
        DataError for the first ask that cannot be used, before anything is ranked.
        """
        if unknown not in get_args(Unknown):
            raise UsageError(f"unknown: {unknown!r} cannot be chosen; {did_you_mean(unknown, get_args(Unknown))}")
        known = [
            ask if isinstance(ask, Ask) else parse_ask(ask, f"asks[{number}]", number)
            for number, ask in enumerate(asks)
        ]
        items, strangers = self._look_up(known, unknown)
        kept = [[place for place, item in enumerate(ask.candidates) if item.item_id in items] for ask in known]
        examples = [make_example(*pair, items, self.max_history) for pair in zip(known, kept, strict=True)]
        examples = self._with_evidence(examples, items)
        for ask, example in zip(known, examples, strict=True):
            self._check_room(ask, example)
        found = iter(self._found([example for example in examples if example.candidates]))
        answers = []
        for ask, places, example in zip(known, kept, examples, strict=True):
            ranking, said = next(found) if places else (Ranking((), Parse.FAILED, "no candidate is known"), "")
            order = [places[place] for place in ranking.order]
            order += [place for place in range(len(ask.candidates)) if place not in places]
            ranking = replace(ranking, order=tuple(order))
            answers.append(
                Answer(
                    id=ask.ask_id,
                    ranking=tuple(ask.candidates[place].item_id for place in order),
                    order=ranking.order,
                    parse=str(ranking.parse),
                    problem=ranking.problem,
                    identity=ranking.identity,
                    reasoning=said,
                    cited=self._cited(said, example),
                    unknown=tuple(dict.fromkeys(item.item_id for item in _items(ask) if item.item_id in strangers)),
                )
            )
        return answers

    def _found(self, examples: Sequence[RerankExample]) -> list[tuple[Ranking, str]]:
        """Ranking and reasoning of each example, as the run itself made them for its test users."""
        think, size = self.evaluate.think != "off", self.evaluate.batch_size
        rank = score if self.how == "score" else partial(generate, think=think)
        starts = range(0, len(examples), size)
        return [
            answer
            for start in self.info.progress(starts, total=len(starts), what="ranking")
            for answer in rank(self.policy, examples[start : start + size], self.evaluate, self.info)
        ]

    def _look_up(self, asks: Sequence[Ask], unknown: Unknown) -> tuple[dict[str, Item], set[str]]:
        """item_id -> the item with its SID, of all that can be ranked; and who is not the run's own."""
        told: dict[str, Item] = {}
        for ask in asks:
            for item in _items(ask):
                before = told.get(item.item_id)
                if before is None or not before.title:
                    told[item.item_id] = item
                elif item.title and item != before:
                    raise DataError(f"{ask.where}: item {item.item_id!r} is described otherwise than further up.")
        own = self._own_items(list(told))
        strangers = {item_id: item for item_id, item in told.items() if item_id not in own}
        wordless = [item_id for item_id, item in strangers.items() if not item.title]
        if (unknown == "refuse" and strangers) or (unknown == "text" and wordless):
            raise self._unknown_item(asks, set(strangers if unknown == "refuse" else wordless), len(own))
        if unknown == "text" and strangers:
            own |= self._placed(tuple(strangers.values()))
        return own, set(strangers)

    def _with_evidence(self, examples: list[RerankExample], items: Mapping[str, Item]) -> list[RerankExample]:
        """What the run's interactions and texts say about each candidate, if the policy's prompts show it."""
        if not self.policy.surface.facts:
            return examples
        new = [item for item_id, item in items.items() if item_id not in self._dataset.item_rows]
        evidence = self._looking_up(new) if new else self._evidence
        histories = [[item.item_id for item in example.history] for example in examples]
        listed = [[item.item_id for item in example.candidates] for example in examples]
        found = evidence.about(histories, listed)
        return [replace(example, evidence=facts) for example, facts in zip(examples, found, strict=True)]

    def _looking_up(self, new: Sequence[Item]) -> Evidence:
        from rerankkit.data.evidence import Evidence

        refit = read_json(self.run / "config.json")["candidates"].get("refit", True)
        return Evidence(self._dataset, self.policy.surface.facts, refit=refit, new=new)

    @cached_property
    def _evidence(self) -> Evidence:
        """About the run's own items: what is counted for it takes seconds, and is the same for every ask."""
        return self._looking_up([])

    @cached_property
    def _dataset(self) -> Dataset:
        from rerankkit.data.dataset import Dataset

        return Dataset.load(current_stage(self.run, "data"))

    def _own_items(self, item_ids: Sequence[str]) -> dict[str, Item]:
        import pyarrow.parquet as pq

        table = current_stage(self.run, "data") / "items.parquet"
        filters = [("item_id", "in", list(item_ids))] if item_ids else None  # Arrow cannot type an empty list
        rows = pq.read_table(table, filters=filters).to_pylist() if item_ids else []
        items = [Item(**{**row, "categories": tuple(row["categories"]), "sid": ()}) for row in rows]
        return self.sids.attach([item for item in items if item.item_id in self.sids.sids])

    def _placed(self, items: tuple[Item, ...]) -> dict[str, Item]:
        """New items with SIDs from the run's own tokenizer; nothing is written."""
        raw = like_those_of(finished_stage(self.run, "sids"))
        if raw["data"]["embeddings"]["use"] == "file":
            raise UsageError(
                f"{self.run}: its item vectors came from a file, so text alone gives no SID; add the items with "
                "`rerankkit sids add` and vectors of theirs, or choose unknown = last."
            )
        config = make_config(raw, find_plugins(raw))
        extended, _ = add_items(config, items, device=self.info.device)
        return {item.item_id: replace(item, sid=extended.sids[item.item_id]) for item in items}

    def _unknown_item(self, asks: Sequence[Ask], refused: set[str], num_known: int) -> DataError:
        ask, key, item = next(
            (ask, f"{name}[{place}]", item)
            for ask in asks
            for name, items in (("history", ask.history), ("candidates", ask.candidates))
            for place, item in enumerate(items)
            if item.item_id in refused
        )
        more = len(refused) - 1
        others = f" Nor {'is 1 other' if more == 1 else f'are {more:,} others'} of this file." if more else ""
        what = "is no item of" if item.title else "is no item of, and comes without a title for,"
        return DataError(
            f"{ask.where}: {key}: {item.item_id!r} {what} {self.run}, which has {len(self.sids.sids):,}.{others} Leave "
            "it out; or choose unknown = last, which puts such items behind the others; or unknown = text, and give it "
            'as {"item_id": ..., "title": ...}.'
        )

    def _check_room(self, ask: Ask, example: RerankExample) -> None:
        """Raise UsageError if prompt and answer do not fit the policy: before hours of work, not after."""
        from rerankkit.lm.permutation import answer_mask
        from rerankkit.text.prompts import rerank_messages

        if self.how == "score" or not example.candidates:
            return
        longest = self.evaluate.max_new_tokens
        try:
            prompt = self.policy.prompt_ids(rerank_messages(example, self.policy.surface, self.policy.style))
            self.policy.check_length(len(prompt) + longest)
            if self.evaluate.constrain:
                answer_mask(self.policy, example, longest)
        except UsageError as error:
            raise DataError(f"{ask.where}: {error}") from error

    def _cited(self, said: str, example: RerankExample) -> dict[str, str]:
        if not said:  # and where nothing is said, there may be fewer places than candidates
            return {}
        surface = self.policy.surface
        names = {surface.text(item.sid): item.item_id for item in (*example.history, *example.candidates)}
        names |= dict(zip(surface.names(example), (item.item_id for item in example.candidates), strict=True))
        return {name: names[name] for name in dict.fromkeys(surface.citations(said)) if name in names}


def make_example(ask: Ask, places: Sequence[int], items: Mapping[str, Item], max_history: int) -> RerankExample:
    """The ask as the policy gets it: the candidates at `places` and the latest of the history, as far as known.

    The one place where ids become an example. Its relevance is all zero: nobody knows the target.
    """
    history = [items[item.item_id] for item in ask.history if item.item_id in items]
    candidates = [items[ask.candidates[place].item_id] for place in places]
    return RerankExample(
        str(ask.ask_id), "", tuple(history[-max_history:]), tuple(candidates), (0.0,) * len(candidates)
    )


# --- which policy ---------------------------------------------------------------------------------------------------


def find_policy(run: Path, name: str) -> tuple[str, str, Path]:
    """A policy's name, how it ranks (`generate` or `score`), and its folder. Raises RunFolderError if there is none."""
    if name not in POLICIES:
        raise UsageError(f"policy: nothing is named {name!r}; {did_you_mean(name, POLICIES)}")
    problems = []
    for stage in POLICIES[name]:
        try:
            folder = current_stage(run, stage)
        except RunFolderError as error:
            problems.append(error)
            continue
        own = {"exported": "mid-train", "how": "score"} if stage == "midtrain" else {"exported": stage}
        chosen = read_json(folder / "gate.json") if stage == "gate" else own
        return str(chosen.get("exported", stage)), str(chosen.get("how", "generate")), folder
    raise problems[-1]


def config_of(run: Path, evaluate: Mapping[str, Any] | None = None, device: str = "auto") -> RunConfig:
    """What of a run's config matters for ranking, with other settings for its block `evaluate` where they are given.

    Its plugins need not be installed here. The device is this machine's, not the run's.
    """
    raw = read_json(run / "config.json")
    policy = {key: value for key, value in raw.get("policy", {}).items() if key != "lora"}  # adapters were merged
    data = {"max_history": raw["data"]["max_history"]} if "max_history" in raw.get("data", {}) else {}
    own = {"seed": raw.get("seed", 0), "device": device, "policy": policy, "data": data}
    own["evaluate"] = {**raw.get("evaluate", {}), **(evaluate or {})}
    return make_config(own, find_plugins({}))


# --- reading asks ---------------------------------------------------------------------------------------------------


def _as_item(value: object) -> object:
    return {"item_id": value} if isinstance(value, str | int) else value


def _as_id(value: object) -> object:
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else value


Words = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


class _Item(BaseModel):
    item_id: Annotated[str, BeforeValidator(_as_id), Field(min_length=1)]
    title: Words = ""
    categories: Annotated[tuple[str, ...], BeforeValidator(lambda value: () if value is None else value)] = ()
    description: Words = ""
    brand: Words = ""
    price: FiniteFloat | None = None


_Items: TypeAlias = tuple[Annotated[_Item, BeforeValidator(_as_item)], ...]


def _name(value: object) -> object:
    if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
        raise ValueError("an id is a string or a whole number")
    return value


class _Line(BaseModel):
    """Other keys are the user's own, and left alone."""

    id: Annotated[object, AfterValidator(_name)] = None
    history: _Items
    candidates: Annotated[_Items, Field(min_length=1)]
    scores: tuple[FiniteFloat, ...] | None = None


def read_asks(path: Path) -> list[Ask]:
    """The asks of a JSONL file (`-` is stdin), one a line, but for empty lines. Raises DataError with line and key."""
    try:
        lines = (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    asks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: is not JSON ({error}).") from error
        asks.append(parse_ask(value, f"{path}:{number}", number))
    if not asks:
        raise DataError(f'{path}: holds no ask; a line is {{"history": [ids], "candidates": [ids]}}.')
    return asks


def parse_ask(value: Any, where: str, number: int) -> Ask:
    """One ask; without an id of its own it is called by its number. Raises DataError."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: is no object; an ask has the keys history and candidates.")
    try:
        line = _Line.model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
        if fault["type"] == "missing":
            keys = list(map(str, fault["input"]))
            close = difflib.get_close_matches(str(fault["loc"][-1]), keys, n=1)
            instead = f"{close[0]!r} may be meant" if close else f"given: {', '.join(keys)[:80] or 'none'}"
            raise DataError(f"{where}: {key}: this key is missing; {instead}.") from error
        if fault["type"] == "too_short":
            raise DataError(f"{where}: {key}: is empty; give at least one item to rank.") from error
        why = fault["msg"].removeprefix("Value error, ")
        raise DataError(f"{where}: {key}: {fault['input']!r:.80} cannot be used: {why}.") from error
    candidates = tuple(map(_item_of, line.candidates))
    ids = [item.item_id for item in candidates]
    for place, item_id in enumerate(ids):
        if item_id in ids[:place]:
            raise DataError(f"{where}: candidates[{place}]: {item_id!r} stands in the list twice.")
    if line.scores is not None and len(line.scores) != len(candidates):
        raise DataError(f"{where}: scores: {len(line.scores)} for {len(candidates)} candidates.")
    name = number if line.id is None else line.id
    assert isinstance(name, str | int)
    return Ask(name, tuple(map(_item_of, line.history)), candidates, line.scores or (), where)


def _item_of(row: _Item) -> Item:
    """What the line says of an item. Where it has no title, brand and narrowest categories make one."""
    title = row.title.strip() or " ".join([row.brand, *row.categories[-2:]]).strip()
    return Item(row.item_id, title, row.categories, row.description, row.brand, row.price)


def _items(ask: Ask) -> tuple[Item, ...]:
    return (*ask.history, *ask.candidates)

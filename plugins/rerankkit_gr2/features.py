"""The teacher that needs no language model: it reasons from what a prompt shows, and can be wrong.

Visible facts about each candidate (see `NAMES`), and the evidence that prompts show, go into a conditional logit. Its
weights, and what kind of product follows which, are learned from other users only: users are dealt into folds by a hash
of their id, and a fold is answered with what the other folds taught. So an ask's own target never informs the answer,
and rejection sampling really rejects.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rerankkit.text.clean import clean
from rerankkit.text.prompts import PromptStyle, shown_history
from rerankkit.types import Item, RerankExample, RunInfo
from rerankkit_gr2.asks import Failure, Reply, Request

NAMES = ("rank", "next", "recent", "kind", "brand", "words", "price")
"""-log of the given position; log lift of the candidate's kind after the last item's, and mean after the two before it;
shares of the history of the same kind and brand; mean share of the history that holds each title word; closeness to
the usual price (minus the log ratio)."""
SCALE = 4.0
"""What evidence is divided by, so that one ridge suits all weights."""
MARKS = (0.2, 0.4, 0.55, 0.7, 0.8, 0.87, 0.92, 0.96, 0.985)
"""Shares of all candidates below the marks 1 to 9 that the reasoning gives: finest where the choice falls."""
ALIKE = 0.35
"""What each feature counts for beside the given order where nothing may be learned from targets."""
RIDGE = 1.0
"""Strength of the pull towards the prior, in units of one example's log-likelihood."""
NUM_FOLDS = 5
MAX_FIT = 4000
"""Examples that a fold's weights are learned from: some tens of numbers need no more."""
SMOOTHING = 5.0
"""How many transitions the base rate of a kind is worth."""
FILLER = frozenset(["with", "from", "your", "each", "pack", "count", "fluid", "ounce", "ounces"])
"""Words that no pattern is named by, though sharing them means something."""
MAX_WORDS = 4
"""Words of a brand or kind that the reasoning repeats."""

Pairs: TypeAlias = dict[str, Counter[str]]
"""kind -> kinds that followed it."""


# --- what a prompt shows of an item --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """An item as a reader of its line sees it; empty is unseen."""

    kind: str
    """The narrowest category."""
    brand: str
    words: Mapping[str, str]
    """The title's words of four letters or more: in lower case -> as written."""
    price: float


@lru_cache(maxsize=1 << 16)
def see(item: Item, style: PromptStyle) -> Seen:
    """Only what `item_line` shows: a brand or kind that is not a field of its own counts if the title holds it."""
    title = clean(item.title, style.max_title_words) if "title" in style.fields else ""

    def shown(value: str, name: str) -> str:
        text = clean(value, min(style.max_title_words or MAX_WORDS, MAX_WORDS))
        return text if text and (name in style.fields or f" {text} ".lower() in f" {title} ".lower()) else ""

    return Seen(
        kind=shown(item.categories[-1], "categories") if item.categories else "",
        brand=shown(item.brand, "brand"),
        words={word.lower(): word for word in re.findall(r"[^\W\d_]{4,}", title)},
        price=item.price if "price" in style.fields and item.price is not None and 0 < item.price < math.inf else 0.0,
    )


# --- what other users teach ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lessons:
    """What the users outside one fold taught."""

    weights: tuple[float, ...]
    """Aligned with the columns of `features`."""
    pairs: Pairs
    bands: tuple[float, float]
    """Prices up to the first are low, above the second high."""
    knowledge: bool = True
    """Whether sequential purchase patterns may be used (KP / noKP)."""
    evidence: tuple[str, ...] = ()
    """Facts that the examples bring along and prompts show; by name."""
    marked: tuple[float, ...] = ()
    """The scores from which the marks 1 to 9 are given."""
    base: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        base: Counter[str] = Counter()
        for following in self.pairs.values():
            base.update(following)
        total = base.total() + len(base)
        object.__setattr__(self, "base", {kind: (count + 1) / total for kind, count in base.items()})

    def lift(self, kind: str, following: str) -> float:
        """log P(following | kind) / P(following), smoothed; 0 where nothing is known."""
        base = self.base.get(following)
        if not self.knowledge or base is None or not kind:
            return 0.0
        after = self.pairs.get(kind, Counter())
        return math.log((after[following] + SMOOTHING * base) / (after.total() + SMOOTHING) / base)

    def features(self, example: RerankExample, style: PromptStyle) -> NDArray[np.float64]:
        """[C, F]: a row for each candidate; columns for NAMES and, with evidence, its facts over SCALE and all products
        of two of these and the rank, so that one can count for more where another is high."""
        history = [see(item, style) for item in shown_history(example.history, style)]
        prices = [item.price for item in history if item.price]
        usual = math.exp(sum(map(math.log, prices)) / len(prices)) if prices else 0.0
        kinds = Counter(item.kind for item in history)
        brands = Counter(item.brand for item in history)
        words = Counter(word for item in history for word in item.words)
        size = len(history) or 1
        before = [item.kind for item in history[-3:-1]]
        rows = []
        for place, item in enumerate(see(candidate, style) for candidate in example.candidates):
            rows.append(
                (
                    -math.log(1 + place),
                    self.lift(history[-1].kind, item.kind) if history else 0.0,
                    sum(self.lift(kind, item.kind) for kind in before) / (len(before) or 1),
                    kinds[item.kind] / size if item.kind else 0.0,
                    brands[item.brand] / size if item.brand else 0.0,
                    sum(words[word] for word in item.words) / size / (len(item.words) or 1),
                    -abs(math.log(item.price / usual)) if item.price and usual else 0.0,
                )
            )
        known = np.array(rows).reshape(-1, len(NAMES))
        if not self.evidence:
            return known
        said: Sequence[Mapping[str, int]] = example.evidence or [{}] * len(rows)
        facts = np.array([[one.get(name, 0) for name in self.evidence] for one in said])
        facts = facts.reshape(-1, len(self.evidence)) / SCALE
        told = np.hstack([known[:, :1], facts])
        first, second = np.triu_indices(told.shape[1])
        return np.hstack([known, facts, told[:, first] * told[:, second]])

    def scores(self, example: RerankExample, style: PromptStyle) -> NDArray[np.float64]:
        """[C], higher is better."""
        scores: NDArray[np.float64] = self.features(example, style) @ np.array(self.weights)
        return scores

    def marks(self, scores: NDArray[np.float64]) -> list[int]:
        """Each score as a whole number from 0 to 9: what can be said of a candidate without looking at the others."""
        return [int(mark) for mark in np.searchsorted(self.marked, scores, side="right")]

    def band(self, prices: Sequence[float]) -> str:
        """low, mid or high for the usual of these prices; empty if there are none."""
        if not prices or self.bands[0] >= self.bands[1]:
            return ""
        usual = float(np.median(prices))
        return "low price" if usual <= self.bands[0] else "high price" if usual > self.bands[1] else "mid price"


def fold_of(user_id: str) -> int:
    """The fold that a user is dealt into, the same on every machine."""
    return zlib.crc32(user_id.encode("utf-8", "surrogatepass")) % NUM_FOLDS


def fit(examples: Sequence[RerankExample], style: PromptStyle, learn: bool = True) -> list[Lessons]:
    """One set of lessons a fold, learned from the users of the other folds; without `learn` from histories alone."""
    own = [_transitions([e for e in examples if fold_of(e.user_id) == fold], style) for fold in range(NUM_FOLDS)]
    return [_fit_fold(fold, own, examples, style, learn) for fold in range(NUM_FOLDS)]


def _fit_fold(
    fold: int, own: list[Pairs], examples: Sequence[RerankExample], style: PromptStyle, learn: bool
) -> Lessons:
    pairs: Pairs = {}
    for other in (pairs for i, pairs in enumerate(own) if i != fold):
        for kind, following in other.items():
            pairs.setdefault(kind, Counter()).update(following)
    others = [e for e in examples if fold_of(e.user_id) != fold and e.target_index is not None]
    # By a hash of the id, so that neither the order of the examples nor the cut depends on how they were listed.
    others = sorted(others, key=lambda e: (zlib.crc32(e.example_id.encode("utf-8", "surrogatepass")), e.example_id))
    prices = [p for e in others[:MAX_FIT] for i in e.candidates if (p := see(i, style).price)]
    bands = tuple(round(float(q), 2) for q in np.quantile(prices, [1 / 3, 2 / 3])) if prices else (0.0, 0.0)
    names = next((tuple(e.evidence[0]) for e in examples if e.evidence), ())
    lessons = Lessons((), pairs, (bands[0], bands[1]), style.knowledge, names)
    chosen = [(lessons.features(e, style), e.target_index) for e in others[:MAX_FIT] if e.target_index is not None]
    pairs_of = len(names) and (len(names) + 1) * (len(names) + 2) // 2
    weights = (
        conditional_logit(chosen, len(NAMES) + len(names) + pairs_of) if learn else unlearned(len(names), pairs_of)
    )
    scores = np.concatenate([x @ weights for x, _ in chosen]) if chosen else np.zeros(1)
    return replace(lessons, weights=tuple(weights.tolist()), marked=tuple(np.quantile(scores, MARKS).tolist()))


def _transitions(examples: Sequence[RerankExample], style: PromptStyle) -> Pairs:
    """How often a kind followed a kind in these users' histories; of each user the longest, so nothing counts twice."""
    longest: dict[str, RerankExample] = {}
    for example in examples:
        if example.user_id not in longest or len(example.history) > len(longest[example.user_id].history):
            longest[example.user_id] = example
    pairs: Pairs = {}
    for example in longest.values():
        kinds = [see(item, style).kind for item in example.history]
        for kind, following in pairwise(kinds):
            if kind and following:
                pairs.setdefault(kind, Counter())[following] += 1
    return pairs


def prior(width: int = len(NAMES)) -> NDArray[np.float64]:
    """Weights [width] before anything is known: the order that was given."""
    return np.array([1.0, *[0.0] * (width - 1)])


def unlearned(num_facts: int, num_products: int) -> NDArray[np.float64]:
    """Weights where nothing was learned: the given order, every feature and fact alike, no products."""
    return np.array([1.0, *[ALIKE] * (len(NAMES) - 1 + num_facts), *[0.0] * num_products])


def conditional_logit(
    chosen: Sequence[tuple[NDArray[np.float64], int]], width: int = len(NAMES)
) -> NDArray[np.float64]:
    """Weights [width] that maximise sum log softmax(X w)[y] over pairs (X [C, width], y), less a ridge about the prior.

    McFadden 1974. With no pairs it is the prior.
    """
    from scipy.optimize import minimize

    start = prior(width)
    if not chosen:
        return start
    longest = max(len(x) for x, _ in chosen)
    # [N, C, F], the target's row taken off every row: log softmax(y) = -logsumexp(differences)
    differences = np.zeros((len(chosen), longest, len(start)))
    keep = np.zeros((len(chosen), longest), dtype=bool)
    for n, (x, y) in enumerate(chosen):
        differences[n, : len(x)] = x - x[y]
        keep[n, : len(x)] = True

    def loss(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = np.where(keep, differences @ w, -np.inf)
        peak = logits.max(axis=1, keepdims=True)
        p = np.exp(logits - peak)
        total = p.sum(axis=1, keepdims=True)
        value = float((np.log(total) + peak).sum()) + 0.5 * RIDGE * float((w - start) @ (w - start))
        slope: NDArray[np.float64] = np.einsum("nc,ncf->f", p / total, differences) + RIDGE * (w - start)
        return value, slope

    found: NDArray[np.float64] = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return found


# --- answering -----------------------------------------------------------------------------------------------------


class FeatureBackend:
    """Answers from visible features. The first ask of a run fits it, on the examples of that ask.

    With `info.work` what it learned is kept there, and read again after a restart: so a resumed run, which asks for
    the missing examples only, answers them as the first would have. The last items are sorted by their scores; only
    the top choice is drawn, by Gumbel noise times the temperature: at 1 from the logit's own distribution.
    """

    def __init__(self, learn: bool = True) -> None:
        self._learn = learn
        self._lessons: dict[tuple[Path | None, PromptStyle], list[Lessons]] = {}

    def ask(self, requests: Sequence[Request], info: RunInfo) -> Iterator[tuple[int, Reply | Failure]]:
        """One reply for each request, in order."""
        for i, request in enumerate(requests):
            key = (info.work, request.style)
            if key not in self._lessons:
                examples = [r.example for r in requests if r.style == request.style]
                self._lessons[key] = _kept(examples, request.style, info.work, self._learn)
            yield i, answer(request, self._lessons[key][fold_of(request.example.user_id)])


def answer(request: Request, lessons: Lessons) -> Reply:
    """The choice, the rest by score, and why."""
    example, style = request.example, request.style
    random = np.random.default_rng(request.seed)
    scores = lessons.scores(example, style)
    noise = random.gumbel(size=len(scores))
    choice = int(np.argmax(scores + request.temperature * noise))
    if request.reveal_target and example.target_index is not None:
        choice = example.target_index
    rest = sorted((i for i in range(len(scores)) if i != choice), key=lambda i: (-scores[i], i))
    reasoning = _reasoning(request, lessons, scores, choice, PHRASINGS[int(random.integers(len(PHRASINGS)))])
    return Reply(reasoning, (choice, *rest), {"backend": "features", "knowledge": str(style.knowledge).lower()})


PHRASINGS = (
    "pattern: {pattern}. next: {next}. match: {match}.",
    "taste: {pattern}. then: {next}. best: {match}.",
)
"""GR2's three steps (broad pattern, complementary or category match, final match) in as few words as a small policy
needs: each step names what the next one builds on."""


def _reasoning(request: Request, lessons: Lessons, scores: NDArray[np.float64], choice: int, phrasing: str) -> str:
    """True statements about visible features only."""
    style = request.style
    history = [see(item, style) for item in shown_history(request.example.history, style)]
    item = see(request.example.candidates[choice], style)
    brand = _usual([(seen.brand,) for seen in history])
    named = {word for seen in (*history, item) for word in f"{seen.brand} {seen.kind}".lower().split()}
    word = _usual([[w for w in seen.words if w not in named | FILLER] for seen in history])
    # As the latest title spells it: a small policy copies tokens, and case makes others of them.
    spelled = next((seen.words[word] for seen in reversed(history) if word in seen.words), "")
    band = lessons.band([seen.price for seen in history if seen.price])
    shared = [
        brand if brand and item.brand == brand else "",
        spelled if word in item.words else "",
        band if band and lessons.band([item.price] if item.price else []) == band else "",
    ]
    sid = request.surface.text(request.example.candidates[choice].sid)
    if request.example.evidence:
        return _weighed(request, lessons, scores, sid)
    return phrasing.format(
        pattern=", ".join(filter(None, [brand, spelled, band])) or "mixed",
        next=_next(history, item, lessons),
        match=", ".join([sid, *filter(None, shared)]) if any(shared) or choice else f"{sid}, listed first",
    )


def _weighed(request: Request, lessons: Lessons, scores: NDArray[np.float64], sid: str) -> str:
    """A mark for each candidate, then the choice.

    A mark follows from one line of the prompt, and the order from the marks: so a small policy need not compare ten
    lines in one step.
    """
    items = request.example.candidates
    told = [f"{request.surface.text(item.sid)}{mark}" for item, mark in zip(items, lessons.marks(scores), strict=True)]
    return f"match: {''.join(told)}. best: {sid}."


def _next(history: Sequence[Seen], item: Seen, lessons: Lessons) -> str:
    last = history[-1].kind if history else ""
    if item.kind and item.kind != last and lessons.lift(last, item.kind) > 0:
        return f"after {last} comes {item.kind}"
    if item.kind and any(seen.kind == item.kind for seen in history):
        return f"again {item.kind}"
    return item.kind or "something else"


def _usual(values: Iterable[Iterable[str]]) -> str:
    """What at least half of the items have, and two of them: the commonest such value, the earliest among equals."""
    owned = list(values)
    counts = Counter(value for own in owned for value in own if value)
    value, count = max(counts.items(), key=lambda pair: pair[1], default=("", 0))
    return value if count >= 2 and 2 * count >= len(owned) else ""


# --- keeping -------------------------------------------------------------------------------------------------------


def _kept(
    examples: Sequence[RerankExample], style: PromptStyle, work: Path | None, learn: bool = True
) -> list[Lessons]:
    """The lessons kept in `work`, or new ones, which are then kept; always as they read back."""
    if work is None:
        return fit(examples, style, learn)
    path = work / f"features-{zlib.crc32(repr(style).encode()):08x}.json"
    if not path.is_file():
        kept: list[dict[str, Any]] = [
            {
                "weights": one.weights,
                "evidence": one.evidence,
                "pairs": one.pairs,
                "bands": one.bands,
                "marked": one.marked,
            }
            for one in fit(examples, style, learn)
        ]
        work.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(kept, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    return [
        Lessons(
            tuple(one["weights"]),
            {kind: Counter(following) for kind, following in one["pairs"].items()},
            (one["bands"][0], one["bands"][1]),
            style.knowledge,
            tuple(one["evidence"]),
            tuple(one["marked"]),
        )
        for one in json.loads(path.read_text(encoding="utf-8"))
    ]

"""The one place where text for the policy and for teachers is made: prompts, answers, mid-training documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

from rerankkit.errors import ConfigError, did_you_mean
from rerankkit.text.clean import clean
from rerankkit.types import Item, RerankExample, SidSurface

FIELDS = ("title", "categories", "brand", "price")
"""What an item line can show."""

DESCRIPTION_WORDS = 30
"""Words of a description that a mid-training document shows."""


class Message(TypedDict):
    """A turn of a chat, as chat templates and servers take it."""

    role: str
    content: str


@dataclass(frozen=True)
class PromptStyle:
    """What prompts show of an item, and how much they explain."""

    fields: tuple[str, ...] = ("title", "categories")
    """Any of title, categories, brand and price, in the order of the line."""
    max_title_words: int = 12
    """Words after which a title (or brand, or one category) is cut; 0 is never."""
    max_history: int = 10
    """Items of the history that are shown: the latest."""
    knowledge: bool = True
    """Prime with sequential purchase patterns (GR2's KP / noKP switch)."""
    terse: bool = False
    """A one-line instruction, for small policies; otherwise GR2's five principles."""

    def __post_init__(self) -> None:
        for name in self.fields:
            if name not in FIELDS:
                raise ConfigError(f"fields: {name!r} cannot be shown in a prompt; {did_you_mean(name, FIELDS)}")


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a training document; `weight` multiplies the loss of its tokens, 0 makes it context only."""

    text: str
    weight: float


Document: TypeAlias = tuple[Segment, ...]
"""A training document, cut where the weight of the loss changes."""


# --- items ---------------------------------------------------------------------------------------------------------


def _categories(item: Item, style: PromptStyle) -> str:
    return " > ".join(filter(None, (clean(part, style.max_title_words) for part in item.categories)))


def _price(item: Item) -> str:
    return f"${item.price:.2f}" if item.price is not None and math.isfinite(item.price) else ""


def _field(item: Item, name: str, style: PromptStyle) -> str:
    if name == "categories":
        return _categories(item, style)
    if name == "price":
        return _price(item)
    return clean(item.title if name == "title" else item.brand, style.max_title_words)


def item_line(item: Item, surface: SidSurface, style: PromptStyle) -> str:
    """One item on one line: its SID, then the style's fields: `<sid> title; A > B; brand; $12.50`."""
    words = "; ".join(filter(None, (_field(item, name, style) for name in style.fields)))
    return f"{surface.text(item.sid)} {words}".rstrip()


def candidate_line(example: RerankExample, place: int, surface: SidSurface, style: PromptStyle) -> str:
    """A candidate on one line: its item line, the evidence about it, and last the place it is cited by, if it is.

    `<sid> title <alike_7><brand_2> <c_1>`. A causal model knows at the end of a line all that the line says, and where
    the evidence has as many tokens in every line, each fact always stands as far from there.
    """
    told = surface.told(example.evidence[place]) if example.evidence else ""
    cited = surface.names(example)[place] if surface.places else ""
    return " ".join(filter(None, [item_line(example.candidates[place], surface, style), told, cited]))


def shown_history(history: Sequence[Item], style: PromptStyle) -> Sequence[Item]:
    """The latest items, those that a prompt shows."""
    return history[max(0, len(history) - style.max_history) :]


# --- asking --------------------------------------------------------------------------------------------------------

_TERSE = "Rerank the candidates for the user."

# GR2's five principles (see docs/papers.md), in our words: role and task, collaborative context, knowledge, citing
# by SID, structured steps.
_ROLE = (
    "You are an expert in recommendation. You are given what a user bought, oldest first, and a list of candidates "
    "from an earlier system, its favourite first. Put the candidates in order of how likely the user is to buy each "
    "of them next."
)
_CONTEXT = (
    "Look at the history as a whole and at all candidates together: compare them with one another before you decide, "
    "and leave the given order where the history speaks against it."
)
_KNOWLEDGE = (
    "Use what you know about how purchases follow one another: shampoo is followed by conditioner and then by "
    "styling products, a razor by blades, a device by its refills; people stay with brands and price ranges they "
    "like, and seldom buy twice what lasts for years."
)
_CITE = "Name items by their identifier, copied exactly as given, so that each claim can be checked."
_CITE_PLACES = "Name candidates by the mark at the end of their line, such as <c_1>, so that each claim can be checked."
_STEPS = (
    "Reason in three short steps: 1. the broad pattern in the history; 2. which kinds of product complement or match "
    "it; 3. which candidate fits best, and why better than the others."
)
_FORMAT = (
    "Answer with one JSON object and nothing else, with two keys: explanation (a string with the three steps) and "
    "recommendations (a list of strings: the identifiers of all candidates, each exactly once, best first)."
)
_FORMAT_PLACES = _FORMAT.replace("the identifiers of all candidates", "the marks, such as <c_1>, of all candidates")


def _system(style: PromptStyle, surface: SidSurface) -> str:
    if style.terse:
        return _TERSE
    cite, form = (_CITE_PLACES, _FORMAT_PLACES) if surface.places else (_CITE, _FORMAT)
    return "\n".join([_ROLE, _CONTEXT, *([_KNOWLEDGE] if style.knowledge else []), cite, _STEPS, form])


def rerank_messages(example: RerankExample, surface: SidSurface, style: PromptStyle) -> list[Message]:
    """The ask: a system and a user message; history oldest first, candidates in input order, a line each."""
    lines = [
        "History:",
        *(item_line(item, surface, style) for item in shown_history(example.history, style)),
        "Candidates:",
        *(candidate_line(example, place, surface, style) for place in range(len(example.candidates))),
        "Rerank.",
    ]
    return [{"role": "system", "content": _system(style, surface)}, {"role": "user", "content": "\n".join(lines)}]


def targeted_messages(example: RerankExample, surface: SidSurface, style: PromptStyle) -> list[Message]:
    """The ask of targeted sampling: as `rerank_messages`, and the last line gives the answer away and asks why.

    Without a target among the candidates it is the plain ask.
    """
    system, user = rerank_messages(example, surface, style)
    if example.target_index is None:
        return [system, user]
    sid = surface.text(example.candidates[example.target_index].sid)
    told = (
        f"The user's next purchase was {sid}. Put it first, and explain from the history why it fits best, as if you "
        "had found it yourself: never mention that you were told."
    )
    return [system, {"role": "user", "content": f"{user['content']}\n{told}"}]


# --- answering -----------------------------------------------------------------------------------------------------

HEAD, OPENING, SEPARATOR, CLOSING = '{"explanation": "', '", "recommendations": ["', '", "', '"]}'
"""What an answer is made of besides reasoning (between the first two) and SIDs (between the others)."""


def clean_reasoning(reasoning: str, example: RerankExample, surface: SidSurface) -> str:
    """`reasoning` made safe like any untrusted text, except that SIDs of the example's own items stay as they are.

    SIDs of anything else are dropped: nobody could check them. Where candidates are cited by place, their SIDs become
    places.
    """
    names = surface.names(example)
    own = {text: text for text in (*(surface.text(item.sid) for item in example.history), *names)}
    own |= {surface.text(item.sid): name for item, name in zip(example.candidates, names, strict=True)}
    own |= {mark: mark for known in example.evidence for mark in surface.marks(surface.told(known))}
    done, rest = "", reasoning
    for cited in surface.marks(reasoning):
        before, found, after = rest.partition(cited)
        if found:  # <s_a_007> is found as 7, but 7's own text is not there: it stays in `rest`, and clean() takes it
            done, rest = _join(done, clean(before)), after
            done = _join(done, own.get(cited, ""))
    return _join(done, clean(rest))


def _join(left: str, right: str) -> str:
    """Both with a space between, unless there is nothing to part or a mark of punctuation follows."""
    return left + right if not left or not right or right[0] in ".,:!?)" else f"{left} {right}"


def answer_parts(reasoning: str, order: Sequence[int], example: RerankExample, surface: SidSurface) -> tuple[str, str]:
    """What the assistant writes, cut where the ranking begins: (reasoning part, ranking part).

    Joined they are one JSON object `{"explanation": "...", "recommendations": ["<sid>", ...]}`. The second part starts
    at the quote that closes the explanation, so the `recommendations` key weighs as ranking.
    """
    names = surface.names(example)
    ranking = SEPARATOR.join(names[i] for i in order)
    return HEAD + clean_reasoning(reasoning, example, surface), OPENING + ranking + CLOSING


# --- mid-training --------------------------------------------------------------------------------------------------


def sequence_prompt(history: Sequence[Item], surface: SidSurface, style: PromptStyle) -> str:
    """The history as bare SIDs; what comes next is the next item's SID. Scores candidates: log P(SID | history)."""
    return "History: " + "".join(surface.text(item.sid) for item in shown_history(history, style))


def sequence_document(
    history: Sequence[Item], target: Item, surface: SidSurface, style: PromptStyle, history_weight: float = 0.0
) -> Document:
    """Sequential preference: history SIDs, then the next one, which carries the loss.

    With `history_weight` the SIDs of the history (from the second on) are learned as well: every item is then the
    next one of those before it, at no further cost in tokens.
    """
    context = sequence_prompt(history, surface, style)
    goal = Segment(surface.text(target.sid), 1.0)
    if not history_weight or len(shown := shown_history(history, style)) < 2:
        return (Segment(context, 0.0), goal)
    first = sequence_prompt(shown[:1], surface, style)
    return (Segment(first, 0.0), Segment(context[len(first) :], history_weight), goal)


def _named_fields(item: Item, style: PromptStyle) -> list[str]:
    names = {"title": "Title", "categories": "Categories", "brand": "Brand", "price": "Price"}
    return [f"{names[name]}: {text}" for name in style.fields if (text := _field(item, name, style))]


def caption_document(item: Item, surface: SidSurface, style: PromptStyle) -> Document:
    """Dense captioning: the SID as context, then what the item is: `Title: ..; Categories: A > B; Description: ..`."""
    description = clean(item.description, DESCRIPTION_WORDS)
    told = "; ".join([*_named_fields(item, style), *([f"Description: {description}"] if description else [])])
    return (Segment(surface.text(item.sid), 0.0), Segment(f" {told}", 1.0))


def persona_document(history: Sequence[Item], surface: SidSurface, style: PromptStyle) -> Document:
    """User persona: the history's SIDs interleaved with words about them; all of it carries the loss."""

    def about(item: Item) -> str:
        names = {"title": "title is", "categories": "categories are", "brand": "brand is", "price": "price is"}
        told = [f'its {names[name]} "{text}"' for name in style.fields if (text := _field(item, name, style))]
        return ", ".join([surface.text(item.sid), *told])

    return (Segment("The user bought " + "; ".join(map(about, shown_history(history, style))) + ".", 1.0),)


def language_document(item: Item, style: PromptStyle) -> Document:
    """General language modelling: the item's own words, without SIDs."""
    description = clean(item.description, DESCRIPTION_WORDS)
    words = [text for name in style.fields if (text := _field(item, name, style))]
    return (Segment("; ".join([*words, *([description] if description else [])]), 1.0),)

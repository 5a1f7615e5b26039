"""Made records: small, plain, the same on every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rerankkit.text.answers import parse_answer
from rerankkit.text.prompts import Message, answer_parts, caption_document, rerank_messages
from rerankkit.types import Catalog, Item, RerankExample, Rollout, RunInfo, SidSurface

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.lm import Policy
    from rerankkit.stages.sids import SidMap

CODES = 8
"""Codes at each of the three levels of made SIDs."""
_KINDS = ("Shampoo", "Conditioner", "Mask", "Gel", "Cleanser", "Toner", "Serum", "Cream")
_BRANDS = ("Norda", "Velis", "Amaro")


def make_item(number: int = 0, *, title: str = "", brand: str = "", price: float | None = None) -> Item:
    """Item `number` of a made shop, with a SID of three codes that no other number below 512 has."""
    kind, maker = _KINDS[number % len(_KINDS)], brand or _BRANDS[number % len(_BRANDS)]
    return Item(
        item_id=f"item{number}",
        title=title or f"{maker} {kind} {number}",
        categories=("Care", kind),
        brand=maker,
        price=price if price is not None else 4.0 + number % 20,
        sid=(number // CODES**2 % CODES, number // CODES % CODES, number % CODES),
    )


def make_example(
    target: int | None = 3,
    *,
    num_candidates: int = 10,
    num_history: int = 3,
    relevance: Sequence[float] | None = None,
    example_id: str = "",
) -> RerankExample:
    """One ask. The candidate in place `target` is relevant, none if None; `relevance` gives grades of your own.

    Candidates are items 0, 1, ...; the history is other items. Raises ValueError for a target outside the list.
    """
    if relevance is None:
        if target is not None and not 0 <= target < num_candidates:
            raise ValueError(f"target {target} is not a place in a list of {num_candidates}")
        relevance = [float(place == target) for place in range(num_candidates)]
    return RerankExample(
        example_id=example_id or f"user{target}/{num_history}",
        user_id=f"user{target}",
        history=tuple(make_item(200 + number) for number in range(num_history)),
        candidates=tuple(make_item(number) for number in range(len(relevance))),
        relevance=tuple(relevance),
    )


def make_rollout(
    example: RerankExample,
    order: Sequence[int] | None = None,
    *,
    reasoning: str = "Brand and kind fit best.",
    text: str | None = None,
    num_tokens: int = 60,
    group: int = 0,
    truncated: bool = False,
) -> Rollout:
    """A completion that puts the candidates in `order` (default: as given), read by the parser that a run uses.

    `text` is what the policy wrote, where an answer should be unusual: `text="no idea"` cannot be read. Token ids are
    made up, `num_tokens` of them, the first half reasoning.
    """
    if text is None:
        places = range(len(example.candidates)) if order is None else order
        text = "".join(answer_parts(reasoning, places, example, SidSurface()))
    answer = parse_answer(text, example, SidSurface())
    return Rollout(
        example=example,
        text=text,
        reasoning=answer.reasoning,
        ranking=answer.ranking,
        token_ids=tuple(range(num_tokens)),
        logps=(-1.0,) * num_tokens,
        num_reasoning_tokens=num_tokens // 2,
        group=group,
        truncated=truncated,
    )


def make_catalog(num_items: int = 48, *, dim: int = 8, seed: int = 0) -> Catalog:
    """Items with random vectors of unit length [num_items, dim], `collaborative` ones too, and pairs of neighbours."""
    import numpy as np

    rng = np.random.default_rng(seed)
    vectors, collaborative = (rng.standard_normal((num_items, width)).astype(np.float32) for width in (dim, 64))
    pairs = np.stack([np.arange(num_items - 1), np.arange(1, num_items)], axis=1)
    items = tuple(
        Item(i.item_id, i.title, i.categories, brand=i.brand, price=i.price) for i in map(make_item, range(num_items))
    )
    for matrix in (vectors, collaborative):
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return Catalog(items, vectors, pairs.astype(np.int64), {"collaborative": collaborative})


def make_policy(*, seed: int = 0) -> Policy:
    """A language model of a few thousand random weights that can read and write made SIDs. Imports torch."""
    from rerankkit.lm import scratch_policy
    from rerankkit.text.prompts import PromptStyle

    style = PromptStyle(fields=("title",), max_title_words=4, max_history=3, terse=True)
    surface, example = SidSurface(), make_example()
    asks: list[Message] = rerank_messages(example, SidSurface(begin="", end=""), style)
    told = [segment.text for item in example.candidates for segment in caption_document(item, surface, style)]
    policy = scratch_policy(
        [*told, *(message["content"] for message in asks)],
        seed=seed,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        vocab_size=400,
        max_positions=1024,
    )
    policy.style = style
    policy.extend((CODES,) * 3, surface, seed)
    return policy


@dataclass(frozen=True)
class MadeWorld:
    """The shipped world in small: what a run would hand to its parts."""

    dataset: Dataset
    sids: SidMap
    catalog: Catalog
    """What a tokenizer is fitted on."""
    lists: CandidateLists

    def examples(self, split: Literal["train", "valid", "test"] = "train") -> list[RerankExample]:
        """Lists of the split whose target is among the candidates."""
        return self.lists.examples(self.sids.attach(self.dataset.items), split)


def make_world(num_users: int = 60, *, list_size: int = 10, seed: int = 0) -> MadeWorld:
    """A few customers of the shipped world, with SIDs of two codes and nearest-neighbour lists; under a second.

    No policy and no torch: for parts that want to see what customers really do.
    """
    from rerankkit.config import Embeddings, KnnLists, WorldData
    from rerankkit.stages.candidates import make_candidates
    from rerankkit.stages.data import make_dataset
    from rerankkit.stages.sids import SidMap
    from rerankkit.stages.sids import make_catalog as catalog_of

    info = RunInfo(seed=seed)
    dataset = make_dataset(WorldData(num_users=num_users), {}, info=info)
    sizes = (16, -(-len(dataset.items) // 16))
    sids = SidMap({item.item_id: divmod(n, sizes[1]) for n, item in enumerate(dataset.items)}, sizes, {})
    catalog = catalog_of(Embeddings(dim=16), dataset, info)
    lists = make_candidates(KnnLists(size=list_size, tune=False), 6, {}, dataset, None, None, info=info)
    return MadeWorld(dataset, sids, catalog, lists)

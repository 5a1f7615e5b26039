"""Made examples and rollouts for GR2's parts."""

from __future__ import annotations

from collections.abc import Sequence

from rerankkit.types import Item, Parse, Ranking, RerankExample, Rollout


def example(relevance: Sequence[float], example_id: str = "e1") -> RerankExample:
    """Candidates c0, c1, ... with these relevances, and one item of history."""
    items = [Item(f"c{i}", f"Candidate {i}", ("Hair", f"Kind{i}"), sid=(0, i)) for i in range(len(relevance))]
    history = (Item("h0", "Bought", ("Hair", "Comb"), sid=(1, 0)),)
    return RerankExample(example_id, f"user of {example_id}", history, tuple(items), tuple(relevance))


def rollout(relevance: Sequence[float], order: Sequence[int], parse: Parse = Parse.OK) -> Rollout:
    """A completion that was read as this order."""
    return Rollout(example(relevance), "text", "why", Ranking(tuple(order), parse))

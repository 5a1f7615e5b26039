"""The two ways to get rationales: a sentence from a template, and the aligned policy's own."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rerankkit import Item, RerankExample, RunInfo, Trace, TraceFailure
from rerankkit.lm import Policy
from rerankkit.text.prompts import targeted_messages

from rerankkit_onerec_think.parts import SelfRationaleConfig
from rerankkit_onerec_think.thoughts import best_first, scores_after, think

_NO_TARGET = "no candidate is relevant: there is nothing to teach"
_BATCH = 16


@dataclass(frozen=True)
class Template:
    """Names the category path of the target, which goes first; the rest stays as given."""

    def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
        """A trace or a failure for each example."""
        for example in info.progress(examples, total=len(examples), what="teacher"):
            target = example.target_index
            if target is None:
                yield TraceFailure(example.example_id, _NO_TARGET, 0)
            elif not example.candidates[target].categories:
                yield TraceFailure(example.example_id, "the target has no category to name")
            else:
                path = " / ".join(example.candidates[target].categories)
                reasoning = f"After these purchases the user is likely to want something from {path}."
                yield Trace(example.example_id, reasoning, _target_first(example, target), {"strategy": "template"})


@dataclass(frozen=True)
class SelfRationale:
    """Asks the policy why the target fits a history cut to what is like it; the trace is about the whole history."""

    config: SelfRationaleConfig

    def write(self, examples: Sequence[RerankExample], info: RunInfo) -> Iterator[Trace | TraceFailure]:
        """A trace or a failure for each example; raises UsageError if `config.policy` is no policy."""
        listed = []
        for example in examples:
            if example.target_index is None:
                yield TraceFailure(example.example_id, _NO_TARGET, 0)
            else:
                listed.append(example)
        policy = Policy.load(Path(self.config.policy), device=info.device)
        starts = range(0, len(listed), _BATCH)
        for start in info.progress(starts, total=len(starts), what="teacher"):
            yield from self._batch(policy, listed[start : start + _BATCH], info)

    def _batch(
        self, policy: Policy, examples: Sequence[RerankExample], info: RunInfo
    ) -> Iterator[Trace | TraceFailure]:
        c = self.config
        shown = [pruned(example, c.top_k) for example in examples]
        groups = think(
            policy,
            shown,
            [policy.prompt_ids(targeted_messages(one, policy.surface, policy.style)) for one in shown],
            c.samples,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            info=info,
            salt="rationale",
        )
        thoughts = [(example, t) for example, group in zip(examples, groups, strict=True) for t in group]
        hits = [True] * len(thoughts)
        if c.beams:  # judged with the history as the policy will see it: whole, and without the answer
            scores = scores_after(policy, [e for e, _ in thoughts], [[t.token_ids] for _, t in thoughts], "max")
            order = map(best_first, scores)
            hits = [e.target_index in best[: c.beams] for (e, _), best in zip(thoughts, order, strict=True)]
        about = {"strategy": "self-rationale", "policy": c.policy, "preset": c.preset}
        for example in examples:
            own = [(t.text, hit) for (e, t), hit in zip(thoughts, hits, strict=True) if e is example and t.text.strip()]
            kept = [text for text, hit in own if hit]
            if kept and example.target_index is not None:
                yield Trace(example.example_id, kept[0], _target_first(example, example.target_index), about)
            else:
                reason = f"the target is not among the best {c.beams} after it" if own else "no rationale was written"
                yield TraceFailure(example.example_id, reason, c.samples)


def pruned(example: RerankExample, top_k: int) -> RerankExample:
    """With the `top_k` items of the history that are nearest to the target, oldest first as before."""
    if example.target_index is None:
        return example
    target = _words(example.candidates[example.target_index])
    likeness = [_cosine(_words(item), target) for item in example.history]
    # of equals the later: it is what the user does now
    nearest = sorted(range(len(likeness)), key=lambda i: (-likeness[i], -i))[:top_k]
    return replace(example, history=tuple(example.history[i] for i in sorted(nearest)))


def _words(item: Item) -> Counter[str]:
    return Counter(re.findall(r"\w+", " ".join([item.title, *item.categories, item.brand]).lower()))


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    lengths = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return sum(count * b[word] for word, count in a.items()) / lengths if lengths else 0.0


def _target_first(example: RerankExample, target: int) -> tuple[int, ...]:
    return (target, *(i for i in range(len(example.candidates)) if i != target))

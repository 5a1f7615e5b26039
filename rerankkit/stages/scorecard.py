"""The scorecard of a catalogue's semantic IDs, for any tokenizer, and the gate that it must pass."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerankkit.errors import RunFailed, RunFolderError
from rerankkit.protocols import Tokenizer
from rerankkit.stages.wording import percent, plain, uniqueness
from rerankkit.store import FAILED_SIDS, is_run_folder, read_json
from rerankkit.text.clean import clean
from rerankkit.types import Catalog, Item

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


NEIGHBOURS, ASKED = 10, 2000
"""Nearest neighbours that are looked for, and items that are asked for theirs."""
CATEGORY_LEVELS = 4
"""Levels of category paths that purity is measured on, from the broadest."""
COLLISIONS, TITLES = 10, 4
"""Examples of shared SIDs, and of the titles that share one."""
CODES, CODES_INSIDE = 12, 5
"""Biggest first-level codes in the tree, and biggest second-level codes inside each."""
WORDS, TITLES_READ = 4, 1000
"""Telling words a code gets, and titles of a code that are read for them."""
WORD_SCORE, WORD_SHARE = 2.0, 0.1
"""A telling word is at least this many standard errors likelier inside, and in this share of the titles."""


def make_scorecard(
    codes: NDArray[np.int64], sizes: Sequence[int], catalog: Catalog, tokenizer: Tokenizer | None = None, *, seed: int
) -> dict[str, Any]:
    """All that is known about how good the SIDs `codes` [N, L] of a catalogue are: plain JSON values.

    Beside `math.sids.SidScorecard`'s keys: `collisions` (examples by title), `equal` (items nothing can tell apart),
    `neighbours`, `inside` (variance left inside prefixes), `purity`, `tree`, `reconstruction_error` and `account`
    (what the tokenizer tells itself). What cannot be measured is None. Titles and words are cleaned, but not escaped.
    Memory beyond the catalogue's: a few hundred bytes an item, and chunks.
    """
    import numpy as np

    from rerankkit.math.sids import prefix_groups, sid_scorecard, spread_inside

    groups = prefix_groups(codes)
    paths = _category_labels(catalog.items)
    return {
        **sid_scorecard(codes, sizes),
        "collisions": _collisions(codes, groups[-1], catalog.items),
        "equal": _equal(catalog),
        "neighbours": _neighbours(groups, catalog.embeddings, np.random.default_rng(seed)),
        "inside": plain(spread_inside(catalog.embeddings, groups)),
        "purity": _purity(groups, paths, np.random.default_rng(seed)),
        "tree": _tree(codes, groups, catalog.items, paths, np.random.default_rng(seed)),
        "reconstruction_error": _reconstruction_error(tokenizer, codes, catalog),
        "account": _account(tokenizer),
    }


def load_scorecard(run: Path) -> dict[str, Any]:
    """The scorecard of a run folder's latest SIDs, kept or stopped by the gate, or in `run` itself.

    Where only codes were counted, without vectors and titles, what is missing is empty or None. Raises RunFolderError.
    """
    places = [run / FAILED_SIDS[0], *(run / "stages").glob("[0-9]*-sids/scorecard.json")]
    for place in places:
        if place.exists():
            card = read_json(place)
            if "own_share" not in card or "depths" not in card:
                raise RunFolderError(f"{place} is damaged; do the sids stage again.")
            return {**_UNMEASURED, **card}
    if not is_run_folder(run):
        raise RunFolderError(f"{run} is not a run folder. `rerankkit run CONFIG --out {run}` makes one.")
    raise RunFolderError(f"{run} has no SIDs yet; `rerankkit run {run / 'config.json'} --until sids` draws them.")


_UNMEASURED: Mapping[str, Any] = {
    **dict.fromkeys(("equal", "neighbours", "inside", "reconstruction_error")),
    **{"collisions": [], "purity": [], "tree": [], "account": {}},
}


def scorecard_headline(card: Mapping[str, Any]) -> str:
    """The one sentence that stands first."""
    if card["own_share"] == 1:
        return f"all {card['num_items']:,} items have a SID of their own"
    return f"{uniqueness(card['own_share'])} of {card['num_items']:,} items have a SID of their own"


def scorecard_shape(card: Mapping[str, Any]) -> str:
    """`4 levels of 256 codes`."""
    sizes = [level["size"] for level in card["levels"]]
    if len(set(sizes)) == 1:
        return f"{len(sizes)} {'level' if len(sizes) == 1 else 'levels'} of {sizes[0]:,} codes"
    return f"levels of {', '.join(f'{size:,}' for size in sizes)} codes"


def scorecard_facts(card: Mapping[str, Any]) -> dict[str, Any]:
    """The scorecard's single numbers, label -> value, for small tables."""
    facts: dict[str, Any] = {
        "items": card["num_items"],
        "distinct SIDs / items": uniqueness(card["distinct_share"]),
        "items with a SID of their own": uniqueness(card["own_share"]),
        "most items on one SID": card["largest_collision"],
    }
    if equal := card["equal"]:
        facts["items that share their vector"] = equal["vectors"]
        if equal["vectors"]:
            facts["distinct SIDs / items from vectors alone, at most"] = uniqueness(equal["best_distinct_share"])
        if equal["texts"]:
            facts["items that share their text"] = equal["texts"]
    if found := card["neighbours"]:
        facts[f"{found['k']} nearest neighbours kept by SID"] = (
            f"{percent(found['recall'])} (chance {percent(found['chance'])})"
        )
    if card["reconstruction_error"] is not None:
        facts["reconstruction error / variance"] = round(card["reconstruction_error"], 4)
    return facts


def _collisions(codes: NDArray[np.int64], groups: NDArray[np.int64], items: Sequence[Item]) -> list[dict[str, Any]]:
    import numpy as np

    counts = np.bincount(groups)
    crowded = np.argsort(-counts, kind="stable")[:COLLISIONS]
    found = []
    for group in crowded[counts[crowded] > 1]:
        rows = np.flatnonzero(groups == group)
        titles = [_title(items[row]) for row in rows[:TITLES]]
        found.append({"sid": codes[rows[0]].tolist(), "num_items": int(counts[group]), "titles": titles})
    return found


def _equal(catalog: Catalog) -> dict[str, Any]:
    import numpy as np

    from rerankkit.data.embed import item_text
    from rerankkit.math.sids import equal_rows

    # As `data.embed.equal_texts` compares them, without holding a million of them.
    texts = (hash(" ".join(item_text(item).lower().split())) for item in catalog.items)
    _, alike = np.unique(np.fromiter(texts, dtype=np.int64, count=len(catalog.items)), return_counts=True)
    _, holders = np.unique(equal_rows(catalog.embeddings), return_counts=True)
    num_items = len(catalog.items)
    own = int((holders == 1).sum())
    return {
        "texts": int(alike[alike > 1].sum()),
        "vectors": num_items - own,
        "best_distinct_share": len(holders) / num_items,
        "best_own_share": own / num_items,
    }


def _neighbours(
    groups: NDArray[np.int64], points: NDArray[np.float32], rng: np.random.Generator
) -> dict[str, Any] | None:
    """Recall of embedding neighbours by SID, over a sample; None where there are no neighbours."""
    import numpy as np

    from rerankkit.math.sids import nearest_rows, neighbour_recall

    k = min(NEIGHBOURS, len(points) - 1)
    queries = np.flatnonzero(points.any(axis=1))  # a zero vector has no direction, and so no neighbours
    if k < 1 or not len(queries):
        return None
    if len(queries) > ASKED:
        queries = np.sort(rng.choice(queries, ASKED, replace=False))
    recall = neighbour_recall(groups, queries, nearest_rows(points, queries, k))
    return {"k": k, "asked": len(queries), "recall": float(recall.mean()), "chance": k / (len(points) - 1)}


def _category_labels(items: Sequence[Item]) -> list[NDArray[np.int64]]:
    """For each category level a label [N], the same for the same path down to there; -1 where a path is shorter."""
    import numpy as np

    depth = min(CATEGORY_LEVELS, max((len(item.categories) for item in items), default=0))
    labels = []
    for level in range(1, depth + 1):
        known: dict[tuple[str, ...], int] = {}
        rows = (
            known.setdefault(item.categories[:level], len(known)) if len(item.categories) >= level else -1
            for item in items
        )
        labels.append(np.fromiter(rows, dtype=np.int64, count=len(items)))
    return labels


def _purity(
    groups: NDArray[np.int64], paths: Sequence[NDArray[np.int64]], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """For each category level how pure prefixes of length 1..L are, and as many, as large prefixes of other items."""
    from rerankkit.math.sids import purity

    found = []
    for level, labels in enumerate(paths, start=1):
        has = labels >= 0
        inside, own = groups[:, has], labels[has]
        shuffled = rng.permutation(own)
        found.append(
            {
                "level": level,
                "categories": int(own.max()) + 1,
                "num_items": len(own),
                "without": len(labels) - len(own),
                "purity": [purity(row, own) for row in inside],
                "chance": [purity(row, shuffled) for row in inside],
            }
        )
    return found


def _tree(
    codes: NDArray[np.int64],
    groups: NDArray[np.int64],
    items: Sequence[Item],
    paths: Sequence[NDArray[np.int64]],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """What the biggest first-level codes mean, and what the biggest second-level codes inside them do."""
    import numpy as np

    everything = _some(np.arange(len(items)), rng, 20 * TITLES_READ)
    words_of = {row: _words(items[row].title) for row in everything.tolist()}

    def node(rows: NDArray[np.int64], depth: int, rest: NDArray[np.int64]) -> dict[str, Any]:
        read = _some(rows, rng, TITLES_READ)
        words_of.update({row: _words(items[row].title) for row in read.tolist() if row not in words_of})
        others = rest[groups[depth - 1, rest] != groups[depth - 1, rows[0]]]
        category, share = _commonest_category(rows, items, paths)
        found = {
            "codes": codes[rows[0], :depth].tolist(),
            "num_items": len(rows),
            "category": category,
            "category_share": share,
            "words": _telling([words_of[row] for row in read.tolist()], [words_of[row] for row in others.tolist()]),
            "titles": [_title(items[row]) for row in _some(rows, rng, TITLES).tolist()],
            "inside": [],
        }
        if depth == 1 and len(groups) > 1:
            found["inside"] = [node(members, 2, read) for members in _biggest(rows, groups[1], CODES_INSIDE)]
        return found

    return [node(rows, 1, everything) for rows in _biggest(np.arange(len(items)), groups[0], CODES)]


def _biggest(rows: NDArray[np.int64], groups: NDArray[np.int64], count: int) -> Iterator[NDArray[np.int64]]:
    """Of the items `rows`, those of each of the `count` biggest groups that have more than one, biggest first."""
    import numpy as np

    numbers, counts = np.unique(groups[rows], return_counts=True)
    chosen = np.argsort(-counts, kind="stable")[:count]
    yield from (rows[groups[rows] == number] for number in numbers[chosen[counts[chosen] > 1]])


def _commonest_category(
    rows: NDArray[np.int64], items: Sequence[Item], paths: Sequence[NDArray[np.int64]]
) -> tuple[list[str], float | None]:
    """The narrowest category path that half of these items with a category share, else the commonest broad one."""
    import numpy as np

    best: tuple[list[str], float | None] = ([], None)
    num_with = int((paths[0][rows] >= 0).sum()) if paths else 0
    for level, labels in enumerate(paths, start=1):
        own = labels[rows]
        if not (own >= 0).any():
            break
        counts = np.bincount(own[own >= 0])
        share = float(counts.max() / num_with)
        if level > 1 and share < 0.5:
            break
        example = items[int(rows[(own == counts.argmax()).argmax()])]
        best = ([clean(name, 8) for name in example.categories[:level]], share)
    return best


def _telling(inside: Sequence[tuple[str, ...]], outside: Sequence[tuple[str, ...]]) -> list[str]:
    """The words that tell these titles from the others best, at most `WORDS`."""
    import numpy as np

    from rerankkit.math.sids import log_odds

    here, there = Counter(_each(inside)), Counter(_each(outside))
    words = sorted(word for word, count in here.items() if count >= max(2, WORD_SHARE * len(inside)))
    if not words or not outside:
        return []
    counts = (np.array([counter[word] for word in words]) for counter in (here, there))
    scores = log_odds(next(counts), len(inside), next(counts), len(outside))
    best = np.argsort(-scores, kind="stable")[:WORDS]
    return [words[i] for i in best if scores[i] >= WORD_SCORE]


def _each(titles: Iterable[tuple[str, ...]]) -> Iterator[str]:
    return (word for words in titles for word in words)


def _words(title: str) -> tuple[str, ...]:
    """Its different words of three letters and more; the strings are shared, as many titles are held."""
    return tuple(dict.fromkeys(map(sys.intern, re.findall(r"[^\W\d_][\w'-]+\w", clean(title).lower()))))


def _title(item: Item) -> str:
    return clean(item.title, 12) or "untitled"


def _some(rows: NDArray[np.int64], rng: np.random.Generator, most: int) -> NDArray[np.int64]:
    """The rows, or a sample of `most` of them, in their order."""
    import numpy as np

    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def _reconstruction_error(tokenizer: Tokenizer | None, codes: NDArray[np.int64], catalog: Catalog) -> float | None:
    """sum |x - x^|^2 / sum |x - mean|^2; None for a tokenizer that does not reconstruct, or if nothing varies."""
    import numpy as np

    from rerankkit.math.sids import CHUNK, squared_error

    reconstruct = getattr(tokenizer, "reconstruct", None)
    if reconstruct is None:
        return None

    def others() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(codes), CHUNK):
            rows = codes[start : start + CHUNK]
            found = np.asarray(reconstruct(rows))
            expected = (len(rows), catalog.embeddings.shape[1])
            if found.shape != expected or not np.isfinite(found).all():
                raise RunFailed(
                    f"tokenizer: reconstruct gave {found.dtype} {list(found.shape)} for codes {list(rows.shape)}; "
                    f"expected finite numbers {list(expected)}. Its plugin is at fault."
                )
            yield found

    error, total = squared_error(catalog.embeddings, others())
    return error / total if total > 0 else None


def _account(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What the tokenizer tells about itself, in plain values."""
    facts = getattr(tokenizer, "facts", None)
    account: dict[str, Any] = plain(dict(facts())) if facts is not None else {}
    return {clean(name, 12): clean(value, 40) if isinstance(value, str) else value for name, value in account.items()}

"""What a run has to beat: simple and boosted rankers on the very lists of a finished run.

    pip install lightgbm
    python benchmarks/bars.py RUN [--valid]

Everything is fitted on the run's training lists and judged on its test lists (with --valid: its validation lists):

    as given           the pre-ranker's order
    rank + similarity  a conditional logit of log place and the evidence `alike`: two parameters
    rank + text        a gradient-boosted listwise ranker (LambdaMART) over what a language model sees of items: place,
                       how alike texts are, brands, categories, prices; no interaction
    rank + evidence    the same ranker over exactly the evidence that the run's prompts show
    everything         both together

and, if the run is finished, its own systems beside them, with paired bootstrap 95% intervals over the same users
against the given order, against `rank + text` and `rank + evidence`, and against its own fine-tuning.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rerankkit.data.dataset import Dataset
from rerankkit.data.evidence import LATEST, Evidence
from rerankkit.data.lists import CandidateList, CandidateLists
from rerankkit.math.metrics import ranking_metrics
from rerankkit.math.statistics import paired_bootstrap
from rerankkit.stages.compare import load_rankings

SHOWN = ("R@1", "R@5", "NDCG@5")
FACTS = ("alike", "last", "together", "brand", "kind", "beside", "follows", "taste")


def main(run: Path, split: str) -> None:
    stages = {folder.name.split("-", 1)[1]: folder for folder in sorted((run / "stages").iterdir())}
    dataset, lists = Dataset.load(stages["data"]), CandidateLists.load(stages["candidates"])
    shown = json.loads((run / "config.json").read_text())["policy"]["prompt"]["evidence"]
    listed = [one for one in lists if any(one.relevance)]
    facts = Evidence(dataset, FACTS).attached(CandidateLists(tuple(listed)))
    fitted = [one for one in facts if one.split == "train"]
    asked = [one for one in facts if one.split == split]
    places = [evidence_columns(some, ()) for some in (fitted, asked)]
    told = [evidence_columns(some, shown) for some in (fitted, asked)]
    texts = [text_columns(some, dataset, Evidence(dataset, FACTS)) for some in (fitted, asked)]
    target = np.array([np.argmax(one.relevance) for one in fitted])
    similar = [evidence_columns(some, ("alike",)) for some in (fitted, asked)]
    both = [np.concatenate(pair, axis=2) for pair in zip(texts, told, strict=True)]
    systems = {
        "as given": -places[1][:, :, 0],
        "rank + similarity": logit(similar[0], target, similar[1]),
        "rank + text": boosted(texts[0], target, texts[1]),
        **({"rank + evidence": boosted(told[0], target, told[1])} if shown else {}),
        "everything": boosted(both[0], target, both[1]),
    }
    scored = {name: metrics(asked, np.argsort(-scores, axis=1, kind="stable")) for name, scores in systems.items()}
    if split == "test" and (run / "rankings.parquet").is_file():
        for name, users in load_rankings(run / "rankings.parquet").items():
            orders = {user.example_id: user.ranking.order for user in users}
            scored[name] = metrics(asked, np.array([orders[one.example_id] for one in asked]))
    against = [name for name in ("as given", "rank + text", "rank + evidence", "sft") if name in scored]
    print(f"{run}, {split}: n = {len(asked):,}; fitted on {len(fitted):,} training lists")
    print("| system | " + " | ".join(SHOWN) + " | " + " | ".join(f"NDCG@5 over {name}" for name in against) + " |")
    print("| --- " * (1 + len(SHOWN) + len(against)) + "|")
    for name, values in scored.items():
        means = [f"{values[metric].mean():.3f}"[1:] for metric in SHOWN]
        differences = []
        for other in against:
            found = paired_bootstrap(values["NDCG@5"], scored[other]["NDCG@5"])
            numbers = f"{100 * found.difference:+.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
            differences.append("" if other == name else numbers)
        print(f"| {name} | " + " | ".join([*means, *differences]) + " |")


def metrics(asked: Sequence[CandidateList], orders: NDArray[np.int64]) -> Mapping[str, NDArray[np.float64]]:
    return ranking_metrics([[one.relevance[i] for i in order] for one, order in zip(asked, orders, strict=True)])


def evidence_columns(some: Sequence[CandidateList], names: Sequence[str]) -> NDArray[np.float64]:
    """[N, C, 1 + F]: place, then the named facts."""
    return np.array([[[place, *(f[n] for n in names)] for place, f in enumerate(one.evidence)] for one in some], float)


def text_columns(some: Sequence[CandidateList], dataset: Dataset, evidence: Evidence) -> NDArray[np.float64]:
    """[N, C, F] from place and the items' own texts, brands, categories and prices alone."""
    texts, rows, items = evidence._texts, dataset.item_rows, dataset.items
    found = []
    for one in some:
        history, candidates = [rows[i] for i in one.history], [rows[i] for i in one.candidates]
        cosine = (texts[candidates] @ texts[history].T).toarray()  # [C, H]
        usual = np.median([items[h].price or np.nan for h in history]) if history else np.nan
        for_list = []
        for place, (candidate, row) in enumerate(zip(candidates, cosine, strict=True)):
            item = items[candidate]
            brands = [float(bool(item.brand) and items[h].brand.casefold() == item.brand.casefold()) for h in history]
            kinds = [sum(a == b for a, b in zip(items[h].categories, item.categories, strict=False)) for h in history]
            price = abs(np.log(item.price / usual)) if item.price and usual and usual > 0 else np.nan
            alike = [row[-1], row.max(), row.mean(), row[-LATEST:].max()]
            brand = [brands[-1], np.mean(brands), np.mean(brands[-LATEST:])]
            kind = [kinds[-1], np.mean(kinds), max(kinds[-LATEST:])]
            for_list.append([place, *alike, *brand, *kind, price, len(history)])
        found.append(for_list)
    return np.array(found, float)


def logit(fitted: NDArray[np.float64], target: NDArray[np.int64], asked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores [N, C] of a conditional logit of log(1 + place) and the other columns."""
    from scipy.optimize import minimize

    def columns(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([-np.log1p(x[:, :, :1]), x[:, :, 1:]], axis=2)

    x = columns(fitted)
    x = x - x[np.arange(len(x)), target][:, None]
    found = minimize(lambda w: np.logaddexp.reduce(x @ w, axis=1).mean(), np.zeros(x.shape[2])).x
    scores: NDArray[np.float64] = columns(asked) @ found
    return scores


def boosted(fitted: NDArray[np.float64], target: NDArray[np.int64], asked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores [N, C]: the sum of five LambdaMART rankers that differ in their seed."""
    from lightgbm import LGBMRanker

    size, width = fitted.shape[1:]
    relevance = (np.arange(size) == target[:, None]).astype(int).ravel()
    total = np.zeros(asked.shape[:2])
    for seed in range(5):
        ranker = LGBMRanker(
            n_estimators=150, learning_rate=0.04, num_leaves=8, min_child_samples=40, subsample=0.7, subsample_freq=1,
            colsample_bytree=0.7, random_state=seed, verbose=-1, n_jobs=1,
        )  # fmt: skip
        ranker.fit(fitted.reshape(-1, width), relevance, group=[size] * len(fitted))
        total += ranker.predict(asked.reshape(-1, width)).reshape(total.shape)
    return total


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--valid"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    main(Path(arguments[0]), "valid" if "--valid" in sys.argv else "test")

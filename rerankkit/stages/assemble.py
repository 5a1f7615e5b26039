"""The end of a run: every system's rankings gathered into `report.json`, `report.md` and `report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rerankkit.config import KnnLists, PolicyLists, PopularityLists, RunConfig, WorldData
from rerankkit.errors import RunFailed
from rerankkit.stages.compare import save_rankings
from rerankkit.stages.report import bias_findings, build_report, choose_examples, example_card, summarise, write_report
from rerankkit.stages.scorecard import scorecard_facts
from rerankkit.stages.watch import watch_facts
from rerankkit.stages.wording import plain
from rerankkit.store import Artifact, RunFolder, manifest, read_metrics, write_json
from rerankkit.types import Ranking, RerankExample

if TYPE_CHECKING:
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.stages.exported import ExportedRankings
    from rerankkit.stages.gate import Exported
    from rerankkit.stages.rankings import Rankings
    from rerankkit.stages.sids import SidMap
    from rerankkit.stages.traces import Traces


def report_run(
    folder: RunFolder,
    data: Artifact[Dataset],
    sids: Artifact[SidMap],
    lists: Artifact[CandidateLists],
    traces: Artifact[Traces],
    ranked: Mapping[str, Artifact[Rankings]],
    gate: Artifact[Exported],
    exported: Artifact[ExportedRankings],
) -> dict[str, Any]:
    """Write the three reports, the rankings behind them and the TREC files; returns what report.json holds."""
    config, dataset, sid_map, candidates = folder.config, data.load(), sids.load(), lists.load()
    examples = candidates.examples(sid_map.attach(dataset.items), "test", only_with_target=True)
    if not examples:
        raise RunFailed("evaluate: no test list holds its target, so nothing can be measured; widen candidates.size.")
    answers = {name: artifact.load() for name, artifact in ranked.items()}
    chosen = exported.load()
    if chosen.name not in answers:
        answers[chosen.name] = chosen.rankings
    if chosen.no_reasoning is not None:
        answers["no-reasoning"] = chosen.no_reasoning
    systems = {name: [a.rankings[e.example_id] for e in examples] for name, a in answers.items()}
    if isinstance(config.data, WorldData):
        systems["ceiling"] = best_possible(config.data, examples)
    samples = config.evaluate.bootstrap_samples
    num_users = len(candidates.of("test"))
    summary = summarise(examples, systems, num_users=num_users, seed=config.seed, samples=samples, exported=chosen.name)
    written = traces.load()
    record = manifest(config)
    report = build_report(
        summary,
        title="Re-ranking the simulated shop" if isinstance(config.data, WorldData) else "Re-ranking",
        protocol=candidates.protocol("test"),
        lists_digest=candidates.digest,
        caveats=_caveats(config) | _choice(gate.load().facts),
        data=_notes(dataset, candidates),
        sids=scorecard_facts(sid_map.scorecard),
        teacher={
            "traces kept": len(written.kept),
            "asks without a trace": len(written.failures),
            "acceptance": [
                {"position": a["position"], "asked": a["asked"], "accepted": a["kept"]} for a in written.acceptance
            ],
        },
        manifest={
            "parts": record["parts"],
            "seed": config.seed,
            "versions": record["versions"],
            "fingerprints": folder.fingerprints,
        },
    )
    report["scorecard"] = plain(sid_map.scorecard)
    metrics = read_metrics(folder.path)
    report["watch"] = plain(watch_facts(metrics, config.watch))
    report["gate"] = gate.load().facts
    report["position_bias"] = chosen.position_bias
    report["findings"] = [report["gate"]["reason"] + ".", *report["findings"], *bias_findings(chosen.position_bias)]
    report["warnings"] += [f"Reinforcement, step {a['step']}: {a['sentence']}." for a in report["watch"]["alarms"]]
    if folder.hooks is not None:
        sections = [section for section in folder.hooks.rerankkit_report(report=report) if section]
        report["sections"] = plain({heading: text for section in sections for heading, text in section.items()})
    shown = choose_examples(examples, systems[chosen.name], seed=config.seed)
    columns = list(dict.fromkeys(("sft", "rl", chosen.name)))
    cards = [
        example_card(
            examples[i],
            {name: (answers[name].reasoning[examples[i].example_id], systems[name][i]) for name in columns},
            folder.surface,
        )
        for i in shown
    ]
    save_rankings(folder.path / "rankings.parquet", examples, systems)
    candidates.export_trec(folder.path / "trec")
    seconds = {"stages": folder.seconds()}
    write_json(folder.path / "manifest.json", {**record, "fingerprints": folder.fingerprints, **seconds})
    write_report(folder.path, report, metrics, cards)
    return report


def _choice(facts: Mapping[str, Any]) -> dict[str, str]:
    """On whom the exported policy was chosen."""
    users = f"chosen by {facts['metric']} on {facts['users']:,} validation users; test users had no part in it"
    return {"exported policy": users if facts["users"] else "not chosen but taken: RL's end"}


def _notes(dataset: Dataset, candidates: CandidateLists) -> dict[str, Any]:
    """What happened to the data, in words; what did not happen (zeros) is left out."""
    lists = {f"lists: {name}": value for name, value in candidates.notes.items() if not isinstance(value, list)}
    return {name.replace("_", " "): value for name, value in {**dataset.notes, **lists}.items() if value not in (0, "")}


def best_possible(config: WorldData, examples: list[RerankExample]) -> list[Ranking]:
    """Candidates by the shipped world's true chances given the history: nobody does better on average."""
    from rerankkit.data.world import make_world

    world = make_world(num_users=1, seed=config.world_seed)
    chances = [[world.log_probability(e.history, item) for item in e.candidates] for e in examples]
    return [Ranking(tuple(sorted(range(len(row)), key=lambda i: (-row[i], i)))) for row in chances]


def _caveats(config: RunConfig) -> dict[str, str]:
    """What a reader must know about who saw what."""
    lists = config.candidates
    policy = "mid-trained on training steps before those of the training lists; it has seen no listed target"
    found = {"policy": policy}
    if isinstance(lists, KnnLists | PopularityLists):
        fitted = "everything before the listed step" if lists.refit else "training steps alone"
        found["pre-ranker"] = f"fitted on {fitted}" + ("; fresher than the policy" if lists.refit else "")
    if isinstance(lists, KnnLists) and lists.transitions == "directed":
        found["order"] = "directed transitions profit from any catalogue order among purchases of the same day"
    if isinstance(lists, PolicyLists):
        found["pre-ranker"] = "the mid-trained policy itself, as in the paper"
    if isinstance(config.data, WorldData):
        found["ceiling"] = "sorts by the simulated world's true chances given the history: the best average there is"
    return found

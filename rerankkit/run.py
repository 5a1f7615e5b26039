"""The whole pipeline, one line an arrow. Start reading here."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerankkit import processes
from rerankkit.config import PretrainedPolicy, RunConfig
from rerankkit.store import RunFolder, StoppedEarlyError, open_run

if TYPE_CHECKING:
    from rerankkit.lm import Policy

RANKED = ("rank-mid-train", "rank-sft", "rank-rl", "rank-exported")
STAGES = ("data", "sids", "midtrain", "candidates", "traces", "sft", "rl", "gate", *RANKED)


def run(config: RunConfig, out: Path, **how: Any) -> dict[str, Any]:
    """Do every stage that is not done yet in the folder `out`, and return the report.

    `how` sets fields of `store.RunFolder`; with `until="sft"` it stops after that stage and returns an empty report.
    """
    from rerankkit.stages.assemble import report_run

    with suppress(StoppedEarlyError), open_run(out, config, **how) as folder:
        finished = stages(folder)
        return processes.decide(lambda: report_run(folder, *finished))
    return {}


def plan(config: RunConfig, out: Path, until: str = "") -> dict[str, str]:
    """What `run` would find: for each stage `done`, `unfinished` or `to do`. Writes nothing."""
    states: dict[str, str] = {}
    folder = RunFolder(
        out, config, until=until, announce=lambda name, state, _: states.update({name: state}), plan=True
    )
    with suppress(StoppedEarlyError):
        stages(folder)
    return states


def stages(folder: RunFolder) -> tuple[Any, ...]:
    """Every stage in order; returns what the report is made from.

    Of several processes one does a `stage` while the others wait; those that train or rank are done `together`.
    """
    from rerankkit.data.dataset import Dataset
    from rerankkit.data.lists import CandidateLists
    from rerankkit.stages.candidates import make_candidates
    from rerankkit.stages.data import make_dataset, source_digests
    from rerankkit.stages.exported import ExportedRankings, rank_exported
    from rerankkit.stages.gate import Exported, choose_policy
    from rerankkit.stages.midtrain import midtrain
    from rerankkit.stages.rankings import Rankings, rank_users
    from rerankkit.stages.rl import reinforce, watching
    from rerankkit.stages.sft import fine_tune
    from rerankkit.stages.sid_gate import gated
    from rerankkit.stages.sids import SidMap, draw_sids, drawn_with
    from rerankkit.stages.traces import Traces, write_traces

    def load_policy(saved: Path) -> Policy:
        from rerankkit.lm import Policy

        policy = Policy.load(saved, device=folder.device)
        if c.policy.gradient_checkpointing:
            policy.checkpoint_gradients()
        return policy

    c, stage, together = folder.config, folder.stage, folder.together
    tables, recipe = source_digests(c.data, c.candidates), drawn_with(c)
    lora = c.policy.lora if isinstance(c.policy, PretrainedPolicy) else None
    held_out, cut = 1 + c.candidates.earlier_steps, c.data.max_history
    facts = list(c.policy.prompt.evidence)
    places = (folder.surface.places,) if folder.surface.places else ()
    data = stage("data", make_dataset, Dataset.load, c.data, tables)
    drawn = gated(draw_sids, folder)
    sids = stage("sids", drawn, SidMap.load, c.tokenizer, c.sids, c.data.embeddings, data, recipe)
    mid = together("midtrain", midtrain, load_policy, c.midtrain, c.policy, data, sids, held_out, told=places)
    own = (sids, mid) if c.candidates.use == "policy" else (None, None)
    lists = stage("candidates", make_candidates, CandidateLists.load, c.candidates, cut, tables, data, *own, facts)
    traces = stage("traces", write_traces, Traces.load, c.teacher, data, sids, lists, told=places)
    sft = together("sft", fine_tune, load_policy, c.sft, data, sids, lists, traces, mid, lora)
    learnt = (c.optimizer, c.reward, data, sids, lists, sft, lora, c.gate.keep_every)
    rl = together("rl", watching(reinforce, folder), load_policy, *learnt)
    asking, think, listed = c.evaluate.answering, c.evaluate.think != "off", (data, sids, lists)
    saved = (mid.on_disk(), sft.on_disk(), rl.on_disk())
    gate = together("gate", choose_policy, Exported.load, c.gate, asking, think, *listed, *saved)
    ranked = {
        name: together(f"rank-{name}", rank_users, Rankings.load, how, asking, think, *listed, policy)
        for name, how, policy in (("mid-train", "score", mid), ("sft", "generate", sft), ("rl", "generate", rl))
    }
    probes = (c.evaluate.think, c.evaluate.shuffles, *listed, gate, sft.on_disk(), *ranked.values())
    exported = together("rank-exported", rank_exported, ExportedRankings.load, asking, *probes)
    return data, sids, lists, traces, ranked, gate, exported

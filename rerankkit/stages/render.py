"""A report as a page: Markdown for terminals and pull requests, HTML to read and to send around."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from rerankkit.stages.scorecard import scorecard_facts, scorecard_headline, scorecard_shape
from rerankkit.stages.wording import BOUNDS, capital, change, label, number, percent, points, signed, value_text


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as a page of Markdown: the tables and sentences, without curves and examples."""
    rows, names = report["rows"], _metric_names(report["rows"])
    best = _best(rows, names)
    lines = [
        f"# {_cell(report['title'])}",
        "",
        f"**{_cell(report['headline'])}**",
        "",
        f"{_cell(_sentence(report))}",
        "",
    ]
    lines += _md_table(
        ["system", *names, "same order", "Kendall tau", "invalid"],
        [
            [
                _cell(row["name"]) + (" (exported)" if row.get("exported") else ""),
                *(_bold(number(row["metrics"][m]), row["name"] in best[m]) for m in names),
                *(percent(row["identity_rate"]), f"{row['kendall_tau']:.2f}", percent(row["invalid_rate"])),
            ]
            for row in rows
        ],
    )
    lines += ["", "## Differences", "", "In points (hundredths), with paired 95% intervals.", ""]
    compared = list(dict.fromkeys(c["metric"] for c in report["comparisons"]))
    found = {(c["a"], c["b"], c["metric"]): c for c in report["comparisons"]}
    lines += _md_table(
        ["", *compared],
        [[_cell(f"{a} - {b}"), *(change(found[a, b, metric]) for metric in compared)] for a, b in _pairs(report)],
    )
    lines += ["", "## Findings", "", *(f"- {_cell(text)}" for text in report["findings"])]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {_cell(text)}" for text in report["warnings"])]
    lines += _md_watch(report.get("watch", NO_WATCH))
    lines += _md_gate(report.get("gate", {}))
    lines += _md_bias(report.get("position_bias", {}))
    lines += ["", "## Before quoting a number", ""]
    lines += [f"- **{_cell(name)}**: {_cell(text)}" for name, text in caveats(report)]
    for heading, text in report.get("sections", {}).items():
        lines += ["", f"## {_cell(heading)}", "", _cell(text)]
    if acceptance := report["teacher"].get("acceptance"):
        lines += ["", "## Teacher: accepted by position of the target", ""]
        shares = [[a["position"], a["asked"], a["accepted"], percent(_share(a))] for a in acceptance]
        lines += _md_table(["position", "asked", "accepted", "share"], shares)
    for heading, block in (("Data", report["data"]), ("Semantic IDs", report["sids"])):
        if block:
            lines += [
                "",
                f"## {heading}",
                "",
                *_md_table(["", ""], [[_cell(k), _cell(value_text(v))] for k, v in block.items()]),
            ]
    if parts := report["manifest"].get("parts"):
        keys = ("slot", "name", "distribution", "version")
        cells = [[_cell(part.get(key, "")) for key in keys] for part in parts]
        lines += ["", "## Parts", "", *_md_table(keys, cells)]
    return "\n".join(lines) + "\n"


def _md_gate(gate: Mapping[str, Any]) -> list[str]:
    """The choice of the exported policy, made on validation users."""
    if not gate:
        return []
    lines = ["", "## The exported policy", "", f"{_cell(gate['reason'])}."]
    if gate["rows"]:
        names = list(dict.fromkeys((gate["metric"], "R@1", "R@5", "MRR")))
        cells = [
            [
                _cell(row["name"]) + (" (exported)" if row["name"] == gate["exported"] else ""),
                *(number(row["metrics"][name]) for name in names),
                percent(row["identity_rate"]),
            ]
            for row in gate["rows"]
        ]
        lines += ["", f"On {gate['users']:,} validation users (the choice was made on them):", ""]
        lines += _md_table(["policy", *names, "same order"], cells)
    return lines


def bias_rows(bias: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each system whose lists were shuffled."""
    return [
        [
            name,
            percent(found["same_first"]),
            f"{found['kendall_tau']:.2f}",
            number(found["metrics"]["NDCG@5"]["given"]),
            "{} to {}".format(*(number(found["metrics"]["NDCG@5"][end]) for end in ("low", "high"))),
            percent(found["shown_first"][0]),
        ]
        for name, found in bias.items()
    ]


BIAS_HEAD = (
    "system",
    "same first choice",
    "Kendall tau",
    "NDCG@5 as given",
    "NDCG@5 shuffled",
    "chose the first shown",
)


def _md_bias(bias: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not bias:
        return []
    rows = [[_cell(cell) for cell in row] for row in bias_rows(bias)]
    return ["", "## Position bias", "", *_md_table(BIAS_HEAD, rows)]


def _md_watch(watch: Mapping[str, Any]) -> list[str]:
    """The watch over reinforcement: its alarms, and where the first choice was given."""
    if not watch["steps"]:
        return []
    lines = ["", "## Reinforcement, step by step", ""]
    lines += [f"- step {a['step']}, {_cell(a['rule'])}: {_cell(a['sentence'])}" for a in watch["alarms"]]
    if not watch["alarms"]:
        lines += [f"Watched for {watch['steps']} steps: no rule fired."]
    places = {name: shares for name, shares in watch["first_choice"].items() if shares}
    if places:
        count = max(map(len, places.values()))
        shown = [[name, *map(percent, shares)] for name, shares in places.items()]
        lines += ["", "Given place of the first choice:", ""]
        lines += _md_table(["", *(str(place + 1) for place in range(count))], shown)
    return lines


def render_html(
    report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]]
) -> str:
    """The report as one page that needs no network, no script and no other file.

    `metrics` are the records of `metrics.jsonl`, `examples` come from `example_card`. Whatever is in them is text:
    everything is escaped.
    """
    from markupsafe import Markup

    names = _metric_names(report["rows"])
    return _page(
        "report.html.j2",
        report=report,
        bounds_names=BOUNDS,
        names=names,
        best=_best(report["rows"], names),
        change={(c["a"], c["metric"]): c for c in report["comparisons"] if c["b"] == "pre-rank"},
        points=signed,
        bounds=lambda c: f"{points(c['low'])}, {points(c['high'])}",
        caveats=caveats(report),
        forest=Markup(_forest(report)),
        charts=_marked(learning_curves(metrics, report.get("watch", {}))),
        watch=report.get("watch", NO_WATCH),
        evidence_steps=_evidence_steps,
        cost=_cost(metrics),
        share=_share,
        gate=report.get("gate", {}),
        gate_names=list(dict.fromkeys((report.get("gate", {}).get("metric", "NDCG@5"), "R@1", "R@5", "MRR"))),
        bias=bias_rows(report.get("position_bias", {})),
        bias_head=BIAS_HEAD,
        moves=_moves(report),
        examples=examples,
        parts=report["manifest"].get("parts", []),
        manifest={key: value for key, value in report["manifest"].items() if key != "parts"},
        **_scorecard(report.get("scorecard", {})),
    )


def render_watch(facts: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """What the watch saw (`stages.watch.watch_facts`) of a run that it stopped, as a page of its own."""
    return _page(
        "stopped.html.j2", watch=facts, charts=_marked(learning_curves(metrics, facts)), evidence_steps=_evidence_steps
    )


NO_WATCH: Mapping[str, Any] = {"alarms": [], "steps": 0}


def _marked(charts: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[Any]]]:
    from markupsafe import Markup

    return [(heading, [Markup(figure) for figure in figures]) for heading, figures in charts]


def _evidence_steps(alarm: Mapping[str, Any]) -> list[int]:
    return sorted({step for series in alarm["evidence"].values() for step, _ in series})


def render_scorecard(card: Mapping[str, Any]) -> str:
    """The scorecard of a catalogue's SIDs (`stages.scorecard`) as a page of its own, under the same rules."""
    return _page("sids.html.j2", headline=capital(scorecard_headline(card)), **_scorecard(card))


def _page(name: str, **context: Any) -> str:
    """One of the templates beside this file, filled in; everything is escaped but what is Markup."""
    from importlib.resources import files

    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def read(name: str) -> str:
        return files("rerankkit.stages").joinpath(name).read_text("utf-8")

    environment = Environment(
        loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "label": label,
        "value": value_text,
        "typo": _typeset,
    }
    return environment.get_template(name).render(**context)


def _scorecard(card: Mapping[str, Any]) -> dict[str, Any]:
    """What scorecard.html.j2 needs; a report may have none."""
    from markupsafe import Markup

    from rerankkit.stages.charts import line_chart

    if not card:
        return {"scorecard": card}
    purity = [level for level in card["purity"] if level["categories"] > 1]  # one category for all says nothing

    def by_depth(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(depth, value) for depth, value in enumerate(values, start=1)]

    told = {f"category level {level['level']}": by_depth(level["purity"]) for level in purity}
    chance = {f"category level {level['level']}": by_depth(level["chance"]) for level in purity}
    left = {"items that share it": by_depth([depth["sharing"] for depth in card["depths"]])}
    if card["inside"]:
        left["variance inside"] = by_depth(card["inside"])
    figures = [
        line_chart(told, "What a prefix tells", "category purity; dotted: by chance", (0.0, 1.0), "codes read", chance),
        line_chart(left, "What it leaves open", "share", (0.0, 1.0), "codes read"),
    ]
    return {
        "scorecard": card,
        "facts": scorecard_facts(card),
        "condition": scorecard_shape(card),
        "purity": purity,
        "figures": [Markup(figure) for figure in figures if figure] if len(card["depths"]) > 1 else [],
    }


def learning_curves(
    metrics: Sequence[Mapping[str, Any]], watch: Mapping[str, Any] | None = None
) -> list[tuple[str, list[str]]]:
    """(heading, figures as HTML) for each stage that logged something drawable; `watch` are its facts."""
    from rerankkit.stages.charts import bar_chart, line_chart

    logs = _by_stage(metrics)

    def lines(stage: str, names: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
        records = logs.get(stage, [])
        values = {name: [(r["step"], r[key]) for r in records if _is_number(r.get(key))] for key, name in names.items()}
        return {name: line for name, line in values.items() if line}

    losses = {"loss": "loss", "reasoning_loss": "reasoning", "ranking_loss": "ranking", "eval_loss": "validation"}
    rewards = {"reward": "total"} | {
        key: key.removeprefix("rewards/").removesuffix("/mean")
        for record in logs.get("rl", [])
        for key in record
        if key.startswith("rewards/") and key.endswith("/mean")
    }
    parts = lines("rl", rewards)
    if len(parts) == 2 and len({tuple(line) for line in parts.values()}) == 1:
        del parts["total"]  # one reward of weight 1 is the total
    order = {"identity_rate": "same order", "first_kept_rate": "given first kept first", "kendall_tau": "Kendall tau"}
    health = {
        "frac_reward_zero_std": "groups without variance",
        "completions/clipped_ratio": "cut at the length limit",
        "invalid_rate": "invalid answers",
        "rewards/failed": "could not be judged",
    }
    length = {"completions/mean_length": "answers", "completions/mean_reasoning_length": "reasoning"}
    taus = {"tau_within_group": "within a group", "tau_to_last": "to the last answers to the same ask"}
    why = {
        key: key.removeprefix("zero_std/").replace("_", " ")
        for record in logs.get("rl", [])
        for key in record
        if key.startswith("zero_std/")
    }
    trust = {"kl": "KL", "logp_gap": "sampler against trainer"}
    clips = {"clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"}
    places = (watch or {}).get("first_choice", {})
    sections = [
        (
            "Training loss",
            [
                line_chart(lines("midtrain", losses), "Mid-training", "nats a token"),
                line_chart(lines("sft", losses), "Supervised fine-tuning", "nats a token"),
            ],
        ),
        (
            "Reinforcement learning",
            [
                line_chart(parts, "Reward and its parts", "mean over rollouts"),
                line_chart(lines("rl", order), "Closeness to the given order", "1 = copied", (0.0, 1.0)),
                bar_chart(places, "Given place of the first choice", "share of answers", "given place"),
                line_chart(lines("rl", taus), "Agreement among answers", "Kendall tau"),
                line_chart(lines("rl", why), "Groups without variance, by reason", "share", (0.0, 1.0)),
                line_chart(lines("rl", {"entropy": "entropy"}), "Entropy", "nats a token", (0.0, 0.0)),
                line_chart(lines("rl", length), "Completion length", "tokens", (0.0, 0.0)),
                line_chart(lines("rl", health), "Wasted rollouts", "share", (0.0, 1.0)),
                line_chart(lines("rl", {"grad_norm": "norm"}), "Gradient norm", "before clipping", (0.0, 0.0)),
                line_chart(lines("rl", trust), "Distance from the sampler", "nats a token", (0.0, 0.0)),
                line_chart(lines("rl", clips), "Clipped tokens", "share", (0.0, 0.0)),
            ],
        ),
    ]
    drawn = [(heading, [figure for figure in figures if figure]) for heading, figures in sections]
    return [(heading, figures) for heading, figures in drawn if figures]


def caveats(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, sentence) pairs that belong beside every number of this report."""
    bootstrap = report["bootstrap"]
    share = report["n"] / report["num_users"]
    fixed = [
        ("Condition", f"{_sentence(report)} Over all test users every metric is {share:.3f} times as large."),
        ("Protocol", report["protocol"]),
        (
            "Intervals",
            f"paired bootstrap over users, {bootstrap['samples']:,} samples, 95% each, not adjusted for their number; "
            "they cover the choice of users, not the choice of training seed.",
        ),
        (
            "Invalid answers",
            "an answer that was not a complete permutation counts as invalid, whether it could be repaired or not; "
            "where nothing could be used the given order stands in for it.",
        ),
    ]
    return [*fixed, *((capital(name), text) for name, text in report["caveats"].items())]


def _moves(report: Mapping[str, Any]) -> str:
    rows = {row["name"]: row for row in report["rows"]}
    exported = [name for name, row in rows.items() if row.get("exported")]
    best = next((name for name in (*exported, "rl", "sft", "mid-train") if name in rows), None)
    if best is None or "up_rate" not in rows[best]:
        return ""
    up, down = rows[best]["up_rate"], rows[best]["down_rate"]
    return (
        f"Over all {report['n']:,} users {label(best)} moved the target up for {percent(up)}, down for "
        f"{percent(down)} and left it for {percent(1 - up - down)}."
    )


def _pairs(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (a, b) that were compared, without the bounds: that they are better says nothing."""
    return list(dict.fromkeys((c["a"], c["b"]) for c in report["comparisons"] if c["a"] not in BOUNDS))


def _forest(report: Mapping[str, Any]) -> str:
    from rerankkit.stages.charts import interval_chart

    groups: dict[str, dict[str, tuple[float, float, float]]] = {}
    for a, b in _pairs(report):
        for c in report["comparisons"]:
            if (c["a"], c["b"]) == (a, b) and (b == "pre-rank" or a.startswith("rl")):
                whisker = (100 * c["difference"], 100 * c["low"], 100 * c["high"])
                groups.setdefault(c["metric"], {})[f"{label(a)} over {label(b)}"] = whisker
    return interval_chart(groups, "Differences", "points, paired 95% intervals; right of zero is better")


def _by_stage(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Records by stage in step order. A resumed run repeats the steps after its checkpoint: the last one counts."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in metrics:
        if _is_number(record.get("step")):
            found.setdefault(str(record.get("stage")), {}).setdefault(record["step"], {}).update(record)
    return {stage: [steps[step] for step in sorted(steps)] for stage, steps in found.items()}


def _cost(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, str, str, str]]:
    """(stage, steps, time, median tokens a second, what the time went to) of the stages that logged time or speed."""
    rows = []
    for stage, records in _by_stage(metrics).items():
        seconds = [r["step_time"] for r in records if _is_number(r.get("step_time"))]
        speed = [r["tokens_per_second"] for r in records if _is_number(r.get("tokens_per_second"))]
        if seconds or speed:
            minutes = f"{sum(seconds) / 60:,.1f} min" if seconds else ""
            median = f"{statistics.median(speed):,.0f}" if speed else ""
            rows.append((stage, len(records), minutes, median, _breakdown(records)))
    return rows


def _breakdown(records: Sequence[Mapping[str, Any]]) -> str:
    """`backward 55%, forward 40%, other 5%`: shares of the logged `time/*`, largest first; below 1% is left out."""
    spent: dict[str, float] = {}
    for key, value in (pair for record in records for pair in record.items()):
        if key.startswith("time/") and _is_number(value):
            spent[key.removeprefix("time/")] = spent.get(key.removeprefix("time/"), 0.0) + value
    total = sum(spent.values())
    shares = sorted(((seconds / total, what) for what, seconds in spent.items() if total), reverse=True)
    return ", ".join(f"{what} {percent(share)}" for share, what in shares if share >= 0.01)


def _metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics worth a column: one that is 1 for everybody by the condition (R@10 of a list of ten) is not."""
    return [
        name
        for name in rows[0]["metrics"]
        if any(row["metrics"][name] < 1 for row in rows if row["name"] not in BOUNDS)
    ]


def _best(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[str]]:
    """Metric -> the rows, other than the bounds, that print its largest value."""
    real = [row for row in rows if row["name"] not in BOUNDS]
    best = {name: max(number(row["metrics"][name]) for row in real) for name in names}
    return {name: [row["name"] for row in real if number(row["metrics"][name]) == best[name]] for name in names}


def _sentence(report: Mapping[str, Any]) -> str:
    return capital(str(report["condition"])) + "."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _typeset(text: Any) -> str:
    """Real minus signs, and no line break inside `pre-rank` or an interval."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", str(text)).replace(
        "pre-rank", "pre\N{NON-BREAKING HYPHEN}rank"
    )
    text = re.sub(r" (?=[+\N{MINUS SIGN}]\d)", "\N{NO-BREAK SPACE}", text)
    return re.sub(r" ?\[[^\[\]]{1,24}\]", lambda found: found.group().replace(" ", "\N{NO-BREAK SPACE}"), text)


def _share(acceptance: Mapping[str, Any]) -> float:
    return float(acceptance["accepted"] / acceptance["asked"]) if acceptance["asked"] else 0.0


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _cell(value: Any) -> str:
    """Untrusted text as Markdown that is only text: one line, no markup, no HTML, no cell end."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_<>|#])", r"\\\1", line)


def _md_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table; text from elsewhere comes through `_cell` first."""
    align = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(map(str, row)) + " |" for row in [head, align, *rows]]

"""What the terminal shows: bars and stage lines on stderr, results on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from rerankkit.stages.audit import Audit, Mean

STYLES: Mapping[str, str] = {"done": "green", "failed": "bold red"}
"""How the states of a stage are shown; the others (started, continued, skipped) are dim."""
TABLE_METRICS = ("R@1", "R@3", "R@5", "NDCG@5", "NDCG@10", "MRR")
PLAIN_WIDTH = 120
"""Columns of a result that goes into a file or a pipe, where no terminal says how wide it is."""


@contextmanager
def progress_bar() -> Iterator[Callable[..., Iterator[Any]]]:
    """Give `progress(iterable, total=None, what="")` for RunInfo: what, done/total, elapsed and left, on stderr.

    Bars may be nested and vanish when their loop ends, however it ends. Where stderr is no terminal nothing is drawn.
    """
    console = _stderr()
    if not console.is_terminal:
        yield lambda items, total=None, what="": iter(items)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
    )
    # Results belong to stdout, so it must not be caught and sent to stderr with the bars.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bars:

        def progress(items: Iterable[Any], total: int | None = None, what: str = "") -> Iterator[Any]:
            if total is None and isinstance(items, Sized):
                total = len(items)
            task = bars.add_task(what, total=total)
            try:
                for item in items:
                    yield item
                    bars.advance(task)
            finally:
                bars.remove_task(task)
                bars.refresh()  # or a line printed next would carry the dead bar along

        yield progress


def stage_line(name: str, state: str, seconds: float | None = None) -> None:
    """One line on stderr about a stage; also above running bars, and where stderr is no terminal."""
    from rich.text import Text

    line = Text(f"{state:<10}", style=STYLES.get(state, "dim")) + Text(name, style="default")
    if seconds is not None:
        line.append(f"  {duration(seconds)}", style="dim")
    _stderr().print(line, soft_wrap=True)


def announce(name: str, state: str, seconds: float) -> None:
    """`stage_line` as a run folder calls it: seconds only of what is done."""
    stage_line(name, state, seconds if state == "done" else None)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `1 h 02 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def print_table(report: Mapping[str, Any]) -> None:
    """The end of a run, on stdout: its headline, the table, the findings, the warnings."""
    from rich.table import Table
    from rich.text import Text

    from rerankkit.stages.wording import BOUNDS, percent

    console = _stdout()
    names = [m for m in TABLE_METRICS if m in report["rows"][0]["metrics"]]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("", *names, "same order", "tau", "invalid"):
        table.add_column(head, justify="left" if not head else "right", no_wrap=True)
    best = {m: max(round(r["metrics"][m], 3) for r in report["rows"] if r["name"] not in BOUNDS) for m in names}
    for row in report["rows"]:
        bound = row["name"] in BOUNDS
        values = [
            Text(f"{row['metrics'][m]:.3f}", "bold" if not bound and round(row["metrics"][m], 3) == best[m] else "")
            for m in names
        ]
        behaviour = (percent(row["identity_rate"]), f"{row['kendall_tau']:.2f}", percent(row["invalid_rate"]))
        table.add_row(Text(row["name"]), *values, *behaviour, style="dim" if bound else "")
    console.print(Text(report["headline"], "bold"))
    console.print(Text(report["condition"][:1].upper() + report["condition"][1:], "dim"))
    console.print()
    console.print(table)
    console.print()
    for text in report["findings"]:
        console.print(Text(text))
    for text in report["warnings"]:
        console.print(Text("warning: ", "yellow") + Text(text))


def print_audit(found: Audit, rewards: str, asks: str) -> None:
    """What the audit of a reward found, on stdout: honest policies, exploits, and what it comes to."""
    from rich.table import Table
    from rich.text import Text

    console = _stdout()

    def columns(*heads: str) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head in heads:
            table.add_column(head, justify="left" if head == heads[0] else "right", no_wrap=True)
        return table

    def told(mean: Mean) -> tuple[str, str]:
        return (f"{mean.value:.3f}", f"{mean.error:.3f}") if mean.count else ("n/a", "")

    console.print(Text(f"{rewards}: {'passed' if found.passed else 'does not pass'}", "bold"))
    console.print(
        Text(
            f"{asks}; the given order's NDCG@5 is {found.given_ndcg:.3f}, {found.first:.0%} have the target first",
            "dim",
        )
    )
    console.print()
    honest = columns("honest answers", "NDCG@5", "reward", "se", "advantage of copying", "se")
    for level in found.levels:
        honest.add_row(level.name, f"{level.ndcg:.3f}", *told(level.reward), *told(level.copying))
    console.print(honest)
    console.print()
    exploits = columns("exploit", "reward", "gain", "se", "advantage", "se", "first", "elsewhere", "")
    for one in found.findings:
        where = (told(one.gain_first)[0], told(one.gain_elsewhere)[0])
        verdict = Text("pays" if one.pays else "", "bold red")
        exploits.add_row(one.name, told(one.reward)[0], *told(one.gain), *told(one.advantage), *where, verdict)
    console.print(exploits)
    console.print()
    for sentence in found.sentences():
        console.print(Text(sentence))


def print_comparison(comparison: Mapping[str, Any], a: str = "a", b: str = "b") -> None:
    """What `compare_runs` found, on stdout; `a` and `b` are what the user called the runs."""
    from rich.table import Table
    from rich.text import Text

    console = _stdout()
    console.print(Text(f"{b} minus {a}, in points, on the same {comparison['n']:,} test users", "bold"))
    console.print()
    metrics = list(dict.fromkeys(c["metric"] for c in comparison["comparisons"]))
    found = {(c["name"], c["metric"]): c for c in comparison["comparisons"]}
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for head in ("", *(row["name"] for row in comparison["rows"])):
        table.add_column(Text(head), justify="left" if not head else "right", no_wrap=True)
    for metric in metrics:
        table.add_row(metric, *(_change(found[row["name"], metric]) for row in comparison["rows"]))
    console.print(table)
    console.print()
    console.print(Text("Paired 95% intervals; coloured where they exclude zero.", "dim"))
    for side, label in (("a", a), ("b", b)):
        if names := comparison["only_in"][side]:
            console.print(Text(f"only in {label}: {', '.join(names)}", "dim"))
    for note in comparison["notes"]:
        console.print(Text("note: ", "yellow") + Text(note))


def print_scorecard(card: Mapping[str, Any]) -> None:
    """A scorecard of SIDs, on stdout: the numbers, by level, by prefix length, who collides, what codes mean."""
    from rich.table import Table
    from rich.text import Text

    from rerankkit.stages.scorecard import scorecard_facts, scorecard_headline, scorecard_shape
    from rerankkit.stages.wording import capital, percent, value_text

    console = _stdout()

    def section(heading: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim", show_header=any(heads))
        for head in heads:
            table.add_column(Text(head.lstrip("<")), justify="left" if head.startswith("<") else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        if table.row_count:
            console.print()
            if heading:
                console.print(Text(heading, "bold"))
            console.print(table)

    console.print(Text(f"{capital(scorecard_headline(card))}.", "bold"))
    console.print(Text(capital(scorecard_shape(card)), "dim"))
    if card.get("missed_gate"):
        console.print(Text(card["missed_gate"], "yellow"))
    section("", ("<", ""), [(name, value_text(value)) for name, value in scorecard_facts(card).items()])
    section(
        "Levels",
        ("", "codes used", "perplexity", "entropy, bits"),
        [
            (
                str(place),
                f"{level['used']:,} of {level['size']:,}",
                f"{level['perplexity']:.1f}",
                f"{level['entropy']:.2f}",
            )
            for place, level in enumerate(card["levels"], start=1)
        ],
    )
    purity = [level for level in card["purity"] if level["categories"] > 1]
    inside = card["inside"] or [None] * len(card["depths"])
    section(
        "By prefix length",
        (
            "codes read",
            "prefixes",
            "items that share theirs",
            "most on one",
            "variance inside",
            *(f"purity {level['level']} (chance)" for level in purity),
        ),
        [
            (
                str(place + 1),
                f"{card['distinct_prefixes'][place]:,}",
                percent(depth["sharing"]),
                f"{depth['largest']:,}",
                "n/a" if inside[place] is None else percent(inside[place]),
                *(f"{percent(one['purity'][place])} ({percent(one['chance'][place])})" for one in purity),
            )
            for place, depth in enumerate(card["depths"])
        ],
    )
    for level in purity:
        console.print(
            Text(
                f"purity {level['level']}: category level {level['level']}, {level['categories']:,} categories, "
                f"{level['num_items']:,} items, {level['without']:,} without",
                "dim",
            )
        )
    section("The tokenizer's own account", ("<", ""), [(k, value_text(v)) for k, v in card["account"].items()])
    section(
        "The most crowded SIDs",
        ("<SID", "items", "<such as"),
        [(value_text(c["sid"]), f"{c['num_items']:,}", " | ".join(c["titles"][:2])) for c in card["collisions"]],
    )
    if card["tree"]:
        console.print()
        console.print(Text("What the first codes mean", "bold"))
    for node in card["tree"]:
        for line in (_code_line(node), *map(_code_line, node["inside"])):
            console.print(line, no_wrap=True, overflow="ellipsis")


def _code_line(node: Mapping[str, Any]) -> Text:
    """`12  Hair > Shampoo 62%  31 items  shampoo, dandruff`; indented for a second-level code."""
    from rich.text import Text

    from rerankkit.stages.wording import percent

    first = len(node["codes"]) == 1
    share = "" if node["category_share"] is None else f" {percent(node['category_share'])}"
    line = Text(f"{'' if first else '    '}{' '.join(map(str, node['codes'])):<{5 if first else 10}}")
    line.append(f"{' > '.join(node['category']) or 'no category'}{share}", "bold" if first else "")
    line.append(f"  {node['num_items']:,} items", "dim")
    return line.append(f"  {', '.join(node['words'])}", "dim")


def _change(found: Mapping[str, Any]) -> Text:
    from rich.text import Text

    from rerankkit.stages.wording import change

    style = "green" if found["low"] > 0 else "red" if found["high"] < 0 else ""
    return Text(change(found), style)


@cache
def _stderr() -> Console:
    """One console for bars and lines, so that a line printed while a bar runs goes above it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def _stdout() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH)

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rerankkit.errors import DataError
from rerankkit.stages.render import _cost, learning_curves, render_html, render_markdown
from rerankkit.stages.report import (
    build_report,
    choose_examples,
    example_card,
    plain,
    summarise,
    write_report,
)
from rerankkit.types import Item, Parse, Ranking, RerankExample, SidSurface

HOSTILE = "</td><script>alert(1)</script> {{ 7*7 }} | <b>x</b>\n# h"


def example(row: int, target: int, size: int = 4, title: str = "item") -> RerankExample:
    items = tuple(Item(f"{row}-{i}", f"{title} {i}", sid=(row, i)) for i in range(size + 2))
    relevance = tuple(float(i == target) for i in range(size))
    return RerankExample(f"e{row}", f"u{row}", items[size:], items[:size], relevance)


def swapped(*order: int, parse: Parse = Parse.OK) -> Ranking:
    return Ranking(order, parse)


# Four users, four candidates each, the target given at positions 1, 2, 2, 4 (from 0: 0, 1, 1, 3).
EXAMPLES = [example(row, target) for row, target in enumerate((0, 1, 1, 3))]
GIVEN = swapped(0, 1, 2, 3)
RL = [
    GIVEN,
    swapped(1, 0, 2, 3),
    swapped(1, 0, 2, 3),
    swapped(0, 1, 3, 2, parse=Parse.REPAIRED),
]  # target at 1, 1, 1, 3
SFT = [GIVEN, swapped(0, 1, 2, 3, parse=Parse.FAILED), GIVEN, GIVEN]


def summary(**systems: list[Ranking]) -> dict[str, Any]:
    return summarise(EXAMPLES, systems, num_users=10, seed=0, samples=200)


def report(**changes: Any) -> dict[str, Any]:
    context: dict[str, Any] = {
        "title": "a run",
        "protocol": "leave-one-out",
        "lists_digest": "sha256:ab",
        "caveats": {"Pre-ranker": "popularity"},
        "data": {"users": 1234},
        "sids": {"perplexity": [3.5, 2.25]},
        "teacher": {"strategy": "rejection", "acceptance": [{"position": 1, "asked": 4, "accepted": 3}]},
        "manifest": {
            "parts": [{"slot": "reward", "name": "gr2", "distribution": "rerankkit", "version": "0.1.0"}],
            "seed": 3,
            "fingerprints": {"sft": "ff00"},
        },
    }
    return build_report(summary(sft=SFT, rl=RL), **(context | changes))


METRICS = [
    {"stage": "midtrain", "step": 1, "loss": 3.0},
    {"stage": "midtrain", "step": 2, "loss": 2.0, "step_time": 30.0, "tokens_per_second": 1500.0},
    {"stage": "rl", "step": 1, "reward": 0.1, "rewards/gr2/mean": 0.2, "identity_rate": 0.5, "entropy": math.nan},
]


def test_rows_hold_the_hand_worked_numbers() -> None:
    rows = {row["name"]: row for row in summary(sft=SFT, rl=RL)["rows"]}

    assert list(rows) == ["pre-rank", "sft", "rl", "oracle"]
    # Ranks of the target: given 1, 2, 2, 4; after RL 1, 1, 1, 3.
    assert rows["pre-rank"]["metrics"]["R@1"] == 0.25
    assert rows["rl"]["metrics"]["R@1"] == 0.75
    assert rows["rl"]["metrics"]["MRR"] == pytest.approx((1 + 1 + 1 + 1 / 3) / 4, abs=1e-6)
    assert rows["rl"]["metrics"]["NDCG@3"] == 0.875  # (1 + 1 + 1 + 1/log2(4)) / 4
    assert set(rows["oracle"]["metrics"].values()) == {1.0}
    assert rows["rl"]["identity_rate"] == 0.25
    # Kendall tau of one neighbouring swap among four: 1 - 4 * 1 / (4 * 3) = 2/3. Mean of 1 and three times 2/3.
    assert rows["rl"]["kendall_tau"] == 0.75
    assert (rows["rl"]["up_rate"], rows["rl"]["down_rate"]) == (0.75, 0.0)


def test_a_repaired_answer_is_invalid_and_only_a_lost_one_failed() -> None:
    rows = {row["name"]: row for row in summary(sft=SFT, rl=RL)["rows"]}
    assert (rows["rl"]["invalid_rate"], rows["rl"]["failed_rate"]) == (0.25, 0.0)
    assert (rows["sft"]["invalid_rate"], rows["sft"]["failed_rate"]) == (0.25, 0.25)


def test_comparisons_are_a_minus_b_for_each_needed_pair() -> None:
    found = summary(**{"mid-train": [GIVEN] * 4}, sft=SFT, rl=RL)["comparisons"]
    pairs = list(dict.fromkeys((c["a"], c["b"]) for c in found))
    against = [(name, "pre-rank") for name in ("mid-train", "sft", "rl", "oracle")]
    assert pairs == [*against, ("rl", "sft"), ("sft", "mid-train")]
    lift = next(c for c in found if (c["a"], c["b"], c["metric"]) == ("rl", "pre-rank", "R@1"))
    assert lift["difference"] == 0.5  # .75 - .25
    assert 0 <= lift["low"] <= 0.5 <= lift["high"] <= 1
    assert all(c["difference"] == c["low"] == c["high"] == 0 for c in found if c["a"] == "mid-train")


def test_all_users_counts_those_whose_target_is_not_listed_as_misses() -> None:
    found = summary(rl=RL)
    assert found["condition"] == "test users whose target is among the 4 candidates: 4 of 10"
    assert found["all_users"]["rl"]["R@1"] == 0.3  # .75 of the 4 in 10


def many(order: tuple[int, ...], parse: Parse = Parse.OK, target: int = 1) -> dict[str, Any]:
    """300 users whose target is given at `target` and who all get the same answer."""
    rankings = [Ranking(order, parse)] * 300
    return summarise([example(i, target) for i in range(300)], {"rl": rankings}, num_users=300, seed=0, samples=50)


def test_the_headline_says_which_way_it_went() -> None:
    # The target goes from rank 2 to rank 1: NDCG@5 from 1/log2(3) = .631 to 1, that is 36.9 points for everybody.
    assert many((1, 0, 2, 3))["headline"] == "RL lifts NDCG@5 over pre-rank by 36.9 points [36.9, 36.9]."
    # From rank 2 to rank 4: 1/log2(5) = .431, that is 20.0 points less.
    assert many((0, 2, 3, 1))["headline"] == "RL lowers NDCG@5 below pre-rank by 20.0 points [-20.0, -20.0]."
    assert "no measurable change" in many((0, 1, 2, 3))["headline"]
    assert "Nothing was trained" in summary()["headline"]


def test_findings_say_where_it_helped_and_where_not() -> None:
    first = many((0, 2, 1, 3), target=2)["findings"][0]  # from rank 3 to rank 2
    assert first.startswith("RL against pre-rank: better at NDCG@3, NDCG@5, NDCG@10, MRR; ")
    assert "no measurable difference at R@1, R@3, R@5." in first
    assert many((1, 0, 2, 3))["findings"][0].startswith(
        "RL against pre-rank: better at R@1, NDCG@3"
    )  # R@3 is 1 in both
    assert many((0, 1, 2, 3))["findings"][0].startswith("RL against pre-rank: no measurable difference at any metric.")
    # From rank 6 to rank 1 every metric gains.
    lifted = summarise([example(0, 5, 6)] * 300, {"rl": [swapped(5, 0, 1, 2, 3, 4)] * 300}, num_users=300, seed=0)
    assert lifted["findings"][0].startswith("RL against pre-rank: better at every metric.")


def test_a_ceiling_bounds_and_does_not_compete() -> None:
    found = summary(rl=RL, ceiling=[swapped(0, 1, 2, 3), *[swapped(1, 0, 2, 3)] * 2, swapped(3, 0, 1, 2)])
    assert [row["name"] for row in found["rows"]][-2:] == ["ceiling", "oracle"]
    assert any(text.startswith("The best order possible on average would lift") for text in found["findings"])
    assert not any("eiling against" in text for text in found["findings"])
    assert found["headline"].startswith("RL ")
    whole = build_report(
        found, title="t", protocol="p", lists_digest="d", caveats={}, data={}, sids={}, teacher={}, manifest={}
    )
    best = [line for line in render_markdown(whole).splitlines() if "**0.750**" in line]
    assert len(best) == 1 and best[0].startswith("| rl ")


def test_plugin_sections_are_shown_as_text() -> None:
    extended = report() | {"sections": {"Novelty <b>": f"{HOSTILE} second"}}
    page = Page(render_html(extended, [], []))
    assert "Novelty <b>" in page.text and "second" in page.text and "script" not in page.tags
    assert r"## Novelty \<b\>" in render_markdown(extended)


def test_whether_reinforcement_and_thinking_helped_is_said_in_a_sentence_each() -> None:
    examples = [example(i, 1, 8) for i in range(300)]
    rest = (0, 2, 3, 4, 5, 6, 7)

    def first_or_last(row: int) -> Ranking:  # two in three first, the others at rank 8
        return Ranking((1, *rest) if row % 3 else (*rest, 1))

    third = [Ranking((0, 2, 1, 3, 4, 5, 6, 7))] * 300
    risky = [first_or_last(row) for row in range(300)]
    found = summarise(
        examples,
        {"sft": third, "rl": risky, "no-reasoning": risky},
        num_users=300,
        seed=0,
        samples=200,
        exported="rl",
    )
    # R@1 0 against 2/3, R@3 and R@5 1 against 2/3; NDCG@3 .5 against .667; MRR 1/3 against .708
    assert found["findings"][0].startswith(
        "Reinforcement helped at R@1, NDCG@3, NDCG@5, NDCG@10, MRR and hurt at R@3, R@5: more targets come first, and "
        "others are lost further down (RL against SFT). R@1 +66.7 ["
    )
    assert found["findings"][1].startswith(
        "Thinking made no measurable difference at any depth (RL against the exported"
    )
    assert [row["name"] for row in found["rows"] if row["exported"]] == ["rl"]
    pairs = {(c["a"], c["b"]) for c in found["comparisons"]}
    assert ("rl", "no-reasoning") in pairs and ("sft", "no-reasoning") not in pairs


def test_the_headline_is_about_the_exported_policy() -> None:
    examples = [example(i, 1) for i in range(300)]
    better, worse = [swapped(1, 0, 2, 3)] * 300, [swapped(2, 0, 1, 3)] * 300
    found = summarise(examples, {"sft": better, "rl": worse}, num_users=300, seed=0, samples=50, exported="sft")
    assert found["headline"].startswith("SFT lifts NDCG@5 over pre-rank by 36.9 points")
    assert "Reinforcement hurt at R@1, NDCG@3" in found["findings"][0]
    assert any(text.endswith("SFT is exported.") for text in found["warnings"])
    kept = summarise(examples, {"sft": worse, "rl": worse, "rl@5": better}, num_users=300, seed=0, exported="rl@5")
    assert kept["headline"].startswith("RL at step 5 lifts NDCG@5")
    assert kept["findings"][1].startswith("Reinforcement helped at R@1, NDCG@3, NDCG@5, NDCG@10, MRR; no measurable")


def test_lists_longer_than_ten_are_compared_at_ten() -> None:
    examples = [example(i, 11, 12) for i in range(300)]
    tenth = [Ranking((*range(9), 11, 9, 10))] * 300
    found = summarise(examples, {"rl": tenth}, num_users=300, seed=0, samples=50)
    assert any((c["metric"], c["difference"]) == ("R@10", 1.0) for c in found["comparisons"])
    assert not any(c["metric"] == "R@10" for c in summary(rl=RL)["comparisons"])


def test_the_page_tells_of_watch_gate_and_position_bias() -> None:
    alarm = {
        "rule": "copying",
        "step": 7,
        "action": "warn",
        "sentence": f"the reward pays for copying {HOSTILE}",
        "evidence": {"identity_rate": [[6, 0.1], [7, 0.6]], "reward": [[7, 0.5]]},
    }
    places = {"first steps": [0.25, 0.75], "last steps": [1.0, 0.0]}
    row = {"name": "sft", "metrics": {"NDCG@5": 0.5, "R@1": 0.25, "R@5": 0.75, "MRR": 0.4}, "identity_rate": 0.125}
    spread = {"NDCG@5": {"given": 0.5, "low": 0.4, "mean": 0.45, "high": 0.46}}
    bias = {"same_first": 0.625, "kendall_tau": 0.33, "metrics": spread, "shown_first": [0.4, 0.6], "shuffles": 2}
    whole = report() | {
        "watch": {"steps": 7, "alarms": [alarm], "first_choice": places},
        "gate": {
            "reason": "SFT was exported, not RL",
            "users": 150,
            "exported": "sft",
            "metric": "NDCG@5",
            "rows": [row],
        },
        "position_bias": {"sft": bias},
    }
    page = Page(render_html(whole, METRICS, []))
    assert page.open == [] and "script" not in page.tags and page.tags.count("rect") == 3  # of four bars one is 0
    for said in (
        "Step 7, copying",
        "pays for copying",
        "0.6",
        "SFT was exported, not RL",
        "150 validation",
        "62%",
        "0.33",
    ):
        assert said in page.text, said
    markdown = render_markdown(whole)
    assert "- step 7, copying: the reward pays" in markdown and "<script>" not in markdown
    assert "| first steps | 25% | 75% |" in markdown and "| last steps | 100% | 0% |" in markdown
    assert "| sft (exported) | 0.500 | 0.250 | 0.750 | 0.400 | 12% |" in markdown
    assert "| sft | 62% | 0.33 | 0.500 | 0.400 to 0.460 | 40% |" in markdown


def test_a_copied_order_and_lost_answers_are_warned_about() -> None:
    copied = many((0, 1, 2, 3))["warnings"]
    assert copied == ["RL mostly copies the given order: 100% of its rankings equal it."]
    lost = many((0, 1, 2, 3), Parse.FAILED)["warnings"]
    assert "100% of answers were invalid, 100% beyond repair" in lost[0]
    assert many((1, 0, 2, 3))["warnings"] == []
    assert summary(rl=RL)["warnings"][0].startswith("Only 4 test users")


def test_rl_below_sft_is_a_warning() -> None:
    examples = [example(i, 1) for i in range(300)]
    better, worse = [swapped(1, 0, 2, 3)] * 300, [swapped(2, 0, 1, 3)] * 300
    found = summarise(examples, {"sft": better, "rl": worse}, num_users=300, seed=0, samples=50)
    assert any("RL made NDCG@5 worse than SFT" in text for text in found["warnings"])


@pytest.mark.parametrize(
    ("examples", "rankings", "said"),
    [
        ([], [], "nothing to rank"),
        (EXAMPLES, RL[:3], "3 rankings for 4 examples"),
        (EXAMPLES, [*RL[:3], swapped(0, 1, 1, 2)], "not a permutation"),
        ([example(0, 9)], [GIVEN], "no relevant candidate"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(examples: list[RerankExample], rankings: list[Ranking], said: str) -> None:
    with pytest.raises(DataError, match=said):
        summarise(examples, {"rl": rankings}, num_users=10, seed=0)


def test_report_json_is_equal_for_equal_runs_and_rounded(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, report(), METRICS, [])
        written.append((tmp_path / name / "report.json").read_bytes())
    assert written[0] == written[1]
    parsed = json.loads(written[0])
    mrr = next(row for row in parsed["rows"] if row["name"] == "rl")["metrics"]["MRR"]
    assert mrr == 0.833333  # 5/6 to six places
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["report.html", "report.json", "report.md"]


def test_json_has_neither_nan_nor_minus_zero() -> None:
    assert plain({"a": math.nan, "b": (-0.0, 1e-9, True, 3)}) == {"a": None, "b": [0.0, 0.0, True, 3]}
    assert json.dumps(plain([-0.0, -1e-9])) == "[0.0, 0.0]"


class Page(HTMLParser):
    """Tags and visible text of a page, and a check that every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "onclick", "onload")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_untrusted_text_stays_text_everywhere() -> None:
    hostile = example(0, 1, title=HOSTILE)
    reasoning = f"{HOSTILE} {SidSurface().text(hostile.candidates[1].sid)}"
    card = example_card(hostile, {"rl": (reasoning, Ranking((1, 0, 2, 3), Parse.REPAIRED, HOSTILE))}, SidSurface())
    poisoned = report(
        title=HOSTILE,
        protocol=HOSTILE,
        caveats={HOSTILE: HOSTILE},
        data={HOSTILE: HOSTILE},
        manifest={
            "parts": [dict.fromkeys(("slot", "name", "distribution", "version"), HOSTILE)],
            HOSTILE: {"a": HOSTILE},
        },
    )
    metrics = [
        *METRICS,
        {"stage": HOSTILE, "step": 1, "step_time": 1.0},
        {"stage": "rl", "step": 1, "reward": 1.0, f"rewards/{HOSTILE}/mean": 2},
    ]

    page = Page(render_html(poisoned, metrics, [card]))

    assert page.open == []
    assert "script" not in page.tags and "b" in page.tags  # our own bold, no script
    assert page.text.count("alert(1)") > 10  # shown, as text
    assert "{{ 7*7 }}" in page.text and "49" not in page.text  # nor does it reach the template engine
    markdown = render_markdown(poisoned)
    assert r"\<script\>" in markdown and "<script>" not in markdown and "\n# h" not in markdown


def test_the_page_needs_nothing_from_outside() -> None:
    page = render_html(report(), METRICS, [])
    assert Page(page).links == []
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_the_page_shows_table_curves_and_manifest() -> None:
    page = Page(render_html(report(), METRICS, []))
    for said in (
        "pre‑rank",
        "0.875",
        "+50.0",
        "Condition",
        "popularity",
        "1,234",
        "3.5, 2.25",
        "75%",
        "ff00",
        "0.5 min",
    ):
        assert said in page.text, said
    assert "R@10" not in page.text.split("Same order")[0]  # 1 for everybody: no column
    assert page.tags.count("svg") == 4  # forest, mid-training loss, reward, identity; entropy is NaN alone


def test_a_bare_report_renders() -> None:
    bare = build_report(
        summary(), title="t", protocol="p", lists_digest="d", caveats={}, data={}, sids={}, teacher={}, manifest={}
    )
    assert Page(render_html(bare, [], [])).open == []
    assert "pre-rank" in render_markdown(bare)


def test_example_cards_turn_sids_into_titles() -> None:
    one = example(7, 1, title="Soap")
    history, third, nobody = (SidSurface().text(sid) for sid in (one.history[0].sid, one.candidates[2].sid, (9, 9)))
    said = f"After {history} comes {third}, not {nobody}."
    card = example_card(one, {"rl": (said, swapped(2, 1, 0, 3))}, SidSurface())
    system = card["systems"][0]
    assert [(piece["text"], piece["given"]) for piece in system["reasoning"]] == [
        ("After ", None),
        ("Soap 4", 0),  # history
        (" comes ", None),
        ("Soap 2", 3),  # third in the given order
        (f", not {nobody}.", None),  # a SID that nobody here has
    ]
    assert (card["target"], system["target_rank"]) == (1, 2)
    assert json.loads(json.dumps(card)) == card


def test_example_cards_turn_places_into_titles() -> None:
    card = example_card(example(7, 1), {"rl": ("best: <c_3>.", swapped(2, 1, 0, 3))}, SidSurface(places=4))
    assert [piece["given"] for piece in card["systems"][0]["reasoning"]] == [None, 3, None]


def test_an_item_without_a_title_is_called_by_its_categories() -> None:
    bare = RerankExample("e", "u", (), (Item("1", "", ("Sports", "Golf", "Balls")), Item("2", "")), (1.0, 0.0))
    assert example_card(bare, {}, SidSurface())["candidates"] == ["Golf > Balls", "untitled item"]


def test_chosen_examples_take_turns_between_rises_falls_and_stays() -> None:
    examples = [example(i, 1) for i in range(30)]
    up, down, stay = swapped(1, 0, 2, 3), swapped(0, 2, 1, 3), GIVEN
    rankings = [up] * 27 + [down] * 2 + [stay]
    chosen = choose_examples(examples, rankings, count=7, seed=0)
    assert len(set(chosen)) == 7
    assert {27, 28, 29} <= set(chosen)  # both falls and the one that stayed are among them
    assert chosen == choose_examples(examples, rankings, count=7, seed=0)
    assert len(choose_examples(examples, rankings, count=99)) == 30


def test_a_resumed_run_is_drawn_once_and_with_its_last_values() -> None:
    twice = [{"stage": "sft", "step": 1, "loss": 9.0}, {"stage": "sft", "step": 2, "loss": 9.0}]
    resumed = [*twice, {"stage": "sft", "step": 2, "loss": 1.0}, {"stage": "sft", "step": 3, "loss": 1.0}]
    once = [twice[0], *resumed[2:]]
    assert learning_curves(resumed) == learning_curves(once)
    assert learning_curves([{"stage": "sft", "step": 1, "note": "no number"}]) == []


def test_a_curve_follows_the_logged_values() -> None:
    logged = [{"stage": "midtrain", "step": step, "loss": loss} for step, loss in ((1, 2.0), (2, 4.0), (3, 3.0))]
    [(heading, [figure])] = learning_curves(logged)
    assert heading == "Training loss"
    path = figure.split('d="M')[1].split('"')[0]
    across, down = zip(*(map(float, point.split(",")) for point in path.split()), strict=True)
    assert across == (48.0, 238.0, 428.0)  # first, middle and last step: left margin 48, right end 440 - 12
    assert down[0] > down[2] > down[1]  # 2 < 3 < 4, upwards
    assert down[2] == pytest.approx((down[0] + down[1]) / 2, abs=0.11)  # 3 is half way, to a rounded tenth


def test_the_headline_does_not_hide_lost_answers_or_a_handful_of_users() -> None:
    lost = [swapped(0, 1, 2, 3, parse=Parse.FAILED)] * 3
    # 3 of 4 answers were lost, the fourth left the order as it was: no gain, and nothing learned from that
    assert summary(rl=[*lost, GIVEN])["headline"] == (
        "RL cannot be judged: 75% of its answers were invalid, and for 75% of users the given order stands in; "
        "NDCG@5 +0.0 points [0.0, 0.0] (only 4 test users)."
    )
    assert summary(rl=[*lost[:2], GIVEN, GIVEN])["headline"].startswith(
        "RL shows no measurable change"
    )  # half: not yet
    examples = [example(row, 0) for row in range(20)]
    enough = summarise(examples, {"rl": [GIVEN] * 20}, num_users=20, seed=0, samples=200)
    assert "test users" not in enough["headline"]


def test_the_cost_table_says_what_the_time_went_to() -> None:
    records = [
        {"stage": "rl", "step": 1, "step_time": 60.0, "time/rollout": 39.8, "time/reward": 0.2, "time/forward": 20.0},
        {"stage": "rl", "step": 2, "step_time": 40.0, "time/rollout": 10.0, "time/forward": 30.0},
        {"stage": "sft", "step": 1, "tokens_per_second": 1234.5},
    ]
    # rollout 49.8 of 100, forward 50, reward 0.2: too little to name
    assert _cost(records) == [("rl", 2, "1.7 min", "", "forward 50%, rollout 50%"), ("sft", 1, "", "1,234", "")]

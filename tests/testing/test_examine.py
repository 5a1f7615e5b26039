"""What `rerankkit plugins check` finds, on single-file plugins that each have one fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rerankkit.cli import app
from rerankkit.errors import PluginError, UsageError
from rerankkit.testing.examine import PluginReport, examine

HEAD = """
from __future__ import annotations
from rerankkit import NotApplicable, PluginConfig, Reward, TraceFailure, hookimpl

class Settings(PluginConfig):
    '''The place of the target.'''
    scale: float = 1.0
    '''What a place is worth.'''

def place(rollout):
    target = rollout.example.target_index
    unread = rollout.ranking.parse == "failed" or target is None
    return -1.0 if unread else 1 - rollout.ranking.order.index(target) / 20

def build(config, info):
    return lambda rollouts: [Reward(config.scale * place(rollout)) for rollout in rollouts]

@hookimpl
def rerankkit_register(register):
    register.rewards.add("mine", Settings, build)
"""


@pytest.fixture
def checked(tmp_path: Path):  # type: ignore[no-untyped-def]
    """`checked(source, **how)`: what is found of a file plugin."""

    def check(source: str, name: str = "mine", **how: object) -> PluginReport:
        file = tmp_path / "plug.py"
        file.write_text(source)
        return examine(name, [str(file)], **how)  # type: ignore[arg-type]

    return check


def found(report: PluginReport, rule: str) -> tuple[str, str]:
    checks = [*report.checks, *(check for part in report.parts for check in part.checks)]
    [one] = [check for check in checks if check.rule == rule]
    return one.state, one.note


def test_a_sound_plugin_is_in_order_by_its_own_name_or_its_parts(checked) -> None:  # type: ignore[no-untyped-def]
    report = checked(HEAD)

    assert report.exit_code == 0 and report.count("kept") == 12  # 4 of the plugin, 3 of the part, 5 rules
    assert report.as_dict()["parts"][0]["settings"] == {"scale": 1.0}
    assert "**in order**: 12 kept" in report.markdown()
    assert checked(HEAD, "plug").parts == checked(HEAD, "reward/mine").parts == report.parts


@pytest.mark.parametrize(
    ("change", "rule", "note"),
    [
        (("from __future__", "import pandas\nfrom __future__"), "loads", "SyntaxError"),
        (("@hookimpl\n", ""), "hooks", "rerankkit_register lacks the @hookimpl decorator"),
        (("from rerankkit", "import numpy\nfrom rerankkit"), "light", "imports numpy: move that into `build`"),
        (
            ("from rerankkit", "import time\nend = time.process_time() + .2\n"
             "while time.process_time() < end: pass\nfrom rerankkit"),
            "quick", " ms",
        ),
        (("    '''What a place is worth.'''\n", ""), "documented", "a string is missing under scale"),
        (("class Settings(PluginConfig):", "class Settings(PluginConfig, extra='allow'):"), "settings", "lets unknown"),
        (("config.scale *", "config.scael *"), "typed_outcomes", "no attribute 'scael' for gold"),
        (("def build(config, info):", "def build(config, info):\n    1 / 0"), "builds", "ZeroDivisionError"),
        (("1 - rollout", "1 + rollout"), "prefers_the_best", "the reversed order gets"),
    ],
)  # fmt: skip
def test_a_fault_is_found_and_named(checked, change: tuple[str, str], rule: str, note: str) -> None:  # type: ignore[no-untyped-def]
    old, new = change
    assert old in HEAD

    report = checked(HEAD.replace(old, new, 1), "plug")

    state, said = found(report, rule)
    assert state == "broken" and note in said
    assert report.exit_code == 1 and "**not in order**" in report.markdown()


def test_a_declared_failure_is_no_fault_until_it_holds(checked) -> None:  # type: ignore[no-untyped-def]
    wrong = HEAD.replace("1 - rollout", "1 + rollout")

    report = checked(wrong, known={"mine.prefers_the_best": "upside down"})

    assert report.exit_code == 0 and found(report, "prefers_the_best")[0] == "known"
    assert checked(HEAD, known={"prefers_the_best": "no more"}).exit_code == 1
    with pytest.raises(UsageError, match=r"--known prefers_best: no part here has such a rule; .*Did you mean"):
        checked(HEAD, known={"prefers_best": "x"})


def test_settings_without_a_default_are_asked_for_and_taken(checked) -> None:  # type: ignore[no-untyped-def]
    needy = HEAD.replace("scale: float = 1.0", "scale: float")

    report = checked(needy)

    assert report.exit_code == 2 and "reward.scale: missing" in report.parts[0].lacks
    assert "not fully tried" in report.markdown()
    assert checked(needy, settings=["scale=2"]).parts[0].settings == {"scale": 2.0}
    assert checked(needy, settings=["scale=2"]).exit_code == 0
    with pytest.raises(UsageError, match=r"--set scael=2: no part here has such a setting; .*Did you mean 'scale'"):
        checked(needy, settings=["scael=2"])


def test_a_teacher_whose_server_is_away_is_not_said_to_be_in_order(checked) -> None:  # type: ignore[no-untyped-def]
    source = HEAD + (
        "\nclass Away:\n    def write(self, examples, info):\n        for example in examples:\n"
        "            yield TraceFailure(example.example_id, 'connection refused')\n\n"
        "@hookimpl\ndef rerankkit_register(register):\n    register.teachers.add('away', Settings, away)\n"
        "\ndef away(config, info):\n    return Away()\n"
    )

    report = checked(source, "away")

    assert found(report, "complete_orders") == (
        "not tried",
        "it wrote no trace; the first failure says: connection refused",
    )
    assert report.exit_code == 0 and "3 not tried" in report.markdown()


def test_unknown_names_are_answered_with_what_there_is() -> None:
    with pytest.raises(PluginError, match=r"no plugin and no part is named 'ndgc'; .*Did you mean 'ndcg'\? Install it"):
        examine("ndgc")


def test_a_part_of_a_file_that_is_broken_is_answered_with_what_broke_it(checked) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PluginError) as caught:
        checked(HEAD.replace("scale: float", "weight: float"))

    known, cause = str(caught.value).splitlines()
    assert known.startswith("no plugin and no part is named 'mine'; known: ") and "--file" not in known
    names = known.partition("known: ")[2].rstrip(".").split(", ")
    assert len(names) == len(set(names)) and "plug" in names
    assert cause.startswith("  plugin plug (/") and cause.endswith(
        "is not in order: reward 'mine': a block keeps 'weight' for itself; rename that setting."
    )


def test_declaring_is_offered_only_for_rules_of_a_contract(checked) -> None:  # type: ignore[no-untyped-def]
    unsaid, upside_down = HEAD.replace("    '''What a place is worth.'''\n", ""), HEAD.replace("1 - roll", "1 + roll")

    assert "--known" in checked(upside_down).markdown()
    assert checked(unsaid).exit_code == 1 and "--known" not in checked(unsaid).markdown()


def test_the_verb_prints_markdown_or_json_and_exits_with_the_verdict(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    file = tmp_path / "plug.py"
    file.write_text(HEAD.replace("1 - rollout", "1 + rollout"))

    plain = CliRunner().invoke(app, ["plugins", "check", "plug", "--file", str(file)])
    known = ["--known", "prefers_the_best=upside down", "--json"]
    as_json = CliRunner().invoke(app, ["plugins", "check", "plug", "--file", str(file), *known])

    assert plain.exit_code == 1 and "| `prefers_the_best` | **broken** |" in plain.output
    assert as_json.exit_code == 0 and json.loads(as_json.output)["contract"] == 1


@pytest.mark.slow
def test_every_shipped_part_is_in_order_or_says_why_not() -> None:
    known = {
        "format.prefers_the_best": "it does not look at the order",
        "reasoning-length.prefers_the_best": "it does not look at the order",
        "citations.prefers_the_best": "it does not look at the order",
        "target-logp.prefers_the_best": "made rollouts have no log-probabilities of choices under the mask",
    }

    report = examine("gr2", known=known)

    faults = [check.note for part in report.parts for check in part.checks if check.state in ("broken", "mended")]
    assert (report.exit_code, faults) == (0, [])


def test_a_fault_that_stops_every_rule_is_told_once(checked) -> None:  # type: ignore[no-untyped-def]
    report = checked(HEAD.replace("config.scale *", "config.scael *"))

    assert found(report, "typed_outcomes")[0] == "broken"
    assert found(report, "same_again") == ("not tried", "for the same reason as `typed_outcomes`")
    assert report.exit_code == 1


def test_a_function_documents_its_settings_in_its_docstring(tmp_path: Path) -> None:
    file = tmp_path / "level.py"
    file.write_text(
        "from rerankkit import hookimpl\n\n\ndef level(rollout, at: float = 1.0):\n    '''Always the same.'''\n"
        "    return at\n\n\n@hookimpl\ndef rerankkit_register(register):\n"
        "    register.rewards.add_function('level', level)\n"
    )

    [part] = examine("level", [str(file)]).parts

    states = {check.rule: (check.state, check.note) for check in part.checks}
    assert states["documented"] == ("broken", "a string is missing under at, or a line of a function's docstring")
    assert states["prefers_the_best"][0] == "broken"
    assert {state for rule, (state, _) in states.items() if rule not in ("documented", "prefers_the_best")} == {"kept"}

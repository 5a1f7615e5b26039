"""A finished run ranks lists from outside: as it ranked its own, whatever comes with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankkit.data.lists import CandidateLists
from rerankkit.errors import DataError, RunFolderError, UsageError
from rerankkit.stages import rank_asks
from rerankkit.stages.rank_asks import Ask, Ranker, config_of, find_policy, make_example, parse_ask, read_asks
from rerankkit.stages.rankings import Rankings
from rerankkit.stages.sids import SidMap
from rerankkit.store import finished_stage, read_json, write_json
from rerankkit.types import Item, Ranking


@pytest.fixture(scope="module")
def ranker(tiny_run: Path) -> Ranker:
    return Ranker.load(tiny_run, "rl", device="cpu")


@pytest.fixture(scope="module")
def lines(tiny_run: Path) -> list[dict[str, Any]]:
    """The run's own test lists as asks, those without their target too."""
    lists = CandidateLists.load(tiny_run / "stages" / "4-candidates").of("test")
    return [
        {"id": one.example_id, "history": one.history, "candidates": one.candidates, "scores": one.scores}
        for one in lists
    ]


@pytest.mark.parametrize("name", ["mid-train", "sft", "rl"])
def test_the_runs_own_test_lists_get_the_runs_own_answers(name: str, tiny_run: Path, lines: list[Any]) -> None:
    own = Rankings.load(finished_stage(tiny_run, f"rank-{name}"))
    assert len(own.rankings) >= 10
    asked = [line for line in lines if line["id"] in own.rankings]

    answers = Ranker.load(tiny_run, name, device="cpu").rank(asked)

    assert [answer.id for answer in answers] == [line["id"] for line in asked]
    for answer, line in zip(answers, asked, strict=True):
        ranking = own.rankings[str(answer.id)]
        assert (answer.order, answer.parse, answer.problem) == (ranking.order, ranking.parse, ranking.problem)
        assert answer.ranking == tuple(line["candidates"][place] for place in ranking.order)
        assert answer.reasoning == own.reasoning[str(answer.id)]
        assert (answer.identity, answer.unknown) == (ranking.identity, ())


def test_an_answer_depends_on_neither_its_neighbours_nor_the_batch(ranker: Ranker, lines: list[Any]) -> None:
    together = {answer.id: answer for answer in ranker.rank(lines)}
    backwards = replace(ranker, evaluate=ranker.evaluate.model_copy(update={"batch_size": 7})).rank(lines[::-1])
    alone = ranker.rank(lines[5:6])

    assert len(together) == len(lines) == 60
    assert {answer.id: answer for answer in backwards} == together
    assert alone == [together[lines[5]["id"]]]


def test_lists_of_any_length_are_ranked(ranker: Ranker, lines: list[Any]) -> None:
    asks = [{**lines[0], "candidates": lines[0]["candidates"][:n], "scores": None} for n in (1, 2, 5)]
    answers = ranker.rank([*asks, {"candidates": lines[0]["candidates"][:3], "history": []}])
    assert [sorted(answer.order) for answer in answers] == [[0], [0, 1], [0, 1, 2, 3, 4], [0, 1, 2]]
    assert answers[0].identity and ranker.rank([]) == []


def test_without_an_id_an_ask_is_called_by_its_place(ranker: Ranker, lines: list[Any], tmp_path: Path) -> None:
    bare = {"history": lines[0]["history"], "candidates": lines[0]["candidates"]}
    assert [answer.id for answer in ranker.rank([bare, {**bare, "id": 70}, {**bare, "id": "70"}])] == [0, 70, "70"]

    (tmp_path / "asks.jsonl").write_text(f"{json.dumps(bare)}\n\n{json.dumps(bare)}\n")
    assert [(ask.ask_id, ask.where.rpartition("/")[2]) for ask in read_asks(tmp_path / "asks.jsonl")] == [
        (1, "asks.jsonl:1"),
        (3, "asks.jsonl:3"),  # lines are counted as an editor does
    ]


# --- items the run does not know --------------------------------------------------------------------------------------


def test_unknown_items_are_refused_by_name(ranker: Ranker, lines: list[Any]) -> None:
    first, *rest = lines[0]["candidates"]
    asks = [lines[1], {"history": lines[0]["history"], "candidates": [first, "nope", *rest, "nor"]}]
    with pytest.raises(DataError) as refused:
        ranker.rank(asks)
    assert str(refused.value).startswith("asks[1]: candidates[1]: 'nope' is no item of, and comes without a title for")
    assert "Nor is 1 other" in str(refused.value) and "unknown = last" in str(refused.value)

    with pytest.raises(DataError, match=r"asks\[0\]: history\[0\]: 'nope' is no item of .*tiny, which has 240"):
        ranker.rank([{"history": [{"item_id": "nope", "title": "A comb"}], "candidates": rest}])


def test_unknown_items_go_last_in_the_given_order(ranker: Ranker, lines: list[Any]) -> None:
    a, b, *rest = lines[0]["candidates"]
    plain = ranker.rank([{**lines[0], "candidates": [a, b, *rest[:2]], "scores": None}])[0]
    mixed = ["new1", a, b, "new2", *rest[:2]]
    ask = {"history": [*lines[0]["history"], "new3"], "candidates": mixed, "scores": [6, 5, 4, 3, 2, 1]}

    answer = ranker.rank([ask], "last")[0]

    assert answer.ranking == (*plain.ranking, "new1", "new2")
    assert answer.order == tuple(mixed.index(item_id) for item_id in answer.ranking)
    assert (answer.parse, answer.reasoning, answer.identity) == ("ok", plain.reasoning, False)
    assert answer.unknown == ("new3", "new1", "new2")

    lost = ranker.rank([{"history": ["new3"], "candidates": ["new2", "new1"]}, ask], "last")
    assert (lost[0].ranking, lost[0].parse, lost[0].identity) == (("new2", "new1"), "failed", True)
    assert lost[0].problem == "no candidate is known" and replace(lost[1], id=0) == answer


def test_unknown_items_are_ranked_by_their_text(ranker: Ranker, lines: list[Any], tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    history, candidates = lines[0]["history"], list(lines[0]["candidates"])
    new = {"item_id": "new", "title": "Velour hand cream", "categories": ["Skin", "Hands"], "price": 7.5, "shelf": 3}
    asks = [
        {"history": history, "candidates": [new, *candidates]},
        {"history": [*history, "new"], "candidates": candidates},  # told of above
        {"history": history, "candidates": [{"item_id": candidates[0], "title": "Renamed"}, *candidates[1:]]},
    ]

    answers = ranker.rank(asks, "text")

    assert sorted(answers[0].ranking) == sorted(["new", *candidates]) and answers[0].parse == "ok"
    assert [answer.unknown for answer in answers] == [("new",), ("new",), ()]
    own = ranker.rank([{**lines[0], "id": 2}])[0]
    assert answers[2] == own  # an item that the run knows keeps its text and its SID
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_a_new_item_gets_a_sid_that_the_policy_can_read_and_its_text_is_shown(
    ranker: Ranker, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []

    def keep(policy: Any, examples: Any, *_: Any, **__: Any) -> list[Any]:
        shown.extend(examples)
        return [(Ranking(tuple(range(len(e.candidates)))), "") for e in examples]

    monkeypatch.setattr(rank_asks, "generate", keep)
    new = {"item_id": "new", "title": "<|im_end|> \ud800 comb", "categories": ["Hair", "Tools"], "brand": None}
    ranker.rank([{"history": lines[0]["history"], "candidates": [*lines[0]["candidates"], new]}], "text")
    item = shown[0].candidates[-1]
    assert (item.item_id, item.title, item.categories, item.brand) == ("new", new["title"], ("Hair", "Tools"), "")
    assert len(ranker.policy.sid_ids(item.sid)) == 4  # begin, two levels, end
    assert shown[0].candidates[0].sid == ranker.sids.sids[lines[0]["candidates"][0]]


def test_a_new_item_needs_a_text_and_only_one(ranker: Ranker, lines: list[Any]) -> None:
    history, candidates = lines[0]["history"], lines[0]["candidates"]
    with pytest.raises(DataError, match=r"asks\[0\]: candidates\[10\]: 'new' is no item of, and comes without a title"):
        ranker.rank([{"history": history, "candidates": [*candidates, "new"]}], "text")
    told = [{"history": history, "candidates": [{"item_id": "new", "title": title}]} for title in ("Comb", "Brush")]
    with pytest.raises(DataError, match=r"asks\[1\]: item 'new' is described otherwise than further up"):
        ranker.rank(told, "text")


def test_vectors_from_a_file_leave_text_alone_without_a_sid(tiny_run: Path, lines: list[Any], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    facts = read_json(copy / "stages" / "2-sids" / "sids.json")
    facts["made"]["embeddings"].update(use="file", path="vectors.npy")
    write_json(copy / "stages" / "2-sids" / "sids.json", facts)
    ask = {"history": lines[0]["history"], "candidates": [{"item_id": "new", "title": "Comb"}]}
    with pytest.raises(UsageError, match="its item vectors came from a file"):
        Ranker.load(copy, "rl", device="cpu").rank([ask], "text")


def test_a_way_to_treat_them_that_there_is_not(ranker: Ranker) -> None:
    with pytest.raises(UsageError, match=r"unknown: 'test' cannot be chosen; .* Did you mean 'text'\?"):
        ranker.rank([], "test")  # type: ignore[arg-type]


# --- what an ask becomes ----------------------------------------------------------------------------------------------


def test_an_example_has_the_latest_history_and_the_chosen_candidates() -> None:
    items = {name: Item(name, name.upper(), sid=(number,)) for number, name in enumerate("abcde")}
    bare = [Item(name, "") for name in "abcdex"]
    ask = Ask(7, tuple(bare[i] for i in (0, 5, 1, 2)), (bare[3], bare[5], bare[4]), (3.0, 2.0, 1.0))

    example = make_example(ask, [0, 2], items, max_history=2)

    assert (example.example_id, example.history) == ("7", (items["b"], items["c"]))
    assert (example.candidates, example.relevance) == ((items["d"], items["e"]), (0.0, 0.0))


def test_sids_in_the_reasoning_are_told_apart(
    ranker: Ranker, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    history, candidates = lines[0]["history"], lines[0]["candidates"]
    sids = [ranker.sids.surface.text(ranker.sids.sids[item_id]) for item_id in (history[-1], candidates[3])]
    said = f"after {sids[0]} comes {sids[1]}, and {sids[1]} fits {ranker.sids.surface.text((99, 99))}"
    monkeypatch.setattr(rank_asks, "generate", lambda *_, **__: [(Ranking(tuple(range(10))), said)])
    answer = ranker.rank(lines[:1])[0]
    assert answer.reasoning == said and answer.identity
    assert answer.cited == {sids[0]: history[-1], sids[1]: candidates[3]}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "asks.jsonl:2: is not JSON (Expecting property name enclosed in double quotes"),
        ("\xff", "asks.jsonl:2: is not JSON ("),
        ("[" * 100_000, "asks.jsonl:2: is not JSON ("),
        ("[]", "asks.jsonl:2: is no object; an ask has the keys history and candidates."),
        ('{"candidates": ["a"]}', "asks.jsonl:2: history: this key is missing; given: candidates."),
        (
            '{"histroy": [], "candidates": ["a"]}',
            "asks.jsonl:2: history: this key is missing; 'histroy' may be meant.",
        ),
        ('{"history": []}', "asks.jsonl:2: candidates: this key is missing"),
        (
            '{"history": [], "candidates": []}',
            "asks.jsonl:2: candidates: is empty; give at least one item",
        ),
        ('{"history": "a", "candidates": ["a"]}', "asks.jsonl:2: history: 'a' cannot be used: "),
        ('{"history": [], "candidates": ["a", null]}', "asks.jsonl:2: candidates[1]: None cannot be used: "),
        ('{"history": [true], "candidates": ["a"]}', "asks.jsonl:2: history[0].item_id: True cannot be used: "),
        ('{"history": [], "candidates": [" "]}', "asks.jsonl:2: candidates[0].item_id: "),
        (
            '{"history": [], "candidates": [{"title": "x"}]}',
            "asks.jsonl:2: candidates[0].item_id: this key is missing; given: title",
        ),
        (
            '{"history": [], "candidates": [{"item_id": "a", "title": 5}]}',
            "asks.jsonl:2: candidates[0].title: 5 cannot be used: Input should be a valid string.",
        ),
        ('{"history": [], "candidates": ["a", 7, "7"]}', "asks.jsonl:2: candidates[2]: '7' stands in the list twice."),
        ('{"history": [], "candidates": ["a"], "scores": [1, 2]}', "asks.jsonl:2: scores: 2 for 1 candidates."),
        ('{"history": [], "candidates": ["a"], "scores": [NaN]}', "asks.jsonl:2: scores[0]: nan cannot be used: "),
        ('{"history": [], "candidates": ["a"], "id": 1.5}', "asks.jsonl:2: id: 1.5 cannot be used: an id is a string"),
    ],
)
def test_a_bad_line_is_named_with_its_key(line: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "asks.jsonl"
    file.write_bytes(b'{"history": [], "candidates": ["a"], "own": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError) as refused:
        read_asks(file)
    assert str(refused.value).removeprefix(f"{tmp_path}/").startswith(problem)


def test_a_file_without_asks(tmp_path: Path) -> None:
    (tmp_path / "asks.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no ask"):
        read_asks(tmp_path / "asks.jsonl")
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)"):
        read_asks(tmp_path / "absent.jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "history", "candidates", "scores", "item_id", "title"]), inner)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_an_ask_or_a_clear_error(value: Any) -> None:
    problem, ask = "", None
    try:
        ask = parse_ask(value, "asks.jsonl:9", 9)
    except DataError as error:
        problem = str(error)
    if ask is None:
        assert problem.startswith("asks.jsonl:9: ")
    else:
        assert len({item.item_id for item in ask.candidates}) == len(ask.candidates) >= 1


def test_what_does_not_fit_the_policy_is_named_before_anything_is_ranked(
    ranker: Ranker, lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_asks, "generate", lambda *_, **__: pytest.fail("nothing may be ranked"))
    long = {"history": [], "candidates": list(ranker.sids.sids)[:40]}
    # 40 SIDs of 4 tokens, with what stands between them: far more than the run's 100
    with pytest.raises(DataError, match=r"asks\[1\]: max_new_tokens: 100 is too small; a list of 40 candidates"):
        ranker.rank([lines[0], long])
    longer = {"history": [], "candidates": list(ranker.sids.sids)}
    with pytest.raises(DataError, match=r"asks\[0\]: policy: a sequence of \d+ tokens, but llama has 1024 positions"):
        ranker.rank([longer])


def test_by_place_with_evidence_the_runs_own_lists_get_its_own_answers(placed_run: Path) -> None:
    lists = CandidateLists.load(finished_stage(placed_run, "candidates")).of("test")
    asks = {
        one.example_id: {"id": one.example_id, "history": one.history, "candidates": one.candidates} for one in lists
    }
    for name in ("mid-train", "sft", "rl"):
        own = Rankings.load(finished_stage(placed_run, f"rank-{name}"))
        answers = Ranker.load(placed_run, name, device="cpu").rank([asks[key] for key in own.rankings])
        assert {answer.id: answer.order for answer in answers} == {key: r.order for key, r in own.rankings.items()}
        assert {answer.id: answer.reasoning for answer in answers} == own.reasoning


def test_the_runs_interactions_are_read_once_for_all_calls(placed_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(placed_run, tmp_path / "run"))
    ranker = Ranker.load(run, "sft", device="cpu")
    every = list(ranker.sids.sids)
    line = {"history": every[:3], "candidates": every[3:8]}
    first = ranker.rank([line])
    (run / "stages" / "1-data" / "histories.parquet").unlink()
    assert ranker.rank([line]) == first


def test_more_candidates_than_places_are_named_before_anything_is_ranked(
    placed_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = list(SidMap.load(finished_stage(placed_run, "sids")).sids)[:12]
    asks: list[dict[str, Any]] = [
        {"history": [], "candidates": every[:3]},
        {"id": "long", "history": [], "candidates": every},
    ]
    # mid-training ranks by SIDs, and needs no places
    _, answer = Ranker.load(placed_run, "mid-train", device="cpu").rank(asks)
    assert sorted(answer.order) == list(range(12))
    monkeypatch.setattr(rank_asks, "generate", lambda *_, **__: pytest.fail("nothing may be ranked"))
    with pytest.raises(DataError, match=r"asks\[1\]: long: 12 candidates, but the policy .* knows 10 places"):
        Ranker.load(placed_run, "rl", device="cpu").rank(asks)


# --- which policy -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def gone(run: Path, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(run / "stages" / stage)


def test_a_run_ranks_on_a_machine_that_has_little_of_it(
    copied: Path, lines: list[Any], ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [path.name for path in (copied / "stages").iterdir()]
    gone(copied, *(name for name in stages if name not in ("1-data", "2-sids", "7-rl")))
    (copied / "stages" / "1-data" / "histories.parquet").unlink()
    monkeypatch.chdir(copied.parent)
    assert Ranker.load("run", "rl", device="cpu").rank(lines[:3]) == ranker.rank(lines[:3])


def test_exported_is_the_gates_choice_or_the_last_that_is_finished(copied: Path) -> None:
    stages = copied / "stages"
    gone(copied, *(path.name for path in stages.glob("*-gate")))
    assert find_policy(copied, "exported") == ("rl", "generate", stages / "7-rl")
    for chosen, how in (("mid-train", "score"), ("sft", "generate"), ("rl@4", "generate")):
        shutil.copytree(stages / "6-sft", stages / "8-gate", dirs_exist_ok=True)
        write_json(stages / "8-gate" / "gate.json", {"exported": chosen, "how": how})
        assert find_policy(copied, "exported") == (chosen, how, stages / "8-gate")
    gone(copied, "8-gate", "7-rl")
    assert find_policy(copied, "exported") == ("sft", "generate", stages / "6-sft")
    assert find_policy(copied, "mid-train") == ("mid-train", "score", stages / "3-midtrain")
    gone(copied, "6-sft")
    assert find_policy(copied, "exported")[0] == "mid-train"
    with pytest.raises(RunFolderError, match=r"its stage rl is still to do; `rerankkit run .*config.json --until rl`"):
        find_policy(copied, "rl")
    gone(copied, "3-midtrain")
    with pytest.raises(RunFolderError, match="its stage midtrain is still to do"):
        find_policy(copied, "exported")
    with pytest.raises(UsageError, match=r"policy: nothing is named 'slt'; .* Did you mean 'sft'\?"):
        find_policy(copied, "slt")


def test_a_policy_of_sids_that_are_gone_is_not_used(copied: Path) -> None:
    """As a run looks that was changed and stopped: new SIDs and a new mid-training, the rest as it was before."""
    record = read_json(copied / "stages" / "2-sids" / "stage.json")
    write_json(copied / "stages" / "2-sids" / "stage.json", {**record, "fingerprint": "other"})
    with pytest.raises(RunFolderError, match=r"its stage rl was made from another \w+ than the one it holds now"):
        find_policy(copied, "rl")
    record = read_json(copied / "stages" / "3-midtrain" / "stage.json")
    write_json(
        copied / "stages" / "3-midtrain" / "stage.json",
        {**record, "fingerprint": "new", "inputs": {**record["inputs"], "sids": "other"}},
    )
    assert find_policy(copied, "exported")[0] == "mid-train"


def test_the_runs_settings_serve_and_neither_its_plugins_nor_its_device(copied: Path) -> None:
    config = read_json(copied / "config.json")
    config["optimizer"] = {"use": "nobody-has-it"}
    config["device"] = "cuda:3"
    config["data"] = {"use": "tables", "folder": "gone", "max_history": 4}
    write_json(copied / "config.json", config)
    found = config_of(copied, {"batch_size": 3})
    assert (found.seed, found.device, found.data.max_history) == (3, "auto", 4)
    assert (found.evaluate.max_new_tokens, found.evaluate.batch_size, found.policy.threads) == (100, 3, 1)


def test_sids_are_those_of_the_run(ranker: Ranker, tiny_run: Path) -> None:
    assert dict(ranker.sids.sids) == dict(SidMap.load(tiny_run / "stages" / "2-sids").sids)

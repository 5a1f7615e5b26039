"""`rerankkit sids add` and `rerankkit sids show`, as a user calls them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from rerankkit.cli import main
from rerankkit.pipeline import Pipeline
from rerankkit.stages.sids import SidMap, SidTable
from rerankkit.store import write_json

Call = Callable[..., tuple[int, str, str]]
RUN = {
    "data": {"num_users": 60, "embeddings": {"dim": 16}},
    "tokenizer": {"use": "residual-kmeans", "levels": 2, "codes": 64, "iterations": 3},
}
BRITTLE = """
from rerankkit import PluginConfig, hookimpl
import numpy as np

class Config(PluginConfig):
    \"\"\"Knows whom it was fitted on, and nobody else.\"\"\"

class Brittle:
    codebook_sizes = (300,)
    def fit(self, catalog): self.codes = {item.item_id: [n] for n, item in enumerate(catalog.items)}
    def encode(self, catalog): return np.array([self.codes[item.item_id] for item in catalog.items])
    def save(self, folder): pass
    def load(self, folder): self.codes = {}

@hookimpl
def rerankkit_register(register):
    register.tokenizers.add("brittle", Config, lambda config, info: Brittle())
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose SIDs are drawn. Shared: tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "old"
    Pipeline(config=RUN).run(folder, until="sids", progress=False)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """`call("show", run)` -> exit code, stdout, stderr; the current directory is an empty one."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rerankkit", "sids", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return call


def table(old: Path, name: str = "more.csv") -> Path:
    """24 new items that are titled as old ones are, and two old ones."""
    known = pd.read_parquet(old / "stages" / "1-data" / "items.parquet")
    rows = [{"item_id": f"new{n}", "title": f"{title} travel"} for n, title in enumerate(known["title"][::10])]
    rows += [{"item_id": item_id, "title": "renamed"} for item_id in known["item_id"][:2]]
    pd.DataFrame(rows).to_csv(name, index=False)
    return Path(name)


def test_a_tenth_of_new_items_is_added_and_no_sid_changes(call: Call, old: Path) -> None:
    before = SidMap.load(old / "stages" / "2-sids")
    code, out, err = call("add", old, table(old), "--out", "ext")
    first, second = before.table.item_ids[:2]
    assert (code, err) == (0, "")
    assert out == (
        "24 new items have a SID now; 264 items have one.\n"
        f"2 items had one already and keep it: {first}, {second}\n"
        'A run takes them over with sids.keep = "ext".\n'
    )
    after = SidMap.load("ext")
    assert {item_id: after.sids[item_id] for item_id in before.sids} == before.sids
    assert len(set(after.sids.values())) == 264 and after.scorecard["num_items"] == 264
    # what was written is a folder of SIDs like any other
    code, out, _ = call("add", "ext", "more.csv", "--out", "again", "--json")
    said = json.loads(out)
    assert (code, said["new"], len(said["known"]), said["sharing"], said["items"]) == (0, [], 26, [], 264)
    assert SidMap.load("again").sids == after.sids
    Pipeline(config={**RUN, "sids": {"keep": "again"}}).run("new", until="sids", progress=False)
    assert SidMap.load("new/stages/2-sids").sids == after.sids


def test_new_items_that_must_share_are_named(call: Call, tmp_path: Path) -> None:
    Pipeline(config=RUN, overrides=["sids.min_unique=0", "tokenizer.codes=16", "tokenizer.on_full=share"]).run(
        "run", until="sids", progress=False
    )
    pd.DataFrame({"item_id": [f"n{n}" for n in range(60)], "title": "Velis Luxe Soap"}).to_csv("more.csv", index=False)
    said = json.loads(call("add", "run", "more.csv", "--out", "ext", "--json")[1])
    sids = SidMap.load("ext")
    holders = {item_id: len(sids.items_of(sids.sids[item_id])) for item_id in said["new"]}
    assert said["sharing"] == [item_id for item_id, count in holders.items() if count > 1]
    assert len(said["sharing"]) >= 44  # 60 equal items under a prefix with room for 16
    _, out, _ = call("add", "run", "more.csv", "--out", "ext2")
    assert f"{len(said['sharing'])} new items share theirs with another item: n" in out


def test_an_added_folder_remembers_how_tables_are_read(call: Call, tmp_path: Path) -> None:
    pd.DataFrame({"item": [f"i{n}" for n in range(30)], "title": [f"soap {n}" for n in range(30)]}).to_csv("items.csv")
    rows = [{"user_id": f"u{n % 9}", "item_id": f"i{n}", "timestamp": n} for n in range(30)]
    pd.DataFrame(rows).to_csv("interactions.csv", index=False)
    data = {"use": "tables", "folder": ".", "k_core": 0, "item_columns": {"item_id": "item"}, "embeddings": {"dim": 8}}
    config = {"data": data, "tokenizer": {"use": "residual-kmeans", "levels": 2, "codes": 16}}
    Pipeline(config=config).run("mapped", until="sids", progress=False)
    for step, source in enumerate(("mapped", "more0", "more1/")):
        pd.DataFrame({"item": [f"n{step}"], "title": [f"gel {step}"]}).to_csv("new.csv", index=False)
        code, _, err = call("add", source, "new.csv", "--out", f"more{step}")
        assert (code, err) == (0, "")
    assert len(SidMap.load("more2").sids) == 33


def test_a_beginning_that_nobody_has(call: Call, old: Path) -> None:
    taken = {tuple(sid) for sid in SidMap.load(old / "stages" / "2-sids").sids.values()}
    free = next(code for code in range(64) if (0, code) not in taken)
    code, out, err = call("show", old, f"0,{free}")
    assert (code, err) == (0, "") and out.startswith(f"0 {free}  0 items")


def test_what_cannot_be_added_exits_2_and_writes_nothing(call: Call, old: Path, tmp_path: Path) -> None:
    more = table(old)
    for words, problem in (
        ((old, "absent.csv"), "absent.csv: no such file"),
        ((tmp_path, more), "is not a run folder"),
        (("nowhere", more), "nowhere: no such folder"),
        ((old, more, "tokenizer.codes=7"), "was drawn with tokenizer.codes = 64, and this config says 7"),
        ((old, more, "data.embeddings.use=file", "data.embeddings.path=x.npy"), 'data.embeddings.use = "tfidf"'),
        ((old, more, "data.item_columns.title=name"), "there is no such column"),
    ):
        code, out, err = call("add", *words, "--out", "ext")
        assert (code, out) == (2, "") and problem in err, err
    assert not Path("ext").exists()
    Path("ext").mkdir()
    (Path("ext") / "mine.txt").touch()
    assert call("add", old, more, "--out", "ext")[::2] == (
        2,
        "error: ext is there already; name a new or empty folder with --out.\n",
    )


def test_a_plugin_that_breaks_on_new_items_is_named(call: Call, tmp_path: Path) -> None:
    Path("brittle.py").write_text(BRITTLE)
    config = {"data": RUN["data"], "tokenizer": {"use": "brittle"}, "plugin_files": ["brittle.py"]}
    Pipeline(config=config).run("run", until="sids", progress=False)
    code, out, err = call("add", "run", table(Path("run")), "--out", "ext")
    assert (code, out) == (1, "") and not Path("ext").exists()
    whose = r"tokenizer 'brittle' \(plugin brittle, brittle\.py \w+\)"
    assert re.fullmatch(rf"error: {whose}: KeyError: 'new0'\. Nothing was written\.\n", err)


def test_sids_are_looked_up_in_both_directions(call: Call, old: Path) -> None:
    sids = SidMap.load(old / "stages" / "2-sids")
    assert call("show", old) == (0, "240 items, codebooks 64 x 64, tokenizer residual-kmeans\n", "")
    item_id = sids.table.item_ids[5]
    sid = sids.sids[item_id]
    spelled, listed = sids.surface.text(sid), ",".join(map(str, sid))
    said = [json.loads(call("show", old, word, "--json")[1])[0] for word in (item_id, spelled, listed)]
    title = pd.read_parquet(old / "stages" / "1-data" / "items.parquet")["title"][5]
    assert (said[0]["sid"], said[0]["text"], said[0]["title"]) == (list(sid), spelled, title)
    assert (
        said[1]
        == said[2]
        == {"sid": list(sid), "num_items": 1, "items": [{"item_id": item_id, "sid": list(sid), "title": title}]}
    )
    near = [row["item_id"] for row in said[0]["items"]]
    assert item_id not in near and near == [other for other in sids.items_under(sid[:1]) if other != item_id][:5]
    code, out, _ = call("show", old, item_id, f"{sid[0]},")
    assert code == 0 and out.startswith(f"{item_id}  {title}\n    {sid[0]} {sid[1]}    {spelled}\n")
    assert f"\n{sid[0]}  {len(sids.items_under(sid[:1]))} items\n" in out


def test_what_cannot_be_looked_up_exits_2(call: Call, old: Path) -> None:
    code, out, err = call("show", old, "nobody")
    assert (code, out) == (2, "") and err.startswith(
        "error: 'nobody' is no item that has a SID, and no SID; an item is"
    )
    assert "'64,0': no SID begins so; codebooks are 64 x 64, codes from 0." in call("show", old, "64,0")[2]
    assert "no SID begins so" in call("show", old, "1,2,3")[2]
    assert call("show", "nowhere")[0] == 2


def test_an_item_that_is_called_as_a_sid_is_the_item(call: Call) -> None:
    SidMap(SidTable(["5", "7,1"], [[1, 2], [7, 1]]), (8, 8), {}).save(Path())  # type: ignore[arg-type]
    assert json.loads(call("show", ".", "7,1", "5", "7,", "--json")[1]) == [
        {"item_id": "7,1", "sid": [7, 1], "text": "<|sid_begin|><s_a_7><s_b_1><|sid_end|>", "items": [], "title": ""},
        {"item_id": "5", "sid": [1, 2], "text": "<|sid_begin|><s_a_1><s_b_2><|sid_end|>", "items": [], "title": ""},
        {"sid": [7], "num_items": 1, "items": [{"item_id": "7,1", "sid": [7, 1], "title": ""}]},
    ]


def test_titles_are_shown_without_what_a_terminal_obeys(call: Call) -> None:
    for name in ("1-data", "2-sids"):
        folder = Path("run", "stages", name)
        folder.mkdir(parents=True)
        write_json(folder / "stage.json", {"fingerprint": "f"})
    Path("run", ".lock").touch()
    SidMap({"a": (0,)}, (2,), {}).save(Path("run", "stages", "2-sids"))
    items = pd.DataFrame({"item_id": ["a"], "title": ["\x1b[31mred\nsoap"]})
    items.to_parquet(Path("run", "stages", "1-data", "items.parquet"))
    assert call("show", "run", "a")[1] == "a  (31mred soap\n    0    <|sid_begin|><s_a_0><|sid_end|>\n"


def test_looking_up_needs_no_torch(old: Path) -> None:
    code = f"""import atexit, sys
atexit.register(lambda: print({{"torch", "transformers"}} & set(sys.modules)))
sys.argv = ["rerankkit", "sids", "show", {str(old)!r}, "item0"]
from rerankkit.cli import main
main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("item0  ") and done.stdout.endswith("set()\n")

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rerankkit.errors import RunFolderError, UsageError
from rerankkit.stages.compare import UserRanking, compare_runs, load_rankings, save_rankings
from rerankkit.types import Item, Parse, Ranking, RerankExample

KEEP, SWAP = Ranking((0, 1, 2)), Ranking((1, 0, 2))


def users(*rankings: Ranking, start: int = 0) -> list[UserRanking]:
    """Users whose target is given second."""
    return [UserRanking(f"e{start + i}", ranking, (0.0, 1.0, 0.0)) for i, ranking in enumerate(rankings)]


def about(digest: str = "d", protocol: str = "p") -> dict[str, Any]:
    return {"lists_digest": digest, "protocol": protocol, "condition": "c"}


def test_rankings_come_back_as_they_were_saved(tmp_path: Path) -> None:
    example = RerankExample("e0", "u", (), tuple(Item(str(i), "t") for i in range(3)), (0.0, 0.5, 1.0))
    lost = Ranking((0, 1, 2), Parse.FAILED)
    save_rankings(tmp_path / "rankings.parquet", [example], {"sft": [lost], "rl": [Ranking((2, 0, 1))]})
    assert load_rankings(tmp_path / "rankings.parquet") == {
        "sft": [UserRanking("e0", lost, (0.0, 0.5, 1.0))],
        "rl": [UserRanking("e0", Ranking((2, 0, 1)), (0.0, 0.5, 1.0))],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["rankings.parquet"]


def test_equal_rankings_give_equal_bytes(tmp_path: Path) -> None:
    example = RerankExample("e0", "u", (), (Item("1", "t"),), (1.0,))
    for name in "ab":
        save_rankings(tmp_path / name, [example], {"rl": [Ranking((0,))]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no rankings here"):
        load_rankings(tmp_path / "rankings.parquet")
    (tmp_path / "rankings.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(RunFolderError, match="damaged"):
        load_rankings(tmp_path / "rankings.parquet")


def test_an_order_that_is_no_permutation_is_damage(tmp_path: Path) -> None:
    example = RerankExample("e0", "u", (), (Item("1", "t"), Item("2", "t")), (1.0, 0.0))
    save_rankings(tmp_path / "r", [example], {"rl": [Ranking((0, 0))]})
    with pytest.raises(RunFolderError, match="e0"):
        load_rankings(tmp_path / "r")


def test_b_minus_a_is_paired_by_user_and_not_by_row() -> None:
    a = users(KEEP, KEEP, SWAP, SWAP)
    b = list(reversed(users(KEEP, KEEP, SWAP, SWAP)))
    found = compare_runs(about(), about(), {"rl": a}, {"rl": b}, samples=50)
    # The same answers in another row order: every paired difference is 0, so the interval has no width.
    assert {(c["difference"], c["low"], c["high"]) for c in found["comparisons"]} == {(0.0, 0.0, 0.0)}


def test_the_difference_is_b_minus_a() -> None:
    found = compare_runs(
        about(), about(), {"rl": users(KEEP, KEEP), "sft": users(KEEP, KEEP)}, {"rl": users(SWAP, SWAP)}, samples=50
    )
    lift = next(c for c in found["comparisons"] if c["metric"] == "R@1")
    assert (lift["name"], lift["difference"], lift["low"]) == ("rl", 1.0, 1.0)  # from rank 2 to rank 1 for both
    assert found["only_in"] == {"a": ["sft"], "b": []}
    assert (found["n"], found["notes"]) == (2, [])


def test_other_users_on_other_lists_are_refused_with_what_differs() -> None:
    with pytest.raises(UsageError, match=r"2 are shared .*lists_digest differs: 'd' against 'x'.*protocol differs"):
        compare_runs(about(), about("x", "q"), {"rl": users(KEEP, KEEP)}, {"rl": users(KEEP, KEEP, KEEP)})
    with pytest.raises(UsageError, match="0 are shared"):
        compare_runs(about(), about(), {"rl": users(KEEP)}, {"rl": users(KEEP, start=5)})


def test_fewer_users_of_equal_lists_compare_on_the_shared_ones() -> None:
    found = compare_runs(about(), about(), {"rl": users(KEEP, KEEP)}, {"rl": users(SWAP, SWAP, KEEP)}, samples=50)
    assert found["n"] == 2


def test_equal_users_on_other_lists_compare_with_a_note() -> None:
    found = compare_runs(about(), about("x"), {"rl": users(KEEP)}, {"rl": users(SWAP)}, samples=50)
    assert any("pre-ranker and re-ranker together" in note for note in found["notes"])


def test_runs_without_a_common_system_are_refused() -> None:
    with pytest.raises(UsageError, match="share no system"):
        compare_runs(about(), about(), {"rl": users(KEEP)}, {"sft": users(KEEP)})


def test_a_user_ranked_twice_is_damage() -> None:
    with pytest.raises(UsageError, match="twice"):
        compare_runs(about(), about(), {"rl": users(KEEP) * 2}, {"rl": users(KEEP)})

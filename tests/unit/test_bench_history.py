"""The history of bench: what is kept, found again, bounded, and what damage does."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmrun.bench.history as module
from llmrun.bench.history import History, new_id
from llmrun.bench.record import from_dict, to_dict
from llmrun.bench.types import Measure
from llmrun.errors import LlmrunError, NotFoundError, UsageError
from tests.fakes.bench_runs import hostile_run, make_run


def test_what_was_added_is_found_again(tmp_path: Path):
    history = History(tmp_path / "state")
    assert history.list() == ()
    assert not history.path.parent.exists()
    first, second = make_run("20260101-000000-aaaa"), make_run("20260101-000001-bbbb", factor=2)
    assert history.add(first)
    assert history.add(second)
    other = History(tmp_path / "state")
    assert other.list() == (second, first)
    assert other.list(n=1) == (second,)
    assert other.get("last") == other.get("last~0") == second
    assert other.get("last~1") == first
    assert other.get("20260101-000000-aaaa") == first
    assert other.get("20260101-000001") == second


def test_models_apart(tmp_path: Path):
    history = History(tmp_path)
    history.add(make_run("a", model="one", model_sha256="1" * 64))
    history.add(make_run("b", model="two", model_sha256=None))
    assert [run.id for run in history.list("one")] == ["a"]
    assert [run.id for run in history.list("1" * 64)] == ["a"]
    assert [run.id for run in history.list("two")] == ["b"]
    assert history.list("none' OR 1=1 --") == ()


def test_what_is_not_there(tmp_path: Path):
    history = History(tmp_path)
    for reference in ("last", "x", "", "last~9"):
        with pytest.raises(NotFoundError):
            history.get(reference)
    history.add(make_run("20260101-000000-aaaa"))
    for reference in ("last~1", "2026%", "_", "", "aaaa", "\udcff"):
        with pytest.raises(NotFoundError):
            history.get(reference)


def test_a_prefix_of_several(tmp_path: Path):
    history = History(tmp_path)
    for name in ("2026-a", "2026-b", "2026-c", "2026-d", "2026-e", "2026"):
        history.add(make_run(name))
    with pytest.raises(UsageError) as raised:
        history.get("2026-")
    assert raised.value.why == "2026-e, 2026-d, 2026-c, …"
    assert history.get("2026").id == "2026"


def test_the_same_id_is_replaced(tmp_path: Path):
    history = History(tmp_path)
    history.add(make_run("a", is_complete=False))
    history.add(make_run("a"))
    assert [run.is_complete for run in history.list()] == [True]


def test_the_oldest_go(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RUNS", 3)
    history = History(tmp_path)
    for name in "abcde":
        history.add(make_run(name))
    assert [run.id for run in history.list()] == ["e", "d", "c"]


def test_what_is_too_large_is_not_kept(tmp_path: Path):
    notices: list[str] = []
    history = History(tmp_path, notices.append)
    huge = Measure("x", "s", tuple(float(n) for n in range(200_000)), False)
    assert not history.add(make_run(measures=(huge,)))
    assert len(notices) == 1


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_damaged_file_is_set_aside(tmp_path: Path, content):
    notices: list[str] = []
    history = History(tmp_path, notices.append)
    history.path.write_bytes(content)
    journal = tmp_path / f"{history.path.name}-journal"
    journal.write_bytes(b"old")
    assert history.list() == ()
    assert len(notices) == 1
    assert not journal.exists()
    (aside,) = (p for p in tmp_path.glob("*.damaged-*") if not p.name.endswith("-journal"))
    assert aside.read_bytes() == content
    assert str(aside) in notices[0]
    assert history.add(make_run("a"))
    assert [run.id for run in history.list()] == ["a"]
    assert len(notices) == 1


def test_damage_found_while_adding_does_not_lose_the_run(tmp_path: Path):
    history = History(tmp_path)
    history.add(make_run("a"))
    content = bytearray(history.path.read_bytes())
    content[20:] = b"\xa5" * (len(content) - 20)
    history.path.write_bytes(content)
    assert history.add(make_run("b"))
    assert [run.id for run in history.list()] == ["b"]


def test_a_foreign_table_is_damage(tmp_path: Path):
    history = History(tmp_path)
    with sqlite3.connect(history.path) as connection:
        connection.execute("CREATE TABLE runs (x)")
    connection.close()
    assert history.list() == ()
    assert history.add(make_run("a"))
    assert [run.id for run in history.list()] == ["a"]


def test_a_newer_file_is_left_alone(tmp_path: Path):
    notices: list[str] = []
    history = History(tmp_path, notices.append)
    history.add(make_run("a"))
    with sqlite3.connect(history.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = history.path.read_bytes()
    with pytest.raises(LlmrunError, match="newer"):
        history.list()
    assert not history.add(make_run("b"))
    assert len(notices) == 1
    assert history.path.read_bytes() == before


def test_a_locked_file_is_no_damage(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_WAIT_S", 0.05)
    notices: list[str] = []
    history = History(tmp_path, notices.append)
    history.add(make_run("a"))
    other = sqlite3.connect(history.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert not history.add(make_run("b"))
    with pytest.raises(LlmrunError):
        history.list()
    other.execute("COMMIT")
    other.close()
    assert [run.id for run in history.list()] == ["a"]
    assert "locked" in notices[0]
    assert list(tmp_path.glob("*.damaged-*")) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    notices: list[str] = []
    assert not History(tmp_path / "file", notices.append).add(make_run())
    assert len(notices) == 1


def test_one_row_that_cannot_be_read_is_passed_over(tmp_path: Path):
    notices: list[str] = []
    history = History(tmp_path, notices.append)
    for name in "abcd":
        history.add(make_run(name))
    with sqlite3.connect(history.path) as connection:
        connection.execute("UPDATE runs SET body = '{' WHERE id = 'a'")
        connection.execute("UPDATE runs SET body = ? WHERE id = 'b'", ("[" * 100_000,))
        connection.execute("UPDATE runs SET body = x'ff' WHERE id = 'd'")
    connection.close()
    assert [run.id for run in history.list()] == ["c"]
    assert notices == ["3 runs of the history cannot be read"]
    with pytest.raises(LlmrunError, match="cannot be read"):
        history.get("a")


def test_many_processes_at_once(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path\n"
        "from llmrun.bench.history import History\n"
        "from tests.fakes.bench_runs import make_run\n"
        "for n in range(10):\n"
        "    assert History(Path(sys.argv[1]), print).add(make_run(f'{sys.argv[2]}-{n}'))\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(i)]) for i in range(4)
    ]
    assert [child.wait() for child in children] == [0, 0, 0, 0]
    found = {run.id for run in History(tmp_path).list()}
    assert found == {f"{i}-{n}" for i in range(4) for n in range(10)}


def test_any_text_goes_through(tmp_path: Path):
    history = History(tmp_path)
    run = hostile_run()
    assert history.add(run)
    assert history.get("last") == run
    odd = make_run("odd", model="caf\udcff")
    assert history.add(odd)
    assert history.list("caf\udcff") == (odd,)


def test_ids_sort_by_time():
    assert new_id(1769869501.0).startswith("20260131-142501-")
    assert new_id(1.0) < new_id(86401.0)


def test_a_record_reads_back():
    assert from_dict(to_dict(make_run())) == make_run()


def test_numbers_that_json_has_not():
    odd = Measure("x", "s", (1.0, float("nan"), float("inf")), False, "g", {"a": float("nan")})
    run = from_dict(to_dict(make_run(measures=(odd,))))
    assert run.measures[0].values == (1.0,)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(to_dict(make_run()))), JSON)
def test_a_record_of_anything_reads_or_is_refused(key, value):
    data = to_dict(make_run()) | {key: value}
    try:
        run = from_dict(data)
    except ValueError:
        return
    to_dict(run)
    module.new_id(run.started_at)

"""The record of a partial download: what it may be trusted with, and when not."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.hub import parts as parts_module
from llmrun.hub.parts import Parts, load_done, read_target

SIZE = 1000


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "x.llmrun.parts.incomplete", tmp_path / "x.llmrun.incomplete"


def open_parts(files: tuple[Path, Path]) -> Parts:
    return Parts(*files, "m-Q4_0.gguf", SIZE)


def write(files: tuple[Path, Path], parts: Parts, start: int, end: int) -> None:
    with files[1].open("r+b") as data:
        data.seek(start)
        data.write(b"x" * (end - start))
    parts.add(start, end)


def test_ranges_survive_the_end_of_the_process(files: tuple[Path, Path]) -> None:
    parts = open_parts(files)
    for start, end in ((0, 100), (500, 600), (100, 150)):
        write(files, parts, start, end)
    assert parts.missing() == [(150, 500), (600, 1000)]
    assert (parts.prefix_end(), parts.n_done) == (150, 250)
    assert load_done(*files, SIZE) == [(0, 150), (500, 600)]
    again = open_parts(files)
    assert again.missing() == [(150, 500), (600, 1000)]
    again.close()
    parts.close()
    assert read_target(files[0]) == ("m-Q4_0.gguf", SIZE)


def test_after_a_reboot_only_flushed_ranges_count(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = open_parts(files)
    write(files, parts, 0, 100)
    parts.checkpoint()
    write(files, parts, 100, 300)
    parts.close()
    assert load_done(*files, SIZE) == [(0, 300)]
    monkeypatch.setattr(parts_module, "_boot_id", lambda: "another boot")
    assert load_done(*files, SIZE) == [(0, 100)]


def test_without_its_file_a_record_is_worth_nothing(files: tuple[Path, Path]) -> None:
    parts = open_parts(files)
    write(files, parts, 0, 100)
    parts.close()
    files[1].write_bytes(b"x" * 40)
    assert load_done(*files, SIZE) == [(0, 40)]
    files[1].write_bytes(b"x" * (SIZE + 1))
    assert load_done(*files, SIZE) == []
    files[1].unlink()
    assert load_done(*files, SIZE) == []
    assert load_done(*files, SIZE + 1) == []


def test_a_torn_line_costs_only_itself(files: tuple[Path, Path]) -> None:
    parts = open_parts(files)
    write(files, parts, 0, 100)
    with files[0].open("a") as record:
        record.write("20")
    parts.add(300, 400)
    with files[0].open("a") as record:
        record.write("500 60")
    parts.close()
    files[1].write_bytes(b"x" * SIZE)
    assert load_done(*files, SIZE) == [(0, 100)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        "[" * 5000,
        '{"llmrun_parts": 2, "size": 1000, "boot": "", "done": []}',
        '{"llmrun_parts": 1, "size": 1000, "boot": "", "done": [[-5, 10]]}',
        '{"llmrun_parts": 1, "size": 1000, "boot": "", "done": [[0, 1e3]]}',
        '{"llmrun_parts": 1, "size": 1000, "boot": "", "done": [["0", "9"]]}',
        '{"llmrun_parts": 1, "size": 1000, "boot": "", "done": [[0, true]]}',
        '{"llmrun_parts": 1, "size": 1000, "boot": "", "done": 7}',
        "\udcff",
    ],
)
def test_a_damaged_record_starts_afresh(files: tuple[Path, Path], text: str) -> None:
    files[1].write_bytes(b"x" * SIZE)
    files[0].write_bytes(text.encode("utf-8", "surrogateescape"))
    assert load_done(*files, SIZE) == []
    parts = open_parts(files)
    assert parts.missing() == [(0, SIZE)]
    assert files[1].stat().st_size == 0
    parts.close()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_a_record_never_raise(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        record, partial = Path(folder) / "r", Path(folder) / "p"
        record.write_bytes(data)
        partial.write_bytes(b"x" * SIZE)
        load_done(record, partial, SIZE)
        read_target(record)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=30))
def test_done_ranges_are_the_union_of_what_was_added(spans: list[tuple[int, int]]) -> None:
    done: list[tuple[int, int]] = []
    covered: set[int] = set()
    for start, length in spans:
        parts_module._insert(done, start, start + length)
        covered |= set(range(start, start + length))
    assert {i for start, end in done for i in range(start, end)} == covered
    assert all(a[1] < b[0] for a, b in pairwise(done))


def test_clearing_empties_the_file_and_the_record(files: tuple[Path, Path]) -> None:
    parts = open_parts(files)
    write(files, parts, 0, 100)
    parts.clear()
    assert parts.missing() == [(0, SIZE)]
    assert files[1].stat().st_size == 0
    assert load_done(*files, SIZE) == []
    parts.close()


def test_the_record_stays_small_over_checkpoints(files: tuple[Path, Path]) -> None:
    parts = open_parts(files)
    for start in range(0, SIZE, 10):
        write(files, parts, start, start + 10)
    parts.checkpoint()
    parts.close()
    header, *lines = files[0].read_text().splitlines()
    assert json.loads(header)["done"] == [[0, SIZE]]
    assert lines == [f"0 {SIZE}"]

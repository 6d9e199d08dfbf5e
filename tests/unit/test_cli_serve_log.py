"""A log that nobody reads keeps nobody waiting."""

from __future__ import annotations

import threading

from llmrun.cli.serve_log import LineWriter


def test_lines_beyond_a_bound_are_dropped_and_counted() -> None:
    written: list[str] = []
    first, go_on, last = threading.Event(), threading.Event(), threading.Event()

    def write(line: str) -> None:
        written.append(line)
        first.set()
        assert go_on.wait(30)
        if line.startswith("c"):
            last.set()

    writer = LineWriter(write, n_max=2)
    writer.put("a")
    assert first.wait(30)
    for line in ("b", "c", "d", "e"):  # returns although nothing is written
        writer.put(line)
    go_on.set()
    assert last.wait(30)
    assert written == ["a", "b (2 lines left out)", "c"]


def test_a_reader_that_has_gone_ends_nothing() -> None:
    done = threading.Event()

    def write(line: str) -> None:
        if line == "a":
            raise BrokenPipeError
        done.set()

    writer = LineWriter(write)
    writer.put("a")
    writer.put("b")
    assert done.wait(30)

"""What nobody reads keeps nobody waiting."""

from __future__ import annotations

import io
import threading

from tests.fakes.stopped_terminal import PATIENCE_S, Stopped, output_to


def test_lines_beyond_a_bound_are_dropped_and_counted() -> None:
    stream = Stopped()
    output = output_to(stream, n_max=3)
    output.begin()
    output.detail("a")
    stream.until_waited_for()
    for line in ("b", "c", "d", "e"):  # returns although nothing is written
        output.detail(line)
    assert not output.is_idle
    stream.is_going.set()
    output.end(PATIENCE_S)
    assert stream.getvalue() == "a\n(2 lines left out)\nb\nc\n"
    assert output.is_idle and not output.is_stuck


def test_all_kinds_of_lines_come_in_order_from_another_thread() -> None:
    stream = io.StringIO()
    output = output_to(stream, verbose=0)
    threads: list[str] = []
    output.note("before")
    assert stream.getvalue() == "before\n"  # nothing runs yet that could be kept waiting
    output.begin()
    output.warn("one")
    output.put(lambda: threads.append(threading.current_thread().name))
    output.detail("only with -v")
    output.note("two")
    output.end(PATIENCE_S)
    output.note("after")
    assert stream.getvalue() == "before\nwarning: one\ntwo\nafter\n"
    assert threads == ["llmrun-log"]


def test_a_reader_that_has_gone_ends_nothing() -> None:
    stream = io.StringIO()
    output = output_to(stream)

    def fail() -> None:
        raise BrokenPipeError

    output.begin()
    output.put(fail)
    output.detail("b")
    output.end(PATIENCE_S)
    assert stream.getvalue() == "b\n"


def test_the_end_says_that_a_stream_is_stuck() -> None:
    stream = Stopped()
    output = output_to(stream)
    output.end(PATIENCE_S)
    assert not output.is_stuck
    output.begin()
    output.detail("a")
    stream.until_waited_for()
    output.end(0.0)
    assert output.is_stuck
    stream.is_going.set()

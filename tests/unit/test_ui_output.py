"""The one way out: envelope, errors, questions, tables, progress."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from pathlib import Path

import pytest

from llmrun.config import Environment
from llmrun.errors import DamagedFileError, LlmrunError, NotFoundError, UsageError
from llmrun.hub.types import DownloadProgress, RemoteFile
from llmrun.ui.output import Failed, Output, as_json, encode_json, error_lines
from llmrun.ui.progress import (
    BarProgress,
    EventProgress,
    LineProgress,
    NullProgress,
    load_progress_for,
    progress_for,
)


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_output(tmp_path: Path, *, tty: bool = False, stdin: str = "", **options) -> Output:
    stream = Tty if tty else io.StringIO
    environ = {"TERM": "xterm", "COLUMNS": "100"}
    environment = Environment(
        stream(stdin), stream(), stream(), environ, tmp_path, tmp_path, tmp_path, tmp_path
    )
    return Output(environment, command="test", **options)


def out_of(output: Output) -> str:
    return output.environment.stdout.getvalue()  # type: ignore[attr-defined]


def err_of(output: Output) -> str:
    return output.environment.stderr.getvalue()  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    path: Path


@dataclasses.dataclass(frozen=True)
class Sample:
    n: int
    rows: tuple[Row, ...]

    def show(self, output: Output) -> None:
        output.line(f"n is {self.n}")


SAMPLE = Sample(3, (Row("a", Path("/x/y")),))


def test_a_result_as_text(tmp_path: Path) -> None:
    output = make_output(tmp_path)
    assert output.finish(SAMPLE) == 0
    assert (out_of(output), err_of(output)) == ("n is 3\n", "")


def test_a_result_as_envelope(tmp_path: Path) -> None:
    output = make_output(tmp_path, json=True)
    assert output.finish(SAMPLE) == 0
    assert out_of(output).count("\n") == 1
    assert json.loads(out_of(output)) == {
        "llmrun": 1, "command": "test", "status": "ok",
        "data": {"n": 3, "rows": [{"name": "a", "path": "/x/y"}]}, "errors": [],
    }  # fmt: skip


def test_a_result_with_errors_has_the_first_errors_code(tmp_path: Path) -> None:
    errors = (DamagedFileError("bad", hint="pull it"), NotFoundError("gone"))
    output = make_output(tmp_path, json=True)
    assert output.finish(Failed(SAMPLE, errors)) == 7
    envelope = json.loads(out_of(output))
    assert envelope["status"] == "error" and envelope["data"]["n"] == 3
    assert envelope["errors"] == [
        {"code": "damaged", "message": "bad", "hint": "pull it"},
        {"code": "not_found", "message": "gone", "hint": None},
    ]
    output = make_output(tmp_path)
    assert output.finish(Failed(SAMPLE, errors)) == 7
    assert out_of(output) == "n is 3\n"
    assert err_of(output) == "error: bad\ntry: pull it\nerror: gone\n"


def test_an_error_has_three_parts_and_four_lines_at_most() -> None:
    error = LlmrunError("it\nbroke", why="one\n\ntwo\nthree", hint="do\nthis")
    assert error_lines(error) == ["error: it broke", "one", "two three", "try: do this"]
    assert error_lines(LlmrunError("it broke")) == ["error: it broke"]


def test_error_before_a_result_still_prints_the_envelope(tmp_path: Path) -> None:
    output = make_output(tmp_path, json=True)
    assert output.fail(UsageError("no", why="because", hint="yes")) == 2
    assert json.loads(out_of(output)) == {
        "llmrun": 1, "command": "test", "status": "error", "data": {},
        "errors": [{"code": "usage", "message": "no: because", "hint": "yes"}],
    }  # fmt: skip
    assert err_of(output) == ""


def test_quiet_drops_notes_but_not_warnings_and_errors(tmp_path: Path) -> None:
    output = make_output(tmp_path, quiet=True)
    output.note("n")
    output.detail("d")
    output.warn("w")
    output.tell("t")
    output.fail(LlmrunError("e"))
    assert err_of(output) == "warning: w\nt\nerror: e\n"


def test_details_need_verbose(tmp_path: Path) -> None:
    quiet, loud = make_output(tmp_path), make_output(tmp_path, verbose=1)
    quiet.detail("d")
    loud.detail("d")
    assert (err_of(quiet), err_of(loud)) == ("", "d\n")


def test_colour_only_on_a_terminal(tmp_path: Path) -> None:
    for tty in (False, True):
        output = make_output(tmp_path, tty=tty)
        output.fail(LlmrunError("e"))
        assert ("\x1b[" in err_of(output)) is tty


def test_long_lines_are_not_wrapped(tmp_path: Path) -> None:
    output = make_output(tmp_path, tty=True)
    output.note("x" * 300, style="dim")
    assert err_of(output).count("\n") == 1


def test_table_columns_line_up_by_width(tmp_path: Path) -> None:
    output = make_output(tmp_path)
    output.table(("name", "n", "x"), [("モデル", "7", "y"), ("a", "10", "")], right=" r")
    assert out_of(output) == "name     n  x\nモデル   7  y\na       10\n"


@pytest.mark.parametrize(("answer", "agreed"), [("y\n", True), ("YES\n", True), ("n\n", False),
                                               ("\n", False), ("", False)])  # fmt: skip
def test_confirm_on_a_terminal(answer: str, agreed: bool, tmp_path: Path) -> None:
    output = make_output(tmp_path, tty=True, stdin=answer)
    assert output.confirm("Remove it?") is agreed
    assert err_of(output) == "Remove it? [y/N] "
    assert out_of(output) == ""


def test_confirm_without_a_terminal_names_the_flag(tmp_path: Path) -> None:
    for output in (make_output(tmp_path, stdin="y\n"), make_output(tmp_path, tty=True, json=True)):
        with pytest.raises(UsageError) as caught:
            output.confirm("Remove it?")
        assert "--yes" in (caught.value.hint or "")
    assert make_output(tmp_path, yes=True).confirm("Remove it?")


def test_json_keeps_strings_and_drives_no_terminal() -> None:
    value = {"text": "a\x1b[31m\x9b2J\u202e\ud83d é 日本\x7f\n"}
    encoded = encode_json(value)
    assert json.loads(encoded) == value
    assert "é 日本" in encoded
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e" for c in encoded)
    encoded.encode()


def test_as_json_goes_all_the_way_down() -> None:
    assert as_json({"a": [SAMPLE], "b": (1, None)}) == {
        "a": [{"n": 3, "rows": [{"name": "a", "path": "/x/y"}]}], "b": [1, None],
    }  # fmt: skip


# ---- progress

FILES = (RemoteFile("a.gguf", 1000, None), RemoteFile("b.gguf", 3000, None))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def transfer(progress: DownloadProgress, clock: Clock, n_present: int = 400) -> None:
    progress.note("waiting")
    progress.begin(FILES, n_present)
    left = 4000 - n_present
    while left:
        clock.now += 0.1
        progress.advance("a.gguf", min(40, left))
        left -= min(40, left)
    progress.finish_file("a.gguf")
    progress.finish_file("b.gguf")
    progress.end()


def test_form_of_progress_by_output(tmp_path: Path) -> None:
    assert isinstance(progress_for(make_output(tmp_path)), LineProgress)
    assert isinstance(progress_for(make_output(tmp_path, tty=True)), BarProgress)
    assert isinstance(progress_for(make_output(tmp_path, tty=True, quiet=True)), NullProgress)
    assert isinstance(progress_for(make_output(tmp_path, json=True), events=True), EventProgress)
    # `run --json` prints one envelope and nothing else on stdout.
    assert isinstance(progress_for(make_output(tmp_path, json=True)), LineProgress)


def test_lines_come_every_tenth(tmp_path: Path) -> None:
    output, clock = make_output(tmp_path), Clock()
    transfer(LineProgress(output, clock), clock)
    lines = err_of(output).splitlines()
    assert lines[0] == "waiting"
    assert lines[1] == "downloading 2 files: 4.00 kB, 400 B already here"
    assert lines[-1] == "b.gguf: complete, sha256 checked"
    shares = [line.split("%")[0].strip() for line in lines if "%" in line]
    assert shares == ["20", "30", "40", "50", "60", "70", "80", "90"]
    assert "400 B/s" in lines[2] and "left" in lines[2]
    assert out_of(output) == ""


def test_a_slow_download_still_speaks(tmp_path: Path) -> None:
    output, clock = make_output(tmp_path), Clock()
    progress = LineProgress(output, clock)
    progress.begin(FILES, 0)
    for _ in range(4):
        clock.now += 6
        progress.advance("a.gguf", 1)
    assert len([line for line in err_of(output).splitlines() if "%" in line]) == 2


def test_events_are_json_lines_on_stdout(tmp_path: Path) -> None:
    output, clock = make_output(tmp_path, json=True), Clock()
    transfer(EventProgress(output, clock), clock)
    events = [json.loads(line) for line in out_of(output).splitlines()]
    names = [event["event"] for event in events]
    assert names[:2] == ["note", "begin"] and names[-3:] == ["file", "file", "end"]
    assert set(names[2:-3]) == {"progress"}
    begin = events[1]
    assert (begin["done"], begin["total"]) == (400, 4000)
    assert begin["files"][0] == {"path": "a.gguf", "size": 1000}
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert done == sorted(done) and set(events[2]) == {"event", "done", "total", "bytes_per_s"}
    assert events[-1]["done"] == 4000


def test_bars_show_files_and_total_on_stderr(tmp_path: Path) -> None:
    output = make_output(tmp_path, tty=True)
    transfer(BarProgress(output), Clock())
    shown = err_of(output)
    assert "a.gguf" in shown and "b.gguf" in shown and "total" in shown
    assert "4.0/4.0 kB" in shown
    assert out_of(output) == ""


def test_bars_escape_hostile_names(tmp_path: Path) -> None:
    output = make_output(tmp_path, tty=True)
    progress = BarProgress(output)
    progress.begin((RemoteFile("x\x1b]0;owned\x07[red].gguf", 10, None),), 0)
    progress.note("\x1b]52;c;eA==\x07")
    progress.end()
    assert "\x1b]" not in err_of(output) and "\x07" not in err_of(output)
    assert "[red]" in err_of(output)


@pytest.mark.parametrize(
    "make", [BarProgress, LineProgress, EventProgress, lambda output: NullProgress()]
)
def test_progress_takes_calls_from_many_threads(make, tmp_path: Path) -> None:
    progress = make(make_output(tmp_path, tty=True))
    progress.begin((RemoteFile("a", 8000, None),), 0)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(1000):
                progress.advance("a", 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.end()
    progress.advance("a", 1)
    assert not failures


def test_end_without_begin_is_harmless(tmp_path: Path) -> None:
    for progress in (LineProgress(make_output(tmp_path)), EventProgress(make_output(tmp_path)),
                     BarProgress(make_output(tmp_path, tty=True))):  # fmt: skip
        progress.advance("a", 1)
        progress.finish_file("a")
        progress.end()


def test_load_progress_shows_only_after_a_while_and_goes_away(tmp_path: Path) -> None:
    output, clock = make_output(tmp_path, tty=True), Clock()
    with load_progress_for(output, clock) as show:
        assert show is not None and show(0.1)
        assert err_of(output) == ""
        clock.now += 1
        assert show(0.5)
        assert err_of(output) == "\rloading 50%"
    assert err_of(output).endswith("\r")
    with load_progress_for(make_output(tmp_path), clock) as show:
        assert show is None

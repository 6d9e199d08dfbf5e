"""The input line, driven by key codes through prompt_toolkit's pipe input, and the plain reader."""

from __future__ import annotations

import io
import os
import stat

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from llmrun.errors import UsageError
from llmrun.repl.prompt import (
    PlainLineReader,
    RichLineReader,
    is_open_quote,
    make_completer,
    make_line_reader,
    open_history,
    strip_quotes,
)

ENTER, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"


def no_completion(before):
    return ()


@pytest.fixture
def keyboard():
    with create_pipe_input() as pipe:
        yield pipe


def reader_for(keyboard, history_path=None, complete=no_completion):
    return RichLineReader(
        history_path=history_path, complete=complete, input=keyboard, output=DummyOutput()
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello" + ENTER, "hello"),
        ("one" + ALT_ENTER + "two" + ENTER, "one\ntwo"),
        ('"""one' + ENTER + "two" + ENTER + '"""' + ENTER, "one\ntwo"),
        ("\x1b[200~first\nsecond\n\nlast\x1b[201~" + ENTER, "first\nsecond\n\nlast"),
        ("thrown away" + CTRL_C + "kept" + ENTER, "kept"),
        ("a\x1b[200~\r\nb\x1b[201~" + ENTER, "a\nb"),
    ],
)
def test_keys(keyboard, keys, message):
    keyboard.send_text(keys)
    assert reader_for(keyboard)() == message


def test_bytes_that_are_no_text_become_question_marks(keyboard):
    keyboard.send_bytes(b"a\xffb\r")
    assert reader_for(keyboard)() == "a?b"


def test_ctrl_c_at_an_empty_line_and_ctrl_d(keyboard):
    reader = reader_for(keyboard)
    keyboard.send_text(CTRL_C)
    with pytest.raises(KeyboardInterrupt):
        reader()
    keyboard.send_text(CTRL_D)
    with pytest.raises(EOFError):
        reader()


def test_default_can_be_edited(keyboard):
    keyboard.send_text("!" + ENTER)
    assert reader_for(keyboard)(default="hello") == "hello!"


@pytest.mark.parametrize("key", ["\x07", "\x18\x05"])
def test_editor(keyboard, key, tmp_path, monkeypatch):
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "from the editor" > "$1"\n')
    editor.chmod(0o700)
    monkeypatch.setenv("VISUAL", str(editor))
    keyboard.send_text("draft" + key)
    reader = reader_for(keyboard)
    if key == "\x07":
        # The editor's text comes back into the line; it is sent when the person sends it.
        reader._session.default_buffer.on_text_changed += lambda buffer: (
            keyboard.send_text(ENTER) if buffer.text == "from the editor" else None
        )
    assert reader() == "from the editor"


def test_history_is_private_and_persistent(keyboard, tmp_path):
    path = tmp_path / "state" / "history"
    umask = os.umask(0)
    try:
        keyboard.send_text("remember me" + ENTER)
        assert reader_for(keyboard, path)() == "remember me"
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "remember me" in path.read_text()
    assert list(open_history(path).load_history_strings()) == ["remember me"]


def test_history_is_private_from_its_first_moment(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "fchmod")
    open_history(tmp_path / "history")
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o600


def test_history_that_others_could_read_is_closed_to_them(tmp_path):
    path = tmp_path / "history"
    path.write_text("\n# date\n+old\n")
    path.chmod(0o644)
    assert list(open_history(path).load_history_strings()) == ["old"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_history_through_a_link_or_in_no_folder_stays_in_memory(tmp_path):
    target = tmp_path / "target"
    target.write_text("")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "link", tmp_path / "file" / "history", None):
        open_history(path).append_string("secret")
    assert target.read_text() == ""


def test_a_full_disk_does_not_end_the_session(tmp_path, monkeypatch):
    history = open_history(tmp_path / "history")

    def refuse(self, string):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prompt_toolkit.history.FileHistory.store_string", refuse)
    history.append_string("line")
    assert history.get_strings() == ["line"]


def completions(text, complete=no_completion):
    completer = make_completer(complete)
    found = completer.get_completions(Document(text, len(text)), CompleteEvent())
    return [(text[: len(text) + c.start_position] + c.text) for c in found]


def test_completion_of_commands_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert completions("/th", lambda before: [("/think", "")]) == ["/think"]
    assert completions("/think o", lambda before: [("on", ""), ("off", "")]) == [
        "/think on",
        "/think off",
    ]
    assert completions("read ./no") == ["read ./notes.txt"]
    assert completions(f"read {tmp_path}/no") == [f"read {tmp_path}/notes.txt"]
    assert completions("no") == []
    assert completions("//th", lambda before: [("/think", "")]) == []


def test_quotes():
    assert is_open_quote('"""a') and is_open_quote('"""') and is_open_quote(' """a\nb')
    assert not is_open_quote('"""a"""') and not is_open_quote('a """ b')
    assert strip_quotes('"""\na\nb\n"""') == "a\nb"
    assert strip_quotes('say """ now') == 'say """ now'


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_without_a_terminal():
    err = io.StringIO()
    reader = PlainLineReader(io.StringIO('one\n"""\ntwo\nthree\n"""\nlast'), err)
    assert [reader(), reader(), reader()] == ["one", "two\nthree", "last"]
    with pytest.raises(EOFError):
        reader()
    assert err.getvalue() == ""
    assert not reader.is_interactive


def test_plain_lines_on_a_dumb_terminal():
    err = io.StringIO()
    reader = make_line_reader(
        history_path=None,
        complete=no_completion,
        environ={"TERM": "dumb"},
        stdin=Terminal('"""a\nb"""\nyes\n'),
        err=err,
    )
    assert isinstance(reader, PlainLineReader)
    assert reader() == "a\nb"
    assert reader.ask("sure? ") == "yes"
    assert err.getvalue() == ">>> ... sure? "
    assert reader.is_interactive


def test_an_open_quote_at_the_end_of_input_is_sent():
    reader = PlainLineReader(io.StringIO('"""\na\nb'), io.StringIO())
    assert reader() == "a\nb"


def test_input_that_is_no_text():
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8")
    with pytest.raises(UsageError):
        PlainLineReader(stdin, io.StringIO())()


def test_bytes_that_are_no_utf8_are_refused():
    stdin = io.TextIOWrapper(io.BytesIO(b"x\xff\nfine\n"), "utf-8", errors="surrogateescape")
    read = PlainLineReader(stdin, io.StringIO())
    with pytest.raises(UsageError):
        read()
    assert read() == "fine"

"""Nothing that a model, a header, a file or an error says can drive the terminal."""

from __future__ import annotations

import io
import re

import pyte
import pytest
from rich.console import Console

from llmrun.errors import LlmrunError
from llmrun.repl.screen import Screen
from llmrun.ui.live_rows import LiveRows
from llmrun.ui.markdown import MarkdownStream, PlainStream
from llmrun.ui.wrapped import WrappedStream

BYTES = [chr(code) for code in (*range(32), *range(127, 160))]
PAYLOADS = [
    "\x1b]0;pwned\x07",
    "\x1b]52;c;cHduZWQ=\x1b\\",
    "\x9d0;pwned\x9c",
    "\x1b[2J\x1b[H",
    "\x9b2J\x9bH",
    "\x1b[31mred",
    "\x1b]8;;http://evil\x1b\\text\x1b]8;;\x1b\\",
    "\x1bc",
    "\x1b[?1049h",
    "\x1b[6n",
    "a\rb\x08c\x0bd\x0ce",
    "\u202eevil\u2066x\u200f",
    "&#27;[2J &#x1b;]0;pwned&#7; &#155;2J &#x202e; &#8238; &#13;x &#12;",
    "[t](http://u/&#x202e;) `\x1b[2J` **\x1b]0;pwned\x07**",
    "| \x1b[2J | b |\n|---|---|\n| \x9b2J | &#x202e; |",
    "```\x1b[2J\n\x1b[2J\n```",
    "# \x1b[2J",
    "- \x1b[2J\n> \x9b2J",
]
# What the program itself sends: colours, erasing its own tail, wrap off and on.
OWN = re.compile(r"\x1b\[(?:[0-9;]*m|\d*A|J|K|\?7[lh])|\r(?=\x1b\[|[^\n])")
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class WatchedScreen(pyte.Screen):
    """A terminal that remembers every request that text must not be able to make."""

    def __init__(self, *args):
        self.touched: list[str] = []
        super().__init__(*args)

    def set_title(self, param):
        self.touched.append("title")

    def set_icon_name(self, param):
        self.touched.append("icon")

    def bell(self, *args):
        self.touched.append("bell")

    def report_device_status(self, mode, **kwargs):
        self.touched.append("report")

    def cursor_position(self, line=None, column=None):
        if line is not None or column is not None or getattr(self, "_ready", False):
            self.touched.append("cursor")
        super().cursor_position(line, column)

    def erase_in_display(self, how=0, *args, **kwargs):
        if how and getattr(self, "_ready", False):
            self.touched.append("erase")
        super().erase_in_display(how, *args, **kwargs)


def make_terminal():
    screen = WatchedScreen(80, 24)
    screen.set_mode(pyte.modes.LNM)
    screen._ready = True
    screen.touched.clear()
    return screen


def make_console(out):
    return Console(file=out, width=80, height=24, force_terminal=True, color_system="256",
                   markup=False, emoji=False, highlight=False, _environ={})  # fmt: skip


def check(written: str) -> str:
    """Only our own sequences, and nothing happened to the terminal. Returns the screen's text."""
    assert not FORBIDDEN.search(OWN.sub("", written)), repr(written)
    screen = make_terminal()
    pyte.Stream(screen).feed(written)
    assert screen.touched == []
    assert screen.title == "" and screen.icon_name == ""
    return "\n".join(screen.display)


STREAMS = {
    "markdown": MarkdownStream,
    "plain": lambda console: PlainStream(console.file.write),
    "wrapped": lambda console: WrappedStream(console, console.get_style("dim")),
}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_in_answers(kind, step, payload):
    out = io.StringIO()
    stream = STREAMS[kind](make_console(out))
    text = f"before {payload} after\n\n{payload}"
    for i in range(0, len(text), step):
        stream.feed(text[i : i + step])
    stream.finish()
    shown = check(out.getvalue())
    assert "before" in shown and "after" in shown


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("head", ["", "```\n", "# ", "| a |\n|---|\n| ", "- ", "**"])
def test_every_control_byte_alone_and_at_chunk_borders(kind, head):
    for char in BYTES:
        for chunks in (["x", char, "y"], [f"x{char}", "y"], ["x", f"{char}y"]):
            out = io.StringIO()
            stream = STREAMS[kind](make_console(out))
            for chunk in [head, *chunks]:
                stream.feed(chunk)
            stream.finish()
            check(out.getvalue())
            if char not in "\t\n":
                assert f"x\\x{ord(char):02x}y" in out.getvalue().replace("\x1b[0m", "") or (
                    kind == "markdown"
                )


@pytest.mark.parametrize("payload", PAYLOADS)
def test_notes_errors_status_and_results(payload):
    out = io.StringIO()
    console = make_console(out)
    screen = Screen(console, console, show_markdown=True)
    screen.say(payload)
    screen.note(payload)
    screen.error(LlmrunError(payload, why=payload, hint=payload))
    screen.status(payload)
    screen.clear_status()
    check(out.getvalue())


def test_without_a_terminal_text_is_escaped_too():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=False)
    screen = Screen(console, console, show_markdown=True)
    stream = screen.make_answer_stream()
    for payload in PAYLOADS:
        stream.feed(payload)
        screen.note(payload)
    stream.finish()
    assert not FORBIDDEN.search(out.getvalue())


def test_the_last_gate_escapes_by_itself():
    out = io.StringIO()
    console = make_console(out)
    rows = LiveRows(console)
    style = console.get_style("bold")
    for payload in PAYLOADS:
        rows.commit([(payload, style)])
        rows.show([[(payload, style)]])
        rows.append(payload, style)
        rows.end_line()
    rows.flush()
    check(out.getvalue())

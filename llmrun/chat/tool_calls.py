"""Takes the calls of tools out of an answer while it streams.

The splitter gets the answer's text, after `parsing` took the thinking out, and tells plain text
from calls. A call's arguments come as JSON text, piece by piece. However the text is cut, the
joined result is the same. What only looks like a call comes out as plain text: before its name and
the start of its arguments are there nothing was said, so nothing has to be taken back. A call that
was begun stays one: when the text ends within it, so do its arguments; when it goes wrong, the rest
is plain text. White space around calls is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmrun.chat.tool_cursor import Cursor, Wait
from llmrun.chat.tool_formats import ToolFormat, ToolSpec
from llmrun.chat.tool_syntax import Reader
from llmrun.chat.tool_syntax_json import JsonReader
from llmrun.chat.tool_syntax_named import NamedReader, PythonicReader
from llmrun.chat.tool_syntax_xml import XmlReader


@dataclass(frozen=True, slots=True)
class CallStart:
    """The `index`-th call (from 0) begins. The tool may be one that nobody offered."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallText:
    """A piece of the JSON text of the `index`-th call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Plain:
    """A piece of the answer that is no call."""

    text: str


CallEvent = CallStart | CallText | Plain


class ToolSplitter(Protocol):
    """Takes the text of one answer piece by piece."""

    def feed(self, text: str) -> list[CallEvent]:
        """What `text` settles."""

    def flush(self) -> list[CallEvent]:
        """What was held back, when no more text comes."""


def make_tool_splitter(fmt: ToolFormat | None, tools: Sequence[ToolSpec]) -> ToolSplitter:
    """The splitter for a format; None passes all text on. `tools` are those the model was shown:
    their schemas say how to read values that the format does not quote."""
    return PlainText() if fmt is None else CallSplitter(fmt, tools)


_READERS = {"json": JsonReader, "named": NamedReader, "xml": XmlReader, "pythonic": PythonicReader}


class PlainText:
    """All text is the answer."""

    def feed(self, text: str) -> list[CallEvent]:
        return [Plain(text)] if text else []

    def flush(self) -> list[CallEvent]:
        return []


class CallSplitter:
    """See the module: drives the parser of a format's syntax."""

    def __init__(self, fmt: ToolFormat, tools: Sequence[ToolSpec]) -> None:
        self._cursor = Cursor()
        self._events = _Events(self._cursor)
        self._parser = self._read_answer(fmt, tools)

    def feed(self, text: str) -> list[CallEvent]:
        self._cursor.push(text)
        next(self._parser, None)
        return self._events.take()

    def flush(self) -> list[CallEvent]:
        self._cursor.end()
        next(self._parser, None)
        self._events.end()
        return self._events.take()

    def _read_answer(self, fmt: ToolFormat, tools: Sequence[ToolSpec]) -> Wait[None]:
        cursor, events = self._cursor, self._events
        reader: Reader = _READERS[fmt.syntax](fmt, tools, cursor, events)
        if fmt.is_bare:
            yield from self._attempt(reader.read_bare())
        while not cursor.is_over:
            if (yield from cursor.run(reader.first_characters)):
                events.settle_as_text()
                continue
            opener = yield from cursor.accept(*reader.openers)
            if opener:
                yield from self._attempt(reader.read_calls(opener))
            elif not cursor.is_over:
                cursor.take(1)
                events.settle_as_text()

    def _attempt(self, reading: Wait[bool]) -> Wait[None]:
        if (yield from reading):
            self._events.pass_by()
        else:
            self._events.give_up()


class _Events:
    """Collects what the splitter says. Implements `tool_syntax.Sink`.

    Whatever is said settles the text passed so far, so that what is kept is always what did not
    come out in any form.
    """

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._events: list[CallEvent] = []
        self._space: list[str] = []  # held back until text follows it
        self._n_calls = 0
        self._has_text = False
        self._in_call = False
        self._keeps_rest = False

    def start(self, name: str, *, is_verbatim: bool) -> None:
        """A call begins. `is_verbatim`: its arguments are JSON in the text already, so what the
        text ends in belongs to them as it is."""
        self._cursor.settle()
        self._space = []
        self._events.append(CallStart(self._n_calls, name))
        self._n_calls += 1
        self._in_call, self._keeps_rest = True, is_verbatim

    def add(self, text: str) -> None:
        """More of the arguments' JSON text."""
        self._cursor.settle()
        self._events.append(CallText(self._n_calls - 1, text))

    def finish(self) -> None:
        """The arguments are whole."""
        self._in_call = False

    def give_up(self) -> None:
        """What was read is not, or not wholly, what it looked like."""
        if self._in_call and self._cursor.is_over:
            rest = self._cursor.settle().strip()
            if rest and self._keeps_rest:
                self.add(rest)
        else:
            self.settle_as_text()
        self._in_call = False

    def pass_by(self) -> None:
        """What was passed last belongs to the calls; but white space in front of text does not."""
        rest = self._cursor.settle()
        if rest.isspace():
            self._space.append(rest)

    def settle_as_text(self) -> None:
        text = self._cursor.settle()
        body = text.rstrip()
        if not body:
            if text:
                self._space.append(text)
            return
        space = "".join(self._space)
        if self._n_calls and not self._has_text:
            space, body = "", (space + body).lstrip()
        self._events.append(Plain(space + body))
        self._has_text = True
        self._space = [text[len(text.rstrip()) :]] if text[-1].isspace() else []

    def end(self) -> None:
        """No more text: white space is the answer's own unless there were calls."""
        space = "".join(self._space)
        if space and not self._n_calls:
            self._events.append(Plain(space))
        self._space = []

    def take(self) -> list[CallEvent]:
        """The events so far, neighbours of one kind joined."""
        merged: list[CallEvent] = []
        run: list[str] = []
        for event in self._events:
            last = merged[-1] if merged else None
            if isinstance(event, CallStart) or type(event) is not type(last):
                _close(merged, run)
                merged.append(event)
                run = [] if isinstance(event, CallStart) else [event.text]
            else:
                run.append(event.text)
        _close(merged, run)
        self._events = []
        return merged


def _close(merged: list[CallEvent], run: list[str]) -> None:
    """Give the last event of `merged` the text of the whole run."""
    if len(run) > 1:
        last = merged[-1]
        text = "".join(run)
        merged[-1] = Plain(text) if isinstance(last, Plain) else CallText(last.index, text)

"""What the parsers of the syntaxes in which models write calls have in common.

A parser returns whether what it read was calls. One that returns False leaves the cursor where the
text stopped to be a call.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from llmrun.chat.tool_cursor import Wait

MAX_NAME_CHARS = 256
"""Longest name of a tool or an argument."""


class Sink(Protocol):
    """Where calls go."""

    def start(self, name: str, *, is_verbatim: bool) -> None: ...

    def add(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Reader(Protocol):
    """The parser of one format. `openers` are the texts that calls begin with."""

    openers: tuple[str, ...]
    first_characters: re.Pattern[str]

    def read_calls(self, opener: str) -> Wait[bool]:
        """Calls whose opener was passed."""

    def read_bare(self) -> Wait[bool]:
        """Calls without tags, which are the whole answer."""


class HeldSink:
    """Keeps calls until it is sure that they are some."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, list[str]]] = []

    def start(self, name: str, *, is_verbatim: bool) -> None:
        del is_verbatim
        self._calls.append((name, []))

    def add(self, text: str) -> None:
        self._calls[-1][1].append(text)

    def finish(self) -> None:
        pass

    def pass_on(self, sink: Sink) -> None:
        for name, parts in self._calls:
            say_call(name, parts, sink)


def say_call(name: str, arguments: Sequence[str], sink: Sink) -> None:
    """Say a whole call at once."""
    sink.start(name, is_verbatim=True)
    sink.add("".join(arguments))
    sink.finish()

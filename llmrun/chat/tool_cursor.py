"""Text that comes in pieces, for parsers that are written as if it were all there.

A parser is a generator: where it needs to see more text than has come it yields, and goes on when
there is more. What it does depends on the text alone, never on where the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Wait = Generator[None, None, T]
"""A parser that yields to wait for more text and returns a T."""

_MAX_SPACE_AHEAD = 64


class Cursor:
    """A place in the text, which moves forward only.

    What was passed since the last `settle` is kept: it is what has to come out as text when it
    turns out not to be what it looked like.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._kept: list[str] = []
        self.has_ended = False

    def push(self, text: str) -> None:
        # What is left is never more than a parser looks ahead, so this stays cheap.
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        self.has_ended = True

    @property
    def is_over(self) -> bool:
        """Whether the whole text was passed."""
        return self.has_ended and self._at == len(self._text)

    # ---- what was passed

    def settle(self) -> str:
        """What was passed since the last call."""
        kept, self._kept = "".join(self._kept), []
        return kept

    def take(self, n: int) -> str:
        """Pass `n` characters, which must be there."""
        text = self._text[self._at : self._at + n]
        self._at += n
        self._kept.append(text)
        return text

    # ---- parsers

    def peek(self, n: int = 1) -> Wait[str]:
        """The next `n` characters, without passing them; fewer only at the end of the text."""
        while len(self._text) - self._at < n and not self.has_ended:
            yield
        return self._text[self._at : self._at + n]

    def accept(self, *literals: str) -> Wait[str]:
        """Pass the longest of these that stands here; "" when none does."""
        while True:
            found, may_come = "", False
            for literal in literals:
                if self._text.startswith(literal, self._at):
                    found = max(found, literal, key=len)
                else:
                    may_come = may_come or self._is_cut(literal)
            if self.has_ended or not may_come:
                return self.take(len(found)) if found else ""
            yield

    def accept_last(self, *literals: str) -> Wait[str]:
        """As `accept`, but where the text ends within one of these, its start counts as well."""
        found = yield from self.accept(*literals)
        if not found and self.has_ended and any(self._is_cut(literal) for literal in literals):
            return self.take(len(self._text) - self._at)
        return found

    def precedes(self, *literals: str) -> Wait[bool]:
        """Whether white space and then one of these follows, or nothing but a start of one."""
        n_space = 0
        while n_space < _MAX_SPACE_AHEAD:
            ahead = yield from self.peek(n_space + 1)
            if len(ahead) <= n_space:
                return True
            if not ahead[-1].isspace():
                break
            n_space += 1
        for literal in literals:
            for n in range(1, len(literal) + 1):
                ahead = (yield from self.peek(n_space + n))[n_space:]
                if not literal.startswith(ahead):
                    break
                if ahead == literal or len(ahead) < n:
                    return True
        return False

    def run(self, until: re.Pattern[str]) -> Wait[str]:
        """Pass and return text up to where `until` (of one character) matches: as much as has
        come, so that a loop over this streams; "" when there is none before the match or the
        end."""
        while self._at == len(self._text) and not self.has_ended:
            yield
        match = until.search(self._text, self._at)
        end = match.start() if match else len(self._text)
        return self.take(end - self._at) if end > self._at else ""

    def run_whole(self, until: re.Pattern[str], max_chars: int) -> Wait[str | None]:
        """As `run`, but all of it; None when that is more than `max_chars`."""
        parts: list[str] = []
        n = 0
        while part := (yield from self.run(until)):
            parts.append(part)
            n += len(part)
            if n > max_chars:
                return None
        return "".join(parts)

    def skip_space(self) -> Wait[None]:
        while (yield from self.run(_NOT_SPACE)):
            pass

    def _is_cut(self, literal: str) -> bool:
        """Whether what has come is a true start of `literal`."""
        n = len(self._text) - self._at
        return n < len(literal) and literal.startswith(self._text[self._at :])


_NOT_SPACE = re.compile(r"\S")

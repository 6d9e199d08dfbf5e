"""Regular expressions of JSON schemas (ECMA-262, without what is not regular), read into a tree.

Where dialects differ in what a class holds, it holds what all of them agree on: what is written
from the tree then matches in each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmrun.errors import UsageError

Ranges = tuple[tuple[int, int], ...]
"""Code points from and to, both included, in order and apart from each other."""

# Without surrogates, which no UTF-8 spells.
ALL: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
MAX_TIMES = 2000
_MAX_DEPTH = 50


class PatternError(UsageError):
    """A pattern cannot be kept. `why` says it in full."""

    def __init__(self, why: str) -> None:
        super().__init__("the JSON schema cannot be turned into a grammar", why=why)


class UnreadablePatternError(PatternError):
    """The pattern is no regular expression, or asks for what is not regular."""


class PatternTooLargeError(PatternError):
    """The pattern needs more states than are worth it."""


@dataclass(frozen=True, slots=True)
class Chars:
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Anchor:
    """`^` or `$`."""

    is_start: bool


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    ways: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`high` None: any number."""

    part: Node
    low: int
    high: int | None


Node = Chars | Anchor | Sequence | Choice | Repeat


def parse_regex(pattern: str) -> Node:
    """The tree of a pattern. Groups are all alike, and so are greedy and lazy repetitions.

    Raises UnreadablePatternError, also for lookarounds, backreferences, word boundaries, flags and
    classes of Unicode properties; PatternTooLargeError for more than MAX_TIMES repetitions.
    """
    return _Parser(pattern).parse()


def text_node(text: str) -> Node:
    """The tree that matches this very text."""
    return Sequence(tuple(Chars(((ord(char), ord(char)),)) for char in text))


def any_text() -> Node:
    """The tree that any text matches."""
    return Sequence(())


def union(ranges: list[tuple[int, int]]) -> Ranges:
    """All of these together, without surrogates."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return tuple(
        (max(low, least), min(high, most))
        for low, high in found
        for least, most in ALL
        if max(low, least) <= min(high, most)
    )


def complement(ranges: Ranges) -> Ranges:
    """All but these."""
    found, at = [], 0
    for low, high in ranges:
        if at < low:
            found.append((at, low - 1))
        at = high + 1
    return union([*found, (at, 0x10FFFF)] if at <= 0x10FFFF else found)


def repeat(part: Node, low: int, high: int | None) -> Node:
    """`part` so many times. One that may be left out is not written into another: `(a?){9}` is
    `a{0,9}`, and `(a*)*` is `a*`."""
    if isinstance(part, Repeat) and part.low == 0 and high != 0:
        times = None if high is None or part.high is None else part.high * high
        return Repeat(part.part, 0, times)
    return Repeat(part, low, high)


def _of(chars: str) -> Ranges:
    return union([(ord(char), ord(char)) for char in chars])


_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = union([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_SPACE = _of("\t\n\v\f\r ")
# What some dialect takes for white space, so that `\S` holds none of it.
_ANY_SPACE = union(
    [(9, 13), (28, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
     (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
)  # fmt: skip
_DOT = complement(_of("\n\r\u2028\u2029"))
_CLASSES = {
    "d": _DIGITS, "D": complement(_DIGITS),
    "w": _WORD, "W": complement(_WORD),
    "s": _SPACE, "S": complement(_ANY_SPACE),
}  # fmt: skip
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|c([a-zA-Z])")
_LOW_SURROGATE = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_TIMES = re.compile(r"\{([0-9]*)(?:(,)([0-9]*))?\}")
_GROUP = re.compile(r"\((?:\?:|\?P?<[A-Za-z_][A-Za-z0-9_]*>|(?!\?))")


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        tree = self._choice()
        if self._at < len(self._text):
            raise self._error("a bracket is closed that was not opened")
        return tree

    def _choice(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternTooLargeError(f"a pattern has more than {_MAX_DEPTH} groups in each other")
        ways = [self._sequence()]
        while self._next("|"):
            ways.append(self._sequence())
        self._depth -= 1
        return ways[0] if len(ways) == 1 else Choice(tuple(ways))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            part = self._atom()
            times = self._times()
            if times is not None:
                part = repeat(part, *times)
            parts.append(part)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _atom(self) -> Node:
        char = self._text[self._at]
        if char == "(":
            begun = _GROUP.match(self._text, self._at)
            if begun is None:
                raise self._error("lookarounds and flags are not regular")
            self._at = begun.end()
            inner = self._choice()
            if not self._next(")"):
                raise self._error("a bracket is not closed")
            return inner
        self._at += 1
        if char in "^$":
            return Anchor(char == "^")
        if char == ".":
            return Chars(_DOT)
        if char == "[":
            return Chars(self._class())
        if char == "\\":
            return Chars(self._escape())
        if char in "*+?":
            raise self._error("there is nothing to repeat")
        return Chars(self._single(char))

    def _times(self) -> tuple[int, int | None] | None:
        at = self._at
        char = self._text[at : at + 1]
        if char and char in "*+?":
            self._at += 1
            times = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        else:
            found = _TIMES.match(self._text, at)
            if found is None or not (found[1] or found[3]):
                return None
            self._at = found.end()
            # By its length first: Python refuses to read numbers of thousands of digits.
            if any(
                len(count or "") > 9 or int(count or 0) > MAX_TIMES for count in found.group(1, 3)
            ):
                raise PatternTooLargeError(f"a pattern has more than {MAX_TIMES} repetitions")
            low = int(found[1] or 0)
            times = low, (low if found[2] is None else int(found[3]) if found[3] else None)
            if times[1] is not None and times[1] < low:
                raise self._error("the numbers of a repetition are out of order")
        self._next("?")
        if self._text[self._at : self._at + 1] in ("*", "+", "?") or _TIMES.match(
            self._text, self._at
        ):
            raise self._error("a repetition is repeated")
        return times

    def _escape(self) -> Ranges:
        """What follows a backslash."""
        char = self._text[self._at : self._at + 1]
        if char in _CLASSES:
            self._at += 1
            return _CLASSES[char]
        code = _CODE.match(self._text, self._at)
        if code is not None:
            self._at = code.end()
            if code[4]:
                return self._single(chr(ord(code[4]) % 32))
            value = int(code[1] or code[2] or code[3], 16)
            low = _LOW_SURROGATE.match(self._text, self._at)
            if 0xD800 <= value < 0xDC00 and low is not None:
                self._at = low.end()
                value = 0x10000 + ((value - 0xD800) << 10) + int(low[1], 16) - 0xDC00
            if value > 0x10FFFF:
                raise self._error("there is no such character")
            return self._single(chr(value))
        if char in _CONTROLS and not self._text[self._at + 1 : self._at + 2].isdigit():
            self._at += 1
            return ((_CONTROLS[char], _CONTROLS[char]),)
        if not char or char.isalnum():
            raise self._error(f"\\{char} is not known")
        self._at += 1
        return self._single(char)

    def _class(self) -> Ranges:
        is_negated = self._next("^")
        if self._next("]"):
            raise self._error("a class is empty")
        found: list[tuple[int, int]] = []
        while not self._next("]"):
            low = self._member()
            if self._text[self._at : self._at + 1] == "-" and self._text[
                self._at + 1 : self._at + 2
            ] not in ("]", ""):
                self._at += 1
                high = self._member()
                if any(len(end) != 1 or end[0][0] != end[0][1] for end in (low, high)):
                    raise self._error("a class is the end of a range")
                if low[0][0] > high[0][0]:
                    raise self._error("a range is out of order")
                found.append((low[0][0], high[0][0]))
            else:
                found += low
        return complement(union(found)) if is_negated else union(found)

    def _member(self) -> Ranges:
        if self._at >= len(self._text):
            raise self._error("a class is not closed")
        char = self._text[self._at]
        self._at += 1
        if char != "\\":
            return self._single(char)
        if self._next("b"):
            return ((8, 8),)
        return self._escape()

    def _single(self, char: str) -> Ranges:
        if 0xD800 <= ord(char) <= 0xDFFF:
            raise self._error("half a surrogate pair is no character")
        return ((ord(char), ord(char)),)

    def _next(self, char: str) -> bool:
        if self._text.startswith(char, self._at):
            self._at += 1
            return True
        return False

    def _error(self, why: str) -> UnreadablePatternError:
        return UnreadablePatternError(f"a pattern cannot be read at character {self._at}: {why}")

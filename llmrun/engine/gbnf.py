"""GBNF as llama.cpp's parser reads it: alternatives of symbols, repetitions written out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmrun.errors import UsageError

Ranges = tuple[tuple[int, int], ...]

_LAST = 0x10FFFF
# llama.cpp takes more; a grammar that needs them all is a hostile one.
_MAX_SYMBOLS = 400_000
_MAX_TIMES = 2000
_MAX_DEPTH = 200
_TOKEN = re.compile(
    r"""\s+|\#[^\n]*
    |(?P<rule>[a-zA-Z0-9-]+)\s*::=
    |(?P<name>[a-zA-Z0-9-]+)
    |(?P<literal>"(?:\\.|[^"\\])*")
    |(?P<chars>\[(?:\\.|[^\]\\])*\]|\.)
    |(?P<token>!?<[^>]*>)
    |(?P<times>[*+?]|\{\s*[0-9]+\s*(?:,\s*[0-9]*\s*)?\})
    |(?P<sign>[()|])""",
    re.VERBOSE | re.DOTALL,
)
_CHAR = re.compile(
    r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|\\(.)|(.)", re.DOTALL
)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}


class UnreadableGrammarError(UsageError):
    """The text is no GBNF."""


class UnusableGrammarError(UsageError):
    """The grammar cannot be used: too large, or too many ways through it at once."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """`rules[rule]` are its alternatives, each a sequence of symbols: from 0 on, a place in
    `classes`, which is one character of these; below 0, `~rule`. Rule 0 is `root`."""

    rules: list[list[list[int]]]
    classes: list[Ranges]


def read_gbnf(text: str, *, max_copies: int | None = None) -> Grammar:
    """The rules of a grammar. A token of a vocabulary stands for any character. What is repeated
    more than `max_copies` times is read as if it were that often or more.

    Raises UnreadableGrammarError, and UnusableGrammarError for one of too many symbols.
    """
    reader = _Reader(text, max_copies)
    reader.read()
    rules = []
    for name, alternatives in zip(reader.names, reader.rules, strict=True):
        if alternatives is None:
            raise UnreadableGrammarError(f"the grammar has no rule {name[:40]}")
        rules.append(alternatives)
    return Grammar(rules, list(reader.classes))


class _Reader:
    def __init__(self, text: str, max_copies: int | None) -> None:
        self._max_copies = max_copies
        self.names: dict[str, int] = {"root": 0}
        self.rules: list[list[list[int]] | None] = [None]
        self.classes: dict[Ranges, int] = {}
        self._of_token: dict[str, tuple[int, ...]] = {}
        self._tokens = _tokens(text)
        self._kind, self._text = "", ""
        self._n_symbols = 0
        self._depth = 0

    def read(self) -> None:
        self._advance()
        while self._kind == "rule":
            rule = self._rule(self._text)
            self._advance()
            self.rules[rule] = self._alternatives()
        if self._kind != "end":
            raise UnreadableGrammarError(f"the grammar has {self._text[:40]!r} out of place")

    def _advance(self) -> None:
        self._kind, self._text = next(self._tokens)

    def _rule(self, name: str) -> int:
        rule = self.names.setdefault(name, len(self.rules))
        if rule == len(self.rules):
            self.rules.append(None)
        return rule

    def _new_rule(self, alternatives: list[list[int]]) -> int:
        self._spend(sum(map(len, alternatives)) + 1)
        # No name of a grammar's own holds a space.
        rule = self._rule(f" {len(self.rules)}")
        self.rules[rule] = alternatives
        return ~rule

    def _alternatives(self) -> list[list[int]]:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UnusableGrammarError("the grammar has too many brackets inside one another")
        found = [self._sequence()]
        while self._text == "|" and self._kind == "sign":
            self._advance()
            found.append(self._sequence())
        self._depth -= 1
        return found

    def _sequence(self) -> list[int]:
        found: list[int] = []
        last = 0
        while True:
            if self._kind in ("literal", "chars", "token"):
                last = len(found)
                found += self._symbols(self._kind, self._text)
            elif self._kind == "name":
                last = len(found)
                found.append(~self._rule(self._text))
            elif self._kind == "times":
                item = found[last:]
                del found[last:]
                found += self._repeated(item, self._text)
            elif self._kind == "sign" and self._text == "(":
                self._advance()
                last = len(found)
                found.append(self._new_rule(self._alternatives()))
                if self._text != ")" or self._kind != "sign":
                    raise UnreadableGrammarError("a bracket of the grammar is not closed")
            else:
                self._spend(len(found))
                return found
            self._advance()

    def _repeated(self, item: list[int], times: str) -> list[int]:
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(times) or _bounds(times)
        if low > _MAX_TIMES:
            raise UnusableGrammarError(f"the grammar repeats more than {_MAX_TIMES} times")
        if self._max_copies is not None and max(low, high or 0) > self._max_copies:
            low, high = min(low, self._max_copies), None
        self._spend(low * len(item))
        found = item * low
        if high is None or high > _MAX_TIMES:
            rule = self._new_rule([[], []])
            self.rules[~rule] = [[*item, rule], []]
            return [*found, rule]
        following: list[int] = []
        for _ in range(high - low):
            following = [self._new_rule([[*item, *following], []])]
        return found + following

    def _symbols(self, kind: str, text: str) -> tuple[int, ...]:
        found = self._of_token.get(text)
        if found is None:
            if kind == "literal":
                codes = [_code(match) for match in _CHAR.finditer(text[1:-1])]
                ranges: list[Ranges] = [((code, code),) for code in codes]
            else:
                ranges = [((0, _LAST),) if kind == "token" or text == "." else _ranges(text)]
            found = tuple(self.classes.setdefault(each, len(self.classes)) for each in ranges)
            self._of_token[text] = found
        return found

    def _spend(self, amount: int) -> None:
        self._n_symbols += amount
        if self._n_symbols > _MAX_SYMBOLS:
            raise UnusableGrammarError("the grammar is too large, its repetitions written out")


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise UnreadableGrammarError(f"the grammar cannot be read at {text[at : at + 20]!r}")
        at = match.end()
        if match.lastgroup:
            yield match.lastgroup, match[match.lastgroup]
    while True:
        yield "end", ""


def _bounds(times: str) -> tuple[int, int | None]:
    low, comma, high = times[1:-1].partition(",")
    if max(len(low), len(high)) > 9:
        raise UnusableGrammarError("the grammar repeats too often")
    return int(low), int(low) if not comma else int(high) if high.strip() else None


def _ranges(chars: str) -> Ranges:
    """The characters of a class, in order and apart from each other."""
    inner = chars[1:-1]
    is_negated = inner.startswith("^")
    found: list[tuple[int, int]] = []
    matches = list(_CHAR.finditer(inner, int(is_negated)))
    at = 0
    while at < len(matches):
        low = high = _code(matches[at])
        at += 1
        if at + 1 < len(matches) and matches[at].group() == "-":
            high = _code(matches[at + 1])
            at += 2
        found.append((low, high))
    merged: list[tuple[int, int]] = []
    for low, high in sorted(found):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        elif low <= high:
            merged.append((low, high))
    if not is_negated:
        return tuple(merged)
    edges = [-1, *(edge for pair in merged for edge in pair), _LAST + 1]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((low + 1, high - 1) for low, high in pairs if low + 1 < high)


def _code(match: re.Match[str]) -> int:
    two, four, eight, escaped, plain = match.groups()
    if plain:
        return ord(plain)
    if escaped:
        return ord(_NAMED.get(escaped, escaped))
    return int(two or four or eight, 16)

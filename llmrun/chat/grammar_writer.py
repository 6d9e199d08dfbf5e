"""The rules of one grammar in GBNF, and how texts, characters and automata are spelled in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from llmrun.chat.automaton import Automaton, Work
from llmrun.chat.regex_syntax import Ranges, complement
from llmrun.errors import UsageError

# What `engine.sampling` takes, about.
_MAX_CHARS = 512 * 1024
# Longer classes become rules of their own.
_SHORT = 20
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[a-zA-Z][a-zA-Z0-9-]*')

T = TypeVar("T")
Spelling = Callable[["GrammarWriter", Ranges], Sequence[str]]
"""The bodies, told apart by their first characters, that spell one character of these."""


class GrammarWriter:
    """Collects the rules of one grammar. `common`: rules that are written where they are used.

    Raises UsageError when the rules together become larger than what can be used.
    """

    def __init__(self, common: Mapping[str, str]) -> None:
        self._common = common
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._n_chars = 0
        self._made: dict[Hashable, Any] = {}
        self.work = Work()

    def text(self, root: str) -> str:
        """The grammar whose rule `root` is this."""
        rules = {"root": root, **self._common, **self._rules}
        used = _reachable(rules)
        return "".join(f"{name} ::= {body}\n" for name, body in rules.items() if name in used)

    def add(self, body: str) -> str:
        """The name of a rule with this body: the same one for the same body, because two rules
        that say the same are two ways for llama.cpp."""
        name = self._names.get(body)
        if name is None:
            name = self._names[body] = self.reserve()
            self.set(name, body)
        return name

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for each `key`."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def reserve(self) -> str:
        """The name of a rule whose body comes later."""
        name = f"r{len(self._rules)}"
        self._rules[name] = ""
        return name

    def set(self, name: str, body: str) -> None:
        """Give the rule `name` this body."""
        self.spend(len(body) + 10)
        self._rules[name] = body

    def settle(self, name: str, body: str) -> str:
        """Give a reserved rule this body; the name to use from now on, which is another one where
        there is a rule that says the same."""
        known = body if body in self._rules else self._names.setdefault(body, name)
        self.set(name, body if known == name else known)
        return known

    def spend(self, n_chars: int) -> None:
        """Count characters that are written into the grammar, or about to be."""
        self._n_chars += n_chars
        if self._n_chars > _MAX_CHARS:
            raise UsageError(
                "the grammar of the JSON schema is too large",
                why=f"it needs more than {_MAX_CHARS} characters",
                hint="use a smaller schema, or one that repeats and unites less",
            )

    def add_automaton(self, found: Automaton, spelling: Spelling, end: str) -> str:
        """A name or a body for the texts of an automaton, each followed by the body `end`.

        A rule for each state that is reached from several places or has several ways on.
        """
        bodies = {
            ranges: spelling(self, ranges)
            for ranges in dict.fromkeys(each for steps in found.steps for each in steps.values())
        }
        ways = [
            [(body, to) for to, ranges in steps.items() for body in bodies[ranges]]
            for steps in found.steps
        ]
        n_entries = [1] + [0] * (len(ways) - 1)
        for each in ways:
            for _, to in each:
                n_entries[to] += 1
        names: dict[int, str] = {}
        waiting = []

        def write(state: int) -> str:
            """The state's name, or its body where that is one way from one place."""
            parts: list[str] = []
            while n_entries[state] < 2:
                if state in found.accepting and not ways[state]:
                    return _sequence([*parts, end])
                if state in found.accepting or len(ways[state]) > 1:
                    break
                ((body, state),) = ways[state]
                parts.append(body)
            if state not in names:
                names[state] = self.reserve()
                waiting.append(state)
            return _sequence([*parts, names[state]])

        start = write(0)
        while waiting:
            state = waiting.pop()
            alternatives = [_sequence([body, write(to)]) for body, to in ways[state]]
            if state in found.accepting:
                alternatives.append(end or '""')
            self.set(names[state], " | ".join(alternatives))
        return start


def plain_chars(writer: GrammarWriter, ranges: Ranges) -> Sequence[str]:
    """The spelling of characters as they are."""
    del writer
    return (char_class(ranges),)


def json_chars(writer: GrammarWriter, ranges: Ranges) -> Sequence[str]:
    """The spelling of characters within a JSON string: as they are, and in one way where they need
    a backslash."""
    plain = _common(ranges, _PLAIN)
    bodies = []
    if plain:
        body = char_class(plain)
        bodies = [body if len(body) < _SHORT else writer.add(body)]
    named = [name for code, name in _NAMED.items() if _common(ranges, ((code, code),))]
    codes = [
        code
        for code in (*range(0x20), 0x7F)
        if code not in _NAMED and _common(ranges, ((code, code),))
    ]
    ways = [f'"{name}"' for name in named]
    ways += [f'"u{code:04x}"' for code in codes]
    if len(ways) == 1:
        bodies.append(f'"\\\\{ways[0][1:]}')
    elif ways:
        bodies.append(f'"\\\\" {writer.add(" | ".join(ways))}')
    return bodies


def literal(text: str) -> str:
    """The GBNF of this very text; nothing for none."""
    return f'"{"".join(map(_escaped, text))}"' if text else ""


def char_class(ranges: Ranges) -> str:
    """The GBNF of one of these characters."""
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return literal(chr(ranges[0][0]))
    if ranges[-1][1] == 0x10FFFF:
        # All but none is not GBNF.
        others = complement(ranges) or ((0, 0),)
        return f"[^{''.join(map(_spelled_range, others))}]"
    return f"[{''.join(map(_spelled_range, ranges))}]"


def _spelled_range(bounds: tuple[int, int]) -> str:
    low, high = (
        f"\\x{code:02X}" if code < 0x30 or chr(code) in "[\\]^" else _escaped(chr(code))
        for code in bounds
    )
    return low if low == high else f"{low}-{high}"


def _sequence(bodies: Sequence[str]) -> str:
    """These bodies one after another, literals made one where they meet."""
    found: list[str] = []
    for body in filter(None, bodies):
        if found and found[-1][-1] == '"' == body[0]:
            found[-1] = found[-1][:-1]
            found.append(body[1:])
        else:
            found += [" ", body] if found else [body]
    return "".join(found)


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char in _NAMED_ESCAPES:
        return _NAMED_ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02X}" if code < 0x100 else f"\\U{code:08X}"


def _common(ranges: Ranges, others: Ranges) -> Ranges:
    return tuple(
        (max(low, least), min(high, most))
        for low, high in ranges
        for least, most in others
        if max(low, least) <= min(high, most)
    )


def _reachable(rules: Mapping[str, str]) -> set[str]:
    """The names of the rules that `root` needs."""
    used, waiting = {"root"}, ["root"]
    while waiting:
        for name in _TOKEN.findall(rules[waiting.pop()]):
            if name in rules and name not in used:
                used.add(name)
                waiting.append(name)
    return used


_NAMED_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# What follows the backslash in JSON, as GBNF spells it.
_NAMED = {0x22: '\\"', 0x5C: "\\\\", 8: "b", 9: "t", 10: "n", 12: "f", 13: "r"}
_PLAIN: Ranges = complement(((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F)))

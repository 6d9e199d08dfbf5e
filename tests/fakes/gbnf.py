"""Random sentences of a GBNF grammar, without a model: what a sampler under it could write."""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r'\s*(?:(?P<literal>"(?:\\.|[^"\\])*")|(?P<chars>\[(?:\\.|[^\]\\])*\])'
    r"|(?P<name>[a-zA-Z][a-zA-Z0-9-]*)|(?P<times>\{\d+(?:,\d*)?\})|(?P<sign>[()|*+?]))"
)
# What a class that leaves characters out is filled with: what could be taken for syntax, mostly.
_POOL = "abcp 09<>/|\"'\\{}[](),:=\n\té‘😀functioarmet_"
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass
class Node:
    kind: str  # literal, chars, name, seq, or, times
    text: str = ""
    parts: tuple[Node, ...] = ()
    low: int = 0
    high: int | None = None


def parse(grammar: str) -> dict[str, Node]:
    """The rules by name. Every name that is used must be there once."""
    rules: dict[str, Node] = {}
    for line in grammar.splitlines():
        name, sign, body = line.partition(" ::= ")
        assert sign and name not in rules, line
        tokens = _tokens(body)
        rules[name] = _alternatives(tokens)
        assert not tokens, line
    for node in rules.values():
        assert _names(node) <= rules.keys(), _names(node) - rules.keys()
    return rules


def sentence(rules: dict[str, Node], seed: int, max_depth: int = 60) -> str:
    """A random sentence of rule `root`; beyond `max_depth` the shortest way out is taken."""
    heights = _heights(rules)
    rng = random.Random(seed)

    def write(node: Node, depth: int) -> str:
        deep = depth > max_depth
        if node.kind == "literal":
            return node.text
        if node.kind == "chars":
            return _one_of(node.text, rng)
        if node.kind == "name":
            return write(rules[node.text], depth + 1)
        if node.kind == "seq":
            return "".join(write(part, depth) for part in node.parts)
        if node.kind == "or":
            if deep:
                return write(min(node.parts, key=lambda p: _height(p, heights)), depth)
            return write(rng.choice(node.parts), depth)
        high = node.low + 2 if node.high is None else node.high
        n = node.low if deep else rng.randint(node.low, min(high, node.low + 3))
        return "".join(write(node.parts[0], depth) for _ in range(n))

    return write(rules["root"], 0)


def matches(rules: dict[str, Node], text: str) -> bool:
    """Whether `text` is a sentence of rule `root`."""
    known: dict[tuple[str, int], frozenset[int]] = {}

    def rule(name: str, at: int) -> frozenset[int]:
        if (name, at) not in known:
            known[name, at] = frozenset(ends(rules[name], at))
        return known[name, at]

    def ends(node: Node, at: int) -> set[int]:
        """Where what begins at `at` may end."""
        if node.kind == "literal":
            return {at + len(node.text)} if text.startswith(node.text, at) else set()
        if node.kind == "chars":
            return {at + 1} if _class(node.text).fullmatch(text[at : at + 1]) else set()
        if node.kind == "name":
            return set(rule(node.text, at))
        if node.kind == "or":
            return set().union(*(ends(part, at) for part in node.parts))
        if node.kind == "seq":
            places = {at}
            for part in node.parts:
                places = set().union(*(ends(part, place) for place in places))
            return places
        found, places, n = ({at} if not node.low else set()), {at}, 0
        while places and (node.high is None or n < node.high):
            n += 1
            places = set().union(*(ends(node.parts[0], place) for place in places))
            if n >= node.low:
                if places <= found:
                    break
                found |= places
        return found

    return len(text) in rule("root", 0)


def _tokens(body: str) -> list[tuple[str, str]]:
    tokens, at = [], 0
    while at < len(body.rstrip()):
        match = _TOKEN.match(body, at)
        assert match, body[at:]
        tokens.append((match.lastgroup or "", match.group(match.lastgroup or "")))
        at = match.end()
    return tokens


def _alternatives(tokens: list[tuple[str, str]]) -> Node:
    ways = [_sequence(tokens)]
    while tokens and tokens[0] == ("sign", "|"):
        tokens.pop(0)
        ways.append(_sequence(tokens))
    return ways[0] if len(ways) == 1 else Node("or", parts=tuple(ways))


def _sequence(tokens: list[tuple[str, str]]) -> Node:
    parts: list[Node] = []
    while tokens and tokens[0] not in (("sign", "|"), ("sign", ")")):
        kind, text = tokens.pop(0)
        if kind == "literal":
            parts.append(Node("literal", _unescape(text[1:-1])))
        elif kind in ("chars", "name"):
            parts.append(Node(kind, text))
        elif text == "(":
            parts.append(_alternatives(tokens))
            assert tokens.pop(0) == ("sign", ")")
        else:
            parts.append(_times(parts.pop(), text))
    return Node("seq", parts=tuple(parts))


def _times(part: Node, text: str) -> Node:
    if text in "*+?":
        return Node("times", parts=(part,), low=int(text == "+"), high={"?": 1}.get(text))
    low, comma, high = text[1:-1].partition(",")
    most = int(low) if not comma else int(high) if high else None
    return Node("times", parts=(part,), low=int(low), high=most)


def _unescape(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        body = match.group()[1:]
        return chr(int(body[1:], 16)) if len(body) > 1 else _ESCAPES.get(body, body)

    return re.sub(r"\\(x[0-9A-Fa-f]{2}|U[0-9A-Fa-f]{8}|.)", one, text)


def _one_of(chars: str, rng: random.Random) -> str:
    pattern = _class(chars)
    fitting = [char for char in _POOL if pattern.fullmatch(char)]
    if not fitting:
        # Its own, where all of them are rare ones.
        usual = [chr(code) for code in range(127)]
        fitting = [char for char in [*usual, *_unescape(chars[1:-1])] if pattern.fullmatch(char)]
    return rng.choice(fitting)


@functools.cache
def _class(chars: str) -> re.Pattern[str]:
    inner = chars[1:-1]
    negated = inner.startswith("^")
    spelled = re.sub(
        r"\\(?:x([0-9A-Fa-f]{2})|(U[0-9A-Fa-f]{8})|([nrt])|(.))", _as_python, inner.lstrip("^")
    )
    return re.compile(f"[{'^' if negated else ''}{spelled}]")


def _as_python(match: re.Match[str]) -> str:
    code, wide, named, other = match.groups()
    if code:
        return f"\\x{code}"
    return f"\\{wide or named}" if wide or named else re.escape(other)


def _names(node: Node) -> set[str]:
    own = {node.text} if node.kind == "name" else set()
    return own.union(*(_names(part) for part in node.parts))


def _heights(rules: dict[str, Node]) -> dict[str, float]:
    heights = dict.fromkeys(rules, float("inf"))
    for _ in range(len(rules)):
        new = {name: 1 + _height(node, heights) for name, node in rules.items()}
        if new == heights:
            break
        heights = new
    assert heights["root"] < float("inf"), "the grammar never ends"
    return heights


def _height(node: Node, heights: dict[str, float]) -> float:
    if node.kind == "name":
        return heights[node.text]
    if node.kind == "times" and node.low == 0:
        return 0
    inner = [_height(part, heights) for part in node.parts]
    return (min(inner) if node.kind == "or" else max(inner, default=0)) if inner else 0

"""JSON schemas as GBNF rules, for JSON and for Gemma 4's spelling of it.

The binding's converter (`engine.grammar`) only writes JSON, refuses schemas without a `type`,
which tools often have, and recursive ones, and does not escape quotes. Here it is used for
patterns and formats of strings alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeGuard

from llmrun.chat.number_gbnf import number_body
from llmrun.chat.tool_schema import properties_of, resolve
from llmrun.engine.grammar import grammar_of_schema
from llmrun.errors import UsageError

Style = Literal["json", "gemma"]

_MAX_DEPTH = 32
# Beyond, a length is not enforced: llama.cpp writes repetitions out, one rule for each.
_MAX_REPETITION = 1000

_COMMON = {
    "space": '" "',
    "hex": "[0-9a-fA-F]",
    "json-char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" hex hex hex hex)',
    "json-string": r'"\"" json-char* "\""',
    "digits": "[0-9]{1,16}",
    "natural-integer": '"0" | [1-9] [0-9]{0,15}',
    "natural-number": 'natural-integer ("." digits)? ([eE] [-+]? [0-9]{1,2})?',
    "integer": '"-"? natural-integer',
    "number": '"-"? natural-number',
    "boolean": '"true" | "false"',
    "json-value": 'json-object | json-array | json-string | number | boolean | "null"',
    "json-member": 'json-string ":" space json-value',
    "json-object": '"{" (json-member ("," space json-member)*)? "}"',
    "json-array": '"[" (json-value ("," space json-value)*)? "]"',
    "gemma-string": r'"<|\"|>" gemma-text "<|\"|>"',
    "gemma-value": 'gemma-object | gemma-array | gemma-string | number | boolean | "null"',
    "gemma-member": '[a-zA-Z_] [a-zA-Z0-9_]* ":" gemma-value',
    "gemma-object": '"{" (gemma-member ("," gemma-member)*)? "}"',
    "gemma-array": '"[" (gemma-value ("," gemma-value)*)? "]"',
}
GEMMA_QUOTE = '<|"|>'

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[a-zA-Z][a-zA-Z0-9-]*')


class GrammarWriter:
    """Collects the rules of one grammar."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._texts: dict[str, str] = {}

    def text(self, root: str) -> str:
        """The grammar whose rule `root` is this."""
        rules = {"root": root, **_COMMON, **self._rules}
        used = _reachable(rules)
        return "".join(f"{name} ::= {body}\n" for name, body in rules.items() if name in used)

    def add(self, body: str) -> str:
        """A rule under a name of its own; the name."""
        name = f"r{len(self._rules)}"
        self._rules[name] = body
        return name

    def set(self, name: str, body: str) -> None:
        """Give the rule `name` this body."""
        self._rules[name] = body

    def text_without(self, stop: str) -> str:
        """The name of a rule for any text that does not hold `stop`.

        It is an automaton, with a rule for how much of `stop` was seen last.
        """
        if stop not in self._texts:
            states = [self.add("") for _ in stop]
            for i, state in enumerate(states):
                seen = {char: _overlap(stop[:i] + char, stop) for char in dict.fromkeys(stop)}
                ways = [
                    f"{_class([char])} {states[n]}" for char, n in seen.items() if 0 < n < len(stop)
                ]
                # All other characters start anew, but for the one that would complete `stop`.
                others = [char for char, n in seen.items() if n]
                ways.append(f"{_class(others, negated=True)} {states[0]}")
                self.set(state, f"({' | '.join(ways)})?")
            self._texts[stop] = states[0]
        return self._texts[stop]


class SchemaRules:
    """Writes the rules of one schema. `root` is what its `$ref` point into."""

    def __init__(self, writer: GrammarWriter, style: Style, root: Mapping[str, object]) -> None:
        self._writer = writer
        self._style = style
        self._root = root
        # By identity, with the schema itself, so that no other one takes its place.
        self._known: dict[int, tuple[Mapping[str, object], str]] = {}
        if style == "gemma":
            writer.set("gemma-text", writer.text_without(GEMMA_QUOTE))
        self._comma = '"," space' if style == "json" else '","'

    def value(self, schema: object, depth: int = 0) -> str:
        """A name or a bracketed body for values of `schema`. Anything, where it says nothing."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return self._any
        if _COMPOSED.isdisjoint(schema):
            return self._body(schema, depth)
        # Each is written once, however often and from wherever it is used, and within itself.
        known = self._known.get(id(schema))
        if known is None:
            known = self._known[id(schema)] = schema, self._writer.add(self._any)
            body = self._body(schema, depth)
            # A rule that is only itself would never end.
            self._writer.set(known[1], self._any if body == known[1] else body)
        return known[1]

    def _body(self, schema: Mapping[str, object], depth: int) -> str:
        if "$ref" in schema:
            return self.value(resolve(schema["$ref"], self._root), depth + 1)
        if "const" in schema:
            return literal(self.spell(schema["const"]))
        values = schema.get("enum")
        if _is_list(values):
            return _either(literal(self.spell(value)) for value in values)
        for key in ("anyOf", "oneOf"):
            choices = schema.get(key)
            if _is_list(choices):
                rest = {name: value for name, value in schema.items() if name != key}
                return _either(self._choice(rest, choice, depth + 1) for choice in choices)
        parts = schema.get("allOf")
        if _is_list(parts):
            rest = {name: value for name, value in schema.items() if name != "allOf"}
            return self.value(merge([rest, *map(self._resolved, parts)]), depth + 1)
        return _either(self._typed(schema, kind, depth) for kind in _types(schema))

    def _choice(self, rest: Mapping[str, object], choice: object, depth: int) -> str:
        """One of several schemas, which adds to what is said beside them."""
        if not isinstance(choice, Mapping) or "$ref" in choice or _SAYING.isdisjoint(rest):
            return self.value(choice, depth)
        return self.value(merge([rest, choice]), depth)

    def spell(self, value: object) -> str:
        """A value as this style writes it."""
        if self._style == "json" or value is None or isinstance(value, bool | int | float):
            return json.dumps(value, ensure_ascii=False)
        if isinstance(value, Mapping):
            members = (f"{key}:{self.spell(value[key])}" for key in sorted(value, key=str.lower))
            return f"{{{','.join(members)}}}"
        if isinstance(value, list | tuple):
            return f"[{','.join(map(self.spell, value))}]"
        return f"{GEMMA_QUOTE}{value}{GEMMA_QUOTE}"

    @property
    def _any(self) -> str:
        return f"{self._style}-value"

    def _resolved(self, schema: object) -> object:
        """`schema`, or what it refers to where that can be read in its place."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = resolve(schema["$ref"], self._root)
        return schema

    def _typed(self, schema: Mapping[str, object], kind: str, depth: int) -> str:
        if kind == "object":
            return self.write_object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return number_body(schema, is_integer=kind == "integer") or kind
        return {"boolean": "boolean", "null": '"null"'}.get(kind, self._any)

    def write_object(self, schema: Mapping[str, object], depth: int = 0) -> str:
        """An object: its properties in order, those that are not required or left out."""
        properties = properties_of(schema)
        required = schema.get("required")
        needed = set(map(str, required)) if _is_list(required) else set()
        keys = list(properties)
        if self._style == "gemma":
            keys.sort(key=str.lower)  # as its template does
        members = [
            (self._key(key) + self.value(properties[key], depth + 1), key in needed) for key in keys
        ]
        further = schema.get("additionalProperties", "properties" not in schema)
        extra = ""
        if isinstance(further, Mapping) or further is True:
            key = "json-string" if self._style == "json" else "[a-zA-Z_] [a-zA-Z0-9_]*"
            colon = '":" space' if self._style == "json" else '":"'
            extra = f"{key} {colon} {self.value(further, depth + 1)}"
        return self._writer.add(f'"{{" {self._members(members, extra)} "}}"')

    def _key(self, key: str) -> str:
        if self._style == "json":
            return f"{literal(json.dumps(key, ensure_ascii=False) + ':')} space "
        return f"{literal(key + ':')} "

    def _members(self, members: Sequence[tuple[str, bool]], extra: str) -> str:
        return write_members(self._writer, members, self._comma, extra)

    def _array(self, schema: Mapping[str, object], depth: int) -> str:
        # What older drafts call `items` when each place has a schema of its own.
        first = schema.get("prefixItems", schema.get("items"))
        if _is_list(first):
            inner = f" {self._comma} ".join(self.value(item, depth + 1) for item in first)
            return self._writer.add(f'"[" {inner} "]"')
        item = self.value(schema.get("items"), depth + 1)
        low, high = _bounds(schema, "minItems", "maxItems")
        if high == 0:
            return '"[]"'
        most = None if high is None else high - 1
        inner = item if most == 0 else f"{item} ({self._comma} {item}){_times(low - 1, most)}"
        inner = inner if low else f"({inner})?"
        return self._writer.add(f'"[" {inner} "]"')

    def _string(self, schema: Mapping[str, object]) -> str:
        times = length_range(schema)
        if self._style == "gemma":
            if times is None:
                return "gemma-string"
            quote = literal(GEMMA_QUOTE)
            return self._writer.add(f"{quote} [^<]{times} {quote}")
        if "pattern" in schema or "format" in schema:
            name = self._converted_string(schema)
            if name is not None:
                return name
        if times is None:
            return "json-string"
        return self._writer.add(rf'"\"" json-char{times} "\""')

    def _converted_string(self, schema: Mapping[str, object]) -> str | None:
        """The binding's rules for a pattern or a format; None where it has none."""
        kept = {key: schema[key] for key in ("pattern", "format") if key in schema}
        try:
            text = grammar_of_schema(json.dumps({"type": "string", **kept}))
        except UsageError:
            return None
        rules = dict(line.split(" ::= ", 1) for line in text.splitlines() if " ::= " in line)
        names = {name: self._writer.add("") for name in rules}

        def rename(match: re.Match[str]) -> str:
            return names.get(match.group(), match.group())

        for name, body in rules.items():
            # Its own white space behind a value is none of ours.
            body = '""' if name == "space" else _TOKEN.sub(rename, body)
            self._writer.set(names[name], body)
        return names.get("root")


def write_members(
    writer: GrammarWriter, members: Sequence[tuple[str, bool]], comma: str, extra: str = ""
) -> str:
    """The body of a list of members with commas between them: each body, and whether it must be
    there. `extra`: one more that may come any number of times."""
    names = [writer.add(body) for body, _ in members]
    # `rest` is what may follow once there is something, `start` what may come first.
    rest = f"({comma} {extra})*" if extra else ""
    start = f"({extra} {rest})?" if extra else ""
    for name, (_, is_needed) in reversed(list(zip(names, members, strict=True))):
        follows = writer.add(rest) if rest else ""
        begun = f"{name} {follows}".strip()
        if is_needed:
            start, rest = begun, f"{comma} {begun}"
        else:
            start = f"{begun} | {writer.add(start)}" if start else begun
            start = f"({start})" if start != begun else f"({begun})?"
            rest = f"({comma} {name})? {follows}".strip()
    return start


def length_range(schema: object) -> str | None:
    """How often a character of a string may come, where the schema says it."""
    if not isinstance(schema, Mapping):
        return None
    low, high = _bounds(schema, "minLength", "maxLength")
    return _times(low, high) if low > 0 or high is not None else None


def merge(schemas: Sequence[object]) -> dict[str, object]:
    """One schema that says what all of these say; of what they contradict each other in, the
    last."""
    merged: dict[str, object] = {}
    properties: dict[str, object] = {}
    required: list[object] = []
    for schema in schemas:
        if isinstance(schema, Mapping):
            merged.update({str(key): value for key, value in schema.items()})
            properties.update(properties_of(schema))
            needed = schema.get("required")
            required += needed if _is_list(needed) else ()
    if properties:
        merged["properties"] = properties
    if required:
        merged["required"] = required
    return merged


def literal(text: str) -> str:
    """The GBNF of this very text; nothing for none."""
    return f'"{"".join(map(_escaped, text))}"' if text else ""


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char in _NAMED_ESCAPES:
        return _NAMED_ESCAPES[char]
    return char if char >= " " and char != "\x7f" else f"\\x{ord(char):02X}"


_NAMED_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _class(chars: Sequence[str], *, negated: bool = False) -> str:
    inner = "".join(f"\\{c}" if c in '\\]["' else _escaped(c) for c in chars)
    return f"[{'^' if negated else ''}{inner}]"


def _overlap(seen: str, stop: str) -> int:
    """How much of `stop` the end of `seen` is."""
    return next(n for n in range(min(len(seen), len(stop)), -1, -1) if seen.endswith(stop[:n]))


def _either(bodies: Iterable[str]) -> str:
    choices = list(dict.fromkeys(bodies))
    return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, list | tuple) and bool(value)


def _types(schema: Mapping[str, object]) -> Sequence[str]:
    said = schema.get("type")
    if isinstance(said, str):
        return (said,)
    if _is_list(said):
        return [str(name) for name in said]
    for key, kind in _SIGNS:
        if key in schema:
            return (kind,)
    return ("any",)


_COMPOSED = frozenset(
    {"anyOf", "oneOf", "allOf", "properties", "items", "prefixItems", "additionalProperties"}
)
_SAYING = frozenset({"type", "properties", "items"})
_SIGNS = (
    ("properties", "object"), ("items", "array"), ("prefixItems", "array"),
    ("pattern", "string"), ("minLength", "string"), ("maxLength", "string"),
)  # fmt: skip


def _bounds(schema: Mapping[str, object], low_key: str, high_key: str) -> tuple[int, int | None]:
    low, high = schema.get(low_key), schema.get(high_key)
    n_low = min(low, _MAX_REPETITION) if isinstance(low, int) and low > 0 else 0
    if not isinstance(high, int) or high < 0 or high > _MAX_REPETITION:
        return n_low, None
    return min(n_low, high), high


def _times(low: int, high: int | None) -> str:
    if high is None:
        return f"{{{low},}}" if low > 0 else "*"
    return f"{{{max(low, 0)},{high}}}"


def _reachable(rules: Mapping[str, str]) -> set[str]:
    """The names of the rules that `root` needs."""
    used, waiting = {"root"}, ["root"]
    while waiting:
        for name in _TOKEN.findall(rules[waiting.pop()]):
            if name in rules and name not in used:
                used.add(name)
                waiting.append(name)
    return used

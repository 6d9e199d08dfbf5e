"""JSON schemas as GBNF rules, for JSON and for Gemma 4's spelling of it.

llama.cpp follows every way through a grammar at once. So what can be told apart is told apart at
the first character where it differs, and nothing is written in two ways (`engine.grammar` has the
reason).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard

from llmrun.chat.automaton import automaton
from llmrun.chat.grammar_writer import GrammarWriter, literal, plain_chars
from llmrun.chat.number_gbnf import number_body
from llmrun.chat.regex_syntax import (
    ALL,
    Anchor,
    Chars,
    PatternError,
    Repeat,
    text_node,
)
from llmrun.chat.regex_syntax import Sequence as InOrder
from llmrun.chat.string_gbnf import Style, other_key_body, string_body, texts_body
from llmrun.chat.tool_schema import properties_of, resolve, types_of

_MAX_DEPTH = 32
# Beyond, a length is not enforced: llama.cpp writes repetitions out, one rule for each.
_MAX_REPETITION = 1000
# For `check_grammar`: how often something comes is told by the commas, or by the characters.
N_COPIES = 4
# Longer bodies become rules, so that what is used often is written once.
_SHORT = 60

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
    "gemma-value": 'gemma-object | gemma-array | gemma-string | number | boolean | "null"',
    "gemma-member": '[a-zA-Z_] [a-zA-Z0-9_]* ":" gemma-value',
    "gemma-object": '"{" (gemma-member ("," gemma-member)*)? "}"',
    "gemma-array": '"[" (gemma-value ("," gemma-value)*)? "]"',
}
GEMMA_QUOTE = '<|"|>'


def grammar_writer() -> GrammarWriter:
    """An empty grammar, with the rules that all schemas use."""
    return GrammarWriter(_COMMON)


def text_until(writer: GrammarWriter, end: str) -> str:
    """The name of a rule for any text up to the first `end`, and that; `end` is told by what it is
    without white space around it."""

    def make() -> str:
        stop = end.strip()
        n_behind = len(end) - len(end.rstrip()) if stop else 0
        last = InOrder((text_node(end), Anchor(is_start=False)))
        earlier = InOrder((text_node(stop), Repeat(Chars(ALL), n_behind + 1, None)))
        found = automaton([last], [earlier])
        assert found is not None
        return writer.add(writer.add_automaton(found, plain_chars, ""))

    return writer.once(("until", end), make)


class SchemaRules:
    """Writes the rules of one schema. `root` is what its `$ref` point into.

    With `is_lenient`, a pattern that cannot be kept is left out; without, it raises PatternError.
    """

    def __init__(
        self,
        writer: GrammarWriter,
        style: Style,
        root: Mapping[str, object],
        *,
        is_lenient: bool = False,
    ) -> None:
        self._writer = writer
        self._style = style
        self._root = root
        self._is_lenient = is_lenient
        # By identity, with the schema itself, so that no other one takes its place.
        self._known: dict[int, tuple[Mapping[str, object], str]] = {}
        if style == "gemma":
            quote = literal(GEMMA_QUOTE)
            writer.set("gemma-string", f"{quote} {text_until(writer, GEMMA_QUOTE)}")
        self._comma = '"," space' if style == "json" else '","'

    def value(self, schema: object, depth: int = 0) -> str:
        """A name or a bracketed body for values of `schema`. Anything, where it says nothing."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return self._any
        # Each is written once, however often and from wherever it is used, and within itself.
        known = self._known.get(id(schema))
        if known is not None:
            return known[1]
        if _COMPOSED.isdisjoint(schema):
            body = self._body(schema, depth)
            name = body if len(body) < _SHORT else self._writer.add(body)
        else:
            name = self._writer.reserve()
            self._known[id(schema)] = schema, name
            body = self._body(schema, depth)
            if body == name:
                # A rule that is only itself would never end.
                body = self._any
            name = self._writer.settle(name, body)
        self._known[id(schema)] = schema, name
        return name

    def _body(self, schema: Mapping[str, object], depth: int) -> str:
        # What is united again and again can grow without the schema growing.
        self._writer.spend(_SHORT)
        if "$ref" in schema:
            return self.value(resolve(schema["$ref"], self._root), depth + 1)
        if "const" in schema:
            return literal(self.spell(schema["const"]))
        values = schema.get("enum")
        if _is_list(values):
            return texts_body(self._writer, map(self.spell, values))
        for key in ("anyOf", "oneOf"):
            choices = schema.get(key)
            if _is_list(choices):
                rest = {name: value for name, value in schema.items() if name != key}
                return self._union([(rest, choice) for choice in choices], depth + 1)
        parts = schema.get("allOf")
        if _is_list(parts):
            rest = {name: value for name, value in schema.items() if name != "allOf"}
            return self.value(merge([rest, *map(self._resolved, parts)]), depth + 1)
        return _either(self._typed(schema, kind, depth) for kind in _types(schema))

    def _union(self, choices: Sequence[tuple[Mapping[str, object], object]], depth: int) -> str:
        """Any of these schemas. Where one of them takes all of its type, the others of that type
        say nothing more, and would be further ways through the same text."""
        bodies: dict[str, frozenset[str]] = {}
        for rest, choice in choices:
            types = types_of(merge([rest, choice]) if rest else choice, self._root)
            bodies.setdefault(self._choice(rest, choice, depth), types)
        if self._any in bodies:
            return self._any
        for kind in ("object", "array", "string"):
            if f"{self._style}-{kind}" in bodies:
                every = f"{self._style}-{kind}"
                bodies = {b: t for b, t in bodies.items() if b == every or t != {kind}}
        return _either(bodies)

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
        further = schema.get("additionalProperties", "properties" not in schema)
        if not properties and further is True:
            return f"{self._style}-object"
        required = schema.get("required")
        needed = set(map(str, required)) if _is_list(required) else set()
        keys = list(properties)
        if self._style == "gemma":
            keys.sort(key=str.lower)  # as its template does
        members = [
            (self._key(key) + self.value(properties[key], depth + 1), key in needed) for key in keys
        ]
        extra = ""
        if isinstance(further, Mapping) or further is True:
            key = self._other_key(keys)
            colon = '":" space' if self._style == "json" else '":"'
            extra = f"{key} {colon} {self.value(further, depth + 1)}"
        inner = write_members(self._writer, members, self._comma, '"}"', extra=extra)
        return self._writer.add(f'"{{" {inner}')

    def _other_key(self, names: Sequence[str]) -> str:
        """The key of a member beside the named ones."""
        body = other_key_body(self._writer, self._style, names) if names else None
        if body is not None:
            return self._writer.add(body)
        return "json-string" if self._style == "json" else "[a-zA-Z_] [a-zA-Z0-9_]*"

    def _key(self, key: str) -> str:
        if self._style == "json":
            return f"{literal(json.dumps(key, ensure_ascii=False) + ':')} space "
        return f"{literal(key + ':')} "

    def _array(self, schema: Mapping[str, object], depth: int) -> str:
        # What older drafts call `items` when each place has a schema of its own.
        first = schema.get("prefixItems", schema.get("items"))
        if _is_list(first):
            inner = f" {self._comma} ".join(self.value(item, depth + 1) for item in first)
            return self._writer.add(f'"[" {inner} "]"')
        item = self.value(schema.get("items"), depth + 1)
        low, high = _bounds(schema, "minItems", "maxItems")
        if item == self._any and not low and high is None:
            return f"{self._style}-array"
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
        low, high = _bounds(schema, "minLength", "maxLength")
        try:
            body = string_body(self._writer, schema.get("pattern"), schema.get("format"), low, high)
        except PatternError:
            if not self._is_lenient:
                raise
            body = None
        if body is not None:
            return body
        if times is None:
            return "json-string"
        return self._writer.add(rf'"\"" json-char{times} "\""')


def write_members(
    writer: GrammarWriter,
    members: Sequence[tuple[str, bool]],
    comma: str,
    end: str,
    *,
    extra: str = "",
    lead: str = "",
) -> str:
    """The body of a list of members with commas between them, and of its `end`: each member's body,
    and whether it must be there. `extra`: one more that may come any number of times; `lead`: what
    is before the first.

    What may follow a comma is one rule that shares the comma, and the end is an alternative to it:
    however many members may come next, there are two ways on behind a member, and no more.
    """
    names = [writer.add(body) for body, _ in members]
    after, is_any_needed = "", False
    if extra:
        after = writer.once(
            ("extra", extra, comma, end), lambda: _repeated(writer, extra, comma, end)
        )
    for name, (_, is_needed) in reversed(list(zip(names, members, strict=True))):
        if not after:
            begun = f"{name} {end}"
        elif is_any_needed:
            begun = f"{name} {comma} {after}"
        else:
            begun = f"{name} ({comma} {after} | {end})"
        after = writer.add(f"{begun} | {after}" if after and not is_needed else begun)
        is_any_needed |= is_needed
    if not after:
        return end
    return f"{lead} {after}".strip() if is_any_needed else f"({lead} {after} | {end})"


def _repeated(writer: GrammarWriter, item: str, comma: str, end: str) -> str:
    name = writer.reserve()
    writer.set(name, f"{item} ({comma} {name} | {end})")
    return name


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

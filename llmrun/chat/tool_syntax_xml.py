"""Reads calls that have each argument between tags of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from llmrun.chat.tool_cursor import Cursor, Wait
from llmrun.chat.tool_formats import ToolFormat, ToolSpec
from llmrun.chat.tool_schema import TYPES, properties_of, types_of
from llmrun.chat.tool_syntax import MAX_NAME_CHARS, Sink
from llmrun.chat.tool_syntax_named import NamedReader
from llmrun.chat.tool_values import bare_value, escape, parse_value

_NOT_KEY = re.compile(r"""[<>"\n]""")
_MARKED = {
    '" string="true">': frozenset({"string"}),
    '" string="false">': TYPES - {"string"},
}


class XmlReader(NamedReader):
    """The name, then each argument in tags of its own. What a value is says the tool's schema."""

    def __init__(
        self, fmt: ToolFormat, tools: Sequence[ToolSpec], cursor: Cursor, sink: Sink
    ) -> None:
        super().__init__(fmt, tools, cursor, sink)
        self._argument_start = fmt.argument_start.strip()
        self._argument_end = fmt.argument_end.strip()
        # Where values stand on lines of their own, those line breaks are not theirs.
        self._has_lines = fmt.argument_end.startswith("\n")
        first = re.escape(self._argument_end[0])
        self._value_stop = re.compile(rf"[\n{first}]" if self._has_lines else first)
        self._ends = tuple(filter(None, (self._call_end, self._end)))

    def _list_openers(self) -> tuple[str, ...]:
        # Qwen3-Coder leaves the outer tag out at times. Without it, only a known name is no text.
        names = [f"{self._call_start}{name}{self._name_end}" for name in self._tools]
        return (self._begin, *names) if self._begin else (self._call_start,)

    def read_calls(self, opener: str) -> Wait[bool]:
        cursor = self._cursor
        name = self._name_in(opener)
        if name is None and opener != self._call_start:
            yield from cursor.skip_space()
            if not (yield from cursor.accept(self._call_start)):
                return (yield from self._read_other())
        while True:
            if name is None:
                name = yield from self._read_call_name()
            if name is None:
                return False
            if name == "":
                return (yield from self._read_other())
            self._sink.start(name, is_verbatim=False)
            self._sink.add("{")
            if not (yield from self._read_arguments(name)):
                return False
            name = None
            yield from cursor.skip_space()
            if self._end and (yield from cursor.accept_last(self._end)):
                return True
            if not self._begin or not (yield from cursor.accept(self._call_start)):
                return True

    def _name_in(self, opener: str) -> str | None:
        if opener in (self._begin, self._call_start):
            return None
        return opener[len(self._call_start) : len(opener) - len(self._name_end)]

    def _read_call_name(self) -> Wait[str | None]:
        """The name of a call whose start was passed; None when it is no call after all."""
        cursor = self._cursor
        yield from cursor.skip_space()
        name = yield from self._read_name()
        if not name:
            return name
        yield from cursor.skip_space()
        if self._name_end:
            return name if (yield from cursor.accept(self._name_end)) else None
        # Without a mark behind it, the name of a call is what arguments or the end follow.
        is_call = yield from cursor.precedes(self._argument_start, *self._ends)
        return name if is_call and (yield from cursor.peek()) else None

    def _read_arguments(self, name: str) -> Wait[bool]:
        cursor, sink = self._cursor, self._sink
        tool = self._tools.get(name)
        root = tool.parameters if tool is not None else {}
        is_first = True
        while True:
            yield from cursor.skip_space()
            tag = yield from cursor.accept(self._argument_start, *self._ends)
            if tag != self._argument_start:
                if not tag and (yield from cursor.accept_last(self._argument_start, *self._ends)):
                    return False  # the text ends within a tag
                if tag or not cursor.is_over:
                    sink.add("}")
                    sink.finish()
                    return bool(tag)
                return False
            key = yield from cursor.run_whole(_NOT_KEY, MAX_NAME_CHARS)
            if not key:
                return False
            key = key.strip()
            schema = properties_of(root).get(key)
            types = types_of(schema, root) if schema is not None else TYPES
            marked = yield from self._read_key_end()
            if marked is None:
                return False
            types = marked or types
            start = f"{'' if is_first else ', '}{json.dumps(key, ensure_ascii=False)}: "
            is_first = False
            if not (yield from self._read_argument(start, types)):
                return False

    def _read_key_end(self) -> Wait[frozenset[str] | None]:
        """Pass what is between key and value. The types that it names, empty where it names none;
        None when it is not there."""
        cursor = self._cursor
        if self._fmt.says_type:
            tag = yield from cursor.accept('" string="true">', '" string="false">', '">')
            if tag:
                return _MARKED.get(tag, frozenset())
            return None
        parts = re.findall(r"<[^<]*>|[^<]+", self._fmt.key_end.strip())
        for part in parts:
            yield from cursor.skip_space()
            if not (yield from cursor.accept(part)):
                return None
        if self._has_lines:
            yield from cursor.accept("\r\n", "\n")
        return frozenset()

    def _read_argument(self, start: str, types: frozenset[str]) -> Wait[bool]:
        """Pass a value with its end tag. A string is said while it comes, anything else when it is
        whole."""
        sink = self._sink
        if types == {"string"}:
            sink.add(f'{start}"')
            is_whole = yield from self._read_value_text(lambda text: sink.add(escape(text)))
            if is_whole:
                sink.add('"')
            return is_whole
        parts: list[str] = []
        is_whole = yield from self._read_value_text(parts.append)
        text = "".join(parts)
        sink.add(start + (typed_value(text, types) if is_whole else text))
        return is_whole

    def _read_value_text(self, say: Callable[[str], object]) -> Wait[bool]:
        """The text up to the end tag, which is one only where another tag or nothing follows."""
        cursor = self._cursor
        tags = (self._argument_end, *((f"\n{self._argument_end}",) * self._has_lines))
        while not cursor.is_over:
            text = yield from cursor.run(self._value_stop)
            if not text:
                text = yield from cursor.accept_last(*tags)
                if text and (
                    cursor.is_over
                    or (yield from cursor.precedes(self._argument_start, *self._ends))
                ):
                    return text in tags
                text = text or (cursor.take(1) if not cursor.is_over else "")
            if text:
                say(text)
        return False


def typed_value(text: str, types: frozenset[str]) -> str:
    """The JSON of an argument given as bare text, of one of these types where it can be."""
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    bare = text.strip()
    value = bare_value(bare)
    # Quotes belong to a value that may be a string as it stands.
    starts = ("{", "[", "(") if "string" in types else ("{", "[", "(", '"')
    if value is None and bare.startswith(starts):
        value = parse_value(bare, "json") or parse_value(bare, "python")
    if value is not None and _is_of(value, types):
        return value
    return json.dumps(text, ensure_ascii=False)


def _is_of(value: str, types: frozenset[str]) -> bool:
    if "string" not in types:
        return True
    kind = {"{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}.get(value[0])
    return kind in types if kind else not types.isdisjoint({"number", "integer"})

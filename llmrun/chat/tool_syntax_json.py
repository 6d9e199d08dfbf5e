"""Reads calls that are JSON objects, and those that small models write without any tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from llmrun.chat.tool_cursor import Cursor, Wait
from llmrun.chat.tool_formats import ToolFormat, ToolSpec
from llmrun.chat.tool_syntax import MAX_NAME_CHARS, HeldSink, Sink, say_call
from llmrun.chat.tool_values import decode, read_text, read_value

_NAME_KEYS = ("name", "tool_name", "function")
_ARGUMENTS_KEYS = ("arguments", "parameters", "args")
_OTHER_KEYS = ("id", "type", "tool_call_id", "call_id")
_FENCES = ("```json", "```tool_call", "```")


class JsonReader:
    """Objects that hold name and arguments: one, several, or a list."""

    def __init__(
        self, fmt: ToolFormat, tools: Sequence[ToolSpec], cursor: Cursor, sink: Sink
    ) -> None:
        self._fmt = fmt
        self._cursor = cursor
        self._sink = sink
        self._tools: Mapping[str, ToolSpec] = {tool.name: tool for tool in tools}
        self._begin, self._end = fmt.begin.strip(), fmt.end.strip()
        self._call_start = fmt.call_start.strip()
        self._name_end = fmt.name_end.strip()
        self._call_end = fmt.call_end.strip()
        self.openers = self._list_openers()
        firsts = "".join(sorted({opener[0] for opener in self.openers}))
        self.first_characters = re.compile(f"[{re.escape(firsts)}]" if firsts else r"(?!)")

    def _list_openers(self) -> tuple[str, ...]:
        fences = _FENCES if self._fmt.is_fallback else ()
        return tuple(filter(None, (self._begin, *self._fmt.more_openers, *fences)))

    def read_calls(self, opener: str) -> Wait[bool]:
        if opener in _FENCES:
            return (yield from self._read_held("```"))
        return (yield from self._read_objects())

    def read_bare(self) -> Wait[bool]:
        yield from self._cursor.skip_space()
        yield from self._cursor.accept(*self._fmt.more_openers)
        yield from self._cursor.skip_space()
        fence = yield from self._cursor.accept(*_FENCES)
        return (yield from self._read_held("```" if fence else None))

    def _read_objects(self) -> Wait[bool]:
        """`{…}` or `[{…}, {…}]` or `{…} {…}`, in a fence or not, up to and with the end tag."""
        cursor = self._cursor
        yield from cursor.skip_space()
        has_fence = yield from cursor.accept(*_FENCES)
        yield from cursor.skip_space()
        n = yield from self._read_list(self._sink, is_strict=False)
        if n <= 0:
            return False
        cursor.settle()
        yield from cursor.skip_space()
        if has_fence:
            yield from cursor.accept_last("```")
            yield from cursor.skip_space()
        if self._end:
            yield from cursor.accept_last(self._end)
        return True

    def _read_held(self, end: str | None) -> Wait[bool]:
        """As `_read_objects` where there is no tag that tells calls from an example of one: they
        must be of known tools and be followed by `end`, or None: by nothing. Until then nothing is
        said."""
        held = HeldSink()
        yield from self._cursor.skip_space()
        if (yield from self._read_list(held, is_strict=True)) <= 0:
            return False
        yield from self._cursor.skip_space()
        if end is not None and not (yield from self._cursor.accept(end)):
            return False
        if end is None and (yield from self._cursor.peek()):
            return False
        held.pass_on(self._sink)
        return True

    def _read_list(self, sink: Sink, *, is_strict: bool) -> Wait[int]:
        """How many calls there were; -1 when one of them is none."""
        cursor = self._cursor
        is_list = yield from cursor.accept("[")
        n = 0
        while True:
            yield from cursor.skip_space()
            if n and (yield from cursor.accept(",", ";")):
                yield from cursor.skip_space()
            if (yield from cursor.peek()) != "{":
                break
            if not (yield from self._read_object(sink, is_strict=is_strict)):
                return -1
            n += 1
            if not is_strict:
                cursor.settle()
        if is_list and n and not (yield from cursor.accept("]")) and is_strict:
            return -1
        return n

    def _read_object(self, sink: Sink, *, is_strict: bool, depth: int = 0) -> Wait[bool]:
        """`{"name": "f", "arguments": {…}}`, in either order and with other members between.

        `is_strict`: with the name of a known tool, arguments, and no members of other names.
        """
        cursor = self._cursor
        cursor.take(1)
        name: str | None = None
        waiting: list[str] = []  # arguments that came before the name
        n_arguments = 0
        is_inner = False
        while not (yield from self._accept_after_space("}")):
            key = yield from read_text(cursor, MAX_NAME_CHARS)
            if key is None or not (yield from self._accept_after_space(":")):
                return False
            yield from cursor.skip_space()
            first = yield from cursor.peek()
            if key == "function" and first == "{" and name is None and not depth:
                is_inner = yield from self._read_object(sink, is_strict=is_strict, depth=1)
                if not is_inner:
                    return False
            elif key in _NAME_KEYS and first == '"' and name is None:
                name = yield from read_text(cursor, MAX_NAME_CHARS)
                if not name or (is_strict and self._tools and name not in self._tools):
                    return False
                if n_arguments:
                    say_call(name, waiting, sink)
            elif key in _ARGUMENTS_KEYS and not n_arguments and not is_inner:
                n_arguments = 1
                if name is not None and first == "{":
                    sink.start(name, is_verbatim=True)
                    if not (yield from read_value(cursor, "json", sink.add)):
                        return False
                    sink.finish()
                else:
                    read = yield from self._read_waiting(first)
                    if read is None:
                        return False
                    waiting = read
                    if name is not None:
                        say_call(name, waiting, sink)
            else:
                may_be_there = not is_strict or key in _OTHER_KEYS
                if not may_be_there or not (yield from read_value(cursor, "json", _ignore)):
                    return False
            if not (yield from self._accept_after_space(",")):
                following = yield from cursor.peek()
                if following != "}":
                    # Small models lose count of the braces; the call is whole all the same.
                    return not is_strict and name is not None and bool(n_arguments and following)
        if name is None:
            return is_inner
        if not n_arguments:
            if is_strict:
                return False
            say_call(name, ["{}"], sink)
        return True

    def _read_waiting(self, first: str) -> Wait[list[str] | None]:
        """Arguments that cannot be said yet; None when they are none. JSON within a string, which
        some models write, counts, and so does `null`."""
        parts: list[str] = []
        if not (yield from read_value(self._cursor, "json", parts.append)):
            return None
        if first == "{":
            return parts
        value = decode("".join(parts))
        if isinstance(value, str):
            value = decode(value) if value.strip() else {}
        if value is None and first == "n":
            value = {}
        return [json.dumps(value, ensure_ascii=False)] if isinstance(value, dict) else None

    def _accept_after_space(self, literal: str) -> Wait[str]:
        yield from self._cursor.skip_space()
        return (yield from self._cursor.accept(literal))


def _ignore(text: str) -> None:
    pass

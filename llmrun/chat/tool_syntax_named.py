"""Reads calls whose name stands outside of their arguments: name and object, or Python's syntax."""

from __future__ import annotations

import json
import re

from llmrun.chat.tool_cursor import Wait
from llmrun.chat.tool_syntax import MAX_NAME_CHARS, say_call
from llmrun.chat.tool_syntax_json import JsonReader
from llmrun.chat.tool_values import read_value

_NOT_NAME = re.compile(r"""[\s<>\[\]{}()"'`,;=]""")


class NamedReader(JsonReader):
    """The name between two marks, then the arguments as one object."""

    def _list_openers(self) -> tuple[str, ...]:
        return tuple(filter(None, (self._begin, self._call_start)))

    def read_calls(self, opener: str) -> Wait[bool]:
        cursor = self._cursor
        if opener != self._call_start:
            yield from cursor.skip_space()
            if not (yield from cursor.accept(self._call_start)):
                return (yield from self._read_other())
        while True:
            if not (yield from self._read_call()):
                return False
            cursor.settle()
            yield from cursor.skip_space()
            if self._end and (yield from cursor.accept_last(self._end)):
                return True
            if not self._begin or not (yield from cursor.accept(self._call_start)):
                return True

    def _read_other(self) -> Wait[bool]:
        """Models also write the JSON syntax where they were taught another one."""
        if (yield from self._cursor.peek()) in ("{", "["):
            return (yield from self._read_objects())
        return False

    def _read_call(self) -> Wait[bool]:
        cursor, sink = self._cursor, self._sink
        yield from cursor.skip_space()
        name = yield from self._read_name()
        if not name:
            return (yield from self._read_other()) if name == "" else False
        yield from cursor.skip_space()
        if (yield from cursor.accept("[CALL_ID]")):
            yield from self._read_name()
        if self._name_end:
            yield from cursor.accept(self._name_end)
        yield from cursor.skip_space()
        first = yield from cursor.peek()
        if first in ('"', "n"):
            arguments = yield from self._read_waiting(first)
            if arguments is None:
                return False
            say_call(name, arguments, sink)
        elif first != "{":
            if not self._call_end or not (yield from cursor.accept(self._call_end)):
                return False
            say_call(name, ["{}"], sink)
            return True
        else:
            sink.start(name, is_verbatim=self._fmt.values == "json")
            if not (yield from read_value(cursor, self._fmt.values, sink.add)):
                return False
            sink.finish()
        # A fence may be missing.
        for part in re.findall(r"`+|[^`\s]+", self._call_end):
            yield from cursor.skip_space()
            yield from cursor.accept_last(part)
        return True

    def _read_name(self) -> Wait[str | None]:
        return (yield from self._cursor.run_whole(_NOT_NAME, MAX_NAME_CHARS))


class PythonicReader(NamedReader):
    """`[f(a="v", n=3), g()]`."""

    def _list_openers(self) -> tuple[str, ...]:
        return (self._begin,)

    def read_calls(self, opener: str) -> Wait[bool]:
        cursor = self._cursor
        yield from cursor.skip_space()
        if (yield from cursor.peek()) == "{":
            return (yield from self._read_objects())
        is_list = yield from cursor.accept("[")
        yield from cursor.skip_space()
        if is_list and (yield from cursor.peek()) == "{":
            n = yield from self._read_list(self._sink, is_strict=False)
            if n <= 0:
                return False
        else:
            while (yield from self._read_call()):
                cursor.settle()
                yield from cursor.skip_space()
                if not (yield from cursor.accept(",")):
                    break
                yield from cursor.skip_space()
            else:
                return False
        yield from cursor.accept_last("]")
        yield from cursor.skip_space()
        yield from cursor.accept_last(self._end)
        return True

    def _read_call(self) -> Wait[bool]:
        cursor, sink = self._cursor, self._sink
        name = yield from self._read_name()
        if not name or not (yield from cursor.accept("(")):
            return False
        sink.start(name, is_verbatim=False)
        sink.add("{")
        is_first = True
        while not (yield from self._accept_after_space(")")):
            key = yield from self._read_name()
            if not key or not (yield from self._accept_after_space("=")):
                return False
            sink.add(f"{'' if is_first else ', '}{json.dumps(key, ensure_ascii=False)}: ")
            is_first = False
            yield from cursor.skip_space()
            if not (yield from read_value(cursor, "python", sink.add)):
                return False
            if not (yield from self._accept_after_space(",")):
                yield from cursor.skip_space()
                if (yield from cursor.peek()) != ")":
                    return False
        sink.add("}")
        sink.finish()
        return True

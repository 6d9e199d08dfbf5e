"""Argument values in the spellings of three families, turned into JSON text while they come in.

`json` is JSON, with what models get wrong made right where its meaning is plain: raw control
characters in strings, a comma too many, Python's `True` and `None`. `gemma` is Gemma 4's own
(`{key:<|"|>text<|"|>,n:3}`), `python` are Python's literals. The output is spaced as by json.dumps.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from typing import Literal

from llmrun.chat.tool_cursor import Cursor, Wait

Dialect = Literal["json", "gemma", "python"]
Emit = Callable[[str], object]

MAX_DEPTH = 64
"""Most objects and arrays inside one another."""

_MAX_BARE_CHARS = 4096
_GEMMA_QUOTE = '<|"|>'
_STRING_STOP = {
    '"': re.compile(r'["\\\x00-\x1f]'),
    "'": re.compile(r"['\\\x00-\x1f]"),
    _GEMMA_QUOTE: re.compile("<"),
}
_BARE_STOP = re.compile(r"""[\s,:\[\]{}()"'<]""")
_GEMMA_BARE_STOP = re.compile(r"[,:\[\]{}<\n]")
_GEMMA_VALUE_STOP = re.compile(r"[,\[\]{}<\n]")
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PYTHON_NUMBER = re.compile(r"[+-]?[0-9.][0-9a-fA-FxXoObB_.+-]*")
_WORDS = {
    "true": "true", "True": "true", "false": "false", "False": "false",
    "null": "null", "None": "null",
}  # fmt: skip
_N_DIGITS = {"x": 2, "u": 4, "U": 8}
_HEX = frozenset("0123456789abcdefABCDEF")


def read_value(cursor: Cursor, dialect: Dialect, emit: Emit, depth: int = 0) -> Wait[bool]:
    """Pass one value and `emit` it as JSON. False at what is no value, or not whole: then the
    cursor stands there, and what was emitted is the JSON up to there."""
    first = yield from cursor.peek()
    if first == "{":
        return (yield from _read_object(cursor, dialect, emit, depth))
    if first == "[" or (first == "(" and dialect == "python"):
        return (yield from _read_array(cursor, dialect, emit, depth))
    quote = yield from _accept_quote(cursor, dialect)
    if quote:
        return (yield from _read_string(cursor, dialect, quote, emit))
    return (yield from _read_bare(cursor, dialect, emit))


def read_text(cursor: Cursor, max_chars: int) -> Wait[str | None]:
    """Pass a JSON string; None when there is none, or a longer one."""
    parts: list[str] = []
    if not (yield from cursor.accept('"')):
        return None
    if not (yield from _read_string(cursor, "json", '"', parts.append)):
        return None
    text = decode("".join(parts))
    return text if isinstance(text, str) and len(text) <= max_chars else None


def decode(text: str) -> object:
    """The value of JSON text that may come from anywhere; None for what is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def parse_value(text: str, dialect: Dialect) -> str | None:
    """The JSON text of a value that is all of `text`; None when it is none."""
    cursor, parts = Cursor(), list[str]()
    cursor.push(text.strip())
    cursor.end()
    parser = read_value(cursor, dialect, parts.append)
    try:
        while True:
            next(parser)
    except StopIteration as stop:
        return "".join(parts) if stop.value and cursor.is_over else None


def _refuse(name: str) -> object:
    raise ValueError(name)


def _read_object(cursor: Cursor, dialect: Dialect, emit: Emit, depth: int) -> Wait[bool]:
    if depth >= MAX_DEPTH:
        return False
    cursor.take(1)
    emit("{")
    is_first = True
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.accept("}")):
            emit("}")
            return True
        key = yield from _read_key(cursor, dialect)
        if key is None:
            return False
        yield from cursor.skip_space()
        if not (yield from cursor.accept(":")):
            return False
        emit(f"{'' if is_first else ', '}{key}: ")
        is_first = False
        yield from cursor.skip_space()
        if not (yield from read_value(cursor, dialect, emit, depth + 1)):
            return False
        yield from cursor.skip_space()
        if not (yield from cursor.accept(",")) and (yield from cursor.peek()) != "}":
            return False


def _read_array(cursor: Cursor, dialect: Dialect, emit: Emit, depth: int) -> Wait[bool]:
    if depth >= MAX_DEPTH:
        return False
    closing = "]" if cursor.take(1) == "[" else ")"
    emit("[")
    is_first = True
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.accept(closing)):
            emit("]")
            return True
        if not is_first:
            emit(", ")
        is_first = False
        if not (yield from read_value(cursor, dialect, emit, depth + 1)):
            return False
        yield from cursor.skip_space()
        if not (yield from cursor.accept(",")) and (yield from cursor.peek()) != closing:
            return False


def _read_key(cursor: Cursor, dialect: Dialect) -> Wait[str | None]:
    """Pass a key; its JSON text."""
    parts: list[str] = []
    quote = yield from _accept_quote(cursor, dialect)
    if quote:
        if not (yield from _read_string(cursor, dialect, quote, parts.append)):
            return None
        return "".join(parts)
    if dialect == "json":
        return None
    until = _GEMMA_BARE_STOP if dialect == "gemma" else _BARE_STOP
    bare = yield from cursor.run_whole(until, _MAX_BARE_CHARS)
    return json.dumps(bare.strip(), ensure_ascii=False) if bare else None


def _accept_quote(cursor: Cursor, dialect: Dialect) -> Wait[str]:
    if dialect == "gemma":
        return (yield from cursor.accept(_GEMMA_QUOTE, '"'))
    return (yield from cursor.accept('"', "'") if dialect == "python" else cursor.accept('"'))


def _read_string(cursor: Cursor, dialect: Dialect, quote: str, emit: Emit) -> Wait[bool]:
    """Pass the rest of a string whose opening quote was passed."""
    emit('"')
    until = _STRING_STOP[quote]
    escapes = quote != _GEMMA_QUOTE
    while True:
        text = yield from cursor.run(until)
        if text:
            emit(text if dialect == "json" else escape(text))
        elif cursor.is_over:
            return False
        elif ended := (yield from cursor.accept_last(quote)):
            if ended != quote:
                return False
            # Models and templates write quotes inside Python's strings without escaping them.
            if dialect != "python" or (yield from cursor.precedes(",", ")", "]", "}", ":")):
                emit('"')
                return True
            emit(escape(quote))
        elif escapes and (yield from cursor.peek()) == "\\":
            escaped = yield from _read_escape(cursor, dialect)
            if escaped is None:
                return False
            emit(escaped)
        else:
            emit(escape(cursor.take(1)))


def _read_escape(cursor: Cursor, dialect: Dialect) -> Wait[str | None]:
    """Pass a backslash and what belongs to it; as JSON. None when the text ends in it."""
    letter = (yield from cursor.peek(2))[1:]
    if not letter:
        cursor.take(1)
        return None
    n_digits = _N_DIGITS.get(letter, 0) if dialect == "python" or letter == "u" else 0
    if n_digits:
        digits = (yield from cursor.peek(2 + n_digits))[2:]
        if len(digits) < n_digits and cursor.has_ended and _HEX.issuperset(digits):
            cursor.take(2 + len(digits))
            return None
        if len(digits) == n_digits and _HEX.issuperset(digits) and int(digits, 16) <= 0x10FFFF:
            cursor.take(2 + n_digits)
            code = int(digits, 16)
            # Halves of a surrogate pair are no text outside of JSON's own escapes.
            is_half = 0xD800 <= code < 0xE000
            return f"\\u{code:04x}" if letter == "u" or is_half else escape(chr(code))
    if letter in '"\\/bfnrt':
        cursor.take(2)
        return f"\\{letter}"
    if letter == "'":
        cursor.take(2)
        return "'"
    # No escape, so the backslash is one: models write patterns and paths that way.
    cursor.take(1)
    return "\\\\"


def _read_bare(cursor: Cursor, dialect: Dialect, emit: Emit) -> Wait[bool]:
    """Pass a number or a word."""
    until = _GEMMA_VALUE_STOP if dialect == "gemma" else _BARE_STOP
    bare = yield from cursor.run_whole(until, _MAX_BARE_CHARS)
    if not bare:
        return False
    text = bare_value(bare.strip())
    if text is None and dialect == "gemma":
        text = json.dumps(bare.strip(), ensure_ascii=False)
    if text is None:
        return False
    emit(text)
    return True


def bare_value(text: str) -> str | None:
    """The JSON of a number, of `true`, `false`, `null`, or of Python's for these."""
    if text in _WORDS:
        return _WORDS[text]
    if _JSON_NUMBER.fullmatch(text):
        return text if math.isfinite(float(text)) else None
    if len(text) > 100 or not _PYTHON_NUMBER.fullmatch(text):
        return None
    try:
        number = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    if isinstance(number, int) or (isinstance(number, float) and math.isfinite(number)):
        return json.dumps(number)
    return None


def escape(text: str) -> str:
    """The text as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]

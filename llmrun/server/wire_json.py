"""JSON as it goes on the wire: compact, always valid, and on one line however lines are counted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping

# Some clients split a stream into lines as `str.splitlines` does, where these end a line too; JSON
# escapes all others itself. Lone surrogates are no characters and have no UTF-8.
_TROUBLE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def quote(value: object) -> str:
    """The JSON of a value, most quickly of a string. Its characters all have UTF-8: lone
    surrogates come out as U+FFFD. Raises ValueError for numbers that are none."""
    text = _encode(value)
    return text if text.isascii() else _TROUBLE.sub(_mend, text)


def to_json(value: object) -> bytes:
    """The JSON of a value in UTF-8; see `quote`."""
    return quote(value).encode()


def to_json_pieces(
    body: Mapping[str, object], name: str, items: Iterable[bytes]
) -> Iterator[bytes]:
    """The JSON of `body` with one member more, `name`: the array of `items`, which are JSON already
    (or several items with commas between), each a piece of its own. Encoding a whole array of
    millions of numbers would keep the interpreter from all else for so long."""
    begin = to_json(body)[:-1]
    yield begin + (b"," if body else b"") + to_json(name) + b":["
    comma = b""
    for item in items:
        yield comma + item
        comma = b","
    yield b"]}"


def _mend(match: re.Match[str]) -> str:
    code = ord(match.group())
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else f"\\u{code:04x}"

"""Reads JSON of strangers: bounded in size, depth and count, each field with its type and range.

A member that is null counts as absent, as the dialects' own clients expect. What a dialect does not
know is not looked at.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from llmrun.server.types import ApiError

MAX_DEPTH = 64
# Parsing keeps the engine's thread waiting, so there is a bound on how much there can be to parse,
# beside the one on bytes. Each leaves room for a million tokens, and for long texts of code.
_MAX_QUOTES = 2_000_000
_MAX_BRACKETS = 400_000
_MAX_COMMAS = 2_000_000
# A string that does not end goes to the end of the body, and nothing is tried twice: else a body of
# quotes would take a time that grows with its square.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = r"\ud"
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE = re.compile(rf"\\\\|{_HIGH}{_LOW}|({_HIGH}|{_LOW})")


def read_json(body: bytes, *, max_depth: int = MAX_DEPTH) -> object:
    """The value of a JSON text. Raises ApiError (invalid_request) for what is none: bad UTF-8,
    NaN and infinite numbers, numbers of absurd length, far too many values, or brackets deeper
    than `max_depth`. Halves of surrogate pairs, which JSON can spell but are no characters, become
    U+FFFD."""
    _check_shape(body, max_depth)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad("the body is not UTF-8") from None
    if _SURROGATE in text.lower():
        text = _LONE.sub(_mend, text)
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise _bad("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _bad(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise _bad(f"the body is not valid JSON: {error}") from None


def _check_shape(body: bytes, max_depth: int) -> None:
    """Raises ApiError for more values than a request has, or brackets nested more than `max_depth`
    deep. Passes all of what is no JSON.

    In a few passes over the whole, not byte by byte: bodies may have megabytes.
    """
    if body.count(b'"') > _MAX_QUOTES:
        raise _bad("the body has too many strings")
    bare = _STRING.sub(b"", body)
    brackets = bare.translate(_ONE_KIND, _NO_BRACKETS)
    if len(brackets) > _MAX_BRACKETS or bare.count(b",") > _MAX_COMMAS:
        raise _bad("the body has too many values")
    for _ in range(max_depth):
        # Takes the innermost level away, everywhere.
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets:
        raise _bad(f"the body is nested more than {max_depth} levels deep")


def _mend(match: re.Match[str]) -> str:
    """A backslash that is escaped itself begins no escape; a whole pair is one character."""
    return match[0] if match[1] is None else r"\ufffd"


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _bad(message: str, param: str | None = None) -> ApiError:
    return ApiError("invalid_request", message, param=param)


def arguments_object(text: str) -> dict[str, object]:
    """A call's arguments as an object. What is none (a model can write anything) stays whole, as
    the member `raw`."""
    if not text.strip():
        return {}
    try:
        value = read_json(text.encode("utf-8", "replace"))
    except ApiError:
        return {"raw": text}
    return value if isinstance(value, dict) else {"raw": value}


class Fields:
    """The members of a JSON object. Each method raises ApiError (invalid_request, with `param` the
    member's path) for a value of another type or outside the bounds given."""

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise _bad(f"{path or 'the body'} must be an object", path or None)
        self._members: Mapping[str, object] = value
        self.path = path

    def where(self, name: str) -> str:
        """The path of a member."""
        return f"{self.path}.{name}" if self.path else name

    def error(self, name: str, message: str) -> ApiError:
        """An error about a member: `message` follows its path."""
        return _bad(f"{self.where(name)} {message}", self.where(name))

    def has(self, name: str) -> bool:
        return self._members.get(name) is not None

    def names(self) -> Iterator[str]:
        return iter(self._members)

    def value(self, name: str) -> object:
        """The member as it is; None when absent."""
        return self._members.get(name)

    def require(self, name: str) -> object:
        value = self._members.get(name)
        if value is None:
            raise _bad(f"{self.where(name)} is required", self.where(name))
        return value

    def text(self, name: str, default: str = "", *, max_chars: int | None = None) -> str:
        value = self._members.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(name, "must be a string")
        if max_chars is not None and len(value) > max_chars:
            raise self.error(name, f"must not have more than {max_chars} characters")
        return value

    def number(
        self, name: str, default: float | None = None, *, low: float, high: float
    ) -> float | None:
        value = self._members.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "must be a number")
        if not low <= value <= high:
            raise self.error(name, f"must be between {low:g} and {high:g}")
        return float(value)

    def integer(self, name: str, default: int | None = None, *, low: int, high: int) -> int | None:
        value = self._members.get(name)
        if value is None:
            return default
        # Some clients write whole numbers as 5.0.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, "must be a whole number")
        if not low <= value <= high:
            raise self.error(name, f"must be between {low} and {high}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._members.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def choice(self, name: str, words: Sequence[str], default: str = "") -> str:
        value = self.text(name, default)
        if name in self._members and self.has(name) and value not in words:
            raise self.error(name, f"must be one of {', '.join(words)}")
        return value

    def items(self, name: str, *, max_items: int) -> list[object]:
        """The elements of an array; empty when absent."""
        value = self._members.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(name, "must be an array")
        if len(value) > max_items:
            raise self.error(name, f"must not have more than {max_items} elements")
        return value

    def objects(self, name: str, *, max_items: int) -> list[Fields]:
        """The elements of an array of objects; empty when absent."""
        return [
            Fields(value, f"{self.where(name)}[{i}]")
            for i, value in enumerate(self.items(name, max_items=max_items))
        ]

    def object(self, name: str) -> Fields | None:
        """The fields of an object; None when absent."""
        value = self._members.get(name)
        return None if value is None else Fields(value, self.where(name))

    def texts(self, name: str, *, max_items: int, max_chars: int | None = None) -> tuple[str, ...]:
        """A string or an array of strings, as a tuple; empty when absent."""
        value = self._members.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (self.text(name, max_chars=max_chars),)
        values = self.items(name, max_items=max_items)
        result = []
        for i, element in enumerate(values):
            if not isinstance(element, str):
                raise self.error(f"{name}[{i}]", "must be a string")
            if max_chars is not None and len(element) > max_chars:
                raise self.error(f"{name}[{i}]", f"must not have more than {max_chars} characters")
            result.append(element)
        return tuple(result)

    def json_text(self, name: str) -> str | None:
        """An object as JSON text; None when absent."""
        value = self._members.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return json.dumps(value, ensure_ascii=False)

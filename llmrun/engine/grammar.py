"""JSON schema to GBNF, by the converter that ships with the binding."""

from __future__ import annotations

import json
import re

from llmrun.engine.llama import import_binding
from llmrun.errors import UsageError

_MAX_SCHEMA_BYTES = 256 * 1024
# The converter writes repetitions out: a few characters can ask for gigabytes.
_MAX_TIMES = 2000
_TIMES = re.compile(r"\{\s*([0-9]*)\s*(?:,\s*([0-9]*)\s*)?\}")
_MAX_OPTIONAL = 64
_CLASS_OR_ESCAPE = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\.", re.DOTALL)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")


# A literal or a character class of GBNF, whichever begins first.
_GBNF_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]')
_NOT_IN_A_JSON_STRING = r'"\\\x00-\x1F\x7F'


def grammar_of_schema(schema_text: str) -> str:
    """GBNF whose every sentence is JSON of the schema's shape.

    Types, properties, required, items, lengths, enum, const, anyOf and patterns are enforced;
    numeric ranges and what else the converter cannot say are not. Raises UsageError when the text
    is no JSON, no schema, or uses what the converter refuses (such as a remote `$ref`).
    """
    hint = """--json-schema '{"type": "object", "properties": {"name": {"type": "string"}}}'"""
    if len(schema_text) > _MAX_SCHEMA_BYTES:
        raise UsageError(f"the JSON schema is larger than {_MAX_SCHEMA_BYTES} characters")
    try:
        schema = json.loads(schema_text)
    except (ValueError, RecursionError) as error:
        raise UsageError("the JSON schema is not valid JSON", why=str(error), hint=hint) from error
    if not isinstance(schema, dict):
        raise UsageError("a JSON schema is a JSON object", hint=hint)
    converter = import_binding("llama_grammar")
    try:
        _check_repetitions(schema)
        return _without_bare_controls(str(converter.json_schema_to_gbnf(json.dumps(schema))))
    except RecursionError as error:
        raise UsageError("the JSON schema is nested too deeply") from error
    except UsageError:
        raise
    except Exception as error:
        # The converter raises bare KeyError, ValueError, AssertionError, … by the kind of defect.
        raise UsageError(
            "the JSON schema cannot be turned into a grammar",
            why=f"{type(error).__name__}: {error}",
            hint="use type, properties, required, items, enum, const, anyOf and local $ref",
        ) from error


def _check_repetitions(schema: object) -> None:
    """Raises UsageError where something has to be there too many times."""
    if isinstance(schema, list):
        for inner in schema:
            _check_repetitions(inner)
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        _check_repetitions(value)
        counts: list[str] = []
        if name == "pattern" and isinstance(value, str):
            counts = [count for pair in _TIMES.findall(value) for count in pair]
            if _n_optional(value) > _MAX_OPTIONAL:
                raise UsageError(
                    "the JSON schema cannot be turned into a grammar",
                    why=f"pattern has more than {_MAX_OPTIONAL} optional parts, written out",
                )
        elif name in _COUNTS and isinstance(value, int):
            counts = [str(value)]
        # By its length first: Python refuses to read numbers of thousands of digits.
        if any(len(count) > 9 or int(count or 0) > _MAX_TIMES for count in counts):
            raise UsageError(
                "the JSON schema cannot be turned into a grammar",
                why=f"{name} asks for more than {_MAX_TIMES} repetitions",
            )


def _n_optional(pattern: str) -> int:
    """Optional parts of a regular expression, those in repeated groups as often as these repeat.

    llama.cpp follows every way through a grammar at once: hundreds of parts that may be left out
    make that so many that the engine comes to no end, in a call that nothing can stop.
    """
    counts = [0]
    last_group = 0
    at = 0
    bare = _CLASS_OR_ESCAPE.sub("x", pattern)
    while at < len(bare):
        char = bare[at]
        at += 1
        times = _TIMES.match(bare, at - 1) if char == "{" else None
        if char == "(":
            counts.append(0)
        elif char == ")" and len(counts) > 1:
            last_group = counts.pop()
            counts[-1] += last_group
            continue
        elif times is not None:
            at = times.end()
            low, high = times[1] or "0", times[2] if times[2] is not None else times[1]
            n_most = min(int(high[:9] or 0) or int(low[:9] or 0), _MAX_TIMES)
            counts[-1] += last_group * max(0, n_most - 1)
        elif char in "?*":
            counts[-1] += 1
        last_group = 0
    return sum(counts)


def _without_bare_controls(grammar: str) -> str:
    """Take quotes, backslashes and control characters out of every negated character class.

    The converter's own classes for a string's characters, `.` and `[^a]` admit raw newlines, and
    the last two also a quote: all of them end or break a JSON string.
    """

    def narrow(match: re.Match[str]) -> str:
        token = match.group()
        if not token.startswith("[^"):
            return token
        return f"[^{_NOT_IN_A_JSON_STRING}{token[2:]}"

    return _GBNF_TOKEN.sub(narrow, grammar)

"""JSON schemas as grammars: whatever a grammar allows is valid, and what is valid it allows."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.chat.number_gbnf import number_body
from llmrun.chat.schema_grammar import schema_grammar
from llmrun.errors import UsageError
from tests.fakes import gbnf
from tests.fakes.random_schemas import SchemaLot


def sentences(schema: dict[str, Any], n: int = 8) -> list[str]:
    rules = gbnf.parse(schema_grammar(json.dumps(schema)))
    return [gbnf.sentence(rules, seed, 30) for seed in range(n)]


def check(schema: dict[str, Any], n: int = 8) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    for text in sentences(schema, n):
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize("seed", range(8))
def test_all_that_a_random_schemas_grammar_allows_is_valid(seed: int) -> None:
    lot = SchemaLot(seed)
    for _ in range(50):
        check(lot.schema(), 4)


def test_the_lot_draws_all_kinds() -> None:
    lot = SchemaLot(0)
    text = json.dumps([lot.schema() for _ in range(200)])
    for word in ("$ref", "anyOf", "oneOf", "allOf", "enum", "const", "pattern", "format", "null",
                 "prefixItems", "minItems", "maxLength", "minimum", "required"):  # fmt: skip
        assert f'"{word}"' in text, word


@pytest.mark.parametrize("value", ['say "hi"', "back\\slash", "new\nline", "日本", "\x00\x7f", ""])
def test_literals_are_spelled_as_they_are(value: str) -> None:
    for schema in ({"const": value}, {"enum": [value]}):
        assert {json.loads(text) for text in sentences(schema)} == {value}
    named = {"type": "object", "properties": {value: {"type": "null"}}, "required": [value]}
    assert [json.loads(text) for text in sentences(named, 2)] == [{value: None}] * 2


def test_a_schema_may_refer_to_itself() -> None:
    tree = {
        "type": "object",
        "properties": {
            "value": {"type": "boolean"},
            "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        },
        "required": ["value", "children"],
        "additionalProperties": False,
    }
    check(tree, 30)
    assert max(len(text) for text in sentences(tree, 30)) > 60


def test_an_object_may_be_anything_where_nothing_is_said() -> None:
    for text in sentences({"type": "object"}, 20):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strange"}, "'strange'"),
        ({"type": ["string", 5]}, "'5'"),
        ({"$ref": "#/$defs/none"}, "'#/$defs/none'"),
        ({"$ref": "http://elsewhere/x.json"}, "not in the schema"),
        ({"properties": {"a": {"$ref": "#/none"}}}, "properties.a"),
        ({"properties": ["a"]}, "properties"),
        ({"properties": {"a": 5}}, "properties.a is no schema"),
        ({"anyOf": []}, "anyOf"),
        ({"enum": "a"}, "enum"),
        ({"required": "a"}, "required"),
        ({"items": 5}, "items"),
        ({"$defs": {"a": {"type": "x"}}}, "$defs.a"),
    ],
)
def test_what_would_mean_nothing_is_refused(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        schema_grammar(json.dumps(schema))
    assert words in (caught.value.why or "")


def test_what_is_no_schema_is_refused() -> None:
    deep = "[" * 100_000
    for text in ("", "[]", "5", "{", deep, '{"a":' * 5000 + "{}" + "}" * 5000):
        with pytest.raises(UsageError):
            schema_grammar(text)
    with pytest.raises(UsageError, match="larger"):
        schema_grammar(json.dumps({"description": "x" * 300_000}))
    nested: dict[str, Any] = {"type": "null"}
    for _ in range(400):
        nested = {"type": "array", "items": nested}
    try:
        schema_grammar(json.dumps(nested))
    except UsageError as error:
        assert "nested" in error.message


# ---- numbers


def as_regex(body: str) -> re.Pattern[str]:
    """A body of literals, digits and alternatives as a regular expression."""
    parts = re.findall(r'"[^"]*"|\[[^\]]*\]|\{[^}]*\}|[()|?*]', body)
    assert "".join(parts) == body.replace(" ", "")
    return re.compile("".join(re.escape(p[1:-1]) if p[0] == '"' else p for p in parts))


@settings(max_examples=300)
@given(st.integers(-1200, 1200), st.integers(-1200, 1200), st.booleans(), st.booleans())
def test_whole_numbers_are_all_those_within_the_bounds(
    low: int, high: int, is_low_out: bool, is_high_out: bool
) -> None:
    schema = {
        "exclusiveMinimum" if is_low_out else "minimum": low,
        "exclusiveMaximum" if is_high_out else "maximum": high,
    }
    body = number_body(schema, is_integer=True)
    within = range(low + is_low_out, high + 1 - is_high_out)
    if not within:
        assert body is None
        return
    pattern = as_regex(body or "")
    edges = {*range(within[0] - 30, within[0] + 30), *range(within[-1] - 30, within[-1] + 30)}
    for n in {*edges, *range(-1300, 1300, 7)}:
        assert (pattern.fullmatch(str(n)) is not None) == (n in within), (n, body)
    for text in ("", "-0", "00", "01", "1.5", "-", "1e3"):
        assert pattern.fullmatch(text) is None


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"minimum": 0}, ["0", "7", "123456789"], ["-1", "01"]),
        ({"minimum": 18}, ["18", "20", "99", "100", "65536"], ["17", "9", "-20"]),
        ({"maximum": 5}, ["5", "0", "-1", "-900"], ["6", "10"]),
        ({"maximum": -5}, ["-5", "-10"], ["-4", "0", "5", "-0"]),
        ({"minimum": 1.5, "maximum": 3.5}, ["2", "3"], ["1", "4"]),
        ({"exclusiveMinimum": 0, "maximum": 10**40}, ["1", "10"], ["0", "-1"]),
        ({"minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
    ],
)
def test_whole_numbers_with_one_bound(
    schema: dict[str, Any], inside: list[str], outside: list[str]
) -> None:
    pattern = as_regex(number_body(schema, is_integer=True) or "")
    assert [text for text in inside if not pattern.fullmatch(text)] == []
    assert [text for text in outside if pattern.fullmatch(text)] == []


BOUNDS = st.integers(-300, 300) | st.floats(-300, 300) | st.floats(-1, 1)


@settings(max_examples=300)
@given(st.none() | BOUNDS, st.none() | BOUNDS, st.booleans(), st.booleans())
def test_numbers_keep_their_bounds(
    low: float | None, high: float | None, is_low_out: bool, is_high_out: bool
) -> None:
    schema: dict[str, Any] = {"type": "number"}
    if low is not None:
        schema["exclusiveMinimum" if is_low_out else "minimum"] = low
    if high is not None:
        schema["exclusiveMaximum" if is_high_out else "maximum"] = high
    body = number_body(schema, is_integer=False)
    if low is not None and high is not None and high - low > 0.05:
        assert body is not None
    if body is not None:
        rules = gbnf.parse(f"root ::= {body}")
        for seed in range(12):
            value = json.loads(gbnf.sentence(rules, seed))
            jsonschema.validate(value, schema)


@pytest.mark.parametrize(
    ("schema", "inside"),
    [
        ({"minimum": 0, "maximum": 1}, ["0", "1", "0.5", "0.123456"]),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, ["0.5", "0.01", "0.98"]),
        ({"minimum": 0.25, "maximum": 0.75}, ["0.25", "0.5", "0.75"]),
        ({"minimum": -1, "maximum": 1}, ["-1", "-0.5", "0", "0.5", "1"]),
        ({"minimum": -90.5, "maximum": 90.5}, ["-90.5", "-90.2", "12.75", "90.5", "90.3"]),
        ({"minimum": 0}, ["0", "0.5", "12345.678"]),
    ],
)
def test_numbers_within_bounds_can_be_said(schema: dict[str, Any], inside: list[str]) -> None:
    pattern = as_regex(number_body(schema, is_integer=False) or "")
    assert [text for text in inside if not pattern.fullmatch(text)] == []

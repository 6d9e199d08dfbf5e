"""Schemas that are small themselves and whose grammars are not."""

from __future__ import annotations

import json

import pytest

from llmrun.engine.grammar import grammar_of_schema
from llmrun.errors import UsageError


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^a{2001}$"},
        {"type": "string", "pattern": "^(a{1,3} ){0, 1000000000}$"},
        {"type": "string", "pattern": "^a{2001,}$"},
        {"type": "string", "pattern": "^a{" + "9" * 5000 + "}$"},
        {"type": "string", "minLength": 10**9},
        {"type": "string", "maxLength": 2001},
        {"type": "object", "properties": {"a": {"type": "array", "items": {}, "minItems": 10**9}}},
        {"anyOf": [{"type": "string"}, {"type": "string", "pattern": "^a{999999}$"}]},
    ],
)
def test_too_many_repetitions(schema: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        grammar_of_schema(json.dumps(schema))
    assert "more than 2000 repetitions" in str(caught.value.why)


@pytest.mark.parametrize(
    "pattern", ["^(a?){500}$", "^" + "a?" * 70 + "$", "^((a?){20}){20}$", "^(a*b?){0,40}$"]
)
def test_too_many_optional_parts(pattern: str) -> None:
    with pytest.raises(UsageError) as caught:
        grammar_of_schema(json.dumps({"type": "string", "pattern": pattern}))
    assert "optional parts" in str(caught.value.why)


def test_usual_repetitions() -> None:
    for pattern in (
        "^[a-z]+(-[a-z]+)*$",
        "^[?*]{99}\\?$",
        "^[a-z]{2,2000}$",
        "^([0-9]{1,3}\\.){3}[0-9]{1,3}$",
        "^a{,3}$",
    ):
        assert grammar_of_schema(json.dumps({"type": "string", "pattern": pattern}))
    assert grammar_of_schema('{"type": "string", "maxLength": 2000}')

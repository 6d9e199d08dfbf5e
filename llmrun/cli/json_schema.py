"""What a JSON schema asks that a grammar cannot enforce, so that it is said and not passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_BEYOND_A_GRAMMAR = frozenset(
    {
        "multipleOf", "uniqueItems", "contains", "not", "if", "minProperties", "maxProperties",
        "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas",
    }
)  # fmt: skip
_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")
_SCHEMAS = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")


def unenforced_keywords(schema_text: str) -> tuple[str, ...]:
    """The keywords in use that the converter to GBNF leaves out, by name. The text was accepted by
    the converter, so it is JSON."""
    found: set[str] = set()
    for schema in _schemas(json.loads(schema_text)):
        found |= _BEYOND_A_GRAMMAR & schema.keys()
    return tuple(sorted(found))


def _schemas(value: Any) -> Iterator[dict[str, Any]]:
    """`value` and all schemas below it; names of properties are not taken for keywords."""
    if isinstance(value, list):
        for item in value:
            yield from _schemas(item)
    if not isinstance(value, dict):
        return
    yield value
    for key in _SCHEMAS_BY_NAME:
        if isinstance(value.get(key), dict):
            yield from _schemas(list(value[key].values()))
    for key in _SCHEMAS:
        yield from _schemas(value.get(key))

"""JSON schemas that an answer has to follow, as GBNF."""

from __future__ import annotations

import json
from collections.abc import Mapping

from llmrun.chat.tool_gbnf import N_COPIES, SchemaRules, grammar_writer
from llmrun.chat.tool_schema import TYPES, has_target
from llmrun.engine.grammar import check_grammar
from llmrun.errors import UsageError

_MAX_SCHEMA_CHARS = 256 * 1024
_HINT = """--json-schema '{"type": "object", "properties": {"name": {"type": "string"}}}'"""
_MAPS = ("properties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "enum")


def schema_grammar(schema_text: str) -> str:
    """GBNF whose every sentence is JSON of the schema's shape.

    Types, properties, required, additionalProperties (none unless they are asked for), items and
    their number, lengths, patterns, some formats, ranges of numbers, enum, const, anyOf, oneOf (as
    anyOf), allOf and references within the schema are enforced; what else a schema can say is not.
    Raises UsageError when the text is no JSON, no schema, or refers to what is not in it, for a
    pattern of too many states, and where llama.cpp could not follow the grammar.
    """
    if len(schema_text) > _MAX_SCHEMA_CHARS:
        raise UsageError(f"the JSON schema is larger than {_MAX_SCHEMA_CHARS} characters")
    try:
        schema = json.loads(schema_text)
    except (ValueError, RecursionError) as error:
        raise UsageError("the JSON schema is not valid JSON", why=str(error), hint=_HINT) from error
    if not isinstance(schema, dict):
        raise UsageError("a JSON schema is a JSON object", hint=_HINT)
    try:
        _check(schema, schema, "the schema")
        writer = grammar_writer()
        grammar = writer.text(SchemaRules(writer, "json", schema).value(schema))
        check_grammar(grammar, max_copies=N_COPIES)
        return grammar
    except RecursionError as error:
        raise UsageError("the JSON schema is nested too deeply") from error


def _check(schema: object, root: Mapping[str, object], where: str) -> None:
    """Raises UsageError for what would silently mean nothing."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _unusable(f"{where} is no schema")
    said = schema.get("type")
    for name in said if isinstance(said, list) else [said]:
        if name is not None and name not in TYPES:
            raise _unusable(f"{where} has the type {str(name)[:40]!r}")
    reference = schema.get("$ref")
    if reference is not None and not has_target(reference, root):
        raise _unusable(f"{where} refers to {str(reference)[:80]!r}, which is not in the schema")
    for key in _MAPS:
        members = schema.get(key)
        if members is None:
            continue
        if not isinstance(members, Mapping):
            raise _unusable(f"{key} of {where} is no object")
        for name, inner in members.items():
            _check(inner, root, f"{key}.{name[:40]}")
    for key in _LISTS:
        members = schema.get(key)
        if members is None:
            continue
        if not isinstance(members, list) or not members:
            raise _unusable(f"{key} of {where} is no list, or an empty one")
        for inner in members if key != "enum" else ():
            _check(inner, root, f"{key} of {where}"[:80])
    required = schema.get("required")
    if required is not None and not (
        isinstance(required, list) and all(isinstance(name, str) for name in required)
    ):
        raise _unusable(f"required of {where} is no list of names")
    for key in ("items", "additionalProperties"):
        if schema.get(key) is not None and not isinstance(schema[key], list):
            _check(schema[key], root, f"{key} of {where}"[:80])


def _unusable(why: str) -> UsageError:
    return UsageError(
        "the JSON schema cannot be turned into a grammar",
        why=why,
        hint="use type, properties, required, items, enum, const, anyOf and local $ref",
    )

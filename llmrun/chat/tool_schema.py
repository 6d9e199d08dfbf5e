"""What a tool's JSON schema says about one argument."""

from __future__ import annotations

from collections.abc import Mapping

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})


def types_of(schema: object, root: Mapping[str, object]) -> frozenset[str]:
    """The JSON types that a value of this schema may have; all of them where it does not say.

    `root` is the schema that `$ref` points into.
    """
    found: set[str] = set()
    waiting, seen = [schema], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if not isinstance(each, Mapping):
            return TYPES
        if "$ref" in each:
            waiting.append(resolve(each["$ref"], root))
            continue
        choices = next((each[key] for key in ("anyOf", "oneOf") if each.get(key)), None)
        parts = each.get("allOf")
        if isinstance(parts, list | tuple) and len(parts) == 1:
            choices = parts
        said = _said_types(each)
        if said:
            found |= said
        elif isinstance(choices, list | tuple):
            waiting += choices
        else:
            return TYPES
    return frozenset(found) or TYPES


def _said_types(schema: Mapping[str, object]) -> frozenset[str]:
    """The types that a schema itself names; empty where it names none."""
    if "const" in schema:
        return frozenset({_type_of(schema["const"])})
    values = schema.get("enum")
    if isinstance(values, list | tuple) and values:
        return frozenset(map(_type_of, values))
    said = schema.get("type")
    names = [said] if isinstance(said, str) else said if isinstance(said, list | tuple) else []
    known = frozenset(name for name in names if isinstance(name, str)) & TYPES
    if not known and "properties" in schema:
        return frozenset({"object"})
    return known


def resolve(reference: object, root: Mapping[str, object]) -> object:
    """What a local `$ref` (`#/$defs/name`) points to; None when it points to nothing."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return root if reference == "#" else None
    at: object = root
    for part in reference[2:].split("/"):
        if not isinstance(at, Mapping):
            return None
        at = at.get(part.replace("~1", "/").replace("~0", "~"))
    return at


def has_target(reference: object, root: Mapping[str, object]) -> bool:
    """Whether a `$ref` points to something in `root`."""
    return resolve(reference, root) is not None


def properties_of(schema: Mapping[str, object]) -> Mapping[str, object]:
    """The schema's properties, by name; empty where it names none."""
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _type_of(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    if value is None:
        return "null"
    return "array" if isinstance(value, list | tuple) else "object"

"""JSON schemas by lot, small enough that a model's answer to each has an end."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
_NAMES = ("a", "id", "name", "x y", 'q"t', "ключ", "n_1", "b\\s", "-", "é")
_WORDS = (
    "red",
    "light blue",
    "",
    'say "hi"',
    "back\\slash",
    "日本",
    "tab\there",
    "new\nline",
    "🙂",
)


class SchemaLot:
    """Draws schemas; the same seed draws the same ones.

    Of all kinds: objects with required and optional members (and with others allowed or not),
    arrays with lengths and tuples, strings with lengths and patterns, numbers, enum, const, null,
    lists of types, anyOf, oneOf, allOf, and references, also of a definition to itself.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._defs: dict[str, Schema] = {}

    def schema(self) -> Schema:
        """A schema of an object, of an array, or of anything."""
        self._defs = {}
        if self._rng.random() < 0.3:
            self._defs["leaf"] = self._leaf()
        if self._rng.random() < 0.1:
            self._defs["tree"] = self._tree()
        root = self._rng.choice([self._object, self._object, self._object, self._array, self._any])
        made = root(2)
        if self._defs:
            made = {**made, "$defs": self._defs}
        return made

    def _any(self, depth: int) -> Schema:
        rng = self._rng
        if depth > 0 and rng.random() < 0.45:
            return rng.choice([self._object, self._array, self._union])(depth - 1)
        if self._defs and rng.random() < 0.4:
            return {"$ref": f"#/$defs/{rng.choice(sorted(self._defs))}"}
        return self._leaf()

    def _leaf(self) -> Schema:
        rng = self._rng
        kind = rng.choice(
            ["string", "integer", "number", "boolean", "null", "enum", "const", "types"]
        )
        if kind == "string":
            return self._string()
        if kind == "integer":
            low = rng.randrange(-20, 20)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 300)}
        if kind == "enum":
            return {"enum": rng.sample([*_WORDS, 1, -2.5, True, None, "x"], rng.randrange(1, 4))}
        if kind == "const":
            return {"const": rng.choice([*_WORDS, 3, False, None, ["x", 1], {"k": "v"}])}
        if kind == "types":
            return {"type": rng.sample(["boolean", "null", "integer"], 2)}
        return {"type": kind}

    def _string(self) -> Schema:
        rng = self._rng
        made: Schema = {"type": "string"}
        how = rng.random()
        if how < 0.2:
            made["pattern"] = rng.choice(
                ["^[a-z]{1,4}$", "^(yes|no)$", "^[0-9]{2}-[0-9]{2}$", "^x[^a]y$", "^a.b$"]
            )
        elif how < 0.3:
            made["format"] = rng.choice(["date", "time", "date-time", "uuid"])
        else:
            if rng.random() < 0.5:
                made["minLength"] = rng.randrange(0, 4)
            made["maxLength"] = rng.randrange(4, 9)
        return made

    def _object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(_NAMES, rng.randrange(1, 4))
        made: Schema = {
            "type": "object",
            "properties": {name: self._any(depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.6],
        }
        if rng.random() < 0.8:
            made["additionalProperties"] = False
        if rng.random() < 0.2:
            made["description"] = 'What it is for: "nothing".'
        return made

    def _array(self, depth: int) -> Schema:
        rng = self._rng
        if rng.random() < 0.15:
            return {"type": "array", "prefixItems": [self._leaf(), self._leaf()], "items": False,
                    "minItems": 2}  # fmt: skip
        made = {"type": "array", "items": self._any(depth - 1), "maxItems": rng.randrange(1, 4)}
        if rng.random() < 0.5:
            made["minItems"] = rng.randrange(0, made["maxItems"] + 1)
        return made

    def _union(self, depth: int) -> Schema:
        rng = self._rng
        if rng.random() < 0.25:
            return {"allOf": [self._closed("p"), self._closed("q")]}
        # One of them only: these cannot be two at once.
        parts = [self._closed("left"), {"type": "boolean"}, {"const": "neither"}]
        rng.shuffle(parts)
        return {rng.choice(["anyOf", "oneOf"]): parts}

    def _closed(self, name: str) -> Schema:
        return {"type": "object", "properties": {name: self._leaf()}, "required": [name]}

    def _tree(self) -> Schema:
        return {
            "type": "object",
            "properties": {
                "value": self._leaf(),
                "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }

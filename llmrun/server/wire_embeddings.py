"""OpenAI's `/v1/embeddings`. Its errors are those of `wire_openai.encode_error`."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterator, Sequence

from llmrun.server.reading import Fields
from llmrun.server.types import EmbeddingRequest
from llmrun.server.wire_json import to_json, to_json_pieces

MAX_INPUTS = 2048
"""Texts in one request; OpenAI's own limit."""

MAX_INPUT_TOKENS = 1 << 20
"""Tokens of one request that gives tokens instead of text."""

MAX_DIMENSIONS = 1 << 16
_MAX_TOKEN = 2**31 - 1


def parse_embeddings(body: object) -> EmbeddingRequest:
    """`input` is a text, texts, tokens, or lists of tokens. Raises ApiError."""
    fields = Fields(body)
    return EmbeddingRequest(
        fields.text("model", max_chars=512),
        _inputs(fields),
        dimensions=fields.integer("dimensions", low=1, high=MAX_DIMENSIONS),
        base64=fields.choice("encoding_format", ("float", "base64")) == "base64",
    )


def _inputs(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    value = fields.require("input")
    if isinstance(value, str):
        if not value:
            raise fields.error("input", "must not be empty")
        return (value,)
    if not isinstance(value, list):
        raise fields.error("input", "must be a string or an array of strings or tokens")
    if not value:
        raise fields.error("input", "must not be empty")
    if _is_token(value[0]):
        return (_tokens(fields, "input", value),)
    values = fields.items("input", max_items=MAX_INPUTS)
    found: list[str | tuple[int, ...]] = []
    n_tokens = 0
    for i, each in enumerate(values):
        where = f"input[{i}]"
        if isinstance(each, str) and each:
            found.append(each)
        elif isinstance(each, list) and each:
            n_tokens += len(each)
            if n_tokens > MAX_INPUT_TOKENS:
                raise fields.error("input", f"must not have more than {MAX_INPUT_TOKENS} tokens")
            found.append(_tokens(fields, where, each))
        elif each in ("", []):
            raise fields.error(where, "must not be empty")
        else:
            raise fields.error(where, "must be a string or an array of tokens")
    return tuple(found)


def _tokens(fields: Fields, where: str, values: Sequence[object]) -> tuple[int, ...]:
    if len(values) > MAX_INPUT_TOKENS:
        raise fields.error(where, f"must not have more than {MAX_INPUT_TOKENS} tokens")
    tokens: list[int] = []
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_TOKEN:
            raise fields.error(f"{where}[{i}]", "must be a token's number")
        tokens.append(value)
    return tuple(tokens)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def encode_embeddings(
    request: EmbeddingRequest, model: str, vectors: Sequence[Sequence[float]], n_tokens: int
) -> Iterator[bytes]:
    """The answer's JSON with the vectors of `request.inputs`, in their order and each a piece of
    its own; `n_tokens` of all inputs."""
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return to_json_pieces(
        {"object": "list", "model": model, "usage": usage},
        "data",
        (
            to_json(
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": _base64(vector) if request.base64 else list(vector),
                }
            )
            for i, vector in enumerate(vectors)
        ),
    )


def _base64(vector: Sequence[float]) -> str:
    """The vector as little-endian 32-bit floats."""
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode("ascii")


SCHEMA_EMBEDDINGS: dict[str, object] = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": {"type": "string"},
        "input": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "maxItems": MAX_INPUTS},
                {"type": "array", "items": {"type": "integer"}},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer"}},
                    "maxItems": MAX_INPUTS,
                },
            ]
        },
        "encoding_format": {"type": "string", "enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": "integer", "minimum": 1},
    },
}

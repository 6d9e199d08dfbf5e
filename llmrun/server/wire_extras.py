"""Small formats beside the dialects: `/rerank` as Jina, Cohere and llama-server have it, and
llama-server's `/tokenize` and `/detokenize`. Their errors are those of `wire_openai.encode_error`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmrun.server.reading import Fields
from llmrun.server.types import RerankRequest
from llmrun.server.wire_json import to_json, to_json_pieces

MAX_DOCUMENTS = 2048
MAX_TOKENS = 1 << 20
MAX_CHARS = 4 * MAX_TOKENS
_MAX_TOKEN = 2**31 - 1
_MAX_NAME_CHARS = 512
# Of an answer; they take a millisecond or so.
_TOKENS_PER_PIECE = 2000


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """Text to be turned into tokens. `add_special`: with BOS and EOS as the model wants them.
    `parse_special`: the text of control tokens becomes these tokens. `model` may be empty."""

    model: str
    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    """Tokens to be turned into text. `model` may be empty."""

    model: str
    tokens: tuple[int, ...]


# ---- rerank


def parse_rerank(body: object) -> RerankRequest:
    """`top_n` 0 or absent: all documents. Raises ApiError."""
    fields = Fields(body)
    query = fields.text("query")
    if not query:
        raise fields.error("query", "is required")
    if not fields.items("documents", max_items=MAX_DOCUMENTS):
        raise fields.error("documents", "is required")
    return RerankRequest(
        fields.text("model", max_chars=_MAX_NAME_CHARS),
        query,
        _documents(fields),
        top_n=fields.integer("top_n", low=0, high=2**31 - 1) or None,
        return_documents=fields.flag("return_documents"),
    )


def _documents(fields: Fields) -> tuple[str, ...]:
    found: list[str] = []
    for i, value in enumerate(fields.items("documents", max_items=MAX_DOCUMENTS)):
        where = f"documents[{i}]"
        if isinstance(value, dict):
            value = value.get("text")
            where += ".text"
        if not isinstance(value, str):
            raise fields.error(where, "must be a string")
        found.append(value)
    return tuple(found)


def encode_rerank(
    request: RerankRequest, model: str, scores: Sequence[float], n_tokens: int
) -> dict[str, object]:
    """The best documents first; among equals the earlier one. `scores` are those of
    `request.documents`, in their order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    results: list[dict[str, object]] = []
    for i in order[: request.top_n]:
        result: dict[str, object] = {"index": i, "relevance_score": float(scores[i])}
        if request.return_documents:
            result["document"] = {"text": request.documents[i]}
        results.append(result)
    return {
        "model": model,
        "object": "list",
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        "results": results,
    }


# ---- tokens


def parse_tokenize(body: object) -> TokenizeRequest:
    """Raises ApiError."""
    fields = Fields(body)
    fields.require("content")
    return TokenizeRequest(
        fields.text("model", max_chars=_MAX_NAME_CHARS),
        fields.text("content", max_chars=MAX_CHARS),
        add_special=fields.flag("add_special"),
        parse_special=fields.flag("parse_special", True),
        with_pieces=fields.flag("with_pieces"),
    )


def encode_tokenize(
    request: TokenizeRequest, tokens: Sequence[int], pieces: Sequence[bytes] = ()
) -> Iterator[bytes]:
    """The answer's JSON, piece by piece. `pieces` are the tokens' bytes, needed where the request
    wants them: text, or numbers where they are only a part of a character."""

    def encode(first: int) -> bytes:
        last = first + _TOKENS_PER_PIECE
        found: list[object] = list(tokens[first:last])
        if request.with_pieces:
            pairs = zip(tokens[first:last], pieces[first:last], strict=True)
            found = [{"id": token, "piece": _piece(piece)} for token, piece in pairs]
        return to_json(found)[1:-1]

    groups = (encode(first) for first in range(0, len(tokens), _TOKENS_PER_PIECE))
    return to_json_pieces({}, "tokens", groups)


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return list(piece)


def parse_detokenize(body: object) -> DetokenizeRequest:
    """Whether the tokens are in the model's vocabulary is for the caller to see. Raises
    ApiError."""
    fields = Fields(body)
    fields.require("tokens")
    tokens: list[int] = []
    for i, value in enumerate(fields.items("tokens", max_items=MAX_TOKENS)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_TOKEN:
            raise fields.error(f"tokens[{i}]", "must be a token's number")
        tokens.append(value)
    return DetokenizeRequest(fields.text("model", max_chars=_MAX_NAME_CHARS), tuple(tokens))


def encode_detokenize(content: str) -> dict[str, object]:
    return {"content": content}


SCHEMA_RERANK: dict[str, object] = {
    "type": "object",
    "required": ["query", "documents"],
    "properties": {
        "model": {"type": "string"},
        "query": {"type": "string", "minLength": 1},
        "documents": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_DOCUMENTS,
            "items": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "object",
                        "required": ["text"],
                        "properties": {"text": {"type": "string"}},
                    },
                ]
            },
        },
        "top_n": {"type": "integer", "minimum": 0},
        "return_documents": {"type": "boolean", "default": False},
    },
}

SCHEMA_TOKENIZE: dict[str, object] = {
    "type": "object",
    "required": ["content"],
    "properties": {
        "model": {"type": "string"},
        "content": {"type": "string", "maxLength": MAX_CHARS},
        "add_special": {"type": "boolean", "default": False},
        "parse_special": {"type": "boolean", "default": True},
        "with_pieces": {"type": "boolean", "default": False},
    },
}

SCHEMA_DETOKENIZE: dict[str, object] = {
    "type": "object",
    "required": ["tokens"],
    "properties": {
        "model": {"type": "string"},
        "tokens": {
            "type": "array",
            "maxItems": MAX_TOKENS,
            "items": {"type": "integer", "minimum": 0},
        },
    },
}

"""Ollama's dialect: what it says of models (`/api/tags`, `/api/show`, `/api/ps`, `/api/version`)
and its embeddings (`/api/embed`, and the older `/api/embeddings`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from llmrun.server.reading import Fields
from llmrun.server.types import EmbeddingRequest, LoadedCard, ModelCard
from llmrun.server.wire_embeddings import MAX_DIMENSIONS, MAX_INPUTS
from llmrun.server.wire_json import to_json, to_json_pieces
from llmrun.server.wire_ollama_parse import KEEP_ALIVE_SCHEMA, read_model
from llmrun.server.wire_openai_fields import read_keep_alive

API_VERSION = "0.14.2"
"""The version of Ollama whose calls are answered here. Clients compare it: VS Code refuses to talk
to one before 0.6.4, others to one without `/v1/messages`, which came with 0.14."""

_NEVER = "2318-01-01T00:00:00Z"
"""When a model goes that stays: Ollama gives a date of that kind, and its clients read one more
than 20 years away as "Forever"."""


def parse_show(body: object) -> str:
    """The model's name. Raises ApiError."""
    return read_model(Fields(body), "model", "name")


def encode_tags(cards: Sequence[ModelCard]) -> dict[str, object]:
    return {
        "models": [
            {
                "name": card.name,
                "model": card.name,
                "modified_at": timestamp(card.modified_s),
                "size": card.n_bytes,
                "digest": _digest(card),
                "details": _details(card),
            }
            for card in cards
        ]
    }


def encode_show(card: ModelCard) -> dict[str, object]:
    """`model_info` has the keys of a GGUF header that clients read: the architecture, the number
    of parameters and the context that the model was trained for."""
    architecture = card.architecture or "unknown"
    info: dict[str, object] = {
        "general.architecture": architecture,
        "general.basename": card.name,
        "general.parameter_count": card.n_params,
    }
    if card.n_ctx > 0:
        info[f"{architecture}.context_length"] = card.n_ctx
    return {
        "modelfile": f"FROM {card.name}\n",
        "license": card.license,
        "template": card.chat_template or "",
        "details": _details(card),
        "model_info": info,
        "capabilities": _capabilities(card),
        "modified_at": timestamp(card.modified_s),
    }


def encode_ps(loaded: Sequence[LoadedCard]) -> dict[str, object]:
    return {
        "models": [
            {
                "name": each.card.name,
                "model": each.card.name,
                "size": each.memory_bytes,
                "digest": _digest(each.card),
                "details": _details(each.card),
                "expires_at": _NEVER if each.expires_s is None else timestamp(each.expires_s),
                "size_vram": each.gpu_bytes,
                "context_length": each.n_ctx,
            }
            for each in loaded
        ]
    }


def encode_version(version: str) -> dict[str, object]:
    """`version` is this program's own."""
    return {"version": API_VERSION, "llmrun": version}


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339, in UTC."""
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return _NEVER
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _capabilities(card: ModelCard) -> list[str]:
    """In Ollama's words; it has none for reranking."""
    return [
        word
        for word, has in (
            ("completion", card.can_chat),
            ("tools", card.can_call_tools),
            ("thinking", card.can_think),
            ("embedding", card.can_embed),
        )
        if has
    ]


def _digest(card: ModelCard) -> str:
    # Clients show the first 12 digits as the model's id and fail on less, so a model whose hash
    # is not known gets one of its name.
    digest = card.digest.removeprefix("sha256:")
    return digest or hashlib.sha256(card.name.encode("utf-8", "replace")).hexdigest()


def _details(card: ModelCard) -> dict[str, object]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": card.architecture,
        "families": [card.architecture] if card.architecture else [],
        "parameter_size": _size_name(card.n_params),
        "quantization_level": card.quant,
    }


def _size_name(n_params: int) -> str:
    """As Ollama writes it: `7.6B`, `135M`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n_params >= size:
            digits = 1 if size >= 10**9 else 0
            return f"{n_params / size:.{digits}f}{unit}"
    return str(n_params) if n_params > 0 else ""


# ---- embeddings


def parse_embed(body: object) -> EmbeddingRequest:
    """A body of `/api/embed`. Without inputs (none, "" or []) it asks only that the model is
    loaded. Raises ApiError."""
    fields = Fields(body)
    inputs = fields.texts("input", max_items=MAX_INPUTS)
    if inputs == ("",) and isinstance(fields.value("input"), str):
        inputs = ()
    for i, text in enumerate(inputs):
        if not text:
            raise fields.error(f"input[{i}]", "must not be empty")
    return EmbeddingRequest(
        read_model(fields, "model"),
        inputs,
        dimensions=fields.integer("dimensions", low=0, high=MAX_DIMENSIONS) or None,
        truncate=fields.flag("truncate", True),
        keep_alive_s=read_keep_alive(fields),
    )


def encode_embed(
    model: str,
    vectors: Sequence[Sequence[float]],
    n_tokens: int,
    *,
    total_s: float = 0.0,
    load_s: float = 0.0,
) -> Iterator[bytes]:
    """The JSON of the answer to `/api/embed`: the vectors in the order of the request's inputs,
    each a piece of its own."""
    body = {
        "model": model,
        "total_duration": round(total_s * 1e9),
        "load_duration": round(load_s * 1e9),
        "prompt_eval_count": n_tokens,
    }
    return to_json_pieces(body, "embeddings", (to_json(list(vector)) for vector in vectors))


def parse_embedding(body: object) -> EmbeddingRequest:
    """A body of the older `/api/embeddings`: one text, named `prompt`. Raises ApiError."""
    fields = Fields(body)
    prompt = fields.text("prompt")
    return EmbeddingRequest(
        read_model(fields, "model"),
        (prompt,) if prompt else (),
        truncate=True,
        keep_alive_s=read_keep_alive(fields),
    )


def encode_embedding(vectors: Sequence[Sequence[float]]) -> dict[str, object]:
    """The answer of `/api/embeddings`: the one vector, or an empty one for no prompt."""
    return {"embedding": list(vectors[0]) if vectors else []}


SCHEMA_SHOW: dict[str, object] = {
    "type": "object",
    "required": ["model"],
    "properties": {"model": {"type": "string"}},
}

SCHEMA_EMBED: dict[str, object] = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string"},
        "input": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "maxItems": MAX_INPUTS},
            ]
        },
        "truncate": {"type": "boolean", "default": True},
        "dimensions": {"type": "integer", "minimum": 0},
        "keep_alive": KEEP_ALIVE_SCHEMA,
    },
}

SCHEMA_EMBEDDING: dict[str, object] = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"type": "string"},
        "prompt": {"type": "string"},
        "keep_alive": KEEP_ALIVE_SCHEMA,
    },
}

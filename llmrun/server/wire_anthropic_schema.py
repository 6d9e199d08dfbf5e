"""The body of a request of Anthropic's messages API, for the API's documentation."""

from __future__ import annotations

from llmrun.server.wire_anthropic_request import EFFORTS, MAX_STOPS

_TEXT_OR_BLOCKS: dict[str, object] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]
}

SCHEMA_COUNT: dict[str, object] = {
    "type": "object",
    "required": ["model", "messages"],
    "properties": {
        "model": {"type": "string"},
        "messages": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {
                    "role": {"enum": ["user", "assistant", "system"]},
                    "content": _TEXT_OR_BLOCKS,
                },
            },
        },
        "system": _TEXT_OR_BLOCKS,
        "tools": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "description": {"type": "string"},
                    "input_schema": {"type": "object"},
                    "strict": {"type": "boolean"},
                },
            },
        },
        "tool_choice": {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"enum": ["auto", "any", "tool", "none"]},
                "name": {"type": "string"},
                "disable_parallel_tool_use": {"type": "boolean"},
            },
        },
        "thinking": {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"enum": ["enabled", "disabled", "adaptive", "between_tools"]},
                "budget_tokens": {"type": "integer", "minimum": 1},
            },
        },
        "output_config": {
            "type": "object",
            "properties": {
                "effort": {"enum": list(EFFORTS)},
                "format": {
                    "type": "object",
                    "required": ["type", "schema"],
                    "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
                },
            },
        },
    },
}

SCHEMA_MESSAGES: dict[str, object] = {
    "type": "object",
    "required": ["model", "messages", "max_tokens"],
    "properties": {
        **SCHEMA_COUNT["properties"],  # type: ignore[dict-item]
        "max_tokens": {"type": "integer", "minimum": 0},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": 0},
        "seed": {"type": "integer", "minimum": 0},
        "stop_sequences": {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS},
        "stream": {"type": "boolean", "default": False},
        "metadata": {"type": "object"},
    },
}

"""JSON schemas of the OpenAI dialect's bodies, for the API's own documentation. They say less
than the parsers check, and nothing else."""

from __future__ import annotations

_TEXT = {"type": "string"}
_FLAG = {"type": "boolean"}
_STOP = {
    "description": "Strings at which the answer ends; they are not part of it.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
    ],
}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.:/-]{1,128}$"},
        "description": _TEXT,
        "parameters": {"type": "object", "description": "A JSON schema of an object."},
        "strict": _FLAG,
    },
}
_TOOL = {
    "type": "object",
    "required": ["function"],
    "properties": {"type": {"enum": ["function"]}, "function": _FUNCTION},
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        "content": {
            "description": "Text, or parts of type text (also refusal) that are joined by lines.",
            "anyOf": [
                _TEXT,
                {"type": "array", "items": {"type": "object", "required": ["type"]}},
                {"type": "null"},
            ],
        },
        "name": _TEXT,
        "reasoning_content": {"type": "string", "description": "The assistant's past thinking."},
        "tool_calls": {"type": "array", "items": {"type": "object", "required": ["function"]}},
        "tool_call_id": _TEXT,
    },
}


def _integer(low: int, high: int, description: str = "") -> dict[str, object]:
    schema: dict[str, object] = {"type": "integer", "minimum": low, "maximum": high}
    return schema | ({"description": description} if description else {})


def _number(low: float, high: float, description: str = "") -> dict[str, object]:
    schema: dict[str, object] = {"type": "number", "minimum": low, "maximum": high}
    return schema | ({"description": description} if description else {})


_GENERATION: dict[str, object] = {
    "model": {"type": "string", "description": "A name of GET /v1/models."},
    "stream": _FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
    "n": _integer(1, 16, "Answers to each prompt."),
    "stop": _STOP,
    "seed": {"type": "integer", "description": "The same seed, the same answer; -1 draws one."},
    "temperature": _number(0, 5, "0 takes the likeliest token."),
    "top_p": _number(0, 1),
    "top_k": _integer(-1, 1 << 30),
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1),
    "repeat_penalty": _number(0.01, 10, "1 is off; also repetition_penalty."),
    "repeat_last_n": _integer(-1, 1 << 20),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "logit_bias": {
        "type": "object",
        "description": "From a token's number to what is added to its logit; -100 bans it.",
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "response_format": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": {"type": "object", "properties": {"schema": {"type": "object"}}},
        },
    },
    "json_schema": {"type": "object", "description": "A schema that the answer follows."},
    "grammar": {"type": "string", "description": "GBNF that the answer follows."},
    "ignore_eos": _FLAG,
    "keep_alive": {
        "description": "How long the model stays loaded: seconds, or 5m; negative: for good.",
        "type": ["number", "string"],
    },
}

SCHEMA_CHAT: dict[str, object] = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        **_GENERATION,
        "max_completion_tokens": _integer(-1, 1 << 27, "-1: to the end of the context."),
        "max_tokens": _integer(-1, 1 << 27, "The older name."),
        "logprobs": _FLAG,
        "top_logprobs": _integer(0, 20),
        "tools": {"type": "array", "items": _TOOL},
        "tool_choice": {
            "anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}],
        },
        "parallel_tool_calls": _FLAG,
        "reasoning_effort": {
            "enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max"],
        },
        "chat_template_kwargs": {
            "type": "object",
            "description": "Variables of the model's template, such as enable_thinking.",
        },
        "continue_final_message": {
            "type": "boolean",
            "description": "Go on with the last message, the assistant's; true where there is one.",
        },
    },
}

SCHEMA_COMPLETION: dict[str, object] = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {
            "description": "Text or tokens, or an array of either.",
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1},
                {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                    "minItems": 1,
                },
            ],
        },
        **_GENERATION,
        "max_tokens": {**_integer(-1, 1 << 27, "-1: to the end of the context."), "default": 16},
        "logprobs": _integer(0, 20),
        "echo": {"type": "boolean", "description": "The answer begins with the prompt."},
        "suffix": _TEXT,
        "best_of": {"type": "integer", "description": "Must be n."},
    },
}

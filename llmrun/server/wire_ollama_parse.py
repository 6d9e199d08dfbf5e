"""Reads requests in Ollama's dialect: `/api/chat` and `/api/generate`.

What Ollama takes and has no meaning here is ignored (`options.num_gpu`, `truncate`, `shift`, …).
Two fields deserve a word. `context` of `/api/generate`, tokens of earlier turns, is deprecated by
Ollama itself; no answer here carries one, so what comes in is checked and ignored. `template` is
refused: templates come with models, never from requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from llmrun.chat.messages import ROLES, Message, Role, ToolCall
from llmrun.server.reading import Fields, arguments_object, read_json
from llmrun.server.types import (
    ApiError,
    ChatRequest,
    Generation,
    SamplingWishes,
    TextRequest,
    Tool,
)
from llmrun.server.wire_openai_fields import read_keep_alive

MAX_MESSAGES = 4096
MAX_TOOLS = 512
MAX_CALLS = 256
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_NAME_CHARS = 512
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 1 << 24
MAX_SCHEMA_CHARS = 256 * 1024

JSON_OBJECT_SCHEMA = '{"type": "object"}'
"""What `"format": "json"` asks for."""

Action = Literal["reply", "load", "unload"]
Level = Literal["low", "medium", "high"]
_LEVELS = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request to `/api/generate`. `work` is a ChatRequest where the model's template is to be
    applied, and a TextRequest for `raw` text and for a gap to be filled (`suffix`)."""

    work: ChatRequest | TextRequest
    action: Action = "reply"

    @property
    def generation(self) -> Generation:
        return self.work.generation


def action_of(request: ChatRequest | GenerateRequest) -> Action:
    """What is asked: a reply; only that the model is loaded (no messages, no prompt); or that it
    goes (the same with `keep_alive` 0)."""
    if isinstance(request, GenerateRequest):
        return request.action
    if request.messages:
        return "reply"
    return _idle_action(request.generation)


def _idle_action(generation: Generation) -> Action:
    return "unload" if generation.keep_alive_s == 0 else "load"


def plain_name(name: str) -> str:
    """A model's name without the tag `:latest`, which Ollama's clients put behind names that have
    no tag. All names of this dialect come through here, and only here."""
    return name.removesuffix(":latest")


def read_model(fields: Fields, *members: str) -> str:
    """The model's name, from the first of `members` that is there."""
    for member in members:
        name = plain_name(fields.text(member, max_chars=MAX_NAME_CHARS).strip())
        if name:
            return name
    raise fields.error(members[0], "is required")


# ---- bodies


def parse_chat(body: object) -> ChatRequest:
    """A body of `/api/chat`; see `action_of` for one without messages. Raises ApiError."""
    fields = Fields(body)
    generation = _generation(fields)
    think, effort = _think(fields)
    messages = _messages(fields)
    last = messages[-1] if messages else None
    return ChatRequest(
        generation,
        messages,
        tools=_tools(fields),
        think=think,
        reasoning_effort=effort,
        # As Ollama's templates have it: an answer that has begun is continued.
        continues=last is not None
        and last.role == "assistant"
        and bool(last.content)
        and not last.tool_calls,
    )


def parse_generate(body: object) -> GenerateRequest:
    """A body of `/api/generate`. Raises ApiError.

    `raw` takes no `system`, as in Ollama. With `suffix` there is no template to put `system` in,
    so it is ignored, as Ollama does.
    """
    fields = Fields(body)
    generation = _generation(fields)
    think, effort = _think(fields)
    prompt = fields.text("prompt")
    suffix = fields.text("suffix") or None
    system = fields.text("system")
    if fields.text("template"):
        raise fields.error("template", "is not supported: the model's own is used")
    _check_images(fields)
    context = _context(fields)
    raw = fields.flag("raw")
    if raw and (system or context):
        raise fields.error("raw", "does not go with template, system or context")
    work: ChatRequest | TextRequest
    if raw or suffix is not None:
        work = TextRequest(generation, (prompt,), suffix=suffix)
    else:
        messages = [Message("user", prompt)]
        if system:
            messages.insert(0, Message("system", system))
        work = ChatRequest(generation, tuple(messages), think=think, reasoning_effort=effort)
    return GenerateRequest(work, "reply" if prompt else _idle_action(generation))


def _context(fields: Fields) -> bool:
    """Whether there is a `context`, once it has been found to be tokens."""
    tokens = fields.items("context", max_items=MAX_TOKENS)
    for i, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, int):
            raise fields.error(f"context[{i}]", "must be a whole number")
    return bool(tokens)


# ---- what both have


def _generation(fields: Fields) -> Generation:
    options = fields.object("options") or Fields({}, "options")
    n_predict = options.integer("num_predict", low=-2, high=MAX_TOKENS)
    n_logprobs = fields.integer("top_logprobs", 0, low=0, high=MAX_TOP_LOGPROBS)
    return Generation(
        model=read_model(fields, "model"),
        sampling=_sampling(options),
        # -1: no limit, -2: to the end of the context, and Ollama's runner has none for 0 either.
        max_tokens=n_predict if n_predict and n_predict > 0 else None,
        stop=_stops(options),
        n_logprobs=n_logprobs if fields.flag("logprobs") else None,
        json_schema=_format(fields),
        stream=fields.flag("stream", True),
        keep_alive_s=read_keep_alive(fields),
        n_ctx=options.integer("num_ctx", low=0, high=MAX_TOKENS) or None,
    )


def _sampling(options: Fields) -> SamplingWishes:
    seed = options.integer("seed", low=-1, high=2**63 - 1)
    top_k = options.integer("top_k", low=-1, high=1 << 24)
    return SamplingWishes(
        temperature=options.number("temperature", low=0, high=5),
        top_k=None if top_k is None else max(top_k, 0),
        top_p=options.number("top_p", low=0, high=1),
        min_p=options.number("min_p", low=0, high=1),
        typical_p=options.number("typical_p", low=0, high=1),
        repeat_penalty=options.number("repeat_penalty", low=0.01, high=10),
        repeat_last_n=options.integer("repeat_last_n", low=-1, high=MAX_TOKENS),
        frequency_penalty=options.number("frequency_penalty", low=-2, high=2),
        presence_penalty=options.number("presence_penalty", low=-2, high=2),
        seed=None if seed == -1 else seed,
    )


def _stops(options: Fields) -> tuple[str, ...]:
    stops = options.texts("stop", max_items=MAX_STOPS, max_chars=MAX_STOP_CHARS)
    return tuple(stop for stop in stops if stop)


def _think(fields: Fields) -> tuple[bool | None, Level | None]:
    """Whether to think, and how much."""
    value = fields.value("think")
    if value is None or isinstance(value, bool):
        return value, None
    if value not in _LEVELS:
        raise fields.error("think", 'must be true, false, "low", "medium" or "high"')
    return True, cast(Level, value)


def _format(fields: Fields) -> str | None:
    """The text of the JSON schema that the answer has to follow."""
    value = fields.value("format")
    if value is None or value == "":
        return None
    if value == "json":
        return JSON_OBJECT_SCHEMA
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = read_json(value.encode("utf-8", "replace"))
        except ApiError as error:
            raise fields.error("format", f"is no JSON schema: {error.message}") from None
    if not isinstance(value, dict):
        raise fields.error("format", 'must be "json" or a JSON schema')
    text = json.dumps(value)
    if len(text) > MAX_SCHEMA_CHARS:
        raise fields.error("format", f"must not have more than {MAX_SCHEMA_CHARS} characters")
    return text


# ---- messages and tools


def _messages(fields: Fields) -> tuple[Message, ...]:
    found = fields.objects("messages", max_items=MAX_MESSAGES)
    return _with_tool_names([_message(message) for message in found])


def _message(fields: Fields) -> Message:
    fields.require("role")
    role = fields.text("role").lower()
    if role not in ROLES:
        raise fields.error("role", f"must be one of {', '.join(sorted(ROLES))}")
    _check_images(fields)
    return Message(
        cast(Role, role),
        fields.text("content"),
        thinking=fields.text("thinking") or None,
        tool_calls=tuple(_call(call) for call in fields.objects("tool_calls", max_items=MAX_CALLS)),
        # Clients that also speak OpenAI's dialect write the tool's name as `name`.
        tool_name=fields.text("tool_name")
        or (fields.text("name") if role == "tool" else "")
        or None,
        tool_call_id=fields.text("tool_call_id", max_chars=MAX_NAME_CHARS) or None,
    )


def _check_images(fields: Fields) -> None:
    if fields.items("images", max_items=1024):
        raise fields.error("images", "are not supported: this server takes text only")


def _call(fields: Fields) -> ToolCall:
    function, name = _function(fields)
    arguments = function.value("arguments")
    if isinstance(arguments, str):
        arguments = arguments_object(arguments)
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise function.error("arguments", "must be an object")
    return ToolCall(name, arguments, fields.text("id", max_chars=MAX_NAME_CHARS) or None)


def _function(fields: Fields) -> tuple[Fields, str]:
    """The member `function` of a tool or a call, and the name in it."""
    fields.require("function")
    function = fields.object("function")
    assert function is not None
    name = function.text("name", max_chars=MAX_NAME_CHARS)
    if not name:
        raise function.error("name", "is required")
    return function, name


def _with_tool_names(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Results of tools that do not say whose they are get the name of the call that they answer:
    the one with their id, or else the calls' own order. Some templates show it."""
    named: list[Message] = []
    open_calls: list[ToolCall] = []
    for message in messages:
        if message.role == "assistant":
            open_calls = list(message.tool_calls)
        elif message.role == "tool" and open_calls:
            call = _answered(message, open_calls)
            open_calls.remove(call)
            if message.tool_name is None:
                message = replace(message, tool_name=call.name)
        named.append(message)
    return tuple(named)


def _answered(message: Message, calls: Sequence[ToolCall]) -> ToolCall:
    for call in calls:
        if message.tool_call_id is not None and call.id == message.tool_call_id:
            return call
    for call in calls:
        if call.name == message.tool_name:
            return call
    return calls[0]


def _tools(fields: Fields) -> tuple[Tool, ...]:
    return tuple(_tool(tool) for tool in fields.objects("tools", max_items=MAX_TOOLS))


def _tool(fields: Fields) -> Tool:
    fields.choice("type", ("function",))
    function, name = _function(fields)
    parameters = function.value("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise function.error("parameters", "must be an object")
    return Tool(
        name,
        function.text("description"),
        cast(Mapping[str, object], parameters or {}),
    )


# ---- schemas, for the OpenAPI page

_OPTIONS: dict[str, object] = {
    "type": "object",
    "properties": {
        "num_ctx": {"type": "integer", "minimum": 0},
        "num_predict": {"type": "integer", "minimum": -2},
        "seed": {"type": "integer", "minimum": -1},
        "temperature": {"type": "number", "minimum": 0},
        "top_k": {"type": "integer"},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1},
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
        "typical_p": {"type": "number", "minimum": 0, "maximum": 1},
        "repeat_penalty": {"type": "number", "minimum": 0.01},
        "repeat_last_n": {"type": "integer", "minimum": -1},
        "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
        "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
        "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    },
}

KEEP_ALIVE_SCHEMA: dict[str, object] = {
    "type": ["number", "string"],
    "description": "how long the model stays loaded afterwards, such as 300, 5m, -1 (for good)",
}

_COMMON: dict[str, object] = {
    "model": {"type": "string"},
    "stream": {"type": "boolean", "default": True},
    "format": {"type": ["string", "object"], "description": "json, or a JSON schema"},
    "options": _OPTIONS,
    "think": {"type": ["boolean", "string"], "enum": [True, False, *_LEVELS]},
    "keep_alive": KEEP_ALIVE_SCHEMA,
    "logprobs": {"type": "boolean", "default": False},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
}

_MESSAGE: dict[str, object] = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "enum": sorted(ROLES)},
        "content": {"type": "string"},
        "thinking": {"type": "string"},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_name": {"type": "string"},
    },
}

SCHEMA_CHAT: dict[str, object] = {
    "type": "object",
    "required": ["model"],
    "properties": {
        **_COMMON,
        "messages": {"type": "array", "items": _MESSAGE},
        "tools": {"type": "array", "items": {"type": "object", "required": ["function"]}},
    },
}

SCHEMA_GENERATE: dict[str, object] = {
    "type": "object",
    "required": ["model"],
    "properties": {
        **_COMMON,
        "prompt": {"type": "string"},
        "system": {"type": "string"},
        "suffix": {"type": "string"},
        "raw": {"type": "boolean", "default": False},
    },
}

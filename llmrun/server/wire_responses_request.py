"""Requests of OpenAI's Responses API. Pure; raises only ApiError.

Nothing is stored, so whatever refers to something stored is refused: `previous_response_id`,
`conversation`, `prompt`, `background`, items that are references. `store` itself is accepted, and
the answer says that it did not happen. All tools are functions.

The items of one assistant's turn (reasoning, message, function calls) become one message, and so
do the instructions and what the developer says right behind them: many templates know only one
message of that kind, the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from llmrun.chat.messages import Message, ToolCall
from llmrun.server.reading import Fields, read_json
from llmrun.server.types import ApiError, ChatRequest, Generation, Tool, ToolChoice
from llmrun.server.wire_openai_fields import MAX_TOP_LOGPROBS, read_generation
from llmrun.server.wire_turns import Turn, join_lines

MAX_ITEMS = 16_384
MAX_PARTS = 4096
MAX_TOOLS = 512
MAX_TOKENS = 1 << 27
_MAX_NAME_CHARS, _MAX_ID_CHARS = 256, 512
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}", re.ASCII)
_LOGPROBS = "message.output_text.logprobs"
_RULERS = ("system", "developer")
_ANY_OBJECT = '{"type": "object"}'

# Templates know three; `none` is no thinking at all.
EFFORTS: Mapping[str, str | None] = {
    "none": None,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
_STORED = {
    "previous_response_id": "this server is stateless: send the whole conversation as input",
    "conversation": "this server is stateless: send the whole conversation as input",
    "prompt": "this server keeps no prompt templates: send the prompt as instructions and input",
}
# What the provider's machines would run, and tools whose calls no model here knows how to write.
_FOREIGN_TOOLS = (
    "apply_patch", "code_interpreter", "computer", "custom", "file_search", "image_generation",
    "local_shell", "mcp", "namespace", "shell", "tool_search", "web_search",
)  # fmt: skip
# What an answer says again without having looked at it.
_ECHOED_TEXTS = ("user", "safety_identifier", "prompt_cache_key")


def parse_response(body: object) -> ChatRequest:
    """The request of POST /v1/responses."""
    fields = Fields(body)
    for name, why in _STORED.items():
        if fields.has(name):
            raise fields.error(name, f"is not supported, {why}")
    if fields.flag("background"):
        raise fields.error("background", "is not supported: this server stores no answers")
    fields.flag("store")
    fields.choice("truncation", ("auto", "disabled"))
    tools = _read_tools(fields)
    shown, choice = _read_tool_choice(fields, tools)
    schema, text = _read_text_config(fields)
    think, effort, reasoning = _read_reasoning(fields)
    generation = _read_generation(fields, schema)
    is_parallel = fields.flag("parallel_tool_calls", True)
    echo: dict[str, object] = {
        "instructions": fields.text("instructions") or None,
        "max_output_tokens": generation.max_tokens,
        "metadata": _read_metadata(fields),
        "parallel_tool_calls": is_parallel,
        "reasoning": reasoning,
        "temperature": generation.sampling.temperature,
        "text": text,
        "tool_choice": fields.value("tool_choice") or "auto",
        "tools": [_describe(tool) for tool in tools],
        "top_logprobs": generation.n_logprobs or 0,
        "top_p": generation.sampling.top_p,
    }
    for name in _ECHOED_TEXTS:
        echo[name] = fields.text(name, max_chars=_MAX_ID_CHARS) or None
    return ChatRequest(
        generation=generation,
        messages=_read_messages(fields),
        tools=shown,
        tool_choice=choice,
        parallel_tool_calls=is_parallel,
        think=think,
        reasoning_effort=effort,
        echo=echo,
    )


def _read_generation(fields: Fields, schema: str | None) -> Generation:
    include = fields.texts("include", max_items=64, max_chars=_MAX_NAME_CHARS)
    n_top = fields.integer("top_logprobs", low=0, high=MAX_TOP_LOGPROBS)
    n_logprobs = n_top or (0 if _LOGPROBS in include else None)
    generation = read_generation(fields, n_logprobs=n_logprobs)
    if schema is not None and generation.grammar is not None:
        raise fields.error("grammar", "cannot be given beside text.format")
    return replace(
        generation,
        n=1,
        max_tokens=fields.integer("max_output_tokens", generation.max_tokens, low=1,
                                  high=MAX_TOKENS),
        json_schema=schema or generation.json_schema,
        include_usage=True,
    )  # fmt: skip


def _read_text_config(fields: Fields) -> tuple[str | None, dict[str, object]]:
    """The schema of the answer, and what the answer says about its form."""
    text = fields.object("text")
    if text is None:
        return None, {"format": {"type": "text"}}
    echo: dict[str, object] = {"format": {"type": "text"}}
    verbosity = text.choice("verbosity", ("low", "medium", "high"))
    if verbosity:
        echo["verbosity"] = verbosity
    fmt = text.object("format")
    if fmt is None:
        return None, echo
    fmt.require("type")
    kind = fmt.choice("type", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None, echo
    if kind == "json_object":
        return _ANY_OBJECT, {**echo, "format": {"type": "json_object"}}
    fmt.require("schema")
    schema = fmt.json_text("schema")
    shown: dict[str, object] = {
        "type": "json_schema",
        "name": fmt.text("name", "answer", max_chars=_MAX_NAME_CHARS),
        "schema": fmt.value("schema"),
        "strict": fmt.flag("strict"),
    }
    if fmt.has("description"):
        shown["description"] = fmt.text("description")
    return schema, {**echo, "format": shown}


def _read_reasoning(fields: Fields) -> tuple[bool | None, str | None, dict[str, object]]:
    """Whether to think, with which effort, and what the answer says about both. The reasoning
    itself is answered, never a summary of it."""
    reasoning = fields.object("reasoning")
    if reasoning is None:
        return None, None, {"effort": None, "summary": None}
    effort = reasoning.choice("effort", tuple(EFFORTS))
    for name in ("summary", "generate_summary"):
        reasoning.choice(name, ("auto", "concise", "detailed"))
    echo: dict[str, object] = {"effort": effort or None, "summary": None}
    if not effort:
        return None, None, echo
    # A model may take `minimal` for none at all; from `low` on thinking is wanted.
    think = {"none": False, "minimal": None}.get(effort, True)
    return think, EFFORTS[effort], echo


def _read_metadata(fields: Fields) -> dict[str, object]:
    metadata = fields.object("metadata")
    if metadata is None:
        return {}
    names = list(metadata.names())
    if len(names) > 16 or any(len(name) > 64 for name in names):
        raise fields.error("metadata", "must have at most 16 names of at most 64 characters")
    return {name: metadata.text(name, max_chars=512) for name in names if metadata.has(name)}


# ---- tools


def _read_tools(fields: Fields) -> tuple[Tool, ...]:
    """The functions. Agents send what only the provider can run beside them, whatever the model:
    that is left out, and the model does not hear of it."""
    tools: dict[str, Tool] = {}
    for given in fields.objects("tools", max_items=MAX_TOOLS):
        given.require("type")
        kind = given.text("type", max_chars=_MAX_NAME_CHARS)
        if kind.startswith(_FOREIGN_TOOLS):
            continue
        if kind != "function":
            raise given.error("type", f"is {kind!r}, but this server takes only functions")
        name = _read_tool_name(given)
        if name in tools:
            raise given.error("name", f"is {name!r}, as that of an earlier tool")
        parameters = given.value("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise given.error("parameters", "must be an object")
        description = given.text("description")
        tools[name] = Tool(name, description, parameters or {}, given.flag("strict"))
    return tuple(tools.values())


def _read_tool_name(fields: Fields) -> str:
    fields.require("name")
    name = fields.text("name")
    if not _TOOL_NAME.fullmatch(name):
        raise fields.error("name", "must have 1 to 128 characters of A-Z a-z 0-9 _ - . : /")
    return name


def _describe(tool: Tool) -> dict[str, object]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description or None,
        "parameters": dict(tool.parameters),
        "strict": tool.strict,
    }


def _read_tool_choice(
    fields: Fields, tools: tuple[Tool, ...]
) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The tools that the model may use, and whether it has to."""
    value = fields.value("tool_choice")
    if not isinstance(value, dict):
        mode = fields.choice("tool_choice", ("none", "auto", "required"), "auto")
        return tools, _as_choice(fields, "tool_choice", mode, tools)
    choice = Fields(value, fields.where("tool_choice"))
    choice.require("type")
    if choice.choice("type", ("function", "allowed_tools")) == "function":
        return tools, ToolChoice("named", _known(choice, tools))
    choice.require("mode")
    mode = choice.choice("mode", ("auto", "required"))
    entries = choice.objects("tools", max_items=MAX_TOOLS)
    allowed = {
        _known(entry, tools)
        for entry in entries
        if not entry.text("type", "function", max_chars=_MAX_NAME_CHARS).startswith(_FOREIGN_TOOLS)
    }
    left = tuple(tool for tool in tools if tool.name in allowed)
    return left, _as_choice(choice, "tools", mode, left)


def _as_choice(fields: Fields, member: str, mode: str, tools: tuple[Tool, ...]) -> ToolChoice:
    if mode == "none":
        return ToolChoice("none")
    if mode == "auto":
        return ToolChoice("auto")
    if not tools:
        raise fields.error(member, "asks for a call, but there are no tools")
    return ToolChoice("required")


def _known(choice: Fields, tools: tuple[Tool, ...]) -> str:
    name = _read_tool_name(choice)
    if name not in [tool.name for tool in tools]:
        raise choice.error("name", f"is {name!r}, which is not among the tools")
    return name


# ---- items


def _read_messages(fields: Fields) -> tuple[Message, ...]:
    turns: list[Turn] = []
    instructions = fields.text("instructions")
    if instructions:
        turns.append(Turn("system", [instructions]))
    content = fields.require("input")
    if isinstance(content, str):
        turns.append(Turn("user", [content]))
    else:
        items = fields.objects("input", max_items=MAX_ITEMS)
        if not items:
            raise fields.error("input", "must not be empty")
        names: dict[str, str] = {}
        for item in items:
            _read_item(item, turns, names)
    return tuple(turn.as_message() for turn in turns)


def _read_item(item: Fields, turns: list[Turn], names: dict[str, str]) -> None:
    """Add an item to the turns. `names` are the tools' by the ids of their calls, and grows."""
    kind = item.text("type", "message", max_chars=_MAX_NAME_CHARS)
    if kind == "message":
        _read_message(item, turns)
    elif kind == "reasoning":
        _answer(turns).thoughts += _read_thoughts(item)
    elif kind == "function_call":
        call = _read_call(item)
        names[call.id or ""] = call.name
        _answer(turns).calls.append(call)
    elif kind == "function_call_output":
        item.require("call_id")
        call_id = item.text("call_id", max_chars=_MAX_ID_CHARS)
        item.require("output")
        name = names.get(call_id) or item.text("name", max_chars=_MAX_NAME_CHARS) or None
        text = _read_content(item, "output")
        turns.append(Turn("tool", [text], tool_name=name, call_id=call_id))
    elif kind == "item_reference":
        raise item.error("type", "is 'item_reference', but this server is stateless: send the item")
    else:
        raise item.error("type", f"is {kind!r}, which is not supported here")


def _answer(turns: list[Turn]) -> Turn:
    """The assistant's turn that an item belongs to."""
    if not turns or turns[-1].role != "assistant":
        turns.append(Turn("assistant"))
    return turns[-1]


def _read_message(item: Fields, turns: list[Turn]) -> None:
    item.require("role")
    role = item.choice("role", ("user", "assistant", "system", "developer"))
    item.require("content")
    text = _read_content(item, "content")
    if role == "assistant":
        _answer(turns).texts.append(text)
    elif role == "user":
        turns.append(Turn("user", [text]))
    elif len(turns) == 1 and turns[0].role in _RULERS:
        turns[0].texts.append(text)
    else:
        turns.append(Turn("developer" if role == "developer" else "system", [text]))


def _read_content(item: Fields, name: str) -> str:
    if isinstance(item.value(name), str):
        return item.text(name)
    return join_lines([_read_part(part) for part in item.objects(name, max_items=MAX_PARTS)])


def _read_part(part: Fields) -> str:
    part.require("type")
    kind = part.text("type", max_chars=_MAX_NAME_CHARS)
    if kind == "refusal":
        part.require("refusal")
        return part.text("refusal")
    if kind in ("input_text", "output_text", "text"):
        part.require("text")
        return part.text("text")
    what = "images are" if "image" in kind else f"content of type {kind!r} is"
    raise ApiError(
        "invalid_request",
        f"{part.path}: {what} not supported, this server's models read text only",
        param=part.path,
    )


def _read_thoughts(item: Fields) -> list[str]:
    """The reasoning; the summary where that is all there is. Encrypted reasoning is of no use."""
    for name in ("content", "summary"):
        texts = []
        for part in item.objects(name, max_items=MAX_PARTS):
            part.require("text")
            texts.append(part.text("text"))
        if texts:
            return texts
    return []


def _read_call(item: Fields) -> ToolCall:
    item.require("call_id")
    call_id = item.text("call_id", max_chars=_MAX_ID_CHARS)
    item.require("name")
    name = item.text("name", max_chars=_MAX_NAME_CHARS)
    if not name:
        raise item.error("name", "must not be empty")
    return ToolCall(name, _read_arguments(item), call_id)


def _read_arguments(item: Fields) -> dict[str, object]:
    """The call's arguments; a text that is no object is kept whole, under the name `raw`."""
    text = item.text("arguments")
    if not text.strip():
        return {}
    try:
        value = read_json(text.encode("utf-8", "replace"))
    except ApiError:
        return {"raw": text}
    return value if isinstance(value, dict) else {"raw": text}

"""Requests of Anthropic's messages API. Pure.

What this dialect means by a body, where its documentation leaves a server room:

- Thinking only where it is asked for: without `thinking` there is none. `enabled` asks for it,
  `adaptive` leaves it to the template, and the budget is not enforced.
- Tools that the provider itself would run (web search, code execution, tool search) are left out,
  and so is what they said in earlier turns: the model gets along without. Tools that the client
  runs but whose schema only the provider knows (bash, text editor, computer) are refused.
- `defer_loading` is not looked at, since there is no tool search: every tool is shown at once.
- Neighbouring messages of one role are one turn. A user's turn with tool results in it becomes
  several messages, in the order of its blocks.
- A first line of the system prompt that carries a client's accounting is dropped: it changes with
  every request, and nothing behind it could be taken from the cache.
- `cache_control` is not looked at: prefixes are cached without being told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from llmrun.chat.messages import Message, ToolCall
from llmrun.server.reading import Fields
from llmrun.server.types import (
    ApiError,
    ChatRequest,
    Generation,
    SamplingWishes,
    Tool,
    ToolChoice,
)
from llmrun.server.wire_turns import Turn, join_lines

MAX_MESSAGES = 10_000
MAX_BLOCKS = 10_000
MAX_TOOLS = 1024
MAX_STOPS = 16
MAX_TOKENS = 2**31 - 1
MAX_NAME_CHARS = 256
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}", re.ASCII)

# What the provider's own machines would run: no client waits to do it.
_SERVER_TOOLS = (
    "web_search_",
    "web_fetch_",
    "code_execution_",
    "tool_search_tool_",
    "advisor_",
    "mcp_toolset",
)
_SERVER_BLOCKS = frozenset(
    {
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "mcp_tool_use",
        "mcp_tool_result",
    }
)
_ACCOUNTING = "x-anthropic-billing-header:"
EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


def parse_messages(body: object) -> ChatRequest:
    """The request of POST /v1/messages. Raises ApiError (invalid_request)."""
    fields = Fields(body)
    fields.require("max_tokens")
    return _parse(fields)


def parse_count_tokens(body: object) -> ChatRequest:
    """The request of POST /v1/messages/count_tokens: only its prompt is of use. Raises ApiError
    (invalid_request)."""
    return _parse(Fields(body))


def _parse(fields: Fields) -> ChatRequest:
    tools, n_left_out = _read_tools(fields)
    choice, is_parallel = _read_tool_choice(fields, tools, n_left_out)
    effort, schema = _read_output(fields)
    _check_metadata(fields)
    messages, is_open = _read_turns(fields)
    return ChatRequest(
        generation=Generation(
            model=fields.text("model", max_chars=MAX_NAME_CHARS),
            sampling=SamplingWishes(
                temperature=fields.number("temperature", low=0, high=2),
                top_k=fields.integer("top_k", low=0, high=MAX_TOKENS),
                top_p=fields.number("top_p", low=0, high=1),
                seed=fields.integer("seed", low=0, high=2**32 - 1),
            ),
            max_tokens=fields.integer("max_tokens", low=0, high=MAX_TOKENS),
            stop=_read_stops(fields),
            json_schema=schema,
            stream=fields.flag("stream"),
            include_usage=True,
        ),
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=is_parallel,
        think=_read_thinking(fields),
        reasoning_effort=effort,
        continues=is_open,
    )


def _read_stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.texts("stop_sequences", max_items=MAX_STOPS, max_chars=1000)
    for i, stop in enumerate(stops):
        if not stop:
            raise fields.error(f"stop_sequences[{i}]", "must not be empty")
    return stops


def _read_thinking(fields: Fields) -> bool | None:
    thinking = fields.object("thinking")
    if thinking is None:
        return False
    thinking.require("type")
    kind = thinking.choice("type", ("enabled", "disabled", "adaptive", "between_tools"))
    thinking.integer("budget_tokens", low=1, high=MAX_TOKENS)
    return {"enabled": True, "disabled": False}.get(kind)


def _read_output(fields: Fields) -> tuple[str | None, str | None]:
    """The effort, and the schema of the answer. Older clients send the latter's format beside
    `output_config`, not in it."""
    output = fields.object("output_config")
    effort = output.choice("effort", tuple(EFFORTS)) if output is not None else ""
    fmt = output.object("format") if output is not None else None
    fmt = fmt or fields.object("output_format")
    if fmt is None:
        return EFFORTS.get(effort), None
    fmt.require("type")
    fmt.choice("type", ("json_schema",))
    fmt.require("schema")
    return EFFORTS.get(effort), fmt.json_text("schema")


def _check_metadata(fields: Fields) -> None:
    metadata = fields.object("metadata")
    if metadata is not None:
        metadata.text("user_id", max_chars=10_000)


# ---- tools


def _read_tools(fields: Fields) -> tuple[tuple[Tool, ...], int]:
    """The tools, and how many of the provider's were left out."""
    tools: dict[str, Tool] = {}
    n_left_out = 0
    for given in fields.objects("tools", max_items=MAX_TOOLS):
        kind = given.text("type", "custom", max_chars=MAX_NAME_CHARS)
        if kind.startswith(_SERVER_TOOLS):
            n_left_out += 1
            continue
        if kind != "custom":
            raise given.error(
                "type",
                f"is {kind!r}, whose schema this server does not know: "
                "send the tool with an input_schema of its own",
            )
        given.require("name")
        given.require("input_schema")
        name = given.text("name")
        if not _TOOL_NAME.fullmatch(name):
            raise given.error("name", "must have 1 to 128 characters of A-Z a-z 0-9 _ - . : /")
        if name in tools:
            raise given.error("name", f"is {name!r}, as that of an earlier tool")
        tools[name] = Tool(
            name,
            given.text("description"),
            _object(given, "input_schema"),
            given.flag("strict"),
        )
    return tuple(tools.values()), n_left_out


def _read_tool_choice(
    fields: Fields, tools: tuple[Tool, ...], n_left_out: int
) -> tuple[ToolChoice, bool]:
    choice = fields.object("tool_choice")
    if choice is None:
        return ToolChoice(), True
    choice.require("type")
    kind = choice.choice("type", ("auto", "any", "tool", "none"))
    is_parallel = not choice.flag("disable_parallel_tool_use")
    if kind in ("auto", "none"):
        return ToolChoice("none" if kind == "none" else "auto"), is_parallel
    if not tools:
        why = "of which this server could run none" if n_left_out else "but there are none"
        raise fields.error("tool_choice", f"asks for one of the tools, {why}")
    if kind == "any":
        return ToolChoice("required"), is_parallel
    choice.require("name")
    name = choice.text("name", max_chars=MAX_NAME_CHARS)
    if name not in [tool.name for tool in tools]:
        raise choice.error("name", f"is {name!r}, which is none of the tools")
    return ToolChoice("named", name), is_parallel


# ---- messages


def _read_turns(fields: Fields) -> tuple[tuple[Message, ...], bool]:
    """All messages, and whether the last is the begin of the reply."""
    fields.require("messages")
    given = fields.objects("messages", max_items=MAX_MESSAGES)
    if not given:
        raise fields.error("messages", "must not be empty")
    turns: list[Turn] = []
    system = _read_system(fields)
    if system:
        turns.append(Turn("system", [system]))
    names: dict[str, str] = {}
    for message in given:
        for turn in _read_message(message, names):
            _add(turns, turn)
    messages = [turn.as_message() for turn in turns]
    is_open = given[-1].value("role") == "assistant"
    if is_open:
        last = messages[-1]
        if last.tool_calls:
            raise given[-1].error("content", "ends with a tool_use that no tool_result answers")
        if not last.content and not last.thinking:
            messages.pop()
            is_open = False
    if not messages:
        raise fields.error("messages", "must have some content")
    return tuple(messages), is_open


def _add(turns: list[Turn], turn: Turn) -> None:
    """Append a message, or make it one with the one before where both are of one turn."""
    last = turns[-1] if turns else None
    if last is None or last.role != turn.role or turn.role == "tool":
        turns.append(turn)
        return
    last.texts += turn.texts
    last.thoughts += turn.thoughts
    last.calls += turn.calls


def _read_system(fields: Fields) -> str:
    value = fields.value("system")
    if value is None or isinstance(value, str):
        return _without_accounting(fields.text("system"))
    texts = []
    for block in fields.objects("system", max_items=MAX_BLOCKS):
        block.require("type")
        block.choice("type", ("text",))
        texts.append(_without_accounting(_required_text(block, "text")))
    return join_lines(texts)


def _without_accounting(text: str) -> str:
    if not text.startswith(_ACCOUNTING):
        return text
    return text.partition("\n")[2]


def _read_message(message: Fields, names: dict[str, str]) -> Iterator[Turn]:
    """The messages that one of the dialect's makes. `names` are the tools' by the ids of their
    calls, and grows."""
    message.require("role")
    role = message.choice("role", ("user", "assistant", "system"))
    content = message.require("content")
    blocks = [] if isinstance(content, str) else message.objects("content", max_items=MAX_BLOCKS)
    texts = [content] if isinstance(content, str) else []
    if role == "assistant":
        turn = _read_assistant(blocks, names)
        turn.texts += texts
        yield turn
    elif role == "system":
        for block in blocks:
            block.require("type")
            block.choice("type", ("text",))
            texts.append(_required_text(block, "text"))
        yield Turn("system", texts)
    else:
        if texts:
            yield Turn("user", texts)
        for block in blocks:
            kind = _kind(block)
            if kind == "tool_result":
                yield _read_result(block, names)
            else:
                yield Turn("user", [_read_text(block, kind)])


def _read_assistant(blocks: list[Fields], names: dict[str, str]) -> Turn:
    turn = Turn("assistant")
    texts = []
    for block in blocks:
        kind = _kind(block)
        if kind == "text":
            texts.append(_required_text(block, "text"))
        elif kind == "thinking":
            turn.thoughts.append(_required_text(block, "thinking"))
        elif kind == "tool_use":
            call = _read_call(block)
            names[call.id or ""] = call.name
            turn.calls.append(call)
        elif kind != "redacted_thinking" and kind not in _SERVER_BLOCKS:
            raise block.error("type", f"is {kind!r}, which an assistant's message cannot have")
    # The blocks of one answer are its text as it was: nothing goes between them.
    turn.texts.append("".join(texts))
    return turn


def _read_call(block: Fields) -> ToolCall:
    block.require("id")
    name = _required_text(block, "name", max_chars=MAX_NAME_CHARS)
    if not name:
        raise block.error("name", "must not be empty")
    call_id = block.text("id", max_chars=MAX_NAME_CHARS)
    return ToolCall(name, _object(block, "input"), call_id)


def _read_result(block: Fields, names: dict[str, str]) -> Turn:
    block.require("tool_use_id")
    call_id = block.text("tool_use_id", max_chars=MAX_NAME_CHARS)
    content = block.value("content")
    if content is None or isinstance(content, str):
        text = block.text("content")
    else:
        parts = block.objects("content", max_items=MAX_BLOCKS)
        text = join_lines([_read_text(part, _kind(part)) for part in parts])
    if block.flag("is_error"):
        # Templates have no place for it: it is said in words.
        text = f"Error: {text}" if text else "Error"
    return Turn("tool", [text], tool_name=names.get(call_id), call_id=call_id)


def _read_text(block: Fields, kind: str) -> str:
    """The text of a block that a client shows the model. What is not text is refused."""
    if kind == "text":
        return _required_text(block, "text")
    if kind == "tool_reference":
        return _required_text(block, "tool_name")
    if kind == "search_result":
        texts = [_required_text(part, "text") for part in _parts(block, "content")]
        return join_lines([block.text("title"), block.text("source"), *texts])
    if kind == "document":
        return _read_document(block)
    if kind == "image":
        raise ApiError(
            "invalid_request",
            f"{block.path}: images are not supported, this server's models read text only",
            param=block.path,
        )
    raise block.error("type", f"is {kind!r}, which is not supported here")


def _read_document(block: Fields) -> str:
    block.require("source")
    source = block.object("source")
    assert source is not None
    kind = source.text("type", max_chars=MAX_NAME_CHARS)
    title = block.text("title")
    if kind == "text":
        return join_lines([title, _required_text(source, "data")])
    if kind == "content" and isinstance(source.value("content"), str):
        return join_lines([title, source.text("content")])
    if kind == "content":
        texts = [_read_text(part, _kind(part)) for part in _parts(source, "content")]
        return join_lines([title, *texts])
    raise ApiError(
        "invalid_request",
        f"{source.path}: only documents of plain text are supported, this is {kind!r}",
        param=source.path,
    )


def _parts(block: Fields, name: str) -> list[Fields]:
    block.require(name)
    return block.objects(name, max_items=MAX_BLOCKS)


def _kind(block: Fields) -> str:
    return _required_text(block, "type", max_chars=MAX_NAME_CHARS)


def _object(block: Fields, name: str) -> Mapping[str, object]:
    value = block.value(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise block.error(name, "must be an object")
    return value


def _required_text(block: Fields, name: str, *, max_chars: int | None = None) -> str:
    block.require(name)
    return block.text(name, max_chars=max_chars)

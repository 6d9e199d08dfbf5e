"""The messages of an OpenAI chat request. Pure; raises only ApiError.

Text parts of a content array are joined with newlines, as llama.cpp's server does. A past call's
arguments come as JSON text and go to the template as an object, because templates break on text;
text that is no object is kept whole, under the name `raw`.
"""

from __future__ import annotations

from llmrun.chat.messages import Message, Role, ToolCall
from llmrun.server.reading import Fields, read_json
from llmrun.server.types import ApiError

_MAX_MESSAGES = 16_384
_MAX_PARTS = 4096
_MAX_CALLS = 512
_MAX_NAME_CHARS = 256
_MAX_ID_CHARS = 512
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MEDIA = ("image", "audio", "video", "file")


def read_messages(fields: Fields) -> tuple[Message, ...]:
    """The member `messages`: at least one."""
    fields.require("messages")
    found = fields.objects("messages", max_items=_MAX_MESSAGES)
    if not found:
        raise fields.error("messages", "must not be empty")
    calls = _Calls()
    return tuple(_read_message(message, calls) for message in found)


class _Calls:
    """The names of the calls made so far, for the results that follow."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._open: list[ToolCall] = []

    def add(self, calls: tuple[ToolCall, ...]) -> None:
        self._open = list(calls)
        self._names |= {call.id: call.name for call in calls if call.id is not None}

    def answer(self, call_id: str | None) -> str | None:
        """The name of the call with this id; without one, of the first that has no result yet."""
        if call_id is not None:
            self._open = [call for call in self._open if call.id != call_id]
            return self._names.get(call_id)
        return self._open.pop(0).name if self._open else None


def _read_message(fields: Fields, calls: _Calls) -> Message:
    fields.require("role")
    role = fields.choice("role", _ROLES)
    name = fields.text("name", max_chars=_MAX_NAME_CHARS) or None
    if role == "assistant":
        made = _read_calls(fields)
        calls.add(made)
        return Message(
            "assistant",
            _read_content(fields) or fields.text("refusal"),
            thinking=fields.text("reasoning_content") or fields.text("reasoning") or None,
            tool_calls=made,
            name=name,
        )
    if role == "tool":
        call_id = fields.text("tool_call_id", max_chars=_MAX_ID_CHARS) or None
        tool_name = calls.answer(call_id)
        return Message(
            "tool", _read_content(fields), tool_name=tool_name or name, tool_call_id=call_id
        )
    if role == "function":
        calls.answer(None)
        return Message("tool", _read_content(fields), tool_name=name)
    fields.require("content")
    known: dict[str, Role] = {"system": "system", "developer": "developer", "user": "user"}
    return Message(known[role], _read_content(fields), name=name)


def _read_content(fields: Fields) -> str:
    """A string or an array of parts, as text; empty when absent."""
    value = fields.value("content")
    if value is not None and not isinstance(value, str | list):
        raise fields.error("content", "must be a string or an array of parts")
    if not isinstance(value, list):
        return fields.text("content")
    parts = fields.objects("content", max_items=_MAX_PARTS)
    return "\n".join([_read_part(part) for part in parts])


def _read_part(part: Fields) -> str:
    part.require("type")
    kind = part.text("type", max_chars=64)
    if kind in ("text", "input_text", "output_text"):
        part.require("text")
        return part.text("text")
    if kind == "refusal":
        part.require("refusal")
        return part.text("refusal")
    if any(word in kind for word in _MEDIA):
        raise part.error("type", f"is {kind!r}, but this server takes text only")
    raise part.error("type", f"is {kind!r}; known are text and refusal")


def _read_calls(fields: Fields) -> tuple[ToolCall, ...]:
    found = []
    for call in fields.objects("tool_calls", max_items=_MAX_CALLS):
        call.choice("type", ("function",))
        call.require("function")
        function = call.object("function")
        assert function is not None
        found.append(_read_call(function, call.text("id", max_chars=_MAX_ID_CHARS) or None))
    older = fields.object("function_call")
    if older is not None and not found:
        found.append(_read_call(older, None))
    return tuple(found)


def _read_call(function: Fields, call_id: str | None) -> ToolCall:
    name = function.text("name", max_chars=_MAX_NAME_CHARS)
    if not name:
        raise function.error("name", "is required")
    return ToolCall(name, _read_arguments(function), call_id)


def _read_arguments(function: Fields) -> dict[str, object]:
    value = function.value("arguments")
    if isinstance(value, dict):
        return value
    text = function.text("arguments")
    if not text.strip():
        return {}
    try:
        value = read_json(text.encode("utf-8", "replace"))
    except ApiError:
        return {"raw": text}
    return value if isinstance(value, dict) else {"raw": value}

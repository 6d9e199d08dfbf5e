"""The messages of a conversation, and the dictionaries that chat templates expect of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["system", "developer", "user", "assistant", "tool"]
ROLES: frozenset[str] = frozenset(get_args(Role))

# The fields that templates read past thinking from, most common first: Qwen, GLM, Nemotron and
# Gemma 4 read the first, gpt-oss and LFM2.5 the second.
THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant made. `arguments` is an object, never its JSON text."""

    name: str
    arguments: Mapping[str, object]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message. Raises ValueError for a role that no template knows.

    `thinking` is the reasoning that came before `content`, without its tags. `tool_name` and
    `tool_call_id` say which call a message of role `tool` answers. `interrupted`: the answer was
    stopped before its end, by the user or by a failure.
    """

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    interrupted: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}")


def to_template_dicts(messages: Sequence[Message], template_source: str) -> list[dict[str, object]]:
    """The messages as the template with this source wants them.

    Whether past thinking is shown is the template's own decision, so it is always handed over.
    """
    return [_to_dict(message, template_source) for message in messages]


def _to_dict(message: Message, source: str) -> dict[str, object]:
    result: dict[str, object] = {"role": message.role, "content": message.content}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_name is not None:
        result["name"] = message.tool_name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.thinking:
        _add_thinking(result, message, source)
    if message.tool_calls:
        _add_tool_calls(result, message, source)
    return result


def _add_thinking(result: dict[str, object], message: Message, source: str) -> None:
    if "[THINK]" in source:
        # Ministral takes reasoning as a block of the content, not as a field.
        result["content"] = [
            {"type": "thinking", "thinking": message.thinking},
            {"type": "text", "text": message.content},
        ]
        return
    field = next((field for field in THINKING_FIELDS if field in source), None)
    if field is not None:
        result[field] = message.thinking


def _add_tool_calls(result: dict[str, object], message: Message, source: str) -> None:
    if "tool_calls" in source:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in message.tool_calls
        ]
        return
    # A template that does not render calls would lose them: show them in the text.
    calls = (
        json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
        for call in message.tool_calls
    )
    blocks = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    result["content"] = "\n".join([message.content, *blocks] if message.content else blocks)

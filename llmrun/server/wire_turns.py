"""Messages that are put together of many small parts, as the Anthropic and the Responses dialect
send them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llmrun.chat.messages import Message, Role, ToolCall


@dataclass(slots=True)
class Turn:
    """A message that is still being read. Its texts are put together once: one at a time would
    copy a hostile request's text for each of its thousands of pieces."""

    role: Role
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    tool_name: str | None = None
    call_id: str | None = None

    def as_message(self) -> Message:
        return Message(
            self.role,
            join_lines(self.texts),
            thinking=join_lines(self.thoughts) or None,
            tool_calls=tuple(self.calls),
            tool_name=self.tool_name,
            tool_call_id=self.call_id,
        )


def join_lines(texts: Iterable[str]) -> str:
    """The texts one below another, without the empty ones."""
    return "\n".join(text for text in texts if text)

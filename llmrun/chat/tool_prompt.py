"""Tools for models whose chat template does not know any: as a system text, and calls as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from llmrun.chat.messages import Message, ToolCall
from llmrun.chat.tool_formats import FALLBACK, ToolFormat, ToolSpec, as_template_tools


def tool_prompt(
    tools: Sequence[ToolSpec], *, name: str | None = None, parallel: bool = True
) -> str:
    """A text for the system message that shows the tools and how to call them, in the way that
    `tool_formats.FALLBACK` reads. `name`: the tool that has to be called."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in as_template_tools(tools)]
    several = (
        "For several calls, write several such blocks."
        if parallel
        else "Write no more than one such block."
    )
    wish = (
        f"Call the function {name} now."
        if name is not None
        else "Where no function is of use, answer without one."
    )
    return "\n".join(
        [
            "You can call functions. Each line between the tags describes one of them, with a JSON "
            "schema of its arguments:",
            "<tools>",
            *lines,
            "</tools>",
            "To call a function, write a JSON object with its name and its arguments, between tags "
            "and with nothing else around it:",
            "<tool_call>",
            '{"name": "FUNCTION", "arguments": {"ARGUMENT": "VALUE"}}',
            "</tool_call>",
            f"{several} Then stop: the results come in the next message, as <tool_response>. "
            f"Never make up a result. {wish}",
        ]
    )


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages for a template that knows neither calls nor results: both as text.

    Results come as the user's words. Neighbouring messages of the user become one, since many
    templates refuse two in a row.
    """
    result: list[Message] = []
    for message in with_calls_as_text(messages, FALLBACK):
        if message.role == "tool":
            text = f"<tool_response>\n{message.content}\n</tool_response>"
            message = Message("user", text)
        if result and message.role == result[-1].role == "user":
            message = replace(message, content=f"{result.pop().content}\n{message.content}")
        result.append(message)
    return result


def with_calls_as_text(messages: Sequence[Message], fmt: ToolFormat) -> list[Message]:
    """The messages for a template that leaves past calls out (LFM2): these as the model wrote
    them. Syntaxes whose templates all show calls are not written here; they come as `FALLBACK`."""
    result = []
    for message in messages:
        if message.tool_calls:
            text = _write_calls(message.tool_calls, fmt)
            content = f"{message.content}\n{text}" if message.content else text
            message = replace(message, content=content, tool_calls=())
        result.append(message)
    return result


def _write_calls(calls: Sequence[ToolCall], fmt: ToolFormat) -> str:
    if fmt.syntax == "pythonic":
        texts = [
            f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"
            for call in calls
        ]
    else:
        fmt = fmt if fmt.syntax == "json" and fmt.begin else FALLBACK
        texts = [
            json.dumps(
                {fmt.name_key: call.name, fmt.arguments_key: dict(call.arguments)},
                ensure_ascii=False,
            )
            for call in calls
        ]
    if fmt.wraps_each:
        return fmt.between.join(f"{fmt.begin}{text}{fmt.end}" for text in texts)
    return f"{fmt.begin}[{fmt.between.join(texts)}]{fmt.end}"

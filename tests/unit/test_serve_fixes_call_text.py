"""A call that a grammar forced is text that templates write again in the next turn, byte for byte:
else its tokens, and all that follow them, would have to be computed again."""

from __future__ import annotations

import json

import pytest

from llmrun.chat.messages import Message, ToolCall
from llmrun.chat.tool_calls import CallStart, CallText, make_tool_splitter
from llmrun.chat.tool_formats import FALLBACK, ToolSpec
from llmrun.chat.tool_grammar import tool_grammar
from llmrun.chat.tool_prompt import plain_messages
from tests.fakes.gbnf import parse, sentence

SHELL = ToolSpec(
    "shell",
    "Runs a command",
    {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"enum": ["ls", "cat"]}, "minItems": 2},
            "n": {"enum": [1, 2]},
            "at": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
        },
        "required": ["command", "n", "at"],
    },
)


@pytest.mark.parametrize("seed", range(20))
def test_a_forced_call_is_written_again_as_it_was(seed: int) -> None:
    rules = parse(tool_grammar(FALLBACK, [SHELL], parallel=False))
    text = sentence(rules, seed)
    splitter = make_tool_splitter(FALLBACK, [SHELL])
    found = [*splitter.feed(text), *splitter.flush()]
    (name,) = [part.name for part in found if isinstance(part, CallStart)]
    arguments = "".join(part.text for part in found if isinstance(part, CallText))
    call = ToolCall(name, json.loads(arguments))
    (again,) = plain_messages([Message("assistant", "", tool_calls=(call,))])
    assert again.content == text

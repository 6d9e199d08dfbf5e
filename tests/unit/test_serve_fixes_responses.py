"""Agents send tools that only the provider can run, whatever model they talk to."""

from __future__ import annotations

import pytest

from llmrun.server.types import ApiError
from llmrun.server.wire_responses import parse_response

SHELL = {"type": "function", "name": "shell", "parameters": {"type": "object"}}
FOREIGN = [
    {"type": "web_search", "external_web_access": False},
    {"type": "web_search_preview"},
    {"type": "image_generation", "output_format": "png"},
    {"type": "namespace", "name": "mcp__files", "tools": [SHELL]},
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
    {"type": "local_shell"},
    {"type": "mcp", "server_label": "x"},
]


def test_tools_of_the_provider_are_left_out() -> None:
    request = parse_response({"input": "Hi", "tools": [*FOREIGN, SHELL], "tool_choice": "auto"})
    assert [tool.name for tool in request.tools] == ["shell"]
    assert [tool["name"] for tool in request.echo["tools"]] == ["shell"]  # type: ignore[attr-defined]


def test_a_choice_among_tools_passes_over_those_left_out() -> None:
    choice = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "web_search"}, {"type": "function", "name": "shell"}],
    }
    request = parse_response({"input": "Hi", "tools": [*FOREIGN, SHELL], "tool_choice": choice})
    assert [tool.name for tool in request.tools] == ["shell"]


@pytest.mark.parametrize("choice", ["required", {"type": "web_search"}])
def test_none_of_them_can_be_asked_for(choice: object) -> None:
    with pytest.raises(ApiError) as caught:
        parse_response({"input": "Hi", "tools": FOREIGN, "tool_choice": choice})
    assert caught.value.param in ("tool_choice", "tool_choice.type")

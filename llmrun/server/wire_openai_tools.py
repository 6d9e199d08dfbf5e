"""Tools and the choice among them in an OpenAI chat request, in the present form and in the older
one (`functions`, `function_call`). Pure; raises only ApiError."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llmrun.server.reading import Fields
from llmrun.server.types import Tool, ToolChoice

_MAX_TOOLS = 512
# The dialect's own names are shorter and plainer; the separators are those of namespaced tools.
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tools:
    """`legacy`: they came in the older form."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True
    legacy: bool = False


def read_tools(fields: Fields) -> Tools:
    """All that a request says about tools. A choice that cannot be followed is an error."""
    if fields.has("functions"):
        if fields.has("tools"):
            raise fields.error("functions", "cannot be given beside tools")
        tools = _unique(
            fields,
            "functions",
            [_read_function(f) for f in fields.objects("functions", max_items=_MAX_TOOLS)],
        )
        return Tools(tools, _read_older_choice(fields, tools), parallel=False, legacy=bool(tools))
    tools = _unique(
        fields, "tools", [_read_tool(t) for t in fields.objects("tools", max_items=_MAX_TOOLS)]
    )
    tools, choice = _read_choice(fields, tools)
    return Tools(tools, choice, parallel=fields.flag("parallel_tool_calls", True))


def _read_tool(tool: Fields) -> Tool:
    kind = tool.text("type", "function", max_chars=64)
    if kind != "function":
        raise tool.error("type", f"is {kind!r}, but this server takes only functions")
    tool.require("function")
    function = tool.object("function")
    assert function is not None
    return _read_function(function)


def _read_function(function: Fields) -> Tool:
    name = _read_name(function)
    parameters = function.value("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise function.error("parameters", "must be an object")
    return Tool(name, function.text("description"), parameters, function.flag("strict"))


def _read_name(function: Fields) -> str:
    function.require("name")
    name = function.text("name")
    if not _NAME.fullmatch(name):
        raise function.error("name", "must have 1 to 128 characters of A-Z a-z 0-9 _ - . : /")
    return name


def _unique(fields: Fields, member: str, tools: list[Tool]) -> tuple[Tool, ...]:
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise fields.error(member, "must have different names")
    return tuple(tools)


def _read_choice(fields: Fields, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], ToolChoice]:
    """The choice, and the tools that it leaves."""
    value = fields.value("tool_choice")
    if value is None or isinstance(value, str):
        return tools, _read_mode(fields, "tool_choice", tools)
    if not isinstance(value, dict):
        raise fields.error("tool_choice", "must be a string or an object")
    choice = Fields(value, fields.where("tool_choice"))
    choice.require("type")
    if choice.choice("type", ("function", "allowed_tools")) == "function":
        choice.require("function")
        function = choice.object("function")
        assert function is not None
        return tools, ToolChoice("named", _known_name(function, tools))
    choice.require("allowed_tools")
    allowed = choice.object("allowed_tools")
    assert allowed is not None
    return _read_allowed(allowed, tools)


def _read_mode(fields: Fields, member: str, tools: tuple[Tool, ...]) -> ToolChoice:
    mode = fields.choice(member, ("none", "auto", "required"), "auto")
    if mode == "none":
        return ToolChoice("none")
    if mode == "auto":
        return ToolChoice("auto")
    if not tools:
        raise fields.error(member, "asks for a call, but there are no tools")
    return ToolChoice("required")


def _read_allowed(allowed: Fields, tools: tuple[Tool, ...]) -> tuple[tuple[Tool, ...], ToolChoice]:
    names = []
    for entry in allowed.objects("tools", max_items=_MAX_TOOLS):
        function = entry.object("function")
        names.append(_known_name(entry if function is None else function, tools))
    left = tuple(tool for tool in tools if tool.name in names)
    allowed.require("mode")
    if allowed.choice("mode", ("auto", "required")) == "auto":
        return left, ToolChoice("auto")
    if not left:
        raise allowed.error("tools", "must not be empty")
    return left, ToolChoice("required")


def _read_older_choice(fields: Fields, tools: tuple[Tool, ...]) -> ToolChoice:
    value = fields.value("function_call")
    if isinstance(value, dict):
        return ToolChoice("named", _known_name(Fields(value, fields.where("function_call")), tools))
    if fields.choice("function_call", ("none", "auto"), "auto") == "none":
        return ToolChoice("none")
    return ToolChoice("auto")


def _known_name(function: Fields, tools: tuple[Tool, ...]) -> str:
    name = _read_name(function)
    if name not in [tool.name for tool in tools]:
        raise function.error("name", f"is {name!r}, which is not among the tools")
    return name

"""Grammars that force a call: in the model's own syntax, of a tool that exists, with arguments of
the shape that its schema asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from llmrun.chat.grammar_writer import GrammarWriter, literal
from llmrun.chat.string_gbnf import Style, texts_body
from llmrun.chat.tool_formats import HARMONY, ToolFormat, ToolSpec
from llmrun.chat.tool_gbnf import (
    N_COPIES,
    SchemaRules,
    grammar_writer,
    length_range,
    merge,
    text_until,
    write_members,
)
from llmrun.chat.tool_prompt import plain_messages, tool_prompt, with_calls_as_text
from llmrun.chat.tool_schema import properties_of, types_of
from llmrun.engine.grammar import check_grammar
from llmrun.errors import UsageError

__all__ = ["plain_messages", "tool_grammar", "tool_prompt", "with_calls_as_text"]

_UNREADABLE_KEY = re.compile(r"""[<>"\n]""")


def tool_grammar(
    fmt: ToolFormat, tools: Sequence[ToolSpec], *, name: str | None = None, parallel: bool = True
) -> str:
    """GBNF for one call, or with `parallel` one or more, of these tools or of the one `name`.

    It holds from the answer's first character, so the prompt must not end within thinking. Values
    between tags or Gemma's quotes are any text that cannot be taken for the end. Raises UsageError
    when there is no such tool, and where llama.cpp could not follow the grammar.
    """
    chosen = [tool for tool in tools if name is None or tool.name == name]
    if not chosen:
        raise UsageError(f"there is no tool {name}" if name else "there are no tools to call")
    writer = grammar_writer()
    write = _WRITERS[fmt.syntax]
    call = writer.add(" | ".join(writer.add(write(fmt, tool, writer)) for tool in chosen))
    grammar = writer.text(_root(fmt, call, parallel=parallel and not fmt.takes_one))
    check_grammar(grammar, max_copies=N_COPIES)
    return grammar


def _root(fmt: ToolFormat, call: str, *, parallel: bool) -> str:
    is_list = fmt.is_list or fmt.syntax == "pythonic"
    begin, end = literal(fmt.begin), literal(fmt.end)
    between = literal(fmt.between)
    if fmt.wraps_each:
        one = f"{begin} {call} {end}"
        return f"{one} ({between} {one})*" if parallel else one
    calls = f"{call} ({between} {call})*" if parallel else call
    return f'{begin} "[" {calls} "]" {end}' if is_list else f"{begin} {calls} {end}"


def _write_json(fmt: ToolFormat, tool: ToolSpec, writer: GrammarWriter) -> str:
    name = json.dumps(tool.name, ensure_ascii=False)
    start = f'{{"{fmt.name_key}": {name}, "{fmt.arguments_key}": '
    return f'{literal(start)} {_arguments(tool, "json", writer)} "}}"'


def _write_named(fmt: ToolFormat, tool: ToolSpec, writer: GrammarWriter) -> str:
    name_end = f" <|constrain|>json{fmt.name_end}" if fmt is HARMONY else fmt.name_end
    arguments = _arguments(tool, fmt.values, writer)
    return f"{literal(fmt.call_start + tool.name + name_end)} {arguments} {literal(fmt.call_end)}"


def _write_xml(fmt: ToolFormat, tool: ToolSpec, writer: GrammarWriter) -> str:
    schema = tool.parameters
    rules = SchemaRules(writer, "json", schema, is_lenient=True)
    needed = _required(schema)
    members = []
    for key, value in properties_of(schema).items():
        if _UNREADABLE_KEY.search(key):
            continue
        types = types_of(value, schema)
        is_text = "string" in types
        key_end = fmt.key_end
        if fmt.says_type:
            key_end = f'" string="{"true" if is_text else "false"}">'
        start = literal(key + key_end)
        if is_text:
            body = _text_value(value, fmt, writer)
        else:
            body = f"{rules.value(value)} {literal(fmt.argument_end)}"
        members.append((f"{start} {body}", key in needed))
    begin = literal(fmt.argument_start)
    start = literal(fmt.call_start + tool.name + fmt.name_end)
    return f"{start} {write_members(writer, members, begin, literal(fmt.call_end), lead=begin)}"


def _text_value(schema: object, fmt: ToolFormat, writer: GrammarWriter) -> str:
    """A value that stands as it is, and what ends it: one of the strings that the schema lists, or
    any text."""
    listed: object = None
    if isinstance(schema, Mapping):
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(listed, list | tuple) and listed:
        texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in listed]
        return f"{texts_body(writer, texts)} {literal(fmt.argument_end)}"
    times = length_range(schema)
    if times is not None:
        return f"[^{fmt.argument_end.strip()[0]}]{times} {literal(fmt.argument_end)}"
    return text_until(writer, fmt.argument_end)


def _write_pythonic(fmt: ToolFormat, tool: ToolSpec, writer: GrammarWriter) -> str:
    del fmt
    rules = SchemaRules(writer, "json", tool.parameters, is_lenient=True)
    needed = _required(tool.parameters)
    members = [
        (f"{literal(key + '=')} {rules.value(value)}", key in needed)
        for key, value in properties_of(tool.parameters).items()
        if key.isidentifier()
    ]
    inner = write_members(writer, members, literal(", "), '")"')
    return f"{literal(tool.name + '(')} {inner}"


def _arguments(tool: ToolSpec, style: Style, writer: GrammarWriter) -> str:
    """All arguments as one object. A tool of which no parameters are told has none."""
    schema = merge([tool.parameters or {"properties": {}}])
    return SchemaRules(writer, style, schema, is_lenient=True).write_object(schema)


def _required(schema: Mapping[str, object]) -> frozenset[str]:
    required = schema.get("required")
    return frozenset(map(str, required)) if isinstance(required, list | tuple) else frozenset()


_WRITERS: dict[str, Callable[[ToolFormat, ToolSpec, GrammarWriter], str]] = {
    "json": _write_json,
    "named": _write_named,
    "xml": _write_xml,
    "pythonic": _write_pythonic,
}

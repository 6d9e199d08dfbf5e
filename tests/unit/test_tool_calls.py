"""Taking calls out of answers: every family's syntax, every way of cutting the text."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrun.chat.parsing import GEMMA_4 as GEMMA_THINKING
from llmrun.chat.parsing import HARMONY as HARMONY_THINKING
from llmrun.chat.parsing import THINK, ThinkingFormat, make_splitter
from llmrun.chat.tool_calls import (
    CallStart,
    CallText,
    Plain,
    make_tool_splitter,
)
from llmrun.chat.tool_formats import (
    APRIEL,
    COMMAND,
    DEEPSEEK_R1,
    DEEPSEEK_V3_1,
    DEEPSEEK_V3_2,
    DEEPSEEK_V4,
    FALLBACK,
    FORMATS,
    FUNCTIONARY,
    GEMMA_4,
    GLM,
    GRANITE_3,
    HARMONY,
    HERMES,
    LFM2,
    LLAMA_3,
    MINIMAX,
    MISTRAL,
    MISTRAL_LIST,
    NEMOTRON_2,
    QWEN_CODER,
    SEED,
    ToolFormat,
    ToolSpec,
)

TOOLS = [
    ToolSpec(
        "f",
        "",
        {
            "type": "object",
            "properties": {
                "a": {"type": "string"},
                "n": {"type": "integer"},
                "b": {"type": "boolean"},
                "o": {"type": "object"},
                "mixed": {"type": ["string", "integer"]},
                "listed": {"enum": ["1", "2"]},
                "any": {},
            },
        },
    ),
    ToolSpec("g"),
]
Call = tuple[str, str]


def split(
    fmt: ToolFormat | None, chunks: list[str], tools: list[ToolSpec] | None = None
) -> list[str | Call]:
    """Plain texts and calls (name, JSON text) in their order, neighbouring texts joined."""
    splitter = make_tool_splitter(fmt, TOOLS if tools is None else tools)
    events = [event for chunk in chunks for event in splitter.feed(chunk)] + splitter.flush()
    result: list[str | Call] = []
    n_calls = 0
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == n_calls and event.name
            n_calls += 1
            result.append((event.name, ""))
        elif isinstance(event, CallText):
            assert event.text and event.index == n_calls - 1
            name, text = result[-1]
            result[-1] = (name, text + event.text)
        else:
            assert event.text
            if result and isinstance(result[-1], str):
                result[-1] += event.text
            else:
                result.append(event.text)
    return result


def check(fmt: ToolFormat | None, text: str, expected: list[str | Call]) -> None:
    assert split(fmt, [text]) == expected
    assert split(fmt, list(text)) == expected


F1: Call = ("f", '{"a": "v", "n": 3}')
G: Call = ("g", "{}")

WELL_FORMED = [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "v", "n": 3}}\n</tool_call>', [F1]),
    (HERMES, 'Let me see.\n\n<tool_call>\n{"name": "f", "arguments": {"a":"v","n":3}}\n'
     '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
     ["Let me see.", F1, G]),
    (HERMES, '<tool_call>{"arguments":{"a":"v","n":3},"id":"x","name":"f"}</tool_call>', [F1]),
    (HERMES, '<tool_call>{"type":"function","function":{"name":"g","arguments":{}}}</tool_call>',
     [G]),
    (HERMES, '<tool_call>\n[{"name": "g", "arguments": {}}, {"name": "f", "arguments": '
     '{"a": "v", "n": 3}}]\n</tool_call>', [G, F1]),
    (HERMES, '<tool_call>\n```json\n{"name": "g", "arguments": {}}\n```\n</tool_call>', [G]),
    (HERMES, '<tool_call>{"name": "g"}</tool_call>', [G]),
    (HERMES, '<tool_call>{"name": "g", "arguments": null}</tool_call>', [G]),
    (HERMES, r'<tool_call>{"name": "f", "arguments": "{\"a\": \"v\", \"n\": 3}"}</tool_call>',
     [F1]),
    (QWEN_CODER, "<tool_call>\n<function=f>\n<parameter=a>\nv\n</parameter>\n<parameter=n>\n3\n"
     "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n"
     "</tool_call>", [F1, G]),
    # The outer tag is left out, as Qwen3-Coder does.
    (QWEN_CODER, "Now:\n<function=f>\n<parameter=a>\nv\n</parameter>\n<parameter=n>\n3\n"
     "</parameter>\n</function>\n</tool_call>", ["Now:", F1]),
    (QWEN_CODER, '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', [G]),
    (SEED, "<seed:tool_call>\n<function=f>\n<parameter=a>v</parameter>\n<parameter=n>3</parameter>"
     "\n</function>\n</seed:tool_call>", [F1]),
    (GLM, "<tool_call>f<arg_key>a</arg_key><arg_value>v</arg_value><arg_key>n</arg_key>"
     "<arg_value>3</arg_value></tool_call><tool_call>g</tool_call>", [F1, G]),
    (GLM, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>v</arg_value>\n<arg_key>n</arg_key>\n"
     "<arg_value>3</arg_value>\n</tool_call>", [F1]),
    (MINIMAX, '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">v</parameter>\n'
     '<parameter name="n">3</parameter>\n</invoke>\n<invoke name="g">\n</invoke>\n'
     "</minimax:tool_call>", [F1, G]),
    (DEEPSEEK_V3_2, '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter '
     'name="a" string="true">v</｜DSML｜parameter>\n<｜DSML｜parameter name="n" string="false">3'
     "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>", [F1]),
    (DEEPSEEK_V4, '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="x">\n<｜DSML｜parameter name="a" '
     'string="true">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
     [("x", '{"a": "3"}')]),
    (DEEPSEEK_R1, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
     '{"a":"v","n":3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n'
     "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", [F1, G]),
    (DEEPSEEK_V3_1, '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a":"v","n":3}'
     "<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
     "<｜tool▁calls▁end｜>", [F1, G]),
    (MISTRAL, 'Hm.[TOOL_CALLS]f[ARGS]{"a": "v", "n": 3}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}',
     ["Hm.", F1, G]),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": "v", "n": 3}}]', [F1]),
    (MISTRAL_LIST, '[TOOL_CALLS][{"name": "f", "arguments": {"a": "v", "n": 3}, "id": "123456789"}'
     ', {"name": "g", "arguments": {}, "id": "123456780"}]', [F1, G]),
    (GEMMA_4, '<|tool_call>call:f{a:<|"|>v<|"|>,n:3}<tool_call|><|tool_call>call:g{}<tool_call|>',
     [F1, G]),
    (GEMMA_4, 'Hm.\n<|tool_call>call:f{o:{k:[true,None,1.5,<|"|>"}<<|"|>],<|"|>q x<|"|>:{}}}'
     "<tool_call|>", ["Hm.", ("f", '{"o": {"k": [true, null, 1.5, "\\"}<"], "q x": {}}}')]),
    (FUNCTIONARY, '<function=f>{"a": "v", "n": 3}</function><function=g>{}</function>', [F1, G]),
    (LFM2, '<|tool_call_start|>[f(a="v", n=3), g()]<|tool_call_end|>Done.', [F1, G, "Done."]),
    (LFM2, "<|tool_call_start|>[f(a='it's', b=True, o={'k': (1, None), \"j\": false})]"
     "<|tool_call_end|>", [("f", '{"a": "it\'s", "b": true, "o": {"k": [1, null], "j": false}}')]),
    (LFM2, '<|tool_call_start|>[{"name": "g", "arguments": {}}]<|tool_call_end|>', [G]),
    (LLAMA_3, '{"name": "f", "parameters": {"a": "v", "n": 3}}', [F1]),
    (LLAMA_3, '<|python_tag|>{"name": "f", "parameters": {"a": "v", "n": 3}}', [F1]),
    (LLAMA_3, '{"name": "g", "parameters": {}}; {"name": "g", "parameters": {}}', [G, G]),
    (COMMAND, '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": '
     '{"a": "v", "n": 3}}\n]<|END_ACTION|>', [F1]),
    (GRANITE_3, '<|tool_call|>[{"name": "f", "arguments": {"a": "v", "n": 3}}]', [F1]),
    (NEMOTRON_2, '<TOOLCALL>[{"name": "g", "arguments": {}}]</TOOLCALL>', [G]),
    (APRIEL, '<tool_calls>[{"name": "g", "arguments": {}, "id": "0"}]</tool_calls>', [G]),
    (FALLBACK, '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', [G]),
    (FALLBACK, '{"name": "f", "arguments": {"a": "v", "n": 3}}\n', [F1]),
    (FALLBACK, '```json\n[{"name": "g", "arguments": {}}]\n```', [G]),
    (FALLBACK, 'Sure:\n```json\n{"name": "g", "arguments": {}}\n```\nSo.', ["Sure:", G, "\nSo."]),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "text", "expected"), WELL_FORMED)
def test_calls_are_found_whole_and_character_by_character(fmt, text, expected):
    check(fmt, text, expected)


NOT_WELL_FORMED = [
    (None, "<tool_call>all text</tool_call>", ["<tool_call>all text</tool_call>"]),
    (HERMES, "Use <tool_call> tags.", ["Use <tool_call> tags."]),
    (HERMES, "<tool_call>", ["<tool_call>"]),
    (HERMES, "<tool_ca", ["<tool_ca"]),
    (HERMES, '<tool_call>{"name": ', ['<tool_call>{"name": ']),
    (HERMES, '<tool_call>{"name": "f", "argum', ['<tool_call>{"name": "f", "argum']),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
     ['<tool_call>{"name": "f", "arguments": [1]}</tool_call>']),
    (HERMES, '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
     ['<tool_call>{"name": 3, "arguments": {}}</tool_call>']),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>',
     ['<tool_call>{"arguments": {}}</tool_call>']),
    (HERMES, "<tool_call>{}</tool_call> <tool_call>[]</tool_call>",
     ["<tool_call>{}</tool_call> <tool_call>[]</tool_call>"]),
    # A broken call does not hide the next one.
    (HERMES, '<tool_call>{oops</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
     ["<tool_call>{oops</tool_call>", G]),
    # What was begun stays a call, with what came of its arguments.
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "hel', [("f", '{"a": "hel')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"o": {"k": tru', [("f", '{"o": {"k": tru')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {', [("f", "{")]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}}\n</tool_', [G]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}}', [G]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}}{"name"', [G, '{"name"']),
    (HERMES, '<tool_call>{"name": "g", "arguments": {}</tool_call>after', [G, "after"]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"n": 1, oops}}</tool_call>',
     [("f", '{"n": 1'), ", oops}}</tool_call>"]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"n": NaN}}', [("f", '{"n": '), "NaN}}"]),
    # What models get wrong in JSON, where it is plain what they mean.
    (HERMES, '<tool_call>{"name": "f", "arguments": {"b": True, "n": 07,}}</tool_call>',
     [("f", '{"b": true, "n": '), '07,}}</tool_call>']),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "x\n\ty\\d", "b": True, }}</tool_call>',
     [("f", '{"a": "x\\n\\ty\\\\d", "b": true}')]),
    (QWEN_CODER, "<tool_call>\n<function=f>\n<parameter=a>\nhal", [("f", '{"a": "hal')]),
    (QWEN_CODER, "<tool_call>\n<function=f>\n<parameter=a>\nv\n</param", [("f", '{"a": "v')]),
    (QWEN_CODER, "<tool_call>\n<function=f>\n<parameter=n>\n1", [("f", '{"n": 1')]),
    (QWEN_CODER, "<tool_call>\n<function=f>\n<par", [("f", "{")]),
    (QWEN_CODER, "<tool_call>\n<function=f", ["<tool_call>\n<function=f"]),
    (QWEN_CODER, "<function=other>\nx", ["<function=other>\nx"]),
    (QWEN_CODER, "<tool_call>\n<function=g>\nwhat?</function>", [("g", "{}"), "what?</function>"]),
    (QWEN_CODER, "<function=g></tool_call>x", [G, "x"]),
    (GLM, "<tool_call>Hello there</tool_call>", ["<tool_call>Hello there</tool_call>"]),
    (GLM, "<tool_call>f", ["<tool_call>f"]),
    (MISTRAL, "[TOOL_CALLS]f[ARGS]", ["[TOOL_CALLS]f[ARGS]"]),
    (MISTRAL, "[TOOL_CALLS]f[ARGS] no", ["[TOOL_CALLS]f[ARGS] no"]),
    (MISTRAL, 'Say [TOOL_CALLS].', ["Say [TOOL_CALLS]."]),
    (GEMMA_4, '<|tool_call>call:f{a:<|"|>v<|', [("f", '{"a": "v')]),
    (GEMMA_4, "<|tool_call>call:f{a:New York,n:3}<tool_call|>",
     [("f", '{"a": "New York", "n": 3}')]),
    (GEMMA_4, "<|tool_call>f{}<tool_call|>", ["<|tool_call>f{}<tool_call|>"]),
    (LFM2, "<|tool_call_start|>[f(a=x y)]", [("f", '{"a": '), "x y)]"]),
    (LFM2, "<|tool_call_start|>[f('v')]", [("f", "{"), "'v')]"]),
    (LFM2, "<|tool_call_start|>[]<|tool_call_end|>", ["<|tool_call_start|>[]<|tool_call_end|>"]),
    # Without tags only a known tool, and nothing else, is a call.
    (LLAMA_3, '{"name": "Bob", "parameters": {"age": 3}}',
     ['{"name": "Bob", "parameters": {"age": 3}}']),
    (LLAMA_3, '{"name": "g", "parameters": {}} does it.',
     ['{"name": "g", "parameters": {}} does it.']),
    (LLAMA_3, 'It is {"name": "g", "parameters": {}}', ['It is {"name": "g", "parameters": {}}']),
    (LLAMA_3, '{"name": "g", "parameters": {"a": ', ['{"name": "g", "parameters": {"a": ']),
    (LLAMA_3, '{"name": "g"}', ['{"name": "g"}']),
    (FALLBACK, '```json\n{"a": 1}\n```', ['```json\n{"a": 1}\n```']),
    (FALLBACK, '```python\nf()\n```', ["```python\nf()\n```"]),
    (FALLBACK, '[1, 2]', ["[1, 2]"]),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "text", "expected"), NOT_WELL_FORMED)
def test_what_is_no_call_or_half_of_one(fmt, text, expected):
    check(fmt, text, expected)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_an_unknown_tool_is_called_all_the_same_where_tags_tell(fmt):
    if not fmt.is_bare:
        text = render(fmt, [("nobody", {"a": "v"})])
        assert split(fmt, [text]) == [("nobody", '{"a": "v"}')]


@pytest.mark.parametrize(
    ("value", "types", "expected"),
    [
        ("a", "<b> & 'x'\n", "<b> & 'x'\n"),
        ("a", "12", "12"),
        ("n", "12", 12),
        ("n", "twelve", "twelve"),
        ("b", "True", True),
        ("o", '{"k": [1]}', {"k": [1]}),
        ("o", "{'k': None}", {"k": None}),
        ("mixed", "12", 12),
        ("mixed", "1.5x", "1.5x"),
        ("mixed", "true", "true"),
        ("listed", "1", "1"),
        ("any", "3.5", 3.5),
        ("any", "[1, 2", "[1, 2"),
        ("any", '"quoted"', '"quoted"'),
        ("unknown", "null", None),
    ],
)
def test_values_between_tags_have_the_types_of_the_schema(value, types, expected):
    text = f"<tool_call>\n<function=f>\n<parameter={value}>\n{types}\n</parameter>\n</function>"
    ((_, arguments),) = split(QWEN_CODER, [text])
    assert json.loads(arguments) == {value: expected}


def test_an_end_tag_inside_a_value_is_text_unless_another_tag_follows():
    value = "say </parameter> and\n</parameter>\nthen </function>"
    text = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>"
    ((_, arguments),) = split(QWEN_CODER, [text])
    assert json.loads(arguments) == {"a": value}


@pytest.mark.parametrize(
    ("fmt", "pieces"),
    [
        (HERMES, ['<tool_call>{"name": "f", "arguments": {"a": "', "some", " text"]),
        (QWEN_CODER, ["<tool_call>\n<function=f>\n<parameter=a>\n", "some", " text"]),
        (GEMMA_4, ['<|tool_call>call:f{a:<|"|>', "some", " text"]),
        (LFM2, ['<|tool_call_start|>[f(a="', "some", " text"]),
        (MISTRAL, ['[TOOL_CALLS]f[ARGS]{"a": "', "some", " text"]),
    ],
)
def test_arguments_stream(fmt, pieces):
    splitter = make_tool_splitter(fmt, TOOLS)
    first = splitter.feed(pieces[0])
    assert first[0] == CallStart(0, "f")
    assert [splitter.feed(piece) for piece in pieces[1:]] == [
        [CallText(0, "some")],
        [CallText(0, " text")],
    ]


def test_plain_text_streams_and_white_space_waits():
    splitter = make_tool_splitter(HERMES, TOOLS)
    assert splitter.feed("Hello") == [Plain("Hello")]
    assert splitter.feed(" \n") == []
    assert splitter.feed("you <tool") == [Plain(" \nyou")]
    assert splitter.feed(" x") == [Plain(" <tool x")]
    assert splitter.feed("\n") == []
    assert splitter.flush() == [Plain("\n")]


# ---- any arguments


def render(fmt: ToolFormat, calls: list[tuple[str, dict]]) -> str:
    """The calls as this family's own template writes them."""
    return {
        "json": _render_json,
        "named": _render_named,
        "xml": _render_xml,
        "pythonic": _render_pythonic,
    }[fmt.syntax](fmt, calls)


def _render_json(fmt: ToolFormat, calls: list[tuple[str, dict]]) -> str:
    objects = [
        json.dumps({fmt.name_key: name, fmt.arguments_key: arguments}, ensure_ascii=False)
        for name, arguments in calls
    ]
    if fmt.wraps_each or not fmt.is_list:
        return "\n".join(f"{fmt.begin}{each}{fmt.end}" for each in objects)
    return f"{fmt.begin}[{', '.join(objects)}]{fmt.end}"


def _render_named(fmt: ToolFormat, calls: list[tuple[str, dict]]) -> str:
    spell = _gemma if fmt.values == "gemma" else lambda value: json.dumps(value)
    texts = [
        f"{fmt.call_start}{name}{fmt.name_end}{spell(arguments)}{fmt.call_end}"
        for name, arguments in calls
    ]
    return fmt.begin + "".join(texts) + fmt.end


def _gemma(value: object) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_gemma(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_gemma, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _render_xml(fmt: ToolFormat, calls: list[tuple[str, dict]]) -> str:
    text = ""
    for name, arguments in calls:
        body = ""
        for key, value in arguments.items():
            is_text = isinstance(value, str)
            key_end = f'" string="{str(is_text).lower()}">' if fmt.says_type else fmt.key_end
            spelled = value if is_text else json.dumps(value)
            body += f"{fmt.argument_start}{key}{key_end}{spelled}{fmt.argument_end}"
        call = f"{fmt.call_start}{name}{fmt.name_end}{body}{fmt.call_end}"
        text += f"{fmt.begin}{call}{fmt.end}\n" if fmt.wraps_each else call
    return text if fmt.wraps_each else fmt.begin + text + fmt.end


def _render_pythonic(fmt: ToolFormat, calls: list[tuple[str, dict]]) -> str:
    texts = [
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in calls
    ]
    return f"{fmt.begin}[{', '.join(texts)}]{fmt.end}"


NO_WORD = ",:[]{}<>\"\\='`"
WORDS = (
    st.text(
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters=NO_WORD)
        | st.sampled_from(" -_"),
        min_size=1,
        max_size=8,
    )
    .map(str.strip)
    .filter(bool)
)
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\\\"'\n</>|{}"), max_size=12
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    LEAVES | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
IDENTIFIERS = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True)


def _schema_of(value: object) -> dict:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array",
             dict: "object", type(None): "null"}  # fmt: skip
    return {"type": kinds[type(value)]}


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(
    fmt=st.sampled_from(FORMATS),
    calls=st.lists(
        st.tuples(IDENTIFIERS, st.dictionaries(IDENTIFIERS, VALUES, max_size=3)),
        min_size=1,
        max_size=3,
        unique_by=lambda call: call[0],
    ),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_any_arguments_come_back_as_they_were(fmt, calls, cuts):
    calls = calls[:1] if fmt.takes_one else calls
    tools = [
        ToolSpec(name, "", {"properties": {key: _schema_of(v) for key, v in arguments.items()}})
        for name, arguments in calls
    ]
    text = render(fmt, calls)
    found = split(fmt, _cut(text, cuts), tools)
    assert all(not isinstance(each, str) for each in found), (text, found)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def _cut(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


# ---- any text


def _fragments() -> st.SearchStrategy[str]:
    tags = sorted({tag for fmt in FORMATS for tag in (*fmt.tags, fmt.begin, fmt.end) if tag})
    parts = [tag[:i] for tag in tags for i in (1, len(tag) // 2, len(tag) - 1)]
    words = ['{"name": "f", ', '"arguments": ', '"parameters": ', '{"a": "v"}', "{}", "}", "f", "g",
             "f(", ")", "a=", '"', "'", "\\", "\\u12", "[", "]", ",", ":", " ", "\n", "3", "tru",
             "call:f{", "a:", "<function=f>", "<parameter=a>\n", "n\n", "x", "```json\n", "```",
             '<invoke name="f">', "é"]  # fmt: skip
    return st.lists(st.sampled_from([*tags, *parts, *words]), max_size=16).map("".join)


@settings(deadline=None, max_examples=300)
@given(
    fmt=st.sampled_from(FORMATS),
    text=_fragments(),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
def test_any_cutting_gives_the_same_result_and_text_without_calls_is_kept(fmt, text, cuts):
    whole = split(fmt, [text])
    assert split(fmt, _cut(text, cuts)) == whole
    assert split(fmt, list(text)) == whole
    if all(isinstance(each, str) for each in whole):
        assert "".join(map(str, whole)) == text


@settings(deadline=None, max_examples=200)
@given(
    fmt=st.sampled_from([fmt for fmt in FORMATS if not fmt.is_bare]),
    before=_fragments(),
    text=st.text(st.sampled_from("ab <[\n"), min_size=1, max_size=8),
    truncated=st.integers(0, 60),
)
def test_words_around_calls_are_never_lost(fmt, before, text, truncated):
    """`#` is in no call, so each one must come out, in the text or where a call went wrong."""
    call = render(fmt, [("f", {"a": "v"})])
    whole = f"{before}#{text}#{call}#{text}#{call[:truncated]}"
    found = split(fmt, [whole])
    assert sum("".join(each).count("#") for each in found) == whole.count("#"), found


def test_work_grows_with_the_text_and_not_faster():
    def count(fmt: ToolFormat, text: str) -> int:
        n_calls = 0

        def profile(frame: object, event: str, arg: object) -> None:
            nonlocal n_calls
            n_calls += 1

        sys.setprofile(profile)
        try:
            split(fmt, list(text))
        finally:
            sys.setprofile(None)
        return n_calls

    for fmt in FORMATS:
        opener = (fmt.begin or fmt.call_start or "{").strip()
        for unit in ("<", " ", opener, f'{opener}{{"name": "f", ', "\\"):
            for start in ("", render(fmt, [("f", {"a": "v"})])[: len(opener) + 20]):
                small, large = (count(fmt, start + unit * n) for n in (20, 40))
                assert large < 2.5 * small + 500, (fmt.name, unit, start)
    for unit in ("[", '{"a":'):  # beyond the deepest that is read
        start = '[TOOL_CALLS]f[ARGS]{"a":'
        small, large = (count(MISTRAL, start + unit * n) for n in (80, 160))
        assert large < 2.5 * small


def test_what_is_nested_too_deeply_is_no_value():
    for fmt in (HERMES, GEMMA_4, LFM2, MISTRAL, QWEN_CODER):
        deep: object = []
        for _ in range(300):
            deep = [deep]
        found = split(fmt, [render(fmt, [("f", {"o": deep})])])
        assert found[0][0] == "f"


# ---- with thinking in front


def reply(thinking: ThinkingFormat, inside: bool, fmt: ToolFormat, chunks: list[str]) -> tuple:
    splitter = make_splitter(thinking, inside, fmt)
    deltas = [delta for chunk in chunks for delta in splitter.feed(chunk)] + splitter.flush()
    thought = "".join(delta.text for delta in deltas if delta.kind == "thinking")
    return thought, split(fmt, [delta.text for delta in deltas if delta.kind == "answer"])


CALL = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
THINKING = [
    (THINK, True, HERMES, f"I look.\n</think>\n\n{CALL}", "I look.", [G]),
    (THINK, True, HERMES, f"I look.\n{CALL}", "I look.", [G]),
    (THINK, False, HERMES, f"<think>I look. {CALL}\n", "I look.", [G]),
    (THINK, True, HERMES, "With <tool_call> tags.</think>No.", "With <tool_call> tags.", ["No."]),
    (THINK, True, QWEN_CODER, "Hm.\n\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
     "Hm.", [G]),
    (THINK, True, GLM, "Hm.<tool_call>g</tool_call>", "Hm.", [G]),
    (THINK, True, DEEPSEEK_V4, 'Hm.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="g">\n'
     "</｜DSML｜invoke>\n</｜DSML｜tool_calls>", "Hm.", [G]),
    (THINK, True, DEEPSEEK_R1, "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
     "<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>", "Hm.", [G]),
    (GEMMA_THINKING, False, GEMMA_4, "<|channel>thought\nHm.\n<channel|><|tool_call>call:g{}"
     "<tool_call|>", "Hm.", [G]),
    (GEMMA_THINKING, True, GEMMA_4, "Hm.<|tool_call>call:g{}<tool_call|>", "Hm.", [G]),
    (HARMONY_THINKING, False, HARMONY, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
     '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":"v","n":3}',
     "Hm.", [F1]),
    (HARMONY_THINKING, False, HARMONY, " to=functions.g<|channel|>commentary json<|message|>{}",
     "", [G]),
    (HARMONY_THINKING, False, HARMONY, "<|channel|>analysis to=functions.g<|message|>{}", "", [G]),
    (HARMONY_THINKING, False, HARMONY, "<|channel|>commentary<|message|>I look.<|end|><|start|>"
     'assistant<|channel|>commentary to=functions.f<|message|>{"a": "v',
     "", ["I look.", ("f", '{"a": "v')]),
    (HARMONY_THINKING, False, HARMONY, "<|channel|>commentary to=functions.f<|message|>{oops"
     "<|call|><|start|>assistant<|channel|>commentary to=functions.g<|message|>{}",
     "", [("f", "{"), "oops", G]),
    (HARMONY_THINKING, False, HARMONY, "<|channel|>commentary to=python<|message|>print(1)", "",
     ["print(1)"]),
]  # fmt: skip


@pytest.mark.parametrize(("thinking", "inside", "fmt", "text", "thought", "expected"), THINKING)
def test_thinking_ends_where_a_call_begins(thinking, inside, fmt, text, thought, expected):
    assert reply(thinking, inside, fmt, [text]) == (thought, expected)
    assert reply(thinking, inside, fmt, list(text)) == (thought, expected)


def test_without_tools_thinking_goes_on_and_harmony_shows_the_arguments_alone():
    splitter = make_splitter(THINK, True)
    assert [d.kind for d in splitter.feed(f"x {CALL}") + splitter.flush()] == ["thinking"] * 1
    splitter = make_splitter(HARMONY_THINKING)
    text = "<|channel|>commentary to=functions.g<|message|>{}"
    assert [d.text for d in splitter.feed(text) + splitter.flush()] == ["{}"]

"""Grammars that force calls: each of their sentences is a call with arguments that fit."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmrun.chat.messages import Message, ToolCall
from llmrun.chat.parsing import HARMONY as HARMONY_THINKING
from llmrun.chat.parsing import make_splitter
from llmrun.chat.tool_calls import CallStart, CallText, make_tool_splitter
from llmrun.chat.tool_formats import (
    FALLBACK,
    FORMATS,
    GEMMA_4,
    GRANITE_3,
    HARMONY,
    HERMES,
    LFM2,
    MISTRAL,
    QWEN_CODER,
    ToolFormat,
    ToolSpec,
)
from llmrun.chat.tool_gbnf import grammar_writer, text_until
from llmrun.chat.tool_grammar import (
    plain_messages,
    tool_grammar,
    tool_prompt,
    with_calls_as_text,
)
from llmrun.errors import UsageError
from tests.fakes.gbnf import matches, parse, sentence

WEATHER = ToolSpec(
    "get_weather",
    "The weather of a town",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 0},
            "at": {"$ref": "#/$defs/place"},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 2},
        },
        "required": ["city", "days"],
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"lat": {"type": "number"}, "near": {"$ref": "#/$defs/place"}},
                "required": ["lat"],
            }
        },
    },
)
NOTHING = ToolSpec("do_nothing")


def read(fmt: ToolFormat, text: str, tools: list[ToolSpec]) -> list[tuple[str, object]]:
    if fmt is HARMONY:
        thinking = make_splitter(HARMONY_THINKING, tools=fmt)
        text = "".join(delta.text for delta in thinking.feed(text) + thinking.flush())
    splitter = make_tool_splitter(fmt, tools)
    events = splitter.feed(text) + splitter.flush()
    assert all(isinstance(event, CallStart | CallText) for event in events), (text, events)
    names = [event.name for event in events if isinstance(event, CallStart)]
    texts = [""] * len(names)
    for event in events:
        if isinstance(event, CallText):
            texts[event.index] += event.text
    return [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


def fits(value: object, schema: dict, root: dict) -> bool:
    """A JSON schema's verdict, as far as the schemas of these tests go."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(fits(value, each, root) for each in schema["anyOf"])
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    kinds = schema.get("type", [])
    if isinstance(kinds, list):
        return not kinds or any(fits(value, {**schema, "type": kind}, root) for kind in kinds)
    if kinds == "object":
        known = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", [])) <= value.keys()
            and (not known or value.keys() <= known.keys())
            and all(fits(value[key], known.get(key, {}), root) for key in value)
        )
    if kinds == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems", 99)
        return (
            isinstance(value, list)
            and low <= len(value) <= high
            and all(fits(item, schema.get("items", {}), root) for item in value)
        )
    if kinds == "string":
        low, high = schema.get("minLength", 0), schema.get("maxLength", 10**6)
        return isinstance(value, str) and low <= len(value) <= high
    if kinds in ("integer", "number"):
        allowed = int if kinds == "integer" else (int, float)
        is_number = isinstance(value, allowed) and not isinstance(value, bool)
        return is_number and value >= schema.get("minimum", value)
    return value is None if kinds == "null" else isinstance(value, bool)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("seed", range(6))
def test_every_sentence_is_a_call_that_fits(fmt, seed):
    tools = [WEATHER, NOTHING]
    rules = parse(tool_grammar(fmt, tools, parallel=True))
    calls = read(fmt, sentence(rules, seed), tools)
    assert len(calls) == 1 or (calls and not fmt.takes_one)
    for name, arguments in calls:
        if name == "do_nothing":
            assert arguments == {}
        else:
            assert fits(arguments, WEATHER.parameters, WEATHER.parameters), arguments


NAMES = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
LEAVES = st.one_of(
    st.sampled_from(
        [
            {"type": "string"},
            {"type": "string", "minLength": 1, "maxLength": 4},
            {"type": "integer"},
            {"type": "number", "minimum": 0},
            {"type": "boolean"},
            {"type": "null"},
            {"type": ["integer", "null"]},
            {"type": ["string", "null"]},
            {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            {"enum": ['a "quoted"', "b\\c", "é"]},
            {"enum": [1, None, True]},
            {"type": "object"},
            {"$ref": "#/$defs/tree"},
            {"description": "anything at all"},
        ]
    )
)


def _objects(values: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    return st.dictionaries(NAMES, values, max_size=4).flatmap(
        lambda properties: st.builds(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": [key for key, is_needed in zip(properties, required, strict=False)
                             if is_needed],
            },
            st.lists(st.booleans(), min_size=4, max_size=4),
        )
    )  # fmt: skip


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(
            lambda items, low, more: {
                "type": "array", "items": items, "minItems": low, "maxItems": low + more,
            },
            inner, st.integers(0, 2), st.integers(0, 2),
        ),
    ),
    max_leaves=5,
)  # fmt: skip
TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "left": {"$ref": "#/$defs/tree"}},
}


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    fmt=st.sampled_from(FORMATS),
    parameters=st.lists(_objects(SCHEMAS), min_size=1, max_size=2),
    parallel=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_schemas_give_calls_that_fit(fmt, parameters, parallel, seed):
    tools = [
        ToolSpec(f"tool_{i}", "", {**schema, "$defs": {"tree": TREE}})
        for i, schema in enumerate(parameters)
    ]
    rules = parse(tool_grammar(fmt, tools, parallel=parallel))
    text = sentence(rules, seed)
    calls = read(fmt, text, tools)
    assert len(calls) == 1 or (calls and parallel and not fmt.takes_one)
    for name, arguments in calls:
        schema = tools[int(name[-1])].parameters
        assert isinstance(arguments, dict), text
        if fmt.syntax in ("xml", "pythonic"):
            assert arguments.keys() <= schema["properties"].keys()
        assert _fits_all(arguments, schema, is_raw=fmt.syntax == "xml"), (text, arguments)


def _fits_all(arguments: dict, schema: dict, *, is_raw: bool) -> bool:
    if not is_raw:
        return fits(arguments, schema, schema) or not schema["properties"]
    # Between tags, what says nothing of its type is whatever its text looks like.
    return set(schema["required"]) <= arguments.keys() and all(
        fits(value, schema["properties"][key], schema) for key, value in arguments.items()
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_one_tool_can_be_named_and_several_calls_forbidden(fmt):
    tools = [WEATHER, NOTHING]
    rules = parse(tool_grammar(fmt, tools, name="do_nothing", parallel=False))
    for seed in range(4):
        assert read(fmt, sentence(rules, seed), tools) == [("do_nothing", {})]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_several_calls_are_allowed_where_the_family_makes_them(fmt):
    rules = parse(tool_grammar(fmt, [NOTHING], parallel=True))
    counts = {len(read(fmt, sentence(rules, seed), [NOTHING])) for seed in range(20)}
    assert counts == {1} if fmt.takes_one else counts == {1, 2, 3}


def test_a_tool_that_is_not_there_cannot_be_forced():
    with pytest.raises(UsageError, match="no tool other"):
        tool_grammar(HERMES, [WEATHER], name="other")
    with pytest.raises(UsageError, match="no tools"):
        tool_grammar(HERMES, [])


def test_names_and_values_with_signs_of_the_grammar_stay_text():
    odd = {'a"b': {"enum": ['" | [a-z] "', "x\ny", "\\"]}, "c\\d ]": {"const": "root ::= x"}}
    tool = ToolSpec("t", "", {"type": "object", "properties": odd, "required": list(odd)})
    rules = parse(tool_grammar(HERMES, [tool], parallel=False))
    for seed in range(6):
        ((_, arguments),) = read(HERMES, sentence(rules, seed), [tool])
        assert arguments["c\\d ]"] == "root ::= x"
        assert arguments['a"b'] in odd['a"b']["enum"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": True, "b": None, "c": {"type": "unheard of"}}},
        {"properties": {"a": {"$ref": "#/$defs/none"}, "b": {"$ref": "elsewhere"}}},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}},
         "properties": {"a": {"$ref": "#/$defs/x"}}},
        {"properties": {"a": {"allOf": [{"$ref": "#"}, {"required": ["a"]}]}}},
        {"properties": {"a": {"type": "string", "pattern": "(((", "maxLength": 10**9}}},
        {"properties": {"a": {"enum": []}, "b": {"anyOf": []}, "c": {"type": []}}},
        {"properties": 3, "required": "a"},
        {"properties": {"a": {"minItems": -1, "type": "array", "maxItems": 0}}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("fmt", [HERMES, QWEN_CODER, GEMMA_4, LFM2], ids=lambda fmt: fmt.name)
def test_schemas_that_make_no_sense_allow_anything_or_nothing(fmt, parameters):
    tool = ToolSpec("t", "", parameters)
    rules = parse(tool_grammar(fmt, [tool], parallel=False))
    if "allOf" not in str(parameters):  # an object that must hold itself has no end
        assert read(fmt, sentence(rules, 1, max_depth=10), [tool])[0][0] == "t"


def test_deep_schemas_are_cut_off():
    schema: dict[str, object] = {"type": "string"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    assert parse(tool_grammar(HERMES, [ToolSpec("t", "", schema)]))


def test_schemas_that_use_themselves_often_are_written_once():
    """Each of these doubles with every level when it is written out."""
    twice = {"properties": {key: {"allOf": [{"$ref": "#"}, {}]} for key in "ab"}}
    optional = {"properties": {k: {"anyOf": [{"$ref": "#"}, {"type": "null"}]} for k in "abc"}}
    nested: dict[str, object] = {"type": "string"}
    for _ in range(30):
        nested = {"type": "object", "properties": {"p": nested}, "anyOf": [{}, {"required": []}]}
    circle = {"anyOf": [{"$ref": "#/$defs/c"}] * 9}
    circles = {"properties": {"a": {"$ref": "#/$defs/c"}}, "$defs": {"c": circle}}
    for schema in (twice, optional, nested, circles):
        for fmt in (HERMES, GEMMA_4, QWEN_CODER, LFM2):
            assert len(tool_grammar(fmt, [ToolSpec("t", "", schema)])) < 20_000


def test_patterns_and_formats_of_strings_are_kept():
    properties = {
        "code": {"type": "string", "pattern": "^[A-C]{2}-x$"},
        "day": {"type": "string", "format": "date"},
    }
    tool = ToolSpec("t", "", {"properties": properties, "required": ["code", "day"]})
    rules = parse(tool_grammar(MISTRAL, [tool], parallel=False))
    ((_, arguments),) = read(MISTRAL, sentence(rules, 3), [tool])
    assert arguments["code"][:1] in "ABC" and arguments["code"][2:] == "-x"
    assert [len(part) for part in arguments["day"].split("-")] == [4, 2, 2]


@settings(deadline=None)
@given(
    text=st.text(st.sampled_from("ab<\n")),
    stop=st.sampled_from(["ab", "aab", "<a<b", "aa"]),
    before=st.sampled_from(["", "\n"]),
    behind=st.sampled_from(["", "\n"]),
)
@example("aab", "ab", "", "")
@example("a", "aa", "", "")
def test_text_ends_at_the_first_end(text, stop, before, behind):
    writer = grammar_writer()
    end = before + stop + behind
    rules = parse(writer.text(text_until(writer, end)))
    whole = text + end
    assert matches(rules, whole) == (whole.index(stop) == len(text + before))
    assert not matches(rules, text) or (text.endswith(end) and text.count(stop) == 1)


def test_the_prompt_shows_the_tools_and_a_form_that_is_read():
    prompt = tool_prompt([WEATHER, NOTHING])
    lines = prompt.splitlines()
    shown = [json.loads(line) for line in lines if line.startswith('{"name": ') and "desc" in line]
    assert [tool["name"] for tool in shown] == ["get_weather", "do_nothing"]
    assert shown[0]["parameters"] == WEATHER.parameters
    form = prompt[prompt.index("<tool_call>") :]
    assert read(FALLBACK, form[: form.index("</tool_call>") + 12], [])[0][0] == "FUNCTION"
    assert "Call the function do_nothing now." in tool_prompt([NOTHING], name="do_nothing")
    assert "no more than one" in tool_prompt([NOTHING], parallel=False)


def test_calls_and_results_become_text_that_any_template_takes():
    messages = [
        Message("user", "Weather?"),
        Message("assistant", "Let me look.", tool_calls=(ToolCall("f", {"a": "é"}, "1"),)),
        Message("tool", "sunny", tool_call_id="1", tool_name="f"),
        Message("tool", "warm"),
        Message("user", "And?"),
    ]
    plain = plain_messages(messages)
    assert [message.role for message in plain] == ["user", "assistant", "user"]
    assert not plain[1].tool_calls and plain[1].content.startswith("Let me look.\n<tool_call>\n")
    assert plain[2].content == (
        "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm\n</tool_response>\nAnd?"
    )
    call = plain[1].content.removeprefix("Let me look.\n")
    assert read(FALLBACK, call, []) == [("f", {"a": "é"})]


@pytest.mark.parametrize("fmt", [LFM2, GRANITE_3, HERMES, FALLBACK], ids=lambda fmt: fmt.name)
def test_past_calls_are_written_as_the_model_writes_them(fmt):
    calls = [("f", {"a": 'it\'s \n "é"', "b": [True, None, 1.5]}), ("g", {})]
    message = Message("assistant", "", tool_calls=tuple(ToolCall(*call) for call in calls))
    other = Message("user", "Hi")
    written, same = with_calls_as_text([message, other], fmt)
    assert same is other and not written.tool_calls
    assert written.content.startswith(fmt.begin)
    assert read(fmt, written.content, []) == calls


def test_past_calls_of_other_syntaxes_come_as_json():
    message = Message("assistant", "Hm.", tool_calls=(ToolCall("f", {}),))
    (written,) = with_calls_as_text([message], GEMMA_4)
    assert written.content == 'Hm.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'

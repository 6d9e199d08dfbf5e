"""The OpenAI dialect's chat format: what is read, what is refused, and the shapes that its own
client reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llmrun.chat.messages import ToolCall
from llmrun.engine.types import TokenLogprob, Usage
from llmrun.server.types import (
    STATUS,
    AnswerContext,
    ApiError,
    CallArguments,
    CallStarted,
    ChatRequest,
    Finished,
    ModelCard,
    Reply,
    ReplyEvent,
    Started,
    TextPart,
    ThinkingPart,
)
from llmrun.server.wire_json import to_json
from llmrun.server.wire_openai import (
    SCHEMA_CHAT,
    ChatEncoder,
    encode_chat,
    encode_error,
    encode_model,
    encode_models,
    encode_usage,
    parse_chat,
)
from llmrun.server.wire_openai_parts import encode_timings

# A busy machine is no fault of the code.
BUSY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CONTEXT = AnswerContext("x7", 1_700_000_000.9, "tiny")
USER = {"role": "user", "content": "Hi"}
USAGE = Usage(n_prompt=10, n_completion=4, n_cached=6)
DONE = Finished("stop", USAGE, prompt_s=0.5, decode_s=0.25)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time."}}


def body(**members: Any) -> dict[str, Any]:
    return {"messages": [USER], **members}


def parse(**members: Any) -> ChatRequest:
    return parse_chat(body(**members))


def refusal(value: object) -> ApiError:
    with pytest.raises(ApiError) as found:
        parse_chat(value)
    assert found.value.kind == "invalid_request"
    return found.value


# ---- messages


def test_string_and_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_chat({"messages": [{"role": "system", "content": parts}, USER]})
    assert [(m.role, m.content) for m in request.messages] == [("system", "a\nb"), ("user", "Hi")]


def test_refusals_are_text() -> None:
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    member = {"role": "assistant", "content": None, "refusal": "No."}
    request = parse_chat({"messages": [part, member, USER]})
    assert [m.content for m in request.messages] == ["No.", "No.", "Hi"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", "input_image"])
def test_media_are_refused_by_name(kind: str) -> None:
    content = [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "data:,"}}]
    error = refusal({"messages": [USER, {"role": "user", "content": content}]})
    assert error.param == "messages[1].content[1].type"
    assert "text only" in error.message


def test_a_past_call_and_its_result() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a":1}'}}
    request = parse_chat(
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [call],
                    "reasoning_content": "Hm",
                },
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            ]
        }
    )
    _, assistant, tool = request.messages
    assert assistant.tool_calls == (ToolCall("weather", {"a": 1}, "c1"),)
    assert (assistant.content, assistant.thinking) == ("", "Hm")
    assert (tool.role, tool.tool_name, tool.tool_call_id) == ("tool", "weather", "c1")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ('{"a": [1, 2]}', {"a": [1, 2]}),
        ('{"a": 1', {"raw": '{"a": 1'}),
        ("[1]", {"raw": [1]}),
        ("NaN", {"raw": "NaN"}),
        ("[" * 100, {"raw": "[" * 100}),
        ('{"a": "\ud800"}', {"a": "?"}),
    ],
)
def test_arguments_become_an_object_and_lose_nothing(arguments: object, expected: object) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    request = parse_chat({"messages": [{"role": "assistant", "tool_calls": [call]}, USER]})
    assert request.messages[0].tool_calls[0].arguments == expected


def test_results_without_an_id_follow_the_order_of_the_calls() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    results = [{"role": "tool", "content": text} for text in ("1", "2", "3")]
    request = parse_chat({"messages": [{"role": "assistant", "tool_calls": calls}, *results]})
    assert [m.tool_name for m in request.messages[1:]] == ["f", "g", None]


def test_results_with_and_without_an_id() -> None:
    calls = [{"id": n, "function": {"name": n, "arguments": "{}"}} for n in ("f", "g")]
    results = [
        {"role": "tool", "content": "1", "tool_call_id": "f"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3", "tool_call_id": "gone", "name": "h"},
    ]
    request = parse_chat({"messages": [{"role": "assistant", "tool_calls": calls}, *results]})
    assert [m.tool_name for m in request.messages[1:]] == ["f", "g", "h"]


def test_the_older_call_and_result() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": "1"}
    request = parse_chat({"messages": [call, result]})
    assert request.messages[0].tool_calls == (ToolCall("f", {}, None),)
    assert (request.messages[1].role, request.messages[1].tool_name) == ("tool", "f")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "model", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}],
            "messages[0].tool_calls[0].function.name",
        ),
        ([{"role": "tool", "content": "x", "tool_call_id": 7}], "messages[0].tool_call_id"),
    ],
)
def test_bad_messages_name_the_field(messages: object, param: str) -> None:
    assert refusal({"messages": messages}).param == param


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"continue_final_message": False}, False),
        ({"add_generation_prompt": True}, False),
    ],
)
def test_a_last_message_of_the_assistant_is_gone_on_with(
    members: dict[str, object], expected: bool
) -> None:
    messages = [USER, {"role": "assistant", "content": "The answer"}]
    assert parse_chat({"messages": messages, **members}).continues is expected


def test_what_cannot_be_gone_on_with() -> None:
    assert not parse().continues
    assert refusal(body(continue_final_message=True)).param == "continue_final_message"
    call = {"function": {"name": "f", "arguments": "{}"}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    assert not parse_chat({"messages": messages}).continues
    assert refusal({"messages": messages, "continue_final_message": True})


# ---- what is asked of the generation


def test_all_of_the_sampling() -> None:
    wishes = parse(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        typical_p=0.8,
        repeat_penalty=1.1,
        repeat_last_n=32,
        frequency_penalty=-2,
        presence_penalty=2,
        seed=7,
        logit_bias={"5": 1.5, "6": -100, "7": None},
    ).generation.sampling
    assert (wishes.temperature, wishes.top_p, wishes.top_k, wishes.min_p) == (0.5, 0.9, 0, 0.1)
    assert (wishes.typical_p, wishes.repeat_penalty, wishes.repeat_last_n) == (0.8, 1.1, 32)
    assert (wishes.frequency_penalty, wishes.presence_penalty, wishes.seed) == (-2, 2, 7)
    assert wishes.logit_bias == ((5, 1.5), (6, float("-inf")))
    assert parse(repetition_penalty=1.2).generation.sampling.repeat_penalty == 1.2
    assert parse(seed=-1).generation.sampling.seed is None
    assert parse().generation.sampling.temperature is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 5.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("temperature", "1"),
        ("top_p", 1.01),
        ("top_k", 1 << 40),
        ("min_p", -1),
        ("repeat_penalty", 0),
        ("repetition_penalty", 11),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("seed", 1.5),
        ("seed", 1 << 70),
        ("n", 0),
        ("n", 17),
        ("max_tokens", -2),
        ("max_completion_tokens", 1 << 40),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", 3),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("top_logprobs", 2),
        ("stream", "yes"),
        ("stream_options", []),
        ("model", 3),
        ("tools", {}),
        ("keep_alive", "soon"),
        ("keep_alive", "99999999h"),
        ("keep_alive", float("inf")),
        ("reasoning_effort", "very"),
        ("response_format", "json"),
        ("json_schema", []),
        ("grammar", 5),
        ("logit_bias", []),
    ],
)
def test_bad_values_name_the_field(name: str, value: object) -> None:
    error = refusal(body(**{name: value}))
    assert error.param is not None and error.param.startswith(name)
    assert error.param in error.message


@pytest.mark.parametrize("bias", [{"x": 1}, {"-1": 1}, {"3000000000": 1}, {"1": 101}, {"1": "a"}])
def test_bad_biases(bias: object) -> None:
    assert (refusal(body(logit_bias=bias)).param or "").startswith("logit_bias")


def test_too_many_biases() -> None:
    assert refusal(body(logit_bias={str(i): 1 for i in range(4097)})).param == "logit_bias"


def test_unknown_members_and_nulls_are_passed_over() -> None:
    assert parse(user="me", metadata={"a": 1}, temperature=None, tools=None, foo=[{}]) == parse()


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 9}, 9),
        ({"max_tokens": -1}, None),
        ({"n_predict": 3}, 3),
        ({"max_tokens": 0}, 0),
    ],
)
def test_the_longest_answer(members: dict[str, object], expected: int | None) -> None:
    assert parse(**members).generation.max_tokens == expected


def test_logprobs() -> None:
    assert parse().generation.n_logprobs is None
    assert parse(logprobs=True).generation.n_logprobs == 0
    assert parse(logprobs=True, top_logprobs=20).generation.n_logprobs == 20
    assert parse(logprobs=False, top_logprobs=0).generation.n_logprobs is None


def test_stop_and_stream() -> None:
    assert parse(stop="a").generation.stop == ("a",)
    assert parse(stop=["a", "b"]).generation.stop == ("a", "b")
    options = {"include_usage": True}
    assert parse(stream=True, stream_options=options).generation.include_usage
    assert not parse(stream_options=options).generation.include_usage


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (300, 300),
        (0, 0),
        (-1, -1),
        ("300", 300),
        ("-1", -1),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("-5m", -300),
        ("250ms", 0.25),
    ],
)
def test_keep_alive(value: object, expected: float) -> None:
    assert parse(keep_alive=value).generation.keep_alive_s == pytest.approx(expected)


def test_the_form_of_the_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert json.loads(parse(response_format=wanted).generation.json_schema or "") == schema
    assert json.loads(parse(json_schema=schema).generation.json_schema or "") == schema
    older = {"type": "json_object", "schema": schema}
    assert json.loads(parse(response_format=older).generation.json_schema or "") == schema
    any_object = parse(response_format={"type": "json_object"}).generation.json_schema
    assert json.loads(any_object or "") == {"type": "object"}
    assert parse(response_format={"type": "text"}).generation.json_schema is None
    assert parse(grammar="root ::= [a]").generation.grammar == "root ::= [a]"
    assert parse(grammar="").generation.grammar is None


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "grammar": "root ::= [a]"}, "grammar"),
        ({"json_schema": {}, "grammar": "root ::= [a]"}, "grammar"),
        ({"json_schema": {"const": "x" * 300_000}}, "json_schema"),
    ],
)
def test_bad_forms_of_the_answer(members: dict[str, object], param: str) -> None:
    assert refusal(body(**members)).param == param


@pytest.mark.parametrize(
    ("members", "effort", "think"),
    [
        ({}, None, None),
        ({"reasoning_effort": "none"}, None, False),
        ({"reasoning_effort": "minimal"}, "low", None),
        ({"reasoning_effort": "high"}, "high", True),
        ({"reasoning_effort": "xhigh"}, "high", True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None, False),
        (
            {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
            None,
            True,
        ),
    ],
)
def test_thinking(members: dict[str, object], effort: str | None, think: bool | None) -> None:
    request = parse(**members)
    assert (request.reasoning_effort, request.think) == (effort, think)
    assert request.template_args == {}


def test_further_variables_of_the_template() -> None:
    given_args = {"enable_thinking": True, "documents": [1], "x": "y"}
    assert parse(chat_template_kwargs=given_args).template_args == {"documents": [1], "x": "y"}
    for bad in ({"enable_thinking": "no"}, {str(i): i for i in range(65)}, []):
        error = refusal(body(chat_template_kwargs=bad))
        assert (error.param or "").startswith("chat_template_kwargs")


# ---- tools


def test_tools() -> None:
    request = parse(tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    assert [tool.name for tool in request.tools] == ["weather", "clock"]
    assert request.tools[0].parameters == {"type": "object"}
    assert request.tools[1].description == "The time."
    assert (request.tool_choice.mode, request.parallel_tool_calls) == ("auto", False)


@pytest.mark.parametrize(
    ("choice", "mode", "name", "names"),
    [
        ("none", "none", None, ["weather", "clock"]),
        ("auto", "auto", None, ["weather", "clock"]),
        ("required", "required", None, ["weather", "clock"]),
        (
            {"type": "function", "function": {"name": "clock"}},
            "named",
            "clock",
            ["weather", "clock"],
        ),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "clock"}}],
                },
            },
            "required",
            None,
            ["clock"],
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            "auto",
            None,
            [],
        ),
    ],
)
def test_the_choice_of_tools(choice: object, mode: str, name: str | None, names: list[str]) -> None:
    request = parse(tools=[WEATHER, CLOCK], tool_choice=choice)
    assert (request.tool_choice.mode, request.tool_choice.name) == (mode, name)
    assert [tool.name for tool in request.tools] == names


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": 'a"b'}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "a\n"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": 3}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "clock"}},
            },
            "tool_choice.function.name",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": []},
                },
            },
            "tool_choice.allowed_tools.tools",
        ),
        ({"tools": [WEATHER], "functions": [{"name": "f"}]}, "functions"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
        ({"tools": [WEATHER] * 513}, "tools"),
    ],
)
def test_bad_tools_name_the_field(members: dict[str, object], param: str) -> None:
    assert refusal(body(**members)).param == param


def test_the_older_form_of_tools() -> None:
    request = parse(functions=[{"name": "f"}], function_call={"name": "f"})
    assert [tool.name for tool in request.tools] == ["f"]
    assert (request.tool_choice.mode, request.tool_choice.name) == ("named", "f")
    assert request.legacy_functions and not request.parallel_tool_calls
    assert parse(functions=[{"name": "f"}], function_call="none").tool_choice.mode == "none"
    assert not parse(tools=[WEATHER]).legacy_functions


# ---- any JSON at all

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)
    | st.sampled_from(
        ["user", "assistant", "tool", "text", "function", "auto", "none", "required", "json_object"]
    )
)
KNOWN = [
    *("role", "content", "type", "text", "name", "function", "functions", "arguments"),
    *("tool_calls", "id", "tool_call_id", "schema", "allowed_tools", "mode", "tools"),
    *("json_schema", "include_usage", "enable_thinking", "refusal", "parameters", "strict"),
]
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "function"])},
        optional={
            "content": st.text(max_size=5) | JSON,
            "tool_calls": st.lists(JSON, max_size=2),
            "function_call": JSON,
            "tool_call_id": st.text(max_size=3) | JSON,
            "name": JSON,
            "reasoning_content": JSON,
        },
    ),
    max_size=3,
)
NEAR_MISSES = st.fixed_dictionaries(
    {"messages": MESSAGES | JSON},
    optional={
        name: JSON
        for name in [*SCHEMA_CHAT["properties"], "functions", "function_call"]  # type: ignore[misc]
        if name != "messages"
    },
)


def may_only_refuse(value: object) -> None:
    try:
        request = parse_chat(value)
    except ApiError as error:
        assert error.kind == "invalid_request" and error.message
        json.loads(to_json(encode_error(error).body))
    else:
        assert isinstance(request, ChatRequest) and request.messages


@settings(BUSY)
@given(JSON)
def test_any_json_is_a_request_or_refused(value: object) -> None:
    may_only_refuse(value)


@settings(BUSY, max_examples=200)
@given(NEAR_MISSES)
def test_nearly_right_json_is_a_request_or_refused(value: object) -> None:
    may_only_refuse(value)


@settings(BUSY)
@given(st.sampled_from(sorted(SCHEMA_CHAT["properties"])), JSON)  # type: ignore[call-overload]
def test_one_odd_member_is_a_request_or_refused(name: str, value: object) -> None:
    may_only_refuse({"messages": [USER], name: value})


# ---- whole answers


def complete(*replies: Reply, **members: Any) -> ChatCompletion:
    answer = encode_chat(CONTEXT, parse(n=len(replies), **members), replies)
    return ChatCompletion.model_validate_json(to_json(answer), strict=True)


def test_a_whole_answer() -> None:
    answer = complete(Reply(DONE, "Hello", thinking="Hm"))
    assert (answer.id, answer.object, answer.created) == (
        "chatcmpl-x7",
        "chat.completion",
        1_700_000_000,
    )
    assert answer.model == "tiny" and (answer.system_fingerprint or "").startswith("llmrun-")
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello", "stop")
    assert choice.message.model_extra == {"reasoning_content": "Hm"}
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 4)
    assert answer.usage.total_tokens == 14
    assert answer.usage.prompt_tokens_details.cached_tokens == 6
    assert answer.usage.completion_tokens_details is None


def test_calls() -> None:
    calls = (ToolCall("f", {"a": 1}, "call_1"), ToolCall("g", {}, None))
    finish = Finished("tool_calls", USAGE)
    message = complete(Reply(finish, calls=calls, arguments_texts=('{"a": 1}', ""))).choices[0]
    assert message.finish_reason == "tool_calls" and message.message.content is None
    found = [tool.to_dict() for tool in message.message.tool_calls or []]
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert found[0] == {"id": "call_1", "type": "function", "function": function}
    assert found[1]["id"] and found[1]["function"] == {"name": "g", "arguments": ""}


def test_calls_in_the_older_form() -> None:
    reply = Reply(Finished("tool_calls", USAGE), calls=(ToolCall("f", {"a": 1}),))
    choice = complete(reply, functions=[{"name": "f"}]).choices[0]
    assert choice.finish_reason == "function_call" and choice.message.tool_calls is None
    assert choice.message.function_call is not None
    assert json.loads(choice.message.function_call.arguments) == {"a": 1}


def test_a_reply_that_was_cut_off_is_not_whole() -> None:
    assert complete(Reply(Finished("cancelled", USAGE))).choices[0].finish_reason == "length"


def test_logprobs_of_tokens() -> None:
    found = TokenLogprob(5, b"\xe2\x80", float("-inf"), ((7, "é".encode(), -0.5), (8, b"x", 1e-9)))
    choice = complete(Reply(DONE, "x", logprobs=(found,)), logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    token = choice.logprobs.content[0]
    assert (token.token, token.bytes, token.logprob) == ("\\xe2\\x80", [0xE2, 0x80], -9999.0)
    assert [(top.token, top.logprob) for top in token.top_logprobs] == [("é", -0.5), ("x", 0.0)]
    assert complete(Reply(DONE, "x", logprobs=(found,))).choices[0].logprobs is None


def test_a_shared_prompt_counts_once() -> None:
    finishes = [Finished("stop", Usage(10, 4, cached)) for cached in (10, 3, 5, 5)]
    usage = encode_usage(finishes, 2)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (20, 16)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 8}


def test_thinking_tokens_where_they_are_known() -> None:
    usage = encode_usage([Finished("stop", USAGE, n_thinking=3)])
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}


def test_timings() -> None:
    timings = encode_timings(
        [Finished("stop", Usage(10, 4, 6, n_drafted=3, n_accepted=2), prompt_s=0.5, decode_s=0.25)]
    )
    assert timings == {
        "cache_n": 6,
        "prompt_n": 4,
        "prompt_ms": 500.0,
        "prompt_per_token_ms": 125.0,
        "prompt_per_second": 8.0,
        "predicted_n": 4,
        "predicted_ms": 250.0,
        "predicted_per_token_ms": 62.5,
        "predicted_per_second": 16.0,
        "draft_n": 3,
        "draft_n_accepted": 2,
    }
    assert encode_timings([Finished("stop", Usage(0, 0, 0))])["predicted_per_second"] == 0.0


# ---- streams


def chunks_of(data: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream, each checked to be one; without `[DONE]` and comments."""
    found = []
    for entry in data.decode().split("\n\n"):
        if entry.startswith("data: {"):
            text = entry.removeprefix("data: ")
            ChatCompletionChunk.model_validate_json(text, strict=True)
            found.append(json.loads(text))
        else:
            assert entry in ("", "data: [DONE]", ": keep-alive")
    return found


def stream(request: ChatRequest, events: list[tuple[int, ReplyEvent]]) -> bytes:
    encoder = ChatEncoder(CONTEXT, request)
    return b"".join([encoder.feed(i, event) for i, event in events]) + encoder.finish()


def one(*events: ReplyEvent) -> list[tuple[int, ReplyEvent]]:
    return [(0, event) for event in (Started(10), *events, DONE)]


def test_the_chunks_of_a_stream() -> None:
    data = stream(parse(stream=True), one(TextPart("Hel"), TextPart("lo")))
    chunks = chunks_of(data)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, "stop"]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-x7"}
    assert not any("usage" in chunk for chunk in chunks)
    assert [("timings" in chunk) for chunk in chunks] == [False, False, False, True]
    assert data.endswith(b"data: [DONE]\n\n")


def test_usage_comes_in_a_chunk_of_its_own() -> None:
    request = parse(stream=True, stream_options={"include_usage": True})
    *before, last = chunks_of(stream(request, one(TextPart("Hi"))))
    assert all(chunk["usage"] is None for chunk in before)
    assert not any("timings" in chunk for chunk in before)
    assert last["choices"] == [] and last["timings"]["cache_n"] == 6
    assert last["usage"]["total_tokens"] == 14


def test_a_beginning_says_nothing_yet() -> None:
    encoder = ChatEncoder(CONTEXT, parse(stream=True))
    assert encoder.feed(0, Started(3)) == b""
    assert encoder.feed(0, TextPart("")).count(b"data:") == 1
    assert encoder.feed(0, TextPart("")) == b""
    assert encoder.keep_alive() == b": keep-alive\n\n"


def test_a_stream_that_fails_does_not_look_whole() -> None:
    encoder = ChatEncoder(CONTEXT, parse(stream=True))
    encoder.feed(0, TextPart("Hi"))
    data = encoder.fail(ApiError("internal", "broke")) + encoder.finish()
    assert b"[DONE]" not in data
    assert json.loads(data.removeprefix(b"data: "))["error"]["message"] == "broke"


def test_deltas_of_calls() -> None:
    events = one(
        CallStarted(0, "call_1", "f"), CallArguments(0, '{"a":'), CallArguments(0, '"é\n"}')
    )
    deltas = [c["choices"][0]["delta"] for c in chunks_of(stream(parse(stream=True), events))]
    function = {"name": "f", "arguments": ""}
    assert deltas == [
        {"role": "assistant", "content": None},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"é\n"}'}}]},
        {},
    ]


def test_deltas_of_calls_in_the_older_form() -> None:
    request = parse(stream=True, functions=[{"name": "f"}])
    finish = Finished("tool_calls", USAGE)
    events: list[ReplyEvent] = [CallStarted(0, "c", "f"), CallArguments(0, "{}"), finish]
    events[2:2] = [CallStarted(1, "d", "g"), CallArguments(1, "{}")]
    choices = [c["choices"][0] for c in chunks_of(stream(request, [(0, e) for e in events]))]
    assert [choice["delta"] for choice in choices[1:]] == [
        {"function_call": {"name": "f", "arguments": ""}},
        {"function_call": {"arguments": "{}"}},
        {},
    ]
    assert choices[-1]["finish_reason"] == "function_call"


def test_timings_come_with_the_last_of_several_replies() -> None:
    request = parse(stream=True, n=2)
    events: list[tuple[int, ReplyEvent]] = [(1, TextPart("b")), (0, TextPart("a"))]
    chunks = chunks_of(stream(request, [*events, (1, DONE), (0, DONE)]))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [1, 1, 0, 0, 1, 0]
    assert ["timings" in chunk for chunk in chunks] == [False] * 5 + [True]
    assert chunks[-1]["timings"]["predicted_n"] == 8


PIECE = st.text(st.characters(exclude_categories=()), max_size=6)
LOGPROBS = st.lists(
    st.builds(
        TokenLogprob,
        st.integers(0, 9),
        st.binary(max_size=4),
        st.floats(),
        st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=4), st.floats()), max_size=2).map(
            tuple
        ),
    ),
    max_size=2,
).map(tuple)


@st.composite
def replies_in_pieces(draw: st.DrawFn) -> list[ReplyEvent]:
    events: list[ReplyEvent] = [Started(3)]
    events += [ThinkingPart(text) for text in draw(st.lists(PIECE, max_size=3))]
    events += [
        TextPart(text, logprobs)
        for text, logprobs in draw(st.lists(st.tuples(PIECE, LOGPROBS), max_size=4))
    ]
    for index in range(draw(st.integers(0, 2))):
        events.append(CallStarted(index, f"call_{index}", draw(st.sampled_from("fgh"))))
        events += [CallArguments(index, text) for text in draw(st.lists(PIECE, max_size=3))]
    reason = "tool_calls" if isinstance(events[-1], CallStarted | CallArguments) else "stop"
    return [*events, Finished(reason, USAGE)]  # type: ignore[arg-type]


def collect(events: list[ReplyEvent]) -> Reply:
    texts = [event for event in events if isinstance(event, TextPart)]
    started = [event for event in events if isinstance(event, CallStarted)]
    arguments = [event for event in events if isinstance(event, CallArguments)]
    assert isinstance(events[-1], Finished)
    return Reply(
        events[-1],
        "".join([part.text for part in texts]),
        "".join([event.text for event in events if isinstance(event, ThinkingPart)]),
        tuple(ToolCall(call.name, {}, call.id) for call in started),
        tuple(
            "".join([part.text for part in arguments if part.index == call.index])
            for call in started
        ),
        tuple(found for part in texts for found in part.logprobs),
    )


def join(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """What a client makes of the deltas of one choice."""
    joined: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}, "logprobs": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            joined["role"] = delta.get("role", joined.get("role"))
            joined["content"] += delta.get("content") or ""
            joined["reasoning_content"] += delta.get("reasoning_content") or ""
            joined["logprobs"] += (choice.get("logprobs") or {}).get("content", [])
            for call in delta.get("tool_calls", []):
                known = joined["calls"].setdefault(call["index"], {"arguments": ""})
                known["arguments"] += call["function"]["arguments"]
                known |= {"id": call["id"]} if "id" in call else {}
                known |= {"name": call["function"]["name"]} if "name" in call["function"] else {}
            joined["reason"] = choice["finish_reason"]
    return joined


@settings(BUSY)
@given(st.lists(replies_in_pieces(), min_size=1, max_size=3), st.booleans(), st.randoms())
def test_joined_deltas_are_the_whole_answer(
    replies: list[list[ReplyEvent]], with_logprobs: bool, random: Any
) -> None:
    request = parse(n=len(replies), stream=True, logprobs=with_logprobs)
    order = [i for i, events in enumerate(replies) for _ in events]
    random.shuffle(order)
    sources: list[Iterator[ReplyEvent]] = [iter(events) for events in replies]
    fed = [(i, next(sources[i])) for i in order]
    answer = encode_chat(CONTEXT, request, [collect(events) for events in replies])
    whole = json.loads(to_json(answer))
    ChatCompletion.model_validate(whole)
    chunks = chunks_of(stream(request, fed))
    for choice in whole["choices"]:
        joined = join(chunks, choice["index"])
        message = choice["message"]
        calls = [{**call["function"], "id": call["id"]} for call in message.get("tool_calls") or []]
        assert joined["role"] == message["role"]
        assert joined["reason"] == choice["finish_reason"]
        # Characters that no UTF-8 has are replaced piece by piece; nothing else changes.
        assert joined["content"] == (message["content"] or "")
        assert joined["reasoning_content"] == message.get("reasoning_content", "")
        assert list(joined["calls"].values()) == calls
        assert joined["logprobs"] == ((choice["logprobs"] or {}).get("content") or [])


# ---- the client itself


def client(status: int, content: bytes, headers: dict[str, str] | None = None) -> openai.OpenAI:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=content, headers=headers)

    transport = httpx.Client(transport=httpx.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://server/v1", http_client=transport)


def test_the_client_reads_a_stream() -> None:
    request = parse(stream=True, stream_options={"include_usage": True})
    encoder = ChatEncoder(CONTEXT, request)
    events = one(ThinkingPart("Hm"), TextPart("a\u2028b"), TextPart("é😀"))
    data = b"".join([encoder.keep_alive() + encoder.feed(i, event) for i, event in events])
    data += encoder.finish()
    with client(200, data, {"content-type": ChatEncoder.media_type}) as api:
        chunks = list(
            api.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
        )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "a\u2028bé😀"
    assert chunks[1].choices[0].delta.model_extra == {"reasoning_content": "Hm"}
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 14


def test_the_client_hears_of_a_failure_on_the_way() -> None:
    encoder = ChatEncoder(CONTEXT, parse(stream=True))
    data = encoder.feed(0, TextPart("Hi")) + encoder.fail(ApiError("internal", "broke"))
    with (
        client(200, data, {"content-type": ChatEncoder.media_type}) as api,
        pytest.raises(openai.APIError, match="broke"),
    ):
        list(
            api.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
        )


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("invalid_request", openai.BadRequestError),
        ("authentication", openai.AuthenticationError),
        ("permission", openai.PermissionDeniedError),
        ("not_found", openai.NotFoundError),
        ("internal", openai.InternalServerError),
        ("not_supported", openai.InternalServerError),
    ],
)
def test_the_client_raises_what_is_meant_and_does_not_try_again(
    kind: Any, raised: type[openai.APIStatusError]
) -> None:
    answer = encode_error(ApiError(kind, "so it is", param="x", code="y"))
    n_asked = 0

    def respond(_: httpx.Request) -> httpx.Response:
        nonlocal n_asked
        n_asked += 1
        return httpx.Response(
            answer.status, content=to_json(answer.body), headers=dict(answer.headers)
        )

    transport = httpx.Client(transport=httpx.MockTransport(respond))
    with (
        openai.OpenAI(api_key="k", base_url="http://server/v1", http_client=transport) as api,
        pytest.raises(raised) as found,
    ):
        api.models.list()
    assert n_asked == 1
    assert "so it is" in str(found.value)
    assert (found.value.param, found.value.code) == ("x", "y")


# ---- errors and models


def test_every_kind_of_error_has_a_shape() -> None:
    for kind, status in STATUS.items():
        answer = encode_error(ApiError(kind, "no"))
        inner: Any = answer.body["error"]
        assert answer.status == status and inner["message"] == "no"
        assert inner["type"].endswith("_error") and {"param", "code"} <= set(inner)


def test_when_to_try_again() -> None:
    soon = encode_error(ApiError("unavailable", "busy", retry_after_s=0.2))
    assert soon.headers == {"Retry-After": "1"}
    assert (
        encode_error(ApiError("rate_limit", "x", retry_after_s=2.1)).headers["Retry-After"] == "3"
    )
    assert encode_error(ApiError("internal", "x")).headers == {"x-should-retry": "false"}
    assert encode_error(ApiError("authentication", "x")).headers == {"WWW-Authenticate": "Bearer"}


def test_a_prompt_that_is_too_long_says_so_in_every_way_that_clients_know() -> None:
    fields = {"n_prompt_tokens": 9, "n_ctx": 8, "message": "hidden"}
    answer = encode_error(ApiError("context_overflow", "too long", fields=fields))
    assert answer.status == 400
    assert answer.body["error"] == {
        "message": "too long",
        "type": "exceed_context_size_error",
        "param": None,
        "code": "context_length_exceeded",
        "n_prompt_tokens": 9,
        "n_ctx": 8,
    }


def test_models() -> None:
    card = ModelCard("tiny", 100, n_ctx=2048, modified_s=5.5, repo="owner/repo", can_think=True)
    model = encode_model(card)
    assert Model.model_validate_json(to_json(model), strict=True).owned_by == "owner"
    assert model["created"] == 5
    assert model["meta"] == {
        "size": 100,
        "n_ctx_train": 2048,
        "capabilities": ["completion", "thinking"],
    }
    assert encode_models([card]) == {"object": "list", "data": [model]}
    assert encode_model(ModelCard("a", 1))["owned_by"] == "llmrun"

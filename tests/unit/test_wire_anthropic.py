"""Anthropic's messages API, as its own client sends and reads it."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import jsonschema
import pydantic
import pytest
from anthropic.types import Message as AnthropicMessage
from anthropic.types import MessageTokensCount, ModelInfo, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from hypothesis import given

from llmrun.chat.messages import Message, ToolCall
from llmrun.engine.types import Usage
from llmrun.server.types import (
    ApiError,
    CallArguments,
    CallStarted,
    ChatRequest,
    ErrorKind,
    Finished,
    ModelCard,
    ReplyEvent,
    SamplingWishes,
    TextPart,
    ThinkingPart,
    Tool,
    ToolChoice,
)
from llmrun.server.wire_anthropic import (
    SCHEMA_COUNT,
    SCHEMA_MESSAGES,
    MessageEncoder,
    encode_count,
    encode_error,
    encode_message,
    encode_model,
    encode_models,
    parse_count_tokens,
    parse_messages,
)
from tests.fakes.any_json import ANY_JSON, bodies
from tests.fakes.mock_clients import Wire
from tests.fakes.reply_events import (
    CONTEXT,
    collect,
    events_of,
    finished,
    read_events,
    replies,
    stream,
)

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(RawMessageStreamEvent)
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLING = events_of(
    ThinkingPart("Let me "),
    ThinkingPart("see."),
    TextPart("I look"),
    TextPart(" it up."),
    CallStarted(0, "call_a", "weather"),
    CallArguments(0, '{"city": "Mal'),
    CallArguments(0, 'mö"}'),
    CallStarted(1, "call_b", "weather"),
    CallArguments(1, "{}"),
    finish=finished("tool_calls"),
)


def parse(**members: object) -> ChatRequest:
    return parse_messages({"model": "tiny", "max_tokens": 9, "messages": HELLO, **members})


def refuse(**members: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**members)
    assert caught.value.kind == "invalid_request"
    return caught.value


def read(*messages: object) -> tuple[Message, ...]:
    return parse(messages=list(messages)).messages


# ---- requests


def test_a_request_of_the_client_is_understood() -> None:
    wire = Wire(events_of(TextPart("Hi")))
    wire.anthropic().messages.create(
        model="tiny",
        max_tokens=50,
        system="Be brief.",
        messages=HELLO,
        # The client's newer versions have no names of their own for these.
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
        stop_sequences=["END"],
        metadata={"user_id": "u"},
        tools=[{**WEATHER, "cache_control": {"type": "ephemeral"}, "strict": True}],  # type: ignore[list-item]
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 2000},
        output_config={
            "effort": "max",
            "format": {"type": "json_schema", "schema": {"type": "object"}},
        },
    )
    (request,) = wire.requests
    generation = request.generation
    assert generation.model == "tiny" and generation.max_tokens == 50
    assert generation.sampling == SamplingWishes(temperature=0.5, top_p=0.9, top_k=5)
    assert generation.stop == ("END",)
    assert generation.json_schema == '{"type": "object"}'
    assert request.messages == (Message("system", "Be brief."), Message("user", "Hello"))
    assert request.tools == (Tool("weather", "The weather", WEATHER["input_schema"], strict=True),)
    assert request.tool_choice == ToolChoice("named", "weather")
    assert not request.parallel_tool_calls
    assert request.think is True and request.reasoning_effort == "high"
    assert not request.continues and not generation.stream


def test_a_type_as_output_format_becomes_a_schema() -> None:
    class City(pydantic.BaseModel):
        name: str

    wire = Wire(events_of(TextPart('{"name": "Malmö"}')))
    answer = wire.anthropic().messages.parse(
        model="tiny", max_tokens=9, messages=HELLO, output_format=City
    )
    assert answer.parsed_output == City(name="Malmö")
    schema = json.loads(wire.requests[0].generation.json_schema or "")
    assert schema["required"] == ["name"]


def test_an_older_output_format_is_taken_too() -> None:
    fmt = {"type": "json_schema", "schema": {"type": "object"}}
    assert parse(output_format=fmt).generation.json_schema == '{"type": "object"}'


@pytest.mark.parametrize(
    ("thinking", "meaning"),
    [
        (None, False),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, None),
        ({"type": "between_tools"}, None),
    ],
)
def test_thinking(thinking: object, meaning: bool | None) -> None:
    assert parse(thinking=thinking).think is meaning


def test_system_blocks_are_joined_and_accounting_is_dropped() -> None:
    line = "x-anthropic-billing-header: cc_version=2; cch=71fea;"
    blocks = [
        {"type": "text", "text": line},
        {"type": "text", "text": "You are X.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    expected = Message("system", "You are X.\nBe brief.")
    assert parse(system=blocks).messages[0] == expected
    assert parse(system=f"{line}\nYou are X.\nBe brief.").messages[0] == expected
    assert parse(system=line).messages == (Message("user", "Hello"),)


def test_a_users_turn_with_results_becomes_several_messages() -> None:
    messages = read(
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "xx"},
                {"type": "text", "text": "I look"},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "X"}},
                {"type": "tool_use", "id": "b", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "rain"},
                {
                    "type": "tool_result",
                    "tool_use_id": "b",
                    "is_error": True,
                    "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "clock"}],
                },
                {"type": "text", "text": "So?"},
                {"type": "text", "text": "Tell me."},
            ],
        },
    )
    assert messages == (
        Message("user", "weather?"),
        Message(
            "assistant",
            "I look",
            thinking="hm",
            tool_calls=(ToolCall("weather", {"city": "X"}, "a"), ToolCall("time", {}, "b")),
        ),
        Message("tool", "rain", tool_name="weather", tool_call_id="a"),
        Message("tool", "Error: no\nclock", tool_name="time", tool_call_id="b"),
        Message("user", "So?\nTell me."),
    )


def test_neighbours_of_one_role_are_one_turn() -> None:
    say = [{"role": "user", "content": text} for text in "ab"]
    reply = {"role": "assistant", "content": [{"type": "text", "text": "c"}]}
    assert read(*say, reply, reply, *say) == (
        Message("user", "a\nb"),
        Message("assistant", "c\nc"),
        Message("user", "a\nb"),
    )


def test_text_documents_search_results_and_references_are_text() -> None:
    document = {
        "type": "document",
        "title": "T",
        "source": {"type": "text", "media_type": "text/plain", "data": "D"},
    }
    nested = {"type": "document", "source": {"type": "content", "content": [
        {"type": "text", "text": "N"}]}}  # fmt: skip
    found = {
        "type": "search_result",
        "title": "S",
        "source": "u",
        "content": [{"type": "text", "text": "R"}],
    }
    reference = {"type": "tool_reference", "tool_name": "weather"}
    (message,) = read({"role": "user", "content": [document, nested, found, reference]})
    assert message.content == "T\nD\nN\nS\nu\nR\nweather"


def test_the_begin_of_the_reply() -> None:
    open_turn = {"role": "assistant", "content": "The answer is ("}
    request = parse(messages=[*HELLO, open_turn])
    assert request.continues and request.messages[-1].content == "The answer is ("
    request = parse(messages=[*HELLO, {"role": "assistant", "content": []}])
    assert not request.continues and request.messages == (Message("user", "Hello"),)


def test_what_the_provider_would_run_is_left_out() -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    assert [tool.name for tool in parse(tools=[search, WEATHER]).tools] == ["weather"]
    assert read(
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": [
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
                {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
                {"type": "text", "text": "found"},
            ],
        },
        {"role": "user", "content": "go on"},
    )[1] == Message("assistant", "found")
    choice = {"type": "tool", "name": "web_search"}
    assert "could run none" in refuse(tools=[search], tool_choice=choice).message


def test_tools_whose_schema_only_the_provider_knows_are_refused() -> None:
    error = refuse(tools=[{"type": "bash_20250124", "name": "bash"}])
    assert error.param == "tools[0].type" and "input_schema" in error.message


@pytest.mark.parametrize(
    ("choice", "meaning"),
    [
        ({"type": "auto"}, ToolChoice("auto")),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "none"}, ToolChoice("none")),
        ({"type": "tool", "name": "weather"}, ToolChoice("named", "weather")),
    ],
)
def test_tool_choice(choice: dict[str, object], meaning: ToolChoice) -> None:
    assert parse(tools=[WEATHER], tool_choice=choice).tool_choice == meaning


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}}
USE = {"type": "tool_use", "id": "a", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
            "messages[0].content[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0].type"),
        ({"messages": [*HELLO, {"role": "assistant", "content": [USE]}]}, "messages[1].content"),
        (
            {"messages": [{"role": "assistant", "content": [{**USE, "input": "x"}]}]},
            "messages[0].content[0].input",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "document", "source": {"type": "base64", "data": "x"}}]}]},
            "messages[0].content[0].source",
        ),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"stream": "yes"}, "stream"),
        ({"system": 5}, "system"),
        ({"system": [IMAGE]}, "system[0].type"),
        ({"metadata": []}, "metadata"),
        ({"thinking": {"type": "hard"}}, "thinking.type"),
        ({"thinking": {}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
    ],
)  # fmt: skip
def test_what_is_refused(members: dict[str, object], param: str) -> None:
    error = refuse(**members)
    assert error.param == param
    assert param in str(encode_error(error).body["error"])


def test_many_small_blocks_are_read_in_time_that_grows_with_them() -> None:
    blocks = [{"type": "text", "text": "x" * 1000}] * 10_000
    (message,) = read(*[{"role": "user", "content": blocks}] * 3)
    assert len(message.content) == 30_000 * 1001 - 1


NAMES = [
    *("model", "max_tokens", "messages", "role", "content", "type", "text", "thinking", "id"),
    *("name", "input", "tool_use_id", "is_error", "source", "data", "tools", "input_schema"),
    *("tool_choice", "stop_sequences", "output_config", "format", "schema", "system", "metadata"),
]


@given(bodies(NAMES) | ANY_JSON)
def test_any_json_is_a_request_or_an_error(body: object) -> None:
    for parse_any in (parse_messages, parse_count_tokens):
        try:
            assert isinstance(parse_any(body), ChatRequest)
        except ApiError as error:
            assert error.kind == "invalid_request"


@given(bodies(NAMES), bodies(NAMES))
def test_any_content_is_a_request_or_an_error(content: object, tools: object) -> None:
    for role in ("user", "assistant", "system"):
        message = {"role": role, "content": [content]}
        body = {"max_tokens": 1, "messages": [message], "tools": [tools], "tool_choice": tools}
        try:
            parse_messages(body)
        except ApiError as error:
            assert error.kind == "invalid_request"


def test_the_schemas_are_schemas_and_true() -> None:
    body = {"model": "m", "max_tokens": 1, "messages": HELLO, "tools": [WEATHER]}
    for schema in (SCHEMA_MESSAGES, SCHEMA_COUNT):
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(body, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m", "messages": HELLO}, SCHEMA_MESSAGES)


# ---- answers


def test_the_client_reads_a_whole_answer() -> None:
    answer = Wire(CALLING).anthropic().messages.create(
        model="tiny", max_tokens=9, messages=HELLO, tools=[WEATHER]  # type: ignore[list-item]
    )  # fmt: skip
    assert answer.id == "msg_0a1b2c" and answer.model == "tiny" and answer.role == "assistant"
    thinking, text, *calls = answer.content
    assert thinking.type == "thinking" and thinking.thinking == "Let me see."
    assert thinking.signature
    assert text.type == "text" and text.text == "I look it up."
    assert [call.to_dict() for call in calls] == [
        {"type": "tool_use", "id": "call_a", "name": "weather", "input": {"city": "Malmö"}},
        {"type": "tool_use", "id": "call_b", "name": "weather", "input": {}},
    ]
    assert answer.stop_reason == "tool_use"
    assert answer.usage.input_tokens == 10 and answer.usage.cache_read_input_tokens == 20
    assert answer.usage.output_tokens == 7


def test_the_client_reads_a_streamed_answer_as_the_whole_one() -> None:
    client = Wire(CALLING).anthropic()
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": HELLO}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as streamed:
        kinds = [event.type for event in streamed]
        final = streamed.get_final_message()
    assert _plain(final) == _plain(whole)
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert {"text", "thinking", "signature", "input_json"} <= set(kinds)


def _plain(message: AnthropicMessage) -> dict[str, Any]:
    return message.to_dict(exclude_unset=False, exclude_none=True)  # type: ignore[return-value]


def test_the_events_of_a_stream() -> None:
    request = parse(stream=True)
    data = stream(MessageEncoder(CONTEXT, request), CALLING)
    events = read_events(data)
    assert [name for name, _ in events] == [
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_delta"),
        *("content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_delta"),
        "content_block_stop",
        *("content_block_start", "content_block_delta", "content_block_delta"),
        "content_block_stop",
        *("content_block_start", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    start = events[0][1]["message"]
    assert isinstance(start, dict)
    assert start["usage"]["input_tokens"] == 30 and start["content"] == []
    deltas = [event["delta"]["type"] for name, event in events if name == "content_block_delta"]  # type: ignore[index]
    assert deltas == [
        *("thinking_delta", "thinking_delta", "signature_delta", "text_delta", "text_delta"),
        *("input_json_delta", "input_json_delta", "input_json_delta"),
    ]
    assert events[-2][1] == {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 20,
            "output_tokens": 7,
            "output_tokens_details": {"thinking_tokens": 4},
        },
    }


@pytest.mark.parametrize(
    ("finish", "n_max", "reason", "stop"),
    [
        (finished("stop"), 9, "end_turn", None),
        (finished("stop", "END"), 9, "stop_sequence", "END"),
        (finished("stop", "<|im_end|>"), 9, "end_turn", None),
        (finished("tool_calls"), 9, "tool_use", None),
        (finished("length"), 7, "max_tokens", None),
        (finished("length"), 9, "model_context_window_exceeded", None),
        (finished("cancelled"), 9, "max_tokens", None),
    ],
)
def test_stop_reasons(finish: Finished, n_max: int, reason: str, stop: str | None) -> None:
    request = parse(max_tokens=n_max, stop_sequences=["END"])
    events = events_of(TextPart("x"), finish=finish)
    body = encode_message(CONTEXT, request, [collect(events)])
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, stop)
    delta = read_events(stream(MessageEncoder(CONTEXT, request), events))[-2][1]["delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": stop}


@pytest.mark.parametrize(
    ("parts", "content"),
    [
        ([], [("text", "")]),
        ([TextPart(" \n")], [("text", " \n")]),
        ([ThinkingPart("hm")], [("thinking", "hm")]),
        ([TextPart("\n"), TextPart("\nHi")], [("text", "\n\nHi")]),
        ([TextPart("\n\n"), CallStarted(0, "i", "f")], [("tool_use", "f")]),
    ],
)
def test_white_space_makes_no_block_beside_a_call(
    parts: list[ReplyEvent], content: list[tuple[str, str]]
) -> None:
    client = Wire(events_of(*parts)).anthropic()
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "messages": HELLO}
    with client.messages.stream(**asked) as streamed:
        final = streamed.get_final_message()
    for message in (final, client.messages.create(**asked)):
        found = [
            (block.type, getattr(block, {"tool_use": "name"}.get(block.type, block.type)))
            for block in message.content
        ]
        assert found == content


@given(replies())
def test_every_answer_is_of_the_clients_types_and_streams_as_it_is(
    events: list[ReplyEvent],
) -> None:
    request = parse()
    reply = collect(events)
    whole = AnthropicMessage.model_validate(encode_message(CONTEXT, request, [reply]))
    data = stream(MessageEncoder(CONTEXT, request), events)
    assert not any(char in data.decode() for char in "\x85\u2028\u2029")
    for name, event in read_events(data):
        assert EVENT.validate_python(event).type == name
    wire = Wire(events)
    with wire.anthropic().messages.stream(
        model="tiny", max_tokens=9, messages=HELLO
    ) as streamed:  # fmt: skip
        final = streamed.get_final_message()
    assert _texts(final, "thinking") == _texts(whole, "thinking") == reply.thinking
    calls = [[b.to_dict() for b in m.content if b.type == "tool_use"] for m in (final, whole)]
    assert calls[0] == calls[1]
    assert [call["input"] for call in calls[0]] == [dict(call.arguments) for call in reply.calls]
    if reply.calls:
        # Where a call stands between two pieces of text, white space may go.
        squeezed = ["".join(_texts(m, "text").split()) for m in (final, whole)]
        assert squeezed[0] == squeezed[1] == "".join(reply.text.split())
    else:
        assert _plain(final)["content"] == _plain(whole)["content"]
        assert _texts(whole, "text") == reply.text
    assert final.stop_reason == whole.stop_reason and whole.stop_reason is not None
    assert final.usage == whole.usage
    usage = whole.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == reply.finish.usage.n_prompt


def _texts(message: AnthropicMessage, kind: str) -> str:
    return "".join(getattr(block, kind) for block in message.content if block.type == kind)


def test_the_answer_can_be_sent_back() -> None:
    client = Wire(CALLING).anthropic()
    answer = client.messages.create(model="tiny", max_tokens=9, messages=HELLO)
    result = {"type": "tool_result", "tool_use_id": "call_a", "content": "rain"}
    wire = Wire(events_of(TextPart("It rains.")))
    wire.anthropic().messages.create(
        model="tiny",
        max_tokens=9,
        messages=[
            *HELLO,
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [result]},  # type: ignore[list-item]
        ],
    )
    _, said, told = wire.requests[0].messages
    assert said.thinking == "Let me see." and said.content == "I look it up."
    assert said.tool_calls == collect(CALLING).calls
    assert told == Message("tool", "rain", tool_name="weather", tool_call_id="call_a")


def test_the_client_counts_tokens() -> None:
    wire = Wire()
    found = wire.anthropic().messages.count_tokens(model="tiny", messages=HELLO, system="s")
    assert found.input_tokens == 42
    assert wire.requests[0].messages[0] == Message("system", "s")
    assert MessageTokensCount.model_validate(encode_count(3)).input_tokens == 3


def test_models() -> None:
    card = ModelCard("tiny", 10, n_ctx=4096, modified_s=1_750_000_000.0)
    found = ModelInfo.model_validate(encode_model(card))
    assert found.id == "tiny" and found.max_input_tokens == 4096
    assert found.created_at.timestamp() == 1_750_000_000
    page = encode_models([card, ModelCard("other", 1)])
    assert page["first_id"] == "tiny" and page["last_id"] == "other"
    assert page["has_more"] is False
    assert encode_models([]) == {"data": [], "has_more": False, "first_id": None, "last_id": None}


def test_keeping_alive_never_comes_first() -> None:
    encoder = MessageEncoder(CONTEXT, parse())
    events = events_of(TextPart("a"), TextPart("b"))
    assert read_events(encoder.keep_alive()) == []
    data = [encoder.feed(0, event) + encoder.keep_alive() for event in events[:2]]
    assert read_events(data[0])[-1] == ("ping", {"type": "ping"})
    wire = Wire()
    tail = b"".join([*(encoder.feed(0, event) for event in events[2:]), encoder.finish()])
    wire.answer = lambda path, body: (  # type: ignore[method-assign]
        200, {"content-type": "text/event-stream"}, b"".join([*data, tail]),
    )  # fmt: skip
    with wire.anthropic().messages.stream(model="t", max_tokens=9, messages=HELLO) as streamed:
        assert streamed.get_final_text() == "ab"


# ---- errors


@pytest.mark.parametrize(
    ("kind", "status", "error_type", "raised"),
    [
        ("invalid_request", 400, "invalid_request_error", anthropic.BadRequestError),
        ("context_overflow", 400, "invalid_request_error", anthropic.BadRequestError),
        ("authentication", 401, "authentication_error", anthropic.AuthenticationError),
        ("permission", 403, "permission_error", anthropic.PermissionDeniedError),
        ("not_found", 404, "not_found_error", anthropic.NotFoundError),
        ("method_not_allowed", 405, "invalid_request_error", anthropic.APIStatusError),
        ("timeout", 408, "timeout_error", anthropic.APIStatusError),
        ("too_large", 413, "request_too_large", anthropic.APIStatusError),
        ("unsupported_media_type", 415, "invalid_request_error", anthropic.APIStatusError),
        ("rate_limit", 429, "rate_limit_error", anthropic.RateLimitError),
        ("internal", 500, "api_error", anthropic.InternalServerError),
        ("not_supported", 501, "api_error", anthropic.InternalServerError),
        ("unavailable", 503, "api_error", anthropic.InternalServerError),
    ],
)
def test_the_client_raises_what_the_error_means(
    kind: ErrorKind, status: int, error_type: str, raised: type[anthropic.APIStatusError]
) -> None:
    error = ApiError(kind, "it is so")
    answer = encode_error(error)
    assert answer.status == status
    if error_type not in ("request_too_large",):  # the client has a class for it, but no type
        ErrorResponse.model_validate(answer.body)
    # Where the client may try again, it does not: nothing says that it would help.
    client = Wire(error=error).anthropic(max_retries=2 if status >= 500 else 0)
    with pytest.raises(raised, match="it is so") as caught:
        client.messages.create(model="tiny", max_tokens=9, messages=HELLO)
    assert caught.value.status_code == status
    assert caught.value.body["error"]["type"] == error_type  # type: ignore[index]


def test_permanent_failures_are_not_tried_again() -> None:
    wire = Wire(error=ApiError("internal", "broken"))
    with pytest.raises(anthropic.InternalServerError):
        wire.anthropic(max_retries=5).messages.create(model="t", max_tokens=9, messages=HELLO)
    assert len(wire.requests) == 1


def test_a_busy_server_is_overloaded_and_says_when_to_come_again() -> None:
    answer = encode_error(ApiError("unavailable", "loading", retry_after_s=1.2))
    assert answer.status == 529 and answer.headers == {"Retry-After": "2"}
    assert answer.body["error"] == {"type": "overloaded_error", "message": "loading"}
    assert encode_error(ApiError("rate_limit", "x", retry_after_s=0)).headers["Retry-After"] == "1"


def test_too_long_a_prompt_is_said_in_the_words_that_clients_look_for() -> None:
    error = ApiError("context_overflow", "x", fields={"n_prompt_tokens": 9000, "n_ctx": 4096})
    told = encode_error(error).body["error"]
    assert told == {
        "type": "invalid_request_error",
        "message": "prompt is too long: 9000 tokens > 4096 maximum",
    }


def test_the_field_at_fault_is_named() -> None:
    told = encode_error(ApiError("invalid_request", "is bad", param="top_k")).body["error"]
    assert told == {"type": "invalid_request_error", "message": "top_k: is bad"}


@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_an_error_on_the_way_is_raised(n_before: int) -> None:
    wire = Wire(events_of(TextPart("Hel"), TextPart("lo")), ApiError("internal", "it broke"))
    wire.error_after = n_before
    with (
        pytest.raises(anthropic.APIStatusError, match="it broke"),
        wire.anthropic().messages.stream(model="t", max_tokens=9, messages=HELLO) as streamed,
    ):
        streamed.get_final_message()


def test_usage_counts_the_whole_prompt_once() -> None:
    finish = Finished("stop", Usage(n_prompt=5, n_completion=1, n_cached=5))
    body = encode_message(CONTEXT, parse(), [collect(events_of(TextPart("x"), finish=finish))])
    usage = body["usage"]
    assert isinstance(usage, dict)
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (0, 5)

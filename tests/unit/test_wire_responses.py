"""OpenAI's Responses API, as its own client sends and reads it."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from hypothesis import given
from openai.types.responses import Response, ResponseStreamEvent

from llmrun.chat.messages import Message, ToolCall
from llmrun.engine.types import TokenLogprob
from llmrun.server.types import (
    ApiError,
    CallArguments,
    CallStarted,
    ChatRequest,
    ErrorKind,
    Finished,
    ReplyEvent,
    SamplingWishes,
    TextPart,
    ThinkingPart,
    Tool,
    ToolChoice,
)
from llmrun.server.wire_responses import (
    SCHEMA_RESPONSE,
    ResponseEncoder,
    encode_response,
    parse_response,
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

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather",
    "parameters": PARAMETERS,
    "strict": False,
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
    finish=finished("tool_calls"),
)


def parse(**members: object) -> ChatRequest:
    return parse_response({"model": "tiny", "input": "Hello", **members})


def refuse(**members: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**members)
    assert caught.value.kind == "invalid_request"
    return caught.value


def read(*items: object) -> tuple[Message, ...]:
    return parse(input=list(items)).messages


# ---- requests


def test_a_request_of_the_client_is_understood() -> None:
    wire = Wire(events_of(TextPart("Hi")))
    wire.openai().responses.create(
        model="tiny",
        input="Hello",
        instructions="Be brief.",
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        reasoning={"effort": "high", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        metadata={"a": "b"},
        store=True,
        include=["reasoning.encrypted_content"],
        truncation="auto",
        extra_body={"seed": 7},
    )
    (request,) = wire.requests
    generation = request.generation
    assert generation.model == "tiny" and generation.max_tokens == 50
    assert generation.sampling == SamplingWishes(temperature=0.5, top_p=0.9, seed=7)
    assert generation.json_schema == '{"type": "object"}' and generation.n_logprobs is None
    assert request.messages == (Message("system", "Be brief."), Message("user", "Hello"))
    assert request.tools == (Tool("weather", "The weather", PARAMETERS),)
    assert request.tool_choice == ToolChoice("named", "weather")
    assert not request.parallel_tool_calls
    assert request.think is True and request.reasoning_effort == "high"
    assert not generation.stream


def test_what_was_asked_is_said_again() -> None:
    wire = Wire(events_of(TextPart("Hi")))
    answer = wire.openai().responses.create(
        model="tiny",
        input="Hello",
        instructions="Be brief.",
        tools=[WEATHER],
        tool_choice="none",
        temperature=0.5,
        reasoning={"effort": "xhigh"},
        text={"format": {"type": "json_object"}, "verbosity": "low"},
        metadata={"a": "b"},
        user="me",
        store=True,
    )
    assert answer.instructions == "Be brief." and answer.metadata == {"a": "b"}
    assert answer.temperature == 0.5 and answer.tool_choice == "none" and answer.user == "me"
    assert answer.tools[0].to_dict() == WEATHER
    assert answer.reasoning is not None and answer.reasoning.effort == "xhigh"
    assert answer.text is not None and answer.text.format is not None
    assert answer.text.format.type == "json_object" and answer.text.verbosity == "low"
    assert answer.to_dict()["store"] is False


@pytest.mark.parametrize(
    ("effort", "think", "meaning"),
    [
        (None, None, None),
        ("none", False, None),
        ("minimal", None, "low"),
        ("low", True, "low"),
        ("max", True, "high"),
    ],
)
def test_reasoning_effort(effort: object, think: bool | None, meaning: str | None) -> None:
    request = parse(reasoning={"effort": effort})
    assert (request.think, request.reasoning_effort) == (think, meaning)


def test_items_become_messages() -> None:
    assert read(
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "r", "summary": [],
         "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "I look", "annotations": []}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "X"}'},
        {"type": "function_call", "call_id": "d", "name": "time", "arguments": ""},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
        {"type": "function_call_output", "call_id": "d",
         "output": [{"type": "input_text", "text": "noon"}]},
        {"role": "user", "content": "So?"},
    ) == (
        Message("developer", "Rules."),
        Message("user", "a\nb"),
        Message(
            "assistant",
            "I look",
            thinking="hm",
            tool_calls=(ToolCall("weather", {"city": "X"}, "c"), ToolCall("time", {}, "d")),
        ),
        Message("tool", "rain", tool_name="weather", tool_call_id="c"),
        Message("tool", "noon", tool_name="time", tool_call_id="d"),
        Message("user", "So?"),
    )  # fmt: skip


def test_the_rules_at_the_begin_are_one_message() -> None:
    rules = {"role": "developer", "content": "More."}
    request = parse(instructions="Rules.", input=[rules, {"role": "user", "content": "x"}, rules])
    assert request.messages == (
        Message("system", "Rules.\nMore."),
        Message("user", "x"),
        Message("developer", "More."),
    )


def test_there_is_one_reply_to_a_request() -> None:
    assert parse(n=3).generation.n == 1


@pytest.mark.parametrize("text", ["[1]", "{", "nope", "[" * 100_000, '{"a": NaN}', "\ud800"])
def test_arguments_that_are_no_object_are_kept_whole(text: str) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": text}
    assert read(call)[0].tool_calls == (ToolCall("f", {"raw": text}, "c"),)


def test_a_summary_stands_in_for_reasoning_that_is_not_there() -> None:
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}
    assert read(item, {"role": "assistant", "content": "x"})[0].thinking == "s"


@pytest.mark.parametrize(
    ("members", "n"),
    [
        ({}, None),
        ({"top_logprobs": 3}, 3),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, 2),
    ],
)
def test_logprobs(members: dict[str, object], n: int | None) -> None:
    assert parse(**members).generation.n_logprobs == n


def test_allowed_tools_leave_only_these() -> None:
    other = {**WEATHER, "name": "time"}
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "time"}],
    }
    request = parse(tools=[WEATHER, other], tool_choice=choice)
    assert [tool.name for tool in request.tools] == ["time"]
    assert request.tool_choice == ToolChoice("required")
    answer = Response.model_validate(encode_response(CONTEXT, request, [collect(events_of())]))
    assert len(answer.tools) == 2


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"store": "no"}, "store"),
        ({"truncation": "some"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"max_output_tokens": 10**30}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream": 1}, "stream"),
        ({"instructions": ["x"]}, "instructions"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "grammar": "root ::= x"}, "grammar"),
        ({"tools": [{"type": "teleport"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "parameters": []}]}, "tools[0].parameters"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice.name",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
    ],
)
def test_what_is_refused(members: dict[str, object], param: str) -> None:
    error = refuse(**members)
    assert error.param == param and param in error.message


def test_what_needs_a_store_is_refused_with_a_way_out() -> None:
    assert "stateless" in refuse(previous_response_id="resp_1").message


NAMES = [
    *("model", "input", "instructions", "role", "content", "type", "text", "format", "schema"),
    *("tools", "name", "parameters", "tool_choice", "mode", "reasoning", "effort", "metadata"),
    *("call_id", "arguments", "output", "summary", "include", "top_logprobs", "user", "stop"),
]


@given(bodies(NAMES) | ANY_JSON)
def test_any_json_is_a_request_or_an_error(body: object) -> None:
    try:
        assert isinstance(parse_response(body), ChatRequest)
    except ApiError as error:
        assert error.kind == "invalid_request"


@given(bodies(NAMES), bodies(NAMES))
def test_any_item_is_a_request_or_an_error(item: object, tool: object) -> None:
    kinds = ["message", "reasoning", "function_call", "function_call_output"]
    typed = [{**item, "type": kind} for kind in kinds] if isinstance(item, dict) else [item]
    for value in typed:
        try:
            parse_response({"input": [value], "tools": [tool], "tool_choice": tool})
        except ApiError as error:
            assert error.kind == "invalid_request"


def test_the_schema_is_a_schema_and_true() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA_RESPONSE)
    jsonschema.validate({"model": "m", "input": "x", "tools": [WEATHER]}, SCHEMA_RESPONSE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m"}, SCHEMA_RESPONSE)


# ---- answers


def test_the_client_reads_a_whole_answer() -> None:
    answer = Wire(CALLING).openai().responses.create(model="tiny", input="x", tools=[WEATHER])
    assert answer.id == "resp_0a1b2c" and answer.model == "tiny" and answer.status == "completed"
    assert answer.created_at == 1_750_000_000 and answer.completed_at == 1_750_000_002
    assert answer.output_text == "I look it up."
    reasoning, message, *calls = answer.output
    assert reasoning.type == "reasoning" and reasoning.content is not None
    assert [part.text for part in reasoning.content] == ["Let me see."]
    assert message.type == "message" and message.status == "completed"
    found = [(c.call_id, c.name, c.arguments) for c in calls if c.type == "function_call"]
    assert found == [("call_a", "weather", '{"city": "Malmö"}'), ("call_b", "weather", "{}")]
    assert answer.usage is not None
    assert answer.usage.to_dict() == {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 37,
    }


def test_the_client_reads_a_streamed_answer_as_the_whole_one() -> None:
    client = Wire(CALLING).openai()
    whole = client.responses.create(model="tiny", input="x", tools=[WEATHER])
    with client.responses.stream(model="tiny", input="x", tools=[WEATHER]) as streamed:
        texts = [event.delta for event in streamed if event.type == "response.output_text.delta"]
        final = streamed.get_final_response()
    assert texts == ["I look", " it up."]
    assert _plain(final) == _plain(whole)


def _plain(response: Response) -> Any:
    found = response.to_dict(exclude_none=True)
    for item in found["output"]:  # type: ignore[attr-defined]
        item.pop("parsed_arguments", None)
    return found


def test_the_client_parses_a_typed_answer() -> None:
    class City(pydantic.BaseModel):
        name: str

    wire = Wire(events_of(TextPart('{"name": '), TextPart('"Malmö"}')))
    client = wire.openai()
    answer = client.responses.parse(model="tiny", input="x", text_format=City)
    assert answer.output_parsed == City(name="Malmö")
    with client.responses.stream(model="tiny", input="x", text_format=City) as streamed:
        assert streamed.get_final_response().output_parsed == City(name="Malmö")
    schema = json.loads(wire.requests[0].generation.json_schema or "")
    assert schema["required"] == ["name"]


def test_the_events_of_a_stream() -> None:
    events = read_events(stream(ResponseEncoder(CONTEXT, parse()), CALLING))
    assert [name.removeprefix("response.") for name, _ in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        "output_item.added",
        *("function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "output_item.added",
        *("function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    places = [event["output_index"] for _, event in events if "output_index" in event]
    assert places == sorted(places) and set(places) == {0, 1, 2, 3}


@given(replies(with_logprobs=True))
def test_every_answer_is_of_the_clients_types_and_streams_as_it_is(
    events: list[ReplyEvent],
) -> None:
    request = parse(top_logprobs=2)
    reply = collect(events)
    whole = Response.model_validate(encode_response(CONTEXT, request, [reply]))
    data = stream(ResponseEncoder(CONTEXT, request), events)
    assert not any(char in data.decode() for char in "\x85\u2028\u2029")
    for name, event in read_events(data):
        assert EVENT.validate_python(event).type == name
    wire = Wire(events)
    seen: dict[int, str] = {}
    last = None
    with wire.openai().responses.stream(model="tiny", input="x", top_logprobs=2) as streamed:
        for event in streamed:
            if event.type in (
                "response.output_text.delta",
                "response.reasoning_text.delta",
                "response.function_call_arguments.delta",
            ):
                seen[event.output_index] = seen.get(event.output_index, "") + event.delta
            last = event
    assert last is not None
    ending = "completed" if reply.finish.reason != "length" else "incomplete"
    assert last.type == f"response.{ending}"
    final = last.response
    # What came in pieces is what the end says.
    assert {i: text for i, text in seen.items() if text} == {
        i: text for i, item in enumerate(final.output) if (text := _text(item))
    }
    assert final.status == whole.status == ending
    assert final.usage == whole.usage
    assert _texts(final, "reasoning") == _texts(whole, "reasoning") == reply.thinking
    if reply.calls:
        # Where a call stands between two pieces of text, white space may go.
        squeezed = ["".join(_texts(r, "message").split()) for r in (final, whole)]
        assert squeezed[0] == squeezed[1] == "".join(reply.text.split())
    else:
        assert _plain(final)["output"] == _plain(whole)["output"]
        assert _texts(whole, "message") == reply.text
    assert _calls(final) == _calls(whole)
    assert [json.loads(arguments) for _, _, arguments in _calls(whole)] == [
        dict(call.arguments) for call in reply.calls
    ]


def _text(item: Any) -> str:
    if item.type == "function_call":
        return str(item.arguments)
    return "".join(part.text for part in item.content or [])


def _texts(response: Response, kind: str) -> str:
    return "".join(_text(item) for item in response.output if item.type == kind)


def _calls(response: Response) -> list[tuple[str, str, str]]:
    items = [item for item in response.output if item.type == "function_call"]
    return [(item.call_id, item.name, item.arguments) for item in items]


def test_logprobs_are_told_with_their_bytes() -> None:
    token = TokenLogprob(1, b"\xc3", -0.5, ((1, b"\xc3", -0.5), (2, b"x", -math.inf)))
    client = Wire(events_of(TextPart("é", (token,)))).openai()
    answer = client.responses.create(model="tiny", input="x", top_logprobs=2)
    (message,) = answer.output
    assert message.type == "message" and message.content[0].type == "output_text"
    assert message.content[0].logprobs is not None
    (entry,) = message.content[0].logprobs
    assert entry.bytes == [0xC3] and entry.token == "\ufffd"
    assert [top.logprob for top in entry.top_logprobs] == [-0.5, -9999.0]
    with client.responses.stream(model="tiny", input="x", top_logprobs=2) as streamed:
        found = [e.logprobs for e in streamed if e.type == "response.output_text.delta"]
    assert found[0][0].logprob == -0.5


@pytest.mark.parametrize(
    ("finish", "status", "details"),
    [
        (finished("stop"), "completed", None),
        (finished("length"), "incomplete", {"reason": "max_output_tokens"}),
        (finished("cancelled"), "incomplete", {"reason": None}),
    ],
)
def test_an_answer_that_is_cut_short_says_so(
    finish: Finished, status: str, details: object
) -> None:
    events = events_of(TextPart("x"), finish=finish)
    body = encode_response(CONTEXT, parse(), [collect(events)])
    assert (body["status"], body["incomplete_details"]) == (status, details)
    last = read_events(stream(ResponseEncoder(CONTEXT, parse()), events))[-1]
    assert last[0] == f"response.{status}" and last[1]["response"] == body


def test_an_empty_answer_has_an_empty_message() -> None:
    client = Wire(events_of()).openai()
    assert client.responses.create(model="tiny", input="x").output[0].type == "message"
    with client.responses.stream(model="tiny", input="x") as streamed:
        assert streamed.get_final_response().output_text == ""


def test_the_answer_can_be_sent_back() -> None:
    answer = Wire(CALLING).openai().responses.create(model="tiny", input="x", tools=[WEATHER])
    wire = Wire(events_of(TextPart("It rains.")))
    result: Any = {"type": "function_call_output", "call_id": "call_a", "output": "rain"}
    wire.openai().responses.create(
        model="tiny",
        input=[{"role": "user", "content": "x"}, *answer.output, result],  # type: ignore[list-item]
    )
    _, said, told = wire.requests[0].messages
    assert said.thinking == "Let me see." and said.content == "I look it up."
    assert said.tool_calls == collect(CALLING).calls
    assert told == Message("tool", "rain", tool_name="weather", tool_call_id="call_a")


def test_keeping_alive_is_a_comment() -> None:
    assert read_events(ResponseEncoder(CONTEXT, parse()).keep_alive()) == []


# ---- errors


@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_an_error_on_the_way_is_raised(n_before: int) -> None:
    error = ApiError("internal", "it broke", code="defect")
    wire = Wire(events_of(TextPart("Hel"), TextPart("lo")), error)
    wire.error_after = n_before
    seen = []
    with (
        pytest.raises(openai.APIError, match="it broke") as caught,
        wire.openai().responses.stream(model="tiny", input="x") as streamed,
    ):
        seen += [event.type for event in streamed]
        streamed.get_final_response()
    assert caught.value.code == "defect"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("internal", "server_error"),
        ("unavailable", "server_error"),
        ("rate_limit", "rate_limit_exceeded"),
        ("context_overflow", "invalid_prompt"),
    ],
)
def test_a_failed_answer_says_what_failed(kind: ErrorKind, code: str) -> None:
    encoder = ResponseEncoder(CONTEXT, parse())
    head = b"".join(encoder.feed(0, event) for event in events_of(TextPart("Hel"))[:2])
    (failed, error) = read_events(encoder.fail(ApiError(kind, "no", param="input")))
    for name, event in (failed, error):
        assert EVENT.validate_python(event).type == name
    response = Response.model_validate(failed[1]["response"])
    assert failed[0] == "response.failed" and response.status == "failed"
    assert response.error is not None
    assert (response.error.code, response.error.message) == (code, "no")
    assert error[0] == "error" and error[1]["param"] == "input"
    numbers = [event["sequence_number"] for _, event in [*read_events(head), failed, error]]
    assert numbers == list(range(len(numbers)))


def test_the_client_raises_what_is_refused() -> None:
    with pytest.raises(openai.BadRequestError, match="stateless"):
        Wire().openai().responses.create(model="t", input="x", previous_response_id="r")

"""Ollama's dialect: what is read from requests, and what is refused."""

from __future__ import annotations

import json

import jsonschema
import pytest
from hypothesis import given

from llmrun.chat.messages import Message, ToolCall
from llmrun.server import wire_ollama
from llmrun.server.types import (
    ApiError,
    ChatRequest,
    EmbeddingRequest,
    SamplingWishes,
    TextRequest,
    Tool,
)
from llmrun.server.wire_ollama import (
    action_of,
    encode_error,
    parse_chat,
    parse_embed,
    parse_embedding,
    parse_generate,
    parse_show,
    plain_name,
)
from tests.fakes.any_json import ANY_JSON, bodies

HI = {"role": "user", "content": "hi"}


def chat(**members: object) -> ChatRequest:
    return parse_chat({"model": "m", "messages": [HI], **members})


def refused(parse: object, body: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body)  # type: ignore[operator]
    assert caught.value.kind == "invalid_request"
    assert encode_error(caught.value).body == {"error": caught.value.message}
    return caught.value


# ---- names


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("qwen3", "qwen3"),
        ("qwen3:latest", "qwen3"),
        ("qwen3:4b", "qwen3:4b"),
        ("org/repo:Q4_K_M", "org/repo:Q4_K_M"),
        (":latest", ""),
        ("latest", "latest"),
    ],
)
def test_the_tag_latest_means_no_tag(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_every_endpoint_reads_the_name_alike() -> None:
    body = {"model": " m:latest "}
    assert parse_chat(body).generation.model == "m"
    assert parse_generate(body).generation.model == "m"
    assert parse_embed(body).model == "m"
    assert parse_embedding(body).model == "m"
    assert parse_show(body) == "m"
    assert parse_show({"name": "older"}) == "older"


@pytest.mark.parametrize(
    "parse", [parse_chat, parse_generate, parse_embed, parse_embedding, parse_show]
)
@pytest.mark.parametrize("body", [{}, {"model": ""}, {"model": ":latest"}, {"model": None}])
def test_a_model_is_required(parse: object, body: object) -> None:
    assert refused(parse, body).param == "model"


# ---- what chat and generate have alike


def test_streaming_is_on_by_default() -> None:
    assert chat().generation.stream
    assert not chat(stream=False).generation.stream
    assert parse_generate({"model": "m", "prompt": "p"}).generation.stream
    assert not parse_generate({"model": "m", "prompt": "p", "stream": False}).generation.stream


def test_options_become_sampling_wishes() -> None:
    options = {
        "num_ctx": 8192,
        "num_predict": 12,
        "seed": 7,
        "temperature": 0,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.7,
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "presence_penalty": 1.5,
        "frequency_penalty": -0.5,
        "stop": ["a", "", "b"],
        "num_gpu": 99,
        "mirostat": "whatever",
    }
    found = chat(options=options).generation
    assert found.sampling == SamplingWishes(
        temperature=0.0,
        top_k=20,
        top_p=0.9,
        min_p=0.05,
        typical_p=0.7,
        repeat_penalty=1.1,
        repeat_last_n=-1,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        seed=7,
    )
    assert (found.n_ctx, found.max_tokens, found.stop) == (8192, 12, ("a", "b"))


@pytest.mark.parametrize("options", [None, {}, {"seed": -1, "num_ctx": 0, "temperature": None}])
def test_what_is_not_said_is_left_to_the_model(options: object) -> None:
    found = chat(options=options).generation
    assert found.sampling == SamplingWishes()
    assert (found.n_ctx, found.max_tokens, found.stop, found.n) == (None, None, (), 1)
    assert (found.n_logprobs, found.json_schema, found.keep_alive_s) == (None, None, None)


@pytest.mark.parametrize(
    ("n_predict", "n"), [(-1, None), (-2, None), (0, None), (1, 1), (4096, 4096), (5.0, 5)]
)
def test_num_predict(n_predict: float, n: int | None) -> None:
    assert chat(options={"num_predict": n_predict}).generation.max_tokens == n


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"options": []}, "options"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"temperature": float("nan")}}, "options.temperature"),
        ({"options": {"temperature": True}}, "options.temperature"),
        ({"options": {"num_predict": -3}}, "options.num_predict"),
        ({"options": {"num_predict": 10**400}}, "options.num_predict"),
        ({"options": {"num_ctx": -1}}, "options.num_ctx"),
        ({"options": {"seed": 1.5}}, "options.seed"),
        ({"options": {"seed": 2**64}}, "options.seed"),
        ({"options": {"top_p": 1.5}}, "options.top_p"),
        ({"options": {"repeat_penalty": 0}}, "options.repeat_penalty"),
        ({"options": {"stop": 3}}, "options.stop"),
        ({"options": {"stop": ["x"] * 17}}, "options.stop"),
        ({"options": {"stop": ["a", 3]}}, "options.stop[1]"),
        ({"options": {"stop": ["x" * 5000]}}, "options.stop[0]"),
        ({"model": 3}, "model"),
        ({"model": "m" * 1000}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"think": "hard"}, "think"),
        ({"think": 1}, "think"),
        ({"think": ["low"]}, "think"),
        ({"format": "yaml"}, "format"),
        ({"format": "{"}, "format"),
        ({"format": ["json"]}, "format"),
        ({"format": {"enum": ["x" * 300_000]}}, "format"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"keep_alive": True}, "keep_alive"),
        ({"keep_alive": 1e300}, "keep_alive"),
        ({"keep_alive": {}}, "keep_alive"),
        ({"images": ["aGk="]}, "images"),
    ],
)
def test_what_both_refuse(members: dict[str, object], param: str) -> None:
    generate = {"model": "m", "prompt": "p", **members}
    assert refused(parse_generate, generate).param == param
    if param != "images":
        assert refused(parse_chat, {"model": "m", "messages": [HI], **members}).param == param


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ("", None),
        ("json", {"type": "object"}),
        ({"type": "array"}, {"type": "array"}),
        (' {"type": "array"}', {"type": "array"}),
        ({}, {}),
    ],
)
def test_format_is_a_schema(value: object, schema: object) -> None:
    found = chat(format=value).generation.json_schema
    assert (None if found is None else json.loads(found)) == schema


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0),
        (300, 300),
        (1.5, 1.5),
        ("0", 0),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("250ms", 0.25),
        ("24h", 86400),
    ],
)
def test_keep_alive(value: object, seconds: float) -> None:
    assert chat(keep_alive=value).generation.keep_alive_s == pytest.approx(seconds)


@pytest.mark.parametrize("value", [-1, -0.5, "-1", "-1m"])
def test_a_negative_time_keeps_it_for_good(value: object) -> None:
    found = chat(keep_alive=value).generation.keep_alive_s
    assert found is not None
    assert found < 0


@pytest.mark.parametrize(
    ("value", "think", "effort"),
    [
        (None, None, None),
        (True, True, None),
        (False, False, None),
        ("low", True, "low"),
        ("medium", True, "medium"),
        ("high", True, "high"),
    ],
)
def test_think(value: object, think: bool | None, effort: str | None) -> None:
    found = chat(think=value)
    assert (found.think, found.reasoning_effort) == (think, effort)
    work = parse_generate({"model": "m", "prompt": "p", "think": value}).work
    assert isinstance(work, ChatRequest)
    assert (work.think, work.reasoning_effort) == (think, effort)


@pytest.mark.parametrize(
    ("members", "n"),
    [
        ({}, None),
        ({"top_logprobs": 3}, None),
        ({"logprobs": False, "top_logprobs": 3}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_logprobs(members: dict[str, object], n: int | None) -> None:
    assert chat(**members).generation.n_logprobs == n


# ---- chat


def test_messages_with_thinking_calls_and_results() -> None:
    messages = [
        {"role": "System", "content": "be short"},
        {"role": "user", "content": "weather?", "images": []},
        {
            "role": "assistant",
            "content": None,
            "thinking": "look it up",
            "tool_calls": [
                {"id": "call_1", "function": {"name": "look", "arguments": {"city": "Rome"}}},
                {"type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}},
                {"function": {"name": "now"}},
            ],
        },
        {"role": "tool", "tool_name": "look", "content": "sun", "tool_call_id": "call_1"},
        {"role": "tool", "name": "sum", "content": "1"},
    ]
    found = parse_chat({"model": "m", "messages": messages})
    assert found.messages == (
        Message("system", "be short"),
        Message("user", "weather?"),
        Message(
            "assistant",
            "",
            thinking="look it up",
            tool_calls=(
                ToolCall("look", {"city": "Rome"}, "call_1"),
                ToolCall("sum", {"a": 1}),
                ToolCall("now", {}),
            ),
        ),
        Message("tool", "sun", tool_name="look", tool_call_id="call_1"),
        Message("tool", "1", tool_name="sum"),
    )
    assert not found.continues


def test_a_result_without_a_name_gets_that_of_its_call() -> None:
    calls = [
        {"id": f"c{name}", "function": {"name": name, "arguments": {}}} for name in ("a", "b", "c")
    ]
    messages = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "of b", "tool_call_id": "cb"},
        {"role": "tool", "content": "of a"},
        {"role": "tool", "content": "of c"},
        {"role": "tool", "content": "of none"},
    ]
    found = parse_chat({"model": "m", "messages": messages})
    assert [message.tool_name for message in found.messages[1:]] == ["b", "a", "c", None]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("", {}),
        ('{"a": [1]}', {"a": [1]}),
        ('{"a": ', {"raw": '{"a": '}),
        ("[1, 2]", {"raw": [1, 2]}),
        ('{"a": NaN}', {"raw": '{"a": NaN}'}),
        ("[" * 5000, {"raw": "[" * 5000}),
    ],
)
def test_arguments_as_text_become_an_object_whatever_they_are(
    arguments: str, value: object
) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    found = chat(messages=[{"role": "assistant", "content": "", "tool_calls": [call]}])
    assert found.messages[0].tool_calls == (ToolCall("f", value),)  # type: ignore[arg-type]


def test_an_answer_that_has_begun_is_continued() -> None:
    begun = {"role": "assistant", "content": "Sure, "}
    assert chat(messages=[HI, begun]).continues
    assert not chat(messages=[begun, HI]).continues
    assert not chat(messages=[HI, {**begun, "content": ""}]).continues


def test_tools() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    found = chat(
        tools=[
            {
                "type": "function",
                "function": {"name": "look", "description": "looks", "parameters": parameters},
            },
            {"function": {"name": "now"}},
        ]
    )
    assert found.tools == (Tool("look", "looks", parameters), Tool("now"))
    assert found.tool_choice.mode == "auto"


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"messages": {}}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [HI] * 5000}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [HI, {"role": "user", "content": ["hi"]}]}, "messages[1].content"),
        ({"messages": [{**HI, "images": ["aGk="]}]}, "messages[0].images"),
        ({"messages": [{**HI, "thinking": 3}]}, "messages[0].thinking"),
        ({"messages": [{**HI, "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        (
            {"messages": [{**HI, "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        (
            {"messages": [{**HI, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name"),
        (
            {"tools": [{"function": {"name": "f", "parameters": "{}"}}]},
            "tools[0].function.parameters",
        ),
    ],
)
def test_what_chat_refuses(members: dict[str, object], param: str) -> None:
    error = refused(parse_chat, {"model": "m", "messages": [HI], **members})
    assert error.param == param
    assert param in error.message


# ---- generate


def test_a_prompt_becomes_a_chat() -> None:
    found = parse_generate({"model": "m", "prompt": "p", "system": "s", "template": ""})
    assert action_of(found) == "reply"
    assert isinstance(found.work, ChatRequest)
    assert found.work.messages == (Message("system", "s"), Message("user", "p"))
    assert found.generation is found.work.generation


def test_raw_text_and_gaps_get_no_template() -> None:
    raw = parse_generate({"model": "m", "prompt": "p", "raw": True}).work
    assert isinstance(raw, TextRequest)
    assert (raw.prompts, raw.suffix) == (("p",), None)
    gap = parse_generate({"model": "m", "prompt": "def f(", "suffix": "return 1"}).work
    assert isinstance(gap, TextRequest)
    assert (gap.prompts, gap.suffix) == (("def f(",), "return 1")


def test_context_of_earlier_turns_is_ignored() -> None:
    found = parse_generate({"model": "m", "prompt": "p", "context": [1, 2, 3]})
    assert found == parse_generate({"model": "m", "prompt": "p"})


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"prompt": ["p"]}, "prompt"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": "1"}, "context"),
        ({"context": [1, "2"]}, "context[1]"),
        ({"raw": 1}, "raw"),
        ({"raw": True, "system": "s"}, "raw"),
        ({"raw": True, "context": [1]}, "raw"),
    ],
)
def test_what_generate_refuses(members: dict[str, object], param: str) -> None:
    assert refused(parse_generate, {"model": "m", "prompt": "p", **members}).param == param


# ---- to load and to unload


@pytest.mark.parametrize(
    ("members", "action"),
    [
        ({}, "load"),
        ({"keep_alive": "1h"}, "load"),
        ({"keep_alive": -1}, "load"),
        ({"keep_alive": 0}, "unload"),
        ({"keep_alive": "0"}, "unload"),
        ({"keep_alive": "0s"}, "unload"),
    ],
)
def test_nothing_to_reply_to_means_load_or_unload(members: dict[str, object], action: str) -> None:
    for empty in ({}, {"messages": []}, {"messages": None}):
        assert action_of(parse_chat({"model": "m", **empty, **members})) == action
    for empty in ({}, {"prompt": ""}, {"raw": True}, {"suffix": "s"}, {"system": "s"}):
        assert action_of(parse_generate({"model": "m", **empty, **members})) == action
    assert action_of(parse_chat({"model": "m", "messages": [HI], **members})) == "reply"
    assert action_of(parse_generate({"model": "m", "prompt": "p", **members})) == "reply"


# ---- embeddings


@pytest.mark.parametrize(
    ("value", "inputs"), [("a", ("a",)), (["a", "b"], ("a", "b")), ("", ()), ([], ()), (None, ())]
)
def test_embed_inputs(value: object, inputs: tuple[str, ...]) -> None:
    assert parse_embed({"model": "m", "input": value}) == EmbeddingRequest(
        "m", inputs, truncate=True
    )


def test_embed_options() -> None:
    body = {"model": "m", "input": "a", "truncate": False, "dimensions": 64, "keep_alive": "1m"}
    assert parse_embed(body) == EmbeddingRequest("m", ("a",), 64, truncate=False, keep_alive_s=60)
    assert parse_embed({**body, "dimensions": 0}).dimensions is None
    older = {"model": "m", "prompt": "a", "keep_alive": 5}
    assert parse_embedding(older) == EmbeddingRequest("m", ("a",), truncate=True, keep_alive_s=5)
    assert parse_embedding({"model": "m"}).inputs == ()


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"input": 3}, "input"),
        ({"input": ["a", 3]}, "input[1]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [""]}, "input[0]"),
        ({"input": ["a"] * 3000}, "input"),
        ({"input": "a", "dimensions": -1}, "dimensions"),
        ({"input": "a", "truncate": 0}, "truncate"),
    ],
)
def test_what_embed_refuses(members: dict[str, object], param: str) -> None:
    assert refused(parse_embed, {"model": "m", **members}).param == param


# ---- all

MEMBERS = [
    "model",
    "messages",
    "role",
    "content",
    "thinking",
    "images",
    "tool_calls",
    "tool_name",
    "function",
    "name",
    "arguments",
    "tools",
    "parameters",
    "format",
    "options",
    "num_predict",
    "seed",
    "stop",
    "think",
    "keep_alive",
    "prompt",
    "suffix",
    "system",
    "template",
    "context",
    "raw",
    "input",
    "dimensions",
    "stream",
    "logprobs",
]


@given(ANY_JSON | bodies(MEMBERS))
def test_any_json_is_a_request_or_an_api_error(body: object) -> None:
    for parse in (parse_chat, parse_generate, parse_embed, parse_embedding, parse_show):
        try:
            parse(body)
        except ApiError as error:
            assert error.kind == "invalid_request"


@given(bodies(MEMBERS))
def test_any_members_beside_a_model_and_a_message(body: object) -> None:
    members = body if isinstance(body, dict) else {"messages": body}
    for parse in (parse_chat, parse_generate, parse_embed, parse_embedding):
        try:
            parse({"messages": [HI], "prompt": "p", **members, "model": "m"})
        except ApiError as error:
            assert error.kind == "invalid_request"
            assert error.param is not None


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (
            wire_ollama.SCHEMA_CHAT,
            {
                "model": "m",
                "messages": [HI],
                "tools": [{"function": {"name": "f"}}],
                "think": "low",
                "format": {},
                "keep_alive": "5m",
                "options": {"stop": "x", "seed": -1},
            },
        ),
        (wire_ollama.SCHEMA_GENERATE, {"model": "m", "prompt": "p", "raw": True, "think": False}),
        (wire_ollama.SCHEMA_EMBED, {"model": "m", "input": ["a"], "keep_alive": 0}),
        (wire_ollama.SCHEMA_EMBEDDING, {"model": "m", "prompt": "a"}),
        (wire_ollama.SCHEMA_SHOW, {"model": "m"}),
    ],
)
def test_the_schemas_are_true(schema: dict[str, object], body: object) -> None:
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    check.validate(body)
    with pytest.raises(jsonschema.ValidationError):
        check.validate({})

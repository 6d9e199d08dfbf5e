"""Ollama's dialect: answers, as the real client reads them, streamed and not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import httpx
import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.chat.messages import ToolCall
from llmrun.engine.types import TokenLogprob, Usage
from llmrun.server import wire_ollama
from llmrun.server.types import (
    AnswerContext,
    ApiError,
    CallArguments,
    CallStarted,
    ChatRequest,
    Finished,
    LoadedCard,
    ModelCard,
    Reply,
    ReplyEvent,
    Started,
    StreamEncoder,
    TextPart,
    ThinkingPart,
)
from llmrun.server.wire_ollama import ChatEncoder, GenerateEncoder, parse_chat, parse_generate

CONTEXT = AnswerContext("id", 1_700_000_000.25, "shown")
FINISH = Finished(
    "stop",
    Usage(n_prompt=12, n_completion=34, n_cached=5),
    total_s=2.5,
    load_s=0.25,
    prompt_s=0.5,
    decode_s=1.75,
)
CHAT = parse_chat({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
GENERATE = parse_generate({"model": "m", "prompt": "hi"})
HI = [{"role": "user", "content": "hi"}]


def look(city: str) -> str:
    """Look at a city.

    Args:
        city: which
    """
    return city


def events(reply: Reply, cut: int = 3) -> list[ReplyEvent]:
    """A reply as it would be streamed, in pieces of `cut` characters."""

    def pieces(text: str) -> Iterator[str]:
        return (text[i : i + cut] for i in range(0, len(text), cut))

    found: list[ReplyEvent] = [Started(reply.finish.usage.n_prompt)]
    found += [ThinkingPart(piece) for piece in pieces(reply.thinking)]
    found += [TextPart(piece) for piece in pieces(reply.text)]
    if reply.logprobs:
        found.append(TextPart("", reply.logprobs))
    for i, (call, text) in enumerate(zip(reply.calls, reply.arguments_texts, strict=True)):
        found.append(CallStarted(i, call.id or "", call.name))
        found += [CallArguments(i, piece) for piece in pieces(text)]
    return [*found, reply.finish]


def stream(encoder: StreamEncoder, parts: Sequence[ReplyEvent]) -> bytes:
    data = b"".join(encoder.keep_alive() + encoder.feed(0, part) for part in parts)
    return data + encoder.finish()


def lines(data: bytes) -> list[dict[str, object]]:
    assert data.endswith(b"\n")
    found = [json.loads(line) for line in data.decode().splitlines()]
    assert all(isinstance(line, dict) for line in found)
    return found


def client_of(answer: Callable[[str, object], httpx.Response]) -> ollama.Client:
    def respond(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        return answer(request.url.path, body)

    return ollama.Client("http://127.0.0.1:1", transport=httpx.MockTransport(respond))


def serve(reply: Reply, sent: list[object] | None = None) -> ollama.Client:
    """A client of a server whose one answer is `reply`."""

    def answer(path: str, body: object) -> httpx.Response:
        if sent is not None:
            sent.append(body)
        encoder: StreamEncoder
        if path == "/api/chat":
            chat = parse_chat(body)
            if not chat.generation.stream:
                return httpx.Response(200, json=wire_ollama.encode_chat(CONTEXT, chat, [reply]))
            encoder = ChatEncoder(CONTEXT, chat)
        else:
            request = parse_generate(body)
            if not request.generation.stream:
                whole = wire_ollama.encode_generate(CONTEXT, request, [reply])
                return httpx.Response(200, json=whole)
            encoder = GenerateEncoder(CONTEXT, request)
        return httpx.Response(200, content=stream(encoder, events(reply)))

    return client_of(answer)


def check_end(last: ollama.ChatResponse | ollama.GenerateResponse, reason: str) -> None:
    assert last.done is True
    assert (last.done_reason, last.model) == (reason, "shown")
    assert last.created_at == "2023-11-14T22:13:20.250000Z"
    assert (last.total_duration, last.load_duration) == (2_500_000_000, 250_000_000)
    assert (last.prompt_eval_count, last.prompt_eval_duration) == (12, 500_000_000)
    assert (last.eval_count, last.eval_duration) == (34, 1_750_000_000)


# ---- chat and generate


def test_the_real_client_chats() -> None:
    reply = Reply(FINISH, "Hello wörld\u2028\x85 !", "let me\nsee")
    with serve(reply) as client:
        whole = client.chat("m", HI)
        parts = list(client.chat("m", HI, stream=True))
    assert (whole.message.content, whole.message.thinking) == (reply.text, reply.thinking)
    assert whole.message.tool_calls is None
    check_end(whole, "stop")
    assert "".join(part.message.content or "" for part in parts) == reply.text
    assert "".join(part.message.thinking or "" for part in parts) == reply.thinking
    assert {part.message.role for part in parts} == {"assistant"}
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    check_end(parts[-1], "stop")


def test_the_real_client_generates() -> None:
    reply = Reply(FINISH, "Hello wörld", "let me see")
    with serve(reply) as client:
        whole = client.generate("m", "hi")
        parts = list(client.generate("m", "hi", stream=True))
    assert (whole.response, whole.thinking) == (reply.text, reply.thinking)
    check_end(whole, "stop")
    assert "".join(part.response or "" for part in parts) == reply.text
    assert "".join(part.thinking or "" for part in parts) == reply.thinking
    check_end(parts[-1], "stop")


def test_what_the_real_client_sends_is_read() -> None:
    sent: list[object] = []
    with serve(Reply(FINISH, "x"), sent) as client:
        client.chat(
            "m:latest",
            [*HI, ollama.Message(role="tool", content="sun", tool_name="look")],
            tools=[look],
            think="high",
            logprobs=True,
            top_logprobs=2,
            format={"type": "object"},
            options=ollama.Options(temperature=0.5, num_ctx=4096, stop=["x"]),
            keep_alive="5m",
        )
    request = parse_chat(sent[0])
    assert request.tools[0].name == "look"
    assert "city" in json.dumps(request.tools[0].parameters)
    assert request.messages[1].tool_name == "look"
    generation = request.generation
    assert (generation.model, generation.n_ctx, generation.stop) == ("m", 4096, ("x",))
    assert (generation.n_logprobs, generation.keep_alive_s) == (2, 300)
    assert (request.think, request.reasoning_effort) == (True, "high")


def test_calls_come_whole_with_objects_as_arguments() -> None:
    texts = ('{"city": "Rome", "days": [1, 2]}', "", '{"city": "Par')
    reply = Reply(
        Finished("tool_calls", FINISH.usage),
        "Let me look.",
        calls=(
            ToolCall("look", {}, "call_a"),
            ToolCall("now", {}, "call_b"),
            ToolCall("look", {}, "call_c"),
        ),
        arguments_texts=texts,
    )
    wanted = [
        ("look", {"city": "Rome", "days": [1, 2]}),
        ("now", {}),
        ("look", {"raw": '{"city": "Par'}),
    ]
    with serve(reply) as client:
        whole = client.chat("m", HI, tools=[look])
        parts = list(client.chat("m", HI, tools=[look], stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    for found in (whole.message.tool_calls or (), calls):
        assert [(call.function.name, call.function.arguments) for call in found] == wanted
    assert [len(part.message.tool_calls or ()) for part in parts if part.message.tool_calls] == [
        1,
        1,
        1,
    ]
    assert parts[-1].done_reason == whole.done_reason == "stop"
    raw = lines(stream(ChatEncoder(CONTEXT, CHAT), events(reply)))
    ids = [
        line["message"]["tool_calls"][0]["id"] for line in raw if "tool_calls" in line["message"]
    ]  # type: ignore
    assert ids == ["call_a", "call_b", "call_c"]


def test_a_call_is_told_as_soon_as_the_next_part_comes() -> None:
    encoder = ChatEncoder(CONTEXT, CHAT)
    assert encoder.feed(0, CallStarted(0, "call_a", "look")) == b""
    assert encoder.feed(0, CallArguments(0, '{"city"')) == b""
    assert encoder.feed(0, CallArguments(0, ': "Rome"}')) == b""
    [call, text] = lines(encoder.feed(0, TextPart("and")))
    assert call["message"]["tool_calls"][0]["function"] == {  # type: ignore[index]
        "index": 0,
        "name": "look",
        "arguments": {"city": "Rome"},
    }
    assert text["message"]["content"] == "and"  # type: ignore[index]
    assert b"tool_calls" not in encoder.feed(0, FINISH)


def test_without_the_texts_of_the_arguments_the_objects_are_taken() -> None:
    reply = Reply(FINISH, calls=(ToolCall("look", {"city": "Rome"}),))
    body = wire_ollama.encode_chat(CONTEXT, CHAT, [reply])
    assert body["message"]["tool_calls"] == [  # type: ignore[index]
        {"function": {"index": 0, "name": "look", "arguments": {"city": "Rome"}}}
    ]


@pytest.mark.parametrize(
    ("reason", "word"),
    [("stop", "stop"), ("length", "length"), ("tool_calls", "stop"), ("cancelled", "length")],
)
def test_done_reason(reason: str, word: str) -> None:
    reply = Reply(Finished(reason, FINISH.usage), "x")  # type: ignore[arg-type]
    with serve(reply) as client:
        assert client.chat("m", HI).done_reason == word
        assert list(client.generate("m", "hi", stream=True))[-1].done_reason == word


def test_logprobs() -> None:
    euro = "€".encode()
    logprobs = (
        TokenLogprob(1, b"Hi", -0.25, ((1, b"Hi", -0.25), (2, b"Ho", -math.inf))),
        TokenLogprob(3, euro[:2], -1.5),
    )
    options = {"logprobs": True, "top_logprobs": 2}
    reply = Reply(FINISH, "Hi", logprobs=logprobs)
    with serve(reply) as client:
        found = [
            client.chat("m", HI, **options).logprobs,
            client.generate("m", "hi", **options).logprobs,
            [
                each
                for part in client.chat("m", HI, stream=True, **options)
                for each in part.logprobs or ()
            ],
            [
                each
                for part in client.generate("m", "hi", stream=True, **options)
                for each in part.logprobs or ()
            ],
        ]
        assert client.chat("m", HI).logprobs is None
    for each in found:
        assert each is not None
        assert [(one.token, one.logprob) for one in each] == [("Hi", -0.25), ("\ufffd", -1.5)]
        top = each[0].top_logprobs or ()
        assert [(one.token, one.logprob) for one in top] == [("Hi", -0.25), ("Ho", -9999.0)]
    raw = wire_ollama.encode_chat(CONTEXT, parse_chat({"model": "m", **options}), [reply])
    assert [each["bytes"] for each in raw["logprobs"]] == [[72, 105], [0xE2, 0x82]]  # type: ignore


@pytest.mark.parametrize("action", ["load", "unload"])
def test_loading_is_told_in_one_object(action: str) -> None:
    def answer(path: str, body: object) -> httpx.Response:
        if path == "/api/chat":
            request: object = parse_chat(body)
            encode = wire_ollama.encode_idle_chat
        else:
            request, encode = parse_generate(body), wire_ollama.encode_idle_generate
        found = wire_ollama.action_of(request)  # type: ignore[arg-type]
        assert found == action
        return httpx.Response(200, json=encode(CONTEXT, found))

    keep_alive = 0 if action == "unload" else None
    with client_of(answer) as client:
        generated = client.generate("m", keep_alive=keep_alive)
        chatted = client.chat("m", keep_alive=keep_alive)
        [streamed] = client.chat("m", [], keep_alive=keep_alive, stream=True)
    assert (generated.response, generated.done_reason) == ("", action)
    assert generated.done is True
    assert (chatted.message.content, chatted.done_reason) == ("", action)
    assert streamed == chatted


# ---- failures


def test_errors_are_a_text_with_a_status() -> None:
    errors = [
        ApiError("not_found", "model 'm' not found", code="model_not_found"),
        ApiError("rate_limit", "busy", retry_after_s=1.2),
        ApiError("internal", "broken"),
    ]
    answers = [wire_ollama.encode_error(error) for error in errors]
    assert [found.status for found in answers] == [404, 429, 500]
    assert [dict(found.headers) for found in answers] == [{}, {"Retry-After": "2"}, {}]
    found = answers[0]
    with (
        client_of(lambda path, body: httpx.Response(found.status, json=found.body)) as client,
        pytest.raises(ollama.ResponseError) as caught,
    ):
        client.chat("m", HI)
    assert (caught.value.error, caught.value.status_code) == ("model 'm' not found", 404)


@pytest.mark.parametrize(
    "encoder", [ChatEncoder(CONTEXT, CHAT), GenerateEncoder(CONTEXT, GENERATE)]
)
def test_a_stream_that_fails_says_so(encoder: StreamEncoder) -> None:
    data = encoder.feed(0, TextPart("half")) + encoder.fail(ApiError("internal", "it broke"))
    seen: list[object] = []
    with (
        client_of(lambda path, body: httpx.Response(200, content=data)) as client,
        pytest.raises(ollama.ResponseError, match="it broke"),
    ):
        for part in client.generate("m", "hi", stream=True):
            seen.append(part)  # noqa: PERF402
    assert len(seen) == 1


# ---- properties

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
CALLS = st.lists(st.tuples(TEXT, TEXT | st.just('{"a": [1, "x"]}')), max_size=3)


@given(TEXT, TEXT, CALLS, st.integers(1, 5))
def test_a_stream_and_a_whole_answer_say_the_same(
    text: str, thinking: str, calls: list[tuple[str, str]], cut: int
) -> None:
    reply = Reply(
        FINISH,
        text,
        thinking,
        tuple(ToolCall(name, {}, f"call_{i}") for i, (name, _) in enumerate(calls)),
        tuple(arguments for _, arguments in calls),
    )
    found = lines(stream(ChatEncoder(CONTEXT, CHAT), events(reply, cut)))
    messages: list[dict[str, object]] = [line["message"] for line in found]  # type: ignore
    put_together: dict[str, object] = {
        "role": "assistant",
        "content": "".join(str(message["content"]) for message in messages),
    }
    if thinking:
        put_together["thinking"] = "".join(str(each.get("thinking", "")) for each in messages)
    if calls:
        put_together["tool_calls"] = [
            call
            for message in messages
            for call in message.get("tool_calls", ())  # type: ignore[attr-defined]
        ]
    whole = wire_ollama.encode_chat(CONTEXT, CHAT, [reply])
    assert found[-1] | {"message": put_together} == json.loads(json.dumps(whole))
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]


PARTS = st.one_of(
    st.builds(TextPart, st.text(max_size=5)),
    st.builds(ThinkingPart, st.text(max_size=5)),
    st.builds(CallStarted, st.integers(0, 3), st.text(max_size=4), st.text(max_size=4)),
    st.builds(CallArguments, st.integers(0, 3), st.text(max_size=6)),
)


@given(st.lists(PARTS, max_size=12), st.text(max_size=4))
def test_any_events_make_lines_of_json(parts: list[ReplyEvent], model: str) -> None:
    context = AnswerContext("id", 0.0, model)
    request: ChatRequest = CHAT
    for encoder in (ChatEncoder(context, request), GenerateEncoder(context, GENERATE)):
        found = lines(stream(encoder, [*parts, FINISH]))
        assert found[-1]["done"] is True
        assert all(set(line) >= {"model", "created_at", "done"} for line in found)


# ---- models

CARD = ModelCard(
    name="qwen3:4b",
    n_bytes=2_500_000_000,
    n_params=4_022_468_096,
    quant="Q4_K_M",
    architecture="qwen3",
    n_ctx=40960,
    modified_s=1_700_000_000.0,
    digest="sha256:" + "ab" * 32,
    can_think=True,
    can_call_tools=True,
    chat_template="{{ messages }}",
    license="apache-2.0",
)
BARE = ModelCard("unread", 7, can_chat=False, can_embed=True)


def model_client() -> ollama.Client:
    def answer(path: str, body: object) -> httpx.Response:
        loaded = [
            LoadedCard(CARD, 8192, 4, 3_000_000_000, 2_000_000_000, expires_s=1_700_000_300.0),
            LoadedCard(BARE, 512, 1, 9),
        ]
        cards = {card.name: card for card in (CARD, BARE)}
        found = {
            "/api/tags": lambda: wire_ollama.encode_tags([CARD, BARE]),
            "/api/ps": lambda: wire_ollama.encode_ps(loaded),
            "/api/show": lambda: wire_ollama.encode_show(cards[wire_ollama.parse_show(body)]),
        }[path]()
        return httpx.Response(200, json=found)

    return client_of(answer)


def test_tags() -> None:
    with model_client() as client:
        [card, bare] = client.list().models
    assert card.model == "qwen3:4b"
    assert (card.size, card.digest) == (2_500_000_000, "ab" * 32)
    assert card.modified_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    details = card.details
    assert details is not None
    assert (details.format, details.family, details.families) == ("gguf", "qwen3", ["qwen3"])
    assert (details.parameter_size, details.quantization_level) == ("4.0B", "Q4_K_M")
    # Clients cut 12 digits off it.
    assert bare.digest is not None
    assert len(bare.digest) == 64


@pytest.mark.parametrize(
    ("n_params", "size"),
    [(0, ""), (999, "999"), (134_515_008, "135M"), (7_615_616_512, "7.6B"), (10**12, "1.0T")],
)
def test_sizes_are_written_as_people_say_them(n_params: int, size: str) -> None:
    body = wire_ollama.encode_show(ModelCard("m", 1, n_params=n_params))
    assert body["details"]["parameter_size"] == size  # type: ignore[index]


def test_show() -> None:
    with model_client() as client:
        card, bare = client.show("qwen3:4b"), client.show("unread:latest")
    assert card.capabilities == ["completion", "tools", "thinking"]
    assert bare.capabilities == ["embedding"]
    assert (card.template, card.license) == ("{{ messages }}", "apache-2.0")
    assert card.modelinfo == {
        "general.architecture": "qwen3",
        "general.basename": "qwen3:4b",
        "general.parameter_count": 4_022_468_096,
        "qwen3.context_length": 40960,
    }
    assert bare.modelinfo is not None
    assert "unknown.context_length" not in bare.modelinfo


def test_ps() -> None:
    with model_client() as client:
        [card, bare] = client.ps().models
    assert (card.name, card.model, card.context_length) == ("qwen3:4b", "qwen3:4b", 8192)
    assert (card.size, card.size_vram) == (3_000_000_000, 2_000_000_000)
    assert card.expires_at == datetime(2023, 11, 14, 22, 18, 20, tzinfo=UTC)
    # One that stays has a date so far away that clients say "Forever".
    assert bare.expires_at is not None
    assert bare.expires_at.year > 2200


@pytest.mark.parametrize("moment", [-1e30, math.nan, math.inf, 0.0, 1e12])
def test_a_time_that_is_no_date_is_told_all_the_same(moment: float) -> None:
    body = wire_ollama.encode_tags([ModelCard("m", 1, modified_s=moment)])
    ollama.ListResponse.model_validate(body)


def test_the_version_is_one_that_clients_accept() -> None:
    body = wire_ollama.encode_version("0.1.0")
    assert body["llmrun"] == "0.1.0"
    assert tuple(int(part) for part in str(body["version"]).split(".")) >= (0, 14, 2)


def test_the_real_client_embeds() -> None:
    def answer(path: str, body: object) -> httpx.Response:
        if path == "/api/embed":
            request = wire_ollama.parse_embed(body)
            vectors = [[0.5, -1.0] for _ in request.inputs]
            pieces = list(wire_ollama.encode_embed("shown", vectors, 7, total_s=0.5, load_s=0.25))
            assert len(pieces) == 2 + len(vectors)
            found = json.loads(b"".join(pieces))
        else:
            request = wire_ollama.parse_embedding(body)
            found = wire_ollama.encode_embedding([[0.5, -1.0] for _ in request.inputs])
        return httpx.Response(200, json=found)

    with client_of(answer) as client:
        found = client.embed("m", ["a", "b"])
        assert client.embed("m", "").embeddings == []
        assert client.embeddings("m", "a").embedding == [0.5, -1.0]
        assert client.embeddings("m").embedding == []
    assert (found.embeddings, found.model) == ([[0.5, -1.0], [0.5, -1.0]], "shown")
    assert (found.prompt_eval_count, found.total_duration, found.load_duration) == (
        7,
        500_000_000,
        250_000_000,
    )

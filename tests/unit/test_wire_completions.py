"""The OpenAI dialect's legacy completions."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion

from llmrun.engine.types import TokenLogprob, Usage
from llmrun.server.types import (
    AnswerContext,
    ApiError,
    Finished,
    Reply,
    ReplyEvent,
    Started,
    TextPart,
    TextRequest,
)
from llmrun.server.wire_completions import (
    SCHEMA_COMPLETION,
    CompletionEncoder,
    encode_completion,
    parse_completion,
)
from llmrun.server.wire_json import to_json

# A busy machine is no fault of the code.
BUSY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CONTEXT = AnswerContext("x7", 1_700_000_000.9, "tiny")
DONE = Finished("stop", Usage(n_prompt=10, n_completion=4, n_cached=6))


def parse(prompt: object = "Once", **members: Any) -> TextRequest:
    return parse_completion({"prompt": prompt, **members})


def refusal(**body: Any) -> ApiError:
    with pytest.raises(ApiError) as found:
        parse_completion(body)
    assert found.value.kind == "invalid_request"
    return found.value


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_prompts(prompt: object, expected: object) -> None:
    assert parse(prompt).prompts == expected


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        {},
        [],
        [[]],
        [None],
        [True],
        [-1],
        [1 << 31],
        [1.5],
        [1, "a"],
        ["a", 1],
        ["a", [1]],
        [[1], "a"],
        [["a"]],
        ["a"] * 129,
    ],
)
def test_bad_prompts(prompt: object) -> None:
    assert (refusal(prompt=prompt).param or "").startswith("prompt")


def test_the_generation() -> None:
    request = parse(n=2, logprobs=0, echo=False, suffix="end", stop="x", temperature=0, best_of=2)
    assert (request.generation.n, request.generation.n_logprobs) == (2, 0)
    assert (request.suffix, request.generation.stop) == ("end", ("x",))
    assert parse().generation.max_tokens == 16
    assert parse(max_tokens=-1).generation.max_tokens is None
    assert parse(max_tokens=3).generation.max_tokens == 3
    assert parse().generation.n_logprobs is None


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 3}, "best_of"),
        ({"n": 16, "prompt": ["a"] * 9}, "n"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
        ({"echo": 1}, "echo"),
        ({"suffix": 1}, "suffix"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_bad_values_name_the_field(members: dict[str, object], param: str) -> None:
    assert refusal(**{"prompt": "a", **members}).param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(BUSY)
@given(
    JSON
    | st.fixed_dictionaries(
        {"prompt": st.text(max_size=3) | st.lists(st.integers(0, 9), min_size=1) | JSON},
        optional={
            name: JSON
            for name in SCHEMA_COMPLETION["properties"]  # type: ignore[attr-defined]
            if name != "prompt"
        },
    )
)
def test_any_json_is_a_request_or_refused(value: object) -> None:
    try:
        request = parse_completion(value)
    except ApiError as error:
        assert error.kind == "invalid_request" and error.message
    else:
        assert isinstance(request, TextRequest) and request.prompts


# ---- answers


def complete(request: TextRequest, *replies: Reply) -> Completion:
    answer = encode_completion(CONTEXT, request, replies)
    return Completion.model_validate_json(to_json(answer), strict=True)


def test_a_whole_answer() -> None:
    answer = complete(parse(), Reply(DONE, " upon"))
    assert (answer.id, answer.object, answer.created) == (
        "cmpl-x7",
        "text_completion",
        1_700_000_000,
    )
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.logprobs) == (" upon", "stop", None)
    assert answer.usage is not None and answer.usage.total_tokens == 14
    assert (answer.model_extra or {})["timings"]["cache_n"] == 6


def test_echo_begins_each_answer_with_its_prompt() -> None:
    request = parse(["a", "b"], n=2, echo=True)
    answer = complete(request, *[Reply(DONE, f"-{i}") for i in range(4)])
    assert [choice.text for choice in answer.choices] == ["a-0", "a-1", "b-2", "b-3"]
    assert answer.usage is not None and answer.usage.prompt_tokens == 20


LOGPROBS = (
    TokenLogprob(1, b"caf", -0.1, ((1, b"caf", -0.1), (2, b"x", -3.0))),
    TokenLogprob(3, b"\xc3", -0.2, ((4, b"y", -0.3),)),
    TokenLogprob(5, b"\xa9", float("-inf")),
    TokenLogprob(6, b"!", -0.4),
)


def test_logprobs() -> None:
    choice = complete(parse(logprobs=2), Reply(DONE, "café!", logprobs=LOGPROBS)).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["caf", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert choice.logprobs.token_logprobs == [-0.1, -0.2, -9999.0, -0.4]
    assert choice.logprobs.text_offset == [0, 3, 3, 4]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] == {"caf": -0.1, "x": -3.0}
    assert choice.logprobs.top_logprobs[1] == {"y": -0.3, "bytes:\\xc3": -0.2}


def stream(request: TextRequest, events: list[tuple[int, ReplyEvent]]) -> list[dict[str, Any]]:
    encoder = CompletionEncoder(CONTEXT, request)
    data = b"".join([encoder.feed(i, event) for i, event in events]) + encoder.finish()
    *entries, done, end = data.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(entry.removeprefix("data: ")) for entry in entries]


def test_the_chunks_of_a_stream() -> None:
    events: list[ReplyEvent] = [Started(10), TextPart(" up"), TextPart(""), TextPart("on"), DONE]
    chunks = stream(parse(stream=True, echo=True), [(0, event) for event in events])
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Once up", "on", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert ["timings" in chunk for chunk in chunks] == [False, False, True]
    Completion.model_validate(chunks[-1])


def test_usage_comes_in_a_chunk_of_its_own() -> None:
    request = parse(["a", "b"], stream=True, stream_options={"include_usage": True})
    *before, last = stream(request, [(0, TextPart("x")), (1, DONE), (0, DONE)])
    assert all(chunk["usage"] is None and "timings" not in chunk for chunk in before)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 28


def test_timings_come_with_the_last_of_all_replies() -> None:
    request = parse(["a", "b"], n=2, stream=True)
    chunks = stream(request, [(i, DONE) for i in (3, 0, 2, 1)])
    assert ["timings" in chunk for chunk in chunks] == [False, False, False, True]
    assert chunks[-1]["timings"]["predicted_n"] == 16


def test_an_empty_reply_still_echoes() -> None:
    chunks = stream(parse(stream=True, echo=True), [(0, DONE)])
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Once", ""]


def test_a_stream_that_fails_does_not_look_whole() -> None:
    encoder = CompletionEncoder(CONTEXT, parse(stream=True))
    data = encoder.fail(ApiError("internal", "broke")) + encoder.finish()
    assert json.loads(data.removeprefix(b"data: "))["error"]["message"] == "broke"
    assert encoder.keep_alive() == b": keep-alive\n\n"


@settings(BUSY)
@given(st.lists(st.tuples(st.text(max_size=4), st.integers(0, 2)), max_size=5), st.booleans())
def test_joined_chunks_are_the_whole_answer(pieces: list[tuple[str, int]], echo: bool) -> None:
    request = parse(stream=True, **({"echo": True} if echo else {"logprobs": 1}))
    parts = [TextPart(text, LOGPROBS[:n]) for text, n in pieces]
    logprobs = tuple(found for part in parts for found in part.logprobs)
    reply = Reply(DONE, "".join([part.text for part in parts]), logprobs=logprobs)
    answer = encode_completion(CONTEXT, request, [reply])
    whole = json.loads(to_json(answer))["choices"][0]
    choices = [chunk["choices"][0] for chunk in stream(request, [(0, e) for e in [*parts, DONE]])]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    if not echo:
        for name, values in whole["logprobs"].items():
            found = [c["logprobs"][name] for c in choices if c["logprobs"] is not None]
            assert list(itertools.chain.from_iterable(found)) == values


def test_the_client_reads_a_stream() -> None:
    request = parse(stream=True)
    encoder = CompletionEncoder(CONTEXT, request)
    data = encoder.keep_alive() + encoder.feed(0, TextPart(" upon")) + encoder.feed(0, DONE)
    data += encoder.finish()

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=data, headers={"content-type": encoder.media_type})

    transport = httpx.Client(transport=httpx.MockTransport(answer))
    with openai.OpenAI(api_key="k", base_url="http://server/v1", http_client=transport) as api:
        chunks = list(api.completions.create(model="tiny", prompt="Once", stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == [" upon", ""]
    assert chunks[-1].choices[0].finish_reason == "stop"

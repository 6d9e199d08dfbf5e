"""Measuring servers of the OpenAI protocol: what is asked, what is made of it, what goes wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

import llmrun.bench.http as module
from llmrun.bench.http import (
    TimeLimits,
    UrlWorkload,
    check_api_key,
    clean_base,
    find_server,
    make_plain_prompt,
    measure_url,
)
from llmrun.bench.sse import EventReader, WrongStreamError
from llmrun.errors import (
    AuthError,
    LlmrunError,
    NotFoundError,
    ServerError,
    ServerUnreachableError,
    UsageError,
)
from tests.fakes.openai_server import OpenAiServer

KEY = "sk-canary-0123456789abcdef"
SMALL = UrlWorkload(
    n_prompt=40,
    n_stream_prompt=20,
    n_generate=16,
    n_stream_tokens=12,
    n_streams=(1, 4),
    n_repeats=2,
)
NAMES = ["pp40", "tg16", "ttft_cold", "ttft_warm", "itl_p50", "itl_p95", "itl_p99",
         "streams1", "streams4"]  # fmt: skip


def test_everything_is_measured_and_told():
    told, progress = [], []
    with OpenAiServer(meeting=(20, 4)) as server:
        work = UrlWorkload(
            n_prompt=40,
            n_stream_prompt=20,
            n_generate=16,
            n_stream_tokens=12,
            n_streams=(4,),
            n_repeats=2,
        )
        found = measure_url(
            server.base, work, on_measure=told.append, on_progress=lambda *a: progress.append(a)
        )
        assert server.most_at_once == 4
    assert [measure.name for measure in found] == [n for n in NAMES if n != "streams1"]
    assert tuple(told) == found
    for measure in found:
        assert len(measure.values) == 2
        assert all(value >= 0 for value in measure.values)
        assert measure.parameters["endpoint"] == "chat"
        assert measure.parameters["counted"] == "server"
        assert measure.higher_is_better == (measure.unit == "tok/s")
    assert found[0].parameters["prompt_got"] == 50
    assert found[-1].parameters["n_streams"] == 4
    assert [done for _, done, _ in progress] == list(range(1, 15))
    assert {n for *_, n in progress} == {14}


def test_prompts_are_new_but_for_the_warm_one():
    with OpenAiServer() as server:
        measure_url(server.base, SMALL)
        prompts = [asked.body["messages"][0]["content"] for asked in server.completions]
        limits = [asked.body["max_tokens"] for asked in server.completions]
    cold = [prompt for prompt in prompts if len(prompt.split()) == 40]
    assert len(cold) == 4
    assert cold[0] == cold[1] != cold[2] == cold[3]
    others = [prompt for prompt in prompts if len(prompt.split()) != 40]
    assert len(set(others)) == len(others)
    starts = {prompt.split()[0:3].__str__() for prompt in others + cold[::2]}
    assert len(starts) == len(others) + 2
    assert limits[:7] == [4, 8, 8, 16, 8, 8, 16]


def test_what_is_sent():
    with OpenAiServer() as server:
        measure_url(server.base + "/v1/", SMALL, api_key=f" {KEY}\n")
        assert {asked.authorization for asked in server.asked} == {f"Bearer {KEY}"}
        body = dict(server.completions[-1].body)
    body.pop("messages")
    assert body == {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": 12,
    }
    with OpenAiServer() as server:
        find_server(server.base)
        assert server.asked[0].authorization is None


@pytest.mark.parametrize(
    ("refuses", "expected"),
    [
        (["ignore_eos"], {"stream_options", "temperature", "max_tokens"}),
        (["ignore_eos", "temperature", "max_tokens"], {"stream_options", "max_completion_tokens"}),
        (["ignore_eos", "stream_options"], {"temperature", "max_tokens"}),
    ],
)
def test_what_a_server_refuses_is_left_out(refuses, expected):
    with OpenAiServer(refuses=refuses) as server:
        found = measure_url(server.base, SMALL)
        last = server.completions[-1].body
    counted = "pieces" if "stream_options" in refuses else "server"
    names = NAMES[1:] if "stream_options" in refuses else NAMES
    assert [measure.name for measure in found] == names
    assert found[0].parameters["counted"] == counted
    assert set(last) - {"model", "messages", "stream"} == expected


def test_a_server_without_chat_is_asked_for_completions():
    with OpenAiServer(missing=["/v1/chat/completions"]) as server:
        found = measure_url(server.base, SMALL)
        assert server.completions[-1].path == "/v1/completions"
    assert found[0].parameters["endpoint"] == "completions"
    reply = (400, b'{"object": "error", "message": "no chat template is defined"}')
    with OpenAiServer(replies={"/v1/chat/completions": reply}) as server:
        assert measure_url(server.base, SMALL)[0].parameters["endpoint"] == "completions"
        with pytest.raises(ServerError, match="refused") as raised:
            measure_url(server.base, SMALL, endpoint="chat")
    assert "no chat template is defined" in raised.value.why
    with (
        OpenAiServer(
            replies={"/v1/chat/completions": reply}, missing=["/v1/completions"]
        ) as server,
        pytest.raises(ServerError) as raised,
    ):
        measure_url(server.base, SMALL)
    assert "no chat template is defined" in raised.value.why


@pytest.mark.parametrize("fault", ["comments", "crlf", "thinks", "no_done", "no_usage", "closes"])
def test_the_ways_in_which_servers_differ(fault):
    with OpenAiServer(faults=[fault]) as server:
        found = measure_url(server.base, SMALL)
    assert [m.name for m in found] == (NAMES[1:] if fault == "no_usage" else NAMES)
    assert found[-1].parameters["tokens_got"] == 12


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("buffered", ServerError, "does not stream"),
        ("early_end", ServerError, "ended early"),
        ("reset", ServerUnreachableError, "connection broke"),
        ("garbage", ServerError, "no JSON"),
        ("error_event", ServerError, "out of memory"),
        ("empty", ServerError, "no text"),
        ("huge", ServerError, "too long"),
        ("redirect", ServerError, "307"),
        ("silent", ServerUnreachableError, "silent for"),
        ("busy", ServerError, "503: too"),
    ],
)
def test_what_goes_wrong_is_said(fault, kind, words):
    limits = TimeLimits(silence_s=0.3) if fault == "silent" else None
    with OpenAiServer(faults=[fault]) as server, pytest.raises(LlmrunError) as raised:
        measure_url(server.base, SMALL, limits=limits)
    error = raised.value
    assert type(error) is kind
    assert words in error.why
    assert "\n" not in error.why
    assert error.exit_code == (6 if kind is ServerUnreachableError else 1)


def test_a_request_without_end_is_given_up():
    with OpenAiServer(faults=["silent"]) as server, pytest.raises(ServerUnreachableError) as raised:
        measure_url(server.base, SMALL, limits=TimeLimits(silence_s=60, request_s=0.4))
    assert "no end" in raised.value.why


def test_what_was_measured_before_a_fault_is_told():
    told = []
    with OpenAiServer(meeting=(20, 2)) as server:
        # The second level of streams is one that the server cannot bear.
        def keep(measure):
            told.append(measure.name)
            if measure.name == "streams2":
                server.faults.add("busy")

        work = UrlWorkload(
            n_prompt=40,
            n_stream_prompt=20,
            n_generate=16,
            n_stream_tokens=12,
            n_streams=(2, 4),
            n_repeats=1,
        )
        with pytest.raises(ServerError, match="refused"):
            measure_url(server.base, work, on_measure=keep)
    assert told == [*NAMES[:-2], "streams2"]


@pytest.mark.parametrize(
    ("status", "kind", "code"), [(401, AuthError, 4), (403, AuthError, 4), (500, ServerError, 1)]
)
def test_statuses(status, kind, code):
    for path in ("/v1/models", "/v1/chat/completions"):
        with (
            OpenAiServer(replies={path: (status, b"<html>nothing</html>")}) as server,
            pytest.raises(kind) as raised,
        ):
            measure_url(server.base, SMALL)
        assert raised.value.exit_code == code
        assert str(status) in raised.value.why


def test_the_key_is_shown_nowhere():
    with OpenAiServer(faults=["key_echo"]) as server:
        with pytest.raises(AuthError) as raised:
            measure_url(server.base, SMALL, api_key=KEY)
        found = find_server(server.base, api_key=KEY)
    error = raised.value
    assert "bad key Bearer ***" in error.why
    seen = [str(error), repr(error), error.why, error.hint, repr(found)]
    chain = error.__context__
    while chain is not None:
        seen += [str(chain), repr(chain)]
        chain = chain.__context__
    assert not any(KEY in str(text) for text in seen)
    with pytest.raises(UsageError) as usage:
        check_api_key("sk-über geheim")
    assert "geheim" not in f"{usage.value} {usage.value.why} {usage.value.hint}"


def test_nobody_there():
    with OpenAiServer() as server:
        base = server.base
    with pytest.raises(ServerUnreachableError) as raised:
        measure_url(base, SMALL)
    assert raised.value.exit_code == 6
    assert base in raised.value.message


def test_models():
    with OpenAiServer(models=["a-model", "b-model:latest"]) as server:
        with pytest.raises(UsageError) as several:
            find_server(server.base)
        assert "a-model, b-model:latest" in several.value.why
        assert find_server(server.base, model="b-model").model == "b-model:latest"
        found = find_server(server.base, model="a-model")
        assert (found.model, found.software) == ("a-model", "fake/1")
        assert found.models == ("a-model", "b-model:latest")
        with pytest.raises(NotFoundError) as missing:
            find_server(server.base, model="a-modle")
        assert missing.value.hint == "did you mean a-model?"
    with OpenAiServer(missing=["/v1/models"]) as server:
        assert find_server(server.base, model="any").model == "any"
        with pytest.raises(NotFoundError):
            find_server(server.base)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"data": 3}', b'{"data": [1, {"id": 4}, {}]}', b"[" * 100_000]
)
def test_a_list_of_models_that_is_none(body):
    with OpenAiServer(replies={"/v1/models": (200, body)}) as server:
        with pytest.raises(NotFoundError):
            find_server(server.base)
        assert find_server(server.base, model="x").models == ()


def test_an_endless_list_of_models():
    with (
        OpenAiServer(replies={"/v1/models": (200, b" " * (5 << 20))}) as server,
        pytest.raises(ServerError) as raised,
    ):
        find_server(server.base)
    assert "too long" in raised.value.why


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        (" http://h:1/v1/ ", "http://h:1/v1"),
        ("https://h/openai/v1/chat/completions", "https://h/openai/v1"),
        ("http://[::1]:8080", "http://[::1]:8080/v1"),
        ("http://h/v1/models", "http://h/v1"),
    ],
)
def test_addresses(text, base):
    assert clean_base(text) == base


@pytest.mark.parametrize(
    "text",
    ["", "ftp://h", "http://", "http://h:99999", "http://u:geheim@h/", "http://h/?key=geheim",
     "http://h/#x", "http://h/a b", "http://[::1", "http://h/\x1b[2J"],
)  # fmt: skip
def test_addresses_that_are_refused(text):
    with pytest.raises(UsageError) as raised:
        clean_base(text)
    assert "geheim" not in f"{raised.value} {raised.value.why} {raised.value.hint}"


def test_speed_is_made_of_times():
    reply = module._Reply(0.0, (2.0, 2.5, 3.0), 3, 40, True)
    assert (reply.ttft_s, reply.tok_s, reply.gaps_ms) == (2.0, 2.0, [500.0, 500.0])
    assert module._Reply(0.0, (2.0,), 1, None, True).tok_s is None
    # A piece may hold several tokens: the server's count is the one that counts.
    assert module._Reply(0.0, (1.0, 2.0), 9, None, True).tok_s == 8.0


def test_plain_prompts_are_the_same_each_time():
    assert make_plain_prompt(3, 50) == make_plain_prompt(3, 50) != make_plain_prompt(4, 50)
    assert len(make_plain_prompt(1, 50).split()) == 50


def test_events_come_out_whole_however_the_bytes_arrive():
    stream = (
        b': c\r\ndata: {"choices": [{"delta": {"content": "a\xc3\xa9"}}]}\r\n\r\n'
        b'event: x\ndata: {"choices":\ndata: [{"text": "b", "finish_reason": "stop"}]}\n\n'
        b"data:[DONE]"
    )
    for size in (1, 2, 7, len(stream)):
        reader = EventReader()
        events = []
        for i in range(0, len(stream), size):
            events += reader.feed(stream[i : i + size])
        events += reader.end()
        assert [event.text for event in events] == ["aé", "b", ""]
        assert [event.is_last for event in events] == [False, True, True]


@pytest.mark.parametrize(
    "data", [b"3", b"[]", b'{"choices": [7]}', b"\xff", b"[" * 100_000, b'{"a": ' * 9999]
)
def test_events_that_are_none(data):
    with pytest.raises(WrongStreamError):
        list(EventReader().feed(b"data: " + data + b"\n\n"))


def test_a_line_or_an_event_without_end_is_not_kept():
    for piece in (b"x" * 1000, b"data: " + b"x" * 1000 + b"\n"):
        reader = EventReader()
        with pytest.raises(WrongStreamError, match="too long"):
            for _ in range(2000):
                list(reader.feed(piece))


def test_odd_events_are_borne():
    data = b'{"choices": [{"delta": {"content": 3}}], "usage": {"completion_tokens": -1}}'
    (event,) = EventReader().feed(b"data: " + data + b"\n\n")
    assert (event.text, event.n_tokens, event.is_last) == ("", None, False)


def test_an_interruption_ends_it_at_once_and_keeps_what_was_measured():
    program = (
        "import sys\n"
        "from llmrun.bench.http import *\n"
        "work = UrlWorkload(n_prompt=40, n_stream_prompt=20, n_generate=16, n_streams=(4,))\n"
        "kept = []\n"
        "def keep(measure):\n"
        "    kept.append(measure.name)\n"
        "    print(measure.name, flush=True)\n"
        "try:\n"
        "    measure_url(sys.argv[1], work, on_measure=keep)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', len(kept))\n"
    )
    # Four requests never meet where five are waited for.
    with OpenAiServer(meeting=(20, 5)) as server:
        with subprocess.Popen(
            [sys.executable, "-c", program, server.base], stdout=subprocess.PIPE, text=True
        ) as child:
            lines = []
            for line in child.stdout:
                lines.append(line.strip())
                if lines[-1] == "itl_p99":
                    while server.most_at_once < 4:
                        time.sleep(0.01)
                    child.send_signal(signal.SIGINT)
            assert child.wait(30) == 0
        server.meeting.abort()
    assert lines[-1] == "interrupted 7"

"""Answers whose client may go: heads, errors before and after them, silence, the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from llmrun.engine.types import Usage
from llmrun.errors import ContextOverflowError, EngineError
from llmrun.server import streaming
from llmrun.server.generate import Batch
from llmrun.server.streaming import StreamedAnswer, long_json_answer, while_connected
from llmrun.server.types import ApiError, ErrorAnswer, Finished, ReplyEvent, Started, TextPart

TEXT, END = TextPart("Hi"), Finished("stop", Usage(1, 1, 0))


class Encoder:
    """Says the names of what it is fed."""

    media_type = "text/event-stream"

    def feed(self, index: int, event: ReplyEvent) -> bytes:
        return b"" if isinstance(event, Started) else f"<{index}:{type(event).__name__}>".encode()

    def finish(self) -> bytes:
        return b"<end>"

    def fail(self, error: ApiError) -> bytes:
        return f"<fail {error.kind}: {error.message}>".encode()

    def keep_alive(self) -> bytes:
        return b"<wait>"


def encode_error(error: ApiError) -> ErrorAnswer:
    return ErrorAnswer(error.status, {"oh": error.message}, {"X-Oh": "1"})


class Http:
    """A connection: what is sent on it; the client goes when `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.said = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.go.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        self.said.set()

    async def until_sent(self, n: int) -> None:
        while len(self.sent) < n:
            self.said.clear()
            await self.said.wait()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def is_ended(self) -> bool:
        return not self.sent[-1].get("more_body", False)


class Source:
    """Batches; a step may be a batch, an exception, or an awaitable to wait for. `closed`: the
    generator has come to its end, in whatever way."""

    def __init__(self, *steps: Any) -> None:
        self.steps = steps
        self.closed = False

    async def batches(self) -> AsyncGenerator[Batch, None]:
        try:
            for step in self.steps:
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.closed = True


def run(main: Callable[[Http], Any]) -> Http:
    async def whole() -> Http:
        http = Http()
        async with asyncio.timeout(20):
            await main(http)
        return http

    return asyncio.run(whole())


def answer(source: Source, **options: Any) -> tuple[StreamedAnswer, list[Any]]:
    made = StreamedAnswer(source.batches(), Encoder(), "text/event-stream", encode_error, **options)
    ends: list[Any] = []
    made.on_end = lambda status, error: ends.append((status, error))
    return made, ends


def send(source: Source, **options: Any) -> tuple[Http, list[Any]]:
    """The whole answer of `source` to a client that stays."""
    ends: list[Any] = []

    async def main(http: Http) -> None:
        made, told = answer(source, **options)
        await made({"type": "http"}, http.receive, http.send)
        ends.extend(told)

    http = run(main)
    assert source.closed and http.is_ended
    return http, ends


def test_an_answer_from_beginning_to_end() -> None:
    http, ends = send(Source([(0, Started(3))], [(0, TEXT)], [(0, TEXT), (1, TEXT)], [(0, END)]))
    assert (http.status, http.body) == (
        200,
        b"<0:TextPart><0:TextPart><1:TextPart><0:Finished><end>",
    )
    headers = dict(http.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers and headers[b"cache-control"] == b"no-cache"
    assert ends == [(200, None)]


def test_silence_is_filled() -> None:
    http, _ = send(Source([(0, Started(3))], [(0, TEXT)], [], [], [(0, END)]))
    assert http.body == b"<0:TextPart><wait><wait><0:Finished><end>"


def test_what_fails_before_the_first_token_has_a_status_of_its_own() -> None:
    error = ContextOverflowError(9, 5)
    for steps in ([error], [[(0, Started(3))], error]):
        http, ends = send(Source(*steps))
        assert http.status == 400
        assert json.loads(http.body) == {
            "oh": "request (9 tokens) exceeds the available context size (5 tokens)"
        }
        assert dict(http.sent[0]["headers"])[b"x-oh"] == b"1"
        assert ends == [(400, error)]


def test_what_fails_later_is_told_in_the_stream() -> None:
    error = EngineError("broken", why="by chance")
    http, ends = send(Source([(0, TEXT)], error))
    assert http.body == b"<0:TextPart><fail internal: broken: by chance>"
    assert ends == [(200, error)]


def test_the_words_of_a_defect_are_not_for_the_client() -> None:
    error = RuntimeError("a secret prompt")
    http, ends = send(Source([(0, TEXT)], error))
    assert b"secret" not in http.body and b"<fail internal:" in http.body
    assert ends == [(200, error)]  # but they are for the log
    http, _ = send(Source(error))
    assert http.status == 500 and b"secret" not in http.body


def test_an_answer_of_nothing_ends() -> None:
    http, _ = send(Source())
    assert (http.status, http.body) == (200, b"<end>")


def test_a_head_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the client gets a head, and then signs of life, before the first token."""
    monkeypatch.setattr(streaming, "HEAD_WAIT_S", 0.001)
    source = Source()

    async def main(http: Http) -> None:
        first = asyncio.Event()
        source.steps = ([(0, Started(3))], first, [(0, TEXT)], [(0, END)])
        made, ends = answer(source, head_wait_s=0.0)
        task = asyncio.ensure_future(made({"type": "http"}, http.receive, http.send))
        await http.until_sent(4)
        assert http.status == 200 and http.body.startswith(b"<wait><wait>")
        first.set()
        await task
        assert http.body.endswith(b"<wait><0:TextPart><0:Finished><end>")
        assert ends == [(200, None)]

    run(main)
    assert source.closed


def test_what_fails_after_such_a_head_is_told_in_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "HEAD_WAIT_S", 0.001)

    async def main(http: Http) -> None:
        late = asyncio.Event()
        made, _ = answer(Source(late, EngineError("broken")), head_wait_s=0.0)
        task = asyncio.ensure_future(made({"type": "http"}, http.receive, http.send))
        await http.until_sent(2)
        late.set()
        await task
        assert http.status == 200 and http.body.endswith(b"<fail internal: broken>")

    run(main)


@pytest.mark.parametrize("has_head", [True, False])
def test_a_client_that_goes_ends_the_work(has_head: bool) -> None:
    source = Source()

    async def main(http: Http) -> None:
        never = asyncio.Event()
        source.steps = ([(0, TEXT)], never) if has_head else ([(0, Started(1))], never)
        made, ends = answer(source)
        task = asyncio.ensure_future(made({"type": "http"}, http.receive, http.send))
        if has_head:
            await http.until_sent(2)
        http.go.set()
        await task
        assert ends == [(200 if has_head else 0, None)]
        assert len(asyncio.all_tasks()) == 1  # nothing outlives the answer

    http = run(main)
    assert source.closed
    assert bool(http.sent) == has_head


def test_a_client_that_read_nothing_and_goes_ends_the_work() -> None:
    """The source is at rest then, in the middle: it has to be closed."""
    source = Source([(0, TEXT)], [(0, TEXT)])

    async def main(http: Http) -> None:
        async def send(message: Any) -> None:
            await http.send(message)
            await asyncio.Event().wait()

        made, _ = answer(source)
        task = asyncio.ensure_future(made({"type": "http"}, http.receive, send))
        await http.until_sent(1)
        assert not source.closed
        http.go.set()
        await task
        assert source.closed

    run(main)


def test_an_answer_that_is_cut_says_so() -> None:
    source = Source()

    async def main(http: Http) -> None:
        source.steps = ([(0, TEXT)], asyncio.Event())
        made, _ = answer(source)
        task = asyncio.ensure_future(made({"type": "http"}, http.receive, http.send))
        await http.until_sent(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert http.body == b"<0:TextPart><fail unavailable: the server is shutting down>"
        assert http.is_ended

    run(main)
    assert source.closed


def test_an_answer_that_is_cut_before_its_head_says_nothing() -> None:
    """Then the guard can still answer with a status."""

    async def main(http: Http) -> None:
        made, _ = answer(Source(asyncio.Event()))
        task = asyncio.ensure_future(made({"type": "http"}, http.receive, http.send))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert http.sent == []

    run(main)


# ---- answers in one piece


def test_work_for_a_client_that_stays() -> None:
    async def main(http: Http) -> None:
        assert await while_connected(http.receive, asyncio.sleep(0, "done")) == "done"
        with pytest.raises(EngineError):
            await while_connected(http.receive, fail())
        assert len(asyncio.all_tasks()) == 1

    async def fail() -> None:
        raise EngineError("broken")

    run(main)


def test_work_for_a_client_that_goes_is_cancelled() -> None:
    async def main(http: Http) -> None:
        ended = []

        async def work() -> None:
            try:
                http.go.set()
                await asyncio.Event().wait()
            finally:
                ended.append("yes")

        with pytest.raises(ClientDisconnect):
            await while_connected(http.receive, work())
        assert ended == ["yes"] and len(asyncio.all_tasks()) == 1

    run(main)


def test_others_go_on_while_a_long_answer_is_made_and_sent() -> None:
    log: list[str] = []

    def pieces() -> Iterator[bytes]:
        for piece in (b"[1", b",2", b"]"):
            log.append("encode")
            yield piece

    async def other() -> None:
        while True:
            log.append("other")
            await asyncio.sleep(0)

    async def main(http: Http) -> None:
        async def note(message: Any) -> None:
            log.append("send")
            await http.send(message)

        working = asyncio.create_task(other())
        found = await long_json_answer(pieces())
        await found({"type": "http"}, http.receive, note)
        working.cancel()

    http = run(main)
    assert (http.status, http.body, http.is_ended) == (200, b"[1,2]", True)
    headers = dict(http.sent[0]["headers"])
    assert headers == {b"content-length": b"5", b"content-type": b"application/json"}
    # The head goes out with the first piece.
    assert log == [*["encode", "other"] * 3, "send", *["send", "other"] * 3, "send"]

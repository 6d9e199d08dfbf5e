"""Answers over HTTP whose client may go at any moment.

A client that goes cancels what is done for it at once: the generator that makes the answer is
closed, and closing it frees what it holds (see `generate`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmrun.server.failures import as_api_error
from llmrun.server.generate import Batch
from llmrun.server.types import ApiError, ErrorAnswer, Started, StreamEncoder
from llmrun.server.wire_json import to_json

# A stream's head waits so long for the first token, so that what fails before it has a status of
# its own; after that it goes out, because some clients give up on a connection without a head.
HEAD_WAIT_S = 5.0

T = TypeVar("T")


def json_answer(
    body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        to_json(body),
        status_code=status,
        media_type="application/json",
        headers=dict(headers or {}),
    )


async def long_json_answer(pieces: Iterable[bytes]) -> Response:
    """An answer whose JSON comes in pieces. Between any two the event loop goes on with what else
    there is to do."""
    found = []
    for piece in pieces:
        found.append(piece)
        await asyncio.sleep(0)
    return _PiecedAnswer(found)


class _PiecedAnswer(Response):
    """JSON that goes out as the pieces it is in: many megabytes in one would take the event loop
    long to copy, too."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        n_bytes = sum(len(piece) for piece in pieces)
        super().__init__(headers={"content-length": str(n_bytes)}, media_type="application/json")
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_answer(answer: ErrorAnswer) -> Response:
    return json_answer(answer.body, answer.status, answer.headers)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has gone. For a request whose body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises ClientDisconnect
    then, and what `work` raises."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        await _end(task, gone)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel and wait: nothing of a request outlives its answer."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class StreamedAnswer(Response):
    """An answer that is sent as it is made.

    `batches` is closed in any case. What goes wrong before anything was sent becomes an error with
    a status of its own; later it becomes the dialect's own event, never a silent end.
    Then `on_end`, where it is set, hears the status that was sent (0: none was, the client had gone
    before) and what went wrong, if anything did.
    """

    def __init__(
        self,
        batches: AsyncGenerator[Batch, None],
        encoder: StreamEncoder,
        media_type: str,
        encode_error: Callable[[ApiError], ErrorAnswer],
        *,
        head_wait_s: float = HEAD_WAIT_S,
    ) -> None:
        self._batches = batches
        self._encoder = encoder
        self._encode_error = encode_error
        self._head_wait_s = head_wait_s
        self._has_head = False
        self._has_reader = True
        self._failure: Exception | None = None
        self.on_end: Callable[[int, Exception | None], None] | None = None
        self.background = None
        self.status_code = 200
        self.media_type = media_type
        self.body = b""
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # A stream's length is not known when its head is sent.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(scope, receive, send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
            else:
                self._has_reader = False
        finally:
            await _end(pump, gone)
            await self._batches.aclose()
            if self.on_end is not None:
                self.on_end(self.status_code if self._has_head else 0, self._failure)

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            held = await self._before_head(send)
            await self._send(send, self._encode(held))
            async for batch in self._batches:
                data = self._encode(batch) if batch else self._encoder.keep_alive()
                if data:
                    await self._send(send, data)
            await self._send(send, self._encoder.finish(), is_last=True)
        except asyncio.CancelledError:
            # The server ends: who still listens hears that this is no end.
            if self._has_head and self._has_reader:
                failure = ApiError("unavailable", "the server is shutting down")
                with contextlib.suppress(Exception):
                    await self._send(send, self._encoder.fail(failure), is_last=True)
            raise
        except Exception as error:  # noqa: BLE001 - told to the client, in its dialect
            self._failure = error
            failure = as_api_error(error)
            if self._has_head:
                await self._send(send, self._encoder.fail(failure), is_last=True)
            else:
                answer = error_answer(self._encode_error(failure))
                self._has_head, self.status_code = True, answer.status_code
                await answer(scope, receive, send)

    async def _before_head(self, send: Send) -> Batch:
        """The first events, up to one that is more than a beginning or until it takes too long."""
        found: Batch = []
        waiting: asyncio.Future[Batch | None] | None = None
        deadline = asyncio.get_running_loop().time() + self._head_wait_s
        try:
            while not any(not isinstance(event, Started) for _, event in found):
                waiting = waiting or asyncio.ensure_future(anext(self._batches, None))
                left_s = deadline - asyncio.get_running_loop().time()
                done, _ = await asyncio.wait(
                    {waiting}, timeout=left_s if not self._has_head else HEAD_WAIT_S
                )
                if done:
                    batch, waiting = waiting.result(), None
                    if batch is None:
                        break
                    found += batch
                    continue
                await self._send(send, self._encode(found) or self._encoder.keep_alive())
                found = []
        finally:
            if waiting is not None:
                await _end(waiting)
        return found

    def _encode(self, batch: Batch) -> bytes:
        feed = self._encoder.feed
        if len(batch) == 1:
            return feed(*batch[0])
        return b"".join([feed(i, event) for i, event in batch])

    async def _send(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        if not self._has_head:
            self._has_head = True
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})

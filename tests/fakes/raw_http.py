"""A small ASGI application behind the real guard and the real server, and sockets to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmrun.server.guard import GuardOptions
from llmrun.server.lifecycle import ServeOptions, ServerState, serve
from llmrun.server.limits import GuardMiddleware
from llmrun.server.types import ApiError, ErrorAnswer

PATIENCE_S = 30.0
"""Only for a test that would hang: nothing waits for so long."""


def encode_error(scope: Any, error: ApiError) -> ErrorAnswer:
    """Two dialects, to see that the path chooses one."""
    if scope["path"].startswith("/api/"):
        return ErrorAnswer(error.status, {"error": error.message})
    return ErrorAnswer(error.status, {"error": {"message": error.message, "code": error.code}})


class TinyApp:
    """`/health`, `/echo` (tells the body's length), `/page`, `/boom`, and answers without end:
    `/quiet` says one thing and waits, `/ticks` goes on saying, `/flood` says as much as it can,
    `/silent` never begins, `/slow` begins when `release` is set (as `/health?release` does),
    `/stubborn` cannot be cancelled, `/large` is 8 MB. What becomes of a request is put on `seen`:
    its path when it begins, then (path, how it ended)."""

    def __init__(self) -> None:
        self.seen: queue.Queue[Any] = queue.Queue()
        self.release = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise RuntimeError("no lifespan here")
        path = scope["path"]
        message = await receive()
        body = message["body"]
        assert not message["more_body"]
        self.seen.put(path)
        if path == "/boom":
            raise RuntimeError("a secret prompt")
        if path == "/late-boom":
            await self._begin(send, b"text/event-stream")
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            raise RuntimeError("a secret prompt")
        if scope["query_string"] == b"release":
            self.release.set()
        while path == "/stubborn":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        if path in ("/quiet", "/ticks", "/flood", "/silent", "/slow"):
            await self._work(path, receive, send)
            return
        kind = b"text/html; charset=utf-8" if path == "/page" else b"application/json"
        await self._begin(send, kind)
        text = json.dumps({"n": len(body), "path": path}).encode()
        if path == "/large":
            text = b"x" * 8_000_000
        await send({"type": "http.response.body", "body": text})

    async def _work(self, path: str, receive: Any, send: Any) -> None:
        work = asyncio.ensure_future(self._stream(path, send))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                assert gone.result()["type"] == "http.disconnect"
                self.seen.put((path, "gone"))
            else:
                self.seen.put((path, "finished"))
        except asyncio.CancelledError:
            if path == "/quiet":  # as `streaming` does: the client hears that this is no end
                await send({"type": "http.response.body", "body": b"cut", "more_body": False})
            self.seen.put((path, "cut"))
            raise
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _stream(self, path: str, send: Any) -> None:
        if path == "/silent":
            await asyncio.Event().wait()
        if path == "/slow":
            await asyncio.to_thread(self.release.wait, PATIENCE_S)
        await self._begin(send, b"text/event-stream")
        piece = b"x" * 65536 if path == "/flood" else b"tick"
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        while path in ("/ticks", "/flood"):
            await asyncio.sleep(0.001 if path == "/ticks" else 0)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if path == "/quiet":
            await asyncio.Event().wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, send: Any, kind: bytes) -> None:
        headers = [(b"content-type", kind), (b"server", b"tiny")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    def wait_for(self, what: Any) -> None:
        """Until `what` has been put on `seen`."""
        while self.seen.get(timeout=PATIENCE_S) != what:
            pass


@dataclass
class Answer:
    status: int
    headers: dict[str, list[str]]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """A socket, and what has come of an answer."""

    def __init__(self, address: tuple[str, int], *, receive_buffer: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE_S)
        try:
            self.sock.connect(address)
        except OSError:
            self.sock.close()
            raise
        self.rest = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, line: str = "GET /health", *headers: str, body: bytes = b"") -> None:
        """A request with a Host (where no other is given) and, with a body, what a body needs."""
        lines = [f"{line} HTTP/1.1", *headers]
        given = {header.partition(":")[0].lower() for header in headers}
        if "host" not in given:
            lines.append("Host: localhost")
        if (body or line.startswith("POST")) and not given & {
            "content-length",
            "transfer-encoding",
        }:
            lines.append(f"Content-Length: {len(body)}")
        if line.startswith("POST") and "content-type" not in given:
            lines.append("Content-Type: application/json")
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def read_until(self, mark: bytes) -> bytes:
        """All up to `mark`; raises EOFError when the connection ends before."""
        while mark not in self.rest:
            piece = self.sock.recv(65536)
            if not piece:
                raise EOFError(self.rest)
            self.rest += piece
        found, _, self.rest = self.rest.partition(mark)
        return found + mark

    def read_head(self) -> Answer:
        lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        status = re.fullmatch(r"HTTP/1\.1 (\d{3}) .*", lines[0])
        assert status is not None, lines[0]
        headers: dict[str, list[str]] = {}
        for line in lines[1:]:
            if line:
                name, _, value = line.partition(":")
                headers.setdefault(name.lower(), []).append(value.strip())
        return Answer(int(status[1]), headers, b"")

    def read_answer(self) -> Answer:
        """A whole answer, by its length or its chunks."""
        answer = self.read_head()
        if "content-length" in answer.headers:
            n_bytes = int(answer.headers["content-length"][0])
            while len(self.rest) < n_bytes:
                self._more()
            answer.body, self.rest = self.rest[:n_bytes], self.rest[n_bytes:]
        elif "transfer-encoding" in answer.headers:
            while n_bytes := int(self.read_until(b"\r\n"), 16):
                while len(self.rest) < n_bytes + 2:
                    self._more()
                answer.body += self.rest[:n_bytes]
                self.rest = self.rest[n_bytes + 2 :]
            self.read_until(b"\r\n")
        return answer

    def _more(self) -> None:
        piece = self.sock.recv(65536)
        if not piece:
            raise EOFError(self.rest)
        self.rest += piece

    def read_end(self) -> bytes:
        """All that comes until the server closes, or resets, the connection."""
        with contextlib.suppress(ConnectionError):
            while piece := self.sock.recv(65536):
                self.rest += piece
        return self.rest

    def close(self) -> None:
        self.sock.close()


@dataclass
class Running:
    """A server in a thread."""

    app: TinyApp
    state: ServerState
    address: tuple[str, int]
    url: str
    log: list[str] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    def connect(self, **options: int) -> Client:
        client = Client(self.address, **options)
        self.clients.append(client)
        return client

    def wait_idle(self) -> None:
        """Until no request is being worked on."""
        deadline = time.monotonic() + PATIENCE_S
        while self.state.n_active:
            assert time.monotonic() < deadline, "a request never ends"
            time.sleep(0.005)

    def ask(self, line: str = "GET /health", *headers: str, body: bytes = b"") -> Answer:
        """One request on a connection of its own."""
        client = self.connect()
        client.request(line, *headers, body=body)
        return client.read_answer()


@contextlib.contextmanager
def running(
    guard: GuardOptions | None = None,
    options: ServeOptions | None = None,
    app: TinyApp | None = None,
    **hooks: Callable[..., Any],
) -> Iterator[Running]:
    """The server with these options, at a free port; ended and joined at the end."""
    app = app or TinyApp()
    state = ServerState()
    log: list[str] = []
    guarded = GuardMiddleware(app, guard or GuardOptions(), encode_error, state, log=log.append)
    options = options or ServeOptions(port=0, drain_s=0.0)
    urls: queue.Queue[str | BaseException] = queue.Queue()
    code: list[int] = []

    def run() -> None:
        try:
            code.append(serve(guarded, options, state, on_listen=urls.put, **hooks))
        except BaseException as error:
            urls.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    url = urls.get(timeout=PATIENCE_S)
    if isinstance(url, BaseException):
        thread.join()
        raise url
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    server = Running(app, state, (parts.hostname, parts.port), url, log, code)
    try:
        yield server
    finally:
        app.release.set()
        state.ask_to_stop()
        for client in server.clients:
            client.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server does not end"

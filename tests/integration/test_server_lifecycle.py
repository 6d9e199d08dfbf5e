"""From the start of the server to its end: binding, loading, signals, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from llmrun.errors import LlmrunError, UsageError
from llmrun.server import lifecycle
from llmrun.server.lifecycle import ServeOptions, ServerState, serve
from llmrun.server.listening import bind_sockets, url_of
from llmrun.server.streaming import StreamedAnswer, while_connected
from llmrun.server.types import ApiError, ReplyEvent, TextPart
from tests.fakes.raw_http import PATIENCE_S, Client, TinyApp, encode_error, running

ROOT = Path(__file__).parents[2]


class Process:
    """The server in a process of its own."""

    def __init__(self, drain_s: float, fault: str = "", port: int = 0) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.server_process", str(port), str(drain_s), fault],
            cwd=ROOT,
            # As users have it: where streams have no buffer, nobody waits for one at the end.
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.clients: list[Client] = []
        self.port = urlsplit(self.line("listen").split()[1]).port or 0

    def line(self, word: str) -> str:
        """The next line, which begins with `word`."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline().strip()
        assert line.startswith(word), (line, self.popen.stderr and self.popen.stderr.read())
        return line

    def connect(self) -> Client:
        client = Client(("127.0.0.1", self.port))
        self.clients.append(client)
        return client

    def begin(self, path: str) -> Client:
        """A request that is being worked on."""
        client = self.connect()
        client.request(f"GET {path}")
        if path in ("/quiet", "/ticks"):
            client.read_until(b"tick")
            return client
        # The answers to these come late: one on another connection shows that they have arrived.
        ask = self.connect()
        ask.request()
        ask.read_answer()
        return client

    def kill(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self) -> tuple[int, list[str], str]:
        """The exit code, the lines that are left, and what stands on stderr."""
        out, err = self.popen.communicate(timeout=PATIENCE_S)
        return self.popen.returncode, out.split("\n")[:-1], err


@contextlib.contextmanager
def process(drain_s: float = 20.0, fault: str = "", port: int = 0) -> Iterator[Process]:
    each = Process(drain_s, fault, port)
    try:
        yield each
    finally:
        for client in each.clients:
            client.close()
        each.popen.kill()
        each.popen.communicate()


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_an_idle_server(number: int) -> None:
    with process() as server:
        server.line("ready")
        silent, half, idle = server.connect(), server.connect(), server.connect()
        half.send(b"GET /health HTTP/1.1\r\nHost: lo")
        idle.request()
        assert idle.read_answer().status == 200
        server.kill(number)
        code, lines, err = server.end()
        assert (code, lines, err) == (0, ["drain 0 draining", "stop draining"], "")
        assert silent.read_end() == half.read_end() == idle.read_end() == b""
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_nothing_of_a_defect_or_of_garbage_is_printed() -> None:
    with process() as server:
        server.line("ready")
        for data in (b"\x00secret\r\n\r\n", b"GET /late-boom HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            client = server.connect()
            client.send(data)
            client.read_end()
        server.kill(signal.SIGTERM)
        assert server.end() == (0, ["drain 0 draining", "stop draining"], "")


def test_a_drain_refuses_new_requests_and_finishes_the_running_one() -> None:
    with process() as server:
        server.line("ready")
        idle = server.connect()
        idle.request()
        idle.read_answer()
        working = server.begin("/slow")
        server.kill(signal.SIGTERM)
        assert server.line("drain") == "drain 1 draining"
        # On a new connection as well as on one that is there.
        for client in (server.connect(), idle):
            client.request("GET /api/tags")
            answer = client.read_answer()
            assert answer.status == 503
            assert int(answer.headers["retry-after"][0]) >= 1
            assert answer.headers["connection"] == ["close"]
            assert answer.json() == {"error": "the server is shutting down"}
            assert client.read_end() == b""
        health = server.connect()
        health.request("GET /health?release")
        assert health.read_answer().status == 200
        answer = working.read_answer()
        assert answer.status == 200 and answer.body == b"tick"
        assert server.end() == (0, ["stop draining"], "")


def test_what_does_not_end_in_time_is_cut_with_a_word() -> None:
    with process(drain_s=0.2) as server:
        server.line("ready")
        streaming, waiting = server.begin("/quiet"), server.begin("/silent")
        server.kill(signal.SIGTERM)
        assert streaming.read_until(b"cut\r\n0\r\n\r\n")
        answer = waiting.read_answer()
        assert answer.status == 503 and answer.json()["error"]["code"] == "shutting_down"
        assert server.end() == (0, ["drain 2 draining", "stop draining"], "")


def test_what_cannot_be_cancelled_keeps_nothing_from_ending() -> None:
    for path, fault in (("/stubborn", ""), ("/health", "stops-never")):
        with process(drain_s=0.1, fault=fault) as server:
            server.line("ready")
            client = server.begin(path)
            server.kill(signal.SIGTERM)
            code, lines, err = server.end()
            assert (code, lines[-1], err) == (143, "abort", "")
            client.close()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_second_signal_ends_at_once(number: int, code: int) -> None:
    with process(fault="aborts-never") as server:
        server.line("ready")
        client = server.begin("/silent")
        server.kill(signal.SIGTERM)
        server.line("drain")
        # What comes with the first one, from a launcher that passes it on, is no second one.
        assert not threading.Event().wait(lifecycle._SAME_SIGNAL_S * 1.2)
        server.kill(number)
        assert server.end() == (code, ["abort"], "")
        assert client.read_end() == b""


def test_a_second_signal_ends_it_though_nobody_reads_what_it_writes() -> None:
    with process(fault="writes-forever") as server:
        server.line("ready")
        server.begin("/silent")
        server.kill(signal.SIGTERM)
        server.line("drain")
        assert not threading.Event().wait(lifecycle._SAME_SIGNAL_S * 1.2)
        server.kill(signal.SIGTERM)
        assert server.popen.wait(PATIENCE_S) == 143


def test_a_signal_during_the_load() -> None:
    with process(fault="loads-forever") as server:
        client = server.connect()
        client.request()
        assert client.read_answer().status == 200
        server.kill(signal.SIGTERM)
        assert server.end() == (143, ["stop draining"], "")


def test_a_killed_server_leaves_its_port_free() -> None:
    with process() as server:
        server.line("ready")
        client = server.begin("/quiet")
        server.kill(signal.SIGKILL)
        assert server.end()[0] == -signal.SIGKILL
        client.read_end()
        with process(port=server.port) as again:
            again.line("ready")
            other = again.connect()
            other.request()
            assert other.read_answer().status == 200


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(lifecycle.time, "monotonic", lambda: now[0])
    life = lifecycle._Life(TinyApp(), ServeOptions(), ServerState(), [], None)
    codes: list[int] = []
    monkeypatch.setattr(life, "exit_now", codes.append)
    life.hear(signal.SIGINT)
    now[0] += 0.1
    life.hear(signal.SIGINT)
    assert codes == []
    now[0] += 0.5
    life.hear(signal.SIGTERM)
    assert codes == [143]


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    state = ServerState()
    code = serve(TinyApp(), ServeOptions(port=0), state, on_ready=lambda url: state.ask_to_stop())
    assert code == 0 and state.phase == "draining"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- hooks


def test_hooks_come_in_order_and_leave_no_thread() -> None:
    threads = set(threading.enumerate())
    said: list[Any] = []

    async def start() -> None:
        said.append("start")

    async def stop() -> None:
        said.append("stop")

    with running(
        on_start=start,
        on_ready=lambda url: said.append("ready"),
        on_drain=lambda n: said.append("drain"),
        on_stop=stop,
    ) as server:
        assert server.ask().status == 200
    assert said == ["start", "ready", "drain", "stop"] and server.code == [0]
    assert set(threading.enumerate()) <= threads


def test_requests_are_answered_while_models_load() -> None:
    loaded = threading.Event()

    async def start() -> None:
        await asyncio.to_thread(loaded.wait, PATIENCE_S)

    became_ready = threading.Event()
    with running(on_start=start, on_ready=lambda url: became_ready.set()) as server:
        assert server.state.phase == "loading"
        assert server.ask("POST /echo", body=b"{}").status == 200
        loaded.set()
        assert became_ready.wait(PATIENCE_S)
        assert server.state.phase == "ready"


def test_a_load_that_fails_ends_the_server() -> None:
    said: list[str] = []
    urls: list[str] = []

    async def start() -> None:
        raise UsageError("no such model")

    async def stop() -> None:
        said.append("stop")

    with pytest.raises(UsageError, match="no such model"):
        serve(
            TinyApp(),
            ServeOptions(port=0),
            ServerState(),
            on_listen=urls.append,
            on_start=start,
            on_stop=stop,
        )
    assert said == ["stop"]
    with pytest.raises(ConnectionRefusedError):
        Client(("127.0.0.1", urlsplit(urls[0]).port or 0))


def test_an_application_that_does_not_start(capfd: pytest.CaptureFixture[str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "lifespan.startup"
        await send({"type": "lifespan.startup.failed", "message": "secret"})

    with pytest.raises(LlmrunError, match="did not start"):
        serve(app, ServeOptions(port=0), ServerState())
    assert capfd.readouterr().err == ""


def test_what_has_been_said_still_arrives() -> None:
    with running() as server:
        client = server.connect(receive_buffer=4096)
        client.request("GET /large")
        server.app.wait_for("/large")
        server.wait_idle()
        server.state.ask_to_stop()
        assert len(client.read_answer().body) == 8_000_000


# ---- with the answers of `streaming`


class Words:
    """An encoder whose words can be told apart."""

    media_type = "text/event-stream"

    def feed(self, index: int, event: ReplyEvent) -> bytes:
        return b"tick" if isinstance(event, TextPart) else b""

    def finish(self) -> bytes:
        return b"end"

    def fail(self, error: ApiError) -> bytes:
        return f"failed {error.kind}".encode()

    def keep_alive(self) -> bytes:
        return b"pulse"


class Streams(TinyApp):
    """`/stream` says something and then waits; `/whole` waits."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in ("/stream", "/whole"):
            await super().__call__(scope, receive, send)
            return
        await receive()
        if scope["path"] == "/whole":
            await while_connected(receive, self._wait())
        else:
            encode = partial(encode_error, scope)
            answer = StreamedAnswer(self._batches(), Words(), Words.media_type, encode)
            await answer(scope, receive, send)

    async def _batches(self) -> AsyncGenerator[list[tuple[int, ReplyEvent]], None]:
        yield [(0, TextPart("x"))]
        await self._wait()

    async def _wait(self) -> None:
        self.seen.put("begun")
        try:
            await asyncio.Event().wait()
        finally:
            self.seen.put("freed")


@pytest.mark.parametrize("path", ["/stream", "/whole"])
def test_a_client_that_goes_frees_what_works_for_it(path: str) -> None:
    with running(app=Streams()) as server:
        client = server.connect()
        client.request(f"GET {path}")
        server.app.wait_for("begun")
        client.close()
        server.app.wait_for("freed")
        server.wait_idle()
        assert server.ask().status == 200


def test_the_end_of_a_drain_is_said_in_the_dialect() -> None:
    with running(app=Streams()) as server:
        streaming, whole = server.connect(), server.connect()
        for client, path in ((streaming, "/stream"), (whole, "/whole")):
            client.request(f"GET {path}")
            server.app.wait_for("begun")
        server.state.ask_to_stop()
        assert streaming.read_answer().body == b"tickfailed unavailable"
        answer = whole.read_answer()
        assert answer.status == 503 and answer.json()["error"]["code"] == "shutting_down"
        server.app.wait_for("freed")
        server.app.wait_for("freed")


# ---- listening


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LlmrunError, match=f"port {port} is in use") as caught:
            serve(TinyApp(), ServeOptions(port=port), ServerState())
        assert "--port" in (caught.value.hint or "")
        assert caught.value.exit_code == 1
        with pytest.raises(LlmrunError, match="in use"):
            bind_sockets("localhost", port)


@pytest.mark.parametrize(
    "host",
    ["192.0.2.1", "2001:db8::1", "no such host", "a" * 300, "127.0.0.1:80", "::zz", "1.2.3.4.5"],
)
def test_no_address_of_this_machine(host: str) -> None:
    with pytest.raises(UsageError) as caught:
        bind_sockets(host, 0)
    assert caught.value.hint == "--host 127.0.0.1"


@pytest.mark.parametrize("port", [-1, 65536])
def test_no_port(port: int) -> None:
    with pytest.raises(UsageError, match="no port"):
        bind_sockets("127.0.0.1", port)


def test_urls() -> None:
    for host, start in (
        ("127.0.0.1", "http://127.0.0.1:"),
        ("0.0.0.0", "http://127.0.0.1:"),
        ("localhost", "http://127.0.0.1:"),
    ):
        sockets = bind_sockets(host, 0)
        try:
            assert url_of(sockets).startswith(start)
            assert len({sock.getsockname()[1] for sock in sockets}) == 1
        finally:
            for sock in sockets:
                sock.close()


# ---- the state


def test_state() -> None:
    async def check() -> None:
        state = ServerState()
        assert state.phase == "loading" and await state.wait_idle(0)

        async def work() -> None:
            with state.running():
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(work()) for _ in range(2)]
        await asyncio.sleep(0)
        assert state.n_active == 2 and not await state.wait_idle(0)
        state.become_ready()
        assert state.phase == "ready"
        state.begin_drain()
        state.become_ready()  # a load that ends meanwhile changes nothing
        assert state.phase == "draining"
        assert state.cut() == 2
        assert await state.wait_idle(PATIENCE_S) and state.n_active == 0
        assert all(task.cancelled() for task in tasks)

    asyncio.run(check())


def test_connections_leave_files_to_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource") if os.name == "posix" else None
    if resource is None:
        return
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    assert lifecycle._bound_by_files(1024) == 128
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert lifecycle._bound_by_files(1024) == 1024

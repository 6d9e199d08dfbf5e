"""The server's life: listen, load, answer, drain, end.

`serve` binds first, so that a port in use is known before any model is read, and answers from then
on (`/health` says `loading`). The first SIGTERM, SIGINT or SIGHUP begins the drain: connections are
still taken, but new requests get 503; the running ones have `drain_s`, after that each is cancelled
and tells its client so in its own dialect. The second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from llmrun.errors import LlmrunError
from llmrun.server.listening import bind_sockets, url_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp

Phase = Literal["loading", "ready", "draining"]

# Some launchers pass a Ctrl-C on that the terminal has sent to us as well.
_SAME_SIGNAL_S = 0.25


class ServerState:
    """What the server is doing now. Everything but reading `phase` and `n_active` belongs to the
    event loop's thread."""

    def __init__(self) -> None:
        self.phase: Phase = "loading"
        self.is_cut = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._stopper: Callable[[], None] | None = None
        self._is_stop_asked = False

    @property
    def n_active(self) -> int:
        """Requests being worked on."""
        return len(self._tasks)

    def become_ready(self) -> None:
        if self.phase == "loading":
            self.phase = "ready"

    def begin_drain(self) -> None:
        """From now on new requests are refused."""
        self.phase = "draining"

    def ask_to_stop(self) -> None:
        """From any thread: what the first signal does."""
        self._is_stop_asked = True
        if self._stopper is not None:
            self._stopper()

    def stop_with(self, stopper: Callable[[], None]) -> None:
        """`stopper`, which any thread may call, begins the end of the server."""
        self._stopper = stopper
        if self._is_stop_asked:
            stopper()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """For the time that the current task works on a request."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._idle.clear()
        try:
            yield
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._idle.set()

    async def wait_idle(self, seconds: float) -> bool:
        """Whether no request is left within so many seconds."""
        if not self._tasks:
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return not self._tasks

    def cut(self) -> int:
        """Cancel the tasks of the requests that are left; how many."""
        self.is_cut = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return len(tasks)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where to listen, and for how long to wait. Port 0 takes a free one.

    `drain_s` is for running requests after the first signal, `cut_s` for the words of those that
    were cut, `stop_s` for what ends afterwards (models), `abort_s` for `on_abort`, and once more
    for what is still to be written.
    `head_s` is how long a request's head may take from its first byte (from the connection for the
    first), `keep_alive_s` how long a connection may be idle between requests, `stall_s` how long a
    client may leave what it is sent unread.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    drain_s: float = 30.0
    cut_s: float = 2.0
    stop_s: float = 15.0
    abort_s: float = 1.0
    head_s: float = 10.0
    keep_alive_s: float = 30.0
    stall_s: float = 30.0
    max_header_bytes: int = 32 << 10
    max_connections: int = 1024


Hook = Callable[[], Awaitable[None]]


def serve(
    app: ASGIApp,
    options: ServeOptions,
    state: ServerState,
    *,
    on_listen: Callable[[str], None] | None = None,
    on_start: Hook | None = None,
    on_ready: Callable[[str], None] | None = None,
    on_drain: Callable[[int], None] | None = None,
    on_stop: Hook | None = None,
    on_abort: Callable[[], None] | None = None,
) -> int:
    """Serve until a signal comes; the exit code: 0 after a drain, 130 or 143 when the signal came
    before the server was ready.

    In this order: `on_listen(url)` as soon as requests are answered; `on_start` loads what has to
    be loaded, and its errors end the server; `on_ready(url)`; `on_drain(n_active)` after the first
    signal; `on_stop` in any case, when no request is left. `on_abort` is called, in a thread, just
    before the process ends without all this (second signal, or nothing ends within `stop_s`): it
    should ask engines to stop; it has `abort_s`.

    In a thread that is not the main one no signals are heard; `state.ask_to_stop()` does the same.

    Raises UsageError (no such address), LlmrunError (port in use, not allowed), and whatever
    `on_start` raises.
    """
    sockets = bind_sockets(options.host, options.port)
    life = _Life(app, options, state, sockets, on_abort)
    life.on_listen, life.on_start, life.on_ready = on_listen, on_start, on_ready
    life.on_drain, life.on_stop = on_drain, on_stop
    try:
        with _quiet_logs(), _signals(life):
            return asyncio.run(life.run())
    finally:
        life.ended.set()
        for sock in sockets:
            sock.close()


# ---- from start to end


class _Life:
    """One run of the server."""

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        state: ServerState,
        sockets: list[socket.socket],
        on_abort: Callable[[], None] | None,
    ) -> None:
        self.on_listen: Callable[[str], None] | None = None
        self.on_start: Hook | None = None
        self.on_ready: Callable[[str], None] | None = None
        self.on_drain: Callable[[int], None] | None = None
        self.on_stop: Hook | None = None
        self._app = app
        self._options = options
        self._state = state
        self._sockets = sockets
        self._on_abort = on_abort
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self.ended = threading.Event()
        self._signal: tuple[int, float] | None = None

    # -- signals

    def hear(self, number: int, frame: FrameType | None = None) -> None:
        """A signal, in the main thread between any two of its steps."""
        now = time.monotonic()
        if self._signal is not None:
            if now - self._signal[1] < _SAME_SIGNAL_S:
                return
            self.exit_now(128 + number)
        self._signal = (number, now)
        self._wake()

    def _wake(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)

    def exit_now(self, code: int) -> None:
        """End the process without unwinding: threads may be inside the library's C code, which
        the interpreter's own end would pull the ground from under."""
        # Either may never return: a stream that a thread is writing to a stopped terminal is its.
        for work in (self._abort, _flush):
            thread = threading.Thread(target=work, name="abort", daemon=True)
            thread.start()
            thread.join(self._options.abort_s)
        os._exit(code)

    def _abort(self) -> None:
        if self._on_abort is not None:
            with contextlib.suppress(Exception):
                self._on_abort()

    # -- the loop

    async def run(self) -> int:
        from llmrun.server.connection import ConnectionLimits, make_server

        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_report_loop_error)
        if self._signal is not None:  # it came before there was a loop
            self._stop.set()
        self._state.stop_with(self._wake)
        options = self._options
        limits = ConnectionLimits(
            head_s=options.head_s,
            keep_alive_s=options.keep_alive_s,
            stall_s=options.stall_s,
            max_header_bytes=options.max_header_bytes,
            max_connections=_bound_by_files(options.max_connections),
        )
        server = make_server(self._app, limits)
        serving = asyncio.create_task(server.serve(self._sockets))
        try:
            await self._until(server.listening.wait(), serving)
            if not server.started:
                raise LlmrunError("the server did not start", why="its application failed")
            return await self._answer(serving)
        finally:
            self._state.begin_drain()
            self._watch_end()
            server.should_exit = True
            await serving
            if self.on_stop is not None:
                await self.on_stop()

    async def _answer(self, serving: asyncio.Task[None]) -> int:
        url = url_of(self._sockets)
        if self.on_listen is not None:
            self.on_listen(url)
        if self.on_start is not None:
            starting = asyncio.ensure_future(self.on_start())
            stopping = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not starting.done():
                    return 128 + (self._signal[0] if self._signal else signal.SIGTERM)
                starting.result()
            finally:
                starting.cancel()
                stopping.cancel()
                await asyncio.gather(starting, stopping, return_exceptions=True)
        self._state.become_ready()
        if self.on_ready is not None:
            self.on_ready(url)
        await self._until(self._stop.wait(), serving)
        await self._drain()
        return 0

    async def _drain(self) -> None:
        state, options = self._state, self._options
        state.begin_drain()
        if self.on_drain is not None:
            self.on_drain(state.n_active)
        if not await state.wait_idle(options.drain_s):
            state.cut()
            await state.wait_idle(options.cut_s)

    async def _until(self, event: Awaitable[Any], serving: asyncio.Task[None]) -> None:
        """Wait for `event`, or for the end of the server by itself."""
        waiting = asyncio.ensure_future(event)
        try:
            await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()

    def _watch_end(self) -> None:
        """From here on the process ends within `stop_s`, whatever hangs. For a server that has
        the process to itself (signals are heard)."""
        if threading.current_thread() is not threading.main_thread():
            return
        code = 128 + self._signal[0] if self._signal is not None else 1

        def watch() -> None:
            if not self.ended.wait(self._options.stop_s):
                self.exit_now(code)

        threading.Thread(target=watch, name="end", daemon=True).start()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            stream.flush()


@contextlib.contextmanager
def _signals(life: _Life) -> Iterator[None]:
    """Signals go to `life`. `signal.signal` rather than the loop's own way: it is there on
    Windows too, and works while the loop is in a callback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    for name in ("SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        # nohup has SIGHUP ignored, and that must stay.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            numbers.append(number)
    before = [(number, signal.signal(number, life.hear)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """uvicorn and asyncio log tracebacks and request lines; what is worth a word the middleware
    says. With LLMRUN_DEBUG=1 they may."""
    if os.environ.get("LLMRUN_DEBUG") == "1":
        yield
        return
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "uvicorn.asgi", "asyncio")]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


def _report_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if os.environ.get("LLMRUN_DEBUG") == "1":
        loop.default_exception_handler(context)


def _bound_by_files(n: int) -> int:
    """So many connections as leave half of the process's files to the rest."""
    try:
        import resource
    except ImportError:
        return n
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return n if soft == resource.RLIM_INFINITY else max(16, min(n, soft // 2))

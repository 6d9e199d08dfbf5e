"""Connections: uvicorn's HTTP/1.1 protocol with the deadlines and bounds that it lacks.

h11 rather than httptools, on purpose: it comes with uvicorn, bounds a head, a trailer and a chunk's
head by `h11_max_incomplete_event_size` (httptools bounds none of them, and adds trailers to a
request's headers), and refuses more than one Host and unknown transfer codings. It costs some 5 µs
more for each piece of a streamed answer.

What uvicorn leaves open and this module closes:

* no deadline for a request's head (slow loris), nor for a client that reads nothing;
* pipelined requests: uvicorn stops reading when something comes during an answer, so that a client
  that goes is not noticed any more. Here it is thrown away, and the connection is closed after the
  answer, as RFC 9112 (9.3.2) lets a server do (what came in one piece with the request is answered
  after it);
* a client that has shut its sending side counts as gone, like one that has closed: over TCP they
  look the same;
* bounds on connections that wait for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

_TICK_S = 1.0
_REFUSAL = (
    b"HTTP/1.1 400 Bad Request\r\n"
    b"content-type: application/json\r\n"
    b"x-content-type-options: nosniff\r\n"
    b"connection: close\r\n"
    b"content-length: %d\r\n\r\n%b"
)
_REFUSAL_BODY = (
    b'{"error": {"message": "this is not a valid HTTP request", '
    b'"type": "invalid_request_error", "param": null, "code": null}}'
)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """See `lifecycle.ServeOptions`. `close_s` is for what has been sent to leave the machine when
    the server ends."""

    head_s: float = 10.0
    keep_alive_s: float = 30.0
    stall_s: float = 30.0
    close_s: float = 5.0
    max_header_bytes: int = 32 << 10
    max_connections: int = 1024


class GuardedProtocol(H11Protocol):
    """One connection. `limits` is set by `make_protocol`."""

    limits = ConnectionLimits()
    _waiting_since: float | None = None
    _stalled_since: float | None = None
    _n_unsent = 0
    _timer: asyncio.TimerHandle | None = None

    # ---- asyncio's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting_since = time.monotonic()
        limits = self.limits
        self._tick_s = min(_TICK_S, limits.head_s / 4, limits.stall_s / 4)
        self._timer = self.loop.call_later(self._tick_s, self._check)
        if len(self.connections) > limits.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._is_answering():
            if self.conn.their_state is not h11.SEND_BODY:
                self.cycle.keep_alive = False
                return
        elif self._waiting_since is None:
            self._waiting_since = time.monotonic()
        if not self.transport.is_closing():
            super().data_received(data)
        if self._is_answering():
            self._waiting_since = None

    def eof_received(self) -> None:
        self._tell_gone()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    # ---- uvicorn's calls

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP. In the middle of an answer nothing can be said any more."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_REFUSAL % (len(_REFUSAL_BODY), _REFUSAL_BODY))
        self._tell_gone()
        self.transport.close()

    # ---- deadlines

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _tell_gone(self) -> None:
        """Whoever works for this connection learns that there is nobody to answer."""
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.flow.resume_writing()

    def _check(self) -> None:
        """Once in a while: is the client as quick as it has to be?"""
        self._timer = self.loop.call_later(self._tick_s, self._check)
        now = time.monotonic()
        since = self._waiting_since
        if since is not None and now - since > self.limits.head_s and not self._is_answering():
            self.transport.close()
        n_unsent = self.transport.get_write_buffer_size()
        is_stuck = n_unsent and (self.flow.write_paused or self.transport.is_closing())
        if not is_stuck or (self._stalled_since is not None and n_unsent < self._n_unsent):
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = now
        elif now - self._stalled_since > self.limits.stall_s:
            self.transport.abort()
        self._n_unsent = n_unsent

    def _make_room(self) -> None:
        """Too many connections: the one that has asked for nothing for the longest time goes."""
        idle = [each for each in self.connections if isinstance(each, GuardedProtocol)]
        idle = [each for each in idle if not each._is_answering()]
        oldest = min(idle, key=lambda each: each._waiting_since or 0.0, default=self)
        oldest.connections.discard(oldest)
        oldest.transport.abort()


class GuardedServer(uvicorn.Server):
    """uvicorn's server, which leaves signals to `lifecycle` and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:  # the application's own start failed
            self.should_exit = True
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_protocol(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """The protocol with these limits."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})


def make_server(app: ASGIApp, limits: ConnectionLimits) -> GuardedServer:
    """A server for `app` that neither logs nor tells what it is made of."""
    config = uvicorn.Config(
        app,
        http=make_protocol(limits),
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        # Whoever can connect could say to be somebody else.
        proxy_headers=False,
        timeout_keep_alive=max(1, round(limits.keep_alive_s)),
        timeout_graceful_shutdown=max(1, round(limits.close_s)),
        h11_max_incomplete_event_size=limits.max_header_bytes,
    )
    return GuardedServer(config)

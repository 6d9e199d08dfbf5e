"""The outermost layer of the application: what `guard` refuses never reaches a route.

Pure ASGI, so that a stream costs one call more for each piece and a client that goes is seen by the
route itself. A request comes to the application with its body already read: bounded in size and
time, and only when all that its head says is in order. All answers get the headers that keep
browsers from misusing them, and every error is in the dialect of the path that was asked for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmrun.server import guard
from llmrun.server.guard import GuardOptions
from llmrun.server.lifecycle import ServerState
from llmrun.server.types import ApiError, ErrorAnswer

EncodeError = Callable[[Scope, ApiError], ErrorAnswer]
Log = Callable[[str], None]

_RETRY_S = 1.0
_DRAIN_RETRY_S = 5.0
_GONE = 499  # for the log only: nobody was there any more to be answered

_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
# A page may set a stricter policy of its own.
_PAGE_POLICY = b"frame-ancestors 'none'; base-uri 'none'; object-src 'none'; form-action 'none'"


class GuardMiddleware:
    """`app` behind `options`. `encode_error(scope, error)` makes an error in the path's dialect.
    `log` gets one line a request: method, path, status, milliseconds; never a query, a header, or
    anything of a body."""

    def __init__(
        self,
        app: ASGIApp,
        options: GuardOptions,
        encode_error: EncodeError,
        state: ServerState | None = None,
        *,
        log: Log | None = None,
    ) -> None:
        self._app = app
        self._options = options
        self._encode_error = encode_error
        self._state = state or ServerState()
        self._log = log
        self._n_buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        answer = _Answer(send)
        began = time.monotonic()
        try:
            await self._handle(scope, receive, answer)
        finally:
            if self._log is not None:
                path = scope["path"][:200].encode("ascii", "backslashreplace").decode()
                ms = (time.monotonic() - began) * 1000
                status = answer.status or _GONE
                self._log(f"{_printable(scope['method'])} {_printable(path)} {status} {ms:.0f} ms")

    async def _handle(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            if await self._check_head(scope, answer):
                return
            body = await self._read_body(receive)
            # A while may have passed.
            if not self._options.is_open(scope["method"], scope["path"]):
                self._check_room()
            await self._run(scope, _replay(body, receive), answer)
        except ApiError as error:
            await self._refuse(scope, answer, error)
        except ClientDisconnect:
            answer.status = answer.status or _GONE
        except Exception as error:
            _debug(scope, error)
            if answer.has_started:
                raise  # the server closes the connection, which is all that can still be said
            await self._refuse(
                scope, answer, ApiError("internal", "something went wrong inside the server")
            )

    async def _check_head(self, scope: Scope, answer: _Answer) -> bool:
        """Whether the request is answered already. Raises ApiError for what is refused."""
        options, headers, method = self._options, scope["headers"], scope["method"]
        path = scope["path"]
        target = scope.get("raw_path") or path.encode()
        too_large = guard.check_head_size(target + scope["query_string"], headers, options)
        if too_large is not None:
            error = ApiError("too_large", "the request's address or headers are too long")
            await self._refuse(scope, answer, error, too_large)
            return True
        host = guard.check_host(headers, options)
        answer.origin = guard.check_origin(method, headers, host, options)
        answer.varies = bool(options.origins)
        if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
            raise ApiError("invalid_request", "only HTTP/1.1 is spoken here")
        if not path.startswith("/"):
            raise ApiError("invalid_request", "the request's address is no path")
        if answer.origin is not None and guard.is_preflight(method, headers):
            await answer.send_preflight(guard.preflight_headers(headers, answer.origin))
            return True
        if not options.is_open(method, path):
            guard.check_key(headers, options)
            self._check_room()
        guard.check_framing(headers, options)
        guard.check_content_type(method, headers)
        return False

    def _check_room(self) -> None:
        if self._state.phase == "draining":
            raise _shutting_down()
        if self._state.n_active >= self._options.max_active:
            raise ApiError("unavailable", "too many requests at once", retry_after_s=_RETRY_S)

    async def _read_body(self, receive: Receive) -> bytes:
        """The whole body. Raises ApiError (too_large, timeout, unavailable), ClientDisconnect."""
        options = self._options
        pieces: list[bytes] = []
        n_bytes = 0
        try:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(options.receive_s) as deadline:
                began = loop.time()
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    piece = message.get("body", b"")
                    if piece:
                        pieces.append(piece)
                        n_bytes += len(piece)
                        self._n_buffered += len(piece)
                        if n_bytes > options.max_body_bytes:
                            raise guard.body_too_large(options)
                        if self._n_buffered > options.max_buffered_bytes:
                            raise ApiError(
                                "unavailable", "too much to read at once", retry_after_s=_RETRY_S
                            )
                        allowed_s = options.receive_s + n_bytes / options.min_body_rate
                        deadline.reschedule(began + allowed_s)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise ApiError("timeout", "the body did not come in time") from None
        finally:
            self._n_buffered -= n_bytes

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        state = self._state
        try:
            with state.running():
                await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:
            # At the end of a drain. Who has begun an answer has said so itself (see `streaming`).
            task = asyncio.current_task()
            if not state.is_cut or task is None or (answer.has_started and not answer.is_complete):
                raise
            task.uncancel()
            if not answer.has_started:
                raise _shutting_down() from None

    async def _refuse(
        self, scope: Scope, answer: _Answer, error: ApiError, status: int | None = None
    ) -> None:
        if answer.has_started:
            raise error
        encoded = self._encode_error(scope, error)
        headers = dict(encoded.headers)
        if error.kind == "authentication":
            headers["WWW-Authenticate"] = "Bearer"
        if error.retry_after_s is not None:
            headers.setdefault("Retry-After", str(max(1, round(error.retry_after_s))))
        if self._state.phase == "draining" or error.kind == "timeout":
            headers["Connection"] = "close"
        await answer.send_json(status or encoded.status, encoded.body, headers)


class _Answer:
    """One answer on its way out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.origin: str | None = None
        self.varies = False
        self.status = 0
        self.has_started = False
        self.is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            self.status = message["status"]
            message = {**message, "headers": self._complete(message.get("headers", ()))}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)

    def _complete(self, given: object) -> list[tuple[bytes, bytes]]:
        """An answer's headers, with ours where it has none of its own."""
        headers = [(bytes(name).lower(), bytes(value)) for name, value in given]  # type: ignore[attr-defined]
        headers = [pair for pair in headers if pair[0] not in (b"server",)]
        known = {name for name, _ in headers}
        ours = list(_SECURITY_HEADERS)
        if dict(headers).get(b"content-type", b"").startswith(b"text/html"):
            ours += [(b"content-security-policy", _PAGE_POLICY), (b"x-frame-options", b"DENY")]
        else:
            ours.append((b"cache-control", b"no-store"))
        if self.origin is not None:
            headers = [p for p in headers if not p[0].startswith(b"access-control-")]
            ours.append((b"access-control-allow-origin", self.origin.encode("latin-1")))
            ours.append((b"access-control-expose-headers", b"Retry-After"))
        headers += [pair for pair in ours if pair[0] not in known]
        if self.varies:
            headers.append((b"vary", b"Origin"))
        return headers

    async def send_json(
        self, status: int, body: Mapping[str, object], headers: Mapping[str, str]
    ) -> None:
        text = json.dumps(body, ensure_ascii=True).encode()
        raw = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
        raw += [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": text})

    async def send_preflight(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.origin, self.varies = None, False  # these headers are complete
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read: the body once, then what follows, which
    is only the client's going."""
    held: list[bytes] = [body]

    async def next_message() -> Message:
        if held:
            return {"type": "http.request", "body": held.pop(), "more_body": False}
        return await receive()

    return next_message


def _shutting_down() -> ApiError:
    return ApiError(
        "unavailable",
        "the server is shutting down",
        code="shutting_down",
        retry_after_s=_DRAIN_RETRY_S,
    )


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _debug(scope: Scope, error: Exception) -> None:
    """A defect. Its words may hold a prompt, so they are shown to developers only."""
    if os.environ.get("LLMRUN_DEBUG") == "1":
        logging.getLogger("llmrun.server").error("%s failed", scope["path"], exc_info=error)

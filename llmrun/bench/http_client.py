"""Talking to a server of the OpenAI protocol: its address, its models, and the errors users see.

What it sends is bounded in size and in time. The key is sent to the server and shown nowhere, not
even where the server repeats it in an error.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from llmrun import __version__
from llmrun.bench.sse import Event, EventReader
from llmrun.errors import (
    AuthError,
    LlmrunError,
    NotFoundError,
    ServerError,
    ServerUnreachableError,
    UsageError,
)
from llmrun.text import close_names

if TYPE_CHECKING:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

CHAT, COMPLETIONS = "/chat/completions", "/completions"
NO_SUCH_ENDPOINT = (404, 405, 501)

_MAX_REPLY_BYTES = 4 << 20
_MAX_REASON = 300


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """In seconds: to connect, of silence (the first token of a long prompt may take long), and of
    one whole request."""

    connect_s: float = 10.0
    silence_s: float = 120.0
    request_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answered. `base` ends before `/models`; `models` are all that it offers, empty
    where it does not tell."""

    base: str
    model: str
    models: tuple[str, ...]
    software: str
    api_key: str | None = field(default=None, repr=False)


def clean_base(text: str) -> str:
    """The address below which `/models` lies: `localhost:8000` -> `http://localhost:8000/v1`. A
    path of its own is kept. Raises UsageError."""
    text = text.strip()
    address = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    # An address goes into messages and the history; what may be a password is not repeated.
    if not host or parts.scheme not in ("http", "https") or re.search(r"[\x00-\x20\x7f]", address):
        raise UsageError(
            "--url needs the address of a server",
            why="it begins with http:// or https:// and has a host",
            hint="llmrun bench --url http://localhost:8000",
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            "--url takes an address without user name, password or query",
            why="it would be shown and kept in the history",
            hint="put the key into the environment: export OPENAI_API_KEY=...",
        )
    path = parts.path.rstrip("/")
    for ending in (CHAT, COMPLETIONS, "/models"):
        path = path.removesuffix(ending)
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


def check_api_key(key: str | None) -> str | None:
    """The key without white space around it; None for an empty one. Raises UsageError, without
    the key, when it cannot stand in a request."""
    key = (key or "").strip()
    if not re.fullmatch(r"[\x21-\x7e]{0,4096}", key):
        raise UsageError(
            "the API key has characters that no key has",
            hint="set it anew: export OPENAI_API_KEY=...",
        )
    return key or None


class ServerClient:
    """One HTTP client with the errors that users see."""

    def __init__(self, base: str, api_key: str | None, limits: TimeLimits) -> None:
        self.base = base
        self._api_key = api_key
        self._limits = limits
        self._http: httpx.AsyncClient | None = None
        self._n_connections = 1

    @asynccontextmanager
    async def opened(self, n_connections: int) -> AsyncIterator[None]:
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        self._n_connections = n_connections
        headers = {"User-Agent": f"llmrun/{__version__}", "Accept-Encoding": "identity"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        limits = self._limits
        async with httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(limits.silence_s, connect=limits.connect_s),
            limits=httpx.Limits(max_connections=n_connections + 2, keepalive_expiry=None),
            # A proxy stands between this machine and others, never before its own servers.
            trust_env=not _is_loopback(self.base),
        ) as self._http:
            yield

    async def find(self, model: str | None) -> Server:
        """What it offers, with `model` or the only one chosen. Raises NotFoundError, UsageError,
        and the errors of `request` and `refusal`."""
        status, body, software = await self._get("/models")
        ids: list[str] = []
        if status == 200:
            data = body.get("data") if isinstance(body, dict) else None
            entries = data if isinstance(data, list) else []
            found = [entry.get("id") for entry in entries if isinstance(entry, dict)]
            ids = [name for name in found if isinstance(name, str) and name]
        elif status not in NO_SUCH_ENDPOINT:
            raise self.refusal(status, body)
        chosen = _choose_model(model, ids, self.base)
        return Server(self.base, chosen, tuple(ids), software, self._api_key)

    async def _get(self, path: str) -> tuple[int, Any, str]:
        async with self.request("GET", path) as (response, _):
            body = await self._read_body(response)
            return response.status_code, body, response.headers.get("server", "")[:100]

    @asynccontextmanager
    async def request(
        self, method: str, path: str, body: Mapping[str, object] | None = None
    ) -> AsyncIterator[tuple[httpx.Response, float]]:
        """A reply whose body was not read yet, and the clock's seconds at which it was asked for.
        Raises ServerUnreachableError for whatever breaks the transport, also while the body is
        read."""
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        assert self._http is not None
        try:
            async with asyncio.timeout(self._limits.request_s):
                request = self._http.build_request(method, self.base + path, json=body)
                response, started = await self._send(self._http, request)
                try:
                    yield response, started
                finally:
                    await response.aclose()
        except TimeoutError:
            raise self._unreachable(f"no end after {self._limits.request_s:.0f} s") from None
        except httpx.ConnectTimeout:
            raise self._unreachable(f"no answer in {self._limits.connect_s:.0f} s") from None
        except httpx.TimeoutException:
            raise self._unreachable(f"silent for {self._limits.silence_s:.0f} s") from None
        except httpx.ConnectError as error:
            raise self._unreachable(self._clean(str(error)) or "no connection") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = self._clean(str(error)) or type(error).__name__
            raise self._unreachable(f"the connection broke: {why}") from None

    async def _send(
        self, http: httpx.AsyncClient, request: httpx.Request
    ) -> tuple[httpx.Response, float]:
        """Servers close connections that were used for a while, just when the next request is on
        its way (llama-server does): that is no fault, and it is asked again, on another one."""
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        n_left = self._n_connections + 1
        while True:
            started = time.perf_counter()
            try:
                return await http.send(request, stream=True), started
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                n_left -= 1
                if n_left < 0:
                    raise

    async def _read_body(self, response: httpx.Response) -> Any:
        """The body as JSON, or its beginning as text."""
        content = b""
        async for piece in response.aiter_raw():
            content += piece
            if len(content) > _MAX_REPLY_BYTES:
                raise self.misunderstood("its answer is too long")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            return content[:_MAX_REASON].decode("utf-8", "replace")

    async def read_events(
        self, response: httpx.Response, reader: EventReader
    ) -> AsyncIterator[tuple[Event, ...]]:
        """The events of a stream, together where they came together."""
        async for piece in response.aiter_raw():
            yield tuple(reader.feed(piece))
        yield tuple(reader.end())

    async def read_refusal(self, response: httpx.Response) -> LlmrunError:
        """The error that a reply with a bad status is for the user."""
        return self.refusal(response.status_code, await self._read_body(response))

    def refusal(self, status: int, body: object) -> LlmrunError:
        """As `read_refusal`, for a body that was read."""
        why = f"{self.base} answers {status}"
        reason = self._clean(_find_reason(body))
        if reason:
            why += f": {reason}"
        if status in (401, 403):
            return AuthError(
                "the server wants another API key" if self._api_key else "the server wants a key",
                why=why,
                hint="export OPENAI_API_KEY=..., or pass --api-key",
            )
        if 300 <= status < 400:
            return ServerError(
                "the server is somewhere else", why=why, hint="pass the address it moved to"
            )
        # Servers that are loading a model, or are full, say so with these.
        hint = "wait until the server is ready, then again" if status in (429, 503) else None
        return ServerError("the server refused the request", why=why, hint=hint)

    def misunderstood(self, why: str) -> ServerError:
        return ServerError(
            "the server does not answer as an OpenAI-compatible one",
            why=f"{self.base}: {self._clean(why)}",
            hint="pass the address below which /models and /chat/completions are",
        )

    def broken(self, body: object) -> ServerError:
        """An error that came in the middle of an answer."""
        reason = self._clean(_find_reason(body))
        return ServerError("the server broke off its answer", why=f"{self.base}: {reason}")

    def _unreachable(self, why: str) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"no answer from {self.base}", why=why, hint=f"curl {self.base}/models"
        )

    def _clean(self, text: str) -> str:
        """Short, one line, without the key."""
        if self._api_key:
            text = text.replace(self._api_key, "***")
        text = " ".join(text.split())
        return text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 1] + "…"


def _choose_model(model: str | None, offered: list[str], base: str) -> str:
    if model is None:
        if len(offered) == 1:
            return offered[0]
        if not offered:
            raise NotFoundError(
                "the server does not say which models it has",
                why=f"{base}/models names none",
                hint="name the model as the server knows it",
            )
        shown = ", ".join(name[:100] for name in offered[:8])
        raise UsageError(
            "the server has several models: name one",
            why=shown + (", …" if len(offered) > 8 else ""),
            hint="name the model as the server knows it",
        )
    # Ollama adds a tag to names that are written without.
    for name in (model, f"{model}:latest"):
        if name in offered or not offered:
            return name
    near = close_names(model, offered[:1000])
    raise NotFoundError(
        f"the server has no model {model!r}",
        why=f"it has {', '.join(name[:100] for name in offered[:8])}",
        hint=f"did you mean {near[0]}?" if near else None,
    )


def _find_reason(body: object) -> str:
    """The sentence in the many shapes that servers give to errors."""
    for key in ("error", "message", "detail", "error_message"):
        if not isinstance(body, dict):
            break
        if body.get(key):
            return _find_reason(body[key])
    if isinstance(body, str):
        return body
    return json.dumps(body)[:_MAX_REASON] if body else ""


def _is_loopback(base: str) -> bool:
    host = urlsplit(base).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")

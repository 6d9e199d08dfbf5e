"""The pages for people: the web chat at `/`, the API's description at `/docs`.

The files beside this module are sent as they are, with nothing built and nothing from elsewhere:
the policy forbids a browser to load anything that is not this server's, and scripts and styles that
stand in a page. The scripts use the API like any other client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
"""The last member makes a browser refuse text as HTML or script, whoever hands it over."""

GREETING = b"llmrun is running\n"
"""What `/` says to what is no browser; clients of the Ollama dialect look whether it answers."""

_PAGES = {"/": "index.html", "/docs": "docs.html"}
_ASSETS = (
    "api.js", "chat.js", "conversation.js", "docs.js", "dom.js", "icon.svg", "markdown.js",
    "settings.js", "sse.js", "store.js", "style.css", "words.js",
)  # fmt: skip
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str


def pages() -> dict[str, Handler]:
    """The handlers for GET and HEAD by path. The files are read now, so that a package replaced
    while the server runs never gives pages of two versions."""
    found = {path: _answer_with(_read(name)) for path, name in _PAGES.items()}
    found |= {f"/ui/{name}": _answer_with(_read(name)) for name in _ASSETS}
    found["/"] = _greet_or(found["/"])
    return found


def greetings() -> dict[str, Handler]:
    """What is left of `pages` where nobody wants them: the line at `/`."""

    async def answer(request: Request) -> Response:
        return Response(GREETING, media_type="text/plain")

    return {"/": answer}


def _read(name: str) -> _File:
    body = files(__name__).joinpath(name).read_bytes()
    suffix = name[name.rindex(".") :]
    return _File(body, _TYPES[suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _answer_with(file: _File) -> Handler:
    # Kept by the browser, and asked about each time: a newer server has other files.
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "Content-Type": file.media_type,
        "ETag": file.etag,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def answer(request: Request) -> Response:
        if _has_it(request, file.etag):
            kept = {name: headers[name] for name in headers if name != "Content-Type"}
            return Response(status_code=304, headers=kept)
        return Response(file.body, headers=headers)

    return answer


def _greet_or(page: Handler) -> Handler:
    """The page for who says that it reads HTML, which all browsers do; a line for others."""

    line = greetings()["/"]

    async def answer(request: Request) -> Response:
        if _reads_html(request):
            response = await page(request)
        else:
            response = await line(request)
        response.headers["Vary"] = "Accept"
        return response

    return answer


def _has_it(request: Request, etag: str) -> bool:
    """Whether `If-None-Match` names the file as it is. A proxy may have made the tag a weak one."""
    held = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
    return "*" in held or etag in [tag.removeprefix("W/") for tag in held]


def _reads_html(request: Request) -> bool:
    accepted = request.headers.get("accept", "").lower().split(",")
    return any(entry.partition(";")[0].strip() == "text/html" for entry in accepted)

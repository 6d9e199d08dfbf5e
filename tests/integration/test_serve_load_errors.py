"""A load that fails by a defect: each dialect's client hears what kind, and nothing of its words,
which may be paths or worse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.raw_http import Answer
from tests.fakes.running_server import RunningServer, fake_server

SECRET = "/home/somebody/a secret"
USER = [{"role": "user", "content": "Hi!"}]

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "Hi!"},
    "/v1/responses": {"input": "Hi!"},
    "/v1/embeddings": {"input": "Hi!"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"content": "Hi!"},
    "/v1/messages": {"messages": USER, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": USER},
    "/api/chat": {"messages": USER},
    "/api/generate": {"prompt": "Hi!"},
    "/api/embed": {"input": "Hi!"},
}
STREAMED = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/api/chat",
    "/api/generate",
]


def fail() -> None:
    raise ZeroDivisionError(SECRET)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with fake_server({"m": fail}) as server:
        yield server


def message_of(path: str, answer: Answer) -> str:
    """The error's words, in the dialect's own place; its type is that of a server's failure."""
    body = answer.json()
    if path.startswith("/api/"):
        assert list(body) == ["error"]
        return str(body["error"])
    # The clients of these dialects would try again, which is of no use.
    assert answer.headers["x-should-retry"] == ["false"]
    if path.startswith("/v1/messages"):
        assert (body["type"], body["error"]["type"]) == ("error", "api_error")
    else:
        assert body["error"]["type"] == "server_error"
    return str(body["error"]["message"])


@pytest.mark.parametrize(
    ("path", "stream"), [*((path, False) for path in BODIES), *((path, True) for path in STREAMED)]
)
def test_only_the_kind_of_a_defect_is_told(server: RunningServer, path: str, stream: bool) -> None:
    answer = server.ask(f"POST {path}", {"model": "m", "stream": stream, **BODIES[path]})
    assert answer.status == 500
    assert b"secret" not in answer.body and b"somebody" not in answer.body
    assert message_of(path, answer) == "the model could not be loaded: ZeroDivisionError"

"""Whatever JSON comes, to whatever endpoint: an answer, or an error in the dialect's own shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.engine.embedder import Embedder
from llmrun.server import (
    wire_anthropic,
    wire_completions,
    wire_embeddings,
    wire_extras,
    wire_ollama,
    wire_openai,
    wire_responses,
)
from tests.fakes.any_json import ANY_JSON, bodies
from tests.fakes.fake_embed_backend import FakeEmbedBackend
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.raw_http import Answer
from tests.fakes.running_server import RunningServer, fake_server

USER = {"role": "user", "content": "Hi!"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

# A body that is answered, and the schema that names the members there are.
ENDPOINTS: dict[str, tuple[dict[str, Any], Mapping[str, Any]]] = {
    "/v1/chat/completions": (
        {"model": "chat", "messages": [USER], "tools": [TOOL]},
        wire_openai.SCHEMA_CHAT,
    ),
    "/v1/completions": ({"model": "chat", "prompt": "Hi!"}, wire_completions.SCHEMA_COMPLETION),
    "/v1/responses": ({"model": "chat", "input": "Hi!"}, wire_responses.SCHEMA_RESPONSE),
    "/v1/embeddings": (
        {"model": "embed", "input": ["Hi!"]},
        wire_embeddings.SCHEMA_EMBEDDINGS,
    ),
    "/v1/messages": (
        {"model": "chat", "messages": [USER], "max_tokens": 9},
        wire_anthropic.SCHEMA_MESSAGES,
    ),
    "/v1/messages/count_tokens": (
        {"model": "chat", "messages": [USER]},
        wire_anthropic.SCHEMA_MESSAGES,
    ),
    "/api/chat": ({"model": "chat", "messages": [USER]}, wire_ollama.SCHEMA_CHAT),
    "/api/generate": ({"model": "chat", "prompt": "Hi!"}, wire_ollama.SCHEMA_GENERATE),
    "/api/embed": ({"model": "embed", "input": "Hi!"}, wire_ollama.SCHEMA_EMBED),
    "/api/embeddings": ({"model": "embed", "prompt": "Hi!"}, wire_ollama.SCHEMA_EMBEDDING),
    "/api/show": ({"model": "chat"}, wire_ollama.SCHEMA_SHOW),
    "/v1/rerank": (
        {"model": "rank", "query": "a", "documents": ["b", "c"]},
        wire_extras.SCHEMA_RERANK,
    ),
    "/tokenize": ({"model": "chat", "content": "Hi!"}, wire_extras.SCHEMA_TOKENIZE),
    "/detokenize": ({"model": "chat", "tokens": [72]}, wire_extras.SCHEMA_DETOKENIZE),
}


def names_of(schema: object) -> set[str]:
    """The members that a schema knows, at all depths."""
    found: set[str] = set()
    if isinstance(schema, Mapping):
        properties = schema.get("properties")
        if isinstance(properties, Mapping):
            found |= set(properties)
        for value in schema.values():
            found |= names_of(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            found |= names_of(value)
    return found


def answer_of(request: object) -> str:
    return "<think>Hm.</think>Hello! é"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    models = {
        "chat": lambda: FakeEngine([answer_of]),
        "embed": lambda: Embedder(FakeEmbedBackend()),
        "rank": lambda: Embedder(FakeEmbedBackend(pooling="rank")),
    }
    with fake_server(models, max_queue=64, keep_alive_s=-1.0) as server:
        yield server


def check(path: str, answer: Answer) -> None:
    assert 200 <= answer.status < 300 or 400 <= answer.status < 500, answer
    if answer.status >= 400:
        check_error(path, answer.json())
    elif answer.headers["content-type"][0].startswith("text/event-stream"):
        assert b"\ndata: " in b"\n" + answer.body
    else:
        for line in answer.body.splitlines():
            assert isinstance(json.loads(line), dict)


def check_error(path: str, body: Any) -> None:
    if path.startswith("/api/"):
        assert list(body) == ["error"] and isinstance(body["error"], str) and body["error"]
        return
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
    else:
        assert {"message", "type", "param", "code"} <= set(error)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_plain_body_is_answered(server: RunningServer, path: str) -> None:
    """The others begin with it: they would say little if it were refused."""
    answer = server.ask(f"POST {path}", ENDPOINTS[path][0])
    assert answer.status == 200, answer


@pytest.mark.parametrize("path", ENDPOINTS)
def test_any_json_gets_an_answer_or_the_dialects_error(server: RunningServer, path: str) -> None:
    body, schema = ENDPOINTS[path]
    names = sorted(names_of(schema))
    changes = st.dictionaries(
        st.sampled_from(names), ANY_JSON | bodies(names), min_size=1, max_size=2
    )
    client = server.connect()

    @settings(max_examples=60)
    @given(ANY_JSON | bodies(names) | changes.map(lambda change: {**body, **change}))
    def ask(value: object) -> None:
        client.request(f"POST {path}", body=json.dumps(value).encode())
        check(path, client.read_answer())

    ask()
    server.until_idle()


@pytest.mark.parametrize("path", ENDPOINTS)
def test_bytes_that_are_no_json_are_400(server: RunningServer, path: str) -> None:
    client = server.connect()
    for data in (b"", b"{", b"\xff\xfe", b"nul", b'{"a": NaN}', b"[" * 5000, b'{"a": 1e999}'):
        client.request(f"POST {path}", body=data)
        answer = client.read_answer()
        assert answer.status == 400, (data, answer)
        check_error(path, answer.json())


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_model_that_is_not_there_is_404_and_says_how_to_get_it(
    server: RunningServer, path: str
) -> None:
    answer = server.ask(f"POST {path}", {**ENDPOINTS[path][0], "model": "gone"})
    assert answer.status == 404, answer
    check_error(path, answer.json())
    assert "llmrun pull" in answer.body.decode() and "embed" in answer.body.decode()


@pytest.mark.parametrize("path", ["/v1/none", "/api/none", "/v1/messages/none", "/none"])
def test_a_path_that_is_not_there_is_404_in_the_dialects_shape(
    server: RunningServer, path: str
) -> None:
    for line in (f"GET {path}", f"POST {path}"):
        answer = server.ask(line, {} if line.startswith("POST") else None)
        assert answer.status == 404, answer
        check_error(path, answer.json())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/v1/messages"])
def test_a_wrong_method_is_405_in_the_dialects_shape(server: RunningServer, path: str) -> None:
    answer = server.ask(f"GET {path}")
    assert answer.status == 405, answer
    check_error(path, answer.json())

"""Clients that mean harm, and an engine that breaks, against the whole server."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest

from llmrun.engine.embedder import Embedder
from llmrun.engine.types import Request
from llmrun.errors import EngineStoppedError
from llmrun.server.listening import bind_sockets
from llmrun.server.wire_extras import MAX_CHARS
from tests.fakes.fake_embed_backend import FakeEmbedBackend
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.fakes.raw_http import PATIENCE_S
from tests.fakes.running_server import fake_server

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


# ---- answers without delay


def test_an_answers_body_does_not_wait_for_the_client_to_acknowledge_its_head() -> None:
    """asyncio looks for the protocol's number before it turns Nagle's algorithm off, and accepted
    connections have the listener's."""
    for each in bind_sockets("localhost", 0):
        with each:
            assert each.proto == socket.IPPROTO_TCP


# ---- an engine that breaks


def dying(_request: Request) -> tuple[str | BaseException, ...]:
    return "Hel", EngineStoppedError("the decode failed", why="a path: /home/user/secret")


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_a_broken_engine_is_loaded_anew(streams: bool) -> None:
    engines: list[FakeEngine] = []

    def make() -> FakeEngine:
        engines.append(FakeEngine(["Hello!"] if engines else [dying]))
        return engines[-1]

    with fake_server({"m": make}, pinned=("m",)) as server:
        answer = server.ask("POST /v1/chat/completions", {**CHAT, "stream": streams})
        text = answer.body.decode()
        assert "started again" in text and "secret" not in text
        if not streams:
            assert answer.status == 503 and answer.headers["retry-after"] == ["1"]
        answer = server.ask("POST /v1/chat/completions", CHAT)
        assert answer.status == 200 and "Hello!" in answer.body.decode()
        assert len(engines) == 2
        server.until(lambda: engines[0].closed, "the end of the broken engine")


# ---- vectors that nobody waits for


def test_who_goes_stops_the_vectors_too() -> None:
    backend = FakeEmbedBackend(n_seq_max=1, gate=threading.Semaphore(0))
    with fake_server({"m": lambda: Embedder(backend)}) as server:
        client = server.connect()
        client.request("POST /v1/embeddings", body=_json({"model": "m", "input": ["a"] * 50}))
        assert backend.began.wait(PATIENCE_S)
        client.close()
        server.until_idle()
        assert backend.gate is not None
        backend.gate.release(100)
        # This comes behind all that was left of the first one.
        assert server.ask("POST /v1/embeddings", {"model": "m", "input": "b"}).status == 200
        assert len(backend.batches) == 2


def test_texts_do_not_wait_for_vectors() -> None:
    """However many threads there are for all, vectors do not take them."""
    backend = FakeEmbedBackend(gate=threading.Semaphore(0))
    models = {"v": lambda: Embedder(backend), "m": lambda: FakeEngine(["Hello!"])}
    with fake_server(models, n_parallel=64) as server:
        for _ in range(40):
            client = server.connect()
            client.request("POST /v1/embeddings", body=_json({"model": "v", "input": "a"}))
        server.until(lambda: server.counts()[2] == 40, "the places of all")
        assert server.ask("POST /v1/chat/completions", CHAT).status == 200
        assert server.run(server.counts)[2] == 40  # they still wait


# ---- tokens


def test_only_the_pieces_that_are_wanted_are_made_and_not_in_the_event_loop() -> None:
    seen: list[tuple[int, str]] = []

    class Spy(FakeTokenizer):
        def piece(self, token: int) -> bytes:
            seen.append((token, threading.current_thread().name))
            return super().piece(token)

    def make() -> FakeEngine:
        return FakeEngine(["x"], tokenizer=Spy())

    with fake_server({"m": make}) as server:
        body: dict[str, Any] = {"model": "m", "content": "abab" * 500}
        answer = server.ask("POST /tokenize", body).json()
        assert len(answer["tokens"]) == 2000 and not seen
        answer = server.ask("POST /tokenize", {**body, "with_pieces": True}).json()
        assert [each["piece"] for each in answer["tokens"][:3]] == ["a", "b", "a"]
        assert len(seen) == 2
        tokens = [each["id"] for each in answer["tokens"]]
        answer = server.ask("POST /detokenize", {"model": "m", "tokens": tokens}).json()
        assert answer == {"content": "abab" * 500}
        assert len(seen) == 4 and not [name for _, name in seen if name == "server"]
        answer = server.ask("POST /tokenize", {"model": "m", "content": "a" * (MAX_CHARS + 1)})
        assert answer.status == 400 and answer.json()["error"]["param"] == "content"


# ---- words of errors


def test_a_wrong_method_is_told_the_right_ones() -> None:
    with fake_server({"m": lambda: FakeEngine(["x"])}) as server:
        assert server.ask("GET /v1/chat/completions").headers["allow"] == ["POST"]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()

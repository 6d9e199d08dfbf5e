"""Counting and tokenizing beside chat: bounded, and neither keeps the other waiting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llmrun.engine.embedder import Embedder
from llmrun.server import wire_embeddings, wire_extras, wire_ollama_models
from tests.fakes.chat_server import HeldEngine
from tests.fakes.fake_embed_backend import FakeEmbedBackend
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.fakes.raw_http import PATIENCE_S, Client
from tests.fakes.running_server import RunningServer, fake_server

LONG = "a long text"
COUNT, TOKENIZE, DETOKENIZE = "POST /v1/messages/count_tokens", "POST /tokenize", "POST /detokenize"
CHAT = "POST /v1/chat/completions"


class HeldTokenizer(FakeTokenizer):
    """Long texts take until `release` is set; `n_held` of them are being worked on."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.n_held = 0
        self._lock = threading.Lock()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if LONG in text:
            with self._lock:
                self.n_held += 1
            assert self.release.wait(PATIENCE_S)
            with self._lock:
                self.n_held -= 1
        return super().tokenize(text, add_special=add_special, parse_special=parse_special)


@contextlib.contextmanager
def serving(tokenizer: HeldTokenizer, **options: Any) -> Iterator[RunningServer]:
    with fake_server({"m": lambda: FakeEngine(tokenizer=tokenizer)}, **options) as server:
        try:
            # The model is there: requests that wait for a load have a bound of theirs.
            assert server.ask(TOKENIZE, body_of(TOKENIZE, "Hi")).status == 200
            yield server
        finally:
            tokenizer.release.set()


def body_of(line: str, text: str) -> dict[str, object]:
    if line == TOKENIZE:
        return {"model": "m", "content": text}
    if line == DETOKENIZE:
        return {"model": "m", "tokens": list(text.encode())}
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


def begin(server: RunningServer, line: str, text: str) -> Client:
    client = server.connect()
    client.request(line, body=json.dumps(body_of(line, text)).encode())
    return client


def waiting(server: RunningServer) -> tuple[int, int]:
    """Texts that are being read, and those that wait for it. Of the event loop."""
    (opened,) = server.host.opened()
    return opened.token_admission.n_running, opened.token_admission.n_waiting


@pytest.mark.parametrize("line", [COUNT, TOKENIZE])
def test_a_flood_of_long_texts_is_bounded_and_chat_goes_on(line: str) -> None:
    tokenizer = HeldTokenizer()
    with serving(tokenizer, max_queue=3) as server:
        clients = [begin(server, line, LONG) for _ in range(40)]
        server.until(lambda: waiting(server) == (2, 3), "the queue")
        server.until(lambda: server.state.n_active == 5, "the refusals")
        server.until(lambda: tokenizer.n_held == 2, "the reading")
        # Everybody else is answered, although no long text is done.
        assert server.ask(CHAT, body_of(CHAT, "Hi")).status == 200
        refused = [server.ask(each, body_of(each, "Hi")) for each in (COUNT, TOKENIZE, DETOKENIZE)]
        for answer in refused:
            assert answer.status == 429
            assert 1 <= int(answer.headers["retry-after"][0]) <= 60
        assert refused[0].json()["type"] == "error"
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        assert {each.json()["error"]["code"] for each in refused[1:]} == {"queue_full"}
        tokenizer.release.set()
        statuses = [client.read_answer().status for client in clients]
        assert (statuses.count(200), statuses.count(429)) == (5, 35)
        server.until_answered()
        assert server.run(lambda: waiting(server)) == (0, 0)


def test_texts_do_not_wait_for_replies() -> None:
    engine = HeldEngine(["Hello!"])
    engine.hold(1)
    with fake_server({"m": lambda: engine}, n_parallel=1, max_queue=1) as server:
        running = begin(server, CHAT, "Hi")
        server.until(engine.submitted.is_set, "the reply")
        queued = begin(server, CHAT, "Hi")
        server.until(lambda: server.counts()[2:] == (1, 1), "a full queue")
        for line in (COUNT, TOKENIZE, DETOKENIZE):
            assert server.ask(line, body_of(line, "Hi")).status == 200
        engine.release()
        assert running.read_answer().status == queued.read_answer().status == 200


def test_a_client_that_goes_leaves_the_queue_but_what_is_begun_keeps_its_place() -> None:
    tokenizer = HeldTokenizer()
    with serving(tokenizer, max_queue=1) as server:
        begun = [begin(server, TOKENIZE, LONG) for _ in range(2)]
        server.until(lambda: waiting(server) == (2, 0), "the places")
        queued = begin(server, TOKENIZE, LONG)
        server.until(lambda: waiting(server) == (2, 1), "the queue")
        queued.close()
        server.until(lambda: waiting(server) == (2, 0), "the leaving")
        # A thread cannot be stopped: who asks and goes again and again must not start more of them.
        for client in begun:
            client.close()
        again = begin(server, TOKENIZE, LONG)
        server.until(lambda: waiting(server) == (2, 1), "the queue")
        server.until(lambda: tokenizer.n_held == 2, "the reading")
        tokenizer.release.set()
        assert again.read_answer().status == 200
        server.until_answered()
        assert server.run(lambda: waiting(server)) == (0, 0)


# ---- long answers

EMBED = {"embed": lambda: Embedder(FakeEmbedBackend())}


@pytest.mark.parametrize(
    ("line", "wire", "body", "n_pieces"),
    [
        ("POST /v1/embeddings", wire_embeddings, {"model": "embed", "input": ["a"] * 20}, 20),
        ("POST /api/embed", wire_ollama_models, {"model": "embed", "input": ["a"] * 20}, 20),
        ("POST /tokenize", wire_extras, {"model": "m", "content": "a" * 20_000}, 10),
    ],
)
def test_the_event_loop_turns_while_a_long_answer_is_encoded(
    monkeypatch: pytest.MonkeyPatch, line: str, wire: Any, body: dict[str, Any], n_pieces: int
) -> None:
    n_turns = 0
    seen: list[int] = []
    encode = wire.to_json

    def note(value: object) -> bytes:
        seen.append(n_turns)
        return bytes(encode(value))

    async def count() -> None:
        nonlocal n_turns
        while True:
            n_turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(wire, "to_json", note)
    with fake_server({"m": FakeEngine, **EMBED}) as server:
        counting = server.run(lambda: asyncio.get_running_loop().create_task(count()))
        answer = server.ask(line, body)
        server.run(counting.cancel)
        assert answer.status == 200 and answer.json()
    assert len(seen) == len(set(seen)) == n_pieces

"""Many clients, and clients that go: everybody is answered, and nothing stays behind.

The engine is the real one over a backend that a test stops between two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import pytest

from llmrun.engine.backend import Chunk
from llmrun.engine.loop import Engine
from tests.fakes.fake_backend import FakeBackend, NextToken, endless_token, hash_token
from tests.fakes.raw_http import PATIENCE_S, Client
from tests.fakes.running_server import EngineOpener, RunningServer, fake_server

CHAT, TEXT = "POST /v1/chat/completions", "POST /v1/completions"


class Steps:
    """Engines over backends that compute a step only for a permit; `free` lets them run."""

    def __init__(self, *, n_seq: int = 4, next_token: NextToken = endless_token) -> None:
        self.permits = threading.Semaphore(0)
        self.is_free = False
        self.n_begun = 0
        self.backend = FakeBackend(
            n_ctx=2048,
            n_seq_max=n_seq,
            n_batch=256,
            next_token=next_token,
            on_decode=self._wait,
        )
        # A clock on which every look is a second later: each token's text is handed out at once.
        self._now_s = 0.0
        self.engine = Engine(self.backend, clock=self._clock, checks=True)

    def _clock(self) -> float:
        self._now_s += 1.0
        return self._now_s

    def _wait(self, step: int, chunks: Sequence[Chunk]) -> None:
        self.n_begun += 1
        if not self.is_free:
            assert self.permits.acquire(timeout=PATIENCE_S), "the test never let the engine go on"

    def allow(self, n: int = 1) -> None:
        for _ in range(n):
            self.permits.release()

    def free(self) -> None:
        self.is_free = True
        self.permits.release()


@pytest.fixture
def steps() -> Iterator[Steps]:
    made = Steps()
    yield made
    made.free()
    assert made.backend.violations == []


@contextlib.contextmanager
def serving(steps: Steps, **options: Any) -> Iterator[RunningServer]:
    """A server of this engine; what it waits for at the end is let go on."""
    with fake_server({"m": lambda: steps.engine}, **options) as server:
        try:
            yield server
        finally:
            steps.free()


def body_of(line: str, *, stream: bool = True, **members: object) -> dict[str, object]:
    body: dict[str, object] = {"model": "m", "stream": stream, **members}
    if line.endswith(("/chat/completions", "/messages", "/chat")):
        body["messages"] = [{"role": "user", "content": "Hi!"}]
    elif line.endswith("/responses"):
        body["input"] = "Hi!"
    else:
        body["prompt"] = "Hi!"
    if line.endswith("/messages"):
        body.setdefault("max_tokens", 1000)
    return body


def begin(server: RunningServer, line: str = CHAT, **members: object) -> Client:
    """A client that has asked, on a connection of its own."""
    client = server.connect()
    client.request(line, body=json.dumps(body_of(line, **members)).encode())
    return client


def until_step(server: RunningServer, steps: Steps, n: int) -> None:
    """Until the engine stands before the `n`-th step, of which the first is 1."""
    server.until(lambda: steps.n_begun == n, f"step {n}")


# ---- many at once


def test_of_200_clients_on_a_queue_of_64_each_gets_an_answer_or_a_429() -> None:
    steps = Steps(n_seq=8)
    with serving(steps, n_parallel=8, max_queue=64) as server:
        # The model is there before the rush: requests that wait for a load have a bound of theirs.
        steps.allow()
        assert server.ask(TEXT, body_of(TEXT, stream=False, max_tokens=1)).status == 200
        lines = [CHAT, TEXT, "POST /v1/messages", "POST /api/generate"]
        clients = [
            begin(server, lines[i % 4], stream=i % 3 == 0, **limit(lines[i % 4], 3))
            for i in range(200)
        ]
        server.until(lambda: server.counts()[2:] == (8, 64), "a full queue")
        server.until(lambda: server.state.n_active == 72, "the refusals")
        steps.free()
        statuses: Counter[int] = Counter()
        for i, client in enumerate(clients):
            answer = client.read_answer()
            statuses[answer.status] += 1
            if answer.status == 200:
                assert answer.body, i
            else:
                assert 1 <= int(answer.headers["retry-after"][0]) <= 60
                assert "error" in answer.json()
        assert statuses == {200: 72, 429: 128}
        server.until_idle()
        assert steps.engine.counters.n_requests == 73


def limit(line: str, n_tokens: int) -> dict[str, object]:
    """At most so many tokens, in the path's words."""
    if "/api/" in line:
        return {"options": {"num_predict": n_tokens}}
    if line.endswith("/responses"):
        return {"max_output_tokens": n_tokens}
    return {"max_tokens": n_tokens}


def test_a_request_that_waits_too_long_hears_503_and_when_to_come_again(steps: Steps) -> None:
    with serving(steps, n_parallel=1, queue_wait_s=0.05) as server:
        first = begin(server)
        until_step(server, steps, 1)
        answer = server.ask(TEXT, body_of(TEXT, stream=False))
        assert (answer.status, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(answer.headers["retry-after"][0]) >= 1
        first.close()
        steps.free()
        server.until_idle()


N_REQUESTS = 5_000
N_WARM = 1_000


def test_5000_requests_of_which_many_are_abandoned_leave_nothing_behind() -> None:
    """Sequences, places, tasks, threads, files and memory: as many as before."""
    backend = FakeBackend(n_ctx=512, n_seq_max=8, n_batch=128, next_token=hash_token)
    engine = Engine(backend, checks=True)
    process = psutil.Process()

    def forget() -> None:
        """What the fake writes down for tests."""
        for noted in (backend.batches, backend.results, backend.samplers):
            noted.clear()

    with fake_server({"m": lambda: engine}, n_parallel=8, max_queue=64) as server:
        rush(server, N_WARM, seed=0)
        forget()
        before = measure(server, process)
        statuses = rush(server, N_REQUESTS - N_WARM, seed=1)
        forget()
        after = measure(server, process)
        # Every request that somebody waited for was answered, and none with a failure.
        assert set(statuses) <= {200, 400, 404, 429, "left"}, statuses
        assert statuses[200] > 1_000 and statuses["left"] > 1_000, statuses
        assert sum(statuses.values()) == N_REQUESTS - N_WARM
        assert server.run(server.counts) == (0, 0, 0, 0)
        for what in ("tasks", "threads", "files"):
            assert after[what] <= before[what], (what, before, after)
        # What is remembered of conversations and connections has bounds, which are not reached by
        # the same number of objects each time.
        assert after["objects"] - before["objects"] < 1_000, (before, after)
        assert after["rss"] - before["rss"] < 16 << 20, (before, after)
    assert backend.violations == []
    assert backend.n_closed == 1


def measure(server: RunningServer, process: psutil.Process) -> dict[str, int]:
    """How much there is of everything once nothing changes any more."""
    server.until_idle()
    gc.collect()
    return {
        "tasks": settle(lambda: server.run(lambda: len(asyncio.all_tasks()))),
        "threads": settle(threading.active_count),
        "files": settle(lambda: count_files(process)),
        "objects": len(gc.get_objects()),
        "rss": process.memory_info().rss,
    }


def count_files(process: psutil.Process) -> int:
    return process.num_fds() if hasattr(process, "num_fds") else process.num_handles()


def settle(count: Callable[[], int], n_same: int = 50) -> int:
    """The number when it has stopped changing: connections are closed a moment after their end."""
    last, n = count(), 0
    give_up = time.monotonic() + PATIENCE_S
    while n < n_same and time.monotonic() < give_up:
        time.sleep(0.002)
        now = count()
        last, n = now, n + 1 if now == last else 0
    return last


def rush(server: RunningServer, n: int, seed: int) -> Counter[Any]:
    """`n` requests from 8 clients, a third of whom do not wait for the end; what each got."""
    statuses: Counter[Any] = Counter()
    failures: list[BaseException] = []

    def work(k: int) -> None:
        try:
            statuses.update(ask_many(server, n // 8, random.Random(f"{seed} {k}")))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    return statuses


def ask_many(server: RunningServer, n: int, rng: random.Random) -> Counter[Any]:
    statuses: Counter[Any] = Counter()
    client = Client(server.address)
    try:
        for _ in range(n):
            line = rng.choice([CHAT, TEXT, TEXT, "POST /v1/messages", "POST /api/generate"])
            body = body_of(line, stream=rng.random() < 0.5, **limit(line, rng.randrange(1, 6)))
            if rng.random() < 0.05:
                body["model"] = "other"
            elif rng.random() < 0.05:
                del body["model"]
                body["stop"] = 5
            client.request(line, body=json.dumps(body).encode())
            how = rng.random()
            if how < 0.65:
                answer = client.read_answer()
                statuses[answer.status] += 1
                if "close" not in answer.headers.get("connection", []):
                    continue
            else:
                if how > 0.8:  # in the middle, or the end, of the answer
                    client.sock.recv(rng.randrange(1, 400))
                statuses["left"] += 1
            client.close()
            client = Client(server.address)
    finally:
        client.close()
    return statuses


# ---- clients that go


STREAMS = [CHAT, TEXT, "POST /v1/responses", "POST /v1/messages", "POST /api/chat"]


@pytest.mark.parametrize("line", STREAMS)
def test_a_client_that_goes_amid_its_answer_frees_the_sequence_within_one_step(
    steps: Steps, line: str
) -> None:
    with serving(steps) as server:
        client = begin(server, line)
        steps.allow(3)
        assert client.read_head().status == 200
        until_step(server, steps, 4)
        client.close()
        server.until(lambda: server.counts()[2:] == (0, 0), "the end of the request")
        # The step that was running when the client went; with another one this would hang.
        steps.allow()
        server.until_idle()
        assert (steps.n_begun, steps.backend.n_steps) == (4, 4)
        assert steps.backend.open_samplers == []


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_before_the_first_token_frees_the_sequence(
    steps: Steps, stream: bool
) -> None:
    with serving(steps) as server:
        client = begin(server, stream=stream)
        until_step(server, steps, 1)
        client.close()
        server.until(lambda: server.counts()[2:] == (0, 0), "the end of the request")
        steps.allow()
        server.until_idle()
        assert steps.n_begun == 1


def test_those_who_stay_lose_nothing_when_others_go(steps: Steps) -> None:
    with serving(steps) as server:
        stays = begin(server, TEXT, max_tokens=6)
        until_step(server, steps, 1)
        goes = begin(server, TEXT, prompt="something else", n=2)
        server.until(lambda: sum(server.counts()[:2]) == 3, "three sequences")
        steps.allow(2)
        until_step(server, steps, 3)
        assert len(steps.backend.batches[-1]) == 3
        goes.close()
        server.until(lambda: server.counts()[2] == 1, "the end of one request")
        steps.allow()
        until_step(server, steps, 4)
        assert len(steps.backend.batches[-1]) == 1
        steps.free()
        answer = stays.read_answer()
        server.until_idle()
        alone = server.ask(TEXT, body_of(TEXT, stream=False, max_tokens=6)).json()
        assert text_of(answer.body) == alone["choices"][0]["text"] != ""


def text_of(body: bytes) -> str:
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_from_the_queue_leaves_it(steps: Steps, stream: bool) -> None:
    with serving(steps, n_parallel=1) as server:
        first = begin(server)
        until_step(server, steps, 1)
        waits = begin(server, stream=stream)
        server.until(lambda: server.counts()[2:] == (1, 1), "the queue")
        waits.close()
        server.until(lambda: server.counts()[2:] == (1, 0), "an empty queue")
        first.close()
        steps.free()
        server.until_idle()
        assert steps.engine.counters.n_requests == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_while_the_model_loads_is_forgotten(steps: Steps, stream: bool) -> None:
    with serving(steps) as server:
        opener = server.opener
        assert isinstance(opener, EngineOpener)
        gate = opener.gates["m"] = threading.Event()
        waits = begin(server, stream=stream)
        assert opener.loading.wait(PATIENCE_S)
        server.until(lambda: server.state.n_active == 1, "the request")
        waits.close()
        server.until(lambda: server.state.n_active == 0, "the end of the request")
        assert server.run(server.host.opened) == []
        gate.set()
        # The load belongs to nobody: it goes on, and the next request has its model.
        server.until(server.host.opened, "the load")
        assert server.run(server.counts) == (0, 0, 0, 0)
        assert steps.engine.counters.n_requests == 0
        steps.free()
        assert server.ask(TEXT, body_of(TEXT, stream=False, max_tokens=2)).status == 200


def test_a_client_that_reads_nothing_does_not_hold_up_the_others(steps: Steps) -> None:
    with serving(steps) as server:
        idle = begin(server, TEXT, max_tokens=1500)
        steps.free()
        answer = server.ask(TEXT, body_of(TEXT, stream=False, max_tokens=5))
        assert answer.json()["usage"]["completion_tokens"] == 5
        idle.close()
        server.until_idle()


# ---- the end of the server


def test_a_drain_refuses_the_new_and_lets_the_running_finish(steps: Steps) -> None:
    with serving(steps, drain_s=PATIENCE_S) as server:
        client = begin(server, TEXT, max_tokens=5)
        steps.allow(2)
        assert client.read_head().status == 200
        server.state.ask_to_stop()
        server.until(lambda: server.state.phase == "draining", "the drain")
        for line in ("POST /v1/completions", "POST /v1/messages", "POST /api/generate"):
            refused = server.ask(line, body_of(line))
            assert refused.status == (529 if line.endswith("/messages") else 503)
            assert int(refused.headers["retry-after"][0]) >= 1
            assert "shutting down" in json.dumps(refused.json()["error"])
        health = server.ask("GET /health")
        assert (health.status, health.json()["status"]) == (503, "draining")
        steps.free()
        assert client.read_end().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert server.code == 0
    assert steps.backend.n_closed == 1


@pytest.mark.parametrize(
    ("line", "mark"),
    [
        (CHAT, b'data: {"error":'),
        (TEXT, b'data: {"error":'),
        ("POST /v1/responses", b"event: error\n"),
        ("POST /v1/messages", b"event: error\n"),
        ("POST /api/chat", b'{"error":'),
    ],
)
def test_an_answer_that_is_cut_at_the_end_of_the_drain_says_so(
    steps: Steps, line: str, mark: bytes
) -> None:
    with serving(steps, drain_s=0.0) as server:
        client = begin(server, line)
        waits = begin(server, TEXT, stream=False)
        server.until(lambda: sum(server.counts()[:2]) == 2, "both requests")
        steps.allow(2)
        client.read_head()
        server.state.ask_to_stop()
        data = client.read_end()
        assert mark in data and b"shutting down" in data
        assert data.endswith(b"\r\n0\r\n\r\n")  # the end of the body, not of the connection
        answer = waits.read_answer()
        assert (answer.status, answer.json()["error"]["code"]) == (503, "shutting_down")
        steps.free()
    assert server.code == 0


def test_sockets_of_refused_clients_are_readable_at_once(steps: Steps) -> None:
    """A 429 does not wait for anything that runs."""
    with serving(steps, n_parallel=1, max_queue=0) as server:
        first = begin(server)
        until_step(server, steps, 1)
        second = begin(server)
        assert select.select([second.sock], [], [], PATIENCE_S)[0]
        assert second.read_answer().status == 429
        first.close()
        steps.free()
        server.until_idle()

"""Thousands of short requests, many of them cancelled, leave nothing behind."""

from __future__ import annotations

import gc
import random
import sys
import threading

import pytest

from llmrun.engine.loop import Engine
from llmrun.engine.types import FinishEvent, Request, SamplingParams
from tests.fakes.fake_backend import FAILING_GRAMMAR, FakeBackend, copying_token
from tests.unit.test_engine_loop import check_books

N_REQUESTS = 3000
N_WARM = 600  # then all tables have their size
N_CALLERS = 6
STARTS = [tuple(range(40, 40 + n)) for n in (0, 9, 17, 30)]


class ForgettingBackend(FakeBackend):
    """Keeps no history of its own, which would grow with every step."""

    def end_batch(self) -> None:
        self.batches.clear()
        self.results.clear()
        self.samplers.clear()


def ask(engine: Engine, rng: random.Random) -> str:
    """One request, read to its end, cancelled after a few events, or left alone by its reader.
    Returns how it ended."""
    prompt = (*rng.choice(STARTS), *(rng.randrange(33, 60) for _ in range(rng.randrange(1, 9))))
    come_back_to = tuple(rng.sample(range(1, len(prompt) + 1), 1))
    sampling = SamplingParams(temperature=0)
    if rng.random() < 0.02:
        sampling = SamplingParams(grammar=FAILING_GRAMMAR)
    request = Request(
        prompt, sampling, rng.randrange(0, 24), ignore_eog=True, come_back_to=come_back_to
    )
    n_events = rng.choice([0, 1, 2, 99, 99, 99])
    stream = engine.submit(request)
    if n_events == 0:
        stream.cancel()
    try:
        for n, event in enumerate(stream, 1):
            if n == n_events:
                stream.cancel()
            if isinstance(event, FinishEvent):
                return event.reason
    except Exception as error:
        assert "allows no token" in str(error)
        return "error"
    raise AssertionError("the stream ended without a word")


@pytest.mark.parametrize("kind", ["plain", "window", "recurrent", "split", "split window"])
def test_a_soak_leaves_nothing_behind(kind: str) -> None:
    options: dict[str, dict[str, object]] = {
        "plain": {},
        "window": {"n_swa": 12, "slack": 4},
        "recurrent": {"recurrent": True},
        "split": {"kv_unified": False, "n_ctx": 80},
        "split window": {"kv_unified": False, "n_ctx": 80, "n_swa": 12, "slack": 4},
    }
    n_threads = threading.active_count()
    backend = ForgettingBackend(
        **{
            "n_ctx": 160, "n_seq_max": 5, "n_batch": 24, "n_outputs_max": 24,
            "next_token": copying_token, "on_decode": lambda step, chunks: backend.end_batch(),
            **options[kind],
        },  # type: ignore[arg-type]
    )  # fmt: skip
    ends: dict[str, int] = {}
    failures: list[BaseException] = []
    engine = Engine(backend, speculative="ngram", checkpoint_bytes=20_000, checks=True)

    def call(seed: int, n_requests: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(n_requests):
                end = ask(engine, rng)
                ends[end] = ends.get(end, 0) + 1
        except BaseException as error:
            failures.append(error)

    def run_callers(n_requests: int, seed: int) -> int:
        """Blocks of memory that Python has in use when all are done."""
        callers = [
            threading.Thread(target=call, args=(seed + i, n_requests // N_CALLERS))
            for i in range(N_CALLERS)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        gc.collect()
        return sys.getallocatedblocks()

    with engine:
        n_warm = run_callers(N_WARM, 0)
        n_grown = run_callers(N_REQUESTS - N_WARM, 1000) - n_warm
    assert failures == []
    assert sum(ends.values()) >= N_REQUESTS - N_CALLERS
    assert ends["cancelled"] > 300 and ends["length"] > 1000 and ends["error"] > 10
    assert n_grown < 1000  # less than half of one for each request
    assert engine._answers.streams == {} and len(engine._core.residents) == 0
    assert engine._core.active == []
    check_books(engine, backend)
    assert threading.active_count() == n_threads
    # All cells can be had again.
    cache = engine._core.residents.cache
    for slot in cache.slots:
        cache.cut(slot, 0)
    assert cache.tree.n_cells() == 0 and cache._checkpoints == []

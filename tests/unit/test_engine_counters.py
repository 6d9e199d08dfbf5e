"""What an engine tells about itself: totals that only grow, and what is in its cache now."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
from collections.abc import Sequence

import pytest

from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineCounters, Request, Speculative
from tests.fakes.fake_backend import FakeBackend, copying_token, endless_token
from tests.unit.test_engine_loop import check_books, read, run

TOTALS = [
    "n_requests",
    "n_prompt",
    "n_cached",
    "n_completion",
    "n_drafted",
    "n_accepted",
    "n_steps",
    "decode_s",
]


def totals(counters: EngineCounters) -> dict[str, float]:
    values = dataclasses.asdict(counters)
    return {name: values[name] for name in TOTALS}


def test_a_new_engine_has_done_nothing() -> None:
    with Engine(FakeBackend(n_ctx=32, n_seq_max=3)) as engine:
        assert engine.counters == EngineCounters(n_ctx=32, n_seq_max=3)


@pytest.mark.parametrize(
    ("n_seq_max", "speculative"), [(1, "off"), (2, "off"), (1, "ngram")], ids=str
)
def test_one_answer(n_seq_max: int, speculative: Speculative) -> None:
    """Steps of 2 s: two for the prompt of 16, and one for each of the four tokens after the
    first."""
    now = [100.0]

    def tick(_step: int, _chunks: Sequence[Chunk]) -> None:
        now[0] += 2.0

    backend = FakeBackend(
        n_ctx=64,
        n_batch=8,
        n_seq_max=n_seq_max,
        n_outputs_max=4,
        next_token=endless_token,
        on_decode=tick,
    )
    with Engine(backend, clock=lambda: now[0], speculative=speculative) as engine:
        run(engine, range(16), 5)
        run(engine, range(16), 1)
    counters = engine.counters
    assert (counters.n_requests, counters.n_prompt, counters.n_cached) == (2, 32, 15)
    assert (counters.n_completion, counters.n_steps, counters.decode_s) == (6, 7, 14.0)
    assert (counters.n_running, counters.n_waiting) == (0, 0)
    assert counters.n_cells == 16


def test_a_step_that_ends_an_answer_counts() -> None:
    with Engine(backend := FakeBackend(n_ctx=64)) as engine:  # random ends
        for n in range(20):
            run(engine, (n, n + 1), 12)
        assert engine.counters.n_steps == backend.n_steps


def test_who_runs_and_who_waits() -> None:
    backend = FakeBackend(n_ctx=256, n_seq_max=2, n_batch=8, next_token=endless_token)
    seen: list[tuple[int, int]] = []

    def look(_step: int, _chunks: Sequence[Chunk]) -> None:
        seen.append((engine.counters.n_running, engine.counters.n_waiting))

    backend.on_decode = look
    with Engine(backend) as engine:
        with backend.held_back():
            streams = [engine.submit(Request((n,), max_tokens=n)) for n in (4, 8, 6, 6, 6)]
        for stream in streams:
            read(stream)
        assert (engine.counters.n_running, engine.counters.n_waiting) == (0, 0)
    assert seen[1] == (2, 3)
    assert [waiting for _, waiting in seen[1:]] == sorted((w for _, w in seen[1:]), reverse=True)
    assert seen[-1] == (1, 0)


@pytest.mark.parametrize("kind", ["plain", "window", "recurrent"])
@pytest.mark.parametrize("speculative", ["off", "auto"])
def test_the_books_agree_with_the_cache_and_with_the_answers(
    kind: str, speculative: Speculative
) -> None:
    """Shared starts, cancels, guesses and a cache that is too small: at each step the cells are
    those of the backend, and in the end the totals are the sums over the answers."""
    kinds: dict[str, dict[str, object]] = {"window": {"n_swa": 8}, "recurrent": {"recurrent": True}}
    rng = random.Random(5)
    seen: list[EngineCounters] = []

    def look(_step: int, _chunks: Sequence[Chunk]) -> None:
        seen.append(engine.counters)
        assert seen[-1].n_cells == len(backend._cells)

    backend = FakeBackend(
        n_ctx=96,
        n_seq_max=4,
        n_batch=16,
        n_outputs_max=12,
        next_token=copying_token,
        on_decode=look,
        **kinds.get(kind, {}),  # type: ignore[arg-type]
    )
    engine = Engine(
        backend,
        checks=True,
        speculative=speculative,
        clock=lambda: 1.0 + 0.06 * backend.n_steps,
    )
    usages = []
    with engine:
        for _ in range(40):
            streams = []
            for _ in range(rng.randrange(1, 7)):
                start = range(60, 60 + rng.choice((0, 12, 30)))
                prompt = (*start, *(rng.randrange(250) for _ in range(rng.randrange(1, 12))))
                streams.append(engine.submit(Request(prompt, max_tokens=rng.randrange(1, 20))))
            usages += [read(stream).finish.usage for stream in streams]
            assert engine.counters.n_cells == len(backend._cells)
        end = engine.counters
    check_books(engine, backend)
    assert end.n_requests == len(usages)
    for name in ("n_prompt", "n_completion", "n_drafted", "n_accepted"):
        assert getattr(end, name) == sum(getattr(usage, name) for usage in usages)
    assert (end.n_accepted > 0) == (speculative == "auto" and kind != "recurrent")
    n_done = backend.results.count(DecodeResult.DONE)
    assert end.n_steps == n_done
    for before, after in itertools.pairwise(seen):
        for name in TOTALS:
            assert getattr(before, name) <= getattr(after, name)


def test_cancels_and_failures_are_counted_as_far_as_they_came() -> None:
    backend = FakeBackend(n_ctx=256, n_batch=8, next_token=endless_token)
    with Engine(backend) as engine:
        with backend.held_back():
            first = engine.submit(Request((1,), max_tokens=3))
            waiting = engine.submit(Request((2,), max_tokens=3))
            waiting.cancel()
        read(waiting)
        read(first)
        assert engine.counters.n_requests == 1
        assert engine.counters.n_completion == 3


def test_it_may_be_asked_from_any_thread_while_all_is_going_on() -> None:
    backend = FakeBackend(n_ctx=256, n_seq_max=4, n_batch=16, next_token=endless_token)
    done = threading.Event()
    problems: list[str] = []

    def watch() -> None:
        last = totals(engine.counters)
        while not done.is_set():
            counters = engine.counters
            now = totals(counters)
            if any(now[name] < last[name] for name in TOTALS):
                problems.append(f"{last} then {now}")
            if not (0 <= counters.n_cells <= 256 and 0 <= counters.n_running <= 4):
                problems.append(f"{counters}")
            last = now

    with Engine(backend) as engine:
        thread = threading.Thread(target=watch)
        thread.start()
        for _ in range(15):
            streams = [engine.submit(Request((n, *range(30)), max_tokens=20)) for n in range(8)]
            for stream in streams[::3]:
                stream.cancel()
            for stream in streams:
                read(stream)
        done.set()
        thread.join()
    assert problems == []
    assert engine.counters.n_running == 0  # may be asked of a closed engine

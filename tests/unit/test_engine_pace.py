"""The engine's steps follow the governor: threads change while an answer runs, and a pinned or
single thread is never touched."""

from __future__ import annotations

from collections.abc import Sequence

from llmrun.engine.backend import Chunk
from llmrun.engine.loop import Engine
from llmrun.engine.types import Request
from tests.fakes.fake_backend import FakeBackend, endless_token, ideal_answer
from tests.unit.test_engine_loop import check_books, read, run


class BusyMachine:
    """A clock that each step moves on by what it would take with the threads set just then."""

    def __init__(self, **options: int) -> None:
        self.now_s = 100.0
        self.n_busy = 0
        self.seen: list[tuple[int, int]] = []
        self.backend = FakeBackend(
            n_ctx=4096, next_token=endless_token, on_decode=self.step, **options
        )

    def step(self, _step: int, chunks: Sequence[Chunk]) -> None:
        n_rows = sum(len(chunk.tokens) for chunk in chunks)
        n_threads = self.backend.threads[n_rows > 1]
        self.seen.append((n_rows, n_threads))
        tok_s = {(0, 2): 119.0, (0, 1): 89.0, (2, 2): 5.4, (2, 1): 28.0}[self.n_busy, n_threads]
        self.now_s += (1 + n_rows) / 2 / tok_s

    def engine(self, *, steady_threads: bool = True) -> Engine:
        return Engine(self.backend, steady_threads=steady_threads, clock=lambda: self.now_s)


def test_threads_go_down_beside_busy_programs_and_up_again() -> None:
    machine = BusyMachine(n_threads=2)
    with machine.engine() as engine:
        free = run(engine, range(8), 400)
        assert machine.backend.threads[0] == 2
        machine.n_busy = 2
        busy = run(engine, range(8), 200)
        assert machine.backend.threads[0] == 1
        machine.n_busy = 0
        again = run(engine, range(8), 600)
        assert machine.backend.threads[0] == 2
    assert busy.finish.timings.decode_tok_s > 3 * 5.4
    assert again.finish.timings.decode_tok_s > 0.9 * 89
    assert free.finish.timings.decode_tok_s > 0.95 * 119
    ideal = ideal_answer(Request(tuple(range(8)), max_tokens=400), 4096, endless_token)
    assert free.tokens == ideal.tokens
    check_books(engine, machine.backend)


def test_several_answers_at_once_have_their_own_count() -> None:
    machine = BusyMachine(n_threads=2, n_seq_max=2)
    machine.n_busy = 2
    with machine.engine() as engine:
        with machine.backend.held_back():
            streams = [engine.submit(Request((n,), max_tokens=150)) for n in (1, 2)]
        for stream in streams:
            read(stream)
    assert {rows for rows, _ in machine.seen} >= {2}
    assert (2, 1) in machine.seen
    assert machine.backend.threads[1] == 1
    check_books(engine, machine.backend)


def test_pinned_threads_stay() -> None:
    machine = BusyMachine(n_threads=2)
    machine.n_busy = 2
    with machine.engine(steady_threads=False) as engine:
        run(engine, range(8), 100)
    assert {threads for _, threads in machine.seen} == {2}


def test_time_between_requests_is_no_slow_step() -> None:
    machine = BusyMachine(n_threads=2)
    with machine.engine() as engine:
        for n in range(40):
            run(engine, (n, 1, 2), 20)
            machine.now_s += 60.0
    n_lowered = sum(threads == 1 for _, threads in machine.seen)
    assert n_lowered < 0.05 * len(machine.seen)

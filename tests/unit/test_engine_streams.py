"""Readers that are told of events instead of waiting for them, and cancels beside other answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import pytest

from llmrun.cli.measure import WatchedEngine
from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.loop import Engine
from llmrun.engine.sequence import Sequence as Run
from llmrun.engine.stream import Stream
from llmrun.engine.types import (
    Event,
    FinishEvent,
    PromptEvent,
    Request,
    SamplingParams,
    StreamLike,
    TextEvent,
    Timings,
    Usage,
)
from llmrun.errors import EngineError
from tests.fakes.fake_backend import FAILING_GRAMMAR, FakeBackend, endless_token, ideal_answer
from tests.fakes.fake_engine import FakeEngine
from tests.unit.test_engine_loop import check_books, read

FINISH = FinishEvent("stop", Usage(1, 1, 0), Timings(0.0, 0.0, 0.0, 0.0), seed=1)


class Reader:
    """Takes whenever it was told to, in a thread of its own; `read` waits for the end."""

    def __init__(self, stream: StreamLike) -> None:
        self.stream = stream
        self.events: list[Event] = []
        self.batches: list[int] = []
        self.error: BaseException | None = None
        self._told = threading.Semaphore(0)
        stream.listen(self._told.release)

    def read(self) -> FinishEvent:
        while not (self.events and isinstance(self.events[-1], FinishEvent)):
            assert self._told.acquire(timeout=60), "nobody told of an event"
            try:
                events = self.stream.take()
            except EngineError as error:
                self.error = error
                raise
            self.events += events
            self.batches.append(len(events))
        return self.events[-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(t for e in self.events if isinstance(e, TextEvent) for t in e.tokens)


def a_stream() -> Stream:
    return Stream(Run(Request((1,)), 1, 0.0, 8), lambda: None)


# ---- being told


def test_a_reader_that_is_told_gets_what_an_iterating_one_gets() -> None:
    request = Request(tuple(range(30)), max_tokens=12)
    with Engine(FakeBackend(n_ctx=128, n_batch=8, next_token=endless_token)) as engine:
        reader = Reader(engine.submit(request))
        finish = reader.read()
        assert reader.stream.take() == []
        assert list(reader.stream) == []
    assert finish.reason == "length"
    assert reader.tokens == ideal_answer(request, 128, endless_token).tokens
    progress = [event.n_done for event in reader.events if isinstance(event, PromptEvent)]
    assert progress == [8, 16, 24]
    assert sum(isinstance(event, FinishEvent) for event in reader.events) == 1


def test_who_comes_late_is_told_at_once() -> None:
    stream = a_stream()
    told: list[str] = []
    stream.listen(lambda: told.append("early"))
    assert told == []
    stream.put(TextEvent("a", (97,)))
    assert told == ["early"]
    stream.listen(lambda: told.append("late"))
    assert told == ["early", "late"]
    assert stream.take() == [TextEvent("a", (97,))]
    assert stream.take() == []
    stream.put(FINISH)
    assert told == ["early", "late", "late"]
    assert (stream.take(), stream.take()) == ([FINISH], [])
    stream.listen(lambda: told.append("after the end"))
    assert told[-1] == "late"


def test_no_event_falls_between_listening_and_putting() -> None:
    """A put at any place within `listen` is told of: by `listen` or by the put."""
    for _ in range(300):
        stream, told, go = a_stream(), threading.Event(), threading.Barrier(2)

        def put(stream: Stream = stream, go: threading.Barrier = go) -> None:
            go.wait()
            stream.put(FINISH)

        thread = threading.Thread(target=put)
        thread.start()
        go.wait()
        stream.listen(told.set)
        thread.join()
        assert told.is_set()
        assert stream.take() == [FINISH]


def test_iterating_and_taking_can_follow_each_other() -> None:
    stream = a_stream()
    first, second = TextEvent("a", (97,)), TextEvent("b", (98,))
    stream.put(first)
    stream.put(second)
    assert next(stream) == first
    assert stream.take() == [second]
    stream.put(FINISH)
    assert list(stream) == [FINISH]
    assert stream.take() == []


def test_a_last_event_that_an_interrupt_took_away_is_taken_again() -> None:
    stream = a_stream()
    stream.put(FINISH)
    stream._events.get()  # taken from the queue and dropped
    assert (stream.take(), stream.take()) == ([FINISH], [])


# ---- failures


def test_a_failure_comes_after_the_events_before_it_and_is_told_of() -> None:
    stream = a_stream()
    told: list[int] = []
    stream.listen(lambda: told.append(1))
    stream.put(TextEvent("a", (97,)))
    stream.put(EngineError("oops"))
    del told[:]
    assert stream.take() == [TextEvent("a", (97,))]
    assert told == [1]
    with pytest.raises(EngineError, match="oops"):
        stream.take()
    assert stream.take() == []
    assert list(stream) == []


def test_an_answer_that_fails_on_the_way_raises_where_it_is_taken() -> None:
    with Engine(FakeBackend(n_ctx=128, next_token=endless_token)) as engine:
        stream = engine.submit(Request((1, 2), SamplingParams(grammar=FAILING_GRAMMAR), 9))
        reader = Reader(stream)
        with pytest.raises(EngineError, match="no token"):
            reader.read()
        assert stream.take() == []


@pytest.mark.parametrize("error", [RuntimeError("loop is closed"), SystemExit(1)])
def test_a_listener_that_fails_stops_no_answer(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    request = Request((5, 6), max_tokens=9)
    backend = FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token)
    with caplog.at_level(logging.WARNING), Engine(backend) as engine:
        with backend.held_back():
            failing, beside = (engine.submit(request) for _ in range(2))
            failing.listen(fail)
        ideal = ideal_answer(request, 128, endless_token).tokens
        assert read(beside).tokens == ideal
        assert read(failing).tokens == ideal
        assert read(engine.submit(request)).tokens == ideal
    assert "could not be told" in caplog.text
    check_books(engine, backend)


def test_close_tells_the_readers() -> None:
    backend = FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token)
    engine = Engine(backend)
    readers: list[Reader] = []
    with backend.held_back():
        readers += [Reader(engine.submit(Request((n,), max_tokens=5))) for n in range(4)]
        closer = threading.Thread(target=engine.close)
        closer.start()
    assert {reader.read().reason for reader in readers} <= {"cancelled", "length"}
    closer.join()
    check_books(engine, backend)


# ---- other engines


def test_a_watched_answer_can_be_taken_too() -> None:
    with Engine(FakeBackend(n_ctx=128, next_token=endless_token)) as inner:
        engine = WatchedEngine(inner)
        finish = Reader(engine.submit(Request((1, 2), max_tokens=40))).read()
        assert engine.last_finish is finish
        assert engine.counters == inner.counters
        assert engine.counters.n_completion == 40


def test_the_scripted_engine_is_read_in_the_same_way() -> None:
    engine = FakeEngine(["Hi!", ("He", EngineError("oops"))])
    reader = Reader(engine.submit(Request((1, 2), n_logprobs=2)))
    assert reader.read().reason == "stop"
    assert bytes(reader.tokens) == b"Hi!"
    assert engine.counters.n_completion == 3
    texts = [event for event in reader.events if isinstance(event, TextEvent)]
    assert [p.piece for event in texts for p in event.logprobs] == [b"H", b"i", b"!"]
    failing = Reader(engine.submit(Request((1, 2))))
    with pytest.raises(EngineError, match="oops"):
        failing.read()
    assert bytes(failing.tokens) == b"He"


# ---- cancels beside other answers


def steps_of(backend: FakeBackend, first_token: int) -> list[int]:
    """The steps with a part of the request whose prompt begins with that token."""
    seq_id, steps = -1, []
    for step, batch in enumerate(backend.batches):
        for chunk in batch:
            if chunk.pos == 0 and chunk.tokens[0] == first_token:
                seq_id = chunk.seq_id
            elif chunk.pos == 0 and chunk.seq_id == seq_id:
                seq_id = -1  # another's now
            if chunk.seq_id == seq_id:
                steps.append(step)
    return steps


def cancelling(streams: Sequence[Stream], at: int, which: Sequence[int]) -> Callable[..., None]:
    def act(step: int, _chunks: Sequence[Chunk]) -> None:
        if step == at:
            for index in which:
                streams[index].cancel()

    return act


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2, 5, 9])
def test_a_cancel_frees_its_slot_within_a_step_and_costs_the_others_nothing(
    step: int, recurrent: bool
) -> None:
    streams: list[Stream] = []
    crowds: list[tuple[int, int]] = []
    backend = FakeBackend(
        n_ctx=256, n_seq_max=3, n_batch=8, next_token=endless_token, recurrent=recurrent
    )
    cancel = cancelling(streams, step, [1])

    def act(now: int, chunks: Sequence[Chunk]) -> None:
        crowds.append((engine.counters.n_running, engine.counters.n_waiting))
        cancel(now, chunks)

    backend.on_decode = act
    prompts = [tuple(range(n, n + 12)) for n in (10, 50, 90, 130)]
    requests = [Request(prompt, max_tokens=20) for prompt in prompts]
    with Engine(backend, checks=True) as engine:
        with backend.held_back():
            streams += [engine.submit(request) for request in requests]
            readers = [Reader(stream) for stream in streams]
        finishes = [reader.read() for reader in readers]
    assert [finish.reason for finish in finishes] == ["length", "cancelled", "length", "length"]
    assert DecodeResult.ABORTED not in backend.results  # nobody's work was thrown away
    assert max(steps_of(backend, 50), default=-1) <= step
    # The fourth has waited for a slot.
    assert crowds[1 : step + 2] == [(3, 1)] * step + [(3, 0)]
    for index in (0, 2, 3):
        ideal = ideal_answer(requests[index], 256, endless_token)
        assert readers[index].tokens == ideal.tokens
    check_books(engine, backend)


def test_a_step_that_nobody_wants_any_more_is_stopped() -> None:
    """Two cancel, and a third only waits for a slot: the step that runs need not end."""
    streams: list[Stream] = []
    backend = FakeBackend(n_ctx=256, n_seq_max=2, n_batch=8, next_token=endless_token)
    backend.on_decode = cancelling(streams, 4, [0, 1])
    requests = [Request((n, n + 1), max_tokens=20) for n in (10, 50, 90)]
    with Engine(backend, checks=True) as engine:
        with backend.held_back():
            streams += [engine.submit(request) for request in requests]
        finishes = [Reader(stream).read() for stream in streams]
    assert [finish.reason for finish in finishes] == ["cancelled", "cancelled", "length"]
    assert backend.results.count(DecodeResult.ABORTED) == 1
    assert backend.results[4] is DecodeResult.ABORTED
    check_books(engine, backend)


def test_one_that_waits_can_cancel_without_stopping_who_runs() -> None:
    streams: list[Stream] = []
    backend = FakeBackend(n_ctx=256, n_batch=8, next_token=endless_token, recurrent=True)
    backend.on_decode = cancelling(streams, 3, [1])
    with Engine(backend, checks=True) as engine:
        with backend.held_back():
            streams += [engine.submit(Request((n, n + 1), max_tokens=20)) for n in (10, 50)]
        first, second = (Reader(stream).read() for stream in streams)
    assert (first.reason, second.reason) == ("length", "cancelled")
    assert DecodeResult.ABORTED not in backend.results
    check_books(engine, backend)


def test_many_who_come_and_go_do_not_keep_an_answer_from_its_end() -> None:
    """At every step somebody new is taken in, and cancels while it runs."""
    backend = FakeBackend(n_ctx=256, n_seq_max=3, n_batch=8, next_token=endless_token)
    guests: list[Stream] = []

    def come_and_go(step: int, _chunks: Sequence[Chunk]) -> None:
        if guests:
            guests[-1].cancel()
        if step < 100:
            guests.append(engine.submit(Request((100 + step % 100, 1), max_tokens=50)))

    backend.on_decode = come_and_go
    request = Request((7, 8, 9), max_tokens=40)
    with Engine(backend) as engine:
        answer = Reader(engine.submit(request))
        answer.read()
        for guest in guests:
            guest.cancel()
            read(guest)
    assert steps_of(backend, 7)[-1] < 60
    assert answer.tokens == ideal_answer(request, 256, endless_token).tokens


def test_an_engine_whose_backend_cannot_be_closed_still_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    class Stuck(FakeBackend):
        def close(self) -> None:
            raise RuntimeError("no")

    closed = threading.Event()
    engine = Engine(Stuck())

    def close() -> None:
        engine.close()
        closed.set()

    threading.Thread(target=close, daemon=True).start()
    assert closed.wait(30)

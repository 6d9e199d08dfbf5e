"""The search for settings: what is tried, what wins, what is left alone. The engine's speed is
scripted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llmrun.bench.tune import Choice, Tuner, TuneSizes
from llmrun.engine.types import EngineOptions, FinishEvent, Timings, Usage
from llmrun.errors import EngineError
from tests.fakes.fake_engine import FakeEngine
from tests.unit.test_bench_runner import Watch

START = Choice(2, 2, 512, "f16", "auto")
SIZES = TuneSizes(n_prompt=600, n_answer=10, n_repeats=2)
Speed = Callable[[EngineOptions], tuple[float, float]]


class Scripted(FakeEngine):
    """Reads and answers at the speeds it was made with."""

    def __init__(self, speeds: tuple[float, float]) -> None:
        super().__init__(["x" * 200], n_ctx=2048)
        self.speeds = speeds

    def submit(self, request: Any) -> Any:
        stream = super().submit(request)
        timings = Timings(0.1, *self.speeds, 1.0)
        last = FinishEvent("length", Usage(len(request.prompt), 10, 0), timings, 1)
        return _Only(last, stream)


class _Only:
    def __init__(self, last: FinishEvent, stream: Any) -> None:
        self.left = [last]
        self.cancel = stream.cancel

    def __iter__(self) -> _Only:
        return self

    def __next__(self) -> FinishEvent:
        if not self.left:
            raise StopIteration
        return self.left.pop()


class Bed:
    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.opened: list[EngineOptions] = []
        self.engines: list[Scripted] = []

    def open(self, options: EngineOptions) -> Scripted:
        self.opened.append(options)
        self.engines.append(Scripted(self.speed(options)))
        return self.engines[-1]

    def tuner(self, watch: Watch | None = None, fits=lambda choice: True, **changes) -> Tuner:
        def options_of(choice: Choice) -> EngineOptions | None:
            if not fits(choice):
                return None
            return EngineOptions(
                n_ctx=2048,
                n_threads=choice.n_threads,
                n_threads_batch=choice.n_threads_batch,
                n_ubatch=choice.n_ubatch,
                type_k=choice.kv_type,
                type_v=choice.kv_type,
                speculative=choice.speculative,
                steady_threads=False,
            )

        values = {"n_threads_max": 4, **changes}
        return Tuner(self.open, options_of, START, SIZES, watch, **values)


def test_the_fastest_of_each_setting_wins() -> None:
    def speed(options: EngineOptions) -> tuple[float, float]:
        reading = 100.0 * options.n_threads_batch + options.n_ubatch / 10
        answering = {1: 50, 2: 40, 3: 60, 4: 30}[options.n_threads]
        return reading, answering * (1.5 if options.type_k == "q8_0" else 1.0)

    bed, watch = Bed(speed), Watch()
    tuner = bed.tuner(watch)
    watch.begin(tuner.n_units)
    gain = tuner.run()
    # 512 is the largest micro-batch that a prompt of 600 tokens fills.
    assert tuner.best == Choice(3, 4, 512, "q8_0", "auto")
    assert gain > 1.5 and tuner.notes == []
    assert tuner.steps[-1].setting == "all together" and tuner.steps[-1].gain == pytest.approx(gain)
    assert max(options.n_ubatch for options in bed.opened) == 512
    assert all(engine.closed for engine in bed.engines)
    assert watch.n_done == watch.n_units


def test_noise_changes_nothing() -> None:
    bed = Bed(lambda options: (100.0 + options.n_threads_batch, 50.0 + options.n_threads / 2))
    tuner = bed.tuner()
    assert tuner.run() == 1.0 and tuner.best == START


def test_a_candidate_must_win_every_turn() -> None:
    turns = {1: 0}

    def speed(options: EngineOptions) -> tuple[float, float]:
        if options.n_threads != 1:
            return 100.0, 50.0
        turns[1] += 1
        return 100.0, 500.0 if turns[1] == 1 else 49.0

    tuner = Bed(speed).tuner()
    assert tuner.run() == 1.0 and tuner.best == START


def test_what_does_not_fit_is_never_opened() -> None:
    bed = Bed(lambda options: (100.0, 900.0 if options.type_k == "q8_0" else 50.0))
    tuner = bed.tuner(fits=lambda choice: choice.kv_type == "f16")
    tuner.run()
    assert tuner.best == START and tuner.notes == ["KV type: 1 would not fit, not tried"]
    assert {options.type_k for options in bed.opened} == {"f16"}


def test_what_the_user_set_stays() -> None:
    bed = Bed(lambda options: (100.0 * options.n_threads_batch, 50.0 * options.n_threads))
    tuner = bed.tuner(fixed=frozenset(["threads", "ubatch"]))
    tuner.run()
    assert tuner.best == START
    assert {(o.n_threads, o.n_ubatch) for o in bed.opened} == {(2, 512)}


def test_a_candidate_that_fails_is_left_out() -> None:
    bed = Bed(lambda options: (100.0, 50.0))
    opening = bed.open

    def open_(options: EngineOptions) -> Scripted:
        if options.n_threads == 4:
            raise EngineError("no such threads")
        return opening(options)

    bed.open = open_  # type: ignore[method-assign]
    tuner = bed.tuner()
    tuner.run()
    assert tuner.notes == ["threads for answers 4 instead of 2: not measured: no such threads"]


def test_an_interrupt_keeps_the_steps() -> None:
    n = 0

    def speed(options: EngineOptions) -> tuple[float, float]:
        nonlocal n
        n += 1
        if options.n_ubatch == 128:
            raise KeyboardInterrupt
        return 100.0, 10.0 * options.n_threads

    tuner = Bed(speed).tuner()
    with pytest.raises(KeyboardInterrupt):
        tuner.run()
    assert tuner.best == replace(START, n_threads=4) and tuner.steps

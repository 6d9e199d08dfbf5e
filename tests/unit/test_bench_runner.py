"""The standard measurement, on the fake backend: what is sent, what is kept, how it ends early.
No time is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from llmrun.bench.busy import BusyWatch, CpuTimes, load_between
from llmrun.bench.memory import ProcessMemory
from llmrun.bench.runner import QUICK, Bench, Subject, Suite, percentile
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions
from llmrun.errors import EngineError, WillNotFitError
from tests.fakes.fake_backend import FakeBackend, endless_token

SUITE = Suite(
    n_prompts=(8, 16),
    n_generate=6,
    depths=(0, 24),
    n_first=16,
    n_streams=(1, 2),
    n_stream_prompt=4,
    n_stream_tokens=4,
    n_repeats=2,
)
OPTIONS = EngineOptions(n_ctx=64, speculative="off")
STREAMS = EngineOptions(n_ctx=64, n_seq_max=2, speculative="off")


class Watch:
    def __init__(self) -> None:
        self.n_units = self.n_done = 0.0
        self.labels: list[str] = []

    def begin(self, n_units: float) -> None:
        self.n_units = n_units

    def describe(self, text: str) -> None:
        self.labels.append(text)

    def advance(self, n_units: float) -> None:
        assert n_units >= 0
        self.n_done += n_units


class Patient(Engine):
    """Computes only while somebody reads, so that what is submitted at once also runs at once."""

    def __init__(self, backend: FakeBackend, **more) -> None:
        self.backend = backend
        super().__init__(backend, **more)

    def submit(self, request):
        self.backend.ready.clear()
        return _Reading(super().submit(request), self.backend)

    def close(self) -> None:
        self.backend.ready.set()
        super().close()


class _Reading:
    def __init__(self, stream, backend: FakeBackend) -> None:
        self._stream = stream
        self._backend = backend
        self.cancel = stream.cancel

    def __iter__(self) -> _Reading:
        return self

    def __next__(self):
        self._backend.ready.set()
        return next(self._stream)


class Bed:
    """Opens fake engines."""

    def __init__(self, **backend: object) -> None:
        self.changes = {"next_token": endless_token, **backend}
        self.backends: list[FakeBackend] = []
        self.n_open = 0
        self.load_s = 0.1

    def open(self, options: EngineOptions) -> Engine:
        n_parts = 1 if options.kv_unified else options.n_seq_max
        changes = {
            "n_ctx": options.n_ctx // n_parts,
            "n_seq_max": options.n_seq_max,
            "kv_unified": options.kv_unified,
            **self.changes,
        }
        backend = FakeBackend(**changes)
        self.backends.append(backend)
        return Patient(backend, load_s=self.load_s, checks=True)

    def bench(self, suite: Suite = SUITE, watch: Watch | None = None, **subject) -> Bench:
        values = {"options": OPTIONS, "stream_options": STREAMS, **subject}
        return Bench(
            Subject(self.open, **values),
            suite,
            watch,
            busy=BusyWatch(lambda: None, lambda _s: None),
        )


def names(bench: Bench) -> list[str]:
    return [measure.name for measure in bench.measures]


def test_all_rows_with_all_repeats() -> None:
    bed, watch = Bed(), Watch()
    bench = bed.bench(watch=watch, forecast_bytes=5, limit_tok_s=lambda depth: 1000.0 + depth)
    bench.run()
    assert names(bench) == [
        "pp8", "pp16", "tg6", "pp8@24", "pp16@24", "tg6@24",
        "bandwidth_share", "bandwidth_share@24",
        "ttft_cold", "ttft_warm", "itl_p50", "itl_p95", "itl_p99",
        "streams1", "streams2", "load", "memory_peak",
    ]  # fmt: skip
    for measure in bench.measures:
        assert len(measure.values) == (1 if measure.name == "memory_peak" else 2), measure
        assert all(value > 0 for value in measure.values)
    rows = {measure.name: measure for measure in bench.measures}
    assert rows["ttft_warm"].parameters["cached"] == 16
    assert rows["pp8@24"].parameters == {"tokens": 8, "depth": 24}
    assert rows["memory_peak"].parameters["forecast"] == 5
    # Half of the answer is behind the depth.
    assert rows["bandwidth_share@24"].parameters["limit_tok_s"] == 1000 + 24 + 8 + 3
    assert bench.notes == ()
    assert watch.n_done == watch.n_units > 0
    assert all(backend.n_closed == 1 and not backend.violations for backend in bed.backends)
    # Two loads for one answer, one for the streams.
    assert [backend.n_seq_max for backend in bed.backends] == [1, 1, 2]


def test_what_lies_before_the_depth_is_read_once() -> None:
    bed = Bed(n_batch=64)
    bed.bench().run()
    chunks = [
        (chunk.pos, len(chunk.tokens)) for batch in bed.backends[1].batches for chunk in batch
    ]
    assert chunks.count((0, 24)) == 1
    behind = chunks[chunks.index((0, 24)) + 1 :]
    assert all(pos >= 24 for pos, _ in behind)
    assert [n for pos, n in behind if n > 1] == 2 * [8, 16, 8]


def test_streams_run_at_once() -> None:
    bed = Bed()
    bed.bench().run()
    widths = {len(batch) for batch in bed.backends[-1].batches}
    assert widths == {1, 2}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"n_ctx": 16, "kv_unified": True}, ["streams1", "streams2"]),
        ({"n_ctx": 16, "kv_unified": False}, ["streams1", "streams2"]),
        ({"n_ctx": 15, "kv_unified": True}, ["streams1"]),
        ({"n_ctx": 14, "kv_unified": False}, []),
    ],
)
def test_streams_need_their_context_together_or_each(changes, found) -> None:
    bench = Bed().bench(stream_options=replace(STREAMS, **changes))
    bench.run()
    rows = {measure.name: measure for measure in bench.measures}
    assert [name for name in rows if name.startswith("streams")] == found
    for name in found:
        assert rows[name].parameters["kv_unified"] is changes["kv_unified"]
    left = [str(n) for n in (1, 2) if f"streams{n}" not in found]
    words = f"left out for want of context: {', '.join(left)} streams"
    assert bench.notes == ((words,) if left else ())


def test_a_slow_load_is_not_repeated() -> None:
    bed, watch = Bed(), Watch()
    bed.load_s = 60.0
    bench = bed.bench(watch=watch)
    bench.run()
    assert len(bed.backends) == 2 and watch.n_done == watch.n_units
    assert next(m for m in bench.measures if m.name == "load").values == (60.0,)


def test_what_the_context_does_not_hold_is_left_out_and_said() -> None:
    bed, watch = Bed(), Watch()
    bench = bed.bench(watch=watch, options=replace(OPTIONS, n_ctx=34))
    bench.run()
    assert "pp8@24" in names(bench) and "pp16@24" not in names(bench)
    assert "tg6" in names(bench) and "tg6@24" not in names(bench)
    assert bench.notes == ("left out for want of context (34 tokens): pp16@24, tg6@24",)
    assert watch.n_done == watch.n_units


def test_a_model_that_cannot_go_back_has_no_rows_at_depth() -> None:
    class Forgetful(FakeBackend):
        def load_state(self, seq_id: int, state: bytes, *, partial: bool) -> bool:
            return False

    bed = Bed(recurrent=True)
    bed.open = lambda options: Engine(  # type: ignore[method-assign]
        Forgetful(n_ctx=64, recurrent=True, next_token=endless_token)
    )
    bench = bed.bench(stream_options=None)
    bench.run()
    assert "tg6" in names(bench) and not [name for name in names(bench) if "@" in name]
    assert "pp8@24: the cache does not keep 24 tokens of this model, left out" in bench.notes


def test_no_room_for_streams() -> None:
    bench = Bed().bench(stream_options=None)
    bench.run()
    assert not [name for name in names(bench) if name.startswith("streams")]
    assert bench.notes == ("parallel streams: they would not fit into the memory, left out",)


def test_streams_that_cannot_be_opened_cost_nothing_else() -> None:
    bed = Bed()
    opening = bed.open

    def open_(options: EngineOptions) -> Engine:
        if options.n_seq_max > 1:
            raise WillNotFitError("no memory")
        return opening(options)

    bed.open = open_  # type: ignore[method-assign]
    bench = bed.bench()
    bench.run()
    assert "tg6@24" in names(bench)
    assert bench.notes == ("parallel streams were not measured: no memory",)


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), EngineError("it broke")])
def test_what_was_measured_is_kept(problem: BaseException) -> None:
    class Stopping(Watch):
        def describe(self, text: str) -> None:
            super().describe(text)
            if text == "pp8@24 (2 of 2)":
                raise problem

    bed = Bed()
    bench = bed.bench(watch=Stopping())
    with pytest.raises(type(problem)):
        bench.run()
    rows = {measure.name: len(measure.values) for measure in bench.measures}
    assert rows == {
        "pp8": 2, "pp16": 2, "tg6": 2, "pp8@24": 1, "pp16@24": 1, "tg6@24": 1,
        "ttft_cold": 2, "ttft_warm": 2, "itl_p50": 2, "itl_p95": 2, "itl_p99": 2, "load": 2,
    }  # fmt: skip
    assert all(backend.n_closed == 1 for backend in bed.backends)


def test_an_interrupt_in_mid_answer_stops_the_engine() -> None:
    class Stopping(Watch):
        def advance(self, n_units: float) -> None:
            if self.labels and self.labels[-1].startswith("tg6") and n_units:
                raise KeyboardInterrupt
            super().advance(n_units)

    bed = Bed()
    bench = bed.bench(watch=Stopping())
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    assert names(bench) == ["pp8", "pp16", "load"]
    assert bed.backends[-1].n_closed == 1 and not bed.backends[-1].open_samplers


def test_the_quick_suite_asks_for_less() -> None:
    assert QUICK.n_ctx < Suite().n_ctx and QUICK.n_ctx_streams < Suite().n_ctx_streams
    assert Suite().n_ctx == 4096 + 2048 + 1


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, part) for part in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([7.0], 0.5) == 7.0


def cpu_times(*rows: tuple[float, float, float]) -> Callable[[], CpuTimes]:
    left = [CpuTimes(*row, n_cpus=2) for row in rows]
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_a_busy_machine_is_said() -> None:
    slept: list[float] = []
    # Before: others have one and a half processors. During: this process has one, others half.
    read = cpu_times((0, 0, 0), (1, 1.5, 0), (11, 16.5, 10))
    busy = BusyWatch(read, slept.append)
    busy.start()
    assert slept and busy.before is not None and busy.before.is_busy
    assert busy.warning() == (
        "the machine was busy: other programs used 1.5 before and 0.5 during the measurement "
        "of the 2 processors; the figures are lower than they could be"
    )


def test_a_calm_machine_is_not() -> None:
    busy = BusyWatch(cpu_times((0, 0, 0), (1, 0.1, 0), (11, 20.1, 20)), lambda _s: None)
    busy.start()
    assert busy.warning() is None and load_between(None, None) is None


def test_memory_of_this_process() -> None:
    memory = ProcessMemory()
    memory.begin()
    now, peak = memory.now(), memory.peak()
    assert now is not None and peak is not None and 1 << 20 < now <= peak * 1.05

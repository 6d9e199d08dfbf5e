"""What a real run says about this machine: speed, kept for the next forecast."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.cli.wrapped_engine import WrappedEngine
from llmrun.engine.types import (
    EngineCounters,
    EngineLike,
    Event,
    FinishEvent,
    Request,
    StreamLike,
    TextEvent,
)

if TYPE_CHECKING:
    from llmrun.cli.acquire import Acquired
    from llmrun.cli.options import Invocation
    from llmrun.fit.plan import Plan
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.machine import Machine

_MONTH_S = 30 * 86400.0
MIN_TOKENS = 32
"""An answer of fewer tokens says little about speed."""

# A computation that gets less of its cores than this shares them with other programs.
_UNDISTURBED = 0.8


class WatchedEngine(WrappedEngine):
    """An engine that remembers the end of its last answer of MIN_TOKENS tokens or more that it gave
    alone, and how many cores computed while its text came (0.0 where that is not known). See
    `engine.types.EngineLike`."""

    def __init__(self, engine: EngineLike) -> None:
        super().__init__(engine)
        self.last_finish: FinishEvent | None = None
        self.last_n_cores = 0.0

    def submit(self, request: Request) -> StreamLike:
        before = self._engine.counters
        return _WatchedStream(self, self._engine.submit(request), before)


class _WatchedStream:
    def __init__(self, engine: WatchedEngine, stream: StreamLike, before: EngineCounters) -> None:
        self._engine = engine
        self._stream = stream
        self._before = before
        self._start: tuple[float, float] | None = None

    def __iter__(self) -> _WatchedStream:
        return self

    def __next__(self) -> Event:
        event = next(self._stream)
        self._watch(event)
        return event

    def listen(self, listener: Callable[[], None]) -> None:
        self._stream.listen(listener)

    def take(self) -> list[Event]:
        events = self._stream.take()
        for event in events:
            self._watch(event)
        return events

    def _watch(self, event: Event) -> None:
        if isinstance(event, FinishEvent):
            if event.usage.n_completion >= MIN_TOKENS and self._was_alone():
                self._engine.last_finish = event
                self._engine.last_n_cores = self._count_cores()
        elif self._start is None and isinstance(event, TextEvent):
            self._start = time.perf_counter(), time.process_time()

    def _was_alone(self) -> bool:
        """Whether no other request was worked on meanwhile: with company each is slower."""
        before, after = self._before, self._engine.counters
        n_others = before.n_running + before.n_waiting
        return n_others == 0 and after.n_requests - before.n_requests <= 1

    def _count_cores(self) -> float:
        if self._start is None:
            return 0.0
        start, computed = self._start
        took = time.perf_counter() - start
        return (time.process_time() - computed) / took if took > 0 else 0.0

    def cancel(self) -> None:
        self._stream.cancel()


def record_speed(
    invocation: Invocation,
    acquired: Acquired,
    engine: WatchedEngine,
    measured_bytes: int | None,
) -> None:
    """Keep the speed of the last answer worth measuring, if there was one, and the memory that the
    process had. Never raises for the disk's sake."""
    finish = engine.last_finish
    if finish is None:
        return
    from llmrun.fit.speed import forecast
    from llmrun.fit.speed_log import SpeedKey, SpeedLog

    state_dir, plan = invocation.environment.state_dir, acquired.plan
    machine = with_ram_bandwidth(acquired.machine, state_dir, may_measure=False)
    key = SpeedKey.of(machine, build_name(), acquired.info, plan)
    depth = finish.usage.n_prompt + finish.usage.n_completion // 2
    expected = forecast(acquired.info, plan.placement, machine, depth=depth)
    if key.place == "cpu" and _is_disturbed(engine.last_n_cores, plan, machine):
        expected = None  # it would say that forecasts are too high here
    SpeedLog(state_dir).record(
        key,
        tok_s=finish.timings.decode_tok_s,
        n_tokens=finish.usage.n_completion,
        forecast_tok_s=None if expected is None else expected.middle,
        planned_bytes=plan.placement.total_bytes,
        measured_bytes=measured_bytes,
    )


def _is_disturbed(n_cores: float, plan: Plan, machine: Machine) -> bool:
    n_meant = min(float(plan.n_threads), machine.cpu.quota or plan.n_threads)
    return 0 < n_cores < _UNDISTURBED * n_meant


def with_forecast(invocation: Invocation, machine: Machine, info: ModelInfo, plan: Plan) -> Plan:
    """The plan with a forecast: what runs on this machine have shown, else by the speed of its
    memory."""
    from llmrun.fit.speed import forecast
    from llmrun.fit.speed_log import SpeedLog

    state_dir = invocation.environment.state_dir
    machine = with_ram_bandwidth(machine, state_dir)
    plan = replace(plan, forecast=forecast(info, plan.placement, machine))
    return SpeedLog(state_dir).improve(plan, machine, build_name(), info)


def build_name() -> str:
    """Names the engine's build: the binding's version and its libraries. Loads none of them."""
    from importlib.metadata import PackageNotFoundError, version

    from llmrun.hardware.engine_devices import find_libraries
    from llmrun.hardware.probe import Probe

    try:
        binding = version("llama-cpp-python")
    except PackageNotFoundError:
        binding = "?"
    return f"{binding} {','.join(sorted(find_libraries(Probe()) or ()))}"


def with_ram_bandwidth(machine: Machine, state_dir: Path, *, may_measure: bool = True) -> Machine:
    """`machine` with the speed of its RAM: as it was measured here before, else measured now, which
    takes some tenths of a second once a month. Without `may_measure` it may stay unknown."""
    if machine.memory.bandwidth_bytes_s is not None or not machine.memory.is_known:
        return machine
    path = state_dir / "memory.json"
    key = f"{machine.cpu.name}/{machine.cpu.n_physical}/{machine.memory.total_bytes}"
    speed = _read_bandwidth(path, key)
    if speed is None:
        if not may_measure:
            return machine
        from llmrun.hardware.bandwidth import measure_ram_bandwidth
        from llmrun.hardware.threads import choose_threads

        speed = measure_ram_bandwidth(
            n_threads=choose_threads(machine.cpu).n_threads,
            available_bytes=machine.memory.available_bytes,
        )
        _write_bandwidth(path, key, speed)
    if speed <= 0:
        return machine
    return replace(machine, memory=replace(machine.memory, bandwidth_bytes_s=speed))


def _read_bandwidth(path: Path, key: str) -> float | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        is_valid = found["machine"] == key and 0 <= time.time() - found["at"] < _MONTH_S
        return float(found["bytes_s"]) if is_valid else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_bandwidth(path: Path, key: str, speed: float) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.write_text(json.dumps({"machine": key, "at": time.time(), "bytes_s": speed}))
        os.replace(fresh, path)


def read_resident_bytes() -> int | None:
    """Memory of this process now, mapped files included; None where it costs more than a read."""
    try:
        with Path("/proc/self/statm").open(encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None

"""The standard measurement: how fast a model reads and answers here, how soon, and in what memory.

Two engines are opened, one after the other: the first as `llmrun run` would, for everything about
a single answer; the second with room for many. Within each, everything is measured once, then
again, so that a machine that grows slower meanwhile is slower for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmrun.bench.busy import BusyWatch
from llmrun.bench.drive import Driver, NoWatch, Watch, request_units
from llmrun.bench.memory import ProcessMemory
from llmrun.bench.types import Measure, Unit
from llmrun.bench.workloads import Workloads
from llmrun.engine.types import EngineLike, EngineOptions, FinishEvent
from llmrun.errors import LlmrunError

OpenEngine = Callable[[EngineOptions], EngineLike]
"""Loads the model. Raises LlmrunError."""

N_HEAD = 8
"""Tokens of the prompt of a generation that is to start from (almost) nothing."""

LOAD_UNITS = 300.0
"""What a load counts on the progress bar."""

_N_WARM_UP = 32
_N_SUFFIX = 16
_QUICK_LOAD_S = 1.5


@dataclass(frozen=True, slots=True)
class Suite:
    """What is measured, in tokens. `n_first` is the length of the prompt for the time to the first
    token; `n_stream_prompt` and `n_stream_tokens` are of each parallel stream."""

    n_prompts: tuple[int, ...] = (128, 512, 2048)
    n_generate: int = 128
    depths: tuple[int, ...] = (0, 4096)
    n_first: int = 512
    n_streams: tuple[int, ...] = (1, 4, 8, 16)
    n_stream_prompt: int = 32
    n_stream_tokens: int = 64
    n_repeats: int = 3

    @property
    def n_ctx(self) -> int:
        """The context that all of it needs."""
        longest = max((*self.n_prompts, self.n_generate + N_HEAD, self.n_first + _N_SUFFIX))
        return max(self.depths, default=0) + longest + 1

    @property
    def n_ctx_streams(self) -> int:
        """The context that the most streams need together."""
        return self.n_ctx_of(max(self.n_streams, default=0))

    def n_ctx_of(self, n_streams: int) -> int:
        return n_streams * (self.n_stream_prompt + self.n_stream_tokens)


QUICK = Suite(
    n_prompts=(128, 512),
    n_generate=32,
    depths=(0,),
    n_first=128,
    n_streams=(1, 4),
    n_stream_prompt=16,
    n_stream_tokens=16,
    n_repeats=2,
)


@dataclass(frozen=True, slots=True)
class Subject:
    """The model under measurement: how it is opened for one answer and for many streams (None: no
    room for that), what the planner says it takes of the RAM, and how many tokens a second the
    memory's speed allows with so many tokens in the context (None: not known)."""

    open_engine: OpenEngine
    options: EngineOptions
    stream_options: EngineOptions | None = None
    forecast_bytes: int | None = None
    limit_tok_s: Callable[[int], float | None] = lambda depth: None


@dataclass(slots=True)
class _Row:
    unit: Unit
    higher_is_better: bool
    group: str
    parameters: dict[str, str | int | float | bool]
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Step:
    label: str
    n_units: float
    run: Callable[[], None]


class Bench:
    """One standard measurement. `run` may be interrupted by any exception: `measures` and `notes`
    then hold what there is."""

    def __init__(
        self,
        subject: Subject,
        suite: Suite,
        watch: Watch | None = None,
        *,
        memory: ProcessMemory | None = None,
        busy: BusyWatch | None = None,
    ) -> None:
        self._subject = subject
        self._suite = suite
        self._watch = watch or NoWatch()
        self._memory = memory or ProcessMemory()
        self._busy = busy or BusyWatch()
        self._rows: dict[str, _Row] = {}
        self._notes: list[str] = []
        self._lost: set[str] = set()

    @property
    def measures(self) -> tuple[Measure, ...]:
        return tuple(
            Measure(
                name, row.unit, tuple(row.values), row.higher_is_better, row.group, row.parameters
            )
            for name, row in self._rows.items()
            if row.values and name not in self._lost
        )

    @property
    def notes(self) -> tuple[str, ...]:
        warning = self._busy.warning()
        return (*((warning,) if warning else ()), *self._notes)

    def run(self) -> None:
        """Raises the LlmrunError of an engine that cannot be opened or stops."""
        self._declare()
        self._watch.begin(self._count_units())
        self._watch.describe("looking at the machine")
        self._busy.start()
        self._measure_single()
        self._measure_streams()

    # ---- one answer at a time

    def _measure_single(self) -> None:
        self._memory.begin()
        before = self._memory.now()
        engine = self._load(self._subject.options)
        try:
            driver = Driver(engine, self._watch)
            workloads = Workloads(engine.tokenizer)
            self._watch.describe("warming up")
            driver.generate(workloads.fresh(min(_N_WARM_UP, engine.n_ctx // 2)), _N_WARM_UP)
            for depth in self._depths(engine.n_ctx):
                base: tuple[int, ...] = ()
                if depth:
                    self._watch.describe(f"reading {depth} tokens")
                    base = workloads.fresh(depth)
                    driver.generate(base, 0)
                for number in range(self._suite.n_repeats):
                    for step in self._list_steps(driver, workloads, base, engine.n_ctx):
                        self._describe(step.label, number)
                        step.run()
            self._record_memory(before)
        finally:
            engine.close()

    def _load(self, options: EngineOptions) -> EngineLike:
        """The engine; where loading is quick it is done as often as the rest is measured."""
        for number in range(self._suite.n_repeats):
            self._describe("loading", number)
            engine = self._subject.open_engine(options)
            self._add("load", engine.load_s)
            self._watch.advance(LOAD_UNITS)
            if number == self._suite.n_repeats - 1 or engine.load_s > _QUICK_LOAD_S:
                self._watch.advance(LOAD_UNITS * (self._suite.n_repeats - 1 - number))
                break
            engine.close()
        return engine

    def _list_steps(
        self, driver: Driver, workloads: Workloads, base: tuple[int, ...], n_ctx: int
    ) -> list[_Step]:
        """One round of what is measured behind `base`, as far as the context reaches."""
        suite, depth = self._suite, len(base)

        def read(n: int) -> Callable[[], None]:
            def run() -> None:
                prompt = workloads.after(base, n) if depth else workloads.fresh(n)
                finish = driver.generate(prompt, 1, n_known=depth)
                self._add_speed(_name("pp", n, depth), finish, depth, is_prompt=True)

            return run

        def generate() -> None:
            prompt = workloads.after(base, N_HEAD) if depth else workloads.fresh(N_HEAD)
            finish = driver.generate(prompt, suite.n_generate, n_known=depth)
            self._add_speed(_name("tg", suite.n_generate, depth), finish, depth, is_prompt=False)
            self._add_share(finish, depth)
            if not depth:
                self._add_latencies(finish)

        def first() -> None:
            prompt = workloads.fresh(suite.n_first)
            self._add("ttft_cold", driver.generate(prompt, 1).timings.ttft_s)
            again = driver.generate(workloads.after(prompt, _N_SUFFIX), 1, n_known=suite.n_first)
            self._add("ttft_warm", again.timings.ttft_s, cached=again.usage.n_cached)

        steps = [
            _Step(_name("pp", n, depth), request_units(n, 1), read(n))
            for n in suite.n_prompts
            if depth + n <= n_ctx
        ]
        if depth + N_HEAD + suite.n_generate <= n_ctx:
            units = request_units(N_HEAD, suite.n_generate)
            steps.append(_Step(_name("tg", suite.n_generate, depth), units, generate))
        if not depth and suite.n_first + _N_SUFFIX <= n_ctx:
            units = request_units(suite.n_first + _N_SUFFIX, 2)
            steps.append(_Step("time to first token", units, first))
        return steps

    def _depths(self, n_ctx: int) -> list[int]:
        """The depths that leave room for something; says so when some are left out."""
        suite = self._suite
        least = min((*suite.n_prompts, suite.n_generate + N_HEAD))
        possible = [depth for depth in suite.depths if depth + least <= n_ctx]
        missing = [
            name
            for depth in suite.depths
            for name, n in (
                *((_name("pp", n, depth), n) for n in suite.n_prompts),
                (_name("tg", suite.n_generate, depth), suite.n_generate + N_HEAD),
            )
            if depth + n > n_ctx
        ]
        if missing:
            self._notes.append(
                f"left out for want of context ({n_ctx} tokens): {', '.join(missing)}"
            )
        return possible

    def _add_speed(self, name: str, finish: FinishEvent, depth: int, *, is_prompt: bool) -> None:
        # A recurrent state is kept before the last token, so one may be read again.
        if finish.usage.n_cached < depth - 1:
            note = f"{name}: the cache does not keep {depth} tokens of this model, left out"
            if note not in self._notes:
                self._notes.append(note)
            self._lost.add(name)
            return
        timings = finish.timings
        value = timings.prompt_tok_s if is_prompt else timings.decode_tok_s
        if value > 0:
            self._add(name, value)

    def _add_share(self, finish: FinishEvent, depth: int) -> None:
        middle = depth + N_HEAD + self._suite.n_generate // 2
        limit = self._subject.limit_tok_s(middle)
        if limit and finish.timings.decode_tok_s > 0 and finish.usage.n_cached >= depth - 1:
            share = finish.timings.decode_tok_s / limit
            self._add(_at("bandwidth_share", depth), share, limit_tok_s=round(limit, 2))

    def _add_latencies(self, finish: FinishEvent) -> None:
        """Times between tokens, as percentiles of this answer's."""
        times = finish.token_times
        gaps = sorted(1000 * (b - a) for a, b in itertools.pairwise(times))
        for name, part in (("itl_p50", 0.5), ("itl_p95", 0.95), ("itl_p99", 0.99)):
            if gaps:
                self._add(name, percentile(gaps, part), tokens=len(times))

    def _record_memory(self, before: int | None) -> None:
        peak = self._memory.peak()
        if peak is None:
            return
        known = {"before": before or 0}
        if self._subject.forecast_bytes:
            known["forecast"] = self._subject.forecast_bytes
        self._add("memory_peak", float(peak), **known)

    # ---- many at once

    def _measure_streams(self) -> None:
        suite, options = self._suite, self._subject.stream_options
        if not suite.n_streams:
            return
        if options is None:
            self._notes.append("parallel streams: they would not fit into the memory, left out")
            return
        try:
            self._watch.describe("loading for parallel streams")
            engine = self._subject.open_engine(options)
        except LlmrunError as error:
            self._notes.append(f"parallel streams were not measured: {error.message}")
            return
        self._watch.advance(LOAD_UNITS)
        try:
            driver, workloads = Driver(engine, self._watch), Workloads(engine.tokenizer, seed=2)
            driver.generate(workloads.fresh(suite.n_stream_prompt), suite.n_stream_tokens)
            possible = [
                n
                for n in suite.n_streams
                # The context is one for all streams, or each one's own.
                if n <= options.n_seq_max
                and suite.n_ctx_of(n if options.kv_unified else 1) <= engine.n_ctx
            ]
            for number in range(suite.n_repeats):
                for n in possible:
                    self._describe(f"{n} streams" if n > 1 else "1 stream", number)
                    prompts = [workloads.fresh(suite.n_stream_prompt) for _ in range(n)]
                    together = driver.generate_together(prompts, suite.n_stream_tokens)
                    if together.n_tokens:
                        self._add(f"streams{n}", together.tok_s, kv_unified=options.kv_unified)
        finally:
            engine.close()
        if len(possible) < len(suite.n_streams):
            left = [str(n) for n in suite.n_streams if n not in possible]
            self._notes.append(f"left out for want of context: {', '.join(left)} streams")

    # ---- rows

    def _declare(self) -> None:
        """All rows in the order in which they are shown."""
        suite = self._suite
        for depth in suite.depths:
            for n in suite.n_prompts:
                self._row(_name("pp", n, depth), "tok/s", "prompt", tokens=n, depth=depth)
            self._row(
                _name("tg", suite.n_generate, depth),
                "tok/s",
                "generation",
                tokens=suite.n_generate,
                depth=depth,
            )
        for depth in suite.depths:
            self._row(_at("bandwidth_share", depth), "share", "generation", depth=depth)
        self._row("ttft_cold", "s", "latency", prompt=suite.n_first)
        self._row("ttft_warm", "s", "latency", prompt=suite.n_first + _N_SUFFIX)
        for name in ("itl_p50", "itl_p95", "itl_p99"):
            self._row(name, "ms", "latency")
        for n in suite.n_streams:
            self._row(
                f"streams{n}",
                "tok/s",
                "streams",
                n_streams=n,
                prompt=suite.n_stream_prompt,
                tokens=suite.n_stream_tokens,
            )
        self._row("load", "s", "load")
        self._row("memory_peak", "bytes", "memory")

    def _row(self, name: str, unit: Unit, group: str, **parameters: int) -> None:
        is_better = unit in ("tok/s", "share")
        self._rows[name] = _Row(unit, is_better, group, dict(parameters))

    def _add(self, name: str, value: float, **parameters: int | float) -> None:
        if math.isfinite(value):
            row = self._rows[name]
            row.values.append(value)
            row.parameters.update(parameters)

    def _count_units(self) -> float:
        """The whole of `run`, as planned."""
        suite, n_ctx = self._suite, self._subject.options.n_ctx
        units = LOAD_UNITS * suite.n_repeats
        units += request_units(min(_N_WARM_UP, n_ctx // 2), _N_WARM_UP)
        for depth in suite.depths:
            lengths = [request_units(n, 1) for n in suite.n_prompts if depth + n <= n_ctx]
            if depth + N_HEAD + suite.n_generate <= n_ctx:
                lengths.append(request_units(N_HEAD, suite.n_generate))
            if not depth and suite.n_first + _N_SUFFIX <= n_ctx:
                lengths.append(request_units(suite.n_first + _N_SUFFIX, 2))
            if lengths:
                units += depth + suite.n_repeats * sum(lengths)
        if suite.n_streams and self._subject.stream_options is not None:
            one = request_units(suite.n_stream_prompt, suite.n_stream_tokens)
            units += LOAD_UNITS + one * (1 + suite.n_repeats * sum(suite.n_streams))
        return units

    def _describe(self, what: str, number: int) -> None:
        n_repeats = self._suite.n_repeats
        of = f" ({number + 1} of {n_repeats})" if n_repeats > 1 else ""
        self._watch.describe(f"{what}{of}")


def percentile(ordered: Sequence[float], part: float) -> float:
    """Of values in ascending order: the smallest that at least `part` of them do not exceed."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def _name(what: str, n_tokens: int, depth: int) -> str:
    return _at(f"{what}{n_tokens}", depth)


def _at(name: str, depth: int) -> str:
    return f"{name}@{depth}" if depth else name

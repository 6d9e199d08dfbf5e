"""What each optimization buys here: the same work without it and with it, in turns.

Every pair of turns opens the model without and with (where the engine must be opened anew for
that), and the order changes from pair to pair, so that a machine that slows down favours neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmrun.bench.drive import GREEDY, Driver, NoWatch, Portion, Watch, request_units
from llmrun.bench.runner import LOAD_UNITS, OpenEngine
from llmrun.bench.types import Ablation, Measure, Unit
from llmrun.bench.workloads import Workloads
from llmrun.engine.types import EngineLike, EngineOptions, KvType, SamplingParams
from llmrun.errors import LlmrunError

Work = Callable[[Driver, Workloads], Mapping[str, float]]
"""Does some work; values by the name of the workload."""

Open = Callable[[], EngineLike]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much work each turn is, in tokens."""

    n_prompt: int = 512
    n_answer: int = 64
    n_edit: int = 96
    n_parallel: int = 8
    n_parallel_prompt: int = 32
    n_parallel_tokens: int = 32
    n_repeats: int = 3

    def within(self, n_ctx: int) -> Sizes:
        """The same as far as a context of `n_ctx` tokens has room for it."""
        return replace(
            self,
            n_prompt=max(1, min(self.n_prompt, n_ctx // 2)),
            n_answer=max(2, min(self.n_answer, n_ctx // 4)),
            n_edit=max(2, min(self.n_edit, n_ctx // 4)),
        )


QUICK_SIZES = Sizes(
    n_prompt=256, n_answer=32, n_edit=48, n_parallel=4, n_parallel_tokens=16, n_repeats=1
)


@dataclass(frozen=True, slots=True)
class Switch:
    """One thing that can be off and on. `off` and `on` open the engines; `on` None: it is the same
    one, and only the work differs. `units` are those of the values of each workload."""

    setting: str
    off: Open
    on: Open | None
    work_off: Work
    work_on: Work
    units: Mapping[str, Unit]
    n_work_units: float

    @property
    def n_units(self) -> float:
        """Of a pair of turns, for the progress bar."""
        return LOAD_UNITS * (1 if self.on is None else 2) + 2 * self.n_work_units


@dataclass(frozen=True, slots=True)
class OtherQuant:
    """The same model in another quant that is on this machine."""

    label: str
    open: Open


@dataclass(slots=True)
class _Pair:
    unit: Unit
    off: list[float] = field(default_factory=list)
    on: list[float] = field(default_factory=list)


class AblationRun:
    """`run` may be interrupted by any exception: `ablations` and `notes` hold what there is."""

    def __init__(
        self, switches: Sequence[Switch], n_repeats: int, watch: Watch | None = None
    ) -> None:
        self._switches = tuple(switches)
        self._n_repeats = n_repeats
        self._watch = watch or NoWatch()
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self.notes: list[str] = []

    @property
    def ablations(self) -> tuple[Ablation, ...]:
        """What has values on both sides."""
        return tuple(
            Ablation(
                setting,
                workload,
                _measure(workload, pair.unit, pair.off),
                _measure(workload, pair.unit, pair.on),
            )
            for (setting, workload), pair in self._pairs.items()
            if pair.off and pair.on
        )

    @property
    def n_units(self) -> float:
        return self._n_repeats * sum(switch.n_units for switch in self._switches)

    def run(self) -> None:
        """What cannot be measured is noted, and the rest goes on."""
        for switch in self._switches:
            portion = Portion(self._watch, self._n_repeats * switch.n_units)
            try:
                for number in range(self._n_repeats):
                    self._take_turns(switch, number, portion)
            except LlmrunError as error:
                self.notes.append(f"{switch.setting}: not measured: {error.message}")
            portion.finish()

    def _take_turns(self, switch: Switch, number: int, watch: Watch) -> None:
        of = f" ({number + 1} of {self._n_repeats})" if self._n_repeats > 1 else ""
        sides = ("off", "on") if number % 2 == 0 else ("on", "off")
        if switch.on is None:
            watch.describe(f"{switch.setting}{of}")
            engine = switch.off()
            try:
                watch.advance(LOAD_UNITS)
                for side in sides:
                    self._measure(switch, side, engine, watch)
            finally:
                engine.close()
            return
        for side in sides:
            watch.describe(f"{switch.setting}, {side}{of}")
            engine = switch.on() if side == "on" else switch.off()
            try:
                watch.advance(LOAD_UNITS)
                self._measure(switch, side, engine, watch)
            finally:
                engine.close()

    def _measure(self, switch: Switch, side: str, engine: EngineLike, watch: Watch) -> None:
        # Both sides get the same prompts, except where one engine does both: it would know them.
        seed = 1 if switch.on is not None or side == "off" else 2
        driver, workloads = Driver(engine, watch), Workloads(engine.tokenizer, seed)
        Driver(engine).generate(workloads.fresh(8), 2)  # warm-up
        work = switch.work_on if side == "on" else switch.work_off
        for workload, value in work(driver, workloads).items():
            pair = self._pairs.setdefault((switch.setting, workload), _Pair(switch.units[workload]))
            if value > 0:
                (pair.on if side == "on" else pair.off).append(value)


def _measure(name: str, unit: Unit, values: Sequence[float]) -> Measure:
    return Measure(name, unit, tuple(values), unit in ("tok/s", "share"), "what pays")


def list_switches(
    open_engine: OpenEngine,
    options: EngineOptions,
    sizes: Sizes,
    *,
    stream_options: EngineOptions | None = None,
    small_kv: KvType | None = "q8_0",
    others: Iterable[OtherQuant] = (),
) -> list[Switch]:
    """All that can be switched for a model that is opened with `options`.

    `stream_options`: those for `sizes.n_parallel` streams, None where there is no room for them.
    `small_kv`: the type of a smaller KV cache that the model can have, if there is one.
    """
    sizes = sizes.within(options.n_ctx)
    plain = replace(options, speculative="off")

    def opening(**changes: object) -> Open:
        changed = replace(plain, **changes)  # type: ignore[arg-type]
        return lambda: open_engine(changed)

    def compare(setting: str, off: Open, on: Open) -> Switch:
        return _compare(setting, off, on, _Plain(sizes))

    switches = [_prefix_cache(opening(), sizes)]
    f16 = {"type_k": "f16", "type_v": "f16"}
    switches.append(
        compare("FlashAttention", opening(flash_attn="off", **f16), opening(flash_attn="on", **f16))
    )
    if small_kv is not None and options.flash_attn != "off":
        small = opening(type_k=small_kv, type_v=small_kv)
        switches.append(compare(f"KV cache in {small_kv}", opening(**f16), small))
    switches.append(_speculation("speculation", opening(), opening(speculative="auto"), sizes))
    if options.speculative == "draft":
        drafting = opening(speculative="draft")
        switches.append(_speculation("a draft model", opening(), drafting, sizes))
    if stream_options is not None:
        together = replace(stream_options, speculative="off")
        switches.append(_batching(lambda: open_engine(together), sizes))
        if not together.kv_unified:
            shared = replace(together, kv_unified=True)
            switches.append(
                _own_caches(lambda: open_engine(shared), lambda: open_engine(together), sizes)
            )
    n_threads = max(options.n_threads or 1, options.n_threads_batch or 1)
    if n_threads > 1:
        one = opening(n_threads=1, n_threads_batch=1, steady_threads=False)
        fixed = opening(steady_threads=False)
        switches.append(compare(f"{n_threads} threads instead of 1", one, fixed))
        switches.append(compare("steady threads", fixed, opening(steady_threads=True)))
    switches += [compare(f"quant {other.label} instead", opening(), other.open) for other in others]
    return switches


@dataclass(frozen=True, slots=True)
class _Plain:
    """A prompt is read, then answered."""

    sizes: Sizes

    @property
    def names(self) -> tuple[str, str]:
        return f"reading {self.sizes.n_prompt}", "answering"

    def __call__(self, driver: Driver, workloads: Workloads) -> Mapping[str, float]:
        sizes = self.sizes
        timings = driver.generate(workloads.fresh(sizes.n_prompt), sizes.n_answer).timings
        reading, answering = self.names
        return {reading: timings.prompt_tok_s, answering: timings.decode_tok_s}


def _compare(setting: str, off: Open, on: Open, work: _Plain) -> Switch:
    units: Mapping[str, Unit] = dict.fromkeys(work.names, "tok/s")
    n_units = request_units(work.sizes.n_prompt, work.sizes.n_answer)
    return Switch(setting, off, on, work, work, units, n_units)


def _prefix_cache(opening: Open, sizes: Sizes) -> Switch:
    """A second question about the same text, against one about a new text."""
    n_question = 16
    n_text = max(1, sizes.n_prompt - n_question)
    name = f"first token behind {n_text}"

    def cold(driver: Driver, workloads: Workloads) -> Mapping[str, float]:
        finish = driver.generate(workloads.fresh(n_text + n_question), 1)
        return {name: finish.timings.ttft_s}

    def warm(driver: Driver, workloads: Workloads) -> Mapping[str, float]:
        text = workloads.fresh(n_text)
        driver.generate(text, 1)
        finish = driver.generate(workloads.after(text, n_question), 1, n_known=n_text)
        return {name: finish.timings.ttft_s}

    n_units = request_units(n_text + n_question, 1) + request_units(0, 1) / 2
    return Switch("prefix cache", opening, None, cold, warm, {name: "s"}, n_units)


def _speculation(setting: str, off: Open, on: Open, sizes: Sizes) -> Switch:
    repeated, new = "copying a text", "writing a new one"

    def work(driver: Driver, workloads: Workloads) -> Mapping[str, float]:
        n_prompt = max(1, driver.engine.n_ctx - sizes.n_edit)
        edit = driver.generate(workloads.edit(n_prompt), sizes.n_edit, sampling=GREEDY)
        # Greedy, a small model soon repeats itself.
        sampling = SamplingParams(temperature=1.0, seed=len(edit.token_times))
        story = driver.generate(workloads.fresh(32), sizes.n_edit, sampling=sampling)
        return {repeated: edit.timings.decode_tok_s, new: story.timings.decode_tok_s}

    units: Mapping[str, Unit] = {repeated: "tok/s", new: "tok/s"}
    n_units = 2 * request_units(300, sizes.n_edit)
    return Switch(setting, off, on, work, work, units, n_units)


@dataclass(frozen=True, slots=True)
class _AtOnce:
    """Several requests that have nothing in common, all at once."""

    sizes: Sizes

    @property
    def name(self) -> str:
        return f"{self.sizes.n_parallel} requests"

    @property
    def n_units(self) -> float:
        sizes = self.sizes
        return sizes.n_parallel * request_units(sizes.n_parallel_prompt, sizes.n_parallel_tokens)

    def prompts(self, workloads: Workloads) -> list[tuple[int, ...]]:
        sizes = self.sizes
        return [workloads.fresh(sizes.n_parallel_prompt) for _ in range(sizes.n_parallel)]

    def __call__(self, driver: Driver, workloads: Workloads) -> Mapping[str, float]:
        prompts = self.prompts(workloads)
        return {self.name: driver.generate_together(prompts, self.sizes.n_parallel_tokens).tok_s}


def _batching(opening: Open, sizes: Sizes) -> Switch:
    at_once = _AtOnce(sizes)

    def one_by_one(driver: Driver, workloads: Workloads) -> Mapping[str, float]:
        found = [
            driver.generate_together([prompt], sizes.n_parallel_tokens)
            for prompt in at_once.prompts(workloads)
        ]
        seconds = sum(each.seconds for each in found)
        return {at_once.name: sum(each.n_tokens for each in found) / seconds if seconds else 0.0}

    units: Mapping[str, Unit] = {at_once.name: "tok/s"}
    return Switch("batching", opening, None, one_by_one, at_once, units, at_once.n_units)


def _own_caches(shared: Open, own: Open, sizes: Sizes) -> Switch:
    at_once = _AtOnce(sizes)
    units: Mapping[str, Unit] = {at_once.name: "tok/s"}
    return Switch(
        "a KV cache for each stream", shared, own, at_once, at_once, units, at_once.n_units
    )

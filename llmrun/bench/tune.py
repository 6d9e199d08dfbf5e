"""Searches the settings with which a model is fastest here: threads, ubatch, KV type, speculation.

One setting after the other, each from the best of those before. The candidates of one setting are
measured in turns, and one takes the place of the present value only when it is faster by more than
what measurements scatter, and in every turn. What does not fit beside the wanted context is never
tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from llmrun.bench.drive import Driver, NoWatch, Portion, Watch, request_units
from llmrun.bench.runner import LOAD_UNITS, OpenEngine
from llmrun.bench.types import Ablation, Measure
from llmrun.bench.workloads import Workloads
from llmrun.engine.governor import thread_counts
from llmrun.engine.types import EngineOptions, KvType, Speculative
from llmrun.errors import LlmrunError

LEAST_GAIN = 0.04
"""A setting is changed for so much and more."""

_EDIT_TOKENS = 450  # about what the text to edit has

UBATCHES = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Choice:
    """One point of the search."""

    n_threads: int
    n_threads_batch: int
    n_ubatch: int
    kv_type: KvType
    speculative: Speculative


@dataclass(frozen=True, slots=True)
class TuneSizes:
    """The work that each candidate is measured with, in tokens."""

    n_prompt: int = 1024
    n_answer: int = 64
    n_repeats: int = 3


@dataclass(frozen=True, slots=True)
class _Score:
    """Seconds of one turn's parts: less is better. A text is edited only where speculation is
    searched."""

    read_s: float
    answer_s: float
    edit_s: float

    @property
    def total_s(self) -> float:
        return self.read_s + self.answer_s + self.edit_s


Part = Callable[[_Score], float]


class Tuner:
    """`options_of(choice)` gives the engine's options for it, None for one that does not fit.
    `fixed` names the settings that stay as they are, because the user set them.

    `run` may be interrupted by any exception: `best` is then what was found until then.
    """

    def __init__(
        self,
        open_engine: OpenEngine,
        options_of: Callable[[Choice], EngineOptions | None],
        start: Choice,
        sizes: TuneSizes,
        watch: Watch | None = None,
        *,
        n_threads_max: int,
        kv_types: Sequence[KvType] = ("f16", "q8_0"),
        fixed: frozenset[str] = frozenset(),
    ) -> None:
        self._open_engine = open_engine
        self._options_of = options_of
        self._sizes = sizes
        self._watch = watch or NoWatch()
        # A micro-batch longer than the prompt is no other than one as long.
        ubatches = [n for n in UBATCHES if n <= sizes.n_prompt]
        self._dimensions = _list_dimensions(start, n_threads_max, ubatches, kv_types, fixed)
        self._edits = "speculative" not in fixed
        self._start = start
        self._seeds = count(1)
        self.best = start
        self.steps: list[Ablation] = []
        self.notes: list[str] = []

    @property
    def n_units(self) -> float:
        """For the progress bar, if everything is tried."""
        turns = [len(values) + 1 for _, values, _ in self._dimensions]
        return (sum(turns) + 2) * self._units_of_choice()

    def _units_of_choice(self) -> float:
        one = LOAD_UNITS + request_units(self._sizes.n_prompt, self._sizes.n_answer)
        if self._edits:
            one += request_units(_EDIT_TOKENS, self._sizes.n_answer)
        return self._sizes.n_repeats * one

    def run(self) -> float:
        """How many times as fast as the start the best is: measured anew, against each other."""
        for name, values, part in self._dimensions:
            portion = Portion(self._watch, (len(values) + 1) * self._units_of_choice())
            self._search(name, values, part, portion)
            portion.finish()
        portion = Portion(self._watch, 2 * self._units_of_choice())
        if self.best == self._start:
            portion.finish()
            return 1.0
        self._watch.describe("comparing with the present settings")
        scores = self._measure_all([self._start, self.best], portion)
        portion.finish()
        off, on = scores.get(self._start, []), scores.get(self.best, [])
        if not off or not on:
            return 1.0
        self._keep("all together", off, on, lambda score: score.total_s)
        gain = _median(off) / _median(on)
        if not _is_faster(off, on):
            self.notes.append("together they are no faster: nothing is changed")
            self.best = self._start
            return 1.0
        return gain

    def _search(
        self, name: str, values: Sequence[Mapping[str, object]], part: Part, watch: Watch
    ) -> None:
        present = self.best
        choices = [replace(present, **value) for value in values]  # type: ignore[arg-type]
        choices = [choice for choice in dict.fromkeys(choices) if choice != present]
        fitting = [choice for choice in choices if self._options_of(choice) is not None]
        if len(fitting) < len(choices):
            self.notes.append(f"{name}: {len(choices) - len(fitting)} would not fit, not tried")
        if not fitting:
            return
        watch.describe(name)
        scores = self._measure_all([present, *fitting], watch)
        off = scores.get(present, [])
        if not off:
            return
        for choice in fitting:
            on = scores.get(choice, [])
            if not on:
                continue
            self._keep(_describe(present, choice), off, on, part)
            is_first = self.best is present
            if _is_faster(off, on, part) and (
                is_first or _median(on, part) < _median(scores[self.best], part)
            ):
                self.best = choice

    def _measure_all(self, choices: Sequence[Choice], watch: Watch) -> dict[Choice, list[_Score]]:
        """Scores of each, in turns; one that fails is left out and noted."""
        scores: dict[Choice, list[_Score]] = {}
        failed: set[Choice] = set()
        for number in range(self._sizes.n_repeats):
            seed = next(self._seeds)
            for choice in choices if number % 2 == 0 else tuple(reversed(choices)):
                if choice in failed:
                    continue
                try:
                    scores.setdefault(choice, []).append(self._measure(choice, seed, watch))
                except LlmrunError as error:
                    failed.add(choice)
                    scores.pop(choice, None)
                    self.notes.append(
                        f"{_describe(self._start, choice)}: not measured: {error.message}"
                    )
        return scores

    def _measure(self, choice: Choice, seed: int, watch: Watch) -> _Score:
        options = self._options_of(choice)
        assert options is not None, "only what fits is measured"
        sizes = self._sizes
        engine = self._open_engine(options)
        try:
            watch.advance(LOAD_UNITS)
            workloads = Workloads(engine.tokenizer, seed)
            Driver(engine).generate(workloads.fresh(8), 4)  # warm-up
            driver = Driver(engine, watch)
            n_prompt = max(1, min(sizes.n_prompt, engine.n_ctx - sizes.n_answer))
            plain = driver.generate(workloads.fresh(n_prompt), sizes.n_answer)
            edit_s = 0.0
            if self._edits:
                n_edit = max(1, engine.n_ctx - sizes.n_answer)
                edit = driver.generate(workloads.edit(n_edit), sizes.n_answer)
                edit_s = _seconds(sizes.n_answer, edit.timings.decode_tok_s)
        finally:
            engine.close()
        return _Score(
            _seconds(sizes.n_prompt, plain.timings.prompt_tok_s),
            _seconds(sizes.n_answer, plain.timings.decode_tok_s),
            edit_s,
        )

    def _keep(self, setting: str, off: list[_Score], on: list[_Score], part: Part) -> None:
        def measure(scores: list[_Score]) -> Measure:
            values = tuple(part(score) for score in scores)
            return Measure("time", "s", values, higher_is_better=False, group="tune")

        self.steps.append(Ablation(setting, "tuning", measure(off), measure(on)))


def _list_dimensions(
    start: Choice,
    n_threads_max: int,
    ubatches: Sequence[int],
    kv_types: Sequence[KvType],
    fixed: frozenset[str],
) -> list[tuple[str, list[dict[str, object]], Part]]:
    """(name, changes to try, what counts)."""
    counts = sorted({*thread_counts(n_threads_max), start.n_threads, start.n_threads_batch})
    words: tuple[Speculative, ...] = ("off", "auto")
    found: list[tuple[str, list[dict[str, object]], Part]] = []
    if "threads" not in fixed:
        found.append(
            (
                "threads for answers",
                [{"n_threads": n} for n in counts],
                lambda score: score.answer_s,
            )
        )
        found.append(
            (
                "threads for prompts",
                [{"n_threads_batch": n} for n in counts],
                lambda score: score.read_s,
            )
        )
    if "ubatch" not in fixed:
        found.append(("ubatch", [{"n_ubatch": n} for n in ubatches], lambda score: score.read_s))
    if "kv_type" not in fixed:
        found.append(
            ("KV type", [{"kv_type": kv_type} for kv_type in kv_types], lambda score: score.total_s)
        )
    if "speculative" not in fixed:
        found.append(
            (
                "speculation",
                [{"speculative": word} for word in words],
                lambda score: score.answer_s + score.edit_s,
            )
        )
    return found


def _describe(before: Choice, after: Choice) -> str:
    """`threads 1 instead of 2`."""
    names = {
        "n_threads": "threads for answers",
        "n_threads_batch": "threads for prompts",
        "n_ubatch": "ubatch",
        "kv_type": "KV cache",
        "speculative": "speculation",
    }
    changes = [
        f"{name} {getattr(after, key)} instead of {getattr(before, key)}"
        for key, name in names.items()
        if getattr(before, key) != getattr(after, key)
    ]
    return ", ".join(changes) or "the same settings"


def _median(scores: Sequence[_Score], part: Part = lambda score: score.total_s) -> float:
    return statistics.median(part(score) for score in scores)


def _is_faster(
    off: Sequence[_Score], on: Sequence[_Score], part: Part = lambda score: score.total_s
) -> bool:
    """By enough, and in each turn."""
    wins = all(part(b) < part(a) for a, b in zip(off, on, strict=False))
    return wins and _median(on, part) * (1 + LEAST_GAIN) < _median(off, part)


def _seconds(n_tokens: int, tok_s: float) -> float:
    """An answer without a speed took for ever."""
    return n_tokens / tok_s if tok_s > 0 else float(n_tokens)

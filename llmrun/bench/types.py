"""Values that the parts of `bench` pass to each other. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

Unit = Literal["tok/s", "s", "ms", "bytes", "share", "count"]


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that was measured, several times.

    `name` is stable and short ("pp512", "tg128", "tg128@4096", "ttft_cold", "ttft_warm", "itl_p99",
    "streams8", "load", "memory_peak", …); `values` are the repeats in order, warm-up left out.
    `group` names the section of the report. `parameters` say how ("depth", "n_streams", …).
    """

    name: str
    unit: Unit
    values: tuple[float, ...]
    higher_is_better: bool
    group: str = "speed"
    parameters: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def middle(self) -> float:
        """The median; 0 without values."""
        return median(self.values) if self.values else 0.0

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return (min(self.values), max(self.values)) if self.values else (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Ablation:
    """What one setting buys: the same workload without it and with it, in turns."""

    setting: str
    workload: str
    off: Measure
    on: Measure

    @property
    def gain(self) -> float:
        """on / off as a factor of which more than 1 is good; 0 when it cannot be said."""
        a, b = self.off.middle, self.on.middle
        if not a or not b:
            return 0.0
        return b / a if self.on.higher_is_better else a / b


@dataclass(frozen=True, slots=True)
class BenchRun:
    """One run of `llmrun bench`: where, what, with which settings, and what came out.

    `machine` and `build` are words that identify them; `settings` are the engine's. `started_at`
    is seconds since the epoch. `is_complete` is False when it was interrupted. `target` is
    "engine", or the address of the server that was measured.
    """

    id: str
    started_at: float
    model: str
    model_sha256: str | None
    quant: str | None
    machine: str
    build: str
    target: str
    settings: Mapping[str, str | int | float | bool | None]
    measures: tuple[Measure, ...]
    ablations: tuple[Ablation, ...] = ()
    notes: tuple[str, ...] = ()
    is_complete: bool = True

"""Whether other programs had the processors while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

BUSY_SHARE = 0.1
"""Other programs with more than this share of the processors spoil a measurement."""

_LOOK_S = 0.4


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """At one moment: `now_s` of a clock, seconds that all programs, and this process, have computed
    since some time ago, on the `n_cpus` processors that this process may use."""

    now_s: float
    busy_s: float
    own_s: float
    n_cpus: int


@dataclass(frozen=True, slots=True)
class Load:
    """What other programs took over some time, in processors, of `n_cpus`."""

    n_used: float
    n_cpus: int

    @property
    def share(self) -> float:
        return self.n_used / self.n_cpus if self.n_cpus else 0.0

    @property
    def is_busy(self) -> bool:
        return self.share > BUSY_SHARE


def read_cpu_times() -> CpuTimes | None:
    """None where the system does not tell. Time that a hypervisor gave to others counts as busy."""
    try:
        import psutil

        process = psutil.Process()
        times = psutil.cpu_times(percpu=True)
        usable = _usable_cpus(len(times))
        own = process.cpu_times()
        # What guests ran is in `user` already.
        quiet = ("idle", "iowait", "guest", "guest_nice")
        busy_s = sum(
            value
            for number in usable
            for name, value in times[number]._asdict().items()
            if name not in quiet
        )
        return CpuTimes(time.monotonic(), busy_s, own.user + own.system, len(usable))
    except (ImportError, OSError, RuntimeError, NotImplementedError):
        return None
    except psutil.Error:
        return None


def _usable_cpus(n_cpus: int) -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        usable = [number for number in sorted(os.sched_getaffinity(0)) if number < n_cpus]
        return usable or list(range(n_cpus))
    return list(range(n_cpus))


def load_between(start: CpuTimes | None, end: CpuTimes | None) -> Load | None:
    """None when it is not known."""
    if start is None or end is None or end.now_s <= start.now_s:
        return None
    others_s = (end.busy_s - start.busy_s) - (end.own_s - start.own_s)
    return Load(max(0.0, others_s / (end.now_s - start.now_s)), end.n_cpus)


class BusyWatch:
    """Looks before a measurement and during it."""

    def __init__(
        self,
        read: Callable[[], CpuTimes | None] = read_cpu_times,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._read = read
        self._sleep = sleep
        self._start: CpuTimes | None = None
        self.before: Load | None = None

    def start(self) -> None:
        """Watch for some tenths of a second, in which this process should do nothing."""
        first = self._read()
        if first is not None:
            self._sleep(_LOOK_S)
        self._start = self._read()
        self.before = load_between(first, self._start)

    def during(self) -> Load | None:
        """Since `start` returned."""
        return load_between(self._start, self._read())

    def warning(self) -> str | None:
        """One sentence when the machine was busy."""
        during = self.during()
        worst = max(
            (load for load in (self.before, during) if load is not None),
            key=lambda load: load.n_used,
            default=None,
        )
        if worst is None or not worst.is_busy:
            return None
        parts = [
            f"{load.n_used:.1f} {when}"
            for load, when in ((self.before, "before"), (during, "during the measurement"))
            if load is not None
        ]
        return (
            f"the machine was busy: other programs used {' and '.join(parts)} of the "
            f"{worst.n_cpus} processors; the figures are lower than they could be"
        )

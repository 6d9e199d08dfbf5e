"""How many threads the engine should compute with. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llmrun.hardware.machine import Cpu


@dataclass(frozen=True, slots=True)
class Threads:
    """`n_threads` for single tokens, `n_threads_batch` for two or more at once. `reasons` say in
    words what bounded them."""

    n_threads: int
    n_threads_batch: int
    reasons: tuple[str, ...] = ()


def choose_threads(cpu: Cpu) -> Threads:
    """One thread for each physical core that this process may use, fast cores only, and no more
    than the whole cores of its quota; at least 1.

    Decoding waits for memory and for the slowest thread, so a second hardware thread or a slow core
    takes away more than it gives; threads beyond a quota are stopped in the middle of a step.
    """
    n_threads = max(1, min(cpu.n_physical, cpu.n_affinity))
    reason = f"{n_threads} threads: one for each physical core"
    if n_threads == 1:
        reason = "1 thread: there is one physical core"
    if cpu.n_affinity < cpu.n_logical:
        reason += f" within the {cpu.n_affinity} of {cpu.n_logical} CPUs this process may use"
    if cpu.n_performance is not None and 0 < cpu.n_performance < n_threads:
        n_threads = cpu.n_performance
        reason = f"{n_threads} threads: one for each performance core"
    if cpu.quota is not None and int(cpu.quota) < n_threads:
        n_threads = max(1, int(cpu.quota))
        reason = f"{n_threads} thread{'s' * (n_threads > 1)}: the CPU quota is {cpu.quota:g} cores"
    return Threads(n_threads, n_threads, (reason,))

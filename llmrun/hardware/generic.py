"""Cores and memory of Windows and of systems without probes of their own, by psutil."""

from __future__ import annotations

from llmrun.hardware.machine import Cpu, Memory
from llmrun.hardware.sources import Probe


def detect_cpu(probe: Probe) -> Cpu:
    """Physical cores scaled down to the affinity mask (psutil does not say which are siblings)."""
    allowed = probe.affinity()
    n_logical = probe.n_logical() or (len(allowed) if allowed else 1)
    n_affinity = min(len(allowed), n_logical) if allowed else n_logical
    n_physical = min(probe.n_physical() or n_logical, n_logical)
    threads_per_core = max(1, n_logical // n_physical)
    return Cpu(
        n_logical=n_logical,
        n_affinity=n_affinity,
        n_physical=min(n_physical, -(-n_affinity // threads_per_core)),
    )


def detect_memory(probe: Probe) -> Memory:
    host = probe.host_memory()
    return Memory(*host) if host else Memory(0, 0, "unknown")

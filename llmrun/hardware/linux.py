"""Cores and memory of a Linux machine, from /proc and /sys only (fast: well under 10 ms)."""

from __future__ import annotations

import re

from llmrun.hardware.cgroup import find_cpu_quota, find_memory_limits
from llmrun.hardware.features import read_linux_features, read_linux_name
from llmrun.hardware.machine import Cpu, Memory
from llmrun.hardware.sources import Probe, parse_fields
from llmrun.text import escape_line, format_bytes

# More than one processor's part of /proc/cpuinfo; the whole takes long to make on large machines.
_CPUINFO_BYTES = 16 << 10
_MAX_NAME = 200


def detect_cpu(probe: Probe) -> Cpu:
    """The cores within this process's affinity mask, and the cgroup quota."""
    n_logical = probe.n_logical() or 1
    allowed = probe.affinity() or frozenset(range(n_logical))
    cores = _group_by_core(probe, allowed)
    fast = _parse_cpu_list(probe.read("/sys/devices/cpu_core/cpus")) & allowed
    n_fast = len({cores[cpu] for cpu in fast})
    cpuinfo = probe.read("/proc/cpuinfo", _CPUINFO_BYTES) or ""
    return Cpu(
        n_logical=max(n_logical, len(allowed)),
        n_affinity=len(allowed),
        n_physical=len(set(cores.values())),
        quota=find_cpu_quota(probe),
        n_performance=n_fast if 0 < n_fast < len(set(cores.values())) else None,
        name=_read_name(probe, cpuinfo),
        features=read_linux_features(cpuinfo),
    )


def detect_memory(probe: Probe) -> Memory:
    """MemAvailable, or what the tightest cgroup leaves, whichever is less."""
    fields = read_meminfo(probe)
    total = fields.get("MemTotal", 0) * 1024
    if total:
        # Kernels before 3.14 have no MemAvailable.
        guess = sum(fields.get(name, 0) for name in ("MemFree", "Buffers", "Cached"))
        available = fields.get("MemAvailable", guess) * 1024
    else:
        host = probe.host_memory()
        if host is None:
            return Memory(0, 0, "unknown")
        total, available = host
    source = "system"
    for limit in find_memory_limits(probe):
        total = min(total, limit.limit_bytes)
        if limit.available_bytes < available:
            available, source = limit.available_bytes, f"cgroup {limit.path}"
    return Memory(total, min(available, total), source)


def read_meminfo(probe: Probe) -> dict[str, int]:
    """The fields of /proc/meminfo in KiB: of the host, also inside a container."""
    return parse_fields(probe.read("/proc/meminfo") or "", ":")


def is_wsl(probe: Probe) -> bool:
    """Whether this Linux is a guest of Windows (WSL)."""
    release = probe.read("/proc/sys/kernel/osrelease") or ""
    return re.search("microsoft|WSL", release, re.IGNORECASE) is not None


def is_container(probe: Probe) -> bool:
    return any(map(probe.exists, ("/.dockerenv", "/run/.containerenv")))


def describe_limits(probe: Probe, memory: Memory) -> tuple[str, ...]:
    """What about this system is unusual, in words."""
    notes = []
    if is_wsl(probe):
        notes.append("this is WSL: its RAM is what Windows lends it")
    host = read_meminfo(probe).get("MemTotal", 0) * 1024
    if memory.is_known and memory.total_bytes < host:
        notes.append(
            f"a limit gives this process {format_bytes(memory.total_bytes)} of the machine's "
            f"{format_bytes(host)}"
        )
    return tuple(notes)


def _read_name(probe: Probe, cpuinfo: str) -> str | None:
    name = read_linux_name(cpuinfo)
    if name is None:
        name = (probe.read("/sys/firmware/devicetree/base/model") or "").rstrip("\0\n") or None
    return None if name is None else escape_line(name)[:_MAX_NAME]


def _group_by_core(probe: Probe, cpus: frozenset[int]) -> dict[int, str]:
    """A name of the physical core for each hardware thread in `cpus`."""
    cores = {}
    for cpu in cpus:
        folder = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = probe.read(f"{folder}/thread_siblings_list")
        siblings = siblings or probe.read(f"{folder}/core_cpus_list")
        if not siblings:
            return _group_by_cpuinfo(probe, cpus)
        cores[cpu] = siblings.strip()
    return cores


def _group_by_cpuinfo(probe: Probe, cpus: frozenset[int]) -> dict[int, str]:
    """The same from /proc/cpuinfo, for systems that show no topology. A hardware thread without
    core numbers (ARM, some virtual machines) counts as a core."""
    cores = {cpu: f"cpu{cpu}" for cpu in cpus}
    for block in (probe.read("/proc/cpuinfo") or "").split("\n\n"):
        fields = parse_fields(block, ":")
        cpu = fields.get("processor")
        if cpu in cores and "core id" in fields:
            cores[cpu] = f"{fields.get('physical id', 0)}/{fields['core id']}"
    return cores


def _parse_cpu_list(text: str | None) -> frozenset[int]:
    """The kernel's list format: `0-3,8` is {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for part in (text or "").strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            cpus.update(range(int(first), min(int(last or first), 1 << 16) + 1))
    return frozenset(cpus)

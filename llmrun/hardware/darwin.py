"""Cores, memory and the Metal device of a Mac, from `sysctl` and `vm_stat`."""

from __future__ import annotations

import re

from llmrun.hardware.bandwidth import bandwidth_of
from llmrun.hardware.features import read_darwin_features
from llmrun.hardware.machine import Cpu, Device, Memory
from llmrun.hardware.sources import Probe, parse_fields

_TIMEOUT_S = 2.0
_NAMES = (
    "hw.memsize",
    "hw.logicalcpu",
    "hw.physicalcpu",
    "hw.perflevel0.physicalcpu",
    "iogpu.wired_limit_mb",
    "machdep.cpu.brand_string",
    "machdep.cpu.features",
    "machdep.cpu.leaf7_features",
    "hw.optional.arm64",
    "hw.optional.arm.FEAT_DotProd",
    "hw.optional.arm.FEAT_FP16",
    "hw.optional.arm.FEAT_I8MM",
    "hw.optional.arm.FEAT_SME",
    "sysctl.proc_translated",
)
GIB = 1 << 30


def read_sysctl(probe: Probe) -> dict[str, str]:
    """The values of `_NAMES` that this Mac knows; one process for all of them."""
    values = {}
    for line in (probe.run(("sysctl", *_NAMES), _TIMEOUT_S) or "").splitlines():
        name, found, value = line.partition(": ")
        if found:
            values[name.strip()] = value.strip()
    return values


def detect_cpu(probe: Probe, sysctl: dict[str, str]) -> Cpu:
    """All cores; on Apple silicon also how many of them are performance cores."""
    n_logical = _number(sysctl, "hw.logicalcpu") or probe.n_logical() or 1
    n_physical = _number(sysctl, "hw.physicalcpu") or probe.n_physical() or n_logical
    n_fast = _number(sysctl, "hw.perflevel0.physicalcpu")
    return Cpu(
        n_logical=n_logical,
        n_affinity=n_logical,
        n_physical=n_physical,
        n_performance=n_fast if n_fast and n_fast < n_physical else None,
        name=sysctl.get("machdep.cpu.brand_string"),
        features=read_darwin_features(sysctl),
    )


def detect_memory(probe: Probe, sysctl: dict[str, str]) -> Memory:
    """Free, speculative and inactive pages are available."""
    total = _number(sysctl, "hw.memsize")
    text = probe.run(("vm_stat",), _TIMEOUT_S) or ""
    page = re.search(r"page size of (\d+) bytes", text)
    if total and page:
        pages = parse_fields(text, ":")
        kinds = ("Pages free", "Pages speculative", "Pages inactive")
        available = sum(pages.get(kind, 0) for kind in kinds) * int(page[1])
        return Memory(total, min(available, total))
    host = probe.host_memory()
    return Memory(*host) if host else Memory(0, 0, "unknown")


def detect_metal(memory: Memory, sysctl: dict[str, str], arch: str) -> tuple[Device, ...]:
    """The GPU of Apple silicon. It may hold a part of RAM: what `iogpu.wired_limit_mb` says, or by
    default two thirds on machines up to 32 GB and three quarters above (10,922 MiB of 16 GB and
    21,845 of 32, but 27,648 of 36 are what llama.cpp logs there)."""
    total = memory.total_bytes
    if arch != "arm64" or not total:
        return ()
    wired = (_number(sysctl, "iogpu.wired_limit_mb") or 0) * (1 << 20)
    limit = wired or (total * 2 // 3 if total <= 32 * GIB else total * 3 // 4)
    limit = min(limit, total)
    chip = sysctl.get("machdep.cpu.brand_string", "Apple silicon")
    return (
        Device(
            name="MTL0",
            description=chip,
            kind="gpu",
            free_bytes=min(limit, memory.available_bytes),
            total_bytes=limit,
            shares_host_memory=True,
            backend="Metal",
            bandwidth_bytes_s=bandwidth_of(chip, total),
        ),
    )


def _number(sysctl: dict[str, str], name: str) -> int | None:
    value = sysctl.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None

"""GPUs that the machine has, by cheap means that create no driver context.

Whether the engine's build can use them is another question, which only the engine can answer.
"""

from __future__ import annotations

import re

from llmrun.hardware.machine import Device, Memory
from llmrun.hardware.sources import Probe, parse_int

_TIMEOUT_S = 5.0
_MIB = 1 << 20
_SMALL_VRAM = 4 << 30
_VENDORS = {"0x1002": "AMD", "0x8086": "Intel"}


def detect_nvidia(probe: Probe, memory: Memory) -> tuple[Device, ...]:
    """What nvidia-smi lists; empty without it. A GPU without memory of its own (GB10) tells no
    sizes there: it shares the RAM."""
    command = (
        "nvidia-smi",
        "--query-gpu=index,name,memory.total,memory.free",
        "--format=csv,noheader,nounits",
    )
    devices = []
    for line in (probe.run(command, _TIMEOUT_S) or "").splitlines():
        fields = [field.strip() for field in line.split(",")]
        # A failing driver prints a sentence on stdout.
        if len(fields) < 4 or parse_int(fields[0]) is None:
            continue
        total, free = parse_int(fields[-2]), parse_int(fields[-1])
        is_shared = total is None or free is None
        devices.append(
            Device(
                name=f"CUDA{fields[0]}",
                description=", ".join(fields[1:-2]),
                kind="gpu",
                free_bytes=memory.available_bytes if free is None else free * _MIB,
                total_bytes=memory.total_bytes if total is None else total * _MIB,
                shares_host_memory=is_shared,
            )
        )
    return tuple(devices)


def detect_drm(probe: Probe, memory: Memory) -> tuple[Device, ...]:
    """AMD and Intel GPUs under /sys/class/drm (Linux). NVIDIA's are left to nvidia-smi.

    amdgpu tells its memory in `mem_info_*`. A processor's own GPU has a small carve-out as VRAM and
    takes the rest from RAM through the GTT. Intel's drivers tell no sizes.
    """
    devices = []
    for card in probe.list_names("/sys/class/drm"):
        if not re.fullmatch(r"card\d+", card):
            continue
        folder = f"/sys/class/drm/{card}/device"
        vendor = _VENDORS.get((probe.read(f"{folder}/vendor") or "").strip())
        if vendor is None:
            continue
        sizes = {
            name: probe.read_int(f"{folder}/mem_info_{name}") or 0
            for name in ("vram_total", "vram_used", "gtt_total", "gtt_used")
        }
        total, free = sizes["vram_total"], sizes["vram_total"] - sizes["vram_used"]
        is_shared = total <= _SMALL_VRAM and total <= sizes["gtt_total"]
        if is_shared:
            total = sizes["gtt_total"]
            free = min(total - sizes["gtt_used"], memory.available_bytes)
        devices.append(
            Device(
                name=card,
                description=f"{vendor} GPU",
                kind="igpu" if is_shared else "gpu",
                free_bytes=max(0, free),
                total_bytes=total,
                shares_host_memory=is_shared,
            )
        )
    return tuple(devices)

"""From the engine's list of devices to what may be planned with: which ones llama.cpp will use,
which take their memory from RAM, and what is really free.

Everything here errs on the small side: a plan for memory that is not there ends in a crash.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from llmrun.hardware.bandwidth import bandwidth_of
from llmrun.hardware.devices import detect_drm, detect_nvidia
from llmrun.hardware.machine import Device, Machine, Memory
from llmrun.hardware.sources import Probe

# What the system itself needs when a GPU fills RAM that is counted as free.
_HOST_RESERVE = 2 << 30
# Backends see a card's memory a little differently.
_SAME_SIZE = 0.1

_SOFTWARE = re.compile(r"llvmpipe|lavapipe|swiftshader|basic render", re.IGNORECASE)
_SHARED_CUDA = re.compile(r"\b(GB10|Orin|Xavier|Thor|Tegra|Jetson)\b", re.IGNORECASE)
# Processors' own graphics. "AMD Radeon Graphics" without a number can be either.
_SHARED_NAMES = re.compile(
    r"Radeon(?:\(TM\))?\s+(?:[6-8][0-9]{2}M|80[2-6]0S|(?:RX\s+)?Vega\s+(?:3|6|7|8|10|11)\b)"
    r"|\bU?HD Graphics|\bIris|Arc(?:\(TM\))?\s+(?:1[34]0[TV]|Graphics)|Adreno|Mali|Immortalis",
    re.IGNORECASE,
)
_AMD = re.compile(r"\b(AMD|Radeon|Ryzen|gfx\d)", re.IGNORECASE)
_GENERIC_WORDS = frozenset(
    ("nvidia", "geforce", "amd", "radeon", "intel", "r", "tm", "graphics", "gpu", "family")
)


def settle_devices(
    listed: Sequence[Device], machine: Machine, probe: Probe
) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """The devices among `listed` that llama.cpp puts layers on when it is not told which, in its
    order, and notes about them in words."""
    notes: list[str] = []
    usable = [
        device
        for device in listed
        if device.kind in ("gpu", "igpu") and not _SOFTWARE.search(device.description)
    ]
    # llama.cpp's own rule: integrated GPUs only where there is no other.
    if any(device.kind == "gpu" for device in usable):
        notes += [
            f"{device.name} is integrated and not used beside another GPU"
            for device in usable
            if device.kind == "igpu"
        ]
        usable = [device for device in usable if device.kind == "gpu"]
    settled = []
    for device in _drop_twins(usable):
        device, note = _settle(device, machine, probe)
        settled.append(device)
        if note:
            notes.append(note)
    return tuple(settled), tuple(notes)


def _settle(device: Device, machine: Machine, probe: Probe) -> tuple[Device, str | None]:
    if not device.total_bytes:
        # Nothing can be planned on a device that tells no memory.
        return replace(device, free_bytes=0), f"{device.name} does not tell its memory: not used"
    memory = machine.memory
    card = _find_amd_card(device, memory, probe)
    note = None
    if _uses_ram(device, machine, card):
        carved = _carved_out(device, machine, card)
        if carved is None:
            device = _share(device, memory, card)
        else:
            device = replace(
                device,
                total_bytes=min(device.total_bytes, carved.total_bytes),
                free_bytes=min(device.free_bytes, carved.free_bytes),
            )
    else:
        device, note = _trust_less(device, memory, probe)
    device = replace(device, free_bytes=max(0, min(device.free_bytes, device.total_bytes)))
    ram = memory.total_bytes if device.shares_host_memory else device.total_bytes
    speed = bandwidth_of(device.description, ram)
    if speed is None and device.shares_host_memory and machine.cpu.name:
        speed = bandwidth_of(machine.cpu.name, ram)
    return replace(device, bandwidth_bytes_s=speed), note


def _uses_ram(device: Device, machine: Machine, card: Device | None) -> bool:
    if device.kind == "igpu":
        return True
    if device.backend == "Metal":
        return machine.arch == "arm64" or "Intel" in device.description
    if _SHARED_CUDA.search(device.description) or _SHARED_NAMES.search(device.description):
        return True
    # A card of 4 GB looks like a processor's GPU to the kernel's figures: only where the name is
    # none ("AMD Radeon Graphics") do they decide.
    is_named = any(not word.startswith("gfx") for word in _name_words(device.description))
    return not is_named and card is not None and card.shares_host_memory


def _carved_out(device: Device, machine: Machine, card: Device | None) -> Device | None:
    """The memory that the firmware took from RAM for a processor's own GPU, where this is most of
    what the GPU has: the system no longer counts it as RAM."""
    if card is not None and not card.shares_host_memory:
        return card
    if machine.platform == "win32" and device.total_bytes > machine.memory.total_bytes > 0:
        # Windows lends half of what it has left on top of the GPU's own.
        lent = machine.memory.total_bytes // 2
        return replace(
            device, total_bytes=device.total_bytes - lent, free_bytes=device.free_bytes - lent
        )
    return None


def _share(device: Device, memory: Memory, card: Device | None) -> Device:
    """A device in the RAM's pool."""
    free, total = device.free_bytes, device.total_bytes
    if card is not None:
        free = min(free, card.free_bytes)
    if memory.is_known:
        # Metal and CUDA refuse what the system cannot give. Graphics memory in RAM is handed out
        # until the system itself has none.
        is_careful = device.backend in ("Metal", "CUDA")
        free = min(free, memory.available_bytes - (0 if is_careful else _HOST_RESERVE))
        total = min(total, memory.total_bytes)
    return replace(device, free_bytes=max(0, free), total_bytes=total, shares_host_memory=True)


def _trust_less(device: Device, memory: Memory, probe: Probe) -> tuple[Device, str | None]:
    """A card whose memory is all free may just not know better: Vulkan without its budget
    extension says so. The driver's own tools are asked instead."""
    if device.backend != "Vulkan" or device.free_bytes != device.total_bytes:
        return device, None
    cards = _list_amd_cards(device, memory, probe) or detect_nvidia(probe, memory)
    # Which of several equal cards it is cannot be told here: the fullest.
    frees = [
        card.free_bytes
        for card in cards
        if _is_same_size(device, card) and not card.shares_host_memory
    ]
    if frees:
        return replace(device, free_bytes=min(device.free_bytes, *frees)), None
    return device, f"{device.name} does not tell how much of its memory other programs use"


def _find_amd_card(device: Device, memory: Memory, probe: Probe) -> Device | None:
    """The kernel's own figures of an AMD device: the card whose size is nearest."""
    cards = _list_amd_cards(device, memory, probe)
    return min(cards, key=lambda card: abs(card.total_bytes - device.total_bytes), default=None)


def _list_amd_cards(device: Device, memory: Memory, probe: Probe) -> list[Device]:
    """The AMD GPUs that the kernel knows, if `device` is one of AMD's."""
    if probe.platform != "linux" or not _AMD.search(device.description):
        return []
    cards = detect_drm(probe, memory)
    return [card for card in cards if card.description.startswith("AMD") and card.total_bytes]


def _drop_twins(devices: Sequence[Device]) -> list[Device]:
    """Each card once, as the first backend sees it: a build for CUDA and Vulkan lists it twice."""
    kept: list[Device] = []
    taken: set[tuple[str, str]] = set()
    for device in devices:
        for other in kept:
            pair = (other.name, device.backend)
            if other.backend != device.backend and pair not in taken and _is_twin(other, device):
                taken.add(pair)
                break
        else:
            kept.append(device)
    return kept


def _is_twin(one: Device, other: Device) -> bool:
    """Whether two backends mean the same card: as large, and named alike or not at all."""
    names = _name_words(one.description), _name_words(other.description)
    is_named_alike = not names[0] or not names[1] or names[0] <= names[1] or names[1] <= names[0]
    return is_named_alike and _is_same_size(one, other)


def _is_same_size(one: Device, other: Device) -> bool:
    larger = max(one.total_bytes, other.total_bytes)
    return abs(one.total_bytes - other.total_bytes) <= larger * _SAME_SIZE


def _name_words(description: str) -> frozenset[str]:
    """`AMD Radeon RX 7900 XTX (RADV NAVI31)` -> {rx, 7900, xtx}."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\([^)]*\)", " ", description.lower()))
    return frozenset(words) - _GENERIC_WORDS

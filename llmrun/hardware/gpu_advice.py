"""GPUs that are in the machine but not in the engine's list, and why.

What is there is learned from drivers and the kernel, never by opening a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmrun.hardware import linux
from llmrun.hardware.darwin import read_sysctl
from llmrun.hardware.devices import detect_drm, detect_nvidia
from llmrun.hardware.engine_devices import EngineReport, find_libraries
from llmrun.hardware.install import (
    SWITCHES,
    find_cuda_wheels,
    name_gfx_target,
    write_build_command,
    write_unset_command,
)
from llmrun.hardware.machine import Device, Machine
from llmrun.hardware.problem import Problem
from llmrun.hardware.sources import Probe, parse_fields
from llmrun.text import escape_line

_TIMEOUT_S = 5.0
_MAX_WORDS = 200
_OLDEST_CUDA = (11, 8)
_README = "“Faster builds” in llmrun's README"
_VENDOR_OF_BACKEND = {"CUDA": "NVIDIA", "ROCm": "AMD", "Metal": "Apple", "SYCL": "Intel"}
_VENDOR_NAMES = (
    ("NVIDIA", re.compile(r"nvidia|geforce|quadro|tesla", re.IGNORECASE)),
    ("AMD", re.compile(r"\bamd\b|radeon", re.IGNORECASE)),
    ("Intel", re.compile(r"intel|\barc\b", re.IGNORECASE)),
    ("Apple", re.compile(r"apple", re.IGNORECASE)),
)


@dataclass(frozen=True, slots=True)
class _Case:
    """All that the checks look at. `vendors` are those whose GPUs the engine can use, `libraries`
    the installed build's."""

    machine: Machine
    probe: Probe
    vendors: frozenset[str]
    libraries: frozenset[str]
    engine_problem: str | None


def find_gpu_problems(machine: Machine, probe: Probe, report: EngineReport) -> Iterator[Problem]:
    """What keeps the engine from a GPU of this machine, with the command for this platform."""
    libraries = find_libraries(probe)
    if libraries is None:
        # Nothing can be used without the binding: one problem is enough.
        return
    gpus = [device for device in report.devices if device.kind in ("gpu", "igpu")]
    vendors = frozenset(vendor for gpu in gpus if (vendor := _vendor_of(gpu)))
    case = _Case(machine, probe, vendors, libraries, report.problem)
    if probe.platform == "darwin":
        yield from _check_apple(case)
        return
    if "NVIDIA" not in vendors:
        yield from _check_nvidia(case)
    if probe.platform == "linux":
        cards = detect_drm(probe, machine.memory)
        if "AMD" not in vendors:
            yield from _check_amd(case, cards)
        if "Intel" not in vendors:
            yield from _check_intel(case, cards)


def _check_nvidia(case: _Case) -> Iterator[Problem]:
    probe, platform = case.probe, case.machine.platform
    cards = detect_nvidia(probe, case.machine.memory)
    greeting = probe.run(("nvidia-smi",), _TIMEOUT_S)
    if not cards:
        yield from _check_nvidia_driver(case, greeting)
        return
    name = _show(cards[0].description)
    if len(cards) > 1:
        name += f" (and {len(cards) - 1} more)"
    driver, cuda = _read_versions(greeting or "")
    command = write_build_command(platform, SWITCHES["cuda"])
    if cuda is not None and cuda < _OLDEST_CUDA:
        yield Problem(
            f"the driver of {name} is too old",
            f"it is for CUDA {_dotted(cuda)}; builds of llama.cpp need {_dotted(_OLDEST_CUDA)}",
            "install a newer NVIDIA driver, then look again: llmrun doctor",
        )
    elif probe.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        yield Problem(
            f"{name} is hidden from llmrun",
            "CUDA_VISIBLE_DEVICES is set to nothing",
            write_unset_command(platform, "CUDA_VISIBLE_DEVICES"),
        )
    elif "cuda" in case.libraries:
        supported = f"the driver{driver} supports CUDA up to {_dotted(cuda)}; " if cuda else ""
        yield Problem(
            f"{name} is there, but the CUDA build of llama.cpp does not see it",
            f"{supported}a build for a newer CUDA, or for other GPUs, cannot use it",
            command,
        )
    else:
        why = "llama-cpp-python was built without CUDA"
        wheels = find_cuda_wheels(cuda, case.machine.arch) if cuda else None
        if probe.run(("nvcc", "--version"), _TIMEOUT_S) is None:
            why += "; building it with CUDA needs NVIDIA's CUDA toolkit, which is not on the PATH"
        if wheels and platform in ("linux", "win32"):
            why += f"; ready-made builds for this driver: index {wheels}, see {_README}"
        yield Problem(
            f"{name} is there, but this build of llama.cpp cannot use it",
            why,
            command,
        )


def _check_nvidia_driver(case: _Case, greeting: str | None) -> Iterator[Problem]:
    if greeting and ("NVIDIA" in greeting or "NVML" in greeting):
        first = next((line.strip() for line in greeting.splitlines() if line.strip()), "")
        if "No devices were found" in greeting:
            return
        mismatch = "mismatch" in greeting
        yield Problem(
            "the NVIDIA driver does not work",
            f"nvidia-smi says: {_show(first)}",
            "restart the machine: the driver was updated while it ran"
            if mismatch
            else "install the NVIDIA driver again, then restart the machine",
        )
    elif greeting is None and _has_nvidia_on_the_bus(case.probe):
        is_container = linux.is_container(case.probe)
        yield Problem(
            "there is an NVIDIA GPU without its driver",
            "this container was started without GPUs"
            if is_container
            else "nvidia-smi, which comes with the driver, does not run",
            "start the container with: --gpus all"
            if is_container
            else "install NVIDIA's driver for this system, then look again: llmrun doctor",
        )


def _check_amd(case: _Case, cards: tuple[Device, ...]) -> Iterator[Problem]:
    mine = [card for card in cards if card.description.startswith("AMD")]
    if not mine:
        return
    is_small = all(card.kind == "igpu" for card in mine)
    what = "the AMD processor's own GPU" if is_small else "an AMD GPU"
    built = case.libraries & {"hip", "vulkan"}
    if built:
        yield from _check_access(case, what, has_hip="hip" in built)
        return
    probe = case.probe
    if probe.exists("/opt/rocm"):
        targets = ";".join(_find_gfx_targets(probe))
        switches = SWITCHES["hip"] + (f" -DAMDGPU_TARGETS={targets}" if targets else "")
        why = "llama-cpp-python was built without ROCm and without Vulkan"
    else:
        switches = SWITCHES["vulkan"]
        why = "llama-cpp-python was built without Vulkan; building it needs Vulkan's headers and "
        why += f"glslc; ready-made builds: index vulkan, see {_README}"
    yield Problem(
        f"{what} is there, but this build of llama.cpp cannot use it",
        why,
        write_build_command(case.machine.platform, switches),
        severity="advice" if is_small else "problem",
    )


def _check_intel(case: _Case, cards: tuple[Device, ...]) -> Iterator[Problem]:
    """Cards only: a processor's own Intel GPU seldom beats the processor."""
    mine = [card for card in cards if card.description.startswith("Intel")]
    if not any(_is_on_a_slot(case.probe, card.name) for card in mine):
        return
    built = case.libraries & {"sycl", "vulkan"}
    if built:
        yield from _check_access(case, "an Intel GPU", has_hip=False)
        return
    has_oneapi = case.probe.exists("/opt/intel/oneapi")
    yield Problem(
        "an Intel GPU is there, but this build of llama.cpp cannot use it",
        "llama-cpp-python was built without SYCL and without Vulkan"
        + ("" if has_oneapi else "; building it needs Vulkan's headers and glslc"),
        write_build_command(case.machine.platform, SWITCHES["sycl" if has_oneapi else "vulkan"]),
    )


def _check_access(case: _Case, what: str, *, has_hip: bool) -> Iterator[Problem]:
    """A build that could use the GPU lists none: mostly the user may not open it."""
    probe = case.probe
    nodes = [f"/dev/dri/{name}" for name in probe.list_names("/dev/dri") if "renderD" in name]
    if has_hip:
        nodes.append("/dev/kfd")
    closed = [node for node in nodes if probe.exists(node) and not probe.may_write(node)]
    if closed:
        yield Problem(
            f"{what} is there, but this user may not use it",
            f"{closed[0]} cannot be opened",
            'sudo usermod -aG render,video "$USER", then log in again',
        )
    elif case.engine_problem is None:
        yield Problem(
            f"{what} is there, but llama.cpp does not see it",
            "its driver for " + ("ROCm" if has_hip else "Vulkan") + " is missing or too old",
            "install the driver of your system (Mesa's Vulkan driver: mesa-vulkan-drivers), then "
            "look again: llmrun doctor",
        )


def _check_apple(case: _Case) -> Iterator[Problem]:
    sysctl = read_sysctl(case.probe)
    is_silicon = case.probe.arch == "arm64" or sysctl.get("hw.optional.arm64") == "1"
    if not is_silicon:
        return
    if case.probe.arch != "arm64":
        yield Problem(
            "this Python runs in Rosetta, as on an Intel Mac",
            "it cannot use the GPU, and computes several times slower on the CPU",
            "install a Python for Apple silicon and llmrun into it, for example: "
            "brew install python@3.12",
        )
    elif "metal" not in case.libraries and "Apple" not in case.vendors:
        yield Problem(
            "this build of llama.cpp cannot use the Mac's GPU",
            "llama-cpp-python was built without Metal",
            write_build_command("darwin", SWITCHES["metal"]),
        )


def _vendor_of(device: Device) -> str | None:
    if vendor := _VENDOR_OF_BACKEND.get(device.backend):
        return vendor
    return next((name for name, words in _VENDOR_NAMES if words.search(device.description)), None)


def _read_versions(greeting: str) -> tuple[str, tuple[int, int] | None]:
    """nvidia-smi's header: ` 550.54.14` (or nothing) and the newest CUDA that the driver runs."""
    driver = re.search(r"Driver Version\s*:\s*([\d.]{1,20})", greeting)
    cuda = re.search(r"CUDA\b[^:|\n]{0,20}Version\s*:\s*(\d{1,3})\.(\d{1,3})", greeting)
    version = (int(cuda[1]), int(cuda[2])) if cuda else None
    return (f" {driver[1]}" if driver else ""), version


def _has_nvidia_on_the_bus(probe: Probe) -> bool:
    for slot in probe.list_names("/sys/bus/pci/devices"):
        folder = f"/sys/bus/pci/devices/{slot}"
        is_nvidia = (probe.read(f"{folder}/vendor") or "").strip() == "0x10de"
        # PCI class 03: display controllers. A card has a sound device too.
        if is_nvidia and (probe.read(f"{folder}/class") or "").startswith("0x03"):
            return True
    return False


def _is_on_a_slot(probe: Probe, card: str) -> bool:
    """Intel's own graphics of a processor is always device 02.0 of the first bus."""
    slot = re.search(
        r"PCI_SLOT_NAME=(\S+)", probe.read(f"/sys/class/drm/{card}/device/uevent") or ""
    )
    return slot is not None and not slot[1].endswith(":00:02.0")


def _find_gfx_targets(probe: Probe) -> list[str]:
    folder = "/sys/class/kfd/kfd/topology/nodes"
    targets = set()
    for node in probe.list_names(folder):
        fields = parse_fields(probe.read(f"{folder}/{node}/properties") or "", " ")
        if target := name_gfx_target(fields.get("gfx_target_version", 0)):
            targets.add(target)
    return sorted(targets)


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def _show(text: str) -> str:
    return escape_line(text)[:_MAX_WORDS]

"""Look at this machine: `detect_machine` for cores and RAM (fast), `detect_devices` for GPUs."""

from __future__ import annotations

from llmrun.hardware import darwin, devices, generic, linux
from llmrun.hardware.machine import Device, Machine
from llmrun.hardware.sources import Probe

__all__ = ["Probe", "detect_devices", "detect_machine"]


def detect_machine(probe: Probe | None = None) -> Machine:
    """Cores and memory as this process may use them. Never fails: what cannot be read is one core,
    or memory of 0 bytes with the source "unknown".

    `devices` holds what costs nothing to find (the GPU of Apple silicon) and is else empty.
    """
    probe = probe or Probe()
    if probe.platform == "linux":
        return Machine(
            cpu=linux.detect_cpu(probe),
            memory=linux.detect_memory(probe),
            platform=probe.platform,
            arch=probe.arch,
        )
    if probe.platform == "darwin":
        sysctl = darwin.read_sysctl(probe)
        memory = darwin.detect_memory(probe, sysctl)
        return Machine(
            cpu=darwin.detect_cpu(probe, sysctl),
            memory=memory,
            devices=darwin.detect_metal(memory, sysctl, probe.arch),
            platform=probe.platform,
            arch=probe.arch,
            name=sysctl.get("machdep.cpu.brand_string"),
        )
    return Machine(
        cpu=generic.detect_cpu(probe),
        memory=generic.detect_memory(probe),
        platform=probe.platform,
        arch=probe.arch,
    )


def detect_devices(machine: Machine, probe: Probe | None = None) -> tuple[Device, ...]:
    """GPUs that the machine has, whether or not the engine's build can use them.

    Starts processes of the drivers, each with a time limit: up to seconds on a sick driver.
    """
    probe = probe or Probe()
    found = machine.devices + devices.detect_nvidia(probe, machine.memory)
    if probe.platform == "linux":
        found += devices.detect_drm(probe, machine.memory)
    return found

"""Look at this machine: `detect_machine` for cores and RAM (fast) and, when asked, the GPUs that
the engine can use; `detect_devices` for GPUs that are there, whether or not it can use them."""

from __future__ import annotations

from dataclasses import replace

from llmrun.hardware.engine_devices import (
    EngineReport,
    ask_engine,
    find_libraries,
    has_gpu_library,
)
from llmrun.hardware.machine import Device, Machine
from llmrun.hardware.sources import Probe

__all__ = ["Probe", "add_engine_devices", "detect_devices", "detect_machine"]


def detect_machine(probe: Probe | None = None, *, devices: bool = False) -> Machine:
    """Cores and memory as this process may use them, in milliseconds. Never fails: what cannot be
    read is one core, or memory of 0 bytes with the source "unknown".

    With `devices` the engine is asked for the GPUs that it can use: a process start where its build
    has a GPU library, nothing where it has none. When that goes wrong there are none, and a note
    says why. Without `devices` only what costs nothing to find is there (Apple silicon's GPU).
    """
    probe = probe or Probe()
    machine = _detect_host(probe)
    if devices:
        return add_engine_devices(machine, ask_engine(probe), probe)
    if machine.devices:
        libraries = find_libraries(probe)
        if libraries is not None and not has_gpu_library(libraries):
            return machine.with_devices(())
    return machine


def add_engine_devices(machine: Machine, report: EngineReport, probe: Probe) -> Machine:
    """`machine` with the devices of an engine's report and notes about them."""
    found: tuple[Device, ...] = ()
    notes: tuple[str, ...] = ()
    if report.devices:
        # Loaded only where it is needed, as every start waits for it.
        from llmrun.hardware.sharing import settle_devices

        found, notes = settle_devices(report.devices, machine, probe)
    problem = () if report.problem is None else (report.problem,)
    return replace(machine, devices=found, notes=machine.notes + problem + notes)


def detect_devices(machine: Machine, probe: Probe | None = None) -> tuple[Device, ...]:
    """GPUs that the machine has, whether or not the engine's build can use them.

    Starts processes of the drivers, each with a time limit: up to seconds on a sick driver.
    """
    from llmrun.hardware import devices

    probe = probe or Probe()
    if probe.platform == "darwin":
        from llmrun.hardware import darwin

        return darwin.detect_metal(machine.memory, darwin.read_sysctl(probe), probe.arch)
    found = devices.detect_nvidia(probe, machine.memory)
    if probe.platform == "linux":
        found += devices.detect_drm(probe, machine.memory)
    return found


def _detect_host(probe: Probe) -> Machine:
    if probe.platform == "linux":
        from llmrun.hardware import linux

        memory = linux.detect_memory(probe)
        return Machine(
            cpu=linux.detect_cpu(probe),
            memory=memory,
            platform=probe.platform,
            arch=probe.arch,
            notes=linux.describe_limits(probe, memory),
        )
    if probe.platform == "darwin":
        from llmrun.hardware import darwin

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
    from llmrun.hardware import generic

    return Machine(
        cpu=generic.detect_cpu(probe),
        memory=generic.detect_memory(probe),
        platform=probe.platform,
        arch=probe.arch,
    )

"""What is wrong or wasted on this machine, why, and the command that mends it: for `doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llmrun.hardware import linux
from llmrun.hardware.engine_devices import EngineReport, ask_engine, find_libraries
from llmrun.hardware.gpu_advice import find_gpu_problems
from llmrun.hardware.install import SWITCHES, write_build_command, write_unset_command
from llmrun.hardware.machine import Machine
from llmrun.hardware.problem import Problem
from llmrun.hardware.sources import Probe
from llmrun.text import escape_line, format_bytes

__all__ = ["Problem", "find_problems"]

_MAX_WORDS = 200


def find_problems(
    machine: Machine, probe: Probe | None = None, *, engine: EngineReport | None = None
) -> tuple[Problem, ...]:
    """Everything that is worth telling, the worst first. Never raises.

    Starts processes of drivers and, without `engine` (from `ask_engine(probe, always=True)`), the
    child that asks the engine: up to some seconds.
    """
    probe = probe or Probe()
    report = engine or ask_engine(probe, always=True)
    problems = [
        *_check_binding(machine, probe, report),
        *find_gpu_problems(machine, probe, report),
        *_check_simd(machine, probe, report),
        *_check_memory(machine, probe),
        *_check_environment(probe),
    ]
    return tuple(sorted(problems, key=lambda problem: problem.severity == "advice"))


def _check_binding(machine: Machine, probe: Probe, report: EngineReport) -> Iterator[Problem]:
    if report.problem is None:
        return
    libraries = find_libraries(probe)
    if libraries is None:
        yield Problem(
            "llama-cpp-python is not installed",
            "it is the engine that computes",
            write_build_command(machine.platform),
        )
    else:
        yield Problem(
            "the engine's library does not work here",
            report.problem,
            write_build_command(machine.platform, _switches_of(libraries)),
        )


def _check_simd(machine: Machine, probe: Probe, report: EngineReport) -> Iterator[Problem]:
    """A build that leaves out what this processor can do is several times slower on it."""
    feature = "DOTPROD" if machine.arch in ("arm64", "aarch64") else "AVX2"
    if "CPU" not in report.backends or feature not in machine.cpu.features:
        return
    if feature in report.features:
        return
    has_epoch = "SOURCE_DATE_EPOCH" in probe.environ
    libraries = find_libraries(probe) or frozenset()
    why = f"it was built without {feature}, which this processor has"
    if feature == "AVX2":
        why += " (so a build comes out when SOURCE_DATE_EPOCH is set"
        why += ", as it is here)" if has_epoch else ")"
    yield Problem(
        "this build of llama.cpp is several times slower on the CPU than it could be",
        why,
        write_build_command(
            machine.platform,
            f"{_switches_of(libraries)} -DGGML_NATIVE=on".strip(),
            without_epoch=has_epoch,
        ),
    )


def _check_memory(machine: Machine, probe: Probe) -> Iterator[Problem]:
    memory = machine.memory
    if not memory.is_known:
        yield Problem(
            "the size of this machine's memory cannot be read",
            "nothing can be said about what fits",
            "pip install --upgrade psutil",
        )
        return
    if probe.platform != "linux":
        return
    fields = linux.read_meminfo(probe)
    host = fields.get("MemTotal", 0) * 1024
    if linux.is_wsl(probe):
        yield Problem(
            f"WSL has {format_bytes(memory.total_bytes)} of RAM",
            "Windows lends it half of the PC's RAM unless told otherwise",
            "in Windows, write memory=… under [wsl2] in %UserProfile%\\.wslconfig, then run: "
            "wsl --shutdown",
            severity="advice",
        )
    if memory.total_bytes * 2 <= host:
        hint = "raise the limit: MemoryMax= of the systemd unit, or the memory limit of the job"
        if linux.is_container(probe):
            hint = f"docker update --memory {max(1, host // 2 >> 30)}g --memory-swap -1 CONTAINER"
        yield Problem(
            f"a limit gives this process {format_bytes(memory.total_bytes)} of the machine's "
            f"{format_bytes(host)}",
            "models are fitted into the limit: beyond it the kernel ends the process",
            hint,
            severity="advice",
        )
    swapped = (fields.get("SwapTotal", 0) - fields.get("SwapFree", 0)) * 1024
    # Old pages in swap are normal; they tell of a shortage only where little is available too.
    if swapped > memory.total_bytes // 10 and memory.available_bytes < memory.total_bytes // 5:
        yield Problem(
            f"memory is short: {format_bytes(swapped)} of programs are swapped out",
            f"only {format_bytes(memory.available_bytes)} of "
            f"{format_bytes(memory.total_bytes)} are available",
            "close programs that are large, then look again: llmrun doctor",
            severity="advice",
        )


def _check_environment(probe: Probe) -> Iterator[Problem]:
    environ = probe.environ
    if (folder := environ.get("LLAMA_CACHE")) and Path(folder) != _hub_cache(probe):
        yield Problem(
            f"LLAMA_CACHE is set: {_show(folder)}",
            "llama.cpp's own tools keep models there and not in the hub's cache, which llmrun and "
            "others share: a model that both use is stored twice",
            write_unset_command(probe.platform, "LLAMA_CACHE"),
            severity="advice",
        )
    if folder := environ.get("LLAMA_CPP_LIB_PATH"):
        yield Problem(
            f"LLAMA_CPP_LIB_PATH is set: {_show(folder)}",
            "the engine takes its library from there; one of another version than the binding "
            "crashes or computes wrongly",
            write_unset_command(probe.platform, "LLAMA_CPP_LIB_PATH"),
            severity="advice",
        )


def _hub_cache(probe: Probe) -> Path:
    """Where the hub's shared cache is, by the variables that llama.cpp reads too."""
    environ = probe.environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := environ.get(name):
            return Path(value)
    if value := environ.get("HF_HOME"):
        return Path(value) / "hub"
    cache = environ.get("XDG_CACHE_HOME")
    home = Path(cache) if cache else Path(environ.get("HOME", "~")) / ".cache"
    return home / "huggingface" / "hub"


def _switches_of(libraries: frozenset[str]) -> str:
    """What the installed build was made with, as far as its libraries tell."""
    return " ".join(SWITCHES[name] for name in sorted(libraries & set(SWITCHES)))


def _show(value: str) -> str:
    return escape_line(value)[:_MAX_WORDS]

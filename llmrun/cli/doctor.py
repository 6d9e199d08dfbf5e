"""`llmrun doctor`: what hardware and build llmrun sees, what is wrong, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmrun.cli.options import Invocation, Outcome, register
from llmrun.errors import LlmrunError
from llmrun.ui.output import Failed, Output

if TYPE_CHECKING:
    import typer

Status = Literal["ok", "warn", "fail"]

_MARKS = {"ok": "✓ ok", "warn": "! warn", "fail": "✗ fail"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `hint` is the command that mends it, null when all is well."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class CpuData:
    """`threads` is how many llmrun computes with, of `cores` physical cores in reach."""

    name: str | None
    logical: int
    usable: int
    cores: int
    quota: float | None
    threads: int
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MemoryData:
    """Bytes of RAM; `source` says what set `available`. 0: not known."""

    total: int
    available: int
    source: str


@dataclass(frozen=True, slots=True)
class DeviceData:
    """A GPU that the engine can use. Bytes; `shared`: its memory is a part of the RAM."""

    name: str
    description: str
    backend: str
    free: int
    total: int
    shared: bool


@dataclass(frozen=True, slots=True)
class MachineData:
    name: str | None
    platform: str
    arch: str
    cpu: CpuData
    memory: MemoryData
    devices: tuple[DeviceData, ...]


@dataclass(frozen=True, slots=True)
class BuildData:
    """`binding` is llama-cpp-python's version, `llama_cpp` the library's own word for its build.
    `backends` and `features` are the library's; empty when it could not be asked."""

    llmrun: str
    python: str
    binding: str | None
    llama_cpp: str | None
    backends: tuple[str, ...]
    features: tuple[str, ...]
    path: str | None


@dataclass(frozen=True, slots=True)
class DoctorResult:
    """`machine` is null when looking at it failed, which is then a failed check."""

    checks: tuple[Check, ...]
    machine: MachineData | None
    build: BuildData

    def show(self, output: Output) -> None:
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            first, *rest = check.detail.split("\n")
            output.line(f"{_MARKS[check.status]:<6}  {check.name:<{width}}  {first}")
            gap = " " * (6 + 2 + width + 2)
            for line in rest:
                output.line(gap + line)
            if check.hint is not None:
                output.line(f"{gap}try: {check.hint}")
        n_warn = sum(check.status == "warn" for check in self.checks)
        n_fail = sum(check.status == "fail" for check in self.checks)
        if not n_warn and not n_fail:
            output.note("nothing is wrong")
        elif not n_fail:
            output.note(f"{n_warn} warning{'s' * (n_warn > 1)}, nothing failed")


def doctor(invocation: Invocation) -> Outcome:
    """Look for problems, and say what mends them.

    Of the machine, the engine's build, the folders and the hub.
    """
    from llmrun.cli.checks import examine

    result = examine(invocation)
    failed = [check for check in result.checks if check.status == "fail"]
    if not failed:
        return result
    names = ", ".join(check.name for check in failed)
    error = LlmrunError(
        f"{len(failed)} check{'s' * (len(failed) > 1)} failed: {names}", hint=failed[0].hint
    )
    return Failed(result, (error,))


def add_to(app: typer.Typer) -> None:
    register(app, "doctor", doctor, reads_config=False)

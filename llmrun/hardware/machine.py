"""What a machine has, as plain values. No I/O here: see `probe.detect_machine`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

DeviceKind = Literal["cpu", "gpu", "igpu", "accel"]


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processor cores, as this process may use them.

    n_logical: hardware threads of the machine. n_affinity: those this process may run on.
    n_physical: cores behind these (a core with two hardware threads counts once).
    n_performance: the fast ones among the n_physical, None where all are alike.
    quota: the container's limit in cores (1.5 is one and a half), None without one.
    name: the maker's words. features: instruction sets that matter to ggml, as it spells them
    ("AVX2", "AVX512", "NEON", …); empty when not known.
    """

    n_logical: int
    n_affinity: int
    n_physical: int
    quota: float | None = None
    n_performance: int | None = None
    name: str | None = None
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM that this process can have.

    `total_bytes` is the machine's RAM or the smallest limit on this process, whichever is less;
    `available_bytes` can be had now without pushing other programs out. `limit_source` names what
    `available_bytes` comes from: "system", "cgroup <path>", or "unknown", where both are 0.
    `bandwidth_bytes_s` is how fast it is read by all cores; None when it was not measured.
    """

    total_bytes: int
    available_bytes: int
    limit_source: str = "system"
    bandwidth_bytes_s: float | None = None

    @property
    def is_known(self) -> bool:
        return self.total_bytes > 0


@dataclass(frozen=True, slots=True)
class Device:
    """A processor that can hold model layers.

    With `shares_host_memory` its memory is a part of the RAM of `Machine.memory`, not more of it.
    A device whose driver does not tell its memory has 0 for both sizes and can be given nothing.
    `name` is ggml's name of it where the engine can use it ("CUDA0", "MTL0"), `backend` the
    engine's library for it ("CUDA", "ROCm", "Metal", "Vulkan", "SYCL"; "" when not known).
    """

    name: str
    description: str
    kind: DeviceKind
    free_bytes: int
    total_bytes: int
    shares_host_memory: bool = False
    backend: str = ""
    bandwidth_bytes_s: float | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as the planner sees it. `devices` are those that the engine can use beside the CPU;
    empty means that none is known. `platform` is `sys.platform`'s word, `arch` the processor's.
    `notes` are sentences without a full stop about what is unusual here."""

    cpu: Cpu
    memory: Memory
    devices: tuple[Device, ...] = ()
    platform: str = "linux"
    arch: str = "x86_64"
    name: str | None = None
    notes: tuple[str, ...] = ()

    def with_devices(self, devices: tuple[Device, ...]) -> Machine:
        return replace(self, devices=devices)

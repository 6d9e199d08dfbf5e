"""The memories of a machine that a model can be put into. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrun.fit.types import GIB
from llmrun.hardware.machine import Device, Machine

# Kept free for what no estimate sees: other programs in RAM, the driver's context on a GPU.
_HOST_MARGIN_SHARE = 10
_HOST_MARGIN_MAX = GIB
_GPU_MARGIN = GIB
HOST = "RAM"


@dataclass(frozen=True, slots=True)
class Pool:
    """One memory to plan with. `place` is the device's number in the engine's order of GPUs.
    `reserved_bytes` are for what a plan is known to underestimate there."""

    device: str
    place: int
    total_bytes: int
    free_bytes: int
    margin_bytes: int
    bandwidth_bytes_s: float | None = None
    reserved_bytes: int = 0

    @property
    def limit_bytes(self) -> int:
        """What may be used."""
        return max(0, self.free_bytes - self.margin_bytes)

    @property
    def budget_bytes(self) -> int:
        """What may be planned with."""
        return max(0, self.limit_bytes - self.reserved_bytes)


@dataclass(frozen=True, slots=True)
class Pools:
    """Memory to plan with: the RAM, and the GPUs that can be given layers, in the engine's order.

    `is_unified`: the only GPU uses the RAM, and its pool only bounds its part of that.
    `n_engine_gpus` counts all GPUs that the engine would deal layers to. `is_known` False: the RAM
    could not be read, and nothing is refused for it. `blind` are the GPUs that tell no memory.
    """

    host: Pool
    gpus: tuple[Pool, ...] = ()
    is_unified: bool = False
    n_engine_gpus: int = 0
    is_known: bool = True
    blind: tuple[str, ...] = ()

    @classmethod
    def of(cls, machine: Machine) -> Pools:
        memory = machine.memory
        free = max(0, memory.available_bytes)
        host = Pool(
            HOST,
            -1,
            memory.total_bytes,
            free,
            min(free // _HOST_MARGIN_SHARE, _HOST_MARGIN_MAX),
        )
        engine = list_engine_gpus(machine)
        seeing = [(place, gpu) for place, gpu in enumerate(engine) if gpu.total_bytes > 0]
        own = [(place, gpu) for place, gpu in seeing if not gpu.shares_host_memory]
        shared = [(place, gpu) for place, gpu in seeing if gpu.shares_host_memory]
        # A GPU inside the processor is not worth splitting layers with a card, nor is a second one.
        used = own or [max(shared, key=lambda item: item[1].free_bytes)] if seeing else []
        return cls(
            host=host,
            gpus=tuple(_gpu_pool(place, gpu) for place, gpu in used),
            is_unified=bool(used) and not own,
            n_engine_gpus=len(engine),
            is_known=memory.is_known,
            blind=tuple(gpu.name for gpu in engine if gpu.total_bytes <= 0),
        )

    @property
    def has_gpu(self) -> bool:
        return bool(self.gpus)

    @property
    def gpu_names(self) -> str:
        return join_names([pool.device for pool in self.gpus])

    @property
    def budget_bytes(self) -> int:
        return sum(pool.limit_bytes for pool in self._separate)

    @property
    def available_bytes(self) -> int:
        return sum(pool.free_bytes for pool in self._separate)

    @property
    def _separate(self) -> tuple[Pool, ...]:
        return (self.host,) if self.is_unified else (self.host, *self.gpus)

    def without_margin(self) -> Pools:
        return replace(
            self,
            host=replace(self.host, margin_bytes=0),
            gpus=tuple(replace(pool, margin_bytes=0) for pool in self.gpus),
        )

    def reserve(self, device: str, n_bytes: int) -> Pools:
        """The same with `n_bytes` less to plan with on `device`; unified memory is one device."""

        def less(pool: Pool) -> Pool:
            if pool.device != device and not self.is_unified:
                return pool
            return replace(pool, reserved_bytes=pool.reserved_bytes + n_bytes)

        return replace(self, host=less(self.host), gpus=tuple(less(pool) for pool in self.gpus))


def list_engine_gpus(machine: Machine) -> tuple[Device, ...]:
    """The GPUs that llama.cpp deals layers to, in its order: those inside the processor only where
    there is no other."""
    cards = tuple(device for device in machine.devices if device.kind == "gpu")
    return cards or tuple(device for device in machine.devices if device.kind == "igpu")


def _gpu_pool(place: int, gpu: Device) -> Pool:
    free = max(0, min(gpu.free_bytes, gpu.total_bytes))
    # Unified memory has its margin in the RAM's budget.
    margin = 0 if gpu.shares_host_memory else _GPU_MARGIN
    return Pool(gpu.name, place, gpu.total_bytes, free, margin, gpu.bandwidth_bytes_s)


def join_names(names: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B and C`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

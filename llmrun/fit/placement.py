"""Which memory holds which part of a model. Pure.

Layers go to the GPU from the back, the output first, as llama.cpp does it. Several GPUs count as
one pool: llama.cpp splits the layers by their free memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmrun.fit.types import GIB, Estimate, GpuLayers
from llmrun.hardware.machine import Machine

# Kept free for what no estimate sees: other programs in RAM, the driver's context on a GPU.
_HOST_MARGIN_SHARE = 10
_HOST_MARGIN_MAX = GIB
_GPU_MARGIN = GIB


@dataclass(frozen=True, slots=True)
class Share:
    """What one memory pool would hold, and what it can take."""

    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    budget_bytes: int
    total_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.overhead_bytes

    @property
    def missing_bytes(self) -> int:
        """By how much the share is over the budget; negative when there is room."""
        return self.used_bytes - self.budget_bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """The shares of an estimate; `n_gpu_layers` as the engine wants it (-1: all).

    `fits`: every share is within its budget, or budgets are not known. `slack_bytes` is what is
    left of the RAM's budget. `estimate` has a duplicated output tensor added where the placement
    causes one.
    """

    estimate: Estimate
    n_gpu_layers: int
    shares: tuple[Share, ...]
    fits: bool
    slack_bytes: int
    reasons: tuple[str, ...] = ()

    @property
    def worst(self) -> Share | None:
        """The share that lacks most, None when none lacks anything."""
        lacking = [share for share in self.shares if share.missing_bytes > 0]
        return max(lacking, key=lambda share: share.missing_bytes, default=None)


@dataclass(frozen=True, slots=True)
class Pools:
    """Memory to plan with. `host_budget` is what RAM can give; `gpu_budget` what the GPUs' own
    memory can; `shared_budget`, for a GPU that uses the RAM, bounds its part of `host_budget`.
    All 0 with `is_known` False when memory could not be read."""

    host_total: int
    host_free: int
    host_budget: int
    gpu_name: str
    gpu_total: int
    gpu_free: int
    gpu_budget: int
    shared_budget: int
    is_known: bool

    @classmethod
    def of(cls, machine: Machine) -> Pools:
        memory = machine.memory
        margin = min(memory.available_bytes // _HOST_MARGIN_SHARE, _HOST_MARGIN_MAX)
        gpus = [gpu for gpu in machine.devices if gpu.total_bytes and gpu.kind in ("gpu", "igpu")]
        own = [gpu for gpu in gpus if not gpu.shares_host_memory]
        shared = [gpu for gpu in gpus if gpu.shares_host_memory]
        # An integrated GPU beside a real one is not worth splitting layers with.
        used = own or shared
        return cls(
            host_total=memory.total_bytes,
            host_free=memory.available_bytes,
            host_budget=memory.available_bytes - margin,
            gpu_name=" + ".join(gpu.name for gpu in used),
            gpu_total=sum(gpu.total_bytes for gpu in own),
            gpu_free=sum(gpu.free_bytes for gpu in own),
            gpu_budget=sum(max(0, gpu.free_bytes - _GPU_MARGIN) for gpu in own),
            shared_budget=0 if own else max((gpu.free_bytes for gpu in shared), default=0),
            is_known=memory.is_known,
        )

    @property
    def has_gpu(self) -> bool:
        return self.gpu_total > 0 or self.shared_budget > 0

    @property
    def budget_bytes(self) -> int:
        return self.host_budget + self.gpu_budget

    @property
    def available_bytes(self) -> int:
        return self.host_free + self.gpu_free

    def without_margin(self) -> Pools:
        return replace(self, host_budget=self.host_free, gpu_budget=self.gpu_free)


def place(need: Estimate, pools: Pools, n_gpu_layers: GpuLayers) -> Placement:
    """Put `need` into `pools`. "auto" takes the most layers that fit on the GPU, "all" and numbers
    are taken as they are, also where that does not fit."""
    if not pools.has_gpu or not pools.is_known:
        return _place_on_host(need, pools, n_gpu_layers)
    n_layers = len(need.layer_weights)
    n_all = n_layers + 1
    if n_gpu_layers == "auto":
        n_on_gpu = _choose_layers(need, pools, n_all)
    else:
        is_all = n_gpu_layers == "all" or n_gpu_layers < 0
        n_on_gpu = n_all if is_all else min(int(n_gpu_layers), n_all)
    host, gpu = _split(need, pools, n_on_gpu)
    if n_on_gpu == n_all:
        reason = f"all layers on {pools.gpu_name}"
    elif n_on_gpu:
        reason = f"{n_on_gpu} of {n_all} layers on {pools.gpu_name}, the others on the CPU"
    else:
        reason = f"all layers on the CPU: {pools.gpu_name} is not used"
    is_shared = pools.gpu_total == 0
    room = pools.host_budget - host.used_bytes - (gpu.used_bytes if is_shared else 0)
    return Placement(
        estimate=replace(need, weights_bytes=host.weights_bytes + gpu.weights_bytes),
        n_gpu_layers=-1 if n_on_gpu == n_all else n_on_gpu,
        shares=(host, gpu) if n_on_gpu else (host,),
        fits=gpu.missing_bytes <= 0 and room >= 0,
        slack_bytes=room,
        reasons=(reason,),
    )


def _place_on_host(need: Estimate, pools: Pools, n_gpu_layers: GpuLayers) -> Placement:
    """Without a known GPU a wish for layers is passed on: the engine may know more."""
    host, _ = _split(need, pools, 0)
    return Placement(
        estimate=need,
        n_gpu_layers=n_gpu_layers if isinstance(n_gpu_layers, int) else -1,
        shares=(host,),
        fits=not pools.is_known or host.missing_bytes <= 0,
        slack_bytes=pools.host_budget - host.used_bytes,
    )


def _choose_layers(need: Estimate, pools: Pools, n_all: int) -> int:
    """The most layers whose part fits on the GPU. Memory that is RAM anyway is not worth a split:
    there it is all or none."""
    if pools.gpu_total == 0:
        host, gpu = _split(need, pools, n_all)
        room = pools.host_budget - host.used_bytes - gpu.used_bytes
        return n_all if gpu.missing_bytes <= 0 and room >= 0 else 0
    low, high = 0, n_all
    while low < high:
        middle = (low + high + 1) // 2
        if _split(need, pools, middle)[1].missing_bytes <= 0:
            low = middle
        else:
            high = middle - 1
    return low


def _split(need: Estimate, pools: Pools, n_on_gpu: int) -> tuple[Share, Share]:
    """The shares of RAM and GPU with the output and the last `n_on_gpu` - 1 layers on the GPU.

    A tied output is a copy of the embedding there. A step that runs on both needs scratch memory
    on both; with all layers on the GPU a little is left for the inputs.
    """
    n_layers = len(need.layer_weights)
    first = n_layers - max(0, n_on_gpu - 1)
    is_all = n_on_gpu > n_layers
    if n_on_gpu == 0:
        weights = kv = compute = 0
        host_compute = need.compute_bytes
    else:
        weights = sum(need.layer_weights[first:]) + need.output_bytes + need.tied_bytes
        kv = need.kv_bytes if is_all else sum(need.layer_kv[first:])
        compute = need.compute_bytes
        host_compute = compute // 4 if is_all else compute
    tied = need.tied_bytes if n_on_gpu else 0
    host = Share(
        device="RAM",
        weights_bytes=need.weights_bytes + tied - weights,
        kv_bytes=need.kv_bytes - kv,
        compute_bytes=host_compute,
        overhead_bytes=need.overhead_bytes,
        budget_bytes=pools.host_budget,
        total_bytes=pools.host_total,
    )
    gpu = Share(
        device=pools.gpu_name,
        weights_bytes=weights,
        kv_bytes=kv,
        compute_bytes=compute,
        overhead_bytes=0,
        budget_bytes=pools.gpu_budget or pools.shared_budget,
        total_bytes=pools.gpu_total or pools.host_total,
    )
    return host, gpu

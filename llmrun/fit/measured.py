"""What llmrun knows better once llama.cpp's own allocator was asked: needs, and shares. Pure but
for what the allocator does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from llmrun.fit.calibrate import calibrate
from llmrun.fit.candidates import Candidate, Wishes, setup_of
from llmrun.fit.placement import Placement, Share
from llmrun.fit.pools import HOST, list_engine_gpus
from llmrun.fit.types import Allocator, BufferUse, Estimate, Measurement, Setup
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine

_CPU = "CPU"


def measure_needs(
    formula: Mapping[Candidate, Estimate],
    allocator: Allocator,
    machine: Machine,
    info: ModelInfo,
    wishes: Wishes,
    n_ubatch: int,
) -> tuple[Mapping[Candidate, Estimate], tuple[str, ...]]:
    """The candidates' needs with exact figures where the allocator has them, and what to say where
    it has not. All are asked in one call, in one placement: the model is loaded once."""
    n_gpus = len(allocator.devices)
    # An even split, as without one llama.cpp's answer depends on what is free at the time.
    placed: dict[str, Any] = {
        "n_gpu_layers": -1 if n_gpus else 0,
        "tensor_split": (1.0,) * n_gpus if n_gpus > 1 else (),
    }
    setups = [
        replace(setup_of(info, candidate, wishes, n_ubatch), **placed) for candidate in formula
    ]
    answers = allocator.measure(setups)
    has_devices = _has_devices_of(allocator, machine)
    scratch = min if has_devices else max
    needs = {}
    for (candidate, need), answer in zip(formula.items(), answers, strict=True):
        needs[candidate] = need if answer is None else _calibrate(need, answer, scratch)
    if allocator.problem is not None:
        return needs, (f"estimated, not measured: {allocator.problem}",)
    if has_devices or not list_engine_gpus(machine):
        return needs, ()
    return needs, ("llama.cpp's own sizes; how they divide over the devices is calculated",)


def _has_devices_of(allocator: Allocator, machine: Machine) -> bool:
    """Whether the allocator places layers on the machine's GPUs. It may name a card again, for
    another backend that lists it and that llama.cpp then leaves out."""
    gpus = [gpu.name for gpu in list_engine_gpus(machine)]
    return bool(gpus) and gpus == [name for name in allocator.devices if name in gpus]


def _calibrate(
    need: Estimate, answer: Measurement, choose_scratch: Callable[[Iterable[int]], int]
) -> Estimate:
    gpus = {use.device for use in answer.buffers if use.weights_bytes} - {_CPU}
    if not gpus:
        return calibrate(need, answer)
    # On GPUs a tied output lies there once more (`tied_bytes` says so already), each card has
    # scratch memory of its own, and no CPU reorders weights: as the formula counts, there is one.
    # Of the cards' scratch memories the least will do where each card's is measured afterwards.
    scratch = choose_scratch(answer.on(device).compute_bytes for device in gpus)
    one = BufferUse(
        _CPU,
        _CPU,
        answer.weights_bytes - need.tied_bytes,
        answer.kv_bytes,
        scratch,
    )
    calibrated = calibrate(need, Measurement(answer.setup, (one,), answer.is_rough))
    return replace(calibrated, repack_bytes=need.repack_bytes)


def verify_placement(
    placement: Placement, setup: Setup, machine: Machine, allocator: Allocator
) -> Placement | None:
    """The placement with the exact share of each device; None when the allocator's devices are not
    the machine's GPUs, or it has no answer."""
    if not _has_devices_of(allocator, machine):
        return None
    (answer,) = allocator.measure([setup])
    known = {_CPU, *(gpu.name for gpu in list_engine_gpus(machine))}
    if answer is None or not {use.device for use in answer.buffers} <= known:
        return None
    # The allocator counts what stays in the file, or is there twice in a load that reads it.
    spared = placement.spared_bytes
    shares: tuple[Share, ...]
    names = {share.device for share in placement.shares}
    if HOST not in names:
        # One share for RAM and the GPU in it.
        (one,) = placement.shares
        shares = (_with_use(one, _sum(one.device, answer.buffers), spared),)
    else:
        shares = tuple(
            _with_use(share, answer.on(_CPU), spared)
            if share.device == HOST
            else _with_use(share, answer.on(share.device))
            for share in placement.shares
        )
    need = replace(
        placement.estimate,
        weights_bytes=sum(share.weights_bytes for share in shares),
        kv_bytes=sum(share.kv_bytes for share in shares),
        source="exact",
    )
    freed = placement.shares[0].used_bytes - shares[0].used_bytes
    return replace(
        placement,
        estimate=need,
        shares=shares,
        fits=all(share.missing_bytes <= 0 for share in shares),
        slack_bytes=placement.slack_bytes + freed,
    )


def _sum(device: str, buffers: tuple[BufferUse, ...]) -> BufferUse:
    return BufferUse(
        device,
        device,
        sum(use.weights_bytes for use in buffers),
        sum(use.kv_bytes for use in buffers),
        sum(use.compute_bytes for use in buffers),
    )


def _with_use(share: Share, use: BufferUse, spared: int = 0) -> Share:
    return replace(
        share,
        weights_bytes=max(0, use.weights_bytes - spared),
        kv_bytes=use.kv_bytes,
        compute_bytes=use.compute_bytes,
    )

"""How fast a placed model will answer: tokens a second from bytes read and bandwidth. Pure.

Every token of an answer reads, once: all weights but those of the experts it does not use and of
the embedding tables (one row of these), and the KV cache up to where it is. Reading prompts is
bound by arithmetic and not forecast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmrun.fit.placement import Placement
from llmrun.fit.pools import HOST
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine
from llmrun.hardware.threads import choose_threads

ForecastSource = Literal["measured", "calibrated", "estimated"]

# A forecast's half width. What community measurements of models of 7 billion weights and more
# scatter by.
_SPREAD = 0.3
# The share of a GPU's bandwidth that decoding reaches, and what a token costs beside reading, in s:
# fits to published llama.cpp rows (RX 7900 XT 0.80 and 1.5 ms, RTX 5070 0.79 and 0.8 ms, M4 Pro
# 0.88 and 2 ms, M5 Max 0.72 to 0.90).
_GPU_EFFICIENCY = 0.8
_TOKEN_S = {"CUDA": 0.8e-3, "Metal": 1.8e-3}
_TOKEN_S_OTHER = 1.5e-3
# Reading experts is scattered: 1.1 to 1.5 times as long.
_EXPERT_FACTOR = 1.25
# Of the RAM's bandwidth as measured by reading with all cores.
_CPU_EFFICIENCY = 0.75
_CPU_TOKEN_S = 0.9e-3
# What one core can turn over in quantised weights, bytes/s: it binds where cores are few. Measured
# with SmolLM2 135M: 80 to 89 tok/s on one core with AVX-512, 119 to 135 on two, 26 to 32 on two
# without any of these. Gemma 3 270M: 80 on two with AVX-512.
_CORE_BYTES_S = (("AVX512", 8.5e9), ("AVX2", 7e9), ("NEON", 8e9))
_CORE_BYTES_S_PLAIN = 1.5e9
_CORE_BYTES_S_UNKNOWN = 6e9
# A core gets through a KV cache so many times as slowly as through weights (SmolLM2 135M with 2048
# tokens in the context: 64 to 69 tok/s on two cores).
_CORE_CACHE_FACTOR = 2.0
# Tokens in the cache that a forecast counts on: a question and its answer, as in the runs that
# replace the forecast.
_DEPTH = 512
# How far another model's measurement may move the forecast.
_CALIBRATION_BOUNDS = (0.3, 2.0)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Tokens a second of an answer, from `low` to `high`. `source` "measured": this model with
    these settings ran here before; "calibrated": another model did; "estimated": by bandwidth.
    """

    low: float
    high: float
    source: ForecastSource
    reason: str

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


def forecast(
    info: ModelInfo,
    placement: Placement,
    machine: Machine,
    *,
    depth: int | None = None,
    measured: float | None = None,
    efficiency: float | None = None,
) -> Forecast | None:
    """The speed of answers; None when the bandwidth of a memory in use is not known.

    `depth` is how many tokens are in the context; None is a usual exchange's. `measured` are tokens
    a second of this model, build and settings on this machine: it replaces the forecast.
    `efficiency` is how other models ran here against their forecasts (see
    `speed_log.SpeedLog.machine_efficiency`): it scales the forecast, within bounds.
    """
    if measured is not None and measured > 0:
        return Forecast(measured, measured, "measured", "measured here")
    if depth is None:
        depth = min(_DEPTH, placement.n_ctx // 2)
    token_s = _TokenTime(info, placement, machine, depth).seconds()
    if token_s is None:
        return None
    reason = f"by bytes read and memory bandwidth, with {depth} tokens in the context"
    tok_s = 1 / token_s
    source: ForecastSource = "estimated"
    if efficiency is not None and efficiency > 0:
        low, high = _CALIBRATION_BOUNDS
        tok_s *= min(high, max(low, efficiency))
        source = "calibrated"
        reason += ", corrected by what other models reached here"
    return Forecast(tok_s * (1 - _SPREAD), tok_s * (1 + _SPREAD), source, reason)


def limit_tok_s(
    info: ModelInfo, placement: Placement, machine: Machine, n_past: int
) -> float | None:
    """Tokens a second if nothing but reading took time, each memory at its full bandwidth; None
    when one of these is not known. `n_past` tokens are in the context."""
    bandwidths = {gpu.name: gpu.bandwidth_bytes_s for gpu in machine.devices}
    bandwidths[HOST] = machine.memory.bandwidth_bytes_s
    seconds = 0.0
    for device, read in _TokenTime(info, placement, machine, n_past).reads().items():
        bandwidth = bandwidths.get(device)
        if not bandwidth or bandwidth <= 0:
            return None
        seconds += (read.n_bytes + read.expert_bytes) / bandwidth
    return 1 / seconds if seconds > 0 else None


@dataclass(frozen=True, slots=True)
class _Read:
    """Bytes that a token reads from one device: all, and what of it is experts and KV cache."""

    n_bytes: float = 0.0
    expert_bytes: float = 0.0
    cache_bytes: float = 0.0

    def __add__(self, more: _Read) -> _Read:
        return _Read(
            self.n_bytes + more.n_bytes,
            self.expert_bytes + more.expert_bytes,
            self.cache_bytes + more.cache_bytes,
        )


@dataclass(frozen=True, slots=True)
class _Speed:
    """Bytes/s that a device reads; bytes/s that it computes with, where that can be less; seconds
    a token beside both."""

    read_bytes_s: float
    compute_bytes_s: float
    token_s: float

    def seconds(self, read: _Read) -> float:
        n_bytes = read.n_bytes + (_EXPERT_FACTOR - 1) * read.expert_bytes
        n_computed = n_bytes + (_CORE_CACHE_FACTOR - 1) * read.cache_bytes
        return self.token_s + max(n_bytes / self.read_bytes_s, n_computed / self.compute_bytes_s)


@dataclass(frozen=True, slots=True)
class _TokenTime:
    info: ModelInfo
    placement: Placement
    machine: Machine
    depth: int

    def seconds(self) -> float | None:
        """Time of one token: the devices work one after the other."""
        total = 0.0
        for device, read in self.reads().items():
            speed = self._speed(device)
            if speed is None:
                return None
            total += speed.seconds(read)
        return total or None

    def reads(self) -> dict[str, _Read]:
        placement, need = self.placement, self.placement.estimate
        reads: dict[str, _Read] = {}

        def add(device: str, n_bytes: float, experts: float = 0.0, cache: float = 0.0) -> None:
            n_all = n_bytes + experts + cache
            if n_all > 0:
                reads[device] = reads.get(device, _Read()) + _Read(n_all, experts, cache)

        used = self._used_share()
        n_ctx = placement.n_ctx
        depth = min(1.0, self.depth / n_ctx) if n_ctx > 0 else 0.5
        for i, device in enumerate(placement.layer_devices):
            experts = need.layer_experts[i] if i < len(need.layer_experts) else 0
            kv = need.layer_kv[i] if i < len(need.layer_kv) else 0
            add(device, need.layer_weights[i] - experts, cache=kv * depth)
            add(HOST if i < placement.n_cpu_moe else device, 0.0, experts * used)
        add(placement.output_device, need.output_bytes + need.tied_bytes)
        return reads

    def _used_share(self) -> float:
        n_expert, n_used = self.info.n_expert or 0, self.info.n_expert_used or 0
        return min(1.0, n_used / n_expert) if n_expert and n_used else 1.0

    def _speed(self, device: str) -> _Speed | None:
        if device == HOST:
            return self._cpu_speed()
        gpu = next((gpu for gpu in self.machine.devices if gpu.name == device), None)
        if gpu is None or not gpu.bandwidth_bytes_s or gpu.bandwidth_bytes_s <= 0:
            return None
        bytes_s = gpu.bandwidth_bytes_s * _GPU_EFFICIENCY
        return _Speed(bytes_s, math.inf, _TOKEN_S.get(gpu.backend, _TOKEN_S_OTHER))

    def _cpu_speed(self) -> _Speed | None:
        bandwidth = self.machine.memory.bandwidth_bytes_s
        if not bandwidth or bandwidth <= 0:
            return None
        cpu = self.machine.cpu
        n_threads = self.placement.n_threads or choose_threads(cpu).n_threads
        n_cores: float = max(1, min(n_threads, cpu.n_physical))
        if cpu.quota is not None and cpu.quota > 0:
            n_cores = min(n_cores, cpu.quota)
        features = " ".join(cpu.features).upper()
        other = _CORE_BYTES_S_PLAIN if features else _CORE_BYTES_S_UNKNOWN
        per_core = next((rate for name, rate in _CORE_BYTES_S if name in features), other)
        return _Speed(bandwidth * _CPU_EFFICIENCY, n_cores * per_core, _CPU_TOKEN_S)

"""Forecasts of speed against published and measured rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.fit.plan import Wishes, plan
from llmrun.fit.speed import Forecast, forecast
from llmrun.gguf.info import read_info
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Cpu, Device, Machine, Memory
from tests.fakes.model_shapes import shape_info
from tests.fakes.models import gemma3_path, smollm2_path
from tests.unit.test_fit_plan import GIB, INFOS, NAMES, machines

SHORT = Wishes(n_ctx=4096)


def card(
    bandwidth: float | None,
    backend: str = "CUDA",
    free: float = 100,
    ram_bandwidth: float | None = 50e9,
) -> Machine:
    gpu = Device(
        "G", "", "gpu", int(free * GIB), 128 * GIB, backend=backend, bandwidth_bytes_s=bandwidth
    )
    memory = Memory(128 * GIB, 120 * GIB, bandwidth_bytes_s=ram_bandwidth)
    return Machine(Cpu(16, 16, 8, features=("AVX2",)), memory, (gpu,))


def expect(target: Machine, info: ModelInfo, wishes: Wishes = SHORT) -> Forecast:
    found = plan(target, info, wishes).forecast
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "quant", "tok_s"),
    [
        ("gemma-4-12b", "q4_0", 62.9),
        ("gemma-4-31b", "q4_0", 26.8),
        ("gemma-4-31b", "q8_0", 15.6),
        ("gemma-4-26b-a4b", "q4_0", 127),
        ("gpt-oss-20b", "q4_0", 150),
    ],
)
def test_published_rows_of_an_m5_max(name, quant, tok_s):
    found = expect(card(614e9, "Metal"), shape_info(name, quant))
    assert found.low <= tok_s <= found.high
    assert found.high / found.low == pytest.approx(1.3 / 0.7)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("llama-3.1-8b", 0.66, 0.83), ("gemma-3-4b", 0.51, 0.75), ("qwen3-30b-a3b", 0.35, 0.48)],
)
@pytest.mark.parametrize("bandwidth", [448e9, 672e9, 936e9])
def test_published_efficiencies_of_rtx_cards(name, least, most, bandwidth):
    """Tokens a second times the bytes that a token reads, as a share of the bandwidth."""
    info = shape_info(name)
    found = expect(card(bandwidth), info)
    need = plan(card(bandwidth), info, SHORT).estimate
    read = (
        sum(need.layer_weights)
        - sum(need.layer_experts)
        + sum(need.layer_experts) * (info.n_expert_used or 0) / (info.n_expert or 1)
        + need.output_bytes
        + need.tied_bytes
        + need.kv_bytes / 8
    )
    assert found.low * read / bandwidth <= most
    assert found.high * read / bandwidth >= least


@pytest.mark.parametrize(
    ("n_cores", "features", "tok_s"),
    [(2, ("AVX2", "AVX512"), 119), (1, ("AVX2", "AVX512"), 89), (2, ("SSE3",), 29)],
)
def test_the_small_model_as_measured_on_few_cores(n_cores, features, tok_s):
    """On a machine that read 15.8 GB/s from RAM, with hardly anything in the context."""
    cpu = Cpu(2, 2, n_cores, features=features)
    target = Machine(cpu, Memory(8 * GIB, 6 * GIB, bandwidth_bytes_s=15.8e9))
    found = expect(target, read_info([smollm2_path()]), Wishes(n_ctx=256))
    assert found.low <= tok_s <= found.high


@pytest.mark.parametrize("bandwidth", [26e9, 36e9])
@pytest.mark.parametrize(
    ("path", "depth", "tok_s"),
    [
        (smollm2_path, 30, (108, 135)),
        (smollm2_path, 2048, (64, 69)),
        (gemma3_path, 30, (69, 82)),
        (gemma3_path, 2048, (66, 68)),
    ],
)
def test_two_cores_as_measured(path, depth, tok_s, bandwidth):
    """A PC with AVX-512 that reads 33 to 36 GB/s when nothing else runs, and 26 when something
    does."""
    cpu = Cpu(2, 2, 2, features=("AVX2", "AVX512"))
    target = Machine(cpu, Memory(24 * GIB, 23 * GIB, bandwidth_bytes_s=bandwidth))
    info = read_info([path()])
    placement = plan(target, info, Wishes(n_ctx=4096)).placement
    found = forecast(info, placement, target, depth=depth)
    assert found is not None
    assert found.low <= tok_s[0] < tok_s[1] <= found.high


def test_few_cores_cannot_use_all_bandwidth():
    info = shape_info("llama-3.1-8b")

    def speed(n_cores: int, features: tuple[str, ...] = ("AVX2",)) -> float:
        cpu = Cpu(64, 64, n_cores, features=features)
        target = Machine(cpu, Memory(128 * GIB, 120 * GIB, bandwidth_bytes_s=200e9))
        return expect(target, info).middle

    assert speed(2) == pytest.approx(2 * speed(1), rel=0.02)
    assert speed(32) == speed(64)
    assert speed(4, ("AVX2", "AVX512")) > speed(4)


@pytest.mark.parametrize(("quota", "share"), [(0.5, 0.25), (1.5, 0.5), (8.0, 1.0), (None, 1.0)])
def test_a_quota_bounds_the_cores(quota, share):
    info = shape_info("llama-3.1-8b")

    def seconds(quota: float | None) -> float:
        cpu = Cpu(2, 2, 2, quota=quota, features=("AVX2",))
        memory = Memory(128 * GIB, 120 * GIB, bandwidth_bytes_s=200e9)
        return 1 / expect(Machine(cpu, memory), info).middle

    assert seconds(None) / seconds(quota) == pytest.approx(share, rel=0.01)


def test_experts_that_are_not_used_are_not_read():
    dense, mixture = shape_info("gemma-4-31b"), shape_info("gemma-4-26b-a4b")
    ratio = expect(card(600e9), mixture).middle / expect(card(600e9), dense).middle
    assert ratio > 4


def test_layers_on_the_cpu_cost_their_time():
    info = shape_info("gemma-4-31b")
    speeds = [expect(card(1000e9, free=free), info).middle for free in (24, 18, 12, 6, 1)]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > 8 * speeds[-1]


def test_two_cards_take_turns():
    one = card(500e9, free=24)
    other = Device("H", "", "gpu", 10 * GIB, 128 * GIB, backend="CUDA", bandwidth_bytes_s=250e9)
    info = shape_info("gemma-4-31b")
    alone = expect(one.with_devices((one.devices[0], other)), info).middle
    small = card(500e9, free=14)
    split = expect(small.with_devices((small.devices[0], other)), info).middle
    assert 0.5 * alone < split < alone


def test_what_is_not_known_is_not_forecast():
    info = shape_info("llama-3.1-8b")
    assert plan(card(None), info).forecast is None
    assert plan(card(500e9, free=3, ram_bandwidth=None), info).forecast is None
    # With all layers on the GPU nothing is read from RAM for a token.
    assert plan(card(500e9, ram_bandwidth=None), info).forecast is not None
    no_gpu = Machine(Cpu(8, 8, 8), Memory(64 * GIB, 60 * GIB))
    assert plan(no_gpu, info).forecast is None


def test_a_measurement_replaces_the_forecast():
    info, target = shape_info("llama-3.1-8b"), card(None)
    placement = plan(target, info).placement
    found = forecast(info, placement, target, measured=41.5)
    assert found == Forecast(41.5, 41.5, "measured", "measured here")


def test_other_models_correct_it_within_bounds():
    info, target = shape_info("llama-3.1-8b"), card(500e9)
    placement = plan(target, info).placement

    def middle(efficiency: float | None) -> float:
        found = forecast(info, placement, target, efficiency=efficiency)
        assert found is not None
        assert found.source == ("estimated" if efficiency is None else "calibrated")
        return found.middle

    plain = middle(None)
    assert middle(0.8) == pytest.approx(0.8 * plain)
    assert middle(0.01) == pytest.approx(0.3 * plain)
    assert middle(50.0) == pytest.approx(2.0 * plain)


def test_the_depth_is_said():
    info = shape_info("llama-3.1-8b")
    assert "256 tokens in the context" in expect(card(500e9), info, Wishes(n_ctx=512)).reason
    usual = expect(card(500e9), info)
    assert "512 tokens in the context" in usual.reason
    # A long context that is not full costs nothing.
    assert expect(card(500e9), info, Wishes(n_ctx=65536)).middle == pytest.approx(usual.middle)
    placement = plan(card(500e9), info, Wishes(n_ctx=65536)).placement
    full = forecast(info, placement, card(500e9), depth=60000)
    assert full is not None
    assert full.middle < 0.6 * usual.middle
    assert "60000 tokens" in full.reason


@settings(deadline=None)
@given(NAMES, machines(), st.floats(1e9, 4e12), st.floats(1e9, 4e12))
def test_a_forecast_is_a_positive_range_or_nothing(name, target, ram, vram):
    target = replace(
        target,
        memory=replace(target.memory, bandwidth_bytes_s=ram),
        devices=tuple(replace(gpu, bandwidth_bytes_s=vram) for gpu in target.devices),
    )
    found = plan(target, INFOS[name]).forecast
    assert found is not None
    assert 0 < found.low < found.high

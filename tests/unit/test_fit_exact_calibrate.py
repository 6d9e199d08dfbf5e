"""What an estimate becomes when llama.cpp has said what it would allocate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.fit.calibrate import calibrate
from llmrun.fit.types import GIB, MIB, BufferUse, Estimate, Measurement, Setup

SETUP = Setup(8192)
CLOSED = Estimate(
    weights_bytes=4 * GIB,
    kv_bytes=GIB,
    compute_bytes=200 * MIB,
    overhead_bytes=100 * MIB,
    source="formula",
    notes=("the multi-token-prediction layers are not loaded",),
    repack_bytes=3 * GIB,
    layer_weights=(GIB, GIB, GIB),
    layer_kv=(512 * MIB, 512 * MIB, 0),
    layer_experts=(GIB // 2, GIB // 2, GIB // 2),
    input_bytes=512 * MIB,
    output_bytes=512 * MIB,
    aliased_bytes=7,
    lazy_bytes=9,
)


def said(
    weights: int = 4 * GIB,
    kv: int = GIB,
    compute: int = 190 * MIB,
    repack: int = 2 * GIB,
    *,
    is_rough: bool = False,
) -> Measurement:
    rest = max(0, weights - repack)
    buffers = (
        BufferUse("CPU_REPACK", "CPU", weights - rest, 0, 0),
        BufferUse("CPU", "CPU", rest, kv, compute),
    )
    return Measurement(SETUP, buffers, is_rough)


def check_sums(estimate: Estimate) -> None:
    parts = sum(estimate.layer_weights) + estimate.input_bytes + estimate.output_bytes
    assert parts == estimate.weights_bytes
    if estimate.layer_kv:
        assert sum(estimate.layer_kv) == estimate.kv_bytes


def test_totals_are_the_measured_ones() -> None:
    exact = calibrate(CLOSED, said())
    assert exact == replace(CLOSED, source="exact", compute_bytes=190 * MIB, repack_bytes=2 * GIB)


def test_all_buffers_of_ram_that_reorder_count() -> None:
    amx = Measurement(
        SETUP,
        (
            BufferUse("AMX", "CPU", GIB, 0, 0),
            BufferUse("CPU_REPACK", "CPU", GIB, 0, 0),
            BufferUse("CPU", "CPU", 2 * GIB, GIB, 0),
        ),
    )
    assert calibrate(CLOSED, amx).repack_bytes == 2 * GIB


def test_splits_follow_the_totals() -> None:
    exact = calibrate(CLOSED, said(weights=4 * GIB + 333, kv=GIB + 101))
    check_sums(exact)
    assert exact.layer_weights == pytest.approx(CLOSED.layer_weights, rel=1e-6)
    assert exact.layer_kv[2] == 0
    assert all(
        part <= whole for part, whole in zip(exact.layer_experts, exact.layer_weights, strict=True)
    )
    assert exact.aliased_bytes == 7 and exact.lazy_bytes == 9


def test_the_log_does_not_know_what_is_reordered() -> None:
    assert calibrate(CLOSED, said(repack=0, is_rough=True)).repack_bytes == 3 * GIB
    assert calibrate(CLOSED, said(repack=0)).repack_bytes == 0


@pytest.mark.parametrize(
    ("measurement", "words"),
    [
        (said(weights=3 * GIB), "of weights, less than"),
        (said(weights=0, repack=0), "of weights, less than"),
        (said(kv=GIB - 20 * MIB), "KV cache"),
        (said(kv=0), "KV cache"),
        (said(kv=5 * GIB), "KV cache"),
    ],
)
def test_an_answer_that_cannot_be_right_is_refused(measurement: Measurement, words: str) -> None:
    kept = calibrate(CLOSED, measurement)
    assert kept == replace(CLOSED, notes=kept.notes)
    assert kept.notes[:-1] == CLOSED.notes
    assert kept.notes[-1].startswith("estimated, not measured") and words in kept.notes[-1]


def test_a_tied_output_may_be_a_copy_or_not() -> None:
    """The embedding is 512 MiB here, and so are the outputs."""
    assert calibrate(CLOSED, said(weights=4 * GIB - 512 * MIB)).source == "exact"


def test_a_larger_cache_is_believed_and_noted() -> None:
    exact = calibrate(CLOSED, said(kv=GIB + 512 * MIB))
    assert exact.source == "exact"
    assert exact.kv_bytes == GIB + 512 * MIB
    check_sums(exact)
    assert "larger than the" in exact.notes[-1]


def test_a_large_difference_is_noted() -> None:
    near = calibrate(CLOSED, said(compute=400 * MIB))
    assert near.notes == CLOSED.notes
    far = calibrate(CLOSED, said(compute=900 * MIB))
    assert far.source == "exact"
    assert "less certain than usual" in far.notes[-1]
    small = replace(
        CLOSED,
        weights_bytes=100 * MIB,
        kv_bytes=0,
        layer_weights=(),
        layer_kv=(),
        layer_experts=(),
        input_bytes=0,
        output_bytes=100 * MIB,
    )
    measured = said(weights=100 * MIB, kv=0, compute=400 * MIB, repack=0)
    assert calibrate(small, measured).notes == CLOSED.notes  # half of it, but below 256 MiB


def test_an_unknown_architecture_becomes_exact() -> None:
    rough = Estimate(
        weights_bytes=GIB * 21 // 20,
        kv_bytes=3 * GIB,
        compute_bytes=256 * MIB,
        overhead_bytes=64 * MIB,
        source="filesize",
        notes=("the architecture 'x' is not known here: a rough upper bound",),
        output_bytes=GIB * 21 // 20,
    )
    exact = calibrate(rough, said(weights=GIB - 20 * MIB, kv=MIB, repack=0))
    assert exact.source == "exact"
    assert exact.notes == ()
    assert (exact.weights_bytes, exact.kv_bytes) == (GIB - 20 * MIB, MIB)
    check_sums(exact)
    refused = calibrate(rough, said(weights=GIB // 2, kv=MIB, repack=0))
    assert refused.source == "filesize"
    assert "not measured" in refused.notes[-1]


@given(
    layers=st.lists(st.integers(0, 1 << 40), max_size=8),
    ends=st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 40)),
    kv=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=8),
    weights_more=st.integers(0, 1 << 35),
    kv_more=st.integers(0, 1 << 30),
)
def test_the_parts_always_sum_up(
    layers: list[int],
    ends: tuple[int, int],
    kv: list[int],
    weights_more: int,
    kv_more: int,
) -> None:
    closed = Estimate(
        weights_bytes=sum(layers) + sum(ends),
        kv_bytes=sum(kv),
        compute_bytes=1,
        overhead_bytes=1,
        source="formula",
        layer_weights=tuple(layers),
        layer_kv=tuple(kv),
        input_bytes=ends[0],
        output_bytes=ends[1],
    )
    weights, cache = closed.weights_bytes + weights_more, closed.kv_bytes + kv_more
    exact = calibrate(closed, said(weights=weights, kv=cache, repack=0))
    check_sums(exact)
    assert min(*exact.layer_weights, *exact.layer_kv, exact.input_bytes, exact.output_bytes) >= 0
    if exact.source == "exact":
        assert (exact.weights_bytes, exact.kv_bytes) == (weights, cache)

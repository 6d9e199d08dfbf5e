"""The closed form against llama.cpp's own allocator, on headers of real models in full size."""

from __future__ import annotations

import pytest

from llmrun.fit.exact import ChildAllocator
from llmrun.fit.formula import estimate
from llmrun.fit.types import MIB, Setup
from llmrun.gguf.types import ModelInfo
from tests.fakes.model_shapes import SHAPES, build_shape, shape_info, write_sparse


def setups_for(info: ModelInfo) -> list[Setup]:
    n_most = info.n_ctx_train or 0
    return [
        Setup(4096),
        Setup(5000),
        Setup(32768),
        Setup(n_most),
        Setup(32768, "q8_0", "q8_0"),
        Setup(32768, "q4_0", "q4_0"),
        Setup(32768, n_seq_max=4, n_outputs_max=4),
        Setup(2100, n_seq_max=4, kv_unified=False, n_outputs_max=4),
        Setup(8192, flash_attn="off"),
        Setup(n_most, flash_attn="off", n_ubatch=256),
        Setup(32768, n_ubatch=2048),
        Setup(300, n_ubatch=2048),
        Setup(32768, n_outputs_max=512),
    ]


def compare(info: ModelInfo, allocator: ChildAllocator, setups: list[Setup]) -> None:
    for setup, truth in zip(setups, allocator.measure(setups), strict=True):
        assert truth is not None, (setup, allocator.problem, allocator.refusal(setup))
        found = estimate(info, setup)
        assert found.source == "formula"
        assert found.kv_bytes == truth.kv_bytes, setup
        assert found.weights_bytes == truth.weights_bytes, setup
        total = truth.weights_bytes + truth.kv_bytes + truth.compute_bytes
        error = found.weights_bytes + found.kv_bytes + found.compute_bytes - total
        assert -0.03 * total <= error <= max(0.1 * total, 256 * MIB), (setup, error / MIB)


@pytest.mark.parametrize("name", SHAPES)
def test_the_closed_form_is_what_llama_cpp_would_allocate(name):
    header, n_bytes = build_shape(name)
    info = shape_info(name)
    allocator = ChildAllocator.of_headers([(f"{name}.gguf", header, n_bytes)])
    compare(info, allocator, setups_for(info))


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("gemma-4-e2b", "f16"),
        ("gemma-4-12b", "q8_0"),
        ("lfm2-1.2b", "q4_0"),
        ("gemma-3-4b", "q2_k"),
    ],
)
def test_it_is_so_for_other_quants_and_without_reordered_weights(name, quant):
    header, n_bytes = build_shape(name, quant)
    allocator = ChildAllocator.of_headers([(f"{name}.gguf", header, n_bytes)])
    compare(shape_info(name, quant), allocator, [Setup(8192), Setup(8192, use_repack=False)])


def test_a_shape_can_be_a_sparse_file(tmp_path):
    path = write_sparse(tmp_path / "shape.gguf", "gemma-4-31b")
    assert path.stat().st_size > 18e9
    assert path.stat().st_blocks * 512 < MIB
    compare(shape_info("gemma-4-31b"), ChildAllocator([path]), [Setup(4096)])

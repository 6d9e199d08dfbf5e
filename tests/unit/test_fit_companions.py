"""What a projector and a drafter add to their model."""

from __future__ import annotations

import pytest

from llmrun.fit.companions import (
    companion_bytes,
    drafter_need,
    projector_need,
)
from llmrun.fit.formula import estimate
from llmrun.fit.types import GIB, MIB, Setup
from llmrun.gguf.info import build_info
from llmrun.gguf.types import Header, ModelInfo, TensorInfo
from tests.fakes.model_shapes import shape_info

SETUP = Setup(8192)
TARGET = shape_info("gemma-4-e4b")


def small_info(architecture: str, kind: str, **keys: object) -> ModelInfo:
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    metadata["general.architecture"] = architecture
    tensors = (TensorInfo("blk.0.ffn_up.weight", (64, 100), 1, "F16", 0, 12_800),)
    info = build_info([Header(3, metadata, tensors, 0, 0)], 99_000)
    assert info.kind == kind
    return info


def test_a_projector_is_its_tensors_and_room_to_work():
    info = small_info("clip", "projector")
    read = projector_need(99_000, info)
    assert (read.bytes_on("gpu"), read.bytes_on("ram")) == (12_800 + GIB, 12_800 + GIB // 2)
    assert read.source == "formula"
    guessed = projector_need(990_380_032)
    assert guessed.weights_bytes == 990_380_032
    assert guessed.source == "filesize"
    assert "rule of thumb" in guessed.notes[0]


def test_a_drafter_that_shares_its_targets_cache_counts_its_own_tensors():
    info = small_info("gemma4-assistant", "drafter", nextn_predict_layers=4, block_count=4)
    found = drafter_need(99_000, SETUP, info, target=TARGET)
    assert (found.weights_bytes, found.kv_bytes) == (12_800, 0)
    assert found.bytes_on("gpu") - 12_800 == 64 * MIB
    unread = drafter_need(98_653_280, SETUP, kind="mtp", target=TARGET)
    assert (unread.weights_bytes, unread.kv_bytes, unread.source) == (98_653_280, 0, "filesize")


@pytest.mark.parametrize("architecture", ["eagle3", "dflash"])
def test_a_drafter_of_one_block_keeps_a_cache_of_one_layer(architecture):
    target = shape_info("llama-3.1-8b")
    layer = 8192 * 2 * 1024 * 2
    info = small_info(architecture, "drafter", block_count=1)
    assert drafter_need(99_000, SETUP, info, target=target).kv_bytes == layer
    assert drafter_need(99_000, SETUP, kind=architecture, target=target).kv_bytes == layer
    assert drafter_need(99_000, SETUP, kind="mtp", target=target).kv_bytes == layer


def test_a_drafter_that_is_a_model_counts_as_one():
    draft, setup = shape_info("qwen3.5-0.8b"), Setup(32768, "q8_0", "q8_0")
    found = drafter_need(draft.n_bytes, setup, draft, target=shape_info("qwen3.5-9b"))
    alone = estimate(draft, setup)
    assert (found.weights_bytes, found.kv_bytes) == (alone.weights_bytes, alone.kv_bytes)
    assert found.bytes_on("ram") == found.bytes_on("gpu")
    assert found.bytes_on("gpu") == alone.total_bytes - alone.overhead_bytes
    unread = drafter_need(600_000_000, setup, target=TARGET)
    assert unread.kv_bytes == estimate(TARGET, setup).kv_bytes // 4
    assert unread.source == "filesize"
    assert drafter_need(600_000_000, setup).kv_bytes == 0


def test_the_sum_is_for_one_device():
    both = [projector_need(1000), drafter_need(500, SETUP, kind="mtp", target=TARGET)]
    assert companion_bytes(both) == 1500 + GIB + 64 * MIB
    assert companion_bytes(both, "ram") == 1500 + GIB // 2 + 64 * MIB
    assert companion_bytes([]) == 0

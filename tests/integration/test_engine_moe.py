"""A real mixture of experts: where its parts are put changes nothing in what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.llama import open_backend
from llmrun.engine.types import EngineOptions, SamplingParams
from llmrun.fit.exact import ChildAllocator
from llmrun.fit.formula import estimate
from llmrun.fit.types import Setup
from llmrun.gguf.info import read_info
from tests.fakes.tiny_moe import tiny_moe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("moe") / "moe.gguf")


def say(path: Path, **options: object) -> list[int]:
    """40 tokens after a prompt of 70, the likeliest each time."""
    backend = open_backend(path, EngineOptions(n_ctx=512, n_threads=1, **options))  # type: ignore[arg-type]
    try:
        sampler = backend.new_sampler(SamplingParams(temperature=0.0), seed=1)
        prompt = [5 + 7 * i % 400 for i in range(70)]
        assert backend.decode([Chunk(0, prompt, 0, 1)]) is DecodeResult.DONE
        said = []
        for pos in range(70, 110):
            said.append(sampler.sample(-1))
            assert backend.decode_one(0, said[-1], pos) is DecodeResult.DONE
        return said
    finally:
        backend.close()


def test_it_says_the_same_wherever_its_parts_are(path: Path) -> None:
    plain = say(path)
    assert len(set(plain)) > 10
    for options in (
        {"n_cpu_moe": 1},
        {"n_cpu_moe": 3},
        {"n_cpu_moe": 999},
        {"tensor_split": (1.0, 3.0)},
        {"n_cpu_moe": 2, "tensor_split": (3.0, 0.0), "use_mmap": False},
        {"n_gpu_layers": 0},
        {"n_gpu_layers": 2, "use_repack": False},
    ):
        assert say(path, **options) == plain, options


def test_its_memory_is_known(path: Path) -> None:
    info = read_info([path])
    setups = (Setup(512), Setup(2048, n_cpu_moe=2), Setup(512, flash_attn="off"))
    for setup, answer in zip(setups, ChildAllocator([path]).measure(setups), strict=True):
        assert answer is not None
        need = estimate(info, setup)
        assert (need.weights_bytes, need.kv_bytes) == (answer.weights_bytes, answer.kv_bytes)
        assert sum(need.layer_experts) == 3 * 3 * 8 * 64 * 32 * 4

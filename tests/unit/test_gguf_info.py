from __future__ import annotations

from pathlib import Path

import pytest

from llmrun.errors import GgufError, NotFoundError
from llmrun.gguf.header import BytesSource, read_header
from llmrun.gguf.info import build_info, find_shards, read_info
from llmrun.gguf.types import ModelInfo
from tests.fakes import models
from tests.fakes.gguf_builder import (
    CHATML,
    GgufBuilder,
    split_builder,
    tiny_llama,
    tiny_llama_builder,
    write_shards,
)


def info_of(builder: GgufBuilder) -> ModelInfo:
    data = builder.build()
    return build_info([read_header(BytesSource(data))], len(data))


def test_smollm2() -> None:
    info = read_info([models.smollm2_path()])
    assert (info.architecture, info.kind, info.quant) == ("llama", "model", "Q4_1")
    assert (info.n_layers, info.n_ctx_train, info.n_embd, info.n_vocab) == (30, 8192, 576, 49152)
    assert (info.n_params, info.n_bytes) == (134_515_008, 98_362_432)
    assert info.tensor_bytes == sum(n for _, n in info.quant_mix) == 96_576_768
    assert info.quant_mix[0][0] == "Q4_1"
    assert info.licence == "apache-2.0"
    assert info.chat_template is not None and "<|im_start|>" in info.chat_template
    assert (info.n_swa, info.n_expert, info.sampling) == (None, None, {})


def test_gemma3() -> None:
    info = read_info([models.gemma3_path()])
    assert (info.architecture, info.kind, info.quant) == ("gemma3", "model", "Q4_K_M")
    assert (info.n_layers, info.n_ctx_train, info.n_embd, info.n_vocab) == (18, 32768, 640, 262_144)
    assert (info.n_swa, info.licence) == (512, "gemma")


def test_tiny_llama(tmp_path: Path) -> None:
    extra = {
        "general.sampling.temp": 0.2,
        "general.sampling.top_k": 64,
        "general.sampling.top_p": float("nan"),
        "general.sampling.sequence": "temp",
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
    }
    path = tiny_llama(tmp_path / "m.gguf", chat_template=CHATML, file_type=15, metadata=extra)
    info = read_info([path])
    assert (info.name, info.quant, info.chat_template) == ("tiny", "Q4_K_M", CHATML)
    assert info.sampling == {"temp": pytest.approx(0.2), "top_k": 64}
    assert (info.n_expert, info.n_expert_used) == (8, 2)
    assert info.n_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("file_type", "quant"),
    [(0, "F32"), (2, "Q4_0"), (38, "MXFP4_MOE"), (32, "BF16"), (1024 + 18, "Q6_K")],
)
def test_quant_of_the_file_type(file_type: int, quant: str) -> None:
    assert info_of(GgufBuilder().add("general.file_type", file_type)).quant == quant


def test_quant_falls_back_to_most_of_the_bytes() -> None:
    builder = GgufBuilder().tensor("a", (256, 4), 12).tensor("b", (8,), 0)
    assert info_of(builder).quant == "Q4_K"
    assert info_of(builder.add("general.file_type", 9999)).quant == "Q4_K"
    assert info_of(GgufBuilder()).quant is None


def nextn(architecture: str, block: int) -> GgufBuilder:
    builder = GgufBuilder(architecture).add(f"{architecture}.block_count", 25)
    builder.add(f"{architecture}.nextn_predict_layers", 1)
    return builder.tensor(f"blk.{block}.attn_q.weight", (8, 8))


@pytest.mark.parametrize(
    ("builder", "kind"),
    [
        (GgufBuilder("llama"), "model"),
        (GgufBuilder("clip").add("clip.vision.block_count", 0), "projector"),
        (GgufBuilder("llava").add("general.type", "mmproj"), "projector"),
        (GgufBuilder("llama").add("general.type", "adapter"), "adapter"),
        (GgufBuilder("gemma4-assistant"), "drafter"),
        (GgufBuilder("eagle3"), "drafter"),
        (nextn("qwen35", 24), "drafter"),
        (nextn("qwen35", 0).tensor("blk.24.nextn.eh_proj.weight", (8, 8)), "model"),
        (GgufBuilder("bert"), "embedder"),
        (GgufBuilder("nomic-bert").add("nomic-bert.pooling_type", 1), "embedder"),
        (GgufBuilder("qwen3").add("qwen3.pooling_type", 3), "embedder"),
        (GgufBuilder("qwen3").add("qwen3.pooling_type", 0), "model"),
        (GgufBuilder("qwen3").add("qwen3.pooling_type", 4), "reranker"),
        (GgufBuilder("bert").tensor("cls.output.weight", (8, 1)), "reranker"),
    ],
)
def test_kind(builder: GgufBuilder, kind: str) -> None:
    assert info_of(builder).kind == kind


def test_per_layer_arrays_give_their_largest() -> None:
    builder = GgufBuilder().add("llama.attention.sliding_window", [0, 512, 0])
    assert info_of(builder).n_swa == 512


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        (GgufBuilder(None), "no model"),
        (GgufBuilder(None).add("general.type", "imatrix"), "importance matrix"),
    ],
)
def test_files_without_a_model(builder: GgufBuilder, words: str) -> None:
    with pytest.raises(GgufError, match=words):
        info_of(builder)


class TestShards:
    def test_together_they_equal_the_single_file(self, tmp_path: Path) -> None:
        builder = tiny_llama_builder(chat_template=CHATML)
        paths = write_shards(builder, tmp_path, "tiny-F16", 3)
        whole = info_of(builder)
        info = read_info(list(reversed(paths)))
        assert info.n_bytes == sum(path.stat().st_size for path in paths)
        assert (info.n_params, info.tensor_bytes) == (whole.n_params, whole.tensor_bytes)
        assert (info.quant_mix, info.name) == (whole.quant_mix, whole.name)
        assert [t.name for t in info.header.tensors] == [t.name for t in whole.header.tensors]

    def test_one_alone_is_not_a_model(self, tmp_path: Path) -> None:
        paths = write_shards(tiny_llama_builder(), tmp_path, "m", 3)
        for some in (paths[:1], paths[:2], paths[1:], [paths[0], paths[0], paths[1]]):
            with pytest.raises(GgufError, match="do not belong together"):
                read_info(some)

    def test_of_another_model(self) -> None:
        ours = split_builder(tiny_llama_builder(), 2)
        theirs = split_builder(tiny_llama_builder(n_layers=3), 2)
        headers = [read_header(BytesSource(b.build())) for b in (ours[0], theirs[1])]
        with pytest.raises(GgufError, match="do not belong together"):
            build_info(headers, 1)

    def test_that_hold_one_tensor_twice(self) -> None:
        builder = tiny_llama_builder()
        ours = split_builder(builder, 2)
        ours[1].specs[-1] = builder.specs[0]
        again = GgufBuilder(None)
        again.pairs = ours[1].pairs
        for spec in ours[1].specs:
            again.tensor(*spec)
        headers = [read_header(BytesSource(b.build())) for b in (ours[0], again)]
        with pytest.raises(GgufError) as caught:
            build_info(headers, 1)
        assert "in two of them" in str(caught.value.why)

    def test_none_at_all(self) -> None:
        with pytest.raises(ValueError, match="no headers"):
            build_info([], 0)

    def test_with_wrong_counts(self) -> None:
        shards = split_builder(tiny_llama_builder(), 2)
        for key, value, type_name in (
            ("split.tensors.count", 99, "int32"),
            ("split.count", 2**16 - 1, "uint16"),
            ("split.no", 7, "uint16"),
        ):
            shard = GgufBuilder(None)
            settings = {"split.no": 1, "split.count": 2, "split.tensors.count": 20, key: value}
            for name, number in settings.items():
                shard.add(name, number, type_name if name == key else "int32")
            for spec in split_builder(tiny_llama_builder(), 2)[1].specs:
                shard.tensor(*spec)
            headers = [read_header(BytesSource(b.build())) for b in (shards[0], shard)]
            with pytest.raises(GgufError, match="do not belong together"):
                build_info(headers, 1)

    def test_are_found_beside_each_other(self, tmp_path: Path) -> None:
        paths = write_shards(tiny_llama_builder(), tmp_path, "m", 3)
        assert find_shards(paths[1]) == tuple(paths)
        assert find_shards(tmp_path / "x.gguf") == (tmp_path / "x.gguf",)
        paths[2].unlink()
        with pytest.raises(NotFoundError, match="00003"):
            find_shards(paths[0])

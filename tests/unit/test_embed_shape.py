"""What a header says about vectors and scores, and what is refused before the library sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmrun.engine.embed_shape import (
    EmbedOptions,
    EmbedShape,
    check_embedder,
    embedding_kind,
    shape_context,
)
from llmrun.errors import EngineError, UsageError
from llmrun.gguf.info import read_info
from llmrun.gguf.types import ModelInfo
from tests.fakes.gguf_builder import tiny_llama
from tests.fakes.tiny_bert import TinyBert
from tests.fakes.tiny_mamba import tiny_mamba
from tests.fakes.tiny_qwen3 import tiny_qwen3


def bert(folder: Path, **changes: object) -> ModelInfo:
    return read_info([TinyBert(**changes).write(folder / "bert.gguf")])  # type: ignore[arg-type]


def llama(folder: Path, metadata: dict[str, object] | None = None, **changes: int) -> ModelInfo:
    return read_info([tiny_llama(folder / "llama.gguf", metadata=metadata, **changes)])


def shape(info: ModelInfo, **options: object) -> EmbedShape:
    return shape_context(info, EmbedOptions(**options))  # type: ignore[arg-type]


def test_kinds_by_header(tmp_path: Path) -> None:
    assert embedding_kind(bert(tmp_path)) == "embedding"
    assert embedding_kind(bert(tmp_path, pooling_type=None)) == "embedding"
    assert embedding_kind(bert(tmp_path, pooling_type=4, classifier=True)) == "reranker"
    assert embedding_kind(bert(tmp_path, pooling_type=None, classifier=True)) == "reranker"
    assert embedding_kind(llama(tmp_path)) == "chat"
    assert embedding_kind(llama(tmp_path, {"llama.pooling_type": 3})) == "embedding"
    assert embedding_kind(read_info([tiny_qwen3(tmp_path / "q.gguf")])) == "reranker"


@pytest.mark.parametrize(
    ("number", "pooling"),
    [(1, "mean"), (2, "cls"), (3, "last"), (None, "mean"), (0, "mean"), (9, "mean")],
)
def test_pooling_of_an_encoder(tmp_path: Path, number: int | None, pooling: str) -> None:
    assert shape(bert(tmp_path, pooling_type=number)).pooling == pooling


@pytest.mark.parametrize(("number", "pooling"), [(1, "mean"), (2, "cls"), (3, "last"), (0, "last")])
def test_pooling_of_a_decoder(tmp_path: Path, number: int, pooling: str) -> None:
    assert shape(llama(tmp_path, {"llama.pooling_type": number})).pooling == pooling


def test_pooling_where_nothing_is_said_or_the_user_says_it(tmp_path: Path) -> None:
    assert shape(llama(tmp_path)).pooling == "last"
    assert shape(llama(tmp_path), pooling="mean").pooling == "mean"
    assert shape(llama(tmp_path, {"llama.attention.causal": False})).pooling == "mean"
    assert shape(bert(tmp_path, classifier=True, pooling_type=None)).pooling == "rank"
    assert shape(bert(tmp_path, classifier=True, pooling_type=1)).pooling == "rank"
    assert shape(bert(tmp_path, classifier=True), pooling="cls").pooling == "cls"


def test_scores_need_a_classifier_of_the_right_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        shape(llama(tmp_path), pooling="rank")
    with pytest.raises(UsageError):
        shape(bert(tmp_path, pooling_type=4))
    three = bert(tmp_path, classifier=True, n_classes=3, labels=("a", "b", "c"))
    assert shape(three).pooling == "rank"
    with pytest.raises(EngineError):
        shape(bert(tmp_path, classifier=True, n_classes=1, labels=("a", "b")))
    with pytest.raises(EngineError):
        shape(bert(tmp_path, classifier=True, n_classes=2))


def test_an_encoder_gets_a_batch_for_its_longest_input(tmp_path: Path) -> None:
    found = shape(bert(tmp_path, n_ctx_train=2000))
    assert (found.n_ctx, found.n_ubatch, found.n_pack, found.is_whole) == (2000, 2000, 512, True)
    found = shape(bert(tmp_path, n_ctx_train=2000), n_ctx=100, n_batch=64)
    assert (found.n_ctx, found.n_ubatch, found.n_pack) == (100, 100, 64)


def test_a_decoder_reads_long_inputs_in_pieces(tmp_path: Path) -> None:
    found = shape(llama(tmp_path))
    assert (found.n_ctx, found.n_cells, found.n_ubatch) == (2048, 2048, 512)
    assert not found.is_whole
    found = shape(llama(tmp_path, {"llama.attention.causal": False}))
    assert (found.n_ubatch, found.is_whole) == (2048, True)
    found = shape(llama(tmp_path), n_ctx=100)
    assert (found.n_ctx, found.n_cells) == (100, 512)


def test_no_input_is_longer_than_what_the_model_was_trained_for(tmp_path: Path) -> None:
    assert shape(bert(tmp_path, n_ctx_train=64), n_ctx=4096).n_ctx == 64
    assert shape(llama(tmp_path, n_ctx_train=300), n_ctx=4096).n_ctx == 300
    assert shape(llama(tmp_path, n_ctx_train=100_000)).n_ctx == 8192
    assert shape(llama(tmp_path, n_ctx_train=100_000), n_ctx=20_000).n_ctx == 20_000


def test_a_large_vocabulary_makes_batches_small(tmp_path: Path) -> None:
    """The library keeps a row of logits for each token of a batch."""
    info = replace(llama(tmp_path), n_vocab=262_144)
    assert shape(info).n_pack == 256
    whole = llama(tmp_path, {"llama.attention.causal": False}, n_ctx_train=9000)
    whole = replace(whole, n_vocab=262_144)
    assert shape(whole).n_ctx == 2048
    assert shape(whole, n_ctx=4096).n_ctx == 4096


def test_flash_attention_is_left_off_while_scores_are_small(tmp_path: Path) -> None:
    assert shape(bert(tmp_path)).flash_attn == "off"
    assert shape(bert(tmp_path), flash_attn="on").flash_attn == "on"
    assert shape(bert(tmp_path, n_ctx_train=5000)).flash_attn == "auto"
    assert shape(llama(tmp_path), type_v="q8_0").flash_attn == "auto"


def test_recurrent_models_gain_nothing_from_many_sequences(tmp_path: Path) -> None:
    assert shape(read_info([tiny_mamba(tmp_path / "m.gguf")])).n_seq_max == 1


@pytest.mark.parametrize("options", [{"n_ctx": 0}, {"n_batch": 0}, {"n_seq_max": 0}])
def test_absurd_options_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        shape(llama(tmp_path), **options)


def test_a_vector_length_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        shape(llama(tmp_path, {"llama.embedding_length_out": 4096}))
    assert shape(llama(tmp_path, {"llama.embedding_length_out": 64})).pooling == "last"


@pytest.mark.parametrize("kind", ["projector", "adapter", "drafter"])
def test_what_is_no_model_of_its_own_is_refused(tmp_path: Path, kind: str) -> None:
    info = llama(tmp_path)
    check_embedder(tmp_path / "llama.gguf", info)
    with pytest.raises(UsageError, match=kind):
        check_embedder(tmp_path / "llama.gguf", replace(info, kind=kind))

"""Vectors and scores of real files against llama.cpp driven plainly, and against a BERT computed
without it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmrun.engine.embed_backend import open_embed_backend
from llmrun.engine.embed_shape import EmbedOptions
from llmrun.engine.embedder import Embedder
from llmrun.engine.rank_prompt import rank_prompt
from llmrun.errors import ContextOverflowError, EngineError, UsageError
from llmrun.gguf.info import read_info
from tests.fakes.gguf_builder import tiny_llama
from tests.fakes.models import smollm2_path
from tests.fakes.plain_embeddings import PlainEmbeddings, cosine
from tests.fakes.tiny_bert import CLS, SEP, TinyBert
from tests.fakes.tiny_mamba import tiny_mamba
from tests.fakes.tiny_qwen3 import tiny_qwen3

TEXTS = [
    "The cat sat on the mat.",
    "hello",
    "Stock prices fell sharply on Monday after the bank had raised its rates again.",
    "A dog barked at the moon last night.",
    "What is the capital of France?",
]
# Rounding of 4-bit kernels, which differs with the number of rows that are computed together.
SAME = 0.999


def open_model(path: Path, **options: object) -> Embedder:
    options.setdefault("n_threads", 1)
    options.setdefault("steady_threads", False)
    return Embedder.open([path], EmbedOptions(**options))  # type: ignore[arg-type]


def tokenize(embedder: Embedder, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = embedder.tokenizer
    return [tokenizer.tokenize(text, add_special=True, parse_special=False) for text in texts]


def check_close(found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> None:
    for row, expected in zip(found, wanted, strict=True):
        assert row == pytest.approx(list(expected), rel=0.01, abs=0.01)


# ---- a real model


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_real_models_vectors(pooling: str) -> None:
    path = smollm2_path()
    with open_model(path, pooling=pooling, n_ctx=256, n_batch=64) as embedder:
        assert (embedder.n_embd, embedder.n_ctx, embedder.pooling) == (576, 256, pooling)
        # The last is longer than a batch, so that it is put together of pieces.
        inputs = tokenize(embedder, [*TEXTS, " ".join(TEXTS * 3)])
        assert 64 < len(inputs[-1]) <= 256
        alone = [embedder.embed([tokens])[0] for tokens in inputs]
        together = embedder.embed(inputs)
        assert together[:3] == embedder.embed(inputs)[:3]
    with PlainEmbeddings(path, pooling, n_ctx=256) as plain:
        wanted = [plain.embed(tokens) for tokens in inputs]
    assert min(map(cosine, alone, wanted)) > 0.9999
    assert min(map(cosine, together, wanted)) > SAME
    # The comparison would tell: other texts are far away.
    assert cosine(alone[0], alone[2]) < SAME - 0.001


def test_many_threads_ask_a_real_model() -> None:
    with open_model(smollm2_path(), n_ctx=256) as embedder:
        inputs = tokenize(embedder, TEXTS)
        wanted = [embedder.embed([tokens])[0] for tokens in inputs]

        def ask(i: int) -> float:
            chosen = [inputs[(i + k) % 5] for k in range(1 + i % 3)]
            found = embedder.embed(chosen)
            return min(cosine(row, wanted[(i + k) % 5]) for k, row in enumerate(found))

        with ThreadPoolExecutor(8) as pool:
            assert min(pool.map(ask, range(12))) > SAME


def test_closing_a_real_model_while_it_computes() -> None:
    embedder = open_model(smollm2_path(), n_ctx=4096)
    long = [100 + i * 7919 % 40000 for i in range(4000)]
    futures = [embedder.submit([long]) for _ in range(3)]
    while embedder.state != "running":
        threading.Event().wait(0.001)
    embedder.close()
    for future in futures:
        with pytest.raises(EngineError, match="closed"):
            future.result(60)


def test_a_process_ends_well_under_a_running_computation() -> None:
    code = (
        "import atexit, sys; from pathlib import Path\n"
        "from llmrun.engine.embedder import Embedder, EmbedOptions\n"
        "atexit.register(lambda: print(embedder.state))  # the last thing of all\n"
        "embedder = Embedder.open([Path(sys.argv[1])], EmbedOptions(n_ctx=4096, n_threads=1))\n"
        "assert 'numpy' not in sys.modules\n"
        "embedder.submit([[100 + i for i in range(4000)]])\n"
        "while embedder.state != 'running': pass\n"
    )
    command = [sys.executable, "-c", code, str(smollm2_path())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "closed\n")


# ---- an encoder


@pytest.mark.parametrize("flash_attn", ["auto", "on"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_berts_vectors(tmp_path: Path, pooling: str, flash_attn: str) -> None:
    """Every token looks at every other one of its own text, and at none of another's."""
    bert = TinyBert(pooling_type={"mean": 1, "cls": 2}[pooling])
    with open_model(bert.write(tmp_path / "bert.gguf"), flash_attn=flash_attn) as embedder:
        assert (embedder.pooling, embedder.n_ctx, embedder.n_embd) == (pooling, 64, 32)
        texts = ["the cat sat on the mat.", "a dog ran", "what is the moon?", "a"]
        inputs = [*tokenize(embedder, texts), [CLS] * 64]
        assert inputs[1][0] == CLS
        assert inputs[1][-1] == SEP
        found = embedder.embed(inputs)
        check_close([embedder.embed([tokens])[0] for tokens in inputs], found)
    rows = [bert.rows(tokens) for tokens in inputs]
    check_close(found, [row.mean(axis=0) if pooling == "mean" else row[0] for row in rows])


def test_an_input_longer_than_berts_positions_is_refused(tmp_path: Path) -> None:
    path = TinyBert(n_ctx_train=64).write(tmp_path / "bert.gguf")
    with open_model(path, n_ctx=512) as embedder:
        with pytest.raises(ContextOverflowError) as caught:
            embedder.embed([[CLS] * 65])
        assert caught.value.n_ctx == 64
        assert len(embedder.embed([[CLS] * 64])[0]) == 32


def test_more_inputs_than_a_batch_has_room_for(tmp_path: Path) -> None:
    bert = TinyBert(pooling_type=2)
    inputs = [[CLS, 5 + i % 10, 6 + i % 7, *[8] * (i % 20), SEP] for i in range(150)]
    with open_model(bert.write(tmp_path / "bert.gguf"), n_seq_max=16) as embedder:
        found = embedder.embed(inputs)
    check_close(found, [bert.rows(tokens)[0] for tokens in inputs])


def test_a_decoder_that_looks_both_ways(tmp_path: Path) -> None:
    """Its long inputs need one batch: in pieces the first tokens would not see the last."""
    path = tiny_llama(tmp_path / "both.gguf", metadata={"llama.attention.causal": False})
    one_way = tiny_llama(tmp_path / "one.gguf")
    tokens = [300 + i * 7 % 200 for i in range(700)]
    changed = [*tokens[:-1], 301]
    with open_model(path, pooling="cls", n_ctx=1024) as embedder:
        first, other = (embedder.embed([one])[0] for one in (tokens, changed))
        check_close(
            embedder.embed([tokens[:30], tokens[30:70]])[1:], embedder.embed([tokens[30:70]])
        )
    assert first != other
    with PlainEmbeddings(path, "cls") as plain:
        check_close([first, other], [plain.embed(tokens), plain.embed(changed)])
    with open_model(one_way, pooling="cls", n_ctx=1024) as embedder:
        first, other, start = (embedder.embed([one])[0] for one in (tokens, changed, tokens[:1]))
    assert first == other
    check_close([first], [start])


def test_a_recurrent_models_texts_leave_nothing_behind(tmp_path: Path) -> None:
    path = tiny_mamba(tmp_path / "mamba.gguf")
    inputs = [[5 + i * k % 300 for i in range(40 + 3 * k)] for k in range(1, 6)]
    for pooling in ("last", "mean"):
        with open_model(path, pooling=pooling, n_ctx=512) as embedder:
            found = embedder.embed(inputs)
            assert found == embedder.embed(inputs)
        with PlainEmbeddings(path, pooling) as plain:
            check_close(found, [plain.embed(tokens) for tokens in inputs])


# ---- rerankers


def test_a_rerankers_scores(tmp_path: Path) -> None:
    bert = TinyBert(pooling_type=4, classifier=True)
    with open_model(bert.write(tmp_path / "rank.gguf")) as embedder:
        assert (embedder.pooling, embedder.n_embd) == ("rank", 1)
        assert not embedder.facts.has_probabilities
        documents = ["the cat sat on the mat", "a dog ran", "[SEP] moon"]
        pairs = [
            rank_prompt(embedder.tokenizer, embedder.facts, "what is a cat", document)
            for document in documents
        ]
        assert [pair.count(SEP) for pair in pairs] == [2, 2, 2]
        found = embedder.rank(pairs)
        with pytest.raises(UsageError):
            embedder.embed(pairs)
    assert found == pytest.approx([bert.scores(pair)[0] for pair in pairs], abs=0.01)


def test_a_classifier_with_many_labels(tmp_path: Path) -> None:
    labels = ("contradiction", "neutral", "relevant")
    bert = TinyBert(pooling_type=4, classifier=True, n_classes=3, labels=labels)
    pairs = [[CLS, 5 + i, SEP, 9, SEP] for i in range(4)]
    with open_model(bert.write(tmp_path / "rank.gguf")) as embedder:
        assert embedder.facts.labels == labels
        found = embedder.rank(pairs)
    assert found == pytest.approx([bert.scores(pair)[2] for pair in pairs], abs=0.01)


def test_a_generative_reranker_reads_its_template_to_the_end(tmp_path: Path) -> None:
    path = tiny_qwen3(tmp_path / "rank.gguf")
    with open_model(path, n_ctx=1024) as embedder:
        pairs = [
            rank_prompt(embedder.tokenizer, embedder.facts, "bade", document)
            for document in ("bo ba", "du" * 100, "du" * 600, "x<|im_end|>")
        ]
        assert [embedder.tokenizer.is_control(token) for token in pairs[3]].count(True) == 2
        assert 512 < len(pairs[2]) <= 1024
        assert embedder.facts.has_probabilities
        found = embedder.rank(pairs)
    with PlainEmbeddings(path, "rank") as plain:
        rows = [plain.embed(pair) for pair in pairs]
    assert found == pytest.approx([row[1] for row in rows], abs=0.01)
    assert [sum(row) for row in rows] == pytest.approx([1.0] * 4)


# ---- what must not reach the library


def test_wrong_calls_raise_where_the_library_would_abort(tmp_path: Path) -> None:
    path = TinyBert().write(tmp_path / "bert.gguf")
    backend = open_embed_backend(path, read_info([path]), EmbedOptions(n_seq_max=4, n_threads=1))
    try:
        for inputs in ([], [[]], [[CLS]] * 5, [[-1]], [[1 << 20]], [[CLS] * 65], [[CLS] * 400] * 2):
            with pytest.raises(EngineError):
                backend.compute(inputs)
        assert backend.compute([[CLS, SEP]]) is not None
        backend.request_abort()
        assert backend.compute([[CLS, SEP]]) is None
    finally:
        backend.close()
        backend.close()


def test_weights_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    bert = TinyBert()
    bert.weights["blk.1.layer_output_norm.weight"][0] = float("nan")
    path = bert.write(tmp_path / "bert.gguf")
    with open_model(path) as embedder, pytest.raises(EngineError, match="numbers"):
        embedder.embed([[CLS, SEP], [CLS]])

"""Vectors and scores: lengths, dimensions, inputs that are too long."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from llmrun.engine.embedder import Embedder
from llmrun.errors import ContextOverflowError, UsageError
from llmrun.server.embeddings import embed, rerank, scale
from llmrun.server.types import ApiError, EmbeddingRequest, RerankRequest
from tests.fakes.fake_embed_backend import FakeEmbedBackend, ideal_row


@pytest.fixture
def backend() -> FakeEmbedBackend:
    return FakeEmbedBackend()


@pytest.fixture
def embedder(backend: FakeEmbedBackend) -> Iterator[Embedder]:
    made = Embedder(backend)
    yield made
    made.close()


def request(*inputs: Any, **options: Any) -> EmbeddingRequest:
    return EmbeddingRequest("m", inputs, **options)


def test_vectors_have_length_1_and_come_in_order(embedder: Embedder) -> None:
    vectors, n_tokens = embed(embedder, request("abc", (5, 6), "z"))
    assert n_tokens == 6
    rows = [ideal_row(tokens) for tokens in (b"abc", (5, 6), b"z")]
    for vector, row in zip(vectors, rows, strict=True):
        assert vector == pytest.approx([value / math.hypot(*row) for value in row])
        assert math.hypot(*vector) == pytest.approx(1)


def test_fewer_dimensions_are_the_first_ones_scaled_again(embedder: Embedder) -> None:
    ((first, second),), _ = embed(embedder, request("abc", dimensions=2))
    row = ideal_row(b"abc")[:2]
    assert (first, second) == pytest.approx([value / math.hypot(*row) for value in row])
    assert len(embed(embedder, request("a", dimensions=3))[0][0]) == 3
    with pytest.raises(ApiError) as caught:
        embed(embedder, request("a", dimensions=4))
    assert (caught.value.status, caught.value.param) == (400, "dimensions")


def test_what_is_too_long_is_refused_or_cut(embedder: Embedder, backend: FakeEmbedBackend) -> None:
    long = "a" * (embedder.n_ctx - 1) + "bcd"
    with pytest.raises(ContextOverflowError):
        embed(embedder, request("x", long))
    assert backend.batches == []  # nothing is worked on in vain
    _, n_tokens = embed(embedder, request(long, truncate=True))
    assert n_tokens == embedder.n_ctx
    # The last token stays: pooling may read it.
    assert bytes(backend.batches[0][0]) == b"a" * (embedder.n_ctx - 1) + b"d"


def test_an_empty_input_is_refused(embedder: Embedder) -> None:
    for each in ("", ()):
        with pytest.raises(UsageError, match="empty"):
            embed(embedder, request("a", each))


def test_what_spells_a_special_token_is_text(embedder: Embedder, backend: FakeEmbedBackend) -> None:
    embed(embedder, request("</s>"))
    assert bytes(backend.batches[0][0]) == b"</s>"


def test_a_vector_of_zeros_stays() -> None:
    assert scale([0.0, 0.0]) == [0.0, 0.0]
    assert scale([3.0, 4.0]) == pytest.approx([0.6, 0.8])


def test_documents_have_scores_in_their_order() -> None:
    backend = FakeEmbedBackend(pooling="rank")
    with Embedder(backend) as embedder:
        scores, n_tokens = rerank(embedder, RerankRequest("m", "a", ("b", "ccc", "d")))
        pairs = [tokens for batch in backend.batches for tokens in batch]
        assert len(scores) == len(pairs) == 3
        assert n_tokens == sum(map(len, pairs))
        assert all(
            document in bytes(t for t in pair if t < 256)
            for document, pair in zip((b"b", b"ccc", b"d"), pairs, strict=True)
        )
        with pytest.raises(ContextOverflowError):
            rerank(embedder, RerankRequest("m", "a", ("b", "c" * 200)))

"""Texts to vectors and documents to scores, on a loaded model. Blocks: for a worker thread."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TypeVar

from llmrun.engine.embedder import Embedder, rank_prompt
from llmrun.errors import ContextOverflowError, UsageError
from llmrun.server.types import ApiError, EmbeddingRequest, RerankRequest

T = TypeVar("T")


class Hold:
    """What one request has an embedder compute. Either side may come first: what is begun after
    `let_go` is taken back at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._future: Future[object] | None = None
        self._is_gone = False

    def wait(self, future: Future[T]) -> T:
        """Its result. Raises CancelledError after `let_go`."""
        with self._lock:
            self._future = future  # type: ignore[assignment]
            if self._is_gone:
                future.cancel()
        return future.result()

    def let_go(self) -> None:
        """From any thread: nobody needs the result any more."""
        with self._lock:
            self._is_gone = True
            if self._future is not None:
                self._future.cancel()


def embed(
    embedder: Embedder, request: EmbeddingRequest, hold: Hold | None = None
) -> tuple[list[list[float]], int]:
    """A vector of length 1 for each input, and the number of tokens of all of them.

    Fewer `dimensions` are the first ones, scaled again: what models trained for it expect.
    Raises ApiError and LlmrunErrors.
    """
    n_embd = embedder.n_embd
    if request.dimensions is not None and request.dimensions > n_embd:
        raise ApiError(
            "invalid_request",
            f"dimensions must not be more than the model's {n_embd}",
            param="dimensions",
        )
    inputs = [_tokens_of(embedder, each, request.truncate) for each in request.inputs]
    n_tokens = sum(len(tokens) for tokens in inputs)
    vectors = (hold or Hold()).wait(embedder.submit(inputs))
    return [scale(list(vector[: request.dimensions])) for vector in vectors], n_tokens


def rerank(
    embedder: Embedder, request: RerankRequest, hold: Hold | None = None
) -> tuple[list[float], int]:
    """A score from 0 to 1 for each document, in their order, and the number of tokens of all."""
    pairs = [
        rank_prompt(embedder.tokenizer, embedder.facts, request.query, document)
        for document in request.documents
    ]
    for pair in pairs:
        if len(pair) > embedder.n_ctx:
            raise ContextOverflowError(len(pair), embedder.n_ctx)
    scores = (hold or Hold()).wait(embedder.submit_rank(pairs))
    if not embedder.facts.has_probabilities:
        scores = [_squash(score) for score in scores]
    return scores, sum(len(pair) for pair in pairs)


def _squash(score: float) -> float:
    """The logistic function: what a classifier's output stands for."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    small = math.exp(max(score, -700.0))
    return small / (1 + small)


def scale(vector: list[float]) -> list[float]:
    """The vector with length 1; one of zeros stays."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length > 0 else vector


def _tokens_of(embedder: Embedder, text: str | tuple[int, ...], truncate: bool) -> Sequence[int]:
    tokens: Sequence[int] = text if isinstance(text, tuple) else _tokenize(embedder, text)
    if not tokens:
        raise UsageError("an input is empty")
    if len(tokens) <= embedder.n_ctx:
        return tokens
    if not truncate:
        raise ContextOverflowError(len(tokens), embedder.n_ctx)
    # The last token of a cut input stays what it is (often an end token that pooling reads).
    return [*tokens[: embedder.n_ctx - 1], tokens[-1]]


def _tokenize(embedder: Embedder, text: str) -> list[int]:
    # What spells a special token in a stranger's text is text.
    return embedder.tokenizer.tokenize(text, add_special=True, parse_special=False)

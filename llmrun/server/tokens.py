"""Texts to tokens and back, for `/tokenize` and `/detokenize`. Blocks: for a worker thread."""

from __future__ import annotations

from collections.abc import Iterator

from llmrun.engine.types import Tokenizer
from llmrun.server.types import ApiError
from llmrun.server.wire_extras import (
    DetokenizeRequest,
    TokenizeRequest,
    encode_detokenize,
    encode_tokenize,
)


def tokenize(tokenizer: Tokenizer, request: TokenizeRequest) -> Iterator[bytes]:
    """The answer's JSON in pieces: the tokens of a text, with each one's bytes where they are
    wanted."""
    tokens = tokenizer.tokenize(
        request.content, add_special=request.add_special, parse_special=request.parse_special
    )
    piece_of: dict[int, bytes] = {}
    if request.with_pieces:
        piece_of = {token: tokenizer.piece(token) for token in set(tokens)}
    return encode_tokenize(request, tokens, [piece_of[each] for each in tokens if piece_of])


def detokenize(tokenizer: Tokenizer, request: DetokenizeRequest) -> dict[str, object]:
    """The answer's body: the text of tokens. Raises ApiError for one outside of the vocabulary."""
    for i, token in enumerate(request.tokens):
        if token >= tokenizer.n_vocab:
            raise ApiError(
                "invalid_request",
                f"tokens[{i}] is not in the vocabulary of {tokenizer.n_vocab} tokens",
                param=f"tokens[{i}]",
            )
    piece_of = {token: tokenizer.piece(token) for token in set(request.tokens)}
    data = b"".join([piece_of[token] for token in request.tokens])
    return encode_detokenize(data.decode("utf-8", "replace"))

"""Texts that are much longer than what anybody writes, and made to be slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmrun.chat.protect import tokenize_plain
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions
from llmrun.engine.vocabulary import LlamaTokenizer
from tests.fakes.models import smollm2_path

LITERAL = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[LlamaTokenizer]:
    with Engine.open([smollm2_path()], EngineOptions(n_ctx=128)) as engine:
        assert isinstance(engine.tokenizer, LlamaTokenizer)
        yield engine.tokenizer


def test_a_literal_is_found_wherever_a_long_text_is_cut(tokenizer: LlamaTokenizer) -> None:
    for n_before in range(32 * 1024 - len(LITERAL) - 1, 32 * 1024 + 2):
        found = tokenizer.special_literals("a" * n_before + LITERAL + "b" * 40_000)
        assert [each.text for each in found] == [LITERAL], n_before
    assert tokenizer.special_literals("a" * 100_000) == ()


def test_many_literals_are_not_read_at_once(
    tokenizer: LlamaTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library takes time by the square of their number in one text."""
    calls: list[int] = []
    tokenize = LlamaTokenizer.tokenize

    def spy(
        self: LlamaTokenizer, text: str, *, add_special: bool, parse_special: bool
    ) -> list[int]:
        if parse_special:
            calls.append(len(text))
        return tokenize(self, text, add_special=add_special, parse_special=parse_special)

    monkeypatch.setattr(LlamaTokenizer, "tokenize", spy)
    tokens = tokenize_plain(LITERAL * 20_000, tokenizer)
    assert not any(map(tokenizer.is_control, tokens))
    assert max(calls) < 40_000 and len(calls) < 10
    assert b"".join(map(tokenizer.piece, tokens[-7:])).decode() == LITERAL

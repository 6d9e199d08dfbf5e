"""Prompts that are several times too long are refused before all of them is read."""

from __future__ import annotations

import pytest

from llmrun.chat.messages import Message
from llmrun.engine.types import SamplingParams
from llmrun.errors import ContextOverflowError
from llmrun.server.prompts import ChatModel
from llmrun.server.types import ChatRequest, Generation, TextRequest
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.fake_tokenizer import FakeTokenizer

N_CTX = 100


class Spy(FakeTokenizer):
    def __init__(self) -> None:
        super().__init__()
        self.n_read = 0

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        self.n_read += len(text)
        return super().tokenize(text, add_special=add_special, parse_special=parse_special)


def make() -> tuple[ChatModel, Spy]:
    tokenizer = Spy()
    return ChatModel(FakeEngine(tokenizer=tokenizer, n_ctx=N_CTX), SamplingParams()), tokenizer


def chat(*messages: tuple[str, str]) -> ChatRequest:
    return ChatRequest(Generation(), tuple(Message(role, text) for role, text in messages))


def test_it_is_told_by_a_part_with_an_estimate() -> None:
    for request in (
        chat(("system", "a"), ("user", "b" * 100_000)),
        chat(*[("user", "b" * 1000)] * 100),
    ):
        model, tokenizer = make()
        tokenizer.n_read = 0
        with pytest.raises(ContextOverflowError) as caught:
            model.prepare_chat(request)
        assert tokenizer.n_read < 5000
        assert caught.value.n_ctx == N_CTX
        assert 90_000 < caught.value.n_prompt < 110_000
        model.close()


def test_so_is_plain_text() -> None:
    model, tokenizer = make()
    with pytest.raises(ContextOverflowError):
        model.prepare_text(TextRequest(Generation(), ("b" * 100_000,)))
    assert tokenizer.n_read < 5000
    model.close()


def test_a_little_too_long_is_counted() -> None:
    model, _ = make()
    with pytest.raises(ContextOverflowError) as caught:
        model.prepare_text(TextRequest(Generation(), ("b" * 150,)))
    assert caught.value.n_prompt in (150, 151)
    model.close()


def test_what_a_template_may_leave_out_does_not_count() -> None:
    model, tokenizer = make()
    with pytest.raises(ContextOverflowError):
        model.prepare_chat(chat(("user", "a"), ("assistant", "b" * 100_000), ("user", "c")))
    assert tokenizer.n_read > 100_000
    model.close()

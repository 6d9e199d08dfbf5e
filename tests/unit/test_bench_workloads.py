"""What the model is given to read while it is measured."""

from __future__ import annotations

import pytest

from llmrun.bench.workloads import Workloads, ordinary_tokens
from tests.fakes.fake_tokenizer import FakeTokenizer


def test_the_same_for_everybody_and_new_each_time() -> None:
    one, two = Workloads(FakeTokenizer()), Workloads(FakeTokenizer())
    mine = [one.fresh(64), one.fresh(64), one.after(one.fresh(8), 8), one.edit(400)]
    assert mine == [two.fresh(64), two.fresh(64), two.after(two.fresh(8), 8), two.edit(400)]
    assert mine[0][:3] != mine[1][:3]
    assert Workloads(FakeTokenizer(), seed=2).fresh(64) != mine[0]


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 65])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_exactly_as_long_as_asked(n_tokens: int, adds_bos: bool) -> None:
    tokenizer = FakeTokenizer(adds_bos=adds_bos)
    prompt = Workloads(tokenizer).fresh(n_tokens)
    assert len(prompt) == n_tokens
    if adds_bos and n_tokens:
        assert prompt[0] == tokenizer.id_of["<s>"]
    body = prompt[1:] if adds_bos else prompt
    assert not any(tokenizer.is_control(token) for token in body)


def test_ordinary_tokens_are_words() -> None:
    tokenizer = FakeTokenizer()
    words = ordinary_tokens(tokenizer)
    assert len(set(words)) == len(words) == 52
    assert all(tokenizer.piece(token).isalpha() for token in words)


class Foreign(FakeTokenizer):
    def piece(self, token: int) -> bytes:
        return b"\xe4" if token < 256 else super().piece(token)


def test_a_vocabulary_without_words_still_gives_plain_tokens() -> None:
    tokenizer = Foreign()
    words = ordinary_tokens(tokenizer)
    assert len(words) == 256 and not any(map(tokenizer.is_control, words))


def test_the_text_to_edit_says_before_what_is_asked_for() -> None:
    tokenizer = FakeTokenizer()
    workloads = Workloads(tokenizer)
    text = bytes(workloads.edit(10_000)).decode()
    last = text[-60:]
    assert text.index(last) < len(text) - 200
    assert len(workloads.edit(50)) == 50

"""A conversation that goes on in another run has the tokens it had, wherever that is safe."""

from __future__ import annotations

import pytest

from llmrun.chat.history import TokenHistory
from llmrun.chat.messages import Message
from llmrun.chat.protect import RenderedPrompt, Segment, split_known, tokenize_prompt
from llmrun.chat.session import ChatSession
from tests.fakes.fake_engine import CHATML, FakeEngine, fake_facts
from tests.fakes.fake_tokenizer import FakeTokenizer

PIECES = {270: b"ab", 271: b"x\xc3", 272: b"\xa9"}


class PairTokenizer(FakeTokenizer):
    """Plain text splits into single bytes, but the model may well write "é" or "ab" as one token:
    270 is "ab", 271 a part of "é" with what is before it."""

    @property
    def n_vocab(self) -> int:
        return 300

    def piece(self, token: int) -> bytes:
        return PIECES.get(token) or super().piece(token)

    def is_control(self, token: int) -> bool:
        return token < 270 and super().is_control(token)


def prompt_of(*parts: str | tuple[str]) -> RenderedPrompt:
    """Texts; one in a tuple is a literal."""
    return RenderedPrompt(
        tuple(Segment(p[0], True) if isinstance(p, tuple) else Segment(p, False) for p in parts)
    )


def check(prompt: RenderedPrompt, known: tuple[int, ...], n: int, tokenizer=None) -> None:
    tokenizer = tokenizer or PairTokenizer()
    n_known, rest = split_known(prompt, known, tokenizer)
    assert n_known == n
    history = TokenHistory(tokenizer)
    history.recall(known)
    tokens = history.tokenize(prompt)
    assert tokens[:n] == known[:n]
    spelled = b"".join(tokenizer.piece(token) for token in tokens)
    assert spelled.decode() == prompt.text
    if n == 0:
        assert tokens == tokenize_prompt(prompt, tokenizer)
    else:
        assert "".join(segment.text for segment in rest) == prompt.text.removeprefix(
            b"".join(tokenizer.piece(token) for token in known[:n]).decode()
        )


END = 259  # <|im_end|>


def test_other_tokens_of_the_same_text_are_kept() -> None:
    check(prompt_of("ab ab"), (270, 32), 2)
    check(prompt_of("ab<|im_end|>ab!"), (270, END, 97, 98), 4)
    check(prompt_of("ab"), (270,), 1)


def test_where_they_part_all_after_the_last_control_token_is_split_anew() -> None:
    check(prompt_of("ab<|im_end|>abc"), (270, END, 270, 100), 2)
    check(prompt_of("ab<|im_end|>ab"), (270, END, 270, 100), 2)
    check(prompt_of("abc"), (270, 100), 0)
    check(prompt_of("c"), (270,), 0)


def test_a_character_is_not_cut() -> None:
    check(prompt_of("xé"), (271, 272), 2)
    check(prompt_of("xé"), (271,), 0)
    check(prompt_of("a<|im_end|>xé"), (97, END, 271), 2)


def test_what_a_user_spells_never_becomes_a_control_token() -> None:
    """The tokens of another conversation with the very same text."""
    literal = tuple(b"<|im_end|>")
    check(prompt_of("a", ("<|im_end|>",), "b"), (97, END, 98), 0)
    check(prompt_of("a", ("<|im_end|>",), "b" * 12), (97, END, *b"bbbbbbbbbbbb"), 0)
    check(prompt_of("a", ("<|im_end|>",), "b"), (97, *literal, 98), 12)
    check(prompt_of("a<|im_end|>", ("<|im_end|>",), "b"), (97, END, END, 98), 2)
    # The other way round the text is the same, but the model never read a control token.
    n_known, _ = split_known(prompt_of("a<|im_end|>b"), (97, *literal, 98), PairTokenizer())
    history = TokenHistory(PairTokenizer())
    history.recall((97, *literal, 98))
    assert END in history.tokenize(prompt_of("a<|im_end|>b")) and n_known == 0


def test_a_bos_that_the_text_does_not_spell() -> None:
    tokenizer = FakeTokenizer(adds_bos=True)
    history = TokenHistory(tokenizer)
    history.recall((256, 97, 98))
    assert history.tokenize(prompt_of("abc")) == (256, 97, 98, 99)
    history.recall((97, 98))
    assert history.tokenize(prompt_of("abc")) == (256, 97, 98, 99)
    assert history.tokenize(prompt_of("<s>abc")) == (256, 97, 98, 99)


def test_a_session_goes_on_with_the_tokens_it_had() -> None:
    engine = FakeEngine(["ab", "fine"], tokenizer=PairTokenizer(), facts=fake_facts(CHATML))
    session = ChatSession(engine)
    list(session.send("Hi"))
    # As if the model had written "ab" as one token.
    tokens = (*session.tokens[:-2], 270)
    second = ChatSession(engine, messages=session.messages)
    second.recall(tokens)
    list(second.send("More"))
    assert engine.requests[-1].prompt[: len(tokens)] == tokens
    plain = ChatSession(engine, messages=(*session.messages, Message("user", "More")))
    list(plain.retry())
    assert 270 not in engine.requests[-1].prompt


@pytest.mark.parametrize("tokens", [(), (256,), (300,)])
def test_tokens_that_have_nothing_to_do_with_it_change_nothing(tokens: tuple[int, ...]) -> None:
    check(prompt_of("Hello ", ("</s>",), " there"), tokens, 0)

"""The tokenizer on real vocabularies."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.engine.binding import import_binding
from llmrun.engine.detokenize import IncrementalText
from llmrun.engine.types import SpecialLiteral
from llmrun.engine.vocabulary import LlamaTokenizer
from tests.fakes.models import gemma3_path, smollm2_path

PATHS = {"smol": smollm2_path, "gemma": gemma3_path}


@pytest.fixture(scope="module", params=PATHS)
def tokenizer(request: pytest.FixtureRequest) -> Iterator[LlamaTokenizer]:
    from llmrun.engine.binding import load_library

    C = load_library()
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(str(PATHS[request.param]()).encode(), params)
    yield LlamaTokenizer(C, C.llama_model_get_vocab(model))
    C.llama_model_free(model)


def encode(tokenizer: LlamaTokenizer, text: str) -> list[int]:
    return tokenizer.tokenize(text, add_special=False, parse_special=False)


def decode(tokenizer: LlamaTokenizer, tokens: list[int]) -> str:
    text = IncrementalText()
    return "".join([*(text.feed(tokenizer.piece(token)) for token in tokens), text.flush()])


def has_control(tokenizer: LlamaTokenizer, tokens: list[int]) -> bool:
    return any(tokenizer.is_control(token) for token in tokens)


@functools.cache
def bytes_without_token(tokenizer: LlamaTokenizer) -> frozenset[int]:
    """SmolLM2 has no token for some bytes (such as F1, of characters from U+40000 on): llama.cpp
    leaves them out."""
    pieces = {tokenizer.piece(token) for token in range(tokenizer.n_vocab)}
    return frozenset(byte for byte in range(256) if bytes([byte]) not in pieces)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_whole(tokenizer: LlamaTokenizer, text: str) -> None:
    """Lone surrogates, which are no text, come back as question marks."""
    missing = bytes_without_token(tokenizer)
    text = "".join(c for c in text if missing.isdisjoint(c.encode("utf-8", "replace")))
    assert decode(tokenizer, encode(tokenizer, text)) == text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("text", ["", "\0", "a\0b", "\ud800", "e\u0301", "🏳️‍🌈", "\r\n\t", "﻿x"])
def test_odd_texts(tokenizer: LlamaTokenizer, text: str) -> None:
    assert decode(tokenizer, encode(tokenizer, text)) == text.encode("utf-8", "replace").decode()


def test_long_texts_need_room_for_each_byte(tokenizer: LlamaTokenizer) -> None:
    for text in ("☃" * 3000, "a" * 20_000, "\x01" * 3000, " " * 5000, "\n" * 5000):
        assert decode(tokenizer, encode(tokenizer, text)) == text


def test_bos_is_added_on_request_and_once(tokenizer: LlamaTokenizer) -> None:
    plain = encode(tokenizer, "hi")
    with_special = tokenizer.tokenize("hi", add_special=True, parse_special=False)
    n_bos = 1 if tokenizer.adds_bos else 0
    assert with_special[n_bos:] == plain
    assert has_control(tokenizer, with_special) == tokenizer.adds_bos


def test_pieces_of_any_length_are_whole(tokenizer: LlamaTokenizer) -> None:
    longest = max((tokenizer.piece(token) for token in range(tokenizer.n_vocab)), key=len)
    assert len(longest) > 32
    assert decode(tokenizer, encode(tokenizer, longest.decode())) == longest.decode()
    hidden = tokenizer.render(
        tokenizer.tokenize("hi", add_special=True, parse_special=False)[0], special=False
    )
    assert hidden == b"" or not tokenizer.adds_bos


# ---- special tokens spelled in text


@functools.cache
def all_specials(tokenizer: LlamaTokenizer) -> dict[str, bool]:
    """By the vocabulary itself: the text of each special token, and whether it is control."""
    C = import_binding()
    found = {}
    for token in range(tokenizer.n_vocab):
        attribute = C.llama_vocab_get_attr(tokenizer._vocab, token)
        if attribute & (1 | 8 | 16) and (piece := tokenizer.piece(token)):
            found[piece.decode()] = not attribute & 16 or bool(attribute & 8)
    return found


def test_every_special_is_found_alone_and_in_a_crowd(tokenizer: LlamaTokenizer) -> None:
    specials = all_specials(tokenizer)
    assert len(specials) >= 17
    for text, is_control in [*specials.items()][:400]:
        assert SpecialLiteral(text, is_control) in tokenizer.special_literals(f"a{text}b")
    crowd = tokenizer.special_literals("x".join(specials))
    assert {literal.text: literal.is_control for literal in crowd} == specials
    assert len(crowd) == len(specials)


def test_specials_that_hide_one_another_are_all_found(tokenizer: LlamaTokenizer) -> None:
    """Where two overlap, the tokenizer matches one of them only. Both are there."""
    specials = [text for text in all_specials(tokenizer) if text.startswith("<")]
    for a, b in pairwise(specials[:60]):
        for n in range(1, min(len(a), len(b))):
            if a[-n:] == b[:n]:
                found = {literal.text for literal in tokenizer.special_literals(a + b[n:])}
                assert {a, b} <= found
    for text in specials[:20]:
        for broken in (text[1:] + text, text + text[:-1], text[:-1] + text + text[1:]):
            assert text in {literal.text for literal in tokenizer.special_literals(broken)}


@functools.cache
def parts_of(tokenizer: LlamaTokenizer) -> st.SearchStrategy[list[str]]:
    specials = st.sampled_from(sorted(all_specials(tokenizer)))
    starts = st.builds(lambda text, n: text[: n % len(text)], specials, st.integers(0, 40))
    plain = st.text(alphabet="<>|im_startend/\n\t ab", max_size=6)
    return st.lists(st.one_of(specials, starts, plain), max_size=6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_found_is_what_is_spelled(tokenizer: LlamaTokenizer, data: st.DataObject) -> None:
    text = "".join(data.draw(parts_of(tokenizer)))
    found = {literal.text: literal.is_control for literal in tokenizer.special_literals(text)}
    specials = all_specials(tokenizer).items()
    assert found == {special: control for special, control in specials if special in text}


@pytest.mark.parametrize(
    "text", ["", "Hello, world!", "a < b | c > d", "<|im_star", "im_end|>", "<>"]
)
def test_harmless_text_has_none(tokenizer: LlamaTokenizer, text: str) -> None:
    assert tokenizer.special_literals(text) == ()


def test_a_long_text_full_of_them_takes_one_pass(tokenizer: LlamaTokenizer) -> None:
    """It took minutes once: each found literal had the rest read again. Counted, not timed."""
    calls = []
    real = tokenizer.tokenize

    def counted(text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        calls.append(len(text))
        return real(text, add_special=add_special, parse_special=parse_special)

    tokenizer.tokenize = counted  # type: ignore[method-assign]
    try:
        text = "".join(all_specials(tokenizer)) + "\n\n\t\tx" * 1000
        assert tokenizer.special_literals(text)
    finally:
        del tokenizer.tokenize  # type: ignore[attr-defined]
    assert len(calls) == 1 and calls[0] <= len(text)

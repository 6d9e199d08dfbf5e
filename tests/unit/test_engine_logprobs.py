"""Log probabilities: one for each token of an answer, of the very row it was taken from."""

from __future__ import annotations

import itertools

import pytest

from llmrun.engine.loop import Engine
from llmrun.engine.types import FinishEvent, Request, SamplingParams, TextEvent, TokenLogprob
from llmrun.errors import UsageError
from tests.fakes.fake_backend import (
    FakeBackend,
    NextToken,
    copying_token,
    endless_token,
    ideal_answer,
    ideal_logprobs,
    scripted,
)
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.unit.test_engine_loop import check_books

END, IM_START = 257, 258
TOKENIZER = FakeTokenizer()


def ideal(prompt: tuple[int, ...], answer: tuple[int, ...], n_top: int) -> list[TokenLogprob]:
    """By the definition: each token after those before it."""
    found = []
    for i, token in enumerate(answer):
        held = (*prompt, *answer[:i])
        logprob, top = ideal_logprobs(held, token, n_top, TOKENIZER.n_vocab)
        shown = tuple((other, TOKENIZER.piece(other), chance) for other, chance in top)
        found.append(TokenLogprob(token, TOKENIZER.piece(token), logprob, shown))
    return found


def read_texts(engine: Engine, request: Request) -> tuple[list[TextEvent], FinishEvent]:
    *events, finish = engine.submit(request)
    assert isinstance(finish, FinishEvent)
    texts = [event for event in events if isinstance(event, TextEvent)]
    for event in texts:
        assert [p.token for p in event.logprobs] == list(event.tokens)
    return texts, finish


def all_logprobs(texts: list[TextEvent]) -> list[TokenLogprob]:
    return list(itertools.chain.from_iterable(event.logprobs for event in texts))


def ask(next_token: NextToken, request: Request, **options: object) -> list[TextEvent]:
    backend = FakeBackend(n_ctx=128, next_token=next_token, **options)  # type: ignore[arg-type]
    clock = itertools.count(1.0).__next__  # every token is an event of its own
    with Engine(backend, clock=clock) as engine:
        texts, _ = read_texts(engine, request)
    check_books(engine, backend)
    tokens = tuple(token for event in texts for token in event.tokens)
    assert request.n_logprobs is not None
    assert all_logprobs(texts) == ideal(request.prompt, tokens, request.n_logprobs)
    return texts


@pytest.mark.parametrize("n_top", [0, 1, 5, 20])
def test_each_token_has_its_own_rows_logprob(n_top: int) -> None:
    texts = ask(endless_token, Request((1, 2, 3), max_tokens=9, n_logprobs=n_top))
    assert len(all_logprobs(texts)) == 9
    assert all(len(found.top) == n_top for found in all_logprobs(texts))


def test_who_does_not_ask_gets_none_and_pays_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(n_ctx=128, next_token=endless_token)
    monkeypatch.setattr(backend, "logprobs", None)
    with Engine(backend) as engine:
        texts = [
            event
            for event in engine.submit(Request((1, 2), max_tokens=9))
            if isinstance(event, TextEvent)
        ]
    assert texts and all(event.logprobs == () for event in texts)


def test_a_prompt_in_chunks_beside_others() -> None:
    """The row within the batch is another for each of them, and at each step."""
    backend = FakeBackend(n_ctx=512, n_seq_max=3, n_batch=7, next_token=endless_token)
    requests = [
        Request(tuple(range(n, n + n // 4)), max_tokens=15, n_logprobs=n_top)
        for n, n_top in ((20, 3), (60, None), (100, 0))
    ]
    with Engine(backend, checks=True) as engine:
        with backend.held_back():
            streams = [engine.submit(request) for request in requests]
        for request, stream in zip(requests, streams, strict=True):
            texts = [event for event in stream if isinstance(event, TextEvent)]
            answer = ideal_answer(request, 512, endless_token).tokens
            n_top = request.n_logprobs
            expected = [] if n_top is None else ideal(request.prompt, answer, n_top)
            assert all_logprobs(texts) == expected
    check_books(engine, backend)


@pytest.mark.parametrize("n_seq_max", [1, 3])
def test_accepted_guesses_have_their_own_rows_too(n_seq_max: int) -> None:
    backend = FakeBackend(
        n_ctx=512, n_seq_max=n_seq_max, n_batch=24, n_outputs_max=24, next_token=copying_token
    )
    engine = Engine(
        backend, checks=True, speculative="ngram", clock=lambda: 1.0 + 0.06 * backend.n_steps
    )
    n_accepted = 0
    with engine:
        with backend.held_back():
            requests = [
                Request((n, n + 1, *range(60, 66)), max_tokens=60, n_logprobs=2)
                for n in range(n_seq_max)
            ]
            streams = [engine.submit(request) for request in requests]
        for request, stream in zip(requests, streams, strict=True):
            *events, finish = stream
            assert isinstance(finish, FinishEvent)
            n_accepted += finish.usage.n_accepted
            texts = [event for event in events if isinstance(event, TextEvent)]
            answer = ideal_answer(request, 512, copying_token).tokens
            assert all_logprobs(texts) == ideal(request.prompt, answer, 2)
    assert n_accepted > 5
    check_books(engine, backend)


# ---- beside the text


def test_an_end_token_is_not_told_of() -> None:
    texts = ask(scripted(b"hi", 2), Request((1, 2), n_logprobs=1))
    assert [found.piece for found in all_logprobs(texts)] == [b"h", b"i"]


def test_an_end_token_that_is_ignored_is_one_of_the_tokens() -> None:
    request = Request((1, 2), max_tokens=3, ignore_eog=True, n_logprobs=1)
    texts = ask(scripted([104, END, 105], 2), request)
    assert [found.piece for found in all_logprobs(texts)] == [b"h", b"</s>", b"i"]


@pytest.mark.parametrize("show", [False, True])
def test_pieces_are_whole_whatever_the_text_shows(show: bool) -> None:
    request = Request((1, 2), show_special=show, n_logprobs=0)
    texts = ask(scripted([97, IM_START, 98], 2), request)
    assert [found.piece for found in all_logprobs(texts)] == [b"a", b"<|im_start|>", b"b"]


def test_the_tokens_of_a_stop_string_are_told_of_though_their_text_is_not() -> None:
    request = Request((1, 2), stop=("</end>",), n_logprobs=1)
    texts = ask(scripted(b"one</end>two", 2), request)
    assert "".join(event.text for event in texts) == "one"
    assert b"".join(found.piece for found in all_logprobs(texts)) == b"one</end>"


def test_characters_over_several_tokens_come_with_all_their_tokens() -> None:
    texts = ask(scripted("añ€😀".encode(), 1), Request((1,), n_logprobs=0))
    pieces = [b"".join(found.piece for found in event.logprobs) for event in texts]
    assert [piece.decode() for piece in pieces] == [event.text for event in texts]
    assert [event.text for event in texts] == ["a", "ñ", "€", "😀"]


def test_several_tokens_in_one_event() -> None:
    backend = FakeBackend(n_ctx=128, next_token=endless_token)
    with Engine(backend, clock=lambda: 1.0) as engine:
        texts, finish = read_texts(engine, Request((1, 2), max_tokens=30, n_logprobs=1))
    assert len(texts) == 2  # at the first token, and at the end
    assert len(all_logprobs(texts)) == finish.usage.n_completion == 30


@pytest.mark.parametrize("n_top", [-1, 21, 1000])
def test_a_number_out_of_bounds_is_refused(n_top: int) -> None:
    with Engine(FakeBackend()) as engine, pytest.raises(UsageError, match="likely tokens"):
        engine.submit(Request((1,), SamplingParams(), n_logprobs=n_top))

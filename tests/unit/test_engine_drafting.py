"""Guesses in the shared batch: fewer steps, the same answers, nothing left behind in the cache.

By the clock of these tests a step takes as long whatever its rows, so that guesses always pay."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.loop import Engine
from llmrun.engine.types import Request, SamplingParams
from tests.fakes.fake_backend import (
    FAILING_GRAMMAR,
    FakeBackend,
    copying_token,
    endless_token,
    ideal_answer,
)
from tests.unit.test_engine_loop import check_books, read, run

PERIOD = 5


def looping_token(tokens: tuple[int, ...]) -> int:
    return 65 + len(tokens) % PERIOD


def engine_of(backend: FakeBackend, speculative: str = "ngram") -> Engine:
    return Engine(
        backend,
        speculative=speculative,  # type: ignore[arg-type]
        clock=lambda: 1.0 + 0.06 * backend.n_steps,
    )


def backend_of(**options: object) -> FakeBackend:
    given: dict[str, object] = {"n_ctx": 256, "n_batch": 32, "n_outputs_max": 32}
    return FakeBackend(**{**given, "next_token": looping_token, **options})  # type: ignore[arg-type]


def test_a_loop_takes_few_steps_and_gives_the_same_answer() -> None:
    answers, n_steps = [], []
    for speculative in ("off", "ngram", "auto"):
        backend = backend_of()
        with engine_of(backend, speculative) as engine:
            outcome = run(engine, (1, 2, 3), 100)
        answers.append((outcome.tokens, outcome.text))
        n_steps.append(backend.n_steps)
        usage = outcome.finish.usage
        assert usage.n_completion == 100
        assert 0 <= usage.n_accepted <= usage.n_drafted
        assert backend.samplers[0].n_sampled == 100  # each token is drawn once, in order
        if speculative != "off":
            assert usage.n_accepted > 60
            assert backend.n_steps + usage.n_accepted == 100
        check_books(engine, backend)
    assert answers[0] == answers[1] == answers[2]
    assert n_steps[0] == 100 and n_steps[1] < 35


def test_a_step_without_guesses_comes_first() -> None:
    """Else what one costs would be told from the first step with guesses, and be far too much."""
    backend = backend_of(n_seq_max=7)
    prompt = tuple(looping_token((0,) * n) for n in range(30))
    n_rows: list[int] = []
    with engine_of(backend) as engine:
        run(engine, prompt, 40)
        n_rows += [sum(len(chunk.tokens) for chunk in batch) for batch in backend.batches]
        n_alone = len(n_rows)
        streams = [engine.submit(Request((*prompt, 40 + i), max_tokens=40)) for i in range(7)]
        for stream in streams:
            read(stream)
    assert n_rows[:2] == [30, 1] and n_rows[2] > 4
    assert len(backend.batches) - n_alone < 40
    check_books(engine, backend)


def test_lines_that_count_on_take_few_steps() -> None:
    line = "{n}: lamp {n} of the northern arm is in good order\n"
    text = "".join(line.format(n=n) for n in range(10, 40))

    def list_token(tokens: tuple[int, ...]) -> int:
        return ord(text[len(tokens)])

    backend = backend_of(n_ctx=1600, next_token=list_token)
    prompt = tuple(map(ord, text[:200]))
    with engine_of(backend) as engine:
        outcome = run(engine, prompt, 1000)
    assert outcome.text == text[200:1200]
    assert backend.n_steps < 7 + 1000 / 12
    check_books(engine, backend)


def test_wrong_guesses_leave_the_cache_as_it_was() -> None:
    backend = backend_of(next_token=copying_token)
    request = Request((33, 34, 35, 36, 37), max_tokens=150, ignore_eog=True)
    with engine_of(backend) as engine:
        outcome = read(engine.submit(request))
        usage = outcome.finish.usage
        assert usage.n_drafted > usage.n_accepted > 20
        turn = (*request.prompt, *outcome.tokens, 50)
        again = run(engine, turn, 4)
    assert outcome.tokens == ideal_answer(request, 256, copying_token).tokens
    assert again.finish.usage.n_cached == len(turn) - 2
    ideal = ideal_answer(Request(turn, max_tokens=4), 256, copying_token)
    assert again.tokens == ideal.tokens
    check_books(engine, backend)


def test_without_taking_wrong_guesses_back_the_fake_notices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The oracle's own test."""
    backend = backend_of(next_token=copying_token)
    seq_rm = backend.seq_rm
    monkeypatch.setattr(backend, "seq_rm", lambda s, p0, p1: p0 > 0 or seq_rm(s, p0, p1))
    with engine_of(backend) as engine:
        stream = engine.submit(Request((33, 34, 35, 36, 37), max_tokens=150, ignore_eog=True))
        with pytest.raises(Exception, match="the engine stopped"):
            read(stream)
    assert "position" in backend.violations[0]


@pytest.mark.parametrize("max_tokens", [1, 2, 20, 21, 22, 23, 24, 25])
def test_an_answer_ends_where_it_should_within_a_guess(max_tokens: int) -> None:
    backend = backend_of()
    with engine_of(backend) as engine:
        outcome = run(engine, range(40, 60), max_tokens)
    assert len(outcome.tokens) == max_tokens
    assert backend.samplers[0].n_sampled == max_tokens
    # No row is computed that could not become a token.
    assert len(backend.held(0)) <= 20 + max_tokens - 1
    check_books(engine, backend)


def test_a_stop_string_within_a_guess() -> None:
    text = "".join(chr(looping_token((0,) * n)) for n in range(3, 60))
    n_before = 0

    def word(tokens: tuple[int, ...]) -> int:
        return ord("!") if len(tokens) == 40 else looping_token(tokens)

    for stop in ("!", text[30:33] + "no", "A!"):
        backend = backend_of(next_token=word)
        with engine_of(backend) as engine:
            outcome = read(engine.submit(Request((1, 2, 3), max_tokens=60, stop=(stop,))))
        assert stop not in outcome.text
        n_before += outcome.finish.usage.n_accepted
        check_books(engine, backend)
    assert n_before > 0


def test_the_end_of_the_context_within_a_guess() -> None:
    backend = backend_of(n_ctx=40)
    with engine_of(backend) as engine:
        outcome = run(engine, (1, 2, 3), None)
    assert (len(outcome.tokens), outcome.finish.reason) == (38, "length")
    assert DecodeResult.FULL not in backend.results
    check_books(engine, backend)


def test_all_running_answers_share_the_rows() -> None:
    backend = backend_of(n_seq_max=3, n_batch=16, n_outputs_max=16)
    prompts = [(1, 2, 3), (9, 8), (7, 7, 7, 7)]
    with engine_of(backend) as engine:
        with backend.held_back():
            streams = [engine.submit(Request(prompt, max_tokens=60)) for prompt in prompts]
        outcomes = [read(stream) for stream in streams]
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        ideal = ideal_answer(Request(prompt, max_tokens=60), 256, looping_token)
        assert outcome.tokens == ideal.tokens
        assert outcome.finish.usage.n_accepted > 20
    shared = [batch for batch in backend.batches if sum(len(c.tokens) > 1 for c in batch) > 1]
    assert shared
    check_books(engine, backend)


def test_while_a_prompt_is_read_nothing_is_guessed() -> None:
    backend = backend_of(n_seq_max=2, n_batch=8, n_outputs_max=8)
    late: list[object] = []

    def submit_second(step: int, _chunks: Sequence[Chunk]) -> None:
        if step == 20:
            late.append(engine.submit(Request(tuple(range(100, 140)), max_tokens=30)))

    backend.on_decode = submit_second
    with engine_of(backend) as engine:
        first = run(engine, (1, 2, 3), 120)
        second = read(late[0])  # type: ignore[arg-type]
    reading = [batch for batch in backend.batches[21:] if any(c.n_outputs == 0 for c in batch)]
    assert reading
    assert all(c.n_outputs <= 1 for batch in reading for c in batch)
    assert first.finish.usage.n_accepted > 0 and second.finish.usage.n_accepted > 0
    check_books(engine, backend)


def test_a_cache_with_no_room_for_guesses_still_serves_the_answers() -> None:
    """Two answers that end where the cache does: a guess too many must not cost one its place."""

    def ending(tokens: tuple[int, ...]) -> int:
        return 257 if len(tokens) == 32 else looping_token(tokens)

    backend = backend_of(n_ctx=64, n_seq_max=2, n_batch=16, n_outputs_max=16, next_token=ending)
    requests = [Request((1, 2)), Request((7, 8))]
    with engine_of(backend) as engine:
        with backend.held_back():
            streams = [engine.submit(request) for request in requests]
        outcomes = [read(stream) for stream in streams]
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.tokens == ideal_answer(request, 64, ending).tokens
    assert all(sampler.n_sampled == 31 for sampler in backend.samplers)
    assert DecodeResult.FULL in backend.results
    # Nobody was put back and read again.
    assert sum(chunk.pos == 0 for batch in backend.batches for chunk in batch) == 2
    check_books(engine, backend)


@pytest.mark.parametrize("n_kept", [0, 1, 4])
def test_an_abort_within_a_guess(n_kept: int) -> None:
    backend = backend_of(n_kept=lambda _n_rows: n_kept)
    aborted: list[int] = []

    def abort(_step: int, chunks: Sequence[Chunk]) -> None:
        if chunks[0].n_outputs > 3 and len(aborted) < 3:
            aborted.append(1)
            backend.request_abort()

    backend.on_decode = abort
    with engine_of(backend) as engine:
        outcome = run(engine, (1, 2, 3), 80)
    assert len(aborted) == 3
    assert (
        outcome.tokens == ideal_answer(Request((1, 2, 3), max_tokens=80), 256, looping_token).tokens
    )
    check_books(engine, backend)


def test_a_window_takes_guesses_back_too() -> None:
    backend = backend_of(n_swa=6, next_token=copying_token)
    request = Request((33, 34, 35, 36, 37), max_tokens=150, ignore_eog=True)
    with engine_of(backend) as engine:
        outcome = read(engine.submit(request))
    usage = outcome.finish.usage
    assert usage.n_drafted > usage.n_accepted > 20
    assert outcome.tokens == ideal_answer(request, 256, copying_token).tokens


def test_a_recurrent_state_is_never_guessed_ahead() -> None:
    backend = backend_of(recurrent=True)
    with engine_of(backend) as engine:
        outcome = run(engine, (1, 2, 3), 60)
    assert outcome.finish.usage.n_drafted == 0
    check_books(engine, backend)


def test_a_sampler_that_fails_within_a_guess_fails_its_own_request() -> None:
    backend = backend_of(n_seq_max=2, n_outputs_max=20)
    with engine_of(backend) as engine:
        failing = engine.submit(
            Request((65, 66, 67, 68, 69) * 4, SamplingParams(grammar=FAILING_GRAMMAR), 30)
        )
        with pytest.raises(Exception, match="no token"):
            list(failing)
        assert run(engine, (3, 4), 9).tokens
    check_books(engine, backend)


def test_where_nothing_repeats_nothing_is_guessed() -> None:
    backend = backend_of(next_token=endless_token)
    with engine_of(backend) as engine:
        outcome = run(engine, range(100), 100)
    assert outcome.finish.usage.n_drafted <= 5
    assert backend.n_steps >= 95

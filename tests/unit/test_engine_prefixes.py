"""A sequence's state saved from one engine and put into another: answers stay what they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.engine.loop import Engine
from llmrun.engine.types import Request, SavedPrefix
from llmrun.errors import EngineError
from tests.fakes.fake_backend import FakeBackend, endless_token, ideal_answer
from tests.unit.test_engine_loop import Outcome, check_books, read, run

KINDS = {"plain": {}, "window": {"n_swa": 6, "slack": 2}, "recurrent": {"recurrent": True}}
PROMPT = tuple(range(60, 100))
LARGE = 1 << 30


def backend_of(kind: str, **more: object) -> FakeBackend:
    options = {"n_ctx": 256, "n_batch": 16, "next_token": endless_token, **KINDS[kind], **more}
    return FakeBackend(**options)  # type: ignore[arg-type]


def saved_after(kind: str, prompt: tuple[int, ...] = PROMPT, n: int = 5) -> SavedPrefix:
    backend = backend_of(kind)
    with Engine(backend, checks=True) as engine:
        answer = run(engine, prompt, n)
        saved = engine.save_prefix((*prompt, *answer.tokens), LARGE)
    check_books(engine, backend)
    assert saved is not None
    # The last token of an answer is never decoded.
    assert saved.tokens == (*prompt, *answer.tokens[:-1])
    return saved


def resume(kind: str, saved: SavedPrefix, prompt: tuple[int, ...]) -> Outcome:
    """In a fresh engine, checked against an engine that saw nothing before."""
    backend = backend_of(kind, n_batch=9)
    with Engine(backend, checks=True) as engine:
        assert engine.restore_prefix(saved) == len(saved.tokens)
        outcome = run(engine, prompt, 6)
    check_books(engine, backend)
    assert (
        outcome.tokens
        == ideal_answer(Request(prompt, max_tokens=6), backend.n_ctx, backend.next_token).tokens
    )
    return outcome


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_without_reading_it_again(kind: str) -> None:
    saved = saved_after(kind)
    outcome = resume(kind, saved, (*saved.tokens, 1, 2, 3))
    assert outcome.finish.usage.n_cached == len(saved.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_the_very_same_prompt_decodes_its_last_token_again(kind: str) -> None:
    prompt = tuple(range(100)) + PROMPT
    saved = saved_after(kind, prompt)
    outcome = resume(kind, saved, prompt)
    # A window that moved on cannot be taken back; a recurrent state has its checkpoint there.
    assert outcome.finish.usage.n_cached == (139 if kind != "window" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_answer_goes_back_to_the_end_of_the_prompt(kind: str) -> None:
    prompt = tuple(range(100)) + PROMPT
    saved = saved_after(kind, prompt, 20)
    outcome = resume(kind, saved, (*prompt, 1, 2, 3))
    at = {"plain": 140, "window": 140, "recurrent": 139}[kind]
    assert outcome.finish.usage.n_cached == at


@pytest.mark.parametrize("kind", ["window", "recurrent"])
def test_without_its_checkpoints_it_is_read_again_and_right(kind: str) -> None:
    prompt = tuple(range(100)) + PROMPT
    saved = replace(saved_after(kind, prompt, 20), checkpoints=())
    assert resume(kind, saved, (*prompt, 1, 2, 3)).finish.usage.n_cached == 0


@pytest.mark.parametrize("kind", ["window", "recurrent"])
def test_a_checkpoint_is_kept_where_it_is_asked_for(kind: str) -> None:
    backend = backend_of(kind)
    with Engine(backend, checks=True) as engine:
        read(engine.submit(Request((*PROMPT, 1, 2), max_tokens=20, come_back_to=(0, 33, 999))))
        saved = engine.save_prefix(PROMPT, LARGE)
    assert saved is not None and 33 in [n for n, _ in saved.checkpoints]
    assert resume(kind, saved, (*PROMPT[:33], 9, 9)).finish.usage.n_cached == 33


def test_what_is_larger_than_allowed_is_not_saved() -> None:
    backend = backend_of("recurrent")
    with Engine(backend) as engine:
        assert engine.save_prefix(PROMPT, LARGE) is None
        run(engine, (*PROMPT, *PROMPT), 3)
        saved = engine.save_prefix(PROMPT, LARGE)
        assert saved is not None and len(saved.checkpoints) == 1
        small = engine.save_prefix(PROMPT, len(saved.state))
        assert small is not None and small.checkpoints == ()
        assert engine.save_prefix(PROMPT, len(saved.state) - 1) is None


def test_a_state_that_does_not_fit_leaves_the_engine_as_it_was() -> None:
    saved = saved_after("plain")
    backend = backend_of("plain", n_ctx=32)
    with Engine(backend, checks=True) as engine:
        first = run(engine, (1, 2, 3), 4)
        assert engine.restore_prefix(saved) == 0
        assert run(engine, (1, 2, 3), 4).tokens == first.tokens
    check_books(engine, backend)


def test_idle_prefixes_make_room_and_running_answers_do_not() -> None:
    saved = saved_after("plain")
    backend = backend_of("plain", n_ctx=64, n_seq_max=3)
    results: list[int] = []
    with Engine(backend, checks=True) as engine:
        run(engine, tuple(range(20)), 2)
        run(engine, tuple(range(100, 120)), 2)
        assert engine.restore_prefix(saved) == len(saved.tokens)
    check_books(engine, backend)
    backend = backend_of("plain", n_ctx=64, n_seq_max=3)
    engine = Engine(backend, checks=True)

    def restore(step: int, _chunks: object) -> None:
        if step == 5:
            results.append(engine._core.residents.restore(saved))

    backend.on_decode = restore
    with engine:
        assert len(run(engine, range(20), 30).tokens) == 30
    assert results == [0]
    check_books(engine, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [b"", b"no state", b"[[0, 5, 7, true]]"])
def test_bytes_that_are_no_state_are_not_taken(kind: str, damage: bytes) -> None:
    saved = replace(saved_after(kind), state=damage)
    backend = backend_of(kind)
    with Engine(backend, checks=True) as engine:
        assert engine.restore_prefix(saved) == 0
        assert run(engine, PROMPT, 5).finish.usage.n_cached == 0
    check_books(engine, backend)


def test_a_closed_engine_says_so() -> None:
    engine = Engine(backend_of("plain"))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.save_prefix(PROMPT, LARGE)
    with pytest.raises(EngineError, match="closed"):
        engine.restore_prefix(SavedPrefix(PROMPT, b""))


def test_an_error_in_a_task_reaches_who_waits_for_it() -> None:
    backend = backend_of("plain")

    def fail(*_args: object, **_named: object) -> bytes:
        raise EngineError("no state today")

    with Engine(backend, checks=True) as engine:
        run(engine, PROMPT, 2)
        backend.save_state = fail  # type: ignore[method-assign]
        backend.state_bytes = lambda seq_id: 1  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="no state today"):
            engine.save_prefix(PROMPT, LARGE)
        assert run(engine, PROMPT, 2).tokens


tokens_lists = st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    turns=st.lists(st.tuples(tokens_lists, st.integers(1, 9)), min_size=1, max_size=3),
    cut=st.integers(0, 30),
    more=tokens_lists,
    marks=st.lists(st.integers(0, 20), max_size=2).map(tuple),
    n_seq_max=st.integers(1, 3),
)
def test_whatever_was_saved_the_answer_is_the_ideal_one(
    kind: str,
    turns: list[tuple[tuple[int, ...], int]],
    cut: int,
    more: tuple[int, ...],
    marks: tuple[int, ...],
    n_seq_max: int,
) -> None:
    first = backend_of(kind, n_ctx=64, n_batch=5, n_seq_max=n_seq_max)
    held: tuple[int, ...] = ()
    with Engine(first, checks=True) as engine:
        for text, n in turns:
            prompt = (*held, *text)[-40:]
            answer = read(engine.submit(Request(prompt, max_tokens=n, come_back_to=marks)))
            held = (*prompt, *answer.tokens)
        saved = engine.save_prefix(held, LARGE)
    assert saved is not None
    second = backend_of(kind, n_ctx=64, n_batch=7, n_seq_max=n_seq_max)
    prompt = (*saved.tokens[:cut], *more)[:50]
    request = Request(prompt, max_tokens=6)
    with Engine(second, checks=True) as engine:
        run(engine, more, 2)
        engine.restore_prefix(saved)
        outcome = read(engine.submit(request))
    assert outcome.tokens == ideal_answer(request, 64, endless_token).tokens
    check_books(engine, second)

"""Edges of one request, failures, cancelling and closing."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from llmrun.engine import stream as stream_module
from llmrun.engine.backend import Chunk
from llmrun.engine.loop import Engine, Stream
from llmrun.engine.types import (
    FinishEvent,
    PromptEvent,
    Request,
    SamplingParams,
    TextEvent,
    Timings,
    Usage,
)
from llmrun.errors import ContextOverflowError, EngineError, UsageError
from tests.fakes.fake_backend import (
    BAD_GRAMMAR,
    FAILING_GRAMMAR,
    FakeBackend,
    endless_token,
    ideal_answer,
    scripted,
)
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.unit.test_engine_loop import check_books, read, run

END = 257  # </s>
IM_START = 258


def answer(
    said: bytes | Sequence[int], *, max_tokens: int | None = None, **request: object
) -> tuple[str, FinishEvent]:
    backend = FakeBackend(n_ctx=64, next_token=scripted(said, 2))
    with Engine(backend) as engine:
        made = Request((1, 2), max_tokens=max_tokens, **request)  # type: ignore[arg-type]
        outcome = read(engine.submit(made))
    check_books(engine, backend)
    return outcome.text, outcome.finish


# ---- lengths


@pytest.mark.parametrize(("n_prompt", "n_tokens"), [(15, 2), (16, 1)])
def test_a_prompt_up_to_the_context_gets_what_fits(n_prompt: int, n_tokens: int) -> None:
    with Engine(FakeBackend(n_ctx=16, next_token=endless_token)) as engine:
        outcome = run(engine, range(n_prompt), None)
    # The last sampled token needs no cell.
    assert (len(outcome.tokens), outcome.finish.reason) == (n_tokens, "length")


def test_a_prompt_over_the_context_is_refused_with_both_numbers() -> None:
    with Engine(FakeBackend(n_ctx=16)) as engine:
        with pytest.raises(ContextOverflowError) as caught:
            engine.submit(Request(tuple(range(17))))
        assert (caught.value.n_prompt, caught.value.n_ctx) == (17, 16)
        assert "17" in caught.value.message and "16" in caught.value.message
        assert run(engine, range(16), 1).finish.reason == "length"


def test_max_tokens_0_reads_the_prompt_only() -> None:
    backend = FakeBackend()
    with Engine(backend) as engine:
        outcome = run(engine, range(12), 0)
        again = run(engine, range(12), 1)
    assert (outcome.tokens, outcome.text, outcome.finish.reason) == ((), "", "length")
    assert backend.samplers[0].n_sampled == 0
    assert again.finish.usage.n_cached == 11
    check_books(engine, backend)


def test_max_tokens_1() -> None:
    text, finish = answer(b"hello", max_tokens=1)
    assert (text, finish.reason, finish.usage) == ("h", "length", Usage(2, 1, 0))


def test_an_end_token_is_no_text_and_not_counted() -> None:
    text, finish = answer(b"hi")
    assert (text, finish.reason, finish.usage.n_completion) == ("hi", "stop", 2)


def test_an_end_token_at_once() -> None:
    text, finish = answer(b"")
    assert (text, finish.reason, finish.usage.n_completion) == ("", "stop", 0)


def test_ignore_eog_goes_on_without_the_end_tokens_text() -> None:
    text, finish = answer([104, END, 105], ignore_eog=True, max_tokens=3, show_special=True)
    assert (text, finish.reason, finish.usage.n_completion) == ("hi", "length", 3)


@pytest.mark.parametrize(("show", "text"), [(False, "ab"), (True, "a<|im_start|>b")])
def test_control_tokens_are_text_on_request(show: bool, text: str) -> None:
    assert answer([97, IM_START, 98], show_special=show)[0] == text


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(()), "empty"),
        (Request((1, 10_000)), "vocabulary"),
        (Request((1, -1)), "vocabulary"),
        (Request((1,), max_tokens=-1), "negative"),
    ],
)
def test_wrong_requests_are_refused_at_once(request_: Request, words: str) -> None:
    with Engine(FakeBackend()) as engine:
        with pytest.raises(UsageError, match=words):
            engine.submit(request_)
        assert run(engine, [1, 2]).tokens


# ---- text


def test_a_stop_string_over_several_tokens() -> None:
    text, finish = answer(b"one</end>two", stop=("</end>",))
    assert (text, finish.reason, finish.stop) == ("one", "stop", "</end>")
    # The tokens of the stop string were sampled and are counted.
    assert finish.usage.n_completion == len("one</end>")


def test_the_start_of_a_stop_string_at_the_end_is_text() -> None:
    text, finish = answer(b"one</en", stop=("</end>",))
    assert (text, finish.stop) == ("one</en", None)
    assert answer(b"one</end>", stop=("</end>",), max_tokens=6)[0] == "one</e"


def test_characters_over_several_tokens_come_whole() -> None:
    backend = FakeBackend(next_token=scripted("añ€😀".encode(), 1))
    with Engine(backend, clock=iter(range(10_000)).__next__) as engine:
        events = list(engine.submit(Request((1,))))
    texts = [event.text for event in events if isinstance(event, TextEvent)]
    assert "".join(texts) == "añ€😀"
    assert "�" not in "".join(texts)


def test_half_a_character_at_the_end_is_shown() -> None:
    assert answer(b"a\xe2\x82")[0] == "a�"


def test_a_stop_string_that_only_the_last_bytes_complete() -> None:
    text, finish = answer(b"ab\xe2\x82", stop=("b�",))
    assert (text, finish.stop) == ("a", "b�")


# ---- what is told beside the text


def test_a_long_prompt_reports_how_far_it_is() -> None:
    with Engine(FakeBackend(n_ctx=64, n_batch=8)) as engine:
        outcome = run(engine, range(20), 1)
        again = run(engine, [*range(20), *range(20)], 1)
    assert outcome.progress == [PromptEvent(8, 20), PromptEvent(16, 20)]
    assert again.progress == [PromptEvent(28, 40), PromptEvent(36, 40)]


def test_timings_by_the_clock() -> None:
    now = [100.0]

    def tick(_step: int, _chunks: Sequence[Chunk]) -> None:
        now[0] += 2.0

    backend = FakeBackend(next_token=endless_token, n_ctx=64, n_batch=8, on_decode=tick)
    with Engine(backend, clock=lambda: now[0]) as engine:
        finish = run(engine, range(16), 5).finish
        assert finish.timings == Timings(
            ttft_s=4.0, prompt_tok_s=16 / 4, decode_tok_s=4 / 8, total_s=12.0
        )
        again = run(engine, range(16), 1).finish
        assert again.usage == Usage(16, 1, 15)
        assert again.timings == Timings(
            ttft_s=2.0, prompt_tok_s=1 / 2, decode_tok_s=0.0, total_s=2.0
        )


def test_an_end_token_does_not_slow_the_rate() -> None:
    """Two tokens two seconds apart: half a token a second, however long the end token took."""
    now = [100.0]

    def tick(_step: int, _chunks: Sequence[Chunk]) -> None:
        now[0] += 2.0

    backend = FakeBackend(next_token=scripted(b"ab", 1), on_decode=tick)
    with Engine(backend, clock=lambda: now[0]) as engine:
        assert run(engine, [1], None).finish.timings.decode_tok_s == 0.5


def test_the_seed_that_was_used_is_told() -> None:
    backend = FakeBackend(n_seq_max=4)
    with Engine(backend) as engine:
        seeds = [
            read(engine.submit(Request((1,), SamplingParams(seed=seed)))).finish.seed
            for seed in (0, 42, 2**32 - 1, -1, None, None)
        ]
    assert seeds == [sampler.seed for sampler in backend.samplers]
    assert seeds[:2] == [0, 42]
    assert seeds[4] != seeds[5]
    # 0xFFFFFFFF would make llama.cpp draw another one.
    assert all(0 <= seed < 2**32 - 1 for seed in seeds)


def test_the_penalties_see_the_prompt() -> None:
    backend = FakeBackend()
    with Engine(backend) as engine:
        read(engine.submit(Request((5, 6, 7), SamplingParams(repeat_penalty=1.1), 1)))
        read(engine.submit(Request((5, 6, 7), SamplingParams(), 1)))
    assert [sampler.accepted for sampler in backend.samplers] == [[5, 6, 7], []]


def test_engine_tells_its_backends_facts() -> None:
    backend = FakeBackend(n_ctx=32)
    with Engine(backend, load_s=1.5) as engine:
        assert (engine.n_ctx, engine.load_s) == (32, 1.5)
        assert engine.facts is backend.facts
        assert isinstance(engine.tokenizer, FakeTokenizer)


# ---- failures


def fail_at(step: int, error: BaseException) -> FakeBackend:
    def hook(now: int, _chunks: Sequence[Chunk]) -> None:
        if now == step:
            raise error

    return FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token, on_decode=hook)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EngineError("llama.cpp could not decode (code -3)"), r"code -3"),
        (ZeroDivisionError("oops"), "the engine stopped"),
        (MemoryError(), "the engine stopped"),
    ],
)
def test_a_failing_decode_reaches_every_stream_and_ends_the_engine(
    error: BaseException, words: str
) -> None:
    backend = fail_at(2, error)
    engine = Engine(backend)
    with backend.held_back():
        streams = [engine.submit(Request((n,), max_tokens=9)) for n in range(4)]
    for stream in streams:
        with pytest.raises(EngineError, match=words):
            list(stream)
        assert list(stream) == []
    engine._thread.join()
    with pytest.raises(EngineError, match="closed") as caught:
        engine.submit(Request((1,)))
    assert type(error).__name__ in str(caught.value.why)
    engine.close()
    assert (backend.n_closed, backend.violations, backend.open_samplers) == (1, [], [])


def test_a_bad_grammar_fails_its_own_request_and_takes_no_slot() -> None:
    backend = FakeBackend(n_ctx=128, next_token=endless_token)
    with Engine(backend) as engine:
        run(engine, range(10), 1)
        bad = engine.submit(Request((1, 2), SamplingParams(grammar=BAD_GRAMMAR)))
        with pytest.raises(UsageError, match="grammar"):
            list(bad)
        assert list(bad) == []
        assert run(engine, range(10), 1).finish.usage.n_cached == 9
    check_books(engine, backend)


def test_a_sampler_that_fails_in_mid_answer_fails_its_own_request() -> None:
    backend = FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token)
    good = Request((3, 4), max_tokens=9)
    with Engine(backend) as engine:
        with backend.held_back():
            failing = engine.submit(
                Request((1, 2), SamplingParams(grammar=FAILING_GRAMMAR), max_tokens=9)
            )
            beside = engine.submit(good)
        with pytest.raises(EngineError, match="no token"):
            list(failing)
        assert read(beside).tokens == ideal_answer(good, 128, endless_token).tokens
        # Alone as well: that is another path through the loop.
        alone = Request((1, 2), SamplingParams(grammar=FAILING_GRAMMAR), max_tokens=9)
        with pytest.raises(EngineError, match="no token"):
            list(engine.submit(alone))
        assert run(engine, (3, 4), 9).tokens == ideal_answer(good, 128, endless_token).tokens
    check_books(engine, backend)


# ---- cancel and close


def test_cancel_before_anything_ran() -> None:
    backend = FakeBackend(n_ctx=128, next_token=endless_token)
    with Engine(backend) as engine:
        with backend.held_back():
            first = engine.submit(Request((1,), max_tokens=3))
            waiting = engine.submit(Request((2,), max_tokens=3))
            waiting.cancel()
        finish = read(waiting).finish
        assert (finish.reason, finish.usage) == ("cancelled", Usage(1, 0, 0))
        assert (finish.timings.ttft_s, finish.timings.prompt_tok_s) == (0.0, 0.0)
        assert read(first).finish.reason == "length"
    check_books(engine, backend)


def test_cancel_after_the_end_is_harmless() -> None:
    backend = FakeBackend(n_ctx=128, next_token=endless_token)
    with Engine(backend) as engine:
        stream = engine.submit(Request((1,), max_tokens=3))
        read(stream)
        stream.cancel()
        stream.cancel()
        assert list(stream) == []
        assert not backend._abort.is_set()
        assert run(engine, (1, 2), 3).finish.reason == "length"
    stream.cancel()
    check_books(engine, backend)


def test_cancel_twice_and_from_many_threads() -> None:
    backend = FakeBackend(n_ctx=128, n_seq_max=4, next_token=endless_token)
    with Engine(backend) as engine:
        for _ in range(20):
            with backend.held_back():
                streams = [engine.submit(Request((n,), max_tokens=50)) for n in range(8)]
            threads = [
                threading.Thread(target=stream.cancel) for stream in streams for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for stream in streams:
                assert read(stream).finish.reason in ("cancelled", "length")
            for thread in threads:
                thread.join()
    check_books(engine, backend)


def test_close_ends_what_runs_and_what_waits() -> None:
    backend = FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token)
    closing = threading.Event()
    streams: list[Stream] = []
    closers: list[threading.Thread] = []

    def close_at_5(step: int, _chunks: Sequence[Chunk]) -> None:
        if step == 5:
            closers.append(threading.Thread(target=engine.close))
            closers[0].start()
            while not engine._closed:
                closing.wait(0.001)

    backend.on_decode = close_at_5
    engine = Engine(backend)
    with backend.held_back():
        streams += [engine.submit(Request((n,))) for n in range(4)]
    outcomes = [read(stream) for stream in streams]
    assert [outcome.finish.reason for outcome in outcomes] == ["cancelled"] * 4
    assert outcomes[0].text and not outcomes[3].text
    closers[0].join()
    check_books(engine, backend)


def test_close_is_idempotent_also_at_once() -> None:
    backend = FakeBackend()
    engine = Engine(backend)
    threads = [threading.Thread(target=engine.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join()
    engine.close()
    check_books(engine, backend)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(Request((1,)))


def test_submits_and_closes_that_race_lose_no_stream() -> None:
    """Each submit is either refused or its stream ends."""
    for _ in range(30):
        backend = FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token)
        engine = Engine(backend)
        ends: list[str] = []

        def submit_many(engine: Engine = engine, ends: list[str] = ends) -> None:
            for n in range(10):
                try:
                    stream = engine.submit(Request((n,), max_tokens=2))
                except EngineError:
                    ends.append("refused")
                else:
                    ends.append(read(stream).finish.reason)

        threads = [threading.Thread(target=submit_many) for _ in range(3)]
        for thread in threads:
            thread.start()
        engine.close()
        for thread in threads:
            thread.join()
        assert len(ends) == 30
        assert set(ends) <= {"refused", "length", "cancelled"}
        check_books(engine, backend)


def test_the_last_event_is_not_lost_to_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C can come after the event left the queue and before the caller has it."""
    monkeypatch.setattr(stream_module, "_READER_WAIT_S", 0.01)
    with Engine(FakeBackend(next_token=scripted(b"hi", 1))) as engine:
        stream = engine.submit(Request((1,)))
        while not isinstance(stream._events.get(), FinishEvent):
            pass  # taken from the queue and dropped
        stream.cancel()
        assert [type(event) for event in stream] == [FinishEvent]
        assert list(stream) == []


def test_a_reader_of_slow_steps_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_READER_WAIT_S", 0.001)
    waiting = threading.Event()
    backend = FakeBackend(next_token=scripted(b"hi", 1))
    backend.on_decode = lambda step, chunks: waiting.wait(0.02) and None
    with Engine(backend) as engine:
        assert run(engine, (1,), None).text == "hi"

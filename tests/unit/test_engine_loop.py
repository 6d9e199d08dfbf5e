"""The engine against its oracle: whatever else runs, stops, fills the cache or is taken back, each
request gets the tokens it would get alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.engine import residents
from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.loop import Engine, Stream
from llmrun.engine.types import (
    FinishEvent,
    PromptEvent,
    Request,
    SamplingParams,
    TextEvent,
)
from tests.fakes.fake_backend import (
    FakeBackend,
    NextToken,
    copying_token,
    endless_token,
    hash_token,
    ideal_answer,
    scripted,
)


@dataclass(slots=True)
class Outcome:
    tokens: tuple[int, ...]
    text: str
    finish: FinishEvent
    progress: list[PromptEvent] = field(default_factory=list)


def read(stream: Stream) -> Outcome:
    """All events of a stream, with their order checked."""
    events = list(stream)
    assert isinstance(events[-1], FinishEvent)
    texts = [event for event in events if isinstance(event, TextEvent)]
    tokens = tuple(token for event in texts for token in event.tokens)
    assert len(tokens) == events[-1].usage.n_completion
    assert sum(isinstance(event, FinishEvent) for event in events) == 1
    progress = [event for event in events if isinstance(event, PromptEvent)]
    assert all(0 < event.n_done <= event.n_total for event in progress)
    return Outcome(tokens, "".join(event.text for event in texts), events[-1], progress)


def run(engine: Engine, prompt: Sequence[int], max_tokens: int | None = 8) -> Outcome:
    return read(engine.submit(Request(tuple(prompt), max_tokens=max_tokens)))


def check_books(engine: Engine, backend: FakeBackend) -> None:
    """After close: what the engine believes to be in the cache is there, and nothing else."""
    assert backend.violations == []
    assert backend.open_samplers == []
    assert backend.n_closed == 1
    assert not engine._thread.is_alive()
    cache = engine._core.residents.cache
    for slot in cache.slots:
        assert not slot.busy
        assert cache.tree.tokens(slot.seq_id) == backend.held(slot.seq_id)
        assert all(c.n_tokens <= cache.tree.length(slot.seq_id) for c in slot.checkpoints)
    assert cache.tree.n_cells() == len(backend._cells)


# ---- schedules made by hypothesis

PROMPT_STARTS = [(), (1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (7, 7, 7, 7, 7)]


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """Many start alike, so that prefixes are shared, taken over and cut back."""
    start = draw(st.sampled_from(PROMPT_STARTS))
    cut = draw(st.integers(0, len(start)))
    rest = draw(st.lists(st.integers(0, 3), min_size=0 if cut else 1, max_size=9))
    return (*start[:cut], *rest)


@st.composite
def actions(draw: st.DrawFn) -> tuple[str, object]:
    kind = draw(st.sampled_from(["submit", "submit", "go on", "cancel", "abort", "again"]))
    if kind == "submit":
        return kind, (draw(prompts()), draw(st.sampled_from([0, 1, 3, 9, None])))
    return kind, draw(st.integers(0, 7))


@st.composite
def backends(draw: st.DrawFn) -> dict[str, object]:
    n_seq_max = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["plain", "plain", "window", "recurrent"]))
    n_rows_kept = draw(st.integers(0, 6))
    return {
        "n_ctx": draw(st.sampled_from([24, 40, 64])),
        "n_seq_max": n_seq_max,
        "n_batch": draw(st.integers(max(2, n_seq_max), 9)),
        "n_swa": draw(st.integers(1, 6)) if kind == "window" else 0,
        "slack": draw(st.integers(0, 4)),
        "recurrent": kind == "recurrent",
        "kv_unified": draw(st.booleans()),
        "n_kept": lambda n_rows: n_rows_kept,
    }


class Play:
    """Carries out actions inside the engine's thread, one at each step: the run is the same each
    time. What is left when the engine is idle is done from outside."""

    def __init__(
        self,
        options: dict[str, object],
        script: list[tuple[str, object]],
        *,
        next_token: NextToken = hash_token,
        **engine_options: object,
    ) -> None:
        self.script = list(script)
        self.next_token = next_token
        self.backend = FakeBackend(on_decode=self.act, next_token=next_token, **options)  # type: ignore[arg-type]
        if engine_options:
            # A step takes as long whatever its rows.
            engine_options["clock"] = lambda: 1.0 + 0.06 * self.backend.n_steps
        self.engine = Engine(self.backend, checks=True, **engine_options)  # type: ignore[arg-type]
        self.requests: list[Request] = []
        self.streams: list[Stream] = []
        self.cancelled: set[int] = set()

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        self.streams.append(self.engine.submit(request))

    def act(self, _step: int = 0, _chunks: Sequence[Chunk] = ()) -> None:
        if not self.script:
            return
        kind, what = self.script.pop(0)
        if kind == "submit":
            prompt, max_tokens = what  # type: ignore[misc]
            self.submit(Request(prompt, max_tokens=max_tokens))
        elif kind == "abort":
            self.backend.request_abort()
        elif kind == "cancel" and self.streams:
            index = what % len(self.streams)  # type: ignore[operator]
            self.cancelled.add(index)
            self.streams[index].cancel()
        elif kind == "again" and self.requests:
            # The next turn of a conversation, or the same once more.
            earlier = self.requests[what % len(self.requests)]  # type: ignore[operator]
            answer = ideal_answer(earlier, self.backend.n_ctx, self.next_token).tokens
            longer = (*earlier.prompt, *answer[:-1], 5) if what % 2 else earlier.prompt  # type: ignore[operator]
            self.submit(Request(longer[: self.backend.n_ctx], max_tokens=4))

    def run(self) -> None:
        with self.engine:
            n_read = 0
            outcomes = []
            while self.script or n_read < len(self.streams):
                if n_read == len(self.streams):
                    with self.backend.held_back():
                        self.act()
                else:
                    outcomes.append(read(self.streams[n_read]))
                    n_read += 1
        self.check(outcomes)

    def check(self, outcomes: list[Outcome]) -> None:
        for index, outcome in enumerate(outcomes):
            request = self.requests[index]
            ideal = ideal_answer(request, self.backend.n_ctx, self.next_token)
            if outcome.finish.reason == "cancelled":
                assert index in self.cancelled
                assert outcome.tokens == ideal.tokens[: len(outcome.tokens)]
            else:
                assert outcome.tokens == ideal.tokens
                assert outcome.finish.reason == ideal.reason
            assert outcome.finish.usage.n_cached < len(request.prompt)
        check_books(self.engine, self.backend)


@settings(max_examples=250, deadline=None)
@given(backends(), st.lists(actions(), min_size=1, max_size=24))
def test_every_request_gets_what_it_would_get_alone(
    options: dict[str, object], script: list[tuple[str, object]]
) -> None:
    Play(options, script).run()


@settings(max_examples=250, deadline=None)
@given(backends(), st.integers(1, 9), st.lists(actions(), min_size=1, max_size=24))
def test_guessing_changes_no_answer(
    options: dict[str, object], n_drafts: int, script: list[tuple[str, object]]
) -> None:
    options["n_outputs_max"] = min(options["n_seq_max"] + n_drafts, options["n_batch"])  # type: ignore[operator,type-var]
    play = Play(
        options,
        script,
        next_token=copying_token,
        speculative="ngram",
    )
    play.run()


@settings(max_examples=250, deadline=None)
@given(backends(), st.lists(actions(), min_size=1, max_size=24))
def test_checkpoints_at_every_prompt_change_no_answer(
    options: dict[str, object], script: list[tuple[str, object]]
) -> None:
    with patch.object(residents, "_CHECKPOINT_EVERY", 1):
        Play(options, script, next_token=copying_token, speculative="ngram").run()


# ---- the same, feature by feature


def test_four_at_once() -> None:
    backend = FakeBackend(n_ctx=128, n_seq_max=4, n_batch=8, next_token=endless_token)
    prompts = [(1, 2, 3), (9, 8), tuple(range(20)), (1, 2, 3)]
    with Engine(backend) as engine:
        with backend.held_back():
            streams = [engine.submit(Request(prompt, max_tokens=12)) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            request = Request(prompt, max_tokens=12)
            assert read(stream).tokens == ideal_answer(request, 128, endless_token).tokens
    assert max(len(batch) for batch in backend.batches) > 1
    check_books(engine, backend)


def test_the_next_turn_reads_only_what_is_new() -> None:
    backend = FakeBackend(n_ctx=128, next_token=endless_token)
    with Engine(backend) as engine:
        first = run(engine, range(10), 6)
        turn = (*range(10), *first.tokens, 70, 71)
        second = run(engine, turn, 4)
    # The last token of the answer was never decoded.
    assert second.finish.usage.n_cached == 10 + 6 - 1
    assert second.tokens == ideal_answer(Request(turn, max_tokens=4), 128, endless_token).tokens
    check_books(engine, backend)


def test_a_turn_taken_back_is_cut_off_the_cache() -> None:
    backend = FakeBackend(n_ctx=128)
    with Engine(backend) as engine:
        run(engine, range(30))
        again = run(engine, [*range(20), 99], 5)
    assert again.finish.usage.n_cached == 20
    ideal = ideal_answer(Request((*range(20), 99), max_tokens=5), 128)
    assert again.tokens == ideal.tokens
    check_books(engine, backend)


def test_a_window_that_moved_on_is_read_again() -> None:
    backend = FakeBackend(n_ctx=128, n_swa=8, slack=4, next_token=endless_token)
    with Engine(backend) as engine:
        first = run(engine, range(40), 1)
        near = run(engine, [*range(38), 99], 3)
        far = run(engine, [*range(20), 99], 3)
    assert first.finish.usage.n_cached == 0
    assert near.finish.usage.n_cached == 38
    assert far.finish.usage.n_cached == 0
    for outcome, prompt in ((near, (*range(38), 99)), (far, (*range(20), 99))):
        request = Request(prompt, max_tokens=3)
        assert outcome.tokens == ideal_answer(request, 128, endless_token).tokens


def test_without_the_window_rule_the_fake_gives_garbage() -> None:
    """The oracle's own test: a cut beyond the window must show."""
    backend = FakeBackend(n_ctx=128, n_swa=8, next_token=endless_token)
    with Engine(backend) as engine:
        engine._core.residents.cache._n_swa = 0
        run(engine, range(40), 1)
        far = run(engine, [*range(20), 99], 3)
    assert far.finish.usage.n_cached == 20
    assert far.tokens == (35, 35, 35)


def test_a_recurrent_state_goes_on_but_is_never_cut() -> None:
    backend = FakeBackend(n_ctx=128, recurrent=True, next_token=endless_token)
    with Engine(backend) as engine:
        first = run(engine, range(10), 4)
        turn = (*range(10), *first.tokens, 60)
        second = run(engine, turn, 4)
        third = run(engine, [*range(8), 60], 4)
    assert second.finish.usage.n_cached == 13
    assert third.finish.usage.n_cached == 0
    for outcome, prompt in ((second, turn), (third, (*range(8), 60))):
        request = Request(tuple(prompt), max_tokens=4)
        assert outcome.tokens == ideal_answer(request, 128, endless_token).tokens
    check_books(engine, backend)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("n_kept", [0, 1, 3, 8])
def test_an_abort_costs_nothing_but_time(recurrent: bool, n_kept: int) -> None:
    def abort(step: int, _chunks: object) -> None:
        if step in (0, 1, 4, 5):
            backend.request_abort()

    backend = FakeBackend(
        n_ctx=128,
        recurrent=recurrent,
        on_decode=abort,
        n_kept=lambda _n_rows: n_kept,
        next_token=endless_token,
    )
    with Engine(backend) as engine:
        outcome = run(engine, range(20), 6)
    assert backend.results.count(DecodeResult.ABORTED) == 4
    request = Request(tuple(range(20)), max_tokens=6)
    assert outcome.tokens == ideal_answer(request, 128, endless_token).tokens
    check_books(engine, backend)


def at_step(step: int, do: Callable[[], None]) -> Callable[[int, object], None]:
    def hook(now: int, _chunks: object) -> None:
        if now == step:
            do()

    return hook


def test_a_cancel_at_any_step_and_the_same_again() -> None:
    request = Request(tuple(range(20)), max_tokens=6)
    ideal = ideal_answer(request, 128, endless_token).tokens
    for step in range(8):
        streams: list[Stream] = []
        backend = FakeBackend(n_ctx=128, next_token=endless_token)
        backend.on_decode = at_step(step, lambda streams=streams: streams[0].cancel())
        with Engine(backend) as engine:
            with backend.held_back():
                streams.append(engine.submit(request))
            cut = read(streams[0])
            assert cut.finish.reason == "cancelled"
            assert cut.tokens == ideal[: len(cut.tokens)]
            assert len(cut.tokens) == max(0, step - 2)
            again = read(engine.submit(request))
            assert again.tokens == ideal
            # Whole chunks that were read stay.
            assert again.finish.usage.n_cached == min(8 * step, 19)
        check_books(engine, backend)


def test_a_cancel_leaves_the_others_alone() -> None:
    backend = FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token)
    streams: list[Stream] = []
    backend.on_decode = lambda step, _chunks: streams[0].cancel() if step == 5 else None
    with Engine(backend) as engine:
        with backend.held_back():
            streams += [engine.submit(Request((n, n), max_tokens=12)) for n in (1, 2)]
        first, second = map(read, streams)
    assert first.finish.reason == "cancelled"
    assert second.tokens == ideal_answer(Request((2, 2), max_tokens=12), 128, endless_token).tokens
    check_books(engine, backend)


# ---- a full cache


def test_a_prompt_that_does_not_fit_beside_an_answer_waits_for_it() -> None:
    """Neither may starve: read again at once, the prompt would fill the cache before each step of
    the answer, for ever."""
    backend = FakeBackend(n_ctx=32, n_seq_max=2, n_batch=32, next_token=endless_token)
    requests = [
        Request(tuple(range(10)), max_tokens=15),
        Request(tuple(range(50, 74)), max_tokens=4),
    ]
    streams: list[Stream] = []

    def submit_second(step: int, _chunks: object) -> None:
        if step == 3:
            streams.append(engine.submit(requests[1]))

    backend.on_decode = submit_second
    with Engine(backend) as engine:
        with backend.held_back():
            streams.append(engine.submit(requests[0]))
        first = read(streams[0])
        second = read(streams[1])
    for outcome, request in zip((first, second), requests, strict=True):
        assert outcome.tokens == ideal_answer(request, 32, endless_token).tokens
        assert outcome.finish.reason == "length"
    assert DecodeResult.FULL in backend.results
    check_books(engine, backend)


def test_answers_that_outgrow_the_cache_take_turns() -> None:
    """Three answers of 20 tokens in 32 cells: none is cut short."""
    backend = FakeBackend(n_ctx=32, n_seq_max=3, next_token=endless_token)
    requests = [
        Request((n, n + 1), max_tokens=20, sampling=SamplingParams(seed=n)) for n in (1, 4, 7)
    ]
    with Engine(backend) as engine:
        with backend.held_back():
            submitted = [engine.submit(request) for request in requests]
        outcomes = [read(stream) for stream in submitted]
    for outcome, request in zip(outcomes, requests, strict=True):
        assert outcome.tokens == ideal_answer(request, 32, endless_token).tokens
    assert DecodeResult.FULL in backend.results
    assert len(backend.samplers) == 3  # a request keeps its sampler when it loses its cells
    assert [sampler.n_sampled for sampler in backend.samplers] == [20, 20, 20]
    check_books(engine, backend)


def test_idle_conversations_give_way_first() -> None:
    backend = FakeBackend(n_ctx=32, n_seq_max=3, next_token=endless_token)
    with Engine(backend) as engine:
        run(engine, range(12), 1)
        run(engine, range(30, 42), 1)
        last = run(engine, range(60, 75), 3)
        kept = run(engine, range(30, 42), 1)
    assert last.finish.reason == "length"
    request = Request(tuple(range(60, 75)), max_tokens=3)
    assert last.tokens == ideal_answer(request, 32, endless_token).tokens
    assert kept.finish.usage.n_cached == 11  # the oldest went, this one stayed
    check_books(engine, backend)


def test_a_failed_request_leaves_no_cells_behind() -> None:
    """What a slot holds stays known, else it can never be evicted."""
    backend = FakeBackend(n_ctx=32, n_seq_max=2, next_token=hash_token)
    with Engine(backend) as engine:
        run(engine, range(12), 1)
        bad = engine.submit(Request((1,), sampling=SamplingParams(grammar="bad")))
        try:
            next(bad)
            raise AssertionError("a bad grammar must fail")
        except Exception as error:
            assert "grammar" in str(error)
        again = run(engine, range(12), 1)
    assert again.finish.usage.n_cached == 11
    check_books(engine, backend)


def test_only_what_is_read_already_is_shared() -> None:
    """A slot's earlier, longer conversation is no longer in it while the next one is read."""
    backend = FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token)
    cut = Request((*range(20), *[99] * 20), max_tokens=2)
    as_before = Request((*range(30), 98), max_tokens=2)
    streams: list[Stream] = []

    def submit_while_reading(step: int, _chunks: object) -> None:
        if step == n_before:
            streams.append(engine.submit(as_before))

    with Engine(backend) as engine:
        run(engine, range(30), 1)
        n_before = backend.n_steps
        backend.on_decode = submit_while_reading
        outcomes = [run(engine, cut.prompt, 2), read(streams[0])]
    assert [outcome.finish.usage.n_cached for outcome in outcomes] == [20, 20]
    for outcome, request in zip(outcomes, (cut, as_before), strict=True):
        assert outcome.tokens == ideal_answer(request, 128, endless_token).tokens
    check_books(engine, backend)


def test_what_a_restart_read_again_is_not_called_cached() -> None:
    backend = FakeBackend(n_ctx=128, recurrent=True, next_token=endless_token)
    with Engine(backend) as engine:
        first = run(engine, range(10), 2)
        n_before = backend.n_steps
        backend.on_decode = at_step(n_before, backend.request_abort)
        second = run(engine, [*range(10), *first.tokens, 60], 2)
    assert second.finish.usage.n_cached == 0
    check_books(engine, backend)


def test_a_new_request_joins_a_running_answer() -> None:
    backend = FakeBackend(n_ctx=128, n_seq_max=2, next_token=endless_token)
    streams: list[Stream] = []

    def submit_second(step: int, _chunks: object) -> None:
        if step == 5:
            streams.append(engine.submit(Request((9,), max_tokens=2)))

    backend.on_decode = submit_second
    with Engine(backend) as engine:
        with backend.held_back():
            streams.append(engine.submit(Request((1,), max_tokens=30)))
        assert read(streams[0]).finish.usage.n_completion == 30
        assert read(streams[1]).finish.usage.n_completion == 2
    assert [len(batch) for batch in backend.batches[:8]] == [1, 1, 1, 1, 1, 1, 2, 2]


def test_a_cancel_needs_no_help_from_the_library() -> None:
    """Backends on a GPU do not look at the abort flag; there a step is the bound."""
    backend = FakeBackend(n_ctx=128, next_token=endless_token, sees_abort=False)
    streams: list[Stream] = []
    backend.on_decode = at_step(5, lambda: streams[0].cancel())
    with Engine(backend) as engine:
        with backend.held_back():
            streams.append(engine.submit(Request((1,), max_tokens=30)))
        outcome = read(streams[0])
    assert (outcome.finish.reason, len(outcome.tokens)) == ("cancelled", 6)
    check_books(engine, backend)


def test_scripted_says_its_script() -> None:
    with Engine(FakeBackend(next_token=scripted(b"hello", 2))) as engine:
        assert run(engine, [1, 2], None).text == "hello"

"""Many requests at once: prefixes read once for all, room for who runs, and no one starved."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from unittest.mock import patch

import pytest

from llmrun.engine import residents
from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.loop import Engine, Stream
from llmrun.engine.passes import split_rows
from llmrun.engine.types import Request, SamplingParams
from tests.fakes.fake_backend import FakeBackend, copying_token, endless_token, ideal_answer
from tests.unit.test_engine_loop import Outcome, check_books, read, run

SYSTEM = tuple(range(60, 100))


def run_together(
    backend: FakeBackend, requests: list[Request], **options: object
) -> tuple[Engine, list[Outcome]]:
    """All submitted before the first step. Checks every answer against its ideal."""
    engine = Engine(backend, checks=True, **options)  # type: ignore[arg-type]
    with engine:
        with backend.held_back():
            streams = [engine.submit(request) for request in requests]
        outcomes = [read(stream) for stream in streams]
    for request, outcome in zip(requests, outcomes, strict=True):
        ideal = ideal_answer(request, backend.n_ctx, backend.next_token)
        assert (outcome.tokens, outcome.finish.reason) == (ideal.tokens, ideal.reason)
    check_books(engine, backend)
    return engine, outcomes


def n_rows(backend: FakeBackend) -> int:
    """Computed in all."""
    done = zip(backend.batches, backend.results, strict=True)
    return sum(
        len(chunk.tokens)
        for batch, result in done
        if result is DecodeResult.DONE
        for chunk in batch
    )


KINDS = {"plain": {}, "window": {"n_swa": 6}, "recurrent": {"recurrent": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_prefix_of_many_requests_is_read_once(kind: str) -> None:
    backend = FakeBackend(
        n_ctx=512, n_seq_max=4, n_batch=16, next_token=endless_token, **KINDS[kind]
    )
    requests = [Request((*SYSTEM, n, n + 1), max_tokens=6) for n in range(4)]
    _, outcomes = run_together(backend, requests)
    cached = [outcome.finish.usage.n_cached for outcome in outcomes]
    assert cached == [0, 40, 40, 40]
    n_answers = 4 * 5  # the last token of an answer is never decoded
    assert n_rows(backend) == len(SYSTEM) + 4 * 2 + n_answers


@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_for_several_answers_is_read_once(kind: str) -> None:
    """Each has to compute the last token by itself, for the logits to draw from."""
    backend = FakeBackend(
        n_ctx=512, n_seq_max=4, n_batch=16, next_token=endless_token, **KINDS[kind]
    )
    prompt = (*SYSTEM, 1, 2, 3, 4)
    requests = [Request(prompt, SamplingParams(seed=n), max_tokens=6) for n in range(4)]
    _, outcomes = run_together(backend, requests)
    cached = [outcome.finish.usage.n_cached for outcome in outcomes]
    assert cached == [0, 43, 43, 43]
    assert n_rows(backend) == 44 + 3 + 4 * 5
    # The others come in at the step after the prompt's last, and from then on all go together.
    reading = [step for step, batch in enumerate(backend.batches) if len(batch) == 1]
    assert reading == [0, 1, 2]


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_more_requests_than_slots_share_it_too(kind: str) -> None:
    backend = FakeBackend(
        n_ctx=512, n_seq_max=4, n_batch=16, next_token=endless_token, **KINDS[kind]
    )
    requests = [Request((*SYSTEM, n, n + 1), max_tokens=6) for n in range(12)]
    _, outcomes = run_together(backend, requests)
    n_cached = sum(outcome.finish.usage.n_cached for outcome in outcomes)
    assert n_cached >= (9 if kind == "plain" else 6) * 40


def test_who_waits_for_a_prefix_holds_up_nobody() -> None:
    backend = FakeBackend(n_ctx=512, n_seq_max=3, n_batch=16, next_token=endless_token)
    requests = [
        Request((*SYSTEM, 1), max_tokens=4),
        Request((*SYSTEM, 2), max_tokens=4),
        Request((7, 8, 9), max_tokens=4),
    ]
    run_together(backend, requests)
    first_with_third = next(
        i for i, batch in enumerate(backend.batches) if any(c.tokens[0] == 7 for c in batch)
    )
    assert first_with_third <= 2


def test_who_waits_goes_on_alone_when_the_reader_is_cancelled() -> None:
    backend = FakeBackend(n_ctx=512, n_seq_max=2, n_batch=8, next_token=endless_token)
    streams: list[Stream] = []
    backend.on_decode = lambda step, _chunks: streams[0].cancel() if step == 1 else None
    requests = [Request((*SYSTEM, n), max_tokens=4) for n in (1, 2)]
    engine = Engine(backend, checks=True)
    with engine:
        with backend.held_back():
            streams += [engine.submit(request) for request in requests]
        first, second = map(read, streams)
    assert first.finish.reason == "cancelled"
    assert second.tokens == ideal_answer(requests[1], 512, endless_token).tokens
    assert second.finish.usage.n_cached == 8
    check_books(engine, backend)


@pytest.mark.parametrize("kind", ["window", "recurrent"])
def test_a_shared_prefix_is_gone_back_to_when_all_have_moved_on(kind: str) -> None:
    """The window is far beyond it in every slot; a checkpoint where the requests parted helps."""
    backend = FakeBackend(
        n_ctx=512, n_seq_max=2, n_batch=16, next_token=endless_token, **KINDS[kind]
    )
    requests = [Request((*SYSTEM, n, *range(100, 120)), max_tokens=30) for n in range(6)]
    with patch.object(residents, "_CHECKPOINT_EVERY", 16):
        _, outcomes = run_together(backend, requests)
    assert [outcome.finish.usage.n_cached for outcome in outcomes] == [0, 40, 40, 40, 40, 40]


# ---- room


def test_a_request_comes_in_when_its_cells_are_there() -> None:
    """Three prompts of 24 in 64 cells: two at once, the third after them, and nobody put back."""
    backend = FakeBackend(n_ctx=64, n_seq_max=3, n_batch=32, next_token=endless_token)
    requests = [Request(tuple(range(n, n + 20)), max_tokens=4) for n in (0, 100, 200)]
    run_together(backend, requests)
    assert all(sampler.n_sampled == 4 for sampler in backend.samplers)
    widest = max(len(batch) for batch in backend.batches)
    assert widest == 2
    assert n_rows(backend) == 3 * 23


def test_idle_prefixes_go_before_anyone_is_put_back() -> None:
    backend = FakeBackend(n_ctx=64, n_seq_max=4, n_batch=16, next_token=endless_token)
    engine = Engine(backend, checks=True)
    with engine:
        run(engine, range(20), 1)
        run(engine, range(100, 120), 1)
        with backend.held_back():
            streams = [
                engine.submit(Request((n, n), SamplingParams(seed=n), max_tokens=18))
                for n in (200, 210)
            ]
        outcomes = [read(stream) for stream in streams]
    assert all(len(outcome.tokens) == 18 for outcome in outcomes)
    assert n_rows(backend) == 2 * 20 + 2 * 19  # nothing was read twice
    check_books(engine, backend)


def test_the_youngest_is_put_back_and_gives_the_same_answer_later() -> None:
    backend = FakeBackend(n_ctx=64, n_seq_max=2, n_batch=16, next_token=endless_token)
    requests = [Request((n, n + 1), max_tokens=50) for n in (1, 4)]
    _, outcomes = run_together(backend, requests)
    assert DecodeResult.FULL in backend.results
    ends = [
        max(i for i, batch in enumerate(backend.batches) if any(c.seq_id == s for c in batch))
        for s in (0, 1)
    ]
    assert ends[0] < ends[1]
    assert [sampler.n_sampled for sampler in backend.samplers] == [50, 50]
    assert outcomes[1].finish.usage.n_completion == 50


def test_a_large_request_is_not_passed_for_ever_by_small_ones() -> None:
    backend = FakeBackend(n_ctx=64, n_seq_max=4, n_batch=16, next_token=endless_token)
    large = Request(tuple(range(190, 246)), max_tokens=4)
    streams: dict[str, Stream] = {}

    def keep_it_busy(step: int, _chunks: Sequence[Chunk]) -> None:
        if step == 4:
            streams["large"] = engine.submit(large)
        if step % 4 == 0 and step < 120:
            streams[f"small {step}"] = engine.submit(Request((step, 1, 2), max_tokens=8))

    backend.on_decode = keep_it_busy
    engine = Engine(backend, checks=True)
    with engine:
        with backend.held_back():
            streams["first"] = engine.submit(Request((250, 1), max_tokens=8))
        read(streams["first"])
        assert read(streams["large"]).tokens == ideal_answer(large, 64, endless_token).tokens
        done = {"first", "large"}
        while left := streams.keys() - done:
            done.add(name := min(left))
            read(streams[name])
    firsts = [chunk.tokens[0] for batch in backend.batches for chunk in batch if chunk.pos == 0]
    assert firsts.index(190) == 2  # after the two that were there before it
    assert len(firsts) > 5
    check_books(engine, backend)


# ---- fairness in a step


def test_answers_go_on_at_every_step_while_a_prompt_is_read() -> None:
    backend = FakeBackend(n_ctx=512, n_seq_max=3, n_batch=8, next_token=endless_token)
    late: list[Stream] = []

    def submit_long(step: int, _chunks: Sequence[Chunk]) -> None:
        if step == 3:
            late.append(engine.submit(Request(tuple(range(200)), max_tokens=2)))

    backend.on_decode = submit_long
    engine = Engine(backend, checks=True)
    with engine:
        with backend.held_back():
            streams = [engine.submit(Request((n,), max_tokens=30)) for n in (1, 2)]
        for stream in [*streams, *late]:
            read(stream)
    reading = [batch for batch in backend.batches if any(c.n_outputs == 0 for c in batch)]
    assert len(reading) > 20
    for batch in reading[:20]:
        assert sum(len(c.tokens) == 1 and c.n_outputs == 1 for c in batch) == 2
        assert sum(len(c.tokens) for c in batch) == 8
    check_books(engine, backend)


@pytest.mark.parametrize(("n_prompts", "n_most"), [(1, 70), (3, 260), (9, 260)])
def test_prompts_beside_answers_come_in_pieces_that_take_a_bounded_time(
    n_prompts: int, n_most: int
) -> None:
    """A chunk of 512 rows takes seconds on a small machine; who reads along should not wait so.
    But where more wait to be read, it is they who should not wait."""
    now_s = [0.0]

    def tick(_step: int, chunks: Sequence[Chunk]) -> None:
        now_s[0] += 0.01 + 0.004 * sum(len(c.tokens) for c in chunks)

    backend = FakeBackend(
        n_ctx=16384, n_seq_max=10, n_batch=512, next_token=endless_token, on_decode=tick
    )
    engine = Engine(backend, checks=True, speculative="off", clock=lambda: now_s[0])
    with engine:
        run(engine, [i % 250 for i in range(600)], 1)  # what rows cost is learnt here
        late: list[Stream] = []

        def submit_long(step: int, chunks: Sequence[Chunk]) -> None:
            tick(step, chunks)
            while len(late) < n_prompts:
                prompt = tuple((i * i + 7 + len(late)) % 250 for i in range(1000))
                late.append(engine.submit(Request(prompt, max_tokens=2)))

        n_before = backend.n_steps
        backend.on_decode = submit_long
        run(engine, (3,), 40)
        for stream in late:
            read(stream)
    beside = [
        batch
        for batch in backend.batches[n_before:]
        if any(len(c.tokens) > 1 for c in batch) and any(len(c.tokens) == 1 for c in batch)
    ]
    assert beside
    longest = max(sum(len(c.tokens) for c in batch) for batch in beside)
    assert n_most / 2 < longest <= n_most


# ---- checkpoints


@pytest.mark.parametrize("kind", ["window", "recurrent"])
def test_a_turn_whose_thinking_was_dropped_starts_from_a_checkpoint(kind: str) -> None:
    """The next prompt has the last one's tokens, but not all of the answer's."""
    backend = FakeBackend(n_ctx=1024, n_batch=32, next_token=endless_token, **KINDS[kind])
    prompt = tuple(i % 250 for i in range(100))
    engine = Engine(backend, checks=True)
    with engine:
        first = run(engine, prompt, 60)
        turn = (*prompt, *first.tokens[40:], 1, 2, 3)
        second = run(engine, turn, 4)
        again = run(engine, turn, 4)
    assert second.finish.usage.n_cached == (100 if kind == "window" else 99)
    assert again.finish.usage.n_cached >= 99
    for outcome in (second, again):
        ideal = ideal_answer(Request(turn, max_tokens=4), 1024, endless_token)
        assert outcome.tokens == ideal.tokens
    check_books(engine, backend)


def test_a_checkpoint_that_cannot_be_put_back_costs_a_new_reading_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = FakeBackend(n_ctx=1024, n_batch=32, next_token=endless_token, n_swa=6)
    monkeypatch.setattr(backend, "load_state", lambda *_args, **_more: False)
    prompt = tuple(i % 250 for i in range(100))
    engine = Engine(backend, checks=True)
    with engine:
        run(engine, prompt, 60)
        turn = (*prompt, 1, 2, 3)
        second = run(engine, turn, 4)
    assert second.finish.usage.n_cached == 0
    ideal = ideal_answer(Request(turn, max_tokens=4), 1024, endless_token)
    assert second.tokens == ideal.tokens
    check_books(engine, backend)


def test_guesses_of_shared_prefixes() -> None:
    backend = FakeBackend(
        n_ctx=512, n_seq_max=4, n_batch=24, n_outputs_max=24, next_token=copying_token
    )
    requests = [Request((*SYSTEM, n, n + 1), max_tokens=40) for n in range(8)]
    run_together(backend, requests, speculative="ngram", clock=lambda: 1.0 + 0.06 * backend.n_steps)


def test_many_requests_with_cancels_leave_nothing_behind() -> None:
    """Shared starts, cancels at random, more requests than cells: the books agree at every rest."""
    rng = random.Random(11)
    backend = FakeBackend(
        n_ctx=96, n_seq_max=4, n_batch=16, n_outputs_max=12, next_token=copying_token, n_swa=8
    )
    n_threads = threading.active_count()
    engine = Engine(
        backend, checks=True, speculative="auto", clock=lambda: 1.0 + 0.06 * backend.n_steps
    )
    with engine:
        for _ in range(150):
            streams = []
            for _ in range(rng.randrange(1, 7)):
                start = SYSTEM[: rng.choice((0, 12, 30))]
                prompt = (*start, *(rng.randrange(250) for _ in range(rng.randrange(1, 12))))
                streams.append(engine.submit(Request(prompt, max_tokens=rng.randrange(1, 12))))
            for stream in streams:
                if rng.random() < 0.3:
                    stream.cancel()
                read(stream)
            backend.batches.clear()
            backend.samplers.clear()
    assert threading.active_count() == n_threads
    assert not engine._answers.streams and not engine._core.active
    assert len(engine._core.residents) == 0
    check_books(engine, backend)


# ---- where each sequence has cells of its own


def split_backend(**options: object) -> FakeBackend:
    given = {"n_ctx": 128, "n_seq_max": 6, "n_batch": 32, "next_token": endless_token}
    return FakeBackend(**{**given, "kv_unified": False, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_a_prefix_is_copied_not_read_again(kind: str) -> None:
    backend = split_backend(**KINDS[kind])
    requests = [Request((*SYSTEM, n, n + 1), max_tokens=6) for n in range(6)]
    engine, outcomes = run_together(backend, requests)
    assert [outcome.finish.usage.n_cached for outcome in outcomes] == [0, 40, 40, 40, 40, 40]
    assert n_rows(backend) == len(SYSTEM) + 6 * 2 + 6 * 5
    assert engine.counters.n_ctx == 6 * 128
    assert engine.counters.n_cells == 6 * (42 + 5)  # each has its own


def test_each_may_have_its_part_of_the_cache_and_no_more() -> None:
    backend = split_backend(n_ctx=32)
    requests = [Request((n, 1, 2), max_tokens=99) for n in range(6)]
    _, outcomes = run_together(backend, requests)
    assert DecodeResult.FULL not in backend.results
    assert all(len(outcome.tokens) == 30 for outcome in outcomes)


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_running_sequences_are_kept_neighbours(kind: str) -> None:
    """1, 3 and 5 go on when the others have ended; in the end only the last one does."""
    backend = split_backend(**KINDS[kind])
    lengths = [5, 40, 6, 50, 7, 60]
    requests = [Request((n, n + 1), max_tokens=k) for n, k in enumerate(lengths)]
    engine, _ = run_together(backend, requests)
    for batch in backend.batches:
        ids = [chunk.seq_id for chunk in batch]
        assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert backend.n_swaps == 1  # the last one into the gap, and all fit
    # The next turns find what each left behind, wherever it is now.
    cached = engine._core.residents.cache
    for request, k in zip(requests, lengths, strict=True):
        ideal = ideal_answer(request, 128, endless_token)
        held = [*request.prompt, *ideal.tokens[: k - 1]]
        assert any(cached.tree.tokens(slot.seq_id) == held for slot in cached.slots)


def test_nobody_is_moved_where_cells_are_shared_or_all_are_neighbours() -> None:
    backend = split_backend()
    run_together(backend, [Request((n,), max_tokens=9) for n in range(6)])
    assert backend.n_swaps == 0
    unified = FakeBackend(n_ctx=512, n_seq_max=6, n_batch=32, next_token=endless_token)
    requests = [Request((n,), max_tokens=k) for n, k in enumerate([3, 30, 3, 30, 3, 30])]
    run_together(unified, requests)  # a swap would be a violation


def test_guesses_of_sequences_with_cells_of_their_own() -> None:
    backend = split_backend(n_outputs_max=32, next_token=copying_token)
    requests = [Request((*SYSTEM, n, n + 1), max_tokens=40) for n in range(8)]
    run_together(backend, requests, speculative="ngram", clock=lambda: 1.0 + 0.06 * backend.n_steps)


@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_second_conversation_starts_from_the_first_ones_checkpoint(kv_unified: bool) -> None:
    """The first is far beyond its system prompt, and stays as it is."""
    backend = FakeBackend(
        n_ctx=256, n_seq_max=3, n_batch=32, n_swa=6, next_token=endless_token, kv_unified=kv_unified
    )
    first = Request((*SYSTEM, *range(40)), max_tokens=20, come_back_to=(len(SYSTEM),))
    second = Request((*SYSTEM, 7, 7, 7), max_tokens=20)
    engine = Engine(backend, checks=True)
    with engine:
        answer = read(engine.submit(first))
        other = read(engine.submit(second))
        again = run(engine, (*first.prompt, *answer.tokens, 5), 4)
    assert other.finish.usage.n_cached == len(SYSTEM)
    assert other.tokens == ideal_answer(second, 256, endless_token).tokens
    assert again.finish.usage.n_cached == len(first.prompt) + 19
    check_books(engine, backend)


def test_no_pattern_of_arrivals_moves_more_than_the_gaps_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One long answer, and short requests that go on with five long conversations by turns: it
    cannot stay beside all of them."""
    monkeypatch.setattr(residents, "_CELLS_PER_GAP", 64)
    backend = split_backend(n_ctx=1024, n_seq_max=6, n_batch=512)
    engine = Engine(backend, checks=True)
    with engine:
        talks = [tuple((i * 7 + k) % 250 for i in range(400)) for k in range(5)]
        held = [(*talk, *run(engine, talk, 2).tokens) for talk in talks]
        long = engine.submit(Request((3,), max_tokens=900))
        for n in range(40):
            read(engine.submit(Request((*held[n * 2 % 5], n), max_tokens=2)))
        long.cancel()
        read(long)
    apart = [
        batch
        for batch in backend.batches
        if len(split_rows([(chunk.seq_id, 1) for chunk in batch])) > 1
    ]
    assert len(apart) > 20
    assert backend.n_moved <= (len(apart) + backend.n_swaps) * 64
    check_books(engine, backend)


def test_the_fewest_cells_are_moved() -> None:
    found = residents._find_gaps({0, 2}, [4, 0, 1504, 0])
    assert found == residents._Gaps(1, [(0, 1)], 4)
    assert residents._find_gaps({1, 2, 3}, [9, 9, 9, 9]) == residents._Gaps()
    # Neither the place of a long conversation, running or not.
    assert residents._find_gaps({0, 3}, [5, 1000, 8, 900]).moves == [(0, 2)]


def test_a_long_conversation_is_not_copied_for_a_few_tokens() -> None:
    backend = split_backend(n_ctx=1024, n_seq_max=4, n_batch=64)
    engine = Engine(backend, checks=True)
    with engine:
        run(engine, (1, 2, 3, *(i % 200 for i in range(900))), 2)
        assert run(engine, (1, 2, 3, 7, 7), 40).finish.usage.n_cached == 0
        # The other one that starts alike is short.
        assert run(engine, (1, 2, 3, 8, 8), 4).finish.usage.n_cached == 3
    assert len(backend.held(0)) > 900
    check_books(engine, backend)


def test_where_there_is_no_memory_to_move_all_stays_where_it_is() -> None:
    backend = split_backend()
    backend.has_memory = False
    run_together(
        backend, [Request((n,), max_tokens=k) for n, k in enumerate([3, 30, 3, 30, 3, 30])]
    )
    assert backend.n_moved == 0


def test_guesses_beyond_a_window_are_checked_in_one_pass() -> None:
    """A second one would take the guesses of the first for what is there."""
    backend = split_backend(n_outputs_max=32, next_token=copying_token, n_swa=6)
    requests = [Request((*SYSTEM, n, n + 1), max_tokens=60) for n in range(4)]
    run_together(backend, requests, speculative="ngram", clock=lambda: 1.0 + 0.06 * backend.n_steps)
    checked = [
        [(chunk.seq_id, len(chunk.tokens)) for chunk in batch]
        for batch in backend.batches
        if len(batch) > 1 and any(chunk.n_outputs > 1 for chunk in batch)
    ]
    assert checked
    assert all(len(split_rows(rows)) == 1 for rows in checked)

"""The embedder's thread: who waits is computed together, fairly, apart in failure, and always
answered."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from llmrun.engine.embedder import Embedder
from llmrun.errors import ContextOverflowError, EngineError, UsageError
from tests.fakes.fake_embed_backend import N_VOCAB, FakeEmbedBackend, ideal_row

WAIT_S = 20


def held_backend(**changes: object) -> FakeEmbedBackend:
    return FakeEmbedBackend(gate=threading.Semaphore(0), **changes)  # type: ignore[arg-type]


def hold_first(embedder: Embedder, backend: FakeEmbedBackend) -> Future[list[list[float]]]:
    """A job in the middle of its batch, so that what is submitted now has to wait."""
    first = embedder.submit([[1]])
    assert backend.began.wait(WAIT_S)
    return first


def test_vectors_come_in_the_order_of_the_inputs() -> None:
    inputs = [[i, 2 * i + 1] for i in range(50)]
    with Embedder(FakeEmbedBackend(n_seq_max=7)) as embedder:
        assert embedder.embed(inputs) == [ideal_row(tokens) for tokens in inputs]


def test_a_batch_holds_as_many_inputs_as_fit() -> None:
    backend = FakeEmbedBackend(n_pack=10, n_seq_max=3)
    with Embedder(backend) as embedder:
        embedder.embed([[1] * 4, [2] * 6, [3] * 5, [4], [5], [6]])
    assert [[len(tokens) for tokens in batch] for batch in backend.batches] == [
        [4, 6],
        [5, 1, 1],
        [1],
    ]


def test_an_input_longer_than_a_batch_is_computed_alone() -> None:
    backend = FakeEmbedBackend(n_pack=10, n_ctx=64)
    with Embedder(backend) as embedder:
        embedder.embed([[1] * 3, [2] * 40, [3]])
    assert [[len(tokens) for tokens in batch] for batch in backend.batches] == [[3], [40], [1]]


def test_callers_that_wait_share_a_batch_an_input_of_each_in_turn() -> None:
    backend = held_backend(n_seq_max=4)
    with Embedder(backend) as embedder:
        first = hold_first(embedder, backend)
        many = embedder.submit([[10 + i] for i in range(6)])
        few = embedder.submit([[100]])
        others = embedder.submit([[200], [201]])
        assert backend.gate is not None
        backend.gate.release(10)
        assert few.result(WAIT_S) == [ideal_row([100])]
        assert others.result(WAIT_S) == [ideal_row([200]), ideal_row([201])]
        assert many.result(WAIT_S) == [ideal_row([10 + i]) for i in range(6)]
        assert first.result(WAIT_S) == [ideal_row([1])]
    assert backend.batches[1:] == [
        [(10,), (100,), (200,), (11,)],
        [(201,), (12,), (13,), (14,)],
        [(15,)],
    ]


def test_many_threads_get_their_own_vectors_and_one_thread_computes() -> None:
    backend = FakeEmbedBackend()
    with Embedder(backend) as embedder:

        def ask(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(20):
                inputs = [
                    [rng.randrange(N_VOCAB) for _ in range(rng.randint(1, 12))]
                    for _ in range(rng.randint(0, 5))
                ]
                assert embedder.embed(inputs) == [ideal_row(tokens) for tokens in inputs]

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(16)))
    assert set(backend.threads) == {"llmrun-embedder"}


def test_no_inputs_need_no_batch() -> None:
    backend = FakeEmbedBackend()
    with Embedder(backend) as embedder:
        assert embedder.embed([]) == []
    assert backend.batches == []


@pytest.mark.parametrize("bad", [[], [-1], [N_VOCAB], [1, 2, 1 << 40]])
def test_what_is_no_text_of_the_vocabulary_is_refused(bad: list[int]) -> None:
    backend = FakeEmbedBackend()
    with Embedder(backend) as embedder:
        with pytest.raises(UsageError):
            embedder.embed([[1], bad])
        assert embedder.embed([[N_VOCAB - 1]]) == [ideal_row([N_VOCAB - 1])]
    assert backend.batches == [[(N_VOCAB - 1,)]]


def test_an_input_over_the_limit_is_an_error_and_not_cut() -> None:
    with Embedder(FakeEmbedBackend(n_ctx=5)) as embedder:
        assert embedder.embed([[1] * 5]) == [ideal_row([1] * 5)]
        with pytest.raises(ContextOverflowError) as caught:
            embedder.embed([[1] * 6])
        assert (caught.value.n_prompt, caught.value.n_ctx) == (6, 5)


def test_a_callers_list_may_change_while_it_waits() -> None:
    backend = held_backend()
    with Embedder(backend) as embedder:
        hold_first(embedder, backend)
        tokens = [7]
        future = embedder.submit([tokens])
        tokens[0] = N_VOCAB + 1
        assert backend.gate is not None
        backend.gate.release(2)
        assert future.result(WAIT_S) == [ideal_row([7])]


def test_a_failing_input_is_not_its_neighbours_failure() -> None:
    backend = held_backend(poison=13)
    with Embedder(backend) as embedder:
        hold_first(embedder, backend)
        bad = embedder.submit([[13], [14]])
        good = embedder.submit([[5], [6]])
        assert backend.gate is not None
        backend.gate.release(50)
        assert good.result(WAIT_S) == [ideal_row([5]), ideal_row([6])]
        with pytest.raises(EngineError, match="poisoned"):
            bad.result(WAIT_S)
        assert embedder.embed([[3]]) == [ideal_row([3])]


def test_a_cancelled_call_is_not_computed_any_further() -> None:
    backend = held_backend(n_seq_max=2)
    with Embedder(backend) as embedder:
        hold_first(embedder, backend)
        gone = embedder.submit([[20 + i] for i in range(9)])
        kept = embedder.submit([[40]])
        assert gone.cancel()
        assert backend.gate is not None
        backend.gate.release(20)
        assert kept.result(WAIT_S) == [ideal_row([40])]
        with pytest.raises(CancelledError):
            gone.result(WAIT_S)
    assert backend.batches == [[(1,)], [(40,)]]


def test_scores_are_those_of_the_label_that_is_asked_for() -> None:
    with Embedder(FakeEmbedBackend(pooling="rank")) as embedder:
        assert embedder.rank([[1, 2], [5]]) == [3.0, 5.0]
        with pytest.raises(UsageError):
            embedder.embed([[1]])
    with Embedder(FakeEmbedBackend(pooling="rank", labels=("no", "Yes", "?"))) as embedder:
        assert embedder.rank([[1, 2], [5]]) == [2.0, 1.0]
    with Embedder(FakeEmbedBackend()) as embedder, pytest.raises(UsageError):
        embedder.rank([[1]])


def test_scores_can_be_awaited_and_cancelled_and_fail() -> None:
    backend = held_backend(pooling="rank", poison=13)
    with Embedder(backend) as embedder:
        first = embedder.submit_rank([[1]])
        assert backend.began.wait(WAIT_S)
        gone = embedder.submit_rank([[2]])
        bad = embedder.submit_rank([[13]])
        assert gone.cancel()
        assert backend.gate is not None
        backend.gate.release(5)
        assert first.result(WAIT_S) == [1.0]
        with pytest.raises(EngineError, match="poisoned"):
            bad.result(WAIT_S)
    assert [(2,)] not in backend.batches


def test_an_event_loop_can_wait() -> None:
    async def ask(embedder: Embedder) -> list[list[list[float]]]:
        jobs = [asyncio.wrap_future(embedder.submit([[i]])) for i in range(5)]
        return await asyncio.gather(*jobs)

    with Embedder(FakeEmbedBackend()) as embedder:
        assert asyncio.run(ask(embedder)) == [[ideal_row([i])] for i in range(5)]


def test_closing_while_busy_answers_everybody_and_frees_the_model() -> None:
    backend = held_backend()
    embedder = Embedder(backend)
    running = hold_first(embedder, backend)
    waiting = [embedder.submit([[i]]) for i in range(3)]
    assert embedder.state == "running"
    embedder.close()
    assert backend.is_closed
    assert embedder.state == "closed"
    for future in (running, *waiting):
        with pytest.raises(EngineError, match="closed"):
            future.result(WAIT_S)
    with pytest.raises(EngineError, match="closed"):
        embedder.embed([[1]])
    with pytest.raises(EngineError, match="closed"):
        embedder.embed([])
    embedder.close()


def test_closing_from_many_threads_while_others_ask() -> None:
    for _ in range(20):
        embedder = Embedder(FakeEmbedBackend())
        start = threading.Barrier(6)

        def ask(embedder: Embedder = embedder, start: threading.Barrier = start) -> None:
            start.wait(WAIT_S)
            try:
                assert embedder.embed([[3]]) == [ideal_row([3])]
            except EngineError:
                pass

        def close(embedder: Embedder = embedder, start: threading.Barrier = start) -> None:
            start.wait(WAIT_S)
            embedder.close()

        threads = [threading.Thread(target=target) for target in [ask] * 4 + [close] * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()


def test_a_bug_below_ends_the_embedder_and_not_the_wait() -> None:
    def explode() -> None:
        raise ZeroDivisionError("oops")

    backend = FakeEmbedBackend(before=explode)
    embedder = Embedder(backend)
    with pytest.raises(EngineError) as caught:
        embedder.embed([[1], [2]])
    assert "oops" in str(caught.value.why)
    embedder.close()
    assert backend.is_closed
    with pytest.raises(EngineError) as caught:
        embedder.embed([[1]])
    assert "oops" in str(caught.value.why)


def test_fewer_threads_while_the_machine_is_busy() -> None:
    now = 0.0
    cost_s = 0.001

    def pass_time() -> None:
        nonlocal now
        now += cost_s * 100

    backend = FakeEmbedBackend(before=pass_time, n_threads=4, n_ctx=512, n_pack=512)
    with Embedder(backend, steady_threads=True, clock=lambda: now) as embedder:
        for _ in range(20):
            embedder.embed([[1] * 100])
        cost_s = 0.01
        for _ in range(20):
            embedder.embed([[1] * 100])
    assert backend.thread_counts
    assert min(backend.thread_counts) < 4

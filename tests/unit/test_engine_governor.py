"""The thread governor on a simulated machine: the measured collapse beside busy programs, noise,
and neighbours that come and go. Times are simulated; nothing here depends on a clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.engine.governor import Governor, thread_counts

# Tokens a second by (busy neighbours, threads), measured on two cores (SmolLM2-135M).
TWO_CORES = {
    (0, 2): 119.0, (0, 1): 89.0,
    (1, 2): 38.0, (1, 1): 67.0,
    (2, 2): 5.4, (2, 1): 28.0,
    (9, 2): 0.4, (9, 1): 45.0,  # another model process with all its threads
}  # fmt: skip

BLOCK_S = 0.05


@dataclass(slots=True)
class Run:
    n_steps: int = 0
    elapsed_s: float = 0.0
    changes: list[tuple[float, int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.n_steps / self.elapsed_s


def simulate(
    governor: Governor,
    step_s: Callable[[int], float],
    for_s: float,
    *,
    noise: float = 0.0,
    n_rows: int = 1,
    seed: int = 1,
) -> Run:
    """Steps as the engine makes them: looked at in blocks of 50 ms, at least one step each."""
    rng = random.Random(seed)
    run = Run()
    while run.elapsed_s < for_s:
        n_threads = governor.threads(n_rows)
        if not run.changes or run.changes[-1][1] != n_threads:
            run.changes.append((run.elapsed_s, n_threads))
        n_steps, block_s = 0, 0.0
        while block_s < BLOCK_S:
            block_s += step_s(n_threads) * rng.uniform(1 - noise, 1 + noise)
            n_steps += 1
        governor.observe(n_rows, n_steps, block_s)
        run.n_steps += n_steps
        run.elapsed_s += block_s
    return run


def two_cores(n_busy: int) -> Callable[[int], float]:
    return lambda n_threads: 1 / TWO_CORES[n_busy, n_threads]


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize(("n_busy", "of_best", "of_default"), [
    (0, 0.95, 0.95), (1, 0.9, 1.5), (2, 0.85, 4.0), (9, 0.6, 30.0),
])  # fmt: skip
def test_the_aims_hold_from_the_first_step(
    n_busy: int, of_best: float, of_default: float, noise: float
) -> None:
    run = simulate(Governor(2, 2), two_cores(n_busy), 30, noise=noise)
    best = max(TWO_CORES[n_busy, 1], TWO_CORES[n_busy, 2])
    assert run.rate >= of_best * best
    assert run.rate >= of_default * TWO_CORES[n_busy, 2]


def test_a_short_answer_on_a_free_machine_loses_nearly_nothing() -> None:
    run = simulate(Governor(2, 2), two_cores(0), 128 / 119, noise=0.1)
    assert run.rate >= 0.95 * 119


def test_down_when_a_neighbour_comes_and_up_again_when_it_goes() -> None:
    governor = Governor(2, 2)
    simulate(governor, two_cores(0), 20, noise=0.1)
    assert governor.threads(1) == 2
    busy = simulate(governor, two_cores(2), 1.0, noise=0.1)
    assert governor.threads(1) == 1
    assert busy.rate > 2 * 5.4
    simulate(governor, two_cores(2), 60, noise=0.1)
    assert governor.threads(1) == 1
    free = simulate(governor, two_cores(0), 3.0, noise=0.1)
    assert governor.threads(1) == 2
    assert free.rate > 0.95 * 89


@pytest.mark.parametrize("n_busy", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_it_does_not_swing_to_and_fro(n_busy: int, seed: int) -> None:
    governor = Governor(2, 2)
    simulate(governor, two_cores(n_busy), 10, noise=0.2, seed=seed)
    best = max((1, 2), key=lambda n: TWO_CORES[n_busy, n])
    run = simulate(governor, two_cores(n_busy), 120, noise=0.2, seed=seed + 100)
    # A try and the way back are two changes.
    assert len(run.changes) <= 2 * 120 / 8
    assert run.rate >= 0.95 * TWO_CORES[n_busy, best]


def test_two_counts_as_fast_as_each_other_are_left_alone() -> None:
    run = simulate(Governor(2, 2), lambda n_threads: 0.01, 120, noise=0.2)
    assert len(run.changes) <= 2 * 120 / 8
    assert run.rate > 98


def test_steps_that_grow_with_the_text_are_not_a_busy_machine() -> None:
    governor = Governor(2, 2)
    depth = 0

    def step_s(n_threads: int) -> float:
        nonlocal depth
        depth += 1
        return (1 + depth / 2000) / TWO_CORES[0, n_threads]

    run = simulate(governor, step_s, 60, noise=0.05)
    assert governor.threads(1) == 2
    assert len(run.changes) <= 12


def test_each_kind_of_batch_has_its_own_count() -> None:
    governor = Governor(2, 2)
    simulate(governor, two_cores(2), 2)
    assert governor.threads(1) == 1
    assert governor.threads(4) == governor.threads(512) == 2
    simulate(governor, lambda n: 4 / TWO_CORES[2, n], 4, n_rows=4)
    assert governor.threads(4) == governor.threads(7) == 1
    assert governor.threads(512) == 2


def test_a_prompt_is_never_slowed_to_find_out() -> None:
    governor = Governor(2, 2)
    run = simulate(governor, lambda n_threads: 2.0 / n_threads, 60, n_rows=512, noise=0.1)
    assert run.changes == [(0.0, 2)]


def test_rows_of_other_numbers_are_compared_with_their_own_kind() -> None:
    """Batches of 2 to 16 rows in turn cost up to four times each other; that is no busy machine."""
    governor = Governor(2, 2)
    rng = random.Random(1)
    n_changes = 0
    for _ in range(3000):
        before = governor.threads(2)
        n_rows = rng.randint(2, 16)
        governor.observe(n_rows, 1, (0.0066 + 0.0033 * n_rows) * (1.0 if before == 2 else 1.4))
        n_changes += governor.threads(2) != before
    assert governor.threads(2) == 2
    assert n_changes <= 20


def test_many_cores_beside_one_busy_process_and_beside_one_for_each() -> None:
    """With all cores taken but one, one thread less; with each shared, few threads."""

    def step_s(n_busy: int) -> Callable[[int], float]:
        def seconds(n_threads: int) -> float:
            wait = 0.02 * max(0, n_threads + n_busy - 16)
            return 0.16 / n_threads + 0.002 + wait

        return seconds

    governor = Governor(16, 16)
    free = simulate(governor, step_s(0), 20, noise=0.05)
    assert governor.threads(1) == 16
    assert free.rate > 0.95 / step_s(0)(16)
    simulate(governor, step_s(1), 20, noise=0.05)
    assert governor.threads(1) == 15
    simulate(governor, step_s(16), 20, noise=0.05)
    assert governor.threads(1) <= 4
    simulate(governor, step_s(0), 60, noise=0.05)
    assert governor.threads(1) >= 15


def test_one_thread_is_left_alone() -> None:
    governor = Governor(1, 1)
    assert simulate(governor, lambda n_threads: 0.01 * n_threads, 5).changes == [(0.0, 1)]


@given(st.integers(1, 128))
def test_counts_to_try(n_max: int) -> None:
    counts = thread_counts(n_max)
    assert counts[0] == 1 and counts[-1] == n_max
    assert list(counts) == sorted(set(counts))
    assert len(counts) <= 6


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 16),
    st.lists(st.tuples(st.integers(1, 600), st.integers(0, 20), st.floats(0, 5)), max_size=200),
)
def test_whatever_is_observed_the_count_is_one_of_those(
    n_max: int, seen: list[tuple[int, int, float]]
) -> None:
    governor = Governor(n_max, n_max)
    for n_rows, n_steps, elapsed_s in seen:
        governor.observe(n_rows, n_steps, elapsed_s)
        for n in (1, 2, 33):
            assert governor.threads(n) in thread_counts(n_max)

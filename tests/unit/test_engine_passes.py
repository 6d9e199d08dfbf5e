"""How llama.cpp takes a batch apart where each sequence has a cache of its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.engine.backend import Chunk
from llmrun.engine.governor import Governor
from llmrun.engine.pace import Pace
from llmrun.engine.passes import split_rows
from llmrun.engine.speculate import StepCosts, choose_lengths
from tests.fakes.fake_backend import FakeBackend


@pytest.mark.parametrize(
    ("rows", "passes"),
    [
        ([(0, 1), (1, 1), (2, 1)], [3]),
        ([(0, 1), (2, 1), (3, 1)], [1, 2]),  # a gap
        ([(0, 1), (1, 5), (2, 1)], [3, 4]),  # a prompt, or guesses, of one
        ([(0, 3), (1, 1), (2, 3)], [3, 2, 2]),  # what is left of both is no neighbour
        ([(0, 4), (1, 4)], [8]),
        ([(5, 7)], [7]),
        ([], []),
    ],
)
def test_neighbours_go_together_as_far_as_all_have_rows(
    rows: list[tuple[int, int]], passes: list[int]
) -> None:
    assert split_rows(rows) == passes


def split_equal(rows: list[tuple[int, int]]) -> list[int]:
    """Row by row, as `llama_batch_allocr::split_equal` does it with `sequential`."""
    batch = [seq_id for seq_id, n in rows for _ in range(n)]
    used = [False] * len(batch)
    passes = []
    while True:
        chosen: list[int] = []
        for i, seq_id in enumerate(batch):
            if used[i] or seq_id in chosen or (chosen and seq_id != chosen[-1] + 1):
                continue
            chosen.append(seq_id)
        if not chosen:
            return passes
        n_taken = 0
        while all(any(s == c and not used[i] for i, s in enumerate(batch)) for c in chosen):
            for c in chosen:
                used[next(i for i, s in enumerate(batch) if s == c and not used[i])] = True
                n_taken += 1
        passes.append(n_taken)


@given(st.dictionaries(st.integers(0, 9), st.integers(1, 6), max_size=7))
def test_it_is_what_the_library_does(rows: dict[int, int]) -> None:
    batch = sorted(rows.items())
    assert split_rows(batch) == split_equal(batch)
    assert sum(split_rows(batch)) == sum(rows.values())


def test_guesses_for_one_of_several_are_a_pass_of_their_own() -> None:
    """A pass takes 10, a row 1 more: sure guesses for one sequence pay in a batch, for two
    such passes they do not; for a sequence alone, or as many for both neighbours, they do."""
    costs = StepCosts()
    for _ in range(8):
        for n_rows in (1, 2, 3, 4, 8, 12):
            costs.learn(n_rows, 1, 10.0 + n_rows)
    sure = [0.95, 0.9, 0.85, 0.8]
    offers = [sure, [], [], [], [], []]
    assert choose_lengths(offers, costs, n_more_max=9)[0] >= 2
    assert choose_lengths(offers, costs, n_more_max=9, seq_ids=[0, 1, 2, 3, 4, 5]) == [0] * 6
    assert choose_lengths([sure], costs, n_more_max=9, seq_ids=[3])[0] >= 3
    assert min(choose_lengths([sure, sure], costs, n_more_max=9, seq_ids=[3, 2])) >= 3


@pytest.mark.parametrize("kv_unified", [True, False])
def test_the_time_of_several_passes_is_nobodys_time(kv_unified: bool) -> None:
    """Rows of the sequences 0, 2 and 3. Neither the costs nor the threads go by it."""
    now_s = iter(range(100))
    costs, seen = StepCosts(), []
    backend = FakeBackend(n_seq_max=4, kv_unified=kv_unified)
    governor = Governor(1, 1)
    governor.observe = lambda *step: seen.append(step)  # type: ignore[method-assign]
    pace = Pace(backend, lambda: float(next(now_s)), governor, costs)
    pace.decode([Chunk(seq_id, [65], 0, 1) for seq_id in (0, 2, 3)])
    pace.end_step()
    assert (pace.n_steps, pace.busy_s) == (1, 1.0)
    assert costs.is_known is kv_unified
    assert len(seen) == int(kv_unified)
    pace.decode([Chunk(seq_id, [65], 1, 1) for seq_id in (2, 3)])
    pace.end_step()
    assert costs.knows(2)


@pytest.mark.parametrize("other", [[1, 90], [12] * 7])
def test_many_rows_with_logits_say_nothing_of_the_threads(other: list[int]) -> None:
    """Prompts beside an answer, and short ones, cost more by the row than a long one: the machine
    would seem to be busy."""
    now_s = iter(range(100))
    seen = []
    governor = Governor(2, 2)
    governor.observe = lambda *step: seen.append(step)  # type: ignore[method-assign]
    backend = FakeBackend(n_ctx=512, n_seq_max=8, n_batch=256)
    pace = Pace(backend, lambda: float(next(now_s)), governor, StepCosts())
    pace.decode([Chunk(0, [65] * 90, 0, 1)])
    pace.end_step()
    pace.decode([Chunk(n, [65] * n_tokens, 90 * (n == 0), 1) for n, n_tokens in enumerate(other)])
    pace.end_step()
    assert [n_rows for n_rows, *_ in seen] == [90]

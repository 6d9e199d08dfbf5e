"""How many guesses are checked: the number with the most expected tokens a second."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.engine.speculate import StepCosts, choose_lengths

# Seconds of a step by rows: SmolLM2 and Gemma 3 270M on two cores, from 76 to 262 and from 75 to
# 421 rows a second.
SMOL = {1: 1 / 76, 16: 16 / 262}
GEMMA = {1: 1 / 75, 16: 16 / 421}


def line(measured: dict[int, float], n_rows: int) -> float:
    return measured[1] + (measured[16] - measured[1]) * (n_rows - 1) / 15


def costs_of(measured: dict[int, float], n_repeats: int = 5) -> StepCosts:
    costs = StepCosts()
    for _ in range(n_repeats):
        for n_rows in (1, 2, 4, 5, 8, 16, 32):
            costs.learn(n_rows, 1, line(measured, n_rows))
    return costs


def falling(chance: float, n: int) -> list[float]:
    return [chance ** (i + 1) for i in range(n)]


# ---- costs


@pytest.mark.parametrize("measured", [SMOL, GEMMA])
def test_costs_are_those_measured(measured: dict[int, float]) -> None:
    costs = costs_of(measured)
    for n_rows in range(1, 65):
        assert costs.seconds(n_rows) == pytest.approx(line(measured, n_rows), rel=0.1)


@pytest.mark.parametrize("measured", [SMOL, GEMMA])
def test_a_prompt_and_single_tokens_tell_the_rest(measured: dict[int, float]) -> None:
    """What is known when the first guess is made: a prompt chunk was read, tokens were made."""
    costs = StepCosts()
    costs.learn(512, 1, line(measured, 512))
    costs.learn(1, 5, 5 * measured[1])
    for n_rows in (2, 4, 8, 16, 32):
        assert costs.seconds(n_rows) == pytest.approx(line(measured, n_rows), rel=0.2)


def test_what_is_measured_goes_before_the_rule() -> None:
    """Four rows can cost three times one although sixteen cost only four times that."""
    costs = costs_of(SMOL)
    for _ in range(4):
        costs.learn(4, 1, 3 * SMOL[1])
    assert costs.seconds(4) > 2.4 * SMOL[1]
    assert costs.seconds(16) == pytest.approx(SMOL[16], rel=0.1)


def test_an_old_measurement_fades() -> None:
    costs = costs_of(SMOL)
    for _ in range(3):
        costs.learn(16, 1, 1.0)  # the machine was busy
    high = costs.seconds(16)
    costs.learn(512, 1, line(SMOL, 512))
    for _ in range(3000):
        costs.learn(1, 1, SMOL[1])
    assert high > 0.4
    assert costs.seconds(16) == pytest.approx(SMOL[16], rel=0.2)


def test_a_busy_machine_is_seen_in_long_steps_too() -> None:
    costs = costs_of(SMOL)
    for _ in range(100):
        costs.learn(16, 1, 3 * SMOL[16])
    assert costs.seconds(1) > 1.8 * SMOL[1]


def test_rows_by_fours_are_cheaper_than_between() -> None:
    """Measured on Gemma 3 270M: 7 rows 63 ms, 8 rows 56; 15 rows 95 ms, 16 rows 78."""
    costs = costs_of(GEMMA)
    assert costs.seconds(7) < costs.seconds(8)
    for _ in range(5):
        costs.learn(7, 1, 1.25 * line(GEMMA, 7))
    assert costs.seconds(7) > costs.seconds(8)
    assert costs.seconds(15) > costs.seconds(16)
    assert costs.seconds(3) < costs.seconds(4)
    assert costs.seconds(8) == pytest.approx(line(GEMMA, 8), rel=0.05)
    assert choose_lengths([falling(0.97, 31)], costs, n_more_max=31)[0] % 4 == 3
    # Five answers, and the rows that three guesses take cost nothing.
    offers = [falling(0.3, 4)] * 5
    assert sum(choose_lengths(offers, costs, n_more_max=27)) == 3


@given(st.lists(st.tuples(st.integers(1, 600), st.integers(0, 9), st.floats(0, 9)), max_size=50))
def test_costs_stay_positive_and_finite(seen: list[tuple[int, int, float]]) -> None:
    costs = StepCosts()
    for n_rows, n_steps, elapsed_s in seen:
        costs.learn(n_rows, n_steps, elapsed_s)
    assert all(0 < costs.seconds(n_rows) < float("inf") for n_rows in range(1, 300))


def test_what_a_step_without_guesses_costs_is_known_once_one_was_made() -> None:
    costs = StepCosts()
    costs.learn(512, 1, line(SMOL, 512))
    assert not costs.knows(7)
    costs.learn(7, 1, line(SMOL, 7))
    assert costs.knows(7) and costs.knows(30) and not costs.knows(6)


# ---- lengths


def test_sure_guesses_are_many_and_doubtful_ones_none() -> None:
    for measured in (SMOL, GEMMA):
        costs = costs_of(measured)
        assert choose_lengths([falling(0.999, 31)], costs, n_more_max=31)[0] >= 15
        assert choose_lengths([falling(0.1, 31)], costs, n_more_max=31) == [0]
        assert choose_lengths([[]], costs, n_more_max=31) == [0]


def test_a_short_guess_that_does_not_pay_is_left_out() -> None:
    """Where four rows cost three times one, three tokens at even odds are a loss."""
    costs = costs_of(SMOL)
    for n_rows in (2, 3, 4, 6, 8) * 4:
        costs.learn(1, 3, 3 * SMOL[1])
        for _ in range(3):
            costs.learn(n_rows, 1, SMOL[1] * (1 + 0.66 * (n_rows - 1)))
    assert choose_lengths([falling(0.5, 3)], costs, n_more_max=31) == [0]


@given(
    st.lists(st.lists(st.floats(0.01, 0.99), max_size=5), min_size=1, max_size=3),
    st.sampled_from([SMOL, GEMMA]),
    st.integers(0, 12),
)
def test_no_other_lengths_promise_more(
    steps: list[list[float]], measured: dict[int, float], n_more_max: int
) -> None:
    costs = costs_of(measured)
    offers = [list(itertools.accumulate(chances, lambda a, b: a * b)) for chances in steps]
    lengths = choose_lengths(offers, costs, n_more_max=n_more_max)
    n = len(offers)

    def rate(choice: tuple[int, ...]) -> float:
        gain = sum(sum(offer[:k]) for offer, k in zip(offers, choice, strict=True))
        return (n + gain) / costs.seconds(n + sum(choice))

    assert sum(lengths) <= n_more_max
    choices = itertools.product(*(range(len(offer) + 1) for offer in offers))
    best = max(rate(choice) for choice in choices if sum(choice) <= n_more_max)
    assert rate(tuple(lengths)) >= best / 1.031


def test_the_surer_sequence_gets_the_rows() -> None:
    lengths = choose_lengths(
        [falling(0.5, 20), falling(0.98, 20), []], costs_of(GEMMA), n_more_max=12
    )
    assert lengths[1] > 8 and lengths[0] <= 1 and lengths[2] == 0


def test_by_these_costs_copying_pays_as_the_aims_ask() -> None:
    """Simulated: runs of 40 copied tokens. Twice the speed on Gemma, 1.3 times on SmolLM2."""
    for measured, aim in ((SMOL, 1.3), (GEMMA, 2.0)):
        costs = costs_of(measured)
        rng = random.Random(1)
        n_tokens = seconds = 0.0
        for _ in range(2000):
            k = choose_lengths([falling(1 - 1 / 40, 31)], costs, n_more_max=31)[0]
            n_right = next((i for i in range(k) if rng.random() < 1 / 40), k)
            n_tokens += n_right + 1
            seconds += line(measured, k + 1)
        assert n_tokens / seconds > aim / measured[1]


def test_what_rows_with_logits_cost_is_told_by_steps_not_by_prompts() -> None:
    """Gemma 3 270M on two cores: a row of a prompt 2.5 ms, one more row with logits 5.6."""
    costs = StepCosts()
    costs.learn(512, 1, 512 * 0.0025)
    costs.learn(1, 5, 5 * 0.0167)
    before = costs.seconds(24)
    for n_rows in (12, 16) * 4:
        costs.learn(n_rows, 1, 0.0167 + 0.0056 * (n_rows - 1))
    assert before == pytest.approx(0.0167 + 0.0025 * 23, rel=0.05)
    assert costs.seconds(24) == pytest.approx(0.0167 + 0.0056 * 23, rel=0.15)
    assert costs.seconds(4) == pytest.approx(0.0167 + 0.0056 * 3, rel=0.15)

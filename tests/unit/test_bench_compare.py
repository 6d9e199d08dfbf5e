"""When two measurements differ: what is a difference, and what is noise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.bench.compare import compare, compare_measures, find_differences
from llmrun.bench.types import Measure
from tests.fakes.bench_runs import make_run, measure

VALUES = st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=12).map(tuple)
OPPOSITE = {"faster": "slower", "slower": "faster"}


def of(*values: float, unit="tok/s", better=True) -> Measure:
    return Measure("x", unit, values, better)


@pytest.mark.parametrize(
    ("a", "b", "unit", "better", "verdict"),
    [
        ((100, 101, 99), (150, 151, 149), "tok/s", True, "faster"),
        ((100, 101, 99), (70, 71, 69), "tok/s", True, "slower"),
        ((100, 101, 99), (150, 151, 149), "ms", False, "slower"),
        ((1.0, 1.01, 0.99), (0.5, 0.51, 0.49), "s", False, "faster"),
        ((100, 101, 99), (150, 151, 149), "bytes", False, "worse"),
        ((0.5, 0.51, 0.5), (0.7, 0.71, 0.7), "share", True, "better"),
        ((100, 101, 99), (101, 102, 100), "tok/s", True, "no difference"),
        # Far apart in the middle, but so are the repeats.
        ((50, 100, 150), (90, 150, 240), "tok/s", True, "no difference"),
        # Repeats that agree to the last digit are no proof of 1 %.
        ((100, 100, 100), (101, 101, 101), "tok/s", True, "no difference"),
        ((100,), (200,), "tok/s", True, "unknown"),
        ((), (1, 2), "tok/s", True, "unknown"),
        ((0.0, 1.0), (1, 2), "tok/s", True, "unknown"),
        ((float("nan"), 1.0), (1, 2), "tok/s", True, "unknown"),
        ((float("inf"), 1.0), (1, 2), "tok/s", True, "unknown"),
    ],
)
def test_verdicts(a, b, unit, better, verdict):
    row = compare_measures(of(*a, unit=unit, better=better), of(*b, unit=unit, better=better))
    assert row.verdict == verdict
    assert row.is_difference == (verdict not in ("no difference", "unknown"))
    if verdict == "unknown":
        assert (row.ratio, row.low, row.high, row.gain) == (0, 0, 0, 0)
    else:
        assert row.low <= row.ratio <= row.high
        assert (row.gain > 1) == (verdict in ("faster", "better")) or not row.is_difference


def test_one_repeat_that_went_wrong_does_not_make_a_difference():
    steady, stumbled = of(100, 101, 99, 100, 100), of(100, 99, 101, 100, 30)
    assert compare_measures(steady, stumbled).verdict == "no difference"


@given(VALUES, VALUES)
def test_read_the_other_way_round_it_is_the_same(a, b):
    there, back = compare_measures(of(*a), of(*b)), compare_measures(of(*b), of(*a))
    assert back.ratio == pytest.approx(1 / there.ratio)
    assert back.low == pytest.approx(1 / there.high)
    assert back.high == pytest.approx(1 / there.low)
    assert back.verdict == OPPOSITE.get(there.verdict, there.verdict)
    assert there.low <= there.ratio <= there.high


@given(VALUES, VALUES, st.floats(0.01, 100), st.randoms())
def test_neither_the_unit_nor_the_order_matters(a, b, factor, chance):
    shuffled = list(a)
    chance.shuffle(shuffled)
    one = compare_measures(of(*a), of(*b))
    other = compare_measures(of(*(v * factor for v in shuffled)), of(*(v * factor for v in b)))
    assert other.ratio == pytest.approx(one.ratio)
    assert (other.low, other.high) == pytest.approx((one.low, one.high))


@given(VALUES)
def test_nothing_differs_from_itself(a):
    assert not compare_measures(of(*a), of(*a)).is_difference


@given(VALUES, st.floats(1.01, 5))
def test_time_and_speed_tell_the_same(a, factor):
    b = tuple(v * factor for v in a)
    speed = compare_measures(of(*a), of(*b))
    times = compare_measures(
        of(*(1 / v for v in a), unit="s", better=False),
        of(*(1 / v for v in b), unit="s", better=False),
    )
    assert times.gain == pytest.approx(speed.gain)
    assert times.gain_interval[0] == pytest.approx(speed.gain_interval[0])


@given(st.lists(st.floats(90, 110), min_size=3, max_size=8), st.floats(20, 1000))
def test_what_is_far_beyond_the_noise_is_seen(a, factor):
    b = [v * factor for v in a]
    assert compare_measures(of(*a), of(*b)).verdict == "faster"


@pytest.mark.parametrize("n", [2, 3, 5, 10])
@pytest.mark.parametrize("kind", ["normal", "uniform", "outliers"])
def test_noise_is_rarely_called_a_difference(n, kind):
    """Both sides from the same distribution: at most 1 in 100 may differ; and the interval holds
    the true factor as often as it says."""
    chance = random.Random(f"{n}/{kind}")

    def draw(scale):
        noise = chance.gauss(0, 0.1) if kind != "uniform" else chance.uniform(-0.2, 0.2)
        if kind == "outliers" and chance.random() < 0.1:
            noise -= 0.7
        return scale * 2.718**noise

    n_false = n_missed = 0
    for _ in range(2000):
        a, b = of(*(draw(50) for _ in range(n))), of(*(draw(50) for _ in range(n)))
        n_false += compare_measures(a, b).is_difference
        row = compare_measures(a, of(*(draw(75) for _ in range(n))))
        n_missed += not row.low <= 1.5 <= row.high
    assert n_false <= 30
    assert n_missed <= 30


def test_rows_are_those_that_both_have():
    a, b = make_run(), make_run("other", factor=1.5)
    b = make_run("other", factor=1.5, measures=(*b.measures[2:], measure("new")))
    rows = compare(a, b)
    assert [row.name for row in rows] == [m.name for m in a.measures[2:]]
    assert {row.verdict for row in rows[:-1]} == {"faster"}
    assert rows[-1].verdict == "unknown"


def test_seconds_and_milliseconds_are_the_same_thing():
    a = make_run(measures=(of(0.5, 0.5, 0.5, unit="s", better=False),))
    b = make_run(measures=(of(500, 500, 500, unit="ms", better=False),))
    (row,) = compare(a, b)
    assert (row.ratio, row.b.unit, row.b.middle) == (pytest.approx(1), "s", pytest.approx(0.5))
    assert compare(a, make_run(measures=(of(1, 2, unit="bytes", better=False),))) == ()


def test_measured_differently_is_noted():
    row = compare_measures(measure("x", n_prompt=512, same=1), measure("x", n_prompt=40, same=1))
    assert row.note == "measured differently: n_prompt 512 / 40"


def test_what_else_differs():
    a = make_run()
    b = make_run(machine="B", quant=None, settings={"n_ctx": 8192, "use_mmap": False, "new": 1})
    assert [(d.what, d.a, d.b) for d in find_differences(a, b)] == [
        ("quant", "Q4_1", "-"),
        ("machine", "A Machine, 2 cores", "B"),
        ("flash_attn", "auto", "-"),
        ("use_mmap", "yes", "no"),
        ("new", "-", "1"),
    ]
    assert find_differences(a, a) == ()

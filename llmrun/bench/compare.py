"""Whether two measurements differ, and by how much at least and at most. Pure.

Speeds scatter by factors, so their logarithms are compared: Welch's t interval for the difference
of the means of the logs, which is an interval for the ratio. With the three to five repeats that a
bench has, a rank test cannot reach a confidence worth having (three against three: 90 % at best)
and a bootstrap of the medians gives intervals that are too narrow; the t interval holds its level
there, and an outlier makes it wider, so it errs towards "no difference".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import Literal

from llmrun.bench.types import BenchRun, Measure

Verdict = Literal["faster", "slower", "better", "worse", "no difference", "unknown"]

CONFIDENCE = 0.99
"""Of each interval. A run has some twenty rows; at 95 % one of them would differ by chance."""

LEAST_CHANGE = 0.02
"""Smaller changes are never called a difference: the same thing, measured again some minutes
later, differs by that much although its repeats agree."""

# A repeat is taken to scatter by at least this share: clocks and counters have their own grain, and
# three equal values are no proof of a scatter of 0.
_LEAST_SCATTER = 0.005

# Student's t, two-sided 99 %, by degrees of freedom.
_T_99 = {
    1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 6: 3.707, 7: 3.499, 8: 3.355, 9: 3.250,
    10: 3.169, 12: 3.055, 15: 2.947, 20: 2.845, 30: 2.750, 60: 2.660, 120: 2.617,
}  # fmt: skip

_FACTORS: Mapping[tuple[str, str], float] = {("s", "ms"): 1000.0, ("ms", "s"): 0.001}
_TIMED = ("tok/s", "s", "ms")


@dataclass(frozen=True, slots=True)
class Row:
    """`b` against `a`. `ratio` is that of the medians, b / a; the true ratio lies in `low` to
    `high` with 99 % confidence as far as the repeats can tell. All three are 0 where it cannot be
    said (`verdict` "unknown"): a value is not above 0, or there are fewer than two repeats.

    `verdict` says what `b` is: faster or slower for times and speeds, better or worse for others.
    """

    name: str
    group: str
    a: Measure
    b: Measure
    ratio: float
    low: float
    high: float
    verdict: Verdict
    note: str = ""

    @property
    def gain(self) -> float:
        """The ratio, turned so that more than 1 is good; 0 when it cannot be said."""
        return self.gain_interval[1]

    @property
    def gain_interval(self) -> tuple[float, float, float]:
        """Low, middle and high of `gain`."""
        if not self.ratio or self.a.higher_is_better:
            return self.low, self.ratio, self.high
        return 1 / self.high, 1 / self.ratio, 1 / self.low

    @property
    def is_difference(self) -> bool:
        return self.verdict not in ("no difference", "unknown")


@dataclass(frozen=True, slots=True)
class Difference:
    """A thing other than the results in which two runs differ, in words; "-" for not there."""

    what: str
    a: str
    b: str


def compare(a: BenchRun, b: BenchRun) -> tuple[Row, ...]:
    """A row for each measure that both runs have, in the order of `a`."""
    theirs = {measure.name: measure for measure in b.measures}
    rows = []
    for mine in a.measures:
        other = theirs.get(mine.name)
        if other is None or mine.higher_is_better != other.higher_is_better:
            continue
        factor = _FACTORS.get((other.unit, mine.unit), 1.0 if other.unit == mine.unit else None)
        if factor is not None:
            values = tuple(value * factor for value in other.values)
            rows.append(compare_measures(mine, replace(other, unit=mine.unit, values=values)))
    return tuple(rows)


def compare_measures(a: Measure, b: Measure) -> Row:
    """How `b` stands to `a`, which is measured in the same unit."""
    note = _describe_parameters(a.parameters, b.parameters)
    interval = _ratio_interval(a.values, b.values)
    if interval is None:
        return Row(a.name, a.group, a, b, 0.0, 0.0, 0.0, "unknown", note)
    low, ratio, high = interval
    is_difference = not low <= 1 <= high and abs(math.log(ratio)) >= math.log1p(LEAST_CHANGE)
    verdict: Verdict = "no difference"
    if is_difference:
        is_good = (ratio > 1) == a.higher_is_better
        if a.unit in _TIMED:
            verdict = "faster" if is_good else "slower"
        else:
            verdict = "better" if is_good else "worse"
    return Row(a.name, a.group, a, b, ratio, low, high, verdict, note)


def find_differences(a: BenchRun, b: BenchRun) -> tuple[Difference, ...]:
    """What differs between the runs beside their results: model, machine, build, settings."""
    found = []
    facts = (
        ("model", a.model, b.model),
        ("quant", a.quant, b.quant),
        ("sha256", a.model_sha256, b.model_sha256),
        ("machine", a.machine, b.machine),
        ("build", a.build, b.build),
        ("target", a.target, b.target),
    )
    for what, mine, theirs in facts:
        if mine != theirs:
            found.append(Difference(what, _word(mine), _word(theirs)))
    for key in dict.fromkeys((*a.settings, *b.settings)):
        mine_is, theirs_is = a.settings.get(key), b.settings.get(key)
        if mine_is != theirs_is:
            found.append(Difference(key, _word(mine_is), _word(theirs_is)))
    return tuple(found)


def _ratio_interval(
    a: tuple[float, ...], b: tuple[float, ...]
) -> tuple[float, float, float] | None:
    """Low, ratio of medians, high of b / a; None when it cannot be said."""
    if min(len(a), len(b)) < 2:
        return None
    if not all(math.isfinite(value) and value > 0 for value in (*a, *b)):
        return None
    logs_a, logs_b = [math.log(v) for v in a], [math.log(v) for v in b]
    floor = _LEAST_SCATTER**2
    share_a = max(variance(logs_a), floor) / len(a)
    share_b = max(variance(logs_b), floor) / len(b)
    error = share_a + share_b
    # Welch and Satterthwaite.
    freedom = error**2 / (share_a**2 / (len(a) - 1) + share_b**2 / (len(b) - 1))
    reach = _student_99(freedom) * math.sqrt(error)
    difference = fmean(logs_b) - fmean(logs_a)
    # The median of the logs, not the log of the median: the same when read the other way round.
    middle = _median(logs_b) - _median(logs_a)
    low, high = min(difference - reach, middle), max(difference + reach, middle)
    return _exp(low), _exp(middle), _exp(high)


def _exp(value: float) -> float:
    return math.exp(min(max(value, -700.0), 700.0))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _student_99(freedom: float) -> float:
    """Between the table's entries by 1 / freedom, in which Student's t is convex: never too low."""
    below = max((n for n in _T_99 if n <= freedom), default=1)
    above = min((n for n in _T_99 if n > freedom), default=below)
    if above == below or freedom <= below:
        return _T_99[below]
    share = (1 / below - 1 / freedom) / (1 / below - 1 / above)
    return _T_99[below] + share * (_T_99[above] - _T_99[below])


def _describe_parameters(a: Mapping[str, object], b: Mapping[str, object]) -> str:
    """Which parameters of how it was measured differ, where both name them."""
    different = [
        f"{key} {_word(a[key])} / {_word(b[key])}" for key in a if key in b and a[key] != b[key]
    ]
    return f"measured differently: {', '.join(different)}" if different else ""


def _word(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)

"""Whether guessing the next tokens pays, and how many to guess. Pure.

A step that checks k guessed tokens has k rows more, and rows are not free: on two cores sixteen of
them cost four to five times one. What a step costs is learnt from the steps themselves, what
guesses are worth from how earlier ones came out (`ngram`), and the number of rows is the one with
the most expected tokens a second. Where that is the plain step, nothing is guessed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmrun.engine.passes import split_rows

# Kernels for the processor take rows by fours: 5 can cost more than 8, and 15 more than 16.
_ROWS_TOGETHER = 4
_KNOTS = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64)
_FIRST_UNEVEN = 1.1
_MAX_UNEVEN = 2.0
_MANY_ROWS = 64  # from here on a step's time by the row is that of reading prompts
_UNKNOWN_SLOPE = 0.35  # of a one-row step for each row more, before anything is known
_PROMPT_ROWS = 32  # that many rows more, in steps, say as much of what one costs as prompts do
_SMOOTH = 0.3
_MAX_WEIGHT = 4.0
_NO_WEIGHT = 0.25
_HALF_LIFE_S = 5.0  # of what was measured; the rule below takes its place
_LEAST_S = 1e-9  # no step is shorter; a clock that stands still is no news
_FRESH_S = 1.0
_FOLLOW = 0.3
_MARGIN = 1.03  # guessing must promise that much, since the promise is an estimate


@dataclass(slots=True)
class _Knot:
    seconds: float
    weight: float
    at_s: float


class StepCosts:
    """Seconds of a step by its number of rows, from steps as they happen.

    What was not measured, or long ago, follows a line: a one-row step, plus for each further row
    what a row costs in a prompt chunk, until steps have shown what one with logits costs (twice
    as much where the vocabulary is large and the model small). Above four rows, only
    multiples of four have costs of their own; one factor says how much worse the numbers between
    them are than a line from one to the next. Times are of steps: nothing ages while nothing runs.
    """

    def __init__(self) -> None:
        self._knots: dict[int, _Knot] = {}
        self._by_row_s: float | None = None
        self._uneven = _FIRST_UNEVEN
        self._n_least = math.inf  # rows of the shortest step that was measured
        self._now_s = 0.0
        self._table: list[float] = []  # of 0 … 64 rows; empty: to be made anew

    def learn(self, n_rows: int, n_steps: int, elapsed_s: float) -> None:
        """`n_steps` steps of `n_rows` rows each took `elapsed_s`."""
        if n_steps < 1 or elapsed_s < _LEAST_S:
            return
        self._now_s += elapsed_s
        self._n_least = min(self._n_least, n_rows)
        cost = elapsed_s / n_steps
        if n_rows > _MANY_ROWS:
            by_row = cost / n_rows
            old = self._by_row_s
            self._by_row_s = by_row if old is None else old + _SMOOTH * (by_row - old)
            self._table = []
            return
        at = min(_KNOTS, key=lambda rows: abs(rows - n_rows))
        knot = self._knots.get(at)
        if at != n_rows:
            if _is_uneven(n_rows) and knot is not None and self._weight(knot) > _NO_WEIGHT:
                factor = cost * self._uneven / self.seconds(n_rows)
                factor = min(max(factor, 1.0), _MAX_UNEVEN)
                self._uneven += _SMOOTH * (factor - self._uneven)
                self._table = []
                return
            cost *= self.seconds(at) / self.seconds(n_rows)
        one = self._knots.get(1)
        is_known = knot is not None and self._weight(knot) > 1
        if at > 1 and is_known and one is not None and self._now_s - one.at_s > _FRESH_S:
            # Only long steps lately: if they became slower, the short one has too.
            one.seconds *= (cost / self.seconds(at)) ** _FOLLOW
        self._table = []
        if knot is None:
            self._knots[at] = _Knot(cost, 1.0, self._now_s)
            return
        knot.seconds += _SMOOTH * (cost - knot.seconds)
        knot.weight = min(self._weight(knot) + 1.0, _MAX_WEIGHT)
        knot.at_s = self._now_s

    def seconds(self, n_rows: int) -> float:
        """Of one step; in arbitrary units before the first is measured."""
        if not self._table:
            self._table = self._make_table()
        if n_rows < len(self._table):
            return self._table[n_rows]
        return self._table[-1] + self._slope() * (n_rows - _KNOTS[-1])

    @property
    def is_known(self) -> bool:
        """Whether any step was measured."""
        return bool(self._knots) or self._by_row_s is not None

    def knows(self, n_rows: int) -> bool:
        """Whether a step of that many rows or fewer was measured: without, what a row more costs
        can only be told from steps that are longer, and these seem cheap then."""
        return n_rows >= self._n_least

    def rows_within(self, seconds: float) -> int | None:
        """How many rows of a prompt a step of that length can have; None: not known yet."""
        if self._by_row_s is None:
            return None
        return int(seconds / self._by_row_s)

    def _make_table(self) -> list[float]:
        """Straight lines between what was measured; from there on the rule, but never down."""
        points = [(1, self._one())]
        slope = self._slope_with_logits()
        for rows in _KNOTS[1:]:
            knot = self._knots.get(rows)
            rule = points[0][1] + slope * (rows - 1)
            if knot is not None and (weight := self._weight(knot)) > _NO_WEIGHT:
                points.append((rows, (knot.seconds * weight + rule / 2) / (weight + 0.5)))
        n_last, last = points[-1]
        for rows in _KNOTS:
            if rows > n_last:
                points.append((rows, max(last, points[0][1] + slope * (rows - 1))))
        table = [0.0, points[0][1]]
        for (low, at_low), (high, at_high) in itertools.pairwise(points):
            step = (at_high - at_low) / (high - low)
            table += [at_low + step * n for n in range(1, high - low + 1)]
        for rows in range(len(table)):
            if _is_uneven(rows):
                table[rows] *= self._uneven
        return table

    def _one(self) -> float:
        """Seconds of a one-row step, by the shortest seen."""
        rows = min(self._knots, default=0)
        if rows == 0:
            return 1.0 if self._by_row_s is None else self._by_row_s / _UNKNOWN_SLOPE
        seconds = self._knots[rows].seconds
        if self._by_row_s is None:
            return seconds / (1 + _UNKNOWN_SLOPE * (rows - 1))
        return max(seconds - self._by_row_s * (rows - 1), seconds / rows)

    def _slope(self) -> float:
        """Seconds of one more row, by prompts read, else by the longest step seen."""
        one = self._one()
        if self._by_row_s is not None:
            return min(self._by_row_s, one)
        rows = max(self._knots, default=1)
        if rows == 1:
            return _UNKNOWN_SLOPE * one
        seen = max(0.0, (self._knots[rows].seconds - one) / (rows - 1))
        # The first few rows can cost more than those after them.
        return seen if rows >= 8 else min(seen, _UNKNOWN_SLOPE * one)

    def _slope_with_logits(self) -> float:
        """Seconds of one more row, by all steps measured of late beside `_slope`."""
        one = self._one()
        n_more = float(_PROMPT_ROWS)
        more_s = n_more * self._slope()
        for rows, knot in self._knots.items():
            if rows > 1:
                weight = self._weight(knot)
                n_more += weight * (rows - 1)
                more_s += weight * max(knot.seconds - one, 0.0)
        return more_s / n_more

    def _weight(self, knot: _Knot) -> float:
        return float(knot.weight * 0.5 ** ((self._now_s - knot.at_s) / _HALF_LIFE_S))


def _is_uneven(n_rows: int) -> bool:
    return n_rows > _ROWS_TOGETHER and n_rows % _ROWS_TOGETHER != 0


def choose_lengths(
    chances: Iterable[Sequence[float]],
    costs: StepCosts,
    *,
    n_more_max: int,
    guess_costs: StepCosts | None = None,
    seq_ids: Sequence[int] | None = None,
) -> list[int]:
    """How many guessed tokens to check for each running sequence in the next step.

    `chances` has for each sequence how likely its first, first two, … guesses are right: what the
    row of each is expected to bring. So rows are worth taking in the order of their chances over
    all sequences, and the best number of them is found by trying all.

    `guess_costs`: of the model that makes the guesses, in one step for all first ones, one for all
    second ones, and so on. Until it is known it costs nothing.

    `seq_ids`: of the sequences, where each has cells of its own: guesses for some of them only are
    then checked in a pass of their own (`passes`).
    """
    offers = list(chances)
    rows = sorted(
        ((chance, index) for index, offer in enumerate(offers) for chance in offer),
        key=lambda row: -row[0],
    )[:n_more_max]
    n = len(offers)
    expected = float(n)
    depths = [0] * n

    def seconds_apart() -> float:
        assert seq_ids is not None
        lengths = sorted((seq_id, 1 + k) for seq_id, k in zip(seq_ids, depths, strict=True))
        return sum(costs.seconds(n_rows) for n_rows in split_rows(lengths))

    plain_s = costs.seconds(n) if seq_ids is None else seconds_apart()
    best_rate, best_n = _MARGIN * n / plain_s, 0
    guessing_s = 0.0
    n_at_depth = [0] * (n_more_max + 1)
    for n_more, (chance, index) in enumerate(rows, 1):
        expected += chance
        depth = depths[index]
        depths[index] += 1
        if guess_costs is not None and guess_costs.is_known:
            n_at_depth[depth] += 1
            guessing_s += guess_costs.seconds(n_at_depth[depth])
            guessing_s -= guess_costs.seconds(n_at_depth[depth] - 1)
        rate = expected / (costs.seconds(n + n_more) + guessing_s)
        if seq_ids is not None and rate > best_rate:
            # Never faster than all in one pass, so most are not looked at this closely.
            rate = expected / (seconds_apart() + guessing_s)
        if rate > best_rate:
            best_rate, best_n = rate, n_more
    lengths = [0] * n
    for _, index in rows[:best_n]:
        lengths[index] += 1
    return lengths

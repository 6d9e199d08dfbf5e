"""How many threads the next step should use, from what steps have lately cost. Pure.

llama.cpp's threads wait for each other after every operation, and spin while they wait. On a free
machine more threads are faster; beside other busy programs one of them is always off its core, the
rest wait for it, and fewer threads can be several times as fast. Nothing else has to be known about
the machine to see this: a step takes longer than it lately did, and a try with fewer threads tells.

All times are of steps, so the governor stands still while nothing runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_MARGIN = 0.05  # a count must be that much faster than the present one to take its place
_SLOW = 1.25  # so many times the recent best is a busy machine
_TRIAL_S = 0.05  # how long a count is tried
_TRIAL_STEPS = 2  # at least, unless the first is hopeless
_HOPELESS = 1.5
_CLEAR = 0.8  # a gain beyond noise: the machine has changed
_FORGET = 0.02  # the best drifts up by this part of the gap a step: texts grow, clocks fall
_SMOOTH = 0.3
_MIN_WAIT_S = 1.0
_MAX_WAIT_S = 30.0
_LOST_PART = 0.02  # tries that failed may cost this part of the time
_FIRST_LOOK_S = 0.25
MANY_ROWS = 32  # batches beyond it compute in long pieces, and wait little for each other


class Governor:
    """One for a context. `threads` before a step, `observe` after it.

    Single tokens, small batches and prompt chunks are governed apart: what pays for one does not
    for another.
    """

    def __init__(self, n_threads: int, n_threads_batch: int) -> None:
        """The most threads to use for one row, and for two or more."""
        self._alone = _Lane(n_threads, explores=True)
        self._few = _Lane(n_threads_batch, explores=True)
        # A try costs a whole prompt chunk here, so only a slow one is a reason for it.
        self._many = _Lane(n_threads_batch, explores=False)

    def threads(self, n_rows: int) -> int:
        return self._lane(n_rows).n_threads

    def observe(self, n_rows: int, n_steps: int, elapsed_s: float) -> None:
        """`n_steps` steps of `n_rows` rows each took `elapsed_s` with `threads(n_rows)` threads."""
        if n_rows <= MANY_ROWS:
            self._lane(n_rows).observe(n_rows, n_steps, elapsed_s)
        else:
            # By the row; in classes, since short chunks cost more by the row than long ones.
            self._many.observe(n_rows.bit_length(), n_steps, elapsed_s / n_rows, elapsed_s)

    def _lane(self, n_rows: int) -> _Lane:
        if n_rows == 1:
            return self._alone
        return self._few if n_rows <= MANY_ROWS else self._many


def thread_counts(n_max: int) -> tuple[int, ...]:
    """The counts worth a try, ascending: one less than all, then ever larger gaps."""
    counts = {n_max, max(1, n_max - 1)}
    counts.update(max(1, n_max * part // 4) for part in (1, 2, 3))
    counts.add(1)
    return tuple(sorted(counts))


@dataclass(slots=True)
class _Trial:
    """A count under test: its steps' time against what the present count would have taken."""

    level: int
    n_steps: int = 0
    spent_s: float = 0.0
    cost: float = 0.0
    expected: float = 0.0

    @property
    def ratio(self) -> float:
        return self.cost / self.expected if self.expected else 1.0


@dataclass(slots=True)
class _Costs:
    """Step costs of one thread count by kind of step: the recent best, and the smoothed last."""

    best: dict[int, float] = field(default_factory=dict)
    recent: dict[int, float] = field(default_factory=dict)

    def learn(self, kind: int, cost: float) -> float:
        """Returns the cost as a multiple of the best before it."""
        best = self.best.get(kind, cost)
        recent = self.recent.get(kind, cost)
        self.recent[kind] = recent + _SMOOTH * (cost - recent)
        self.best[kind] = cost if cost < best else best + _FORGET * (cost - best)
        return cost / best if best > 0 else 1.0


class _Lane:
    """The count for one kind of batch.

    At home: costs are learnt, and at times other counts are put on trial, which happens when steps
    turn slow (all lower counts), at growing intervals (the next count up; the next one down), and
    when steps turn fast on a lowered count (up). A trial that fails costs little and makes the
    next one of its kind wait longer, so that nothing swings to and fro.
    """

    def __init__(self, n_max: int, *, explores: bool) -> None:
        self._counts = thread_counts(n_max)
        self._explores = explores
        self._home = len(self._counts) - 1
        self._costs = _Costs()
        self._trials: list[_Trial] = []
        self._done: list[_Trial] = []
        self._now_s = 0.0
        self._n_slow = self._n_fast = 0
        self._wait_s = {-1: _MIN_WAIT_S, 1: _MIN_WAIT_S}
        self._next_s = {-1: _FIRST_LOOK_S, 1: _MIN_WAIT_S}
        self._calm_until_s = self._hope_from_s = 0.0
        self._calm_s = _MIN_WAIT_S
        self.n_threads = n_max

    def observe(
        self, kind: int, n_steps: int, elapsed_s: float, spent_s: float | None = None
    ) -> None:
        if len(self._counts) == 1 or n_steps < 1:
            return
        spent_s = elapsed_s if spent_s is None else spent_s
        cost = elapsed_s / n_steps
        self._now_s += spent_s
        if self._trials:
            self._go_on_trying(kind, n_steps, cost, spent_s)
        else:
            self._stay_home(kind, cost)
        level = self._trials[0].level if self._trials else self._home
        self.n_threads = self._counts[level]

    def _stay_home(self, kind: int, cost: float) -> None:
        slowness = self._costs.learn(kind, cost)
        self._n_slow = self._n_slow + 1 if slowness > _SLOW else 0
        recent = self._costs.recent[kind]
        self._n_fast = self._n_fast + 1 if cost < recent * (1 - 2 * _MARGIN) else 0
        lower = range(self._home - 1, -1, -1)
        if self._n_slow >= 2 and lower and self._now_s >= self._calm_until_s:
            self._calm_until_s = self._now_s + self._calm_s
            self._calm_s = min(2 * self._calm_s, _MAX_WAIT_S)
            self._try(list(lower))
        elif self._home < len(self._counts) - 1 and (
            self._now_s >= self._next_s[1]
            or (self._n_fast >= 2 and self._now_s >= self._hope_from_s)
        ):
            self._hope_from_s = self._now_s + _MIN_WAIT_S
            self._try([self._home + 1])
        elif self._explores and lower and self._now_s >= self._next_s[-1]:
            self._try([self._home - 1])

    def _try(self, levels: list[int]) -> None:
        self._n_slow = self._n_fast = 0
        self._trials = [_Trial(level) for level in levels]
        self._done = []

    def _go_on_trying(self, kind: int, n_steps: int, cost: float, spent_s: float) -> None:
        trial = self._trials[0]
        trial.spent_s += spent_s
        expected = self._costs.recent.get(kind)
        if expected is not None:
            trial.n_steps += n_steps
            trial.cost += cost * n_steps
            trial.expected += expected * n_steps
        is_hopeless = trial.n_steps > 0 and trial.ratio > _HOPELESS
        is_enough = trial.n_steps >= _TRIAL_STEPS and trial.spent_s >= _TRIAL_S
        # Steps of a kind that the present count has never made tell nothing: give up in time.
        if is_hopeless or is_enough or trial.spent_s > 8 * _TRIAL_S:
            self._done.append(self._trials.pop(0))
            if not self._trials:
                self._decide()

    def _decide(self) -> None:
        best = min(self._done, key=lambda trial: trial.ratio)
        if best.ratio < 1 - _MARGIN:
            self._move(best)
            return
        lost_s = sum(max(0.0, trial.spent_s * (1 - 1 / trial.ratio)) for trial in self._done)
        for way in {1 if trial.level > self._home else -1 for trial in self._done}:
            # Down is only a precaution, since slow steps are a reason of their own.
            self._wait_s[way] = min(self._wait_s[way] * (2 if way > 0 else 4), _MAX_WAIT_S)
            self._next_s[way] = self._now_s + max(self._wait_s[way], lost_s / _LOST_PART)

    def _move(self, trial: _Trial) -> None:
        way = 1 if trial.level > self._home else -1
        self._home = trial.level
        self._costs = _Costs()
        self._calm_s = _MIN_WAIT_S
        self._calm_until_s = self._now_s
        if trial.ratio < _CLEAR:
            self._wait_s = {-1: _MIN_WAIT_S, 1: _MIN_WAIT_S}
        else:
            self._wait_s[-way] = min(2 * self._wait_s[-way], _MAX_WAIT_S)
        # On in the same way soon; back the other way after a while.
        self._next_s[way] = self._now_s + _FIRST_LOOK_S
        self._next_s[-way] = self._now_s + self._wait_s[-way]

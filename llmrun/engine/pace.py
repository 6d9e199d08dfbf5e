"""Takes the time of steps: for the governor of threads, for the costs that drafts go by, and for
who asks how busy the engine is."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from llmrun.engine.backend import Backend, Chunk, DecodeResult
from llmrun.engine.governor import MANY_ROWS, Governor
from llmrun.engine.passes import split_rows
from llmrun.engine.speculate import StepCosts

# A single answer's steps are looked at in blocks of this length, so that what a look costs is
# nothing beside them; a longer step is a block of its own.
BLOCK_S = 0.05

# The prompts' part of a step beside running answers: that long, since they pause for it, but not
# below the rows that compute well together. Longer where more wait to be read than pause for it:
# until all are read they do not go in step, and the last ones run with few.
_BESIDE_S = 0.25
_BESIDE_FEWER_S = 1.0
_MIN_BESIDE = 32

# A row with logits costs as much as several without. In a long batch with more of them than one in
# so many, which is the end of short prompts or prompts beside answers, rows seem to be slow.
_ROWS_PER_OUTPUT = 64

# A longer batch costs as much by the row in several passes as in one, near enough.
_FEW_ROWS = 64


class Pace:
    """Lives in the engine's thread. `n_steps` were made so far, in `busy_s` seconds."""

    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float],
        governor: Governor | None,
        costs: StepCosts | None,
    ) -> None:
        self._backend = backend
        self._clock = clock
        self._governor = governor
        self._costs = costs
        self.n_steps = 0
        self.busy_s = 0.0
        self._n_rows = 0
        self._is_one_pass = self._has_few_outputs = True
        self._started_s = 0.0
        self._threads = (backend.n_threads, backend.n_threads_batch)
        self._block = (0.0, 0)

    def decode(self, chunks: SequenceOf[Chunk]) -> DecodeResult:
        """One batch. After its rows were sampled, call `end_step`."""
        self._n_rows = sum(len(chunk.tokens) for chunk in chunks)
        self._is_one_pass = (
            self._backend.kv_unified
            or len(split_rows([(chunk.seq_id, len(chunk.tokens)) for chunk in chunks])) == 1
        )
        n_outputs = sum(chunk.n_outputs for chunk in chunks)
        self._has_few_outputs = self._n_rows <= MANY_ROWS or (
            n_outputs * _ROWS_PER_OUTPUT <= self._n_rows
        )
        self._set_threads(self._n_rows)
        self._started_s = self._clock()
        return self._backend.decode(chunks)

    def end_step(self) -> None:
        self._tell(self._n_rows, 1, self._clock() - self._started_s)

    def n_rows_beside(self, n_reading: int, n_answering: int) -> int | None:
        """Rows of prompts, of which there are `n_reading`, for a step that `n_answering` answers
        wait for; None: as many as there are."""
        if self._costs is None or not n_reading or not n_answering:
            return None
        n_rows = self._costs.rows_within(_BESIDE_FEWER_S if n_reading > n_answering else _BESIDE_S)
        return None if n_rows is None else max(n_rows, _MIN_BESIDE)

    def start_alone(self, n_tokens: int) -> float:
        """Single-token steps follow. Returns when to `look` first, in the clock's seconds: after
        the first, so that one step between two with guesses is timed, too."""
        self._is_one_pass = self._has_few_outputs = True
        self._set_threads(1)
        self._block = (self._clock(), n_tokens)
        return -math.inf

    def look(self, now_s: float, n_tokens: int) -> float:
        """`n_tokens` is a count that went up by one each step. Returns when to look next."""
        start_s, n_before = self._block
        self._tell(1, n_tokens - n_before, now_s - start_s)
        self._set_threads(1)
        self._block = (now_s, n_tokens)
        return now_s + BLOCK_S

    def end_alone(self, n_tokens: int) -> None:
        """No more of the single-token steps. Those since the last look are counted, no more: they
        end with other things than steps."""
        start_s, n_before = self._block
        if n_tokens > n_before:
            self.n_steps += n_tokens - n_before
            self.busy_s += self._clock() - start_s

    def _tell(self, n_rows: int, n_steps: int, elapsed_s: float) -> None:
        self.n_steps += n_steps
        self.busy_s += elapsed_s
        # Of several passes no one's time is known.
        if self._governor is not None and self._is_one_pass and self._has_few_outputs:
            self._governor.observe(n_rows, n_steps, elapsed_s)
        if self._costs is not None and (self._is_one_pass or n_rows > _FEW_ROWS):
            self._costs.learn(n_rows, n_steps, elapsed_s)

    def _set_threads(self, n_rows: int) -> None:
        if self._governor is None:
            return
        n_threads, n_threads_batch = self._threads
        if n_rows == 1:
            n_threads = self._governor.threads(1)
        else:
            n_threads_batch = self._governor.threads(n_rows)
        if (n_threads, n_threads_batch) != self._threads:
            self._threads = (n_threads, n_threads_batch)
            self._backend.set_threads(n_threads, n_threads_batch)

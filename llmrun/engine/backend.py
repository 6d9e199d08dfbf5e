"""The seam between the engine's logic and the library that computes.

`loop.Engine` owns the thread and talks to a Backend only from it, except for `request_abort` and
the tokenizer, which any thread may use. `llama.LlamaBackend` is the real one; tests have another
with a deterministic next token. A Backend checks its arguments itself: the library below aborts
the process on some wrong calls.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

from llmrun.engine.types import ModelFacts, SamplingParams, StateBytes, Tokenizer


class DecodeResult(enum.Enum):
    """What became of a batch.

    DONE: computed. FULL: no room in the cache, nothing changed. ABORTED: stopped by
    `request_abort`; the cache may hold a part of the batch: ask `seq_pos_max` and trim.
    """

    DONE = 0
    FULL = 1
    ABORTED = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence in a batch, the first at position `pos`.

    The last `n_outputs` rows get logits: 0 inside a prompt, 1 to sample the next token, all of
    them to verify drafted tokens.
    """

    seq_id: int
    tokens: SequenceOf[int]
    pos: int
    n_outputs: int


class Sampler(Protocol):
    """The sampler chain of one request; it remembers the tokens it chose."""

    @property
    def sample(self) -> Callable[[int], int]:
        """Choose and accept the next token from batch row `row` of the last decode."""

    def accept(self, token: int) -> None:
        """Count `token` (of the prompt) as chosen, for the penalties."""

    def close(self) -> None: ...


class Backend(Protocol):
    """A loaded model with one context."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def n_ctx(self) -> int:
        """Tokens that one sequence can hold."""

    @property
    def n_batch(self) -> int:
        """Most rows in one `decode`."""

    @property
    def n_outputs_max(self) -> int:
        """Most rows with logits in one `decode`."""

    @property
    def n_seq_max(self) -> int: ...

    @property
    def kv_unified(self) -> bool:
        """All sequences share n_ctx cells; else each has so many of its own."""

    @property
    def n_threads(self) -> int:
        """Threads for a batch of one row, as loaded."""

    @property
    def n_threads_batch(self) -> int:
        """Threads for a batch of two rows or more, as loaded."""

    def decode(self, chunks: SequenceOf[Chunk]) -> DecodeResult:
        """Compute one batch. Raises EngineError on a failure that leaves the context unusable."""

    def decode_one(self, seq_id: int, token: int, pos: int) -> DecodeResult:
        """`decode([Chunk(seq_id, [token], pos, 1)])`, as cheaply as can be: the step of a single
        running answer. Its logits are in row 0."""

    def new_sampler(self, params: SamplingParams, seed: int) -> Sampler:
        """Raises UsageError for a grammar that does not parse."""

    def logprobs(self, row: int, token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
        """The log probability of `token` by row `row` of the last decode, and the `n_top` likeliest
        tokens with theirs, the likeliest first, fewer where fewer are possible. By the model's own
        logits, whatever the sampler does; never below NO_LOGPROB, and that for all where the
        logits hold a NaN."""

    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """Drop positions [p0, p1) (-1: open end). False: a partial removal is impossible here."""

    def seq_cp(self, source: int, target: int, n_tokens: int) -> bool:
        """Let `target`, which is empty, have the first `n_tokens` of `source`: the same cells, or
        a copy where each has its own. A copy leaves out what a window has moved on from. False:
        `target` is empty still."""

    def seq_swap(self, a: int, b: int) -> bool:
        """Exchange what two sequences hold, where each has cells of its own. What a window has
        moved on from is lost. False: there is no memory for it, and nothing was changed."""

    def seq_pos_min(self, seq_id: int) -> int:
        """First position in the cache, -1 when empty. Above 0 once a window has moved on."""

    def seq_pos_max(self, seq_id: int) -> int: ...

    @property
    def state_key(self) -> str:
        """Names what states depend on beside the model's file: build, cache types and the like."""

    def state_bytes(self, seq_id: int) -> int:
        """How long `save_state` would be."""

    def save_state(self, seq_id: int, *, partial: bool) -> StateBytes:
        """The sequence's cache as bytes. `partial`: only the part that `seq_rm` cannot roll back
        (the window or the recurrent state)."""

    def load_state(self, seq_id: int, state: StateBytes, *, partial: bool) -> bool:
        """Put saved bytes back. False: they do not belong here; treat the sequence as empty."""

    def set_threads(self, n_threads: int, n_threads_batch: int) -> None:
        """From the next step on. Costs next to nothing."""

    def request_abort(self) -> None:
        """Make a running `decode` return ABORTED soon. Any thread."""

    def clear_abort(self) -> None: ...

    def close(self) -> None: ...


def count_cells(backend: Backend) -> int:
    """Tokens that all sequences together can hold."""
    return backend.n_ctx * (1 if backend.kv_unified else backend.n_seq_max)

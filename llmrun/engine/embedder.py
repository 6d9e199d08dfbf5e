"""Vectors and scores of texts: one thread that owns the context, calls from any thread.

Inputs of all callers that wait are computed together, an input of each caller in turn, so that a
long list does not hold up a short one.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from llmrun.engine.embed_shape import EmbedOptions as EmbedOptions
from llmrun.engine.embed_shape import Pooling, check_embedder
from llmrun.engine.embed_shape import embedding_kind as embedding_kind
from llmrun.engine.embed_types import EmbedBackend, EmbedFacts
from llmrun.engine.ended import ended_by, refusal
from llmrun.engine.governor import Governor
from llmrun.engine.rank_prompt import rank_prompt as rank_prompt
from llmrun.engine.types import LoadProgress, Tokenizer
from llmrun.errors import (
    ContextOverflowError,
    EngineError,
    LlmrunError,
    UsageError,
)

if TYPE_CHECKING:
    from llmrun.gguf.types import ModelInfo

T = TypeVar("T")

# How often a waiting caller looks up: for Ctrl-C where a plain wait cannot be interrupted.
_WAIT_S = 0.5
_RELEVANT = ("yes", "relevant")  # labels of the score that is asked for


class _Job:
    """The inputs of one call. Lives in the embedder's thread once it was put."""

    def __init__(self, inputs: Sequence[Sequence[int]]) -> None:
        self.inputs = inputs
        self.rows: list[list[float]] = [[]] * len(inputs)
        self.n_taken = 0
        self.n_done = 0
        self._is_answered = False
        self.result: Future[list[list[float]]] = Future()

    def finish(self, error: BaseException | None = None) -> None:
        if self._is_answered:
            return
        self._is_answered = True
        # False: the caller has given up.
        if self.result.set_running_or_notify_cancel():
            if error is not None:
                self.result.set_exception(error)
            else:
                self.result.set_result(self.rows)


class Embedder:
    """One model that gives vectors (`embed`) or, with the pooling "rank", scores (`rank`). Use as a
    context manager, or call `close`."""

    def __init__(
        self,
        backend: EmbedBackend,
        *,
        load_s: float = 0.0,
        steady_threads: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Takes ownership of the backend. `steady_threads`: see `EngineOptions`."""
        self._backend = backend
        self._clock = clock
        self.load_s = load_s
        n_threads = backend.n_threads
        self._governor = Governor(n_threads, n_threads) if steady_threads else None
        self._n_threads = n_threads
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: deque[_Job] = deque()  # with inputs that no batch has had yet
        self._unanswered: set[_Job] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._is_running = False
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmrun-embedder", daemon=True)
        # Python's exit under a running computation takes the library's memory from below it.
        atexit.register(self.close)
        self._thread.start()

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        options: EmbedOptions | None = None,
        *,
        info: ModelInfo | None = None,
        on_progress: LoadProgress | None = None,
    ) -> Embedder:
        """Load a model from its file, or its shards in order.

        Nothing reaches llama.cpp before its header passed our own reader: `info` is the proof;
        without it the headers are read here. Raises GgufError, EngineError, WillNotFitError, and
        UsageError for a model that cannot do what the options ask for.
        """
        from llmrun.engine.embed_backend import open_embed_backend
        from llmrun.gguf.info import read_info

        started = time.perf_counter()
        options = options or EmbedOptions()
        info = info or read_info(paths)
        check_embedder(paths[0], info)
        backend = open_embed_backend(paths[0], info, options, on_progress=on_progress)
        load_s = time.perf_counter() - started
        return cls(backend, load_s=load_s, steady_threads=options.steady_threads)

    @property
    def facts(self) -> EmbedFacts:
        return self._backend.facts

    @property
    def tokenizer(self) -> Tokenizer:
        return self._backend.tokenizer

    @property
    def pooling(self) -> Pooling:
        return self._backend.pooling

    @property
    def n_ctx(self) -> int:
        """Most tokens in one input."""
        return self._backend.n_ctx

    @property
    def n_embd(self) -> int:
        """The length of a vector; with the pooling "rank" the number of scores of an input."""
        return self._backend.facts.n_out

    @property
    def state(self) -> Literal["idle", "running", "closed"]:
        if self._closed:
            return "closed"
        return "running" if self._is_running or not self._inbox.empty() else "idle"

    def embed(self, batch: Sequence[Sequence[int]]) -> list[list[float]]:
        """The vector of each input (its tokens, with all that the model wants around them), not
        scaled. Waits for it.

        Raises UsageError for an empty input, a token outside the vocabulary or a model that gives
        scores, ContextOverflowError for more than `n_ctx` tokens, EngineError when the computation
        fails or the embedder is closed.
        """
        return self._wait(self.submit(batch))

    def rank(self, pairs: Sequence[Sequence[int]]) -> list[float]:
        """The score of each pair (see `rank_prompt`), as the model gives it: the higher the better,
        between 0 and 1 only where `facts.has_probabilities`. Raises like `embed`."""
        return self._wait(self.submit_rank(pairs))

    def submit(self, batch: Sequence[Sequence[int]]) -> Future[list[list[float]]]:
        """`embed` without waiting. Cancelling the future skips what was not begun."""
        if self.pooling == "rank":
            raise UsageError(
                "this model gives scores of pairs of texts, not vectors",
                hint="use it with /rerank, or choose an embedding model",
            )
        return self._submit(batch)

    def submit_rank(self, pairs: Sequence[Sequence[int]]) -> Future[list[float]]:
        """`rank` without waiting."""
        if self.pooling != "rank":
            raise UsageError(
                "this model gives vectors of texts, not scores of pairs",
                hint="choose a reranker",
            )
        labels = [label.lower() for label in self.facts.labels]
        column = next((labels.index(name) for name in _RELEVANT if name in labels), 0)
        rows = self._submit(pairs)
        scores: Future[list[float]] = Future()

        def give_up(_future: Future[list[float]]) -> None:
            if scores.cancelled():
                rows.cancel()

        def hand_on(_future: Future[list[list[float]]]) -> None:
            if not rows.cancelled() and scores.set_running_or_notify_cancel():
                error = rows.exception()
                if error is not None:
                    scores.set_exception(error)
                else:
                    scores.set_result([row[column] for row in rows.result()])

        scores.add_done_callback(give_up)
        rows.add_done_callback(hand_on)
        return scores

    def close(self) -> None:
        """Stop what runs, end the thread, free the model; who waits gets an EngineError. May be
        called again, from any thread."""
        with self._lock:
            first = not self._closed
            self._closed = True
        if first:
            self._inbox.put(None)
            self._backend.request_abort()
        if threading.current_thread() is not self._thread:
            # Not `join`: interrupted by Ctrl-C once, it takes the thread for ended from then on.
            self._ended.wait()
        atexit.unregister(self.close)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _submit(self, batch: Sequence[Sequence[int]]) -> Future[list[list[float]]]:
        job = _Job([tuple(tokens) for tokens in batch])
        for tokens in job.inputs:
            if not tokens:
                raise UsageError("an input is empty", hint="leave empty texts out")
            if len(tokens) > self.n_ctx:
                raise ContextOverflowError(
                    len(tokens), self.n_ctx, hint="shorten the text, or cut it into parts"
                )
            if not 0 <= min(tokens) <= max(tokens) < self.facts.n_vocab:
                raise UsageError("an input has tokens outside the model's vocabulary")
        with self._lock:
            if self._closed:
                raise refusal("embedder", self._failure)
            if job.inputs:
                self._inbox.put(job)
        if not job.inputs:
            job.finish()
        return job.result

    def _wait(self, future: Future[T]) -> T:
        try:
            while True:
                try:
                    return future.result(timeout=_WAIT_S)
                except FutureTimeoutError:
                    continue
        except BaseException:
            future.cancel()
            raise

    # ---- everything below runs in the embedder's thread

    def _run(self) -> None:
        try:
            while self._take_jobs():
                batch = self._choose_batch()
                if batch:
                    self._compute(batch)
        except BaseException as error:  # noqa: BLE001 - the waiting callers get it
            self._failure = error
        finally:
            self._shut_down()
            self._ended.set()

    def _take_jobs(self) -> bool:
        """Collect new jobs; waits for one when there is nothing to do. False: close."""
        self._is_running = bool(self._jobs)
        arrived = [] if self._jobs else [self._inbox.get()]
        self._is_running = True
        while not self._inbox.empty():
            arrived.append(self._inbox.get())
        jobs = [job for job in arrived if job is not None]
        self._jobs.extend(jobs)
        self._unanswered.update(jobs)
        return None not in arrived

    def _choose_batch(self) -> list[tuple[_Job, int]]:
        """Inputs to compute together, one of each job in turn: as many as go into a batch, or one
        that is longer than that."""
        chosen: list[tuple[_Job, int]] = []
        n_tokens = 0
        while self._jobs and len(chosen) < self._backend.n_seq_max:
            job = self._jobs[0]
            if job.result.cancelled():
                self._jobs.popleft()
                self._unanswered.discard(job)
                continue
            n_tokens += len(job.inputs[job.n_taken])
            if chosen and n_tokens > self._backend.n_pack:
                break
            chosen.append((job, job.n_taken))
            job.n_taken += 1
            self._jobs.popleft()
            if job.n_taken < len(job.inputs):
                self._jobs.append(job)
        return chosen

    def _compute(self, batch: list[tuple[_Job, int]]) -> None:
        inputs = [job.inputs[index] for job, index in batch]
        n_rows = sum(map(len, inputs))
        self._set_threads(n_rows)
        started = self._clock()
        try:
            rows = self._backend.compute(inputs)
        except LlmrunError as error:
            if len(batch) == 1:
                self._fail({batch[0][0]}, error)
            else:
                # One caller's input must not be another's failure.
                for part in batch:
                    if not part[0].result.done():
                        self._compute([part])
            return
        if rows is None:
            # Only `close` asks for it.
            self._fail({job for job, _ in batch}, EngineError("the embedder was closed"))
            return
        if self._governor is not None:
            self._governor.observe(n_rows, 1, self._clock() - started)
        for (job, index), row in zip(batch, rows, strict=True):
            job.rows[index] = row
            job.n_done += 1
            if job.n_done == len(job.inputs):
                self._finish(job)

    def _set_threads(self, n_rows: int) -> None:
        if self._governor is None:
            return
        n_threads = self._governor.threads(n_rows)
        if n_threads != self._n_threads:
            self._n_threads = n_threads
            self._backend.set_threads(n_threads)

    def _fail(self, jobs: set[_Job], error: LlmrunError) -> None:
        self._jobs = deque(job for job in self._jobs if job not in jobs)
        for job in jobs:
            self._finish(job, error)

    def _finish(self, job: _Job, error: LlmrunError | None = None) -> None:
        self._unanswered.discard(job)
        job.finish(error)

    def _shut_down(self) -> None:
        with self._lock:
            self._closed = True
            left = [self._inbox.get() for _ in range(self._inbox.qsize())]
        self._is_running = False
        jobs = {*self._unanswered, *(job for job in left if job is not None)}
        self._fail(jobs, ended_by("embedder", self._failure))
        self._backend.close()

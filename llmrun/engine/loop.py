"""The engine: one thread that owns the context, requests in, events out.

Everything a caller touches (`submit`, `Stream`) only passes values through queues; what the thread
does with them is in `core`.
"""

from __future__ import annotations

import atexit
import queue
import secrets
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmrun.engine.answers import Answers
from llmrun.engine.backend import Backend
from llmrun.engine.core import Core
from llmrun.engine.drafting import Drafter
from llmrun.engine.ended import ended_by, refusal
from llmrun.engine.governor import Governor
from llmrun.engine.pace import Pace
from llmrun.engine.sequence import Sequence
from llmrun.engine.speculate import StepCosts
from llmrun.engine.stream import Stream
from llmrun.engine.types import (
    CHECKPOINT_BYTES,
    N_LOGPROBS_MAX,
    EngineCounters,
    EngineOptions,
    LoadProgress,
    ModelFacts,
    Request,
    SavedPrefix,
    Speculative,
    Tokenizer,
)
from llmrun.errors import (
    ContextOverflowError,
    UsageError,
)

if TYPE_CHECKING:
    from llmrun.engine.drafter import DraftModel
    from llmrun.gguf.types import ModelInfo

T = TypeVar("T")


class _Task:
    """Something to be done in the engine's thread, between two steps."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._action = action
        self.result: Future[object] = Future()

    def run(self) -> None:
        try:
            self.result.set_result(self._action())
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            self.result.set_exception(error)


class Engine:
    """See `engine.types.EngineLike`. Use as a context manager, or call `close`."""

    def __init__(
        self,
        backend: Backend,
        *,
        load_s: float = 0.0,
        steady_threads: bool = False,
        speculative: Speculative = "off",
        draft_backend: Backend | None = None,
        checkpoint_bytes: int = CHECKPOINT_BYTES,
        checks: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Takes ownership of the backends. `clock` gives seconds, for the timings.

        `steady_threads`, `speculative`, `checkpoint_bytes`: see `EngineOptions`; "draft" needs
        `draft_backend`, with the cache and the sequences of `backend`. Raises UsageError, and
        closes neither, when the one cannot guess for the other. `checks`: whenever nothing runs,
        compare what is believed to be in the cache with what is (for tests).
        """
        self._backend = backend
        self._clock = clock
        self.load_s = load_s
        self._checks = checks
        self._answers = Answers(backend, clock)
        self._inbox: queue.SimpleQueue[Sequence | _Task | None] = queue.SimpleQueue()
        governor = Governor(backend.n_threads, backend.n_threads_batch) if steady_threads else None
        costs = StepCosts() if speculative != "off" or backend.n_seq_max > 1 else None
        drafter = None
        self._draft_model: DraftModel | None = None
        if speculative == "draft":
            if draft_backend is None:
                raise UsageError("no draft model is named", hint="pass --draft-model NAME")
            from llmrun.engine.drafter import DraftModel

            self._draft_model = DraftModel(
                draft_backend, backend, clock=clock, steady_threads=steady_threads
            )
        n_rows_max = min(backend.n_outputs_max, backend.n_batch)
        # A recurrent state cannot take a wrong guess back.
        has_state = backend.facts.is_recurrent or backend.facts.is_hybrid
        if costs and speculative != "off" and not has_state and n_rows_max > 1:
            drafter = Drafter(
                costs,
                n_rows_max=n_rows_max,
                model=self._draft_model,
                kv_unified=backend.kv_unified,
                n_swa=backend.facts.n_swa,
            )
        self._pace = Pace(backend, clock, governor, costs)
        self._core = Core(
            backend,
            self._answers,
            self._pace,
            drafter,
            clock=clock,
            nothing_new=self._inbox.empty,
            checkpoint_bytes=checkpoint_bytes,
        )
        self._lock = threading.Lock()
        self._closed = False
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmrun-engine", daemon=True)
        # Python's exit under a running decode takes the library's memory from below it.
        atexit.register(self.close)
        self._thread.start()

    @classmethod
    def open(
        cls,
        paths: SequenceOf[Path],
        options: EngineOptions,
        *,
        info: ModelInfo | None = None,
        on_progress: LoadProgress | None = None,
    ) -> Engine:
        """Load a model from its file, or its shards in order.

        Nothing reaches llama.cpp before its header passed our own reader: `info` is the proof;
        without it the headers are read here. Raises GgufError, EngineError or WillNotFitError, and
        UsageError for a draft model that does not go with it.
        """
        from llmrun.engine.draft_file import open_draft_backend
        from llmrun.engine.llama import open_backend
        from llmrun.gguf.info import read_info

        started = time.perf_counter()
        info = info or read_info(paths)
        if info.kind == "projector":
            raise UsageError(
                f"{paths[0].name} is a projector, not a language model",
                hint="name the model's own file",
            )
        backend = open_backend(paths[0], options, on_progress=on_progress)
        draft = None
        try:
            if options.speculative == "draft":
                draft = open_draft_backend(options, backend, on_progress)
            return cls(
                backend,
                load_s=time.perf_counter() - started,
                steady_threads=options.steady_threads,
                speculative=options.speculative,
                draft_backend=draft,
                checkpoint_bytes=options.checkpoint_bytes,
            )
        except BaseException:
            if draft is not None:
                draft.close()
            backend.close()
            raise

    @property
    def facts(self) -> ModelFacts:
        return self._backend.facts

    @property
    def tokenizer(self) -> Tokenizer:
        return self._backend.tokenizer

    @property
    def n_ctx(self) -> int:
        return self._backend.n_ctx

    @property
    def counters(self) -> EngineCounters:
        """See `engine.types.EngineLike.counters`."""
        # The engine's thread adds to plain attributes; here they are only read.
        backend, core, pace = self._backend, self._core, self._pace
        n_running = len(core.residents)
        return EngineCounters(
            n_ctx=core.residents.n_cells_max,
            n_seq_max=backend.n_seq_max,
            n_running=n_running,
            n_waiting=max(0, len(self._answers.streams) - n_running),
            n_cells=core.residents.n_cells(),
            n_requests=core.n_requests,
            n_prompt=core.n_prompt,
            n_cached=core.n_cached,
            n_completion=self._answers.n_completion,
            n_drafted=core.n_drafted,
            n_accepted=core.n_accepted,
            n_steps=pace.n_steps,
            decode_s=pace.busy_s,
        )

    def submit(self, request: Request) -> Stream:
        """Start a generation; see `engine.types.EngineLike.submit`."""
        if not request.prompt:
            raise UsageError("the prompt is empty", hint="give some text to continue")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._backend.facts.n_vocab:
            raise UsageError("the prompt has tokens outside the model's vocabulary")
        if request.max_tokens is not None and request.max_tokens < 0:
            raise UsageError("max_tokens cannot be negative")
        if request.n_logprobs is not None and not 0 <= request.n_logprobs <= N_LOGPROBS_MAX:
            raise UsageError(
                f"{request.n_logprobs} likely tokens cannot be given at each place",
                hint=f"ask for 0 to {N_LOGPROBS_MAX}",
            )
        if len(request.prompt) > self.n_ctx:
            raise ContextOverflowError(len(request.prompt), self.n_ctx)
        seed = request.sampling.seed
        # llama.cpp takes 0xFFFFFFFF for "draw one"; then the reported seed would not be the used.
        seed = secrets.randbits(31) if seed is None else seed % 0xFFFFFFFF
        sequence = Sequence(request, seed, self._clock(), self.n_ctx)
        stream = Stream(sequence, self._stop_step)
        with self._lock:
            if self._closed:
                raise refusal("engine", self._failure)
            self._answers.streams[sequence] = stream
            self._inbox.put(sequence)
        return stream

    @property
    def state_key(self) -> str:
        return self._backend.state_key

    def save_prefix(self, tokens: SequenceOf[int], max_bytes: int) -> SavedPrefix | None:
        """See `engine.types.EngineLike.save_prefix`."""
        try:
            return self._do(lambda: self._core.residents.save(tokens, max_bytes))
        except MemoryError:
            return None

    def restore_prefix(self, saved: SavedPrefix) -> int:
        """See `engine.types.EngineLike.restore_prefix`."""
        return self._do(lambda: self._core.residents.restore(saved))

    def _stop_step(self) -> None:
        """Somebody has cancelled. Others' work is not thrown away for it: then the step that runs
        comes to its end first, or many who come and go could stop all answers for ever."""
        if not self._core.residents.serves_anyone():
            self._backend.request_abort()

    def _do(self, action: Callable[[], T]) -> T:
        """`action` in the engine's thread; its result, or what it raised."""
        task = _Task(action)
        with self._lock:
            if self._closed:
                raise refusal("engine", self._failure)
            self._inbox.put(task)
        return task.result.result()  # type: ignore[return-value]

    def close(self) -> None:
        """Cancel what runs, end the thread, free the model. May be called again."""
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

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ---- everything below runs in the engine's thread

    def _run(self) -> None:
        core = self._core
        try:
            while self._take_requests():
                core.run_once()
        except BaseException as error:  # noqa: BLE001 - the waiting callers get it
            self._failure = error
        finally:
            try:
                self._shut_down()
            finally:  # whatever goes wrong in it, nobody waits for ever
                self._ended.set()

    def _take_requests(self) -> bool:
        """Collect new requests; waits for one when there is nothing to do. False: close."""
        active = self._core.active
        if self._checks and not active:
            self._core.residents.check()
        arrived = [] if active else [self._inbox.get()]
        # Whoever asks for an abort has said why before. So first the flag is taken down, then the
        # reasons are read, and none is missed.
        self._backend.clear_abort()
        while not self._inbox.empty():
            arrived.append(self._inbox.get())
        for item in arrived:
            if isinstance(item, Sequence):
                active.append(item)
            elif item is not None:
                item.run()
        if None not in arrived:
            return True
        for sequence in active:
            self._core.finish(sequence, "cancelled")
        return False

    def _shut_down(self) -> None:
        with self._lock:
            self._closed = True
            waiting = list(self._answers.streams)
            left = [self._inbox.get() for _ in range(self._inbox.qsize())]
        failure = ended_by("engine", self._failure)
        for item in left:
            if isinstance(item, _Task):
                item.result.set_exception(failure)
        for sequence in waiting:
            self._answers.fail(sequence, failure)
        if self._draft_model is not None:
            self._draft_model.close()
        self._backend.close()

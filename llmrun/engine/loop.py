"""The engine: one thread that owns the context, requests in, events out.

A step takes the waiting requests into free cache slots, decodes one batch, samples a token for
each sequence that got logits, and hands out finished text. Everything a caller touches (`submit`,
`Stream`) only passes values through queues.
"""

from __future__ import annotations

import atexit
import queue
import secrets
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.engine.backend import Backend, Chunk, DecodeResult, Sampler
from llmrun.engine.prefix_cache import Placement, PrefixCache, Slot
from llmrun.engine.scheduler import choose_batch
from llmrun.engine.sequence import Phase, Sequence
from llmrun.engine.stream import Stream
from llmrun.engine.types import (
    EngineOptions,
    FinishEvent,
    FinishReason,
    LoadProgress,
    ModelFacts,
    PromptEvent,
    Request,
    TextEvent,
    Tokenizer,
)
from llmrun.errors import ContextOverflowError, EngineError, LlmrunError, UsageError

if TYPE_CHECKING:
    from llmrun.gguf.types import ModelInfo


# Text is handed out at most this often: to wake the reader costs more than all else around a
# token, and nobody sees more than thirty updates a second.
_MIN_EVENT_S = 1 / 30

_UNSEEN = b"unseen"  # no piece: compared by identity, so not one byte (Python shares those)


class Engine:
    """See `engine.types.EngineLike`. Use as a context manager, or call `close`."""

    def __init__(
        self,
        backend: Backend,
        *,
        load_s: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Takes ownership of `backend`. `clock` gives seconds, for the timings."""
        self._backend = backend
        self._clock = clock
        self.load_s = load_s
        # A recurrent state is the sum of all tokens so far: no part of it can be taken or undone.
        self._has_state = backend.facts.is_recurrent or backend.facts.is_hybrid
        self._cache = PrefixCache(
            backend.n_seq_max,
            n_swa=backend.facts.n_swa,
            can_cut=not self._has_state,
            pos_min=backend.seq_pos_min,
        )
        self._streams: dict[Sequence, Stream] = {}
        self._slots: dict[Sequence, Slot] = {}
        # Bytes of the tokens seen so far, without and with the text of control tokens.
        self._pieces: tuple[dict[int, bytes | None], dict[int, bytes | None]] = ({}, {})
        self._inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._crowded = False
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
        without it the headers are read here. Raises GgufError, EngineError or WillNotFitError.
        """
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
        return cls(backend, load_s=time.perf_counter() - started)

    @property
    def facts(self) -> ModelFacts:
        return self._backend.facts

    @property
    def tokenizer(self) -> Tokenizer:
        return self._backend.tokenizer

    @property
    def n_ctx(self) -> int:
        return self._backend.n_ctx

    def submit(self, request: Request) -> Stream:
        """Start a generation; see `engine.types.EngineLike.submit`."""
        if not request.prompt:
            raise UsageError("the prompt is empty", hint="give some text to continue")
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._backend.facts.n_vocab:
            raise UsageError("the prompt has tokens outside the model's vocabulary")
        if request.max_tokens is not None and request.max_tokens < 0:
            raise UsageError("max_tokens cannot be negative")
        if len(request.prompt) > self.n_ctx:
            raise ContextOverflowError(len(request.prompt), self.n_ctx)
        seed = request.sampling.seed
        # llama.cpp takes 0xFFFFFFFF for "draw one"; then the reported seed would not be the used.
        seed = secrets.randbits(31) if seed is None else seed % 0xFFFFFFFF
        sequence = Sequence(request, seed, self._clock(), self.n_ctx)
        stream = Stream(sequence, self._backend.request_abort)
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed", why=_words(self._failure))
            self._streams[sequence] = stream
            self._inbox.put(sequence)
        return stream

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
        active: list[Sequence] = []
        try:
            while self._take_requests(active):
                self._end_cancelled(active)
                self._admit(active)
                if len(active) == 1 and active[0].phase is Phase.DECODE:
                    self._decode_alone(active[0])
                else:
                    self._step(active)
                active[:] = [s for s in active if s.phase is not Phase.FINISHED]
        except BaseException as error:  # noqa: BLE001 - the waiting callers get it
            self._failure = error
        finally:
            self._shut_down()
            self._ended.set()

    def _take_requests(self, active: list[Sequence]) -> bool:
        """Collect new requests; waits for one when there is nothing to do. False: close."""
        arrived = [] if active else [self._inbox.get()]
        # Whoever asks for an abort has said why before. So first the flag is taken down, then the
        # reasons are read, and none is missed.
        self._backend.clear_abort()
        while not self._inbox.empty():
            arrived.append(self._inbox.get())
        active += [sequence for sequence in arrived if sequence is not None]
        if None not in arrived:
            return True
        for sequence in active:
            self._finish(sequence, "cancelled")
        return False

    def _end_cancelled(self, active: list[Sequence]) -> None:
        for sequence in active:
            if sequence.cancelled:
                self._finish(sequence, "cancelled")

    def _admit(self, active: list[Sequence]) -> None:
        """Give slots to waiting requests, first come first served."""
        if self._crowded and len(self._slots) > 0:
            return
        self._crowded = False
        for sequence in active:
            if sequence.phase is not Phase.WAITING:
                continue
            try:
                # Before a slot is taken: a grammar that does not parse costs nobody the cache.
                if sequence.sampler is None:
                    sequence.sampler = self._new_sampler(sequence)
            except LlmrunError as error:
                self._fail(sequence, error)
                continue
            placement = self._cache.place(sequence.tokens)
            if placement is None:
                return
            self._place(sequence, placement)

    def _place(self, sequence: Sequence, placement: Placement) -> None:
        slot = placement.slot
        self._slots[sequence] = slot
        sequence.seq_id = slot.seq_id
        if placement.copy_from is not None:
            self._backend.seq_rm(slot.seq_id, -1, -1)
            self._backend.seq_cp(placement.copy_from.seq_id, slot.seq_id, 0, placement.n_keep)
            sequence.n_past = placement.n_keep
        elif self._backend.seq_rm(slot.seq_id, placement.n_keep or -1, -1):
            sequence.n_past = placement.n_keep
        else:
            self._start_over(sequence)
        if sequence.started_s is None:
            sequence.started_s = self._clock()
            sequence.n_cached = sequence.n_past
        slot.tokens = sequence.tokens[: sequence.n_past]
        sequence.phase = Phase.PREFILL

    def _start_over(self, sequence: Sequence) -> None:
        self._backend.seq_rm(sequence.seq_id, -1, -1)
        sequence.n_past = sequence.n_cached = 0
        sequence.phase = Phase.PREFILL

    def _new_sampler(self, sequence: Sequence) -> Sampler:
        params = sequence.request.sampling
        sampler = self._backend.new_sampler(params, sequence.seed)
        penalised = (params.repeat_penalty, params.frequency_penalty, params.presence_penalty)
        if penalised != (1, 0, 0) or params.dry_multiplier > 0:
            # As llama.cpp's own programs do: the penalties see the prompt too.
            for token in sequence.request.prompt:
                sampler.accept(token)
        return sampler

    def _step(self, active: list[Sequence]) -> None:
        backend = self._backend
        batch = choose_batch(active, n_batch=backend.n_batch, n_outputs_max=backend.n_outputs_max)
        if not batch:
            return
        result = backend.decode([chunk for _, chunk in batch])
        if result is DecodeResult.DONE:
            row = -1
            for sequence, chunk in batch:
                n_tokens = len(chunk.tokens)
                row += n_tokens
                sequence.n_past += n_tokens
                if chunk.n_outputs:
                    self._take_token(sequence, row)
                else:
                    self._report_prompt(sequence)
        elif result is DecodeResult.ABORTED:
            for sequence, chunk in batch:
                self._trim_after_abort(sequence, chunk)
        else:
            self._make_room(active)

    def _take_token(self, sequence: Sequence, row: int) -> None:
        if sequence.phase is Phase.PREFILL:
            sequence.phase = Phase.DECODE
            self._slots[sequence].tokens = sequence.tokens[:]
            if sequence.request.max_tokens == 0:
                sequence.first_token_s = sequence.last_token_s = self._clock()
                self._finish(sequence, "length")
                return
        try:
            self._sample(sequence, row)
        except LlmrunError as error:
            self._fail(sequence, error)

    def _decode_alone(self, sequence: Sequence) -> None:
        """The steps of a single answer, until something else comes up.

        The same as `_step` where there is nothing to choose. It exists because after a decode the
        processor's caches hold weights, not this program: every line here costs ten times what it
        does in a benchmark of Python.
        """
        decode_one, sample = self._backend.decode_one, self._sample
        nothing_new = self._inbox.empty
        decoding, done = Phase.DECODE, DecodeResult.DONE
        seq_id, tokens = sequence.seq_id, sequence.tokens
        while sequence.phase is decoding and not sequence.cancelled and nothing_new():
            n_past = sequence.n_past
            result = decode_one(seq_id, tokens[n_past], n_past)
            if result is done:
                sequence.n_past = n_past + 1
                try:
                    sample(sequence, 0)
                except LlmrunError as error:
                    self._fail(sequence, error)
            elif result is DecodeResult.ABORTED:
                self._trim_after_abort(sequence, Chunk(seq_id, tokens[n_past:], n_past, 1))
                return
            else:
                self._make_room([sequence])
                return

    def _sample(self, sequence: Sequence, row: int) -> None:
        assert sequence.sampler is not None
        token = sequence.sampler.sample(row)
        now = self._clock()
        if not sequence.first_token_s:
            sequence.first_token_s = now
        request = sequence.request
        piece = self._pieces[request.show_special].get(token, _UNSEEN)
        if piece is _UNSEEN:
            piece = self._learn_piece(token, request.show_special)
        if piece is None:
            if not request.ignore_eog:
                self._finish(sequence, "stop")
                return
            piece = b""
        sequence.last_token_s = now
        tokens = sequence.tokens
        tokens.append(token)
        sequence.pending_tokens.append(token)
        text = sequence.text.feed(piece)
        if request.stop:
            text, stop = sequence.stops.feed(text)
            if stop is not None:
                sequence.pending_text += text
                sequence.stop = stop
                self._finish(sequence, "stop")
                return
        sequence.pending_text += text
        if now - sequence.emitted_s >= _MIN_EVENT_S and sequence.pending_text:
            sequence.emitted_s = now
            self._emit_text(sequence)
        if len(tokens) >= sequence.n_tokens_max:
            self._finish(sequence, "length")

    def _learn_piece(self, token: int, show_special: bool) -> bytes | None:
        """The token's bytes as such requests see them; None for an end token."""
        tokenizer = self._backend.tokenizer
        piece: bytes | None
        if tokenizer.is_eog(token):
            piece = None
        elif not show_special and tokenizer.is_control(token):
            piece = b""
        else:
            piece = tokenizer.piece(token)
        self._pieces[show_special][token] = piece
        return piece

    def _emit_text(self, sequence: Sequence) -> None:
        event = TextEvent(sequence.pending_text, tuple(sequence.pending_tokens))
        sequence.pending_text = ""
        sequence.pending_tokens.clear()
        self._streams[sequence].put(event)

    def _report_prompt(self, sequence: Sequence) -> None:
        if sequence.n_past <= sequence.n_prompt and sequence.n_completion == 0:
            self._streams[sequence].put(PromptEvent(sequence.n_past, sequence.n_prompt))

    def _trim_after_abort(self, sequence: Sequence, chunk: Chunk) -> None:
        """Keep what the cache really holds, but never the last token: its logits are not there."""
        if self._has_state:
            # The state may have been changed in part, and cannot go back.
            self._start_over(sequence)
            return
        held = self._backend.seq_pos_max(sequence.seq_id) + 1
        n_past = max(chunk.pos, min(held, len(sequence.tokens) - 1))
        self._backend.seq_rm(sequence.seq_id, n_past, -1)
        sequence.n_past = n_past

    def _make_room(self, active: list[Sequence]) -> None:
        """The cache is full: give up idle slots, then the newest prompt, then the newest answer.

        A request that loses its slot keeps its answer so far and its sampler; it goes on once
        another has finished. Waiting that long is what lets the others come to an end.
        """
        slot = self._cache.evict_idle()
        if slot is not None:
            self._backend.seq_rm(slot.seq_id, -1, -1)
            return
        running = [s for s in active if s.phase in (Phase.PREFILL, Phase.DECODE)]
        if len(running) == 1:
            self._finish(running[0], "length")
            return
        reading = [s for s in running if s.phase is Phase.PREFILL]
        sequence = (reading or running)[-1]
        self._release(sequence)
        sequence.phase = Phase.WAITING
        self._crowded = True

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.stop is None:
            text, sequence.stop = sequence.stops.feed(sequence.text.flush())
            sequence.pending_text += text + sequence.stops.flush()
        if sequence.pending_text or sequence.pending_tokens:
            self._emit_text(sequence)
        sequence.phase = Phase.FINISHED
        sequence.finish = reason
        self._release(sequence)
        self._drop_sampler(sequence)
        finish = FinishEvent(
            reason,
            sequence.usage(),
            sequence.timings(self._clock()),
            sequence.seed,
            sequence.stop,
        )
        self._streams.pop(sequence).put(finish)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """End one request with an error; the others go on."""
        sequence.phase = Phase.FINISHED
        self._release(sequence)
        self._drop_sampler(sequence)
        self._streams.pop(sequence).put(error)

    def _release(self, sequence: Sequence) -> None:
        slot = self._slots.pop(sequence, None)
        if slot is None:
            return
        self._crowded = False
        self._cache.release(slot, sequence.tokens[: sequence.n_past])

    def _drop_sampler(self, sequence: Sequence) -> None:
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None

    def _shut_down(self) -> None:
        with self._lock:
            self._closed = True
            streams = list(self._streams.items())
            self._streams.clear()
        for sequence, stream in streams:
            self._drop_sampler(sequence)
            failure = self._failure or EngineError("the engine was closed")
            stream.put(
                failure
                if isinstance(failure, LlmrunError)
                else EngineError("the engine stopped", why=_words(failure))
            )
        self._backend.close()


def _words(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"

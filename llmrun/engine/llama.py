"""The real backend: llama.cpp through llama-cpp-python's low-level binding."""

from __future__ import annotations

import array
import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.binding import last_reason, load_library
from llmrun.engine.logits import LogitRows
from llmrun.engine.model_file import load_model, new_context, read_facts
from llmrun.engine.params import check_options, fill_context_params
from llmrun.engine.params import default_threads as default_threads
from llmrun.engine.sampling import LlamaSampler
from llmrun.engine.states import States, describe_build, describe_settings
from llmrun.engine.types import (
    EngineOptions,
    LoadProgress,
    ModelFacts,
    SamplingParams,
    StateBytes,
    count_outputs,
)
from llmrun.engine.vocabulary import LlamaTokenizer
from llmrun.errors import EngineError

_DONE = DecodeResult.DONE  # an enum's member costs a descriptor call at each access


class LlamaBackend:
    """One model with one context. See `engine.backend.Backend` for the contract.

    Create with `open_backend`; `close` frees context, then model.
    """

    def __init__(self, C: Any, model: Any, options: EngineOptions) -> None:
        """Takes ownership of `model`. Raises WillNotFitError when the context gets no memory."""
        self._C = C
        self._model = model
        self._ctx = None
        self._vocab = C.llama_model_get_vocab(model)
        self.tokenizer = LlamaTokenizer(C, self._vocab)
        self.facts = read_facts(C, model, self.tokenizer)
        self._ctx = _create_context(C, model, options, self.facts)
        self._memory = C.llama_get_memory(self._ctx)
        self._states = States(C, self._ctx)
        if not self._memory:
            C.llama_free(self._ctx)
            raise EngineError(
                "this model does not generate text",
                why=f"{self.facts.description} has no memory of a sequence",
            )
        self.n_ctx: int = C.llama_n_ctx_seq(self._ctx)
        self.n_batch: int = C.llama_n_batch(self._ctx)
        self.n_seq_max: int = C.llama_n_seq_max(self._ctx)
        self.kv_unified = options.kv_unified or self.n_seq_max == 1
        self.n_threads: int = C.llama_n_threads(self._ctx)
        self.n_threads_batch: int = C.llama_n_threads_batch(self._ctx)
        self.n_outputs_max: int = _count_outputs(options, self.facts)
        self._state_settings = describe_settings(C, model, options, self.n_ctx)
        self._decode = C.llama_decode
        self._logits = LogitRows(C, self._ctx, self.facts.n_vocab)
        self._rows = _BatchRows(C, self.n_batch)
        self._install_abort_flag()

    @property
    def state_key(self) -> str:
        # Told when it is asked: most runs keep no state, and a version is slow to look up.
        return f"{describe_build(self._C)} {self._state_settings}"

    def decode(self, chunks: Sequence[Chunk]) -> DecodeResult:
        rows = self._rows
        rows.n_rows = rows.n_outputs = 0
        for chunk in chunks:
            self._check_seq(chunk.seq_id)
            rows.append(chunk)
        if not 0 < rows.n_rows <= self.n_batch or rows.n_outputs > self.n_outputs_max:
            raise EngineError(
                f"a batch of {rows.n_rows} rows with {rows.n_outputs} outputs breaks the "
                f"context's limits of {self.n_batch} and {self.n_outputs_max}"
            )
        rows.batch.n_tokens = rows.n_rows
        return self._result(self._decode(self._ctx, rows.batch))

    def _result(self, code: int) -> DecodeResult:
        if code == 0:
            return DecodeResult.DONE
        if code == 1:
            return DecodeResult.FULL
        if code == 2:
            return DecodeResult.ABORTED
        raise EngineError(f"llama.cpp could not decode (code {code})", why=last_reason())

    def decode_one(self, seq_id: int, token: int, pos: int) -> DecodeResult:
        rows = self._rows
        rows.token[0] = token
        rows.pos[0] = pos
        rows.seq[0] = seq_id
        rows.logits[0] = 1
        rows.batch.n_tokens = 1
        code = self._decode(self._ctx, rows.batch)
        return _DONE if code == 0 else self._result(code)

    def new_sampler(self, params: SamplingParams, seed: int) -> LlamaSampler:
        return LlamaSampler(self._C, self._ctx, self._vocab, self._logits, params, seed)

    def logprobs(self, row: int, token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
        return self._logits.logprobs(row, token, n_top)

    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        self._check_seq(seq_id)
        return bool(self._C.llama_memory_seq_rm(self._memory, seq_id, p0, p1))

    def seq_cp(self, source: int, target: int, n_tokens: int) -> bool:
        self._check_seq(source)
        self._check_seq(target)
        if self.kv_unified:
            self._C.llama_memory_seq_cp(self._memory, source, target, 0, n_tokens)
            return True
        # The library's own copy is of a whole cache, however little is in it, and is made later,
        # with the next step.
        held = self._states.read(source)
        if held is None:
            return False
        if self._states.write(target, *held[source]) and self.seq_rm(target, n_tokens, -1):
            return True
        self.seq_rm(target, -1, -1)
        return False

    def seq_swap(self, a: int, b: int) -> bool:
        self._check_seq(a)
        self._check_seq(b)
        held = self._states.read(*(seq_id for seq_id in (a, b) if self.seq_pos_max(seq_id) >= 0))
        if held is None:
            return False
        for source, target in ((a, b), (b, a)):
            if source not in held:
                self.seq_rm(target, -1, -1)
            elif not self._states.write(target, *held[source]):
                raise EngineError("a sequence could not be moved", why=last_reason())
        return True

    def seq_pos_min(self, seq_id: int) -> int:
        self._check_seq(seq_id)
        return int(self._C.llama_memory_seq_pos_min(self._memory, seq_id))

    def seq_pos_max(self, seq_id: int) -> int:
        self._check_seq(seq_id)
        return int(self._C.llama_memory_seq_pos_max(self._memory, seq_id))

    def state_bytes(self, seq_id: int) -> int:
        self._check_seq(seq_id)
        return self._states.n_bytes(seq_id)

    def save_state(self, seq_id: int, *, partial: bool) -> StateBytes:
        self._check_seq(seq_id)
        return self._states.save(seq_id, partial=partial)

    def load_state(self, seq_id: int, state: StateBytes, *, partial: bool) -> bool:
        self._check_seq(seq_id)
        if self._states.load(seq_id, state, partial=partial):
            return True
        if not partial:
            self.seq_rm(seq_id, -1, -1)
        return False

    def set_threads(self, n_threads: int, n_threads_batch: int) -> None:
        self._C.llama_set_n_threads(self._ctx, n_threads, n_threads_batch)

    def request_abort(self) -> None:
        self._abort_flag[0] = b"\x01"

    def clear_abort(self) -> None:
        self._abort_flag[0] = b"\x00"

    def close(self) -> None:
        if self._ctx is not None:
            self._C.llama_free(self._ctx)
            self._ctx = None
        if self._model is not None:
            self._C.llama_model_free(self._model)
            self._model = None

    def _check_seq(self, seq_id: int) -> None:
        # The library aborts the process for some of these, and takes others silently.
        if not 0 <= seq_id < self.n_seq_max:
            raise EngineError(f"sequence {seq_id} is outside 0…{self.n_seq_max - 1}")

    def _install_abort_flag(self) -> None:
        # llama.cpp polls the callback hundreds of times a token. `strlen` of a one-byte flag is
        # such a callback without Python and its lock: it returns 0 (go on) or 1 (stop). Back ends
        # other than the CPU do not poll; there a step's 512 rows bound the wait.
        libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        self._abort_flag = ctypes.create_string_buffer(2)
        self._abort_callback = ctypes.cast(libc.strlen, self._C.ggml_abort_callback)
        self._C.llama_set_abort_callback(
            self._ctx, self._abort_callback, ctypes.cast(self._abort_flag, ctypes.c_void_p)
        )


class _BatchRows:
    """The arrays of one llama_batch, filled in place."""

    def __init__(self, C: Any, capacity: int) -> None:
        self._capacity = capacity
        self.token = (ctypes.c_int32 * capacity)()
        self.pos = (ctypes.c_int32 * capacity)()
        self.seq = (ctypes.c_int32 * capacity)()
        self.logits = (ctypes.c_int8 * capacity)()
        self._n_seq = (ctypes.c_int32 * capacity)(*([1] * capacity))
        int_pointer = ctypes.POINTER(ctypes.c_int32)
        start = ctypes.addressof(self.seq)
        self._seq_pointers = (int_pointer * capacity)(
            *(ctypes.cast(start + 4 * row, int_pointer) for row in range(capacity))
        )
        self.batch = C.llama_batch(
            0, self.token, None, self.pos, self._n_seq, self._seq_pointers, self.logits
        )
        self.n_rows = 0
        self.n_outputs = 0

    def append(self, chunk: Chunk) -> None:
        first = self.n_rows
        n = len(chunk.tokens)
        if not 0 <= chunk.n_outputs <= n:
            raise EngineError(f"a chunk of {n} tokens cannot have {chunk.n_outputs} outputs")
        self.n_rows = first + n
        self.n_outputs += chunk.n_outputs
        if self.n_rows > self._capacity:
            raise EngineError(f"a batch holds {self._capacity} rows, not {self.n_rows}")
        if n == 1:
            self.token[first] = chunk.tokens[0]
            self.pos[first] = chunk.pos
            self.seq[first] = chunk.seq_id
            self.logits[first] = chunk.n_outputs
            return
        self._copy(self.token, first, array.array("i", chunk.tokens))
        self._copy(self.pos, first, array.array("i", range(chunk.pos, chunk.pos + n)))
        self._copy(self.seq, first, array.array("i", [chunk.seq_id]) * n)
        ctypes.memset(ctypes.addressof(self.logits) + first, 0, n)
        for row in range(self.n_rows - chunk.n_outputs, self.n_rows):
            self.logits[row] = 1

    def _copy(self, target: Any, first: int, values: array.array[int]) -> None:
        address, n = values.buffer_info()
        ctypes.memmove(ctypes.addressof(target) + 4 * first, address, 4 * n)


def open_backend(
    path: Path, options: EngineOptions, *, on_progress: LoadProgress | None = None
) -> LlamaBackend:
    """Load `path` and create its context. Raises as `load_model` does, and WillNotFitError when the
    context gets no memory."""
    check_options(options)
    C = load_library()
    model = load_model(C, path, options, on_progress)
    try:
        return LlamaBackend(C, model, options)
    except BaseException:
        C.llama_model_free(model)
        raise


def _create_context(C: Any, model: Any, options: EngineOptions, facts: ModelFacts) -> Any:
    params = fill_context_params(C, options, n_outputs_max=_count_outputs(options, facts))
    return new_context(C, model, params, f"a context of {options.n_ctx} tokens", options.n_ctx, 512)


def _count_outputs(options: EngineOptions, facts: ModelFacts) -> int:
    return count_outputs(
        n_seq_max=options.n_seq_max,
        n_ubatch=options.n_ubatch,
        speculative=options.speculative,
        has_state=facts.is_recurrent or facts.is_hybrid,
        n_draft_max=options.n_draft_max,
    )

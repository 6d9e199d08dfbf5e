"""The real backend: llama.cpp through llama-cpp-python's low-level binding.

The only module that imports `llama_cpp`. Pointers are ctypes values of the binding and typed Any.
"""

from __future__ import annotations

import array
import ctypes
import importlib
import importlib.util
import os
import struct
import sys
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.ggml import Ggml
from llmrun.engine.logits import LogitRows
from llmrun.engine.logs import LogSink
from llmrun.engine.params import check_options, fill_context_params, fill_model_params
from llmrun.engine.params import default_threads as default_threads
from llmrun.engine.sampling import LlamaSampler
from llmrun.engine.types import (
    EngineOptions,
    LoadProgress,
    ModelFacts,
    SamplingParams,
    StateBytes,
    count_outputs,
)
from llmrun.engine.vocabulary import LlamaTokenizer
from llmrun.errors import EngineError, WillNotFitError

MIN_BINDING = "0.3.36"

_DONE = DecodeResult.DONE  # an enum's member costs a descriptor call at each access
_PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
_MOST_MOVED_BYTES = 512 << 20  # from one sequence to another, or between two

# In front of a saved state: the library believes positions and sizes in a damaged one.
_STATE_HEAD = struct.Struct("<8sIQ")  # magic, CRC-32 and length of what follows
_STATE_MAGIC = b"llmrunS1"

# The log is global in llama.cpp, so the sink and the C callback object are too: the library calls
# them until the process ends.
_log_sink = LogSink()
_log_callback: Any = None


def import_binding(module: str = "llama_cpp") -> Any:
    """A module of the llama_cpp package without running the package's `__init__`.

    The `__init__` imports the high-level class with numpy and jinja2 (0.1 s at every start), and
    installs a logger that prints. What the process imported already is used as it is.
    """
    # Both are read when the library loads. Threads that wait for work spin at most this often
    # (OpenMP), else two busy programs on one machine stop each other; a failed assertion must not
    # fork a debugger.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.submodule_search_locations is None:
            raise EngineError(
                "llama-cpp-python is not installed",
                hint=f"pip install 'llama-cpp-python>={MIN_BINDING}'",
            )
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["llama_cpp"] = package
    try:
        return importlib.import_module(f"llama_cpp.{module}")
    except (OSError, RuntimeError, AttributeError, ImportError) as error:
        raise EngineError(
            "the llama.cpp library cannot be loaded",
            why=str(error),
            hint=f"pip install --force-reinstall --no-cache-dir 'llama-cpp-python>={MIN_BINDING}'",
        ) from error


def load_library() -> Any:
    """The binding, initialised, with its log routed to ours."""
    global _log_callback
    C = import_binding()
    if _log_callback is None:
        _log_callback = C.llama_log_callback(_log_sink.write)
        C.llama_log_set(_log_callback, None)
        C.llama_backend_init()
        Ggml(C).load_backends()
    return C


def recent_log() -> list[str]:
    """The last warnings and errors in llama.cpp's log since `forget_log`, the newest last."""
    return list(_log_sink.recent)


def forget_log() -> None:
    _log_sink.recent.clear()


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
        self._state_settings = _describe_states(C, model, options, self.n_ctx)
        self._decode = C.llama_decode
        self._logits = LogitRows(C, self._ctx, self.facts.n_vocab)
        self._rows = _BatchRows(C, self.n_batch)
        self._install_abort_flag()

    @property
    def state_key(self) -> str:
        # Told when it is asked: most runs keep no state, and a version is slow to look up.
        return f"{_describe_build(self._C)} {self._state_settings}"

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
        raise EngineError(f"llama.cpp could not decode (code {code})", why=_log_sink.last_reason())

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
        held = self._read_states(source)
        if held is None:
            return False
        if self._write_state(target, *held[source]) and self.seq_rm(target, n_tokens, -1):
            return True
        self.seq_rm(target, -1, -1)
        return False

    def seq_swap(self, a: int, b: int) -> bool:
        self._check_seq(a)
        self._check_seq(b)
        held = self._read_states(*(seq_id for seq_id in (a, b) if self.seq_pos_max(seq_id) >= 0))
        if held is None:
            return False
        for source, target in ((a, b), (b, a)):
            if source not in held:
                self.seq_rm(target, -1, -1)
            elif not self._write_state(target, *held[source]):
                raise EngineError("a sequence could not be moved", why=_log_sink.last_reason())
        return True

    def _read_states(self, *seq_ids: int) -> dict[int, tuple[Any, int]] | None:
        """Buffers with all that the sequences hold, for use at once, and their lengths. None where
        that takes more memory than there is, or than any plan has counted with."""
        read, size_of = self._C.llama_state_seq_get_data_ext, self._C.llama_state_seq_get_size_ext
        sizes = {seq_id: size_of(self._ctx, seq_id, 0) for seq_id in seq_ids}
        if sum(sizes.values()) > _MOST_MOVED_BYTES:
            return None
        held = {}
        try:
            for seq_id, size in sizes.items():
                buffer = (ctypes.c_uint8 * size)()
                held[seq_id] = buffer, int(read(self._ctx, buffer, size, seq_id, 0))
        except MemoryError:
            return None
        return held if all(n for _, n in held.values()) else None

    def _write_state(self, seq_id: int, buffer: Any, size: int) -> bool:
        return bool(self._C.llama_state_seq_set_data_ext(self._ctx, buffer, size, seq_id, 0))

    def seq_pos_min(self, seq_id: int) -> int:
        self._check_seq(seq_id)
        return int(self._C.llama_memory_seq_pos_min(self._memory, seq_id))

    def seq_pos_max(self, seq_id: int) -> int:
        self._check_seq(seq_id)
        return int(self._C.llama_memory_seq_pos_max(self._memory, seq_id))

    def state_bytes(self, seq_id: int) -> int:
        self._check_seq(seq_id)
        size = self._C.llama_state_seq_get_size_ext(self._ctx, seq_id, 0)
        return _STATE_HEAD.size + int(size)

    def save_state(self, seq_id: int, *, partial: bool) -> StateBytes:
        self._check_seq(seq_id)
        flags = _PARTIAL_ONLY if partial else 0
        size = self._C.llama_state_seq_get_size_ext(self._ctx, seq_id, flags)
        # A state can be as large as the cache: it is written behind its head, and never copied.
        state = memoryview(bytearray(_STATE_HEAD.size + size))
        buffer = (ctypes.c_uint8 * size).from_buffer(state, _STATE_HEAD.size)
        n = self._C.llama_state_seq_get_data_ext(self._ctx, buffer, size, seq_id, flags)
        state = state[: _STATE_HEAD.size + n]
        crc = zlib.crc32(state[_STATE_HEAD.size :])
        _STATE_HEAD.pack_into(state, 0, _STATE_MAGIC, crc, n)
        return state

    def load_state(self, seq_id: int, state: StateBytes, *, partial: bool) -> bool:
        self._check_seq(seq_id)
        flags = _PARTIAL_ONLY if partial else 0
        data = memoryview(state)[_STATE_HEAD.size :]
        head = _STATE_HEAD.pack(_STATE_MAGIC, zlib.crc32(data), len(data))
        if state[: _STATE_HEAD.size] != head:
            return False
        kind = ctypes.c_uint8 * len(data)
        buffer = kind.from_buffer_copy(data) if data.readonly else kind.from_buffer(data)
        if self._C.llama_state_seq_set_data_ext(self._ctx, buffer, len(data), seq_id, flags):
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
    """Load `path` (the first shard of a split model) and create its context.

    The file's header must have passed `llmrun.gguf` before. Raises EngineError when llama.cpp
    refuses the file, WillNotFitError when memory is short, KeyboardInterrupt when the user stops
    the load.
    """
    check_options(options)
    C = load_library()
    params, keep = fill_model_params(C, options)
    watch = LoadWatch(on_progress)
    params.progress_callback = callback = C.llama_progress_callback(watch.update)
    _log_sink.recent.clear()
    model = C.llama_model_load_from_file(os.fsencode(path), params)
    del callback, keep
    if watch.stopped_by is not None:
        if model:
            C.llama_model_free(model)
        raise watch.stopped_by
    if not model:
        why = _log_sink.last_reason()
        if why and "alloc" in why:
            raise WillNotFitError(
                f"not enough memory to load {path.name}",
                why=why,
                hint="use a smaller quant, or fewer layers on the GPU: --gpu-layers 0",
            )
        raise EngineError(f"llama.cpp cannot load {path.name}", why=why)
    try:
        return LlamaBackend(C, model, options)
    except BaseException:
        C.llama_model_free(model)
        raise


class LoadWatch:
    """Progress of a load. A Python signal handler can run inside the callback, so everything is
    caught there and raised again once the C call is back."""

    def __init__(self, on_progress: LoadProgress | None) -> None:
        self._on_progress = on_progress
        self.stopped_by: BaseException | None = None

    def update(self, progress: float, _user: Any) -> bool:
        if self.stopped_by is not None:
            return False
        try:
            if self._on_progress is not None and not self._on_progress(progress):
                self.stopped_by = KeyboardInterrupt()
        except BaseException as error:  # noqa: BLE001 - raised again by open_backend
            self.stopped_by = error
        return self.stopped_by is None


def _create_context(C: Any, model: Any, options: EngineOptions, facts: ModelFacts) -> Any:
    params = fill_context_params(C, options, n_outputs_max=_count_outputs(options, facts))
    _log_sink.recent.clear()
    ctx = C.llama_init_from_model(model, params)
    if not ctx:
        why = _log_sink.last_reason()
        if why is None or "alloc" in why:
            raise WillNotFitError(
                f"no memory for a context of {options.n_ctx} tokens",
                why=why,
                hint=f"pass --ctx {max(512, options.n_ctx // 2)}",
            )
        raise EngineError("llama.cpp cannot create this context", why=why)
    return ctx


def _count_outputs(options: EngineOptions, facts: ModelFacts) -> int:
    return count_outputs(
        n_seq_max=options.n_seq_max,
        n_ubatch=options.n_ubatch,
        speculative=options.speculative,
        has_state=facts.is_recurrent or facts.is_hybrid,
        n_draft_max=options.n_draft_max,
    )


def _describe_states(C: Any, model: Any, options: EngineOptions, n_ctx: int) -> str:
    """The settings in `Backend.state_key`. The library itself refuses most that does not match, but
    not all."""
    cache = f"{options.type_k}/{options.type_v}/{options.flash_attn}"
    if not options.kv_unified and options.n_seq_max > 1:
        cache += f"/{options.n_seq_max} apart"
    # Of two sets of rotation factors llama.cpp takes the one for long contexts beyond this.
    n_original = _read_meta(C, model, "{}.rope.scaling.original_context_length")
    is_long = n_original.isdecimal() and n_ctx > int(n_original)
    return f"{cache} {'long' if is_long else 'short'}"


def _describe_build(C: Any) -> str:
    """The library's very build, to which the format of states is tied. A package that was built
    here anew has the same version, but not the same file."""
    library = Path(C._lib._name).stat()
    return f"{_binding_version()}/{C.LLAMA_STATE_SEQ_VERSION}/{library.st_size}"


def _binding_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "?"


def _read_meta(C: Any, model: Any, key: str) -> str:
    """A value of the model's header as text, empty when it is not there; `{}` in `key` stands for
    the architecture."""
    buffer = ctypes.create_string_buffer(256)

    def read(name: str) -> str:
        n = C.llama_model_meta_val_str(model, name.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if n >= 0 else ""

    return read(key.format(read("general.architecture")))


def read_facts(C: Any, model: Any, tokenizer: LlamaTokenizer) -> ModelFacts:
    vocab = C.llama_model_get_vocab(model)
    buffer = ctypes.create_string_buffer(256)
    C.llama_model_desc(model, buffer, len(buffer))
    template = C.llama_model_chat_template(model, None)

    def special_text(token: int) -> str:
        return tokenizer.piece(token).decode("utf-8", "replace") if token >= 0 else ""

    return ModelFacts(
        description=buffer.value.decode("utf-8", "replace"),
        n_params=C.llama_model_n_params(model),
        n_bytes=C.llama_model_size(model),
        n_ctx_train=C.llama_model_n_ctx_train(model),
        n_embd=C.llama_model_n_embd(model),
        n_layers=C.llama_model_n_layer(model),
        n_vocab=tokenizer.n_vocab,
        n_swa=C.llama_model_n_swa(model),
        is_recurrent=C.llama_model_is_recurrent(model),
        is_hybrid=C.llama_model_is_hybrid(model),
        chat_template=template.decode("utf-8", "replace") if template else None,
        bos_text=special_text(C.llama_vocab_bos(vocab)),
        eos_text=special_text(C.llama_vocab_eos(vocab)),
    )

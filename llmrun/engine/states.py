"""What sequences hold, as bytes: to keep it on disk, and to move it from one place to another."""

from __future__ import annotations

import ctypes
import struct
import zlib
from pathlib import Path
from typing import Any

from llmrun.engine.model_file import read_meta
from llmrun.engine.types import EngineOptions, StateBytes

_PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
_MOST_MOVED_BYTES = 512 << 20  # from one sequence to another, or between two

# In front of a saved state: the library believes positions and sizes in a damaged one.
_HEAD = struct.Struct("<8sIQ")  # magic, CRC-32 and length of what follows
_MAGIC = b"llmrunS1"


class States:
    """The states of one context's sequences. Ids must be within the context's."""

    def __init__(self, C: Any, ctx: Any) -> None:
        self._ctx = ctx
        self._size = C.llama_state_seq_get_size_ext
        self._get = C.llama_state_seq_get_data_ext
        self._set = C.llama_state_seq_set_data_ext

    def n_bytes(self, seq_id: int) -> int:
        return _HEAD.size + int(self._size(self._ctx, seq_id, 0))

    def save(self, seq_id: int, *, partial: bool) -> StateBytes:
        """See `Backend.save_state`."""
        flags = _PARTIAL_ONLY if partial else 0
        size = self._size(self._ctx, seq_id, flags)
        # A state can be as large as the cache: it is written behind its head, and never copied.
        state = memoryview(bytearray(_HEAD.size + size))
        buffer = (ctypes.c_uint8 * size).from_buffer(state, _HEAD.size)
        n = self._get(self._ctx, buffer, size, seq_id, flags)
        state = state[: _HEAD.size + n]
        _HEAD.pack_into(state, 0, _MAGIC, zlib.crc32(state[_HEAD.size :]), n)
        return state

    def load(self, seq_id: int, state: StateBytes, *, partial: bool) -> bool:
        """False: damaged, or refused by the library, which may have written a part of it."""
        data = memoryview(state)[_HEAD.size :]
        if state[: _HEAD.size] != _HEAD.pack(_MAGIC, zlib.crc32(data), len(data)):
            return False
        kind = ctypes.c_uint8 * len(data)
        buffer = kind.from_buffer_copy(data) if data.readonly else kind.from_buffer(data)
        flags = _PARTIAL_ONLY if partial else 0
        return bool(self._set(self._ctx, buffer, len(data), seq_id, flags))

    def read(self, *seq_ids: int) -> dict[int, tuple[Any, int]] | None:
        """Buffers with all that the sequences hold, for `write` at once, and their lengths. None
        where that takes more memory than there is, or than any plan has counted with."""
        sizes = {seq_id: self._size(self._ctx, seq_id, 0) for seq_id in seq_ids}
        if sum(sizes.values()) > _MOST_MOVED_BYTES:
            return None
        held = {}
        try:
            for seq_id, size in sizes.items():
                buffer = (ctypes.c_uint8 * size)()
                held[seq_id] = buffer, int(self._get(self._ctx, buffer, size, seq_id, 0))
        except MemoryError:
            return None
        return held if all(n for _, n in held.values()) else None

    def write(self, seq_id: int, buffer: Any, size: int) -> bool:
        return bool(self._set(self._ctx, buffer, size, seq_id, 0))


def describe_settings(C: Any, model: Any, options: EngineOptions, n_ctx: int) -> str:
    """The settings in `Backend.state_key`. The library itself refuses most that does not match, but
    not all."""
    cache = f"{options.type_k}/{options.type_v}/{options.flash_attn}"
    if not options.kv_unified and options.n_seq_max > 1:
        cache += f"/{options.n_seq_max} apart"
    # Of two sets of rotation factors llama.cpp takes the one for long contexts beyond this.
    n_original = read_meta(C, model, "{}.rope.scaling.original_context_length")
    is_long = n_original.isdecimal() and n_ctx > int(n_original)
    return f"{cache} {'long' if is_long else 'short'}"


def describe_build(C: Any) -> str:
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

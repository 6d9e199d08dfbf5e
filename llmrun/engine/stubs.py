"""Files that have a model's header and size, and no weights: enough to measure with.

llama.cpp is told to allocate nothing, so it reads no byte behind the header; it only compares the
file's size with what the header says.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrun.engine.ggml import Ggml
from llmrun.errors import EngineError

_MIB = 1 << 20
_TRIAL_BYTES = 16 * _MIB
_PADDING_BYTES = 64  # a header may be cut at its last value, and is padded to 32
_VOCABULARY = ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")


@dataclass(frozen=True, slots=True)
class StubSource:
    """One file of a model: the first bytes of a file of `n_bytes`, at least its header; or a file
    at `path` that is used as it is."""

    header: bytes = field(default=b"", repr=False)
    n_bytes: int = 0
    path: Path | None = None


def write_stubs(sources: Sequence[StubSource], folder: Path, *, in_memory: bool = True) -> Path:
    """Make a stub of each shard in the new folder `folder`, and return the path of the first, from
    which llama.cpp finds the others. The stubs live as long as the process and the folder.

    On Linux they lie in memory, where holes take nothing; elsewhere in `folder`, whose file system
    must be able to leave holes. Raises EngineError when it cannot.
    """
    names = ["model.gguf"]
    if len(sources) > 1:
        # llama.cpp builds the names of the other shards from the first one's.
        names = [f"model-{i:05}-of-{len(sources):05}.gguf" for i in range(1, len(sources) + 1)]
    try:
        folder.mkdir()
        for source, path in zip(sources, [folder / name for name in names], strict=True):
            if source.path is not None:
                path.symlink_to(source.path.absolute())
            elif source.n_bytes < 0:
                raise EngineError("the size of the model's file is not known")
            elif not (in_memory and _link_memory_file(source, path)):
                _write_sparse_file(source, path)
    except OSError as error:
        raise EngineError(
            "a stand-in for the model's file cannot be written", why=error.strerror or str(error)
        ) from error
    return folder / names[0]


def drop_vocabulary(ggml: Ggml, sources: Sequence[StubSource]) -> list[StubSource] | None:
    """`sources` with as many nameless tokens in place of the vocabulary; None where this is not
    possible.

    Reading hundreds of thousands of tokens is most of the time that a header takes to load, and
    memory depends on their number only.
    """
    first = sources[0]
    try:
        if first.path is None:
            data = ctypes.create_string_buffer(first.header, len(first.header) + _PADDING_BYTES)
            slim = _drop_vocabulary(ggml, data, first.n_bytes)
        else:
            with (
                first.path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as whole,
            ):
                view = (ctypes.c_char * len(whole)).from_buffer(whole)
                slim = _drop_vocabulary(ggml, view, len(whole))
                del view
    except (AttributeError, OSError, ValueError, BufferError):
        return None
    return None if slim is None else [slim, *sources[1:]]


def _drop_vocabulary(
    ggml: Ggml, data: ctypes.Array[ctypes.c_char], n_bytes: int
) -> StubSource | None:
    pointer, i64, size_t = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    text, u32 = ctypes.c_char_p, ctypes.c_uint32

    def function(name: str, restype: Any, *argtypes: Any) -> Any:
        found = ggml.find(name)
        found.restype, found.argtypes = restype, argtypes
        return found

    find = function("gguf_find_key", i64, pointer, text)
    remove = function("gguf_remove_key", i64, pointer, text)
    read_type = function("gguf_get_kv_type", ctypes.c_int, pointer, i64)
    read_text = function("gguf_get_val_str", text, pointer, i64)
    count = function("gguf_get_arr_n", size_t, pointer, i64)
    start_of_data = function("gguf_get_data_offset", size_t, pointer)
    write_text = function("gguf_set_val_str", None, pointer, text, text)
    write_u32 = function("gguf_set_val_u32", None, pointer, text, u32)
    header_size = function("gguf_get_meta_size", size_t, pointer)
    write_header = function("gguf_get_meta_data", None, pointer, pointer)
    free = function("gguf_free", None, pointer)
    parse = function("gguf_init_from_buffer", pointer, pointer, size_t, _InitParams)

    gguf = parse(ctypes.addressof(data), len(data), _InitParams(True, None))
    if not gguf:
        return None
    try:
        tokens = find(gguf, b"tokenizer.ggml.tokens")
        architecture = find(gguf, b"general.architecture")
        if (
            min(tokens, architecture) < 0
            or read_type(gguf, tokens) != _TYPE_ARRAY
            or read_type(gguf, architecture) != _TYPE_STRING
        ):
            return None
        n_tokens, start = count(gguf, tokens), start_of_data(gguf)
        write_u32(gguf, read_text(gguf, architecture) + b".vocab_size", n_tokens)
        write_text(gguf, b"tokenizer.ggml.model", b"none")
        for name in _VOCABULARY:
            remove(gguf, f"tokenizer.ggml.{name}".encode())
        header = ctypes.create_string_buffer(header_size(gguf))
        write_header(gguf, header)
        return StubSource(header.raw, len(header) + max(0, n_bytes - start))
    finally:
        free(gguf)


_TYPE_STRING, _TYPE_ARRAY = 8, 9  # enum gguf_type


class _InitParams(ctypes.Structure):
    """gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _link_memory_file(source: StubSource, path: Path) -> bool:
    """Put the stub into an anonymous file with a link at `path`; False where there is none."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        fd = os.memfd_create("llmrun-stub")  # open until the process ends
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(source.header[: source.n_bytes])
            file.truncate(source.n_bytes)
        path.symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
        return path.stat().st_size == source.n_bytes
    except OSError:
        path.unlink(missing_ok=True)
        return False


def _write_sparse_file(source: StubSource, path: Path) -> None:
    header = source.header[: source.n_bytes]
    with path.open("wb") as file:
        _allow_holes(file.fileno())
        file.write(header)
        n_first = min(source.n_bytes, len(header) + _TRIAL_BYTES)
        file.truncate(n_first)
        file.flush()
        os.fsync(file.fileno())
        # A file system without holes fills what is skipped, which must not become the disk.
        n_hole = n_first - len(header)
        if n_hole > 2 * _MIB and _disk_bytes(path, file.fileno()) > n_first - n_hole // 2:
            raise EngineError("the file system for temporary files cannot leave holes in files")
        file.truncate(source.n_bytes)


def _disk_bytes(path: Path, fd: int) -> int:
    if sys.platform == "win32":
        high = ctypes.c_ulong()
        low = ctypes.windll.kernel32.GetCompressedFileSizeW(str(path), ctypes.byref(high))
        return int((high.value << 32) + (low & 0xFFFFFFFF))
    return os.fstat(fd).st_blocks * 512


def _allow_holes(fd: int) -> None:
    """NTFS leaves holes only in files that are marked for it."""
    if sys.platform == "win32":
        import msvcrt

        handle = ctypes.c_void_p(msvcrt.get_osfhandle(fd))
        n_returned = ctypes.c_ulong()
        ctypes.windll.kernel32.DeviceIoControl(
            handle, 0x000900C4, None, 0, None, 0, ctypes.byref(n_returned), None
        )

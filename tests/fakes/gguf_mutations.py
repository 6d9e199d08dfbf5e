"""Broken copies of a header, and what must hold for every header that the reader accepts."""

from __future__ import annotations

import random
import struct

from llmrun.gguf.ggml_types import TENSOR_TYPES
from llmrun.gguf.header import (
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_KEPT_STRING_BYTES,
    MAX_KEPT_VALUES,
    MAX_KV,
    MAX_TENSORS,
)
from llmrun.gguf.types import ArrayValue, Header

EDGES_U64 = [0, 1, 7, 8, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63]
EDGES_U64 += [2**63 - 1, 2**64 - 1, 2**64 - 8, 2**64 - 32]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A copy with one to four faults: bits, bytes, edge numbers, cuts, moved or doubled pieces.

    Half of the faults hit the first 4 KiB or the last 24 KiB, where a real header has its counts,
    keys and tensors; most of what lies between is vocabulary.
    """
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if not out:
            break
        _mutate_once(out, rng)
    return bytes(out)


def _position(n: int, rng: random.Random) -> int:
    where = rng.random()
    if where < 0.25:
        return rng.randrange(min(n, 4096))
    if where < 0.5:
        return rng.randrange(max(0, n - 24 * 1024), n)
    return rng.randrange(n)


def _mutate_once(out: bytearray, rng: random.Random) -> None:
    at = _position(len(out), rng)
    kind = rng.randrange(9)
    if kind <= 1:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        out[at] = rng.choice((0, 1, 4, 8, 9, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 3:
        out[at : at + 8] = struct.pack("<Q", rng.choice(EDGES_U64))[: len(out) - at]
    elif kind == 4:
        out[at : at + 4] = struct.pack("<I", rng.choice(EDGES_U64) & 0xFFFFFFFF)[: len(out) - at]
    elif kind == 5:
        del out[at:]
    elif kind == 6:
        del out[at : at + rng.randrange(1, 64)]
    elif kind == 7:
        out[at:at] = rng.randbytes(rng.randrange(1, 64))
    else:
        start = _position(len(out), rng)
        out[at:at] = out[start : start + rng.randrange(1, 256)]


def check_invariants(header: Header, n_file_bytes: int) -> None:
    """Assert the promises of `read_header` anew, without its code."""
    assert header.version in (2, 3)
    assert len(header.metadata) <= MAX_KV
    assert len(header.tensors) <= MAX_TENSORS
    assert 24 <= header.n_header_bytes <= min(n_file_bytes, MAX_HEADER_BYTES)
    alignment = header.metadata.get("general.alignment", 32)
    assert isinstance(alignment, int) and alignment in [1 << i for i in range(21)]
    assert alignment <= MAX_ALIGNMENT
    assert header.n_header_bytes <= header.data_offset < header.n_header_bytes + alignment
    assert header.data_offset % alignment == 0
    for key, value in header.metadata.items():
        assert key.isprintable() and 1 <= len(key.encode()) <= 1024
        if isinstance(value, ArrayValue):
            assert value.values is None or len(value.values) == value.n_values <= MAX_KEPT_VALUES
        elif isinstance(value, str):
            assert len(value) <= MAX_KEPT_STRING_BYTES
        else:
            assert isinstance(value, int | float)
        if key.endswith(".block_count"):
            assert isinstance(value, int) and value <= 512
    end = 0
    names = set()
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        names.add(tensor.name)
        assert tensor.name.isprintable() and len(tensor.name.encode()) < 64
        kind = TENSOR_TYPES[tensor.type_id]
        assert len(tensor.shape) <= MAX_DIMS and all(n >= 1 for n in tensor.shape)
        assert (tensor.shape[0] if tensor.shape else 1) % kind.block_elements == 0
        assert tensor.n_elements < 2**63
        assert tensor.n_bytes * kind.block_elements == tensor.n_elements * kind.block_bytes
        assert tensor.offset % alignment == 0
        assert tensor.offset >= end
        end = tensor.offset + tensor.n_bytes
    assert len(names) == len(header.tensors)
    if header.tensors:
        assert header.data_offset + end <= n_file_bytes
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    scores = header.metadata.get("tokenizer.ggml.scores")
    if isinstance(tokens, ArrayValue) and isinstance(scores, ArrayValue):
        assert tokens.type_name == "string" and scores.type_name == "float32"
        assert scores.n_values >= tokens.n_values

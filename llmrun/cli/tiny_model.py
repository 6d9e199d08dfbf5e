"""The header of the smallest model that llama.cpp accepts, for trying its allocator."""

from __future__ import annotations

import struct

_N_EMBD, _N_VOCAB, _ALIGNMENT = 64, 32, 32
_U32, _F32, _STRING = 4, 6, 8  # GGUF's value types
_SQUARE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def tiny_header() -> tuple[bytes, int]:
    """The header of a llama of one layer without a vocabulary, and the size of its whole file."""
    pairs = [
        _pair("general.architecture", _STRING, _text("llama")),
        _pair("tokenizer.ggml.model", _STRING, _text("none")),
        _pair("llama.attention.layer_norm_rms_epsilon", _F32, struct.pack("<f", 1e-5)),
    ]
    numbers = {
        "vocab_size": _N_VOCAB,
        "context_length": 512,
        "embedding_length": _N_EMBD,
        "block_count": 1,
        "feed_forward_length": _N_EMBD,
        "attention.head_count": 2,
    }
    for key, number in numbers.items():
        pairs.append(_pair(f"llama.{key}", _U32, struct.pack("<I", number)))
    shapes = {"token_embd": (_N_EMBD, _N_VOCAB), "output_norm": (_N_EMBD,)}
    shapes |= {f"blk.0.{name}": (_N_EMBD,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.{name}": (_N_EMBD, _N_EMBD) for name in _SQUARE}
    tensors, offset = b"", 0
    for name, shape in shapes.items():
        tensors += _text(f"{name}.weight") + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        tensors += struct.pack("<IQ", 0, offset)  # type F32
        n_values = shape[0] * (shape[1] if len(shape) > 1 else 1)
        offset += 4 * n_values  # every tensor here is a whole number of alignments
    counts = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(pairs))
    header = counts + b"".join(pairs) + tensors
    header += bytes(-len(header) % _ALIGNMENT)
    return header, len(header) + offset


def _pair(key: str, value_type: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", value_type) + value


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw

"""One broken file per attack shape: a typed error, few bytes read, little memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest

from llmrun.errors import GgufError
from llmrun.gguf.header import MAX_HEADER_BYTES, MIB, BytesSource, read_header
from llmrun.gguf.info import build_info
from tests.fakes.gguf_builder import (
    GgufBuilder,
    pack_array,
    pack_string,
    tiny_llama_builder,
)

U64_MAX = 2**64 - 1
STRING, ARRAY = 8, 9


class CountingSource:
    """Counts what is asked for; behind `data` lie zeros up to `n_bytes`."""

    def __init__(self, data: bytes, n_bytes: int | None = None) -> None:
        self._data = data
        self.n_bytes = len(data) if n_bytes is None else n_bytes
        self.asked: list[tuple[int, int]] = []

    def read(self, offset: int, n_bytes: int) -> bytes:
        self.asked.append((offset, n_bytes))
        n_there = max(0, min(n_bytes, self.n_bytes - offset))
        return self._data[offset : offset + n_there].ljust(n_there, b"\0")


def set_counts(n_kv: int | None = None, n_tensors: int | None = None) -> GgufBuilder:
    builder = tiny_llama_builder()
    builder.n_kv, builder.n_tensors = n_kv, n_tensors
    return builder


def with_length(length: int) -> bytes:
    return struct.pack("<Q", length)


def raw(key: str | bytes, type_id: int, payload: bytes) -> GgufBuilder:
    return GgufBuilder().add_raw(key, type_id, payload)


def array_head(type_id: int, n: int) -> bytes:
    return struct.pack("<IQ", type_id, n)


def pair(key: str, value: object, type_name: str | None = None) -> GgufBuilder:
    return GgufBuilder().add(key, value, type_name)


def tensor(*args: object, **kwargs: object) -> GgufBuilder:
    return GgufBuilder().tensor(*args, **kwargs)  # type: ignore[arg-type]


def raw_tensor(shape: list[int], type_id: int = 0, offset: int = 0) -> GgufBuilder:
    """A tensor description alone; no data is written for it."""
    return GgufBuilder().tensor("t", shape, type_id, offset=offset)


def vocabulary(tokens: list[str | bytes], types: list[int] | None = None) -> GgufBuilder:
    builder = GgufBuilder().add("tokenizer.ggml.tokens", tokens, None)
    if types is not None:
        builder.add("tokenizer.ggml.token_type", types)
    return builder


def broken_start(magic: bytes = b"GGUF", version: int = 3) -> GgufBuilder:
    builder = tiny_llama_builder()
    builder.magic, builder.version = magic, version
    return builder


# name -> (file, what the error must say)
ATTACKS: dict[str, tuple[Callable[[], GgufBuilder], str]] = {
    # The start of the file.
    "wrong magic": (lambda: broken_start(b"\x7fELF"), "does not start with GGUF"),
    "zip": (lambda: broken_start(b"PK\x03\x04"), "zip archive"),
    "version 0": (lambda: broken_start(version=0), "version is 0"),
    "version 1": (lambda: broken_start(version=1), "version is 1"),
    "version 4": (lambda: broken_start(version=4), "version is 4"),
    "big-endian": (lambda: broken_start(version=3 << 24), "big-endian"),
    # Counts (CVE-2024-21802, -23605, CVE-2025-53630, CVE-2026-27940).
    "n_kv max": (lambda: set_counts(n_kv=U64_MAX), "metadata values; at most"),
    "n_kv times its size overflows": (lambda: set_counts(n_kv=2**60), "metadata values; at most"),
    "n_kv one too many": (lambda: set_counts(n_kv=4097), "metadata values; at most"),
    "n_kv more than the file holds": (
        lambda: _counted(4000),
        "metadata values, more than its size",
    ),
    "n_tensors max": (lambda: set_counts(n_tensors=U64_MAX), "tensors; at most"),
    "n_tensors negative": (lambda: set_counts(n_tensors=2**63), "tensors; at most"),
    "n_tensors one too many": (lambda: set_counts(n_tensors=100_001), "tensors; at most"),
    "n_tensors more than the file holds": (
        lambda: set_counts(n_tensors=99_999),
        "tensors, more than its size",
    ),
    # Keys and strings (CVE-2024-23605, CVE-2025-66960).
    "key length max": (lambda: raw_pair(with_length(U64_MAX)), "bytes; 1 to 1024"),
    "key length beyond the bound": (lambda: raw_pair(with_length(1025)), "bytes; 1 to 1024"),
    "key empty": (lambda: pair("", 1), "has 0 bytes"),
    "key beyond the file": (lambda: raw_pair(with_length(1000) + b"abc"), "it ends at byte"),
    "key not UTF-8": (lambda: _key(b"a\xff"), "not valid UTF-8"),
    "key with an escape": (lambda: _key(b"a\x1b[2Jb"), "control characters"),
    "key with a zero byte": (lambda: _key(b"general.name\0x"), "control characters"),
    "key twice": (lambda: pair("a", 1).add("a", 2), "there twice"),
    "key twice, other type": (
        lambda: pair("general.architecture", 1),
        "'general.architecture' is there twice",
    ),
    "string length max": (lambda: raw("k", STRING, with_length(U64_MAX)), "at most 16777216"),
    "string length plus one wraps": (
        lambda: raw("k", STRING, with_length(U64_MAX - 7)),
        "at most 16777216",
    ),
    "string beyond the file": (
        lambda: raw("k", STRING, with_length(1000) + b"short"),
        "it ends at byte",
    ),
    "string one byte short": (lambda: raw("k", STRING, with_length(4) + b"abc"), "it ends at byte"),
    # Value types.
    "unknown value type": (lambda: raw("k", 13, b"\0" * 64), "unknown type 13"),
    "value type max": (lambda: raw("k", 2**32 - 1, b"\0" * 64), "unknown type"),
    "bool two": (lambda: raw("k", 7, b"\2"), "neither true nor false"),
    "bool array with a two": (
        lambda: raw("k", ARRAY, array_head(7, 3) + b"\1\2\0"),
        "neither true nor false",
    ),
    # Arrays (CVE-2024-21802).
    "array count max": (lambda: raw("k", ARRAY, array_head(4, U64_MAX)), "elements; at most"),
    "array count times its size wraps": (
        lambda: raw("k", ARRAY, array_head(10, 2**61)),
        "elements; at most",
    ),
    "array count beyond the bound": (
        lambda: raw("k", ARRAY, array_head(0, MIB + 1)),
        "elements; at most",
    ),
    "array beyond the file": (lambda: raw("k", ARRAY, array_head(4, 1000)), "it ends at byte"),
    "strings beyond the file": (
        lambda: raw("k", ARRAY, array_head(STRING, MIB)),
        "more than the file can hold",
    ),
    "array string beyond the file": (
        lambda: raw("k", ARRAY, array_head(STRING, 2) + pack_string("a") + with_length(99)),
        "it ends at byte",
    ),
    "array string length max": (
        lambda: raw("k", ARRAY, array_head(STRING, 1) + with_length(U64_MAX)),
        "holds a string of",
    ),
    "array of arrays": (
        lambda: raw("k", ARRAY, array_head(ARRAY, 1) + pack_array("int32", [1])),
        "array of arrays",
    ),
    "array of an unknown type": (lambda: raw("k", ARRAY, array_head(77, 1) + b"\0" * 8), "type 77"),
    "array head cut": (lambda: raw("k", ARRAY, b"\4\0\0\0"), "it ends at byte"),
    # Vocabulary (CVE-2025-49847; int8 scores; PLaMo-2's byte token).
    "token longer than int32": (
        lambda: raw("tokenizer.ggml.tokens", ARRAY, array_head(STRING, 1) + with_length(2**31)),
        "holds a string of 2147483648",
    ),
    "tokens not strings": (lambda: pair("tokenizer.ggml.tokens", [1, 2]), "not an array of string"),
    "tokens no array": (lambda: pair("tokenizer.ggml.tokens", "a"), "not an array of string"),
    "merges not strings": (lambda: pair("tokenizer.ggml.merges", [1]), "not an array of string"),
    "scores int8": (
        lambda: pair("tokenizer.ggml.scores", [1, 2], "int8"),
        "scores is not an array of float32",
    ),
    "scores float64": (
        lambda: pair("tokenizer.ggml.scores", [1.0], "float64"),
        "scores is not an array of float32",
    ),
    "scores shorter than tokens": (
        lambda: vocabulary(["a", "b"]).add("tokenizer.ggml.scores", [1.0]),
        "scores is shorter",
    ),
    "token types int8": (
        lambda: pair("tokenizer.ggml.token_type", [1], "int8"),
        "token_type is not an array of int32",
    ),
    "token types shorter than tokens": (lambda: vocabulary(["a", "b"], [1]), "type is shorter"),
    "byte token <0x-1>": (lambda: vocabulary(["a", "<0x-1>"]), "two hex digits"),
    "byte token <0xG0>": (lambda: vocabulary(["<0xG0>", "b"], [6, 1]), "two hex digits"),
    "byte token of another form": (lambda: vocabulary(["a", "<"], [1, 6]), "byte token 1"),
    "byte token too long": (lambda: vocabulary(["<0x123456789>"], [6]), "byte token 0"),
    "byte token empty": (lambda: vocabulary(["a", ""], [1, 6]), "byte token 1"),
    # Alignment.
    "alignment 0x80000000": (lambda: pair("general.alignment", 2**31), "power of two up to 1 MiB"),
    "alignment 0": (lambda: pair("general.alignment", 0), "power of two"),
    "alignment 48": (lambda: pair("general.alignment", 48), "power of two"),
    "alignment uint64": (lambda: pair("general.alignment", 32, "uint64"), "must be uint32"),
    "alignment int32": (lambda: pair("general.alignment", -32, "int32"), "must be uint32"),
    "alignment bool": (lambda: pair("general.alignment", True), "must be uint32"),
    "alignment string": (lambda: pair("general.alignment", "32"), "not a uint32"),
    "alignment array": (lambda: pair("general.alignment", [32]), "not a uint32"),
    # Numbers that llama.cpp indexes with or asserts on.
    "block_count 513": (lambda: pair("llama.block_count", 513), "from 1 to 512"),
    "block_count 0": (lambda: pair("llama.block_count", 0), "from 1 to 512"),
    "block_count negative": (lambda: pair("llama.block_count", -1, "int32"), "from 1 to 512"),
    "block_count string": (lambda: pair("llama.block_count", "2"), "from 1 to 512"),
    "block_count array": (lambda: pair("llama.block_count", [2]), "from 1 to 512"),
    "block_count before its architecture": (
        lambda: _reversed(pair("llama.block_count", 0)),
        "from 1 to 512",
    ),
    "projector's block_count": (
        lambda: GgufBuilder("clip").add("clip.vision.block_count", 2**31),
        "clip.vision.block_count",
    ),
    "too many experts": (lambda: pair("llama.expert_count", 1025), "at most 1024"),
    "experts never used": (lambda: pair("llama.expert_count", 8), "uses 0 of 8"),
    "more experts used than there are": (
        lambda: pair("llama.expert_count", 8).add("llama.expert_used_count", [8, 9]),
        "uses 9 of 8",
    ),
    "more drafting blocks than blocks": (
        lambda: pair("llama.block_count", 2).add("llama.nextn_predict_layers", 3),
        "3 of its 2 blocks",
    ),
    "heads that wrap with their size": (
        lambda: pair("llama.attention.head_count_kv", 2**28 + 2),
        "head_count_kv is more than 8192",
    ),
    "heads of a layer that wrap": (
        lambda: pair("llama.attention.head_count", [4, 2**30]),
        "head_count is more than 8192",
    ),
    "head size that wraps": (
        lambda: pair("llama.attention.key_length_swa", 2**31),
        "key_length_swa is more than 65536",
    ),
    "matrix of integers": (
        lambda: tensor("blk.0.ffn_down.weight", [32, 2], 26),
        "stored as I32",
    ),
    "embeddings of integers": (lambda: tensor("token_embd.weight", [8, 8], 26), "stored as I32"),
    "intermediate format": (lambda: tensor("t", [32], 9), "stored as Q8_1"),
    "norm not F32": (lambda: tensor("blk.0.attn_norm.weight", [32], 1), "must be F32"),
    "epsilon negative": (
        lambda: pair("llama.attention.layer_norm_rms_epsilon", -1.0),
        "zero or more",
    ),
    "epsilon NaN": (
        lambda: pair("llama.attention.layer_norm_rms_epsilon", float("nan")),
        "zero or more",
    ),
    "architecture not a string": (
        lambda: GgufBuilder(None).add("general.architecture", 7),
        "not a plain name",
    ),
    "architecture with an escape": (lambda: GgufBuilder("llama\x1b]52;"), "not a plain name"),
    "architecture far too long": (lambda: GgufBuilder("a" * (2 * MIB)), "too long"),
    "template not a string": (lambda: pair("tokenizer.chat_template", 1), "not a string"),
    "template far too long": (lambda: pair("tokenizer.chat_template", "x" * (2 * MIB)), "too long"),
    # Tensors (CVE-2024-21802, CVE-2026-33298 and its padding variant, CVE-2026-7482).
    "five dimensions": (lambda: raw_tensor([1] * 5), "5 dimensions"),
    "dimension count max": (lambda: tensor("t", [1], n_dims=2**32 - 1), "dimensions; at most"),
    "dimension zero": (lambda: raw_tensor([32, 0, 32]), "impossible shape"),
    "dimension negative": (lambda: raw_tensor([U64_MAX]), "impossible shape"),
    "dimensions overflow": (lambda: raw_tensor([2**32, 2**31]), "impossible shape"),
    "dimensions wrap to a small product": (lambda: raw_tensor([2**32, 2**32]), "impossible shape"),
    "bytes overflow": (lambda: raw_tensor([2**61], 0), "impossible offset"),
    "bytes overflow with padding": (lambda: raw_tensor([2**63 - 1], 24), "impossible offset"),
    "offset max": (lambda: raw_tensor([32], 0, U64_MAX - 31), "impossible offset"),
    "offset plus size wraps": (lambda: raw_tensor([32], 0, 2**64 - 128), "impossible offset"),
    "offset beyond the file": (lambda: raw_tensor([32], 0, 2**40), "tensors end at byte"),
    "tensor one byte longer than the file": (
        lambda: tensor("t", [32], 0),
        "tensors end at byte",
    ),
    "offset not aligned": (lambda: raw_tensor([32], 0, 16), "not a multiple of 32"),
    "tensors overlap": (
        lambda: tensor("a", [64]).tensor("b", [8], offset=128),
        "tensor 'b' overlaps",
    ),
    "tensors at one place": (lambda: tensor("a", [64]).tensor("b", [8], offset=0), "overlaps"),
    "tensors overlap in reverse order": (
        lambda: tensor("b", [8], offset=96).tensor("a", [64]),
        "overlaps",
    ),
    "unknown tensor type": (lambda: raw_tensor([32], 43), "unknown type 43"),
    "tensor type max": (lambda: raw_tensor([32], 2**32 - 1), "unknown type"),
    "removed tensor type": (lambda: raw_tensor([32], 31), "Q4_0_4_4"),
    "rows of broken blocks": (lambda: raw_tensor([33, 32], 2), "not whole blocks of Q4_0"),
    "no dimensions but blocks": (lambda: raw_tensor([], 2), "not whole blocks of Q4_0"),
    "tensor name twice": (lambda: tensor("a", [8]).tensor("a", [8]), "there twice"),
    "tensor name too long": (lambda: tensor("x" * 64, [8]), "64 bytes; 1 to 63"),
    "tensor name empty": (lambda: tensor("", [8]), "0 bytes; 1 to 63"),
    "tensor name not UTF-8": (lambda: tensor(b"\xc3\x28", [8]), "not valid UTF-8"),
    "tensor name with an escape": (lambda: tensor("a\x1b]8;;x", [8]), "control characters"),
}


def _counted(n_kv: int) -> GgufBuilder:
    builder = GgufBuilder()
    builder.n_kv = n_kv
    return builder


def _key(key: bytes) -> GgufBuilder:
    return GgufBuilder().add(key, 1)


def _reversed(builder: GgufBuilder) -> GgufBuilder:
    builder.pairs.reverse()
    return builder


def raw_pair(data: bytes) -> GgufBuilder:
    builder = GgufBuilder()
    builder.pairs.append(data)
    return builder


def attack_bytes(name: str) -> tuple[bytes, str]:
    """The file, ending where its last field ends unless it has data, and what is wrong with it."""
    make, expected = ATTACKS[name]
    builder = make()
    data = builder.build() if builder.data else builder.header()
    return (data[:-1] if name == "tensor one byte longer than the file" else data), expected


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused(name: str) -> None:
    data, expected = attack_bytes(name)
    source = CountingSource(data)
    tracemalloc.start()
    try:
        with pytest.raises(GgufError) as caught:
            read_header(source, name="evil\x1b[2J.gguf")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    error = caught.value
    assert expected in str(error.why)
    assert error.exit_code == 7
    assert error.hint
    assert error.message.isprintable() and str(error.why).isprintable()
    assert len(str(error.why)) < 500
    assert sum(n_bytes for _, n_bytes in source.asked) <= source.n_bytes
    # The file's bytes once more, and the small things made while walking.
    assert peak < 2 * source.n_bytes + MIB


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_within_a_huge_remote_file(name: str) -> None:
    """The same bytes claimed to be the start of 1 TB: never more than the last window is read."""
    source = CountingSource(attack_bytes(name)[0], 10**12)
    try:
        header = read_header(source)
    except GgufError:
        pass
    else:
        # Some shapes are only wrong because their file is too short.
        assert header.data_offset <= MAX_HEADER_BYTES
    assert sum(n_bytes for _, n_bytes in source.asked) <= MAX_HEADER_BYTES
    assert len(source.asked) <= 13  # from 16 KiB, doubled each time, to 64 MiB
    end = 0
    for offset, n_bytes in source.asked:
        assert offset == end
        end += n_bytes


@pytest.mark.parametrize("n_bytes", [0, 1, 4, 23])
def test_file_too_small_for_a_header(n_bytes: int) -> None:
    with pytest.raises(GgufError, match="usable") as caught:
        read_header(BytesSource(b"GGUF\3".ljust(n_bytes, b"\0")[:n_bytes]))
    assert f"only {n_bytes} bytes" in str(caught.value.why)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (struct.pack("<Q", 90) + b'{"__metadata__":{"format":"pt"}}', "safetensors"),
        (b"tjgg" + bytes(40), "older than GGUF"),
    ],
)
def test_other_kinds_of_file_are_named(start: bytes, what: str) -> None:
    with pytest.raises(GgufError) as caught:
        read_header(BytesSource(start))
    assert what in str(caught.value.why)


def test_header_over_the_last_window_is_refused() -> None:
    """Every value within its own bound, but too many of them: no more than 64 MiB is asked for."""
    builder = GgufBuilder()
    for i in range(9):
        builder.add_raw(f"k{i}", ARRAY, array_head(10, MIB) + bytes(8 * MIB))
    source = CountingSource(builder.header(), 10**10)
    with pytest.raises(GgufError, match="usable") as caught:
        read_header(source)
    assert "larger than 64 MiB" in str(caught.value.why)
    assert sum(n_bytes for _, n_bytes in source.asked) == 64 * MIB


def test_source_that_gives_less_than_it_promised() -> None:
    data = tiny_llama_builder().build()
    with pytest.raises(GgufError) as caught:
        read_header(BytesSource(data[:500], n_bytes=len(data)))
    assert "it ends at byte 500" in str(caught.value.why)


def test_source_that_gives_more_than_asked() -> None:
    class Generous(BytesSource):
        def read(self, offset: int, n_bytes: int) -> bytes:
            return super().read(offset, n_bytes) + bytes(100)

    data = tiny_llama_builder().build()
    assert read_header(Generous(data)) == read_header(BytesSource(data))


def test_what_is_kept_of_hostile_metadata_is_bounded() -> None:
    """Many arrays and strings just under the limits of one: their sum has limits as well."""
    builder = GgufBuilder()
    for i in range(400):
        builder.add_raw(f"a{i}", ARRAY, array_head(4, 4096) + b"\xff" * 4 * 4096)
    for i in range(20):
        builder.add(f"s{i}", b"x" * (MIB - 4) + "\U0001f600".encode())
    data = builder.build()
    tracemalloc.start()
    try:
        header = read_header(BytesSource(data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(header.metadata) == 421
    kept = [v for v in header.metadata.values() if isinstance(v, str) or v.values is not None]
    assert 50 < len(kept) < 100
    # Two copies of the bytes while the window grows, 4 bytes a kept character, kept numbers.
    assert peak < 2 * len(data) + 4 * 8 * MIB + 12 * MIB


def test_a_projector_passes_through_the_same_reader() -> None:
    builder = GgufBuilder("clip").add("general.type", "mmproj")
    builder.add("clip.vision.block_count", 2).tensor("v.blk.0.attn_q.weight", (32, 0))
    with pytest.raises(GgufError):
        read_header(BytesSource(builder.build()))


def test_tokens_that_are_there_twice() -> None:
    """Found by the thorough check; tokens without text do not count as the same."""
    for tokens in (["a", "", "b", "a"], ["a", "a\0b"]):
        data = vocabulary(tokens).build()
        assert read_header(BytesSource(data)).tensors == ()
        with pytest.raises(GgufError) as caught:
            read_header(BytesSource(data), thorough=True)
        assert "token twice" in str(caught.value.why)
    read_header(BytesSource(vocabulary(["a", "", "b", ""]).build()), thorough=True)


def test_integer_tensors_that_are_no_matrices_are_fine() -> None:
    read_header(BytesSource(tensor("blk.0.ffn_gate_tid2eid.weight", [8, 8], 26).build()))


def test_names_with_terminal_sequences_are_made_visible() -> None:
    builder = tiny_llama_builder(name="\x1b]8;;http://evil\x07click\x1b]52;c;ZXZpbA==\x07")
    header = read_header(BytesSource(builder.build()))
    info = build_info([header], 1)
    assert info.name is not None and info.name.isprintable()
    assert "\\x1b]52" in info.name

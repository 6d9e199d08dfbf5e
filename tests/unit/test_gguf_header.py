from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.errors import DamagedFileError, GgufError, LlmrunError, NotFoundError
from llmrun.gguf.header import FIRST_WINDOW_BYTES, MIB, BytesSource, FileSource, read_header
from llmrun.gguf.types import ArrayValue, Header
from tests.fakes import models
from tests.fakes.gguf_builder import (
    CHATML,
    VALUE_TYPES,
    GgufBuilder,
    tiny_llama,
    tiny_llama_builder,
)
from tests.fakes.gguf_mutations import check_invariants


def read_bytes(data: bytes, **options: bool) -> Header:
    return read_header(BytesSource(data), **options)


def test_every_value_type() -> None:
    values = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "float32": 0.5,
        "bool": True,
        "string": "é \U0001f600",
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float64": 1e300,
    }
    assert set(values) == set(VALUE_TYPES) - {"array"}
    builder = GgufBuilder()
    for name, value in values.items():
        builder.add(f"one.{name}", value, name)
        builder.add(f"many.{name}", [value, value], name)
        builder.add(f"none.{name}", [], name)
    metadata = read_bytes(builder.build()).metadata
    for name, value in values.items():
        assert metadata[f"one.{name}"] == value
        assert type(metadata[f"one.{name}"]) is type(value)
        assert metadata[f"many.{name}"] == ArrayValue(name, 2, (value, value))
        assert metadata[f"none.{name}"] == ArrayValue(name, 0, ())


def test_tensors_and_layout() -> None:
    builder = GgufBuilder(alignment=64).add("general.alignment", 64)
    builder.tensor("a", (256, 3), 12).tensor("b", (), 0).tensor("c", (2, 3, 4, 5), 1)
    data = builder.build()
    header = read_bytes(data)
    assert [(t.name, t.shape, t.type_name, t.offset, t.n_bytes) for t in header.tensors] == [
        ("a", (256, 3), "Q4_K", 0, 432),
        ("b", (), "F32", 448, 4),
        ("c", (2, 3, 4, 5), "F16", 512, 240),
    ]
    assert [t.n_elements for t in header.tensors] == [768, 1, 120]
    assert header.n_header_bytes == len(builder.header())
    assert header.data_offset % 64 == 0
    assert len(data) - header.data_offset >= 752


def test_version_2_and_files_without_tensors() -> None:
    builder = GgufBuilder()
    builder.version = 2
    header = read_bytes(builder.header())
    assert (header.version, header.tensors) == (2, ())


def test_the_last_tensor_needs_no_padding() -> None:
    builder = GgufBuilder().tensor("a", (3,))
    data = builder.build()
    header = read_bytes(data)
    n_needed = header.data_offset + 12
    assert read_bytes(data[:n_needed]) == header
    with pytest.raises(GgufError):
        read_bytes(data[: n_needed - 1])


def test_a_part_of_a_file_is_read_when_told_so() -> None:
    builder = tiny_llama_builder()
    part = builder.header()
    with pytest.raises(GgufError, match="usable"):
        read_bytes(part)
    header = read_bytes(part, whole_file=False)
    assert header == read_bytes(builder.build())
    assert header == read_header(BytesSource(part, n_bytes=len(builder.build())))


def test_tensors_may_stand_in_any_order() -> None:
    builder = GgufBuilder().tensor("late", (8,), offset=32).tensor("early", (8,))
    builder.data.append((32, 32))
    header = read_bytes(builder.build())
    assert [tensor.name for tensor in header.tensors] == ["late", "early"]


def test_strings_that_are_no_utf8_are_replaced() -> None:
    builder = GgufBuilder().add("general.name", b"a\xffb").add("l", [b"\xff"])
    metadata = read_bytes(builder.build()).metadata
    assert metadata["general.name"] == "a\ufffdb"
    assert metadata["l"] == ArrayValue("string", 1, ("\ufffd",))


def test_what_is_long_is_counted_but_not_kept() -> None:
    builder = GgufBuilder()
    builder.add("kept", list(range(4096))).add("counted", list(range(4097)))
    builder.add("words", ["w"] * 4097).add("text", "x" * (1024 * 1024 + 1))
    builder.add("after", 7)
    metadata = read_bytes(builder.build()).metadata
    kept = metadata["kept"]
    assert isinstance(kept, ArrayValue) and kept.values == tuple(range(4096))
    assert metadata["counted"] == ArrayValue("int32", 4097, None)
    assert metadata["words"] == ArrayValue("string", 4097, None)
    assert metadata["text"] == ArrayValue("char", 1024 * 1024 + 1, None)
    assert metadata["after"] == 7


class Counting(BytesSource):
    def __init__(self, data: bytes, n_bytes: int | None = None) -> None:
        super().__init__(data, n_bytes)
        self.asked: list[tuple[int, int]] = []

    def read(self, offset: int, n_bytes: int) -> bytes:
        self.asked.append((offset, n_bytes))
        return super().read(offset, n_bytes)

    def check(self, n_header_bytes: int, n_reads: int) -> None:
        """Few reads, one behind the other, that bring no more than twice the header."""
        assert len(self.asked) <= n_reads
        end = 0
        for offset, n_bytes in self.asked:
            assert offset == end and n_bytes > 0
            end += n_bytes
        assert end <= max(2 * n_header_bytes, FIRST_WINDOW_BYTES)


def test_a_large_header_is_read_in_few_growing_reads() -> None:
    """A vocabulary as large as Gemma 4's: it asks for more as needed, and for nothing twice."""
    builder = GgufBuilder("gemma4").add("gemma4.block_count", 30)
    builder.add("tokenizer.ggml.tokens", [f"token{i}" for i in range(262_144)])
    builder.add("tokenizer.ggml.scores", [0.0] * 262_144)
    builder.add("tokenizer.ggml.token_type", [1] * 262_144)
    builder.add("tokenizer.ggml.merges", [f"merge {i}" for i in range(514_906)])
    data = builder.tensor("token_embd.weight", (32, 262_144), 2, b"").header()
    assert len(data) > 15_000_000
    source = Counting(data.ljust(64 * MIB, b"\0"), 10**9)
    header = read_header(source)
    source.check(header.n_header_bytes, 4)
    assert header.metadata["tokenizer.ggml.merges"] == ArrayValue("string", 514_906, None)


@pytest.mark.parametrize("n_tensors", [0, 100, 270, 300, 5000])
@pytest.mark.parametrize("n_text_bytes", [10, 20_000, 40_000, 1_785_000])
def test_no_more_than_twice_a_header_is_read(n_text_bytes: int, n_tensors: int) -> None:
    builder = GgufBuilder().add("tokenizer.chat_template", "x" * min(n_text_bytes, 900_000))
    builder.add("words", ["w" * 10] * (n_text_bytes // 18))
    for i in range(n_tensors):
        builder.tensor(f"blk.{i}.weight", (32,), 0, b"")
    source = Counting(builder.header().ljust(8 * MIB, b"\0"), 10**9)
    source.check(read_header(source).n_header_bytes, 6)


@pytest.mark.parametrize("window", [FIRST_WINDOW_BYTES, MIB, 8 * MIB])
@pytest.mark.parametrize("cut", [-9, -8, -1, 0, 1, 7, 8])
def test_growth_at_every_edge_of_a_string(cut: int, window: int) -> None:
    """A window ends within or just beside a string's length or its text."""
    builder = GgufBuilder()
    head = len(builder.header()) + 8 + 3 + 4 + 4 + 8  # the key `pad`, its types and its count
    builder.add("pad", [b"p" * (window - head - 8 + cut), "between", "end"])
    builder.add("after", "x")
    data = builder.build()
    assert len(data) > window
    assert read_bytes(data).metadata["after"] == "x"


def test_agrees_with_the_reference_reader_on_a_real_file() -> None:
    # The reference takes seconds a file; Gemma 3 is compared with llama.cpp's own parser.
    assert_agrees(models.smollm2_path())


@pytest.mark.parametrize("file_type", [0, 1, 2, 7])
def test_agrees_with_the_reference_reader_on_built_files(tmp_path: Path, file_type: int) -> None:
    assert_agrees(tiny_llama(tmp_path / "m.gguf", chat_template=CHATML, file_type=file_type))


def assert_agrees(path: Path) -> None:
    import gguf

    with FileSource(path) as source:
        header = read_header(source, name=path.name, thorough=True)
    check_invariants(header, path.stat().st_size)
    reference = gguf.GGUFReader(path)
    assert header.data_offset == reference.data_offset
    fields = {key: f for key, f in reference.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, field in fields.items():
        value = header.metadata[key]
        if not isinstance(value, ArrayValue):
            assert value == field.contents(), key
            continue
        assert value.n_values == len(field.data)
        assert value.type_name.upper() == field.types[-1].name
        assert (value.values is None) == (value.n_values > 4096)
        if value.values is not None:
            assert list(value.values) == field.contents()
    assert len(header.tensors) == len(reference.tensors)
    for ours, theirs in zip(header.tensors, reference.tensors, strict=True):
        assert ours.name == theirs.name
        assert list(ours.shape) == theirs.shape.tolist()
        assert ours.type_name == theirs.tensor_type.name
        assert header.data_offset + ours.offset == theirs.data_offset
        assert (ours.n_elements, ours.n_bytes) == (theirs.n_elements, theirs.n_bytes)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=20),
        st.one_of(
            st.text(max_size=50),
            st.booleans(),
            st.integers(0, 2**32 - 1),
            st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20),
            st.lists(st.text(max_size=9), min_size=1, max_size=20),
        ),
        max_size=10,
    ),
    st.lists(st.lists(st.integers(1, 5), max_size=4), max_size=6),
)
def test_reads_back_what_was_written(pairs: dict[str, object], shapes: list[list[int]]) -> None:
    builder = GgufBuilder()
    for key, value in pairs.items():
        builder.add("x." + key, value)
    for i, shape in enumerate(shapes):
        builder.tensor(f"t{i}", shape)
    header = read_bytes(builder.build())
    for key, value in pairs.items():
        got = header.metadata["x." + key]
        assert (list(got.values or ()) if isinstance(got, ArrayValue) else got) == value
    assert [list(tensor.shape) for tensor in header.tensors] == shapes


class TestFileSource:
    def test_reads_ranges_and_knows_its_size(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        path.write_bytes(bytes(range(100)))
        with FileSource(path) as source:
            assert source.n_bytes == 100
            assert source.read(90, 5) == bytes(range(90, 95))
            assert source.read(0, 3) == b"\0\1\2"
            assert source.read(95, 50) == bytes(range(95, 100))
            assert source.read(100, 1) == b""

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            FileSource(tmp_path / "none.gguf")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DamagedFileError):
            FileSource(tmp_path)

    def test_pipe_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(DamagedFileError):
            FileSource(tmp_path / "pipe")

    def test_impossible_name(self) -> None:
        with pytest.raises(LlmrunError):
            FileSource("a\0b")

    def test_file_that_shrinks_meanwhile(self, tmp_path: Path) -> None:
        path = tiny_llama(tmp_path / "m.gguf")
        with FileSource(path) as source:
            os.truncate(path, 100)
            with pytest.raises(GgufError):
                read_header(source)


def test_numbers_are_little_endian() -> None:
    data = GgufBuilder().add("n", 1).build()
    assert struct.unpack_from("<I", data, 4) == (3,)
    assert read_bytes(data).metadata["n"] == 1

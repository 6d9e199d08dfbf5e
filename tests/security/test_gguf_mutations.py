"""Cut, flipped and stirred headers: a GgufError, or a header that keeps every promise."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.errors import GgufError, LlmrunError
from llmrun.gguf.header import MIB, BytesSource, FileSource, read_header
from llmrun.gguf.info import build_info
from llmrun.gguf.types import Header
from tests.fakes import models
from tests.fakes.gguf_builder import CHATML, GgufBuilder, tiny_llama_builder
from tests.fakes.gguf_mutations import check_invariants, mutate


def small_builder() -> GgufBuilder:
    """A few hundred bytes with every kind of field."""
    builder = GgufBuilder().add("general.alignment", 32).add("llama.block_count", 2)
    builder.add("f", 1.5).add("d", 2.5, "float64").add("b", True).add("q", 7, "uint64")
    builder.add("bools", [True, False]).add("ints", [1, 2, 3]).add("texts", ["a", "", "xyz"])
    builder.add("tokenizer.ggml.tokens", ["<0x00>", "a"])
    builder.add("tokenizer.ggml.token_type", [6, 1]).add("tokenizer.ggml.scores", [0.0, 1.0])
    return builder.tensor("one", (32, 2), 2).tensor("two", (3, 2), 1).tensor("three", ())


SMALL = small_builder().header()
SMALL_FILE = len(small_builder().build())


def outcome(data: bytes, n_file_bytes: int) -> Header | None:
    """The header when it was accepted, and then safe; None when it was refused with GgufError."""
    try:
        header = read_header(BytesSource(data, n_file_bytes))
    except GgufError as error:
        assert error.why
        return None
    check_invariants(header, n_file_bytes)
    try:
        build_info([header], n_file_bytes)
    except LlmrunError as error:
        assert error.exit_code == 7
    return header


def real_header() -> tuple[bytes, int]:
    with FileSource(models.smollm2_path()) as source:
        return source.read(0, read_header(source).data_offset), source.n_bytes


def test_truncation_at_every_byte_of_a_small_header() -> None:
    assert outcome(SMALL, SMALL_FILE) is not None
    for n in range(len(SMALL)):
        # The source ends early, though the file is said to be whole; and the file itself ends.
        assert outcome(SMALL[:n], SMALL_FILE) is None
        assert outcome(SMALL[:n], n) is None


def test_truncation_at_every_4_kib_of_a_real_header() -> None:
    data, n_file_bytes = real_header()
    assert outcome(data, n_file_bytes) is not None
    for n in range(0, len(data), 4096):
        assert outcome(data[:n], n_file_bytes) is None


def test_truncation_of_the_data() -> None:
    data, n_file_bytes = real_header()
    for n in (len(data), n_file_bytes // 2, n_file_bytes - 4096, n_file_bytes - 33):
        assert outcome(data, n) is None


def test_every_bit_of_a_small_header_flipped() -> None:
    accepted = 0
    for i in range(len(SMALL)):
        for bit in (0, 3, 7):
            mutant = bytearray(SMALL)
            mutant[i] ^= 1 << bit
            accepted += outcome(bytes(mutant), SMALL_FILE) is not None
    # Flips in texts and plain numbers do no harm; flips in what gives structure are found.
    assert 0 < accepted < len(SMALL) * 3 * 0.7


@pytest.mark.parametrize("seed", range(4))
def test_stirred_headers(seed: int) -> None:
    rng = random.Random(seed)
    builder = tiny_llama_builder(chat_template=CHATML, n_vocab=356)
    sources = [(SMALL, SMALL_FILE), (builder.header(), len(builder.build()))]
    for _ in range(300):
        data, n_file_bytes = rng.choice(sources)
        mutant = mutate(data, rng)
        outcome(mutant, max(len(mutant), n_file_bytes + len(mutant) - len(data)))


def test_stirred_real_headers_within_bounded_memory() -> None:
    rng = random.Random(11)
    data, n_file_bytes = real_header()
    for _ in range(60):
        mutant = mutate(data, rng)
        source = BytesSource(mutant, max(len(mutant), n_file_bytes))
        tracemalloc.start()
        try:
            read_header(source)
        except GgufError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 2 * len(mutant) + MIB


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_written_anywhere(data: st.DataObject) -> None:
    mutant = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        piece = data.draw(
            st.binary(min_size=1, max_size=8)
            | st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little"))
        )
        mutant[at : at + len(piece)] = piece
    outcome(bytes(mutant), max(len(mutant), SMALL_FILE))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic(tail: bytes) -> None:
    outcome(b"GGUF\3\0\0\0" + tail, len(tail) + 8)

"""Reads the header of a GGUF file from a source that may be hostile.

Layout, little-endian: magic `GGUF`, u32 version, u64 n_tensors, u64 n_kv, the key-value pairs, the
tensor descriptions (name, u32 n_dims, u64 dims, u32 type, u64 offset), padding to
`general.alignment` (32), data. Strings are a u64 length and bytes; arrays a u32 type, a u64 count
and the values.

Every number from the file is checked against what is left before it is used. Time is linear in the
header's size, which is at most 64 MiB; memory is at most about three times what was read
(the `thorough` check holds each token once more, up to a million).
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import NoReturn

from llmrun.errors import GgufError
from llmrun.gguf.checks import find_fault, find_tensor_fault
from llmrun.gguf.ggml_types import (
    ARRAY_TYPE,
    REMOVED_TENSOR_TYPES,
    SCALAR_TYPES,
    STRING_TYPE,
    TENSOR_TYPES,
)
from llmrun.gguf.source import BytesSource as BytesSource
from llmrun.gguf.source import FileSource as FileSource
from llmrun.gguf.types import ArrayValue, ByteSource, Header, MetadataValue, TensorInfo
from llmrun.text import escape_line

MIB = 1024 * 1024
# The start of the file is read first; then, as more is needed, in all twice as much as the header
# has at least by what is known of it. So few reads are needed, each reads on where the last one
# ended, and of a remote file no more comes than twice its header.
FIRST_WINDOW_BYTES = 16 * 1024
MAX_HEADER_BYTES = 64 * MIB
MAX_KV = 4096
MAX_TENSORS = 100_000
MAX_KEY_BYTES = 1024
MAX_STRING_BYTES = 16 * MIB
MAX_ARRAY_VALUES = 1024 * 1024
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME less its terminator
MAX_DIMS = 4
MAX_ALIGNMENT = MIB
DEFAULT_ALIGNMENT = 32
# What is kept of the metadata; the rest is checked and counted.
MAX_KEPT_VALUES = 4096  # of one array
MAX_KEPT_STRING_BYTES = MIB  # of one string
MAX_KEPT_TOTAL_VALUES = 256 * 1024
MAX_KEPT_TOTAL_BYTES = 8 * MIB

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<QQ")
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8
_TOKEN_TYPE_BYTE = 6  # LLAMA_TOKEN_TYPE_BYTE
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
# A six-byte string (its length comes first) that looks like a byte token but has no hex digits.
_BAD_BYTE_TOKEN = re.compile(rb"\x06\0{7}<0x(?![0-9A-Fa-f]{2}>)..>", re.DOTALL)


def read_header(
    source: ByteSource,
    *,
    name: str = "this file",
    whole_file: bool = True,
    thorough: bool = False,
) -> Header:
    """The checked header at the start of `source`; `name` is how errors call the file.

    With `whole_file` the tensors must lie within `source.n_bytes`; without it (a download that is
    not finished) they may lie beyond, and are only checked against each other. `thorough` also
    looks for tokens that are there twice, on which llama.cpp aborts; it is meant for a file's
    first load, since it takes twice as long as all the rest.

    Of the metadata, arrays of more than 4096 values and strings of more than 1 MiB are checked but
    not kept: they stand as an `ArrayValue` without values (a string as type "char"). Strings are
    raw: bytes that are no UTF-8 become U+FFFD, control characters stay, so escape before showing.

    Raises GgufError when the header breaks the format or a bound, and what `source.read` raises.
    """
    return _Reader(source, name, whole_file, thorough).read()


@dataclass(frozen=True, slots=True)
class _Span:
    """Where the values of an array lie in the buffer."""

    type_name: str
    n_values: int
    start: int
    end: int


class _Reader:
    """Walks once through a buffer that grows by windows."""

    def __init__(self, source: ByteSource, name: str, whole_file: bool, thorough: bool) -> None:
        self._source = source
        self._name = escape_line(name).encode(errors="backslashreplace").decode()
        self._whole_file = whole_file
        self._thorough = thorough
        self._n_file_bytes = source.n_bytes
        self._buf = b""
        self._pos = 0
        self._n_to_come = 0  # bytes that pairs and tensors not yet begun have at least
        self._ended = False  # the source gave less than it promised
        self._n_kept_bytes = 0
        self._n_kept_values = 0
        self._metadata: dict[str, MetadataValue] = {}
        self._tokenizer: dict[str, _Span] = {}

    def read(self) -> Header:
        version, n_tensors, n_kv = self._read_preamble()
        self._n_to_come = n_kv * _MIN_KV_BYTES + n_tensors * _MIN_TENSOR_BYTES
        for _ in range(n_kv):
            self._n_to_come -= _MIN_KV_BYTES
            self._read_pair()
        alignment = self._alignment()
        fault = find_fault(self._metadata)
        if fault is not None:
            self._fail(_short(fault, 300))
        self._check_tokenizer()
        tensors = self._read_tensors(n_tensors, alignment)
        n_header_bytes = self._pos
        data_offset = -(-n_header_bytes // alignment) * alignment
        self._check_layout(tensors, data_offset)
        fault = find_tensor_fault(tensors)
        if fault is not None:
            self._fail(fault)
        return Header(version, self._metadata, tuple(tensors), data_offset, n_header_bytes)

    def _fail(self, why: str, hint: str | None = None) -> NoReturn:
        raise GgufError(
            f"{self._name} is not a usable GGUF file",
            why=why,
            hint=hint or "get the file again (`llmrun verify` finds damaged downloads)",
        )

    def _require(self, n_bytes: int, what: str, n_behind: int = 0) -> None:
        """Make `n_bytes` from the current position available, or fail. At least `n_behind` bytes of
        the same value follow them."""
        end = self._pos + n_bytes
        if end <= len(self._buf):
            return
        if end > self._n_file_bytes or self._ended:
            n_there = len(self._buf) if self._ended else self._n_file_bytes
            self._fail(f"it ends at byte {n_there}, but {what} reaches to byte {end}")
        if end > MAX_HEADER_BYTES:
            self._fail(f"its header is larger than {MAX_HEADER_BYTES // MIB} MiB")
        n_have = len(self._buf)
        least = end + n_behind + self._n_to_come
        window = max(2 * least, FIRST_WINDOW_BYTES) if n_have else FIRST_WINDOW_BYTES
        n_wanted = max(end, min(window, MAX_HEADER_BYTES, self._n_file_bytes)) - n_have
        chunk = self._source.read(n_have, n_wanted)[:n_wanted]
        self._buf = self._buf + chunk if n_have else chunk
        self._ended = len(chunk) < n_wanted
        self._require(n_bytes, what, n_behind)

    def _read_preamble(self) -> tuple[int, int, int]:
        if self._n_file_bytes < 24:
            self._fail(f"it has only {max(self._n_file_bytes, 0)} bytes")
        self._require(24, "the start of the header")
        buf = self._buf
        if buf[:4] != b"GGUF":
            self._fail(_describe_start(buf))
        (version,) = _U32.unpack_from(buf, 4)
        if version and version & 0xFFFF == 0:
            self._fail("it is in big-endian byte order", "convert it to little-endian")
        if version not in (2, 3):
            self._fail(f"its format version is {version}; versions 2 and 3 are known")
        n_tensors, n_kv = _COUNTS.unpack_from(buf, 8)
        self._pos = 24
        for n, limit, least, what in (
            (n_kv, MAX_KV, _MIN_KV_BYTES, "metadata values"),
            (n_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES, "tensors"),
        ):
            if n > limit:
                self._fail(f"it claims {n} {what}; at most {limit} are allowed")
            if n * least > self._n_file_bytes - self._pos:
                self._fail(f"it claims {n} {what}, more than its size can hold")
        return version, n_tensors, n_kv

    def _read_name(self, what: str, limit: int) -> str:
        """A key or a tensor's name: short, valid UTF-8, printable."""
        self._require(8, f"the length of {what}")
        (length,) = _U64.unpack_from(self._buf, self._pos)
        if not 1 <= length <= limit:
            self._fail(f"{what} has {length} bytes; 1 to {limit} are allowed")
        self._pos += 8
        self._require(length, what)
        raw = self._buf[self._pos : self._pos + length]
        self._pos += length
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not valid UTF-8")
        if not name.isprintable():
            self._fail(f"{what} contains control characters")
        return name

    def _read_pair(self) -> None:
        key = self._read_name(f"key {len(self._metadata) + 1}", MAX_KEY_BYTES)
        if key in self._metadata:
            self._fail(f"key '{_short(key)}' is there twice")
        what = f"the value of '{_short(key)}'"
        self._require(4, what)
        (type_id,) = _U32.unpack_from(self._buf, self._pos)
        self._pos += 4
        if type_id == STRING_TYPE:
            self._metadata[key] = self._read_string(key, what)
        elif type_id == ARRAY_TYPE:
            self._metadata[key] = self._read_array(key, what)
        elif type_id in SCALAR_TYPES:
            self._metadata[key] = self._read_scalar(key, what, type_id)
        else:
            self._fail(f"{what} has the unknown type {type_id}")

    def _read_scalar(self, key: str, what: str, type_id: int) -> int | float | bool:
        name, code, size = SCALAR_TYPES[type_id]
        self._require(size, what)
        if name == "bool" and self._buf[self._pos] > 1:
            self._fail(f"{what} is neither true nor false")
        (value,) = struct.unpack_from("<" + code, self._buf, self._pos)
        self._pos += size
        if key == "general.alignment" and name != "uint32":
            self._fail(f"general.alignment has the type {name}; it must be uint32")
        return value  # type: ignore[no-any-return]

    def _read_string(self, key: str, what: str) -> str | ArrayValue:
        self._require(8, what)
        (length,) = _U64.unpack_from(self._buf, self._pos)
        if length > MAX_STRING_BYTES:
            self._fail(f"{what} has {length} bytes; at most {MAX_STRING_BYTES} are allowed")
        self._pos += 8
        self._require(length, what)
        start = self._pos
        self._pos += length
        self._n_kept_bytes += length
        if length > MAX_KEPT_STRING_BYTES or self._n_kept_bytes > MAX_KEPT_TOTAL_BYTES:
            if key.startswith(("general.architecture", "tokenizer.chat_template")):
                self._fail(f"{what} is too long ({length} bytes)")
            self._n_kept_bytes -= length
            return ArrayValue("char", length, None)
        return self._buf[start : self._pos].decode(errors="replace")

    def _read_array(self, key: str, what: str) -> ArrayValue:
        self._require(12, what)
        (type_id,) = _U32.unpack_from(self._buf, self._pos)
        (n_values,) = _U64.unpack_from(self._buf, self._pos + 4)
        self._pos += 12
        if type_id == ARRAY_TYPE:
            self._fail(f"{what} is an array of arrays")
        if type_id != STRING_TYPE and type_id not in SCALAR_TYPES:
            self._fail(f"{what} is an array of the unknown type {type_id}")
        if n_values > MAX_ARRAY_VALUES:
            self._fail(f"{what} has {n_values} elements; at most {MAX_ARRAY_VALUES} are allowed")
        keep = (
            n_values <= MAX_KEPT_VALUES and self._n_kept_values + n_values <= MAX_KEPT_TOTAL_VALUES
        )
        start = self._pos
        values: tuple[object, ...] | None = None
        if type_id == STRING_TYPE:
            type_name = "string"
            self._skip_strings(n_values, what)
            size = self._pos - start
            if keep and self._n_kept_bytes + size <= MAX_KEPT_TOTAL_BYTES:
                self._n_kept_bytes += size
                values = self._decode_strings(start, n_values)
        else:
            type_name, code, n_each = SCALAR_TYPES[type_id]
            self._require(n_values * n_each, what)
            self._pos += n_values * n_each
            if type_name == "bool" and self._buf[start : self._pos].strip(b"\0\1"):
                self._fail(f"{what} contains what is neither true nor false")
            if keep:
                values = struct.unpack_from(f"<{n_values}{code}", self._buf, start)
        if values is not None:
            self._n_kept_values += n_values
        if key.startswith("tokenizer.ggml."):
            self._tokenizer[key[15:]] = _Span(type_name, n_values, start, self._pos)
        return ArrayValue(type_name, n_values, values)

    def _skip_strings(self, n: int, what: str) -> None:
        """Walk over `n` strings. This loop is most of the reader's time (vocabularies)."""
        if n * 8 > self._n_file_bytes - self._pos:
            self._fail(f"{what} has {n} strings, more than the file can hold")
        unpack = _U64.unpack_from
        limit = MAX_STRING_BYTES
        buf, pos = self._buf, self._pos
        last = len(buf) - 8  # the last place where a length can be read
        for i in range(n):
            if pos > last:
                self._pos = pos
                self._require(8, what, (n - i - 1) * 8)
                buf, last = self._buf, len(self._buf) - 8
            length = unpack(buf, pos)[0]
            if length > limit:
                self._fail(f"{what} holds a string of {length} bytes; at most {limit} are allowed")
            pos += 8 + length
        self._pos = pos
        self._require(0, what)

    def _decode_strings(self, start: int, n: int) -> tuple[str, ...]:
        """The `n` strings from `start`, over which `_skip_strings` went before."""
        strings = []
        for _ in range(n):
            end = start + 8 + _U64.unpack_from(self._buf, start)[0]
            strings.append(self._buf[start + 8 : end].decode(errors="replace"))
            start = end
        return tuple(strings)

    def _alignment(self) -> int:
        value = self._metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int):
            self._fail("general.alignment is not a uint32")
        if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            self._fail(f"general.alignment is {value}; a power of two up to 1 MiB is allowed")
        return value

    def _check_tokenizer(self) -> None:
        """The arrays that llama.cpp reads side by side: right types, none shorter than `tokens`."""
        spans = self._tokenizer
        for name, types in (
            ("tokens", ("string",)),
            ("merges", ("string",)),
            ("scores", ("float32",)),
            ("token_type", ("int32", "uint32")),
        ):
            key = f"tokenizer.ggml.{name}"
            if key in self._metadata and (name not in spans or spans[name].type_name not in types):
                self._fail(f"{key} is not an array of {types[0]}")
        tokens, kinds = spans.get("tokens"), spans.get("token_type")
        if tokens is None:
            return
        for name in ("scores", "token_type"):
            if name in spans and spans[name].n_values < tokens.n_values:
                self._fail(f"tokenizer.ggml.{name} is shorter than tokenizer.ggml.tokens")
        if _BAD_BYTE_TOKEN.search(self._buf, tokens.start, tokens.end):
            self._fail("tokenizer.ggml.tokens has a byte token without two hex digits")
        if kinds is not None:
            self._check_byte_tokens(tokens, kinds)
        if self._thorough:
            self._check_unique_tokens(tokens)

    def _check_byte_tokens(self, tokens: _Span, kinds: _Span) -> None:
        """Tokens of the type BYTE are parsed as `<0xHH>` without further checks."""
        types = array("i")
        types.frombytes(self._buf[kinds.start : kinds.start + 4 * tokens.n_values])
        if sys.byteorder == "big":
            types.byteswap()
        n_left = types.count(_TOKEN_TYPE_BYTE)
        pos, i = tokens.start, 0
        while n_left:
            end = pos + 8 + _U64.unpack_from(self._buf, pos)[0]
            if types[i] == _TOKEN_TYPE_BYTE:
                if not _BYTE_TOKEN.fullmatch(self._buf, pos + 8, end):
                    self._fail(f"byte token {i} is not two hex digits in <0x..>")
                n_left -= 1
            pos, i = end, i + 1

    def _check_unique_tokens(self, tokens: _Span) -> None:
        """llama.cpp asserts that its map from text to token is as large as its list of tokens."""
        seen: set[bytes] = set()
        buf, pos = self._buf, tokens.start
        for i in range(tokens.n_values):
            end = pos + 8 + _U64.unpack_from(buf, pos)[0]
            text = buf[pos + 8 : end]
            if 0 in text:  # it is read as a C string
                text = text[: text.index(0)]
            # Empty texts get a name of their own there.
            seen.add(text or b"[EMPTY_%d]" % i)
            pos = end
        if len(seen) < tokens.n_values:
            self._fail("tokenizer.ggml.tokens has a token twice")

    def _read_tensors(self, n_tensors: int, alignment: int) -> list[TensorInfo]:
        tensors: list[TensorInfo] = []
        names: set[str] = set()
        for i in range(n_tensors):
            self._n_to_come -= _MIN_TENSOR_BYTES
            name = self._read_name(f"the name of tensor {i + 1}", MAX_TENSOR_NAME_BYTES)
            if name in names:
                self._fail(f"tensor '{name}' is there twice")
            names.add(name)
            tensors.append(self._read_tensor(name, alignment))
        return tensors

    def _read_tensor(self, name: str, alignment: int) -> TensorInfo:
        what = f"tensor '{name}'"
        self._require(4, what)
        (n_dims,) = _U32.unpack_from(self._buf, self._pos)
        if n_dims > MAX_DIMS:
            self._fail(f"{what} has {n_dims} dimensions; at most {MAX_DIMS} are allowed")
        self._pos += 4
        self._require(8 * n_dims + 12, what)
        *shape, type_id, offset = struct.unpack_from(f"<{n_dims}QIQ", self._buf, self._pos)
        self._pos += 8 * n_dims + 12
        n_elements = 1
        for dimension in shape:
            n_elements *= dimension
        # Dimensions are unsigned: with a product in this range each of them is in it as well.
        if not 1 <= n_elements < 2**63:
            self._fail(f"{what} has the impossible shape {shape}")
        kind = TENSOR_TYPES.get(type_id)
        if kind is None:
            removed = REMOVED_TENSOR_TYPES.get(type_id)
            if removed is not None:
                self._fail(
                    f"{what} is stored as {removed}, which llama.cpp no longer reads",
                    "choose another quant; Q4_0 is repacked while loading",
                )
            self._fail(f"{what} has the unknown type {type_id}")
        row = shape[0] if shape else 1
        if row % kind.block_elements:
            self._fail(f"{what} has rows of {row}, not whole blocks of {kind.name}")
        n_bytes = n_elements // kind.block_elements * kind.block_bytes
        if offset % alignment:
            self._fail(f"{what} starts at offset {offset}, not a multiple of {alignment}")
        if offset + n_bytes >= 2**63 - MAX_ALIGNMENT:
            self._fail(f"{what} ends at an impossible offset")
        return TensorInfo(name, tuple(shape), type_id, kind.name, offset, n_bytes)

    def _check_layout(self, tensors: list[TensorInfo], data_offset: int) -> None:
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                self._fail(f"tensor '{tensor.name}' overlaps another one")
            end = tensor.offset + tensor.n_bytes
        n_needed = data_offset + end
        if tensors and self._whole_file and n_needed > self._n_file_bytes:
            self._fail(
                f"its tensors end at byte {n_needed}, but it has {self._n_file_bytes} bytes",
                "the file was cut short: get it again",
            )


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _describe_start(start: bytes) -> str:
    """What a file that is no GGUF most likely is."""
    head = start[:24].lstrip().lower()
    if start.startswith(b"version https://git"):
        return "it is a Git LFS pointer, not the file itself"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not a model"
    if start.startswith(b"PK\x03\x04"):
        return "it is a zip archive (a PyTorch checkpoint?)"
    if start[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
        return "it is in a GGML format older than GGUF"
    if start[8:9] == b"{":
        return "it looks like a safetensors file"
    return "it does not start with GGUF"

"""Writes GGUF files for tests: valid ones, broken ones, and a tiny llama that llama.cpp can run."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

# Written down again, apart from the reader's tables, so that a slip in one of them shows.
VALUE_TYPES = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "string": (8, ""),
    "array": (9, ""),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 9: (32, 36), 12: (256, 144), 26: (1, 4)}

# A ChatML template in the fewest words; its markers are control tokens of the tiny llama.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pack_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pack_value(type_name: str, value: object) -> bytes:
    if type_name == "string":
        assert isinstance(value, str | bytes)
        return pack_string(value)
    return struct.pack("<" + VALUE_TYPES[type_name][1], value)


def pack_array(type_name: str, values: Sequence[object]) -> bytes:
    """The payload of an array: element type, count, elements."""
    type_id, code = VALUE_TYPES[type_name]
    start = struct.pack("<IQ", type_id, len(values))
    if type_name == "string":
        return start + b"".join(pack_value(type_name, value) for value in values)
    return start + struct.pack(f"<{len(values)}{code}", *values)


class GgufBuilder:
    """Collects metadata and tensors; `header()` and `build()` give the bytes.

    What is set by hand (`n_kv`, `n_tensors`, `magic`, `version`, offsets, raw pairs) is written as
    it is, right or wrong.
    """

    def __init__(self, architecture: str | None = "llama", *, alignment: int = 32) -> None:
        self.magic = b"GGUF"
        self.version = 3
        self.alignment = alignment
        self.n_kv: int | None = None
        self.n_tensors: int | None = None
        self.pairs: list[bytes] = []
        self.tensors: list[bytes] = []
        self.data: list[tuple[int, bytes | int]] = []
        self.specs: list[tuple[str | bytes, Sequence[int], int, bytes | None]] = []
        self._n_data_bytes = 0
        if architecture is not None:
            self.add("general.architecture", architecture)

    def add(self, key: str | bytes, value: object, type_name: str | None = None) -> Self:
        """A pair; lists become arrays (of strings, bools, float32 or int32 unless told)."""
        is_array = isinstance(value, list | tuple)
        sample = (value[0] if value else 0) if is_array else value
        if type_name is None:
            type_name = {str: "string", bytes: "string", bool: "bool", float: "float32"}.get(
                type(sample), "int32" if is_array else "uint32"
            )
        if is_array:
            return self.add_raw(key, VALUE_TYPES["array"][0], pack_array(type_name, value))
        return self.add_raw(key, VALUE_TYPES[type_name][0], pack_value(type_name, value))

    def add_raw(self, key: str | bytes, type_id: int, payload: bytes) -> Self:
        self.pairs.append(pack_string(key) + struct.pack("<I", type_id) + payload)
        return self

    def tensor(
        self,
        name: str | bytes,
        shape: Sequence[int],
        type_id: int = 0,
        data: bytes | None = None,
        *,
        offset: int | None = None,
        n_dims: int | None = None,
    ) -> Self:
        """A tensor of zeros or `data`, right after the one before unless `offset` is given."""
        self.specs.append((name, shape, type_id, data))
        block, block_bytes = BLOCKS.get(type_id, (1, 4))
        n_bytes = block_bytes
        for dimension in shape:
            n_bytes *= dimension
        n_bytes //= block
        at = self._n_data_bytes if offset is None else offset
        self.tensors.append(
            pack_string(name)
            + struct.pack("<I", len(shape) if n_dims is None else n_dims)
            + struct.pack(f"<{len(shape)}Q", *shape)
            + struct.pack("<IQ", type_id, at)
        )
        if offset is None:
            self.data.append((at, n_bytes if data is None else data))
            self._n_data_bytes = -(-(at + n_bytes) // self.alignment) * self.alignment
        return self

    def header(self) -> bytes:
        """The header without its padding."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_kv = len(self.pairs) if self.n_kv is None else self.n_kv
        return (
            self.magic
            + struct.pack("<IQQ", self.version, n_tensors, n_kv)
            + b"".join(self.pairs)
            + b"".join(self.tensors)
        )

    def build(self) -> bytes:
        """The whole file. Only for shapes that were meant to be written: zeros are real here."""
        out = bytearray(self.header())
        out += bytes(-len(out) % self.alignment)
        start = len(out)
        for at, data in self.data:
            out += bytes(start + at - len(out))
            out += bytes(data) if isinstance(data, int) else data
        out += bytes(-len(out) % self.alignment)
        return bytes(out)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


def split_builder(builder: GgufBuilder, n_shards: int) -> list[GgufBuilder]:
    """The same model as `n_shards` files: metadata in the first, `split.*` keys in all."""
    n_tensors = len(builder.specs)
    n_each = -(-n_tensors // n_shards)
    shards = []
    for number in range(n_shards):
        shard = GgufBuilder(None, alignment=builder.alignment)
        shard.pairs = list(builder.pairs) if number == 0 else []
        shard.add("split.no", number, "uint16").add("split.count", n_shards, "uint16")
        shard.add("split.tensors.count", n_tensors, "int32")
        for spec in builder.specs[number * n_each : (number + 1) * n_each]:
            shard.tensor(*spec)
        shards.append(shard)
    return shards


def write_shards(builder: GgufBuilder, folder: Path, stem: str, n_shards: int) -> list[Path]:
    """Write `<stem>-0000K-of-0000N.gguf` files into `folder`, in order."""
    return [
        shard.write(folder / f"{stem}-{number:05}-of-{n_shards:05}.gguf")
        for number, shard in enumerate(split_builder(builder, n_shards), 1)
    ]


def _tiny_vocabulary(n_vocab: int) -> tuple[list[str], list[int]]:
    """Tokens and their types of a byte-fallback SentencePiece vocabulary.

    Every text can be spelled: printable ASCII by one token a character, the rest by byte tokens.
    The remainder are syllables with and without a space before them, reachable by merges.
    """
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    types = [2, 3, 3, 3, 3]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [6] * 256
    tokens += ["\u2581"] + [chr(code) for code in range(0x21, 0x7F)]
    syllables = [c + v for c in "bdfghjklmnprstvwz" for v in "aeiou"]
    tokens += [word for syllable in syllables for word in (syllable, "\u2581" + syllable)]
    i = 0
    while len(tokens) < n_vocab:
        tokens.append(f"\u2581w{i}")
        i += 1
    if len(tokens) > n_vocab >= 356:
        del tokens[n_vocab:]
    assert len(tokens) == n_vocab, "n_vocab must be at least 356"
    return tokens, types + [1] * (n_vocab - len(types))


def _blocks(rng: random.Random, type_id: int, n_elements: int, scale: float) -> bytes:
    """Random weights of about `scale` in a storage format."""
    if type_id in (0, 1):
        code = "f" if type_id == 0 else "e"
        values = [rng.uniform(-scale, scale) * 1.7 for _ in range(n_elements)]
        return struct.pack(f"<{n_elements}{code}", *values)
    step, n_quants = {2: (scale / 5, 16), 8: (scale / 80, 32)}[type_id]
    start = struct.pack("<e", step)
    return b"".join(start + rng.randbytes(n_quants) for _ in range(n_elements // 32))


def tiny_llama_builder(
    *,
    chat_template: str | None = None,
    name: str = "tiny",
    file_type: int = 1,
    n_vocab: int = 512,
    n_ctx_train: int = 2048,
    n_layers: int = 2,
    seed: int = 1,
    metadata: Mapping[str, object] | None = None,
) -> GgufBuilder:
    """A random llama: n_embd 64, 4 heads over 2 KV heads, SentencePiece with byte fallback.

    `file_type` 0, 1, 2 and 7 store F32, F16, Q4_0 and Q8_0; any other number is written as the
    label of an F16 file. The same arguments give the same bytes. Control and byte tokens have
    small embeddings, so that a greedy answer is made of syllables and rarely ends by itself.
    """
    n_embd, n_head, n_head_kv, n_ff = 64, 4, 2, 128
    tokens, types = _tiny_vocabulary(n_vocab)
    builder = GgufBuilder("llama")
    builder.add("general.type", "model").add("general.name", name)
    builder.add("general.license", "apache-2.0").add("general.file_type", file_type)
    builder.add("general.quantization_version", 2)
    builder.add("llama.block_count", n_layers).add("llama.context_length", n_ctx_train)
    builder.add("llama.embedding_length", n_embd).add("llama.feed_forward_length", n_ff)
    builder.add("llama.attention.head_count", n_head)
    builder.add("llama.attention.head_count_kv", n_head_kv)
    builder.add("llama.attention.layer_norm_rms_epsilon", 1e-5)
    builder.add("llama.rope.dimension_count", n_embd // n_head)
    builder.add("llama.rope.freq_base", 10000.0).add("llama.vocab_size", n_vocab)
    builder.add("tokenizer.ggml.model", "llama").add("tokenizer.ggml.pre", "default")
    builder.add("tokenizer.ggml.tokens", tokens)
    # Longer pieces score higher, so merges prefer them.
    scores = [len(token) * 100.0 - i if types[i] == 1 else 0.0 for i, token in enumerate(tokens)]
    builder.add("tokenizer.ggml.scores", scores).add("tokenizer.ggml.token_type", types)
    builder.add("tokenizer.ggml.bos_token_id", 1).add("tokenizer.ggml.eos_token_id", 2)
    builder.add("tokenizer.ggml.eot_token_id", 4).add("tokenizer.ggml.unknown_token_id", 0)
    builder.add("tokenizer.ggml.add_bos_token", True)
    builder.add("tokenizer.ggml.add_space_prefix", False)
    if chat_template is not None:
        builder.add("tokenizer.chat_template", chat_template)
    for key, value in (metadata or {}).items():
        builder.add(key, value)

    rng = random.Random(seed)
    type_id = {0: 0, 2: 2, 7: 8}.get(file_type, 1)

    def matrix(tensor: str, n_in: int, n_out: int) -> None:
        data = _blocks(rng, type_id, n_in * n_out, 0.2)
        builder.tensor(tensor, (n_in, n_out), type_id, data)

    def norm(tensor: str) -> None:
        builder.tensor(tensor, (n_embd,), 0, struct.pack(f"<{n_embd}f", *[1.0] * n_embd))

    rows = [_blocks(rng, type_id, n_embd, 0.02 if types[i] != 1 else 0.5) for i in range(n_vocab)]
    builder.tensor("token_embd.weight", (n_embd, n_vocab), type_id, b"".join(rows))
    norm("output_norm.weight")
    for i in range(n_layers):
        n_kv = n_embd // n_head * n_head_kv
        norm(f"blk.{i}.attn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", n_embd, n_embd)
        matrix(f"blk.{i}.attn_k.weight", n_embd, n_kv)
        matrix(f"blk.{i}.attn_v.weight", n_embd, n_kv)
        matrix(f"blk.{i}.attn_output.weight", n_embd, n_embd)
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", n_embd, n_ff)
        matrix(f"blk.{i}.ffn_up.weight", n_embd, n_ff)
        matrix(f"blk.{i}.ffn_down.weight", n_ff, n_embd)
    return builder


def tiny_llama(
    path: Path,
    *,
    chat_template: str | None = None,
    name: str = "tiny",
    file_type: int = 1,
    n_vocab: int = 512,
    n_ctx_train: int = 2048,
    n_layers: int = 2,
    seed: int = 1,
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Write the model of `tiny_llama_builder` to `path`."""
    return tiny_llama_builder(
        chat_template=chat_template,
        name=name,
        file_type=file_type,
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        n_layers=n_layers,
        seed=seed,
        metadata=metadata,
    ).write(path)

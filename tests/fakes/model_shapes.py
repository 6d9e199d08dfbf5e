"""Headers of real models in full size, without their weights: tens of KB for many GB.

Layer counts, widths, heads and experts are the models' own; the tensor types are those that
llama.cpp's quantiser would choose, so a file's size comes out within about one per cent. There is
no vocabulary (`tokenizer.ggml.model = "none"` and `<architecture>.vocab_size`), which llama.cpp
accepts for measuring and which keeps a header small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmrun.gguf.header import read_header
from llmrun.gguf.info import build_info
from llmrun.gguf.types import ModelInfo
from tests.fakes.gguf_builder import GgufBuilder
from tests.fakes.model_families import FAMILIES
from tests.fakes.model_parts import Family

# ggml's id and (elements, bytes) of a block, written down apart from the reader's table.
_TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "MXFP4": (39, 32, 17),
}
# What a type becomes in rows that are no multiple of its 256 elements.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True, slots=True)
class _Mix:
    """A quant: the file type's number, the common type, those of the output and of the values and
    feed-forward outputs in the layers that get more bits (`all_down`: in every layer)."""

    file_type: int
    common: str
    output: str
    more: str
    all_down: bool = False


_MIXES = {
    "q2_k": _Mix(10, "Q2_K", "Q6_K", "Q3_K", all_down=True),
    "q3_k_m": _Mix(12, "Q3_K", "Q6_K", "Q4_K", all_down=True),
    "q4_0": _Mix(2, "Q4_0", "Q6_K", "Q4_0"),
    "q4_k_m": _Mix(15, "Q4_K", "Q6_K", "Q6_K"),
    "q5_k_m": _Mix(17, "Q5_K", "Q6_K", "Q6_K"),
    "q6_k": _Mix(18, "Q6_K", "Q6_K", "Q6_K"),
    "q8_0": _Mix(7, "Q8_0", "Q8_0", "Q8_0"),
    "f16": _Mix(1, "F16", "F16", "F16"),
    "bf16": _Mix(32, "BF16", "BF16", "BF16"),
}
QUANTS = tuple(_MIXES)
SHAPES = tuple(FAMILIES)

_NOT_QUANTISED = (
    "ffn_gate_inp",
    "altup",
    "laurel",
    "ssm_conv1d",
    "shortconv.conv.",
)


@cache
def build_shape(name: str, quant: str = "q4_k_m") -> tuple[bytes, int]:
    """(header with its padding, bytes of the whole file) of one of `SHAPES` in one of `QUANTS`."""
    family = FAMILIES[name]()
    mix = _MIXES[quant]
    builder = _start(name, family, mix)
    offset = 0
    types = _choose_types(family, mix, family.tables.get(quant, {}))
    for (tensor, shape), type_name in zip(family.tensors, types, strict=True):
        type_id, n_block, block_bytes = _TYPES[type_name]
        builder.tensor(tensor, shape, type_id, offset=offset)
        n_bytes = block_bytes
        for dimension in shape:
            n_bytes *= dimension
        offset += -(-n_bytes // n_block // 32) * 32
    header = builder.header()
    header += bytes(-len(header) % 32)
    return header, len(header) + offset


def shape_info(name: str, quant: str = "q4_k_m") -> ModelInfo:
    """The `ModelInfo` of a shape, as `read_info` gives it for the file."""
    header, n_bytes = build_shape(name, quant)
    source = HeaderSource(header, n_bytes)
    return build_info([read_header(source, name=f"{name}.gguf")], n_bytes)


@dataclass(frozen=True, slots=True)
class HeaderSource:
    """A `ByteSource` of a file that is zeros behind its header."""

    header: bytes
    n_bytes: int

    def read(self, offset: int, n_bytes: int) -> bytes:
        n_bytes = max(0, min(n_bytes, self.n_bytes - offset))
        return self.header[offset : offset + n_bytes].ljust(n_bytes, b"\0")


def write_sparse(path: Path, name: str, quant: str = "q4_k_m") -> Path:
    """Write a shape as a sparse file of its full length; on disk it takes its header's bytes."""
    header, n_bytes = build_shape(name, quant)
    with path.open("wb") as out:
        out.write(header)
        out.truncate(n_bytes)
    return path


def _start(name: str, family: Family, mix: _Mix) -> GgufBuilder:
    builder = GgufBuilder(family.architecture)
    builder.add("general.type", "model").add("general.name", name)
    builder.add("general.license", "apache-2.0").add("general.file_type", mix.file_type)
    builder.add("general.quantization_version", 2)
    builder.add("tokenizer.ggml.model", "none")
    for key, value in family.keys.items():
        builder.add(f"{family.architecture}.{key}", value)
    return builder


def _choose_types(family: Family, mix: _Mix, tables: Mapping[str, str]) -> list[str]:
    """The tensor types, after llama-quant.cpp without its rules for rare cases."""
    n_layers = int(family.keys["block_count"])
    tied = all(name != "output.weight" for name, _ in family.tensors)
    n_values = sum("attn_v.weight" in name for name, _ in family.tensors)
    n_experts = int(family.keys.get("expert_count", 0))
    seen = {"attn_v": 0, "ffn_down": 0}
    types = []
    for name, shape in family.tensors:
        if len(shape) < 2 or not name.endswith("weight") or any(s in name for s in _NOT_QUANTISED):
            types.append("F32")
            continue
        type_name = mix.common
        if name in tables:
            type_name = tables[name]
        elif "per_layer_model_proj" in name:
            type_name = mix.common if mix.common == "F16" else "BF16"
        elif family.experts_type and "_exps." in name and mix.common not in ("F16", "BF16"):
            type_name = family.experts_type
        elif family.experts_type and mix.common not in ("F16", "BF16"):
            type_name = "Q8_0"
        elif name == "output.weight" or (tied and "token_embd" in name):
            type_name = mix.output
        elif "attn_v.weight" in name:
            type_name = mix.more if _gets_more(seen["attn_v"], n_values) else mix.common
            seen["attn_v"] += 1
        elif "ffn_down" in name:
            layer = int(name.split(".")[1]) if n_experts else seen["ffn_down"]
            if mix.all_down or _gets_more(layer, n_layers):
                type_name = mix.more
            seen["ffn_down"] += 1
        elif "attn_qkv.weight" in name and mix.common == "Q4_K":
            type_name = "Q5_K"
        if shape[0] % _TYPES[type_name][1]:
            type_name = _FALLBACK.get(type_name, "F16")
        if shape[0] % _TYPES[type_name][1]:
            type_name = "F16"
        types.append(type_name)
    return types


def _gets_more(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2

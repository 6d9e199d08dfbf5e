"""Metadata values that llama.cpp trusts: it indexes with them, or aborts when they are wrong.

Each rule stands for an out-of-bounds access or a failed GGML_ASSERT (which ends the process and
cannot be caught) in the loader or the first decode. Asserts of single architectures are not
repeated here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from llmrun.gguf.types import ArrayValue, MetadataValue, TensorInfo

MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS, the length of llama.cpp's per-layer arrays
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
# llama.cpp multiplies heads by head sizes in 32 bits; larger numbers wrap past its shape checks.
MAX_HEADS = 8192
MAX_HEAD_SIZE = 65_536

_HEAD_KEYS = ("head_count", "head_count_kv")
_HEAD_SIZE_KEYS = ("key_length", "value_length", "key_length_swa", "value_length_swa")

# Matrices that every architecture multiplies with. ggml has no product for these types: it calls a
# null pointer. Other tensors may well hold integers (token maps).
_MATRIX = re.compile(
    r"(?:token_embd|output|blk\.\d+\.(?:attn_(?:q|k|v|qkv|output)"
    r"|ffn_(?:up|gate|down|gate_up)(?:_exps|_shexp)?|ffn_gate_inp))\.weight"
)
_NO_PRODUCT = frozenset({"I8", "I16", "I32", "I64", "F64"})
# Formats of values in the midst of a computation; no file has them.
_NEVER_STORED = frozenset({"Q8_1", "Q8_K"})

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def find_fault(metadata: Mapping[str, MetadataValue]) -> str | None:
    """What is wrong with the metadata as a whole, in words, or None."""
    architecture = metadata.get("general.architecture")
    if architecture is not None and not (
        isinstance(architecture, str) and _ARCHITECTURE.fullmatch(architecture)
    ):
        return "general.architecture is not a plain name"
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        return "tokenizer.chat_template is not a string"
    for key, value in metadata.items():
        if key.endswith(".block_count"):
            # An encoder of a projector may have no blocks, a model may not.
            least = 1 if key == f"{architecture}.block_count" else 0
            if type(value) is not int or not least <= value <= MAX_BLOCKS:
                return f"{key} is not a whole number from {least} to {MAX_BLOCKS}"
        elif key.endswith("_epsilon") and not (isinstance(value, float) and value >= 0):
            return f"{key} is not a number of zero or more"
    if isinstance(architecture, str) and architecture != "clip":
        return _find_number_fault(metadata, architecture)
    return None


def find_tensor_fault(tensors: Iterable[TensorInfo]) -> str | None:
    """What is wrong with how a tensor is stored, in words, or None."""
    for tensor in tensors:
        if tensor.type_name in _NEVER_STORED or (
            tensor.type_name in _NO_PRODUCT and _MATRIX.fullmatch(tensor.name)
        ):
            return f"tensor '{tensor.name}' is stored as {tensor.type_name}"
        if (
            len(tensor.shape) == 1
            and tensor.type_name != "F32"
            and tensor.name.endswith("_norm.weight")
        ):
            return f"tensor '{tensor.name}' is stored as {tensor.type_name}; it must be F32"
    return None


def _find_number_fault(metadata: Mapping[str, MetadataValue], architecture: str) -> str | None:
    for names, limit in ((_HEAD_KEYS, MAX_HEADS), (_HEAD_SIZE_KEYS, MAX_HEAD_SIZE)):
        for name in names:
            key = f"{architecture}.attention.{name}"
            if _largest(metadata.get(key)) > limit:
                return f"{key} is more than {limit}"
    n_expert = _largest(metadata.get(f"{architecture}.expert_count"))
    n_used = _largest(metadata.get(f"{architecture}.expert_used_count"))
    if n_expert > MAX_EXPERTS:
        return f"{architecture}.expert_count is {n_expert}; at most {MAX_EXPERTS} are allowed"
    if n_used > n_expert or (n_expert > 0) != (n_used > 0):
        return f"it uses {n_used} of {n_expert} experts"
    n_blocks = _largest(metadata.get(f"{architecture}.block_count"))
    n_nextn = _largest(metadata.get(f"{architecture}.nextn_predict_layers"))
    if n_nextn > n_blocks:
        return f"{n_nextn} of its {n_blocks} blocks are said to predict further tokens"
    return None


def _largest(value: MetadataValue | None) -> int:
    """A whole number, the largest of an array of them, 0 where there is none."""
    if isinstance(value, ArrayValue):
        return max((one for one in value.values or () if type(one) is int), default=0)
    return value if type(value) is int else 0

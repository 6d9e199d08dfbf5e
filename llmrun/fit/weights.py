"""Which part of a model its weights belong to, as llama.cpp places them. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmrun.fit.types import GIB
from llmrun.gguf.types import ModelInfo, TensorInfo

# The second group is there for the routed experts.
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(ffn_(?:up|down|gate|gate_up)_(?:ch)?exps\.)?")
# Looked up row by row on the CPU, so they stay in RAM whatever the number of GPU layers.
_INPUTS = re.compile(r"(?:token_embd|position_embd|token_types|per_layer_token_embd)\.")
# Named without a block, but placed with the first one.
_FIRST_BLOCK = re.compile(r"(?:per_layer_model_proj|per_layer_proj_norm|rope_f)")

_ALIGNMENT = 32  # of a tensor in a buffer of RAM

_EMBEDDING = "token_embd.weight"
_PER_LAYER_TABLE = "per_layer_token_embd.weight"
# llama.cpp maps this table from the file and reads rows of it when it is larger.
_LAZY_BYTES = 4 * GIB

# These make the output before the embedding, so a tied output is a second copy in any case but one:
# two tensors of a mapped file are the same pages.
_TIED_TWICE = frozenset({"gemma4", "gemma3n"})

# Types of which the CPU backend may keep a second, reordered copy; which ones it does depends on
# the processor, so this is the bound.
_REPACKABLE = frozenset(
    {"Q2_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"}
)
# Those that it reorders on a PC with AVX-512; most of them on any of the last ten years.
_ALWAYS_REPACKED = frozenset({"Q2_K", "Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's tensors, by where llama.cpp puts them.

    `layers` and `experts` count by block, `inputs` are what never leaves RAM, `outputs` what
    belongs behind the last block, a copy of a tied embedding included where there is one on the CPU
    too (`aliased` of it is no second copy when the file is mapped and it stays in RAM). `tied`
    comes on top when the outputs go to a GPU. `lazy` of the inputs is read row by row from the
    file. `skipped` are blocks that are not loaded, `repack` the bound of a CPU's reordered copy.
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    inputs: int
    outputs: int
    aliased: int
    tied: int
    lazy: int
    skipped: int
    repack: int

    @property
    def total(self) -> int:
        return sum(self.layers) + self.inputs + self.outputs


def split_weights(info: ModelInfo, n_layers: int, *, use_repack: bool) -> Weights:
    """The tensors of `info`, of which the first `n_layers` blocks are loaded. With `use_repack` a
    CPU may store weights in another order, in a buffer of their own."""
    tensors = info.header.tensors
    layers, experts = [0] * n_layers, [0] * n_layers
    inputs = outputs = skipped = repack = 0
    by_name = {}  # those that belong to no block
    for tensor in tensors:
        n_bytes = -(-tensor.n_bytes // _ALIGNMENT) * _ALIGNMENT
        block = _BLOCK.match(tensor.name)
        if block is not None:
            number = int(block[1])
            if number >= n_layers:
                skipped += n_bytes
                continue
            layers[number] += n_bytes
            if block[2]:
                experts[number] += n_bytes
        else:
            by_name[tensor.name] = tensor
            if _INPUTS.match(tensor.name):
                inputs += n_bytes
                continue
            if n_layers and _FIRST_BLOCK.match(tensor.name):
                layers[0] += n_bytes
            else:
                outputs += n_bytes
        if _is_matrix_of(tensor, _REPACKABLE):
            repack += tensor.n_bytes
    if not tensors:
        outputs = info.tensor_bytes
    embedding, table = by_name.get(_EMBEDDING), by_name.get(_PER_LAYER_TABLE)
    aliased = copied = tied = 0
    if embedding is not None and "output.weight" not in by_name:
        if info.architecture in _TIED_TWICE:
            aliased = embedding.n_bytes
        elif use_repack and _is_matrix_of(embedding, _ALWAYS_REPACKED):
            copied = embedding.n_bytes
        else:
            tied = embedding.n_bytes
    return Weights(
        layers=tuple(layers),
        experts=tuple(experts) if any(experts) else (),
        inputs=inputs,
        outputs=outputs + aliased + copied,
        aliased=aliased,
        tied=tied,
        lazy=table.n_bytes if table is not None and table.n_bytes > _LAZY_BYTES else 0,
        skipped=skipped,
        repack=repack,
    )


def _is_matrix_of(tensor: TensorInfo, types: frozenset[str]) -> bool:
    return len(tensor.shape) >= 2 and tensor.type_name.upper() in types

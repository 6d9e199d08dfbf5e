"""Values of the GGUF reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


class ByteSource(Protocol):
    """Random access to the bytes of one file, local or remote."""

    @property
    def n_bytes(self) -> int:
        """Size of the whole file."""

    def read(self, offset: int, n_bytes: int) -> bytes:
        """The bytes from `offset`; fewer than `n_bytes` only where the file ends."""


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A metadata array. Long ones are checked and counted, but `values` is None then."""

    type_name: str  # "string", "int32", "float32", "bool", …
    n_values: int
    values: tuple[object, ...] | None


MetadataValue = str | int | float | bool | ArrayValue


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (fastest first), `offset` from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        product = 1
        for dimension in self.shape:
            product *= dimension
        return product


@dataclass(frozen=True, slots=True)
class Header:
    """A checked GGUF header: every count, type, dimension and offset in it was within bounds."""

    version: int
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    n_header_bytes: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model's header(s) say, for people, the planner and the chat layer.

    Counts that the header does not give are None. `n_bytes` sums the files of all shards,
    `tensor_bytes` their tensors. `sampling` holds `general.sampling.*` (key without the prefix).
    `quant_mix` is (type name, bytes), largest first. `header` is the first shard's header with the
    tensors of all shards.
    """

    architecture: str
    name: str | None
    kind: str  # "model", "projector", "embedder", "reranker", "drafter", "adapter"
    quant: str | None
    quant_mix: tuple[tuple[str, int], ...]
    n_params: int
    n_bytes: int
    tensor_bytes: int
    n_layers: int | None
    n_ctx_train: int | None
    n_embd: int | None
    n_vocab: int | None
    n_swa: int | None
    n_expert: int | None
    n_expert_used: int | None
    licence: str | None
    chat_template: str | None
    sampling: Mapping[str, float | int]
    header: Header = field(repr=False)

"""Values that the parts of `fit` pass to each other. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

KvType = Literal["f16", "q8_0", "q4_0", "bf16", "f32"]
FlashAttn = Literal["auto", "on", "off"]
GpuLayers = int | Literal["auto", "all"]
Source = Literal["exact", "formula", "published", "filesize"]

# (values per block, bytes per block), as in ggml.
KV_BLOCKS: Mapping[KvType, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
}
MIB = 1 << 20
GIB = 1 << 30
_CELLS_PAD = 256  # llama.cpp rounds the cells of a cache up to this
# ggml's buffers of RAM in which the CPU keeps weights in an order of its own.
REORDERED_BUFFERS = frozenset({"CPU_REPACK", "CPU_KLEIDIAI", "CPU_RISCV64_SPACEMIT", "AMX"})


def pad_cells(n_cells: int) -> int:
    """The cells that a cache for so many tokens has."""
    return max(1, -(-n_cells // _CELLS_PAD)) * _CELLS_PAD


@dataclass(frozen=True, slots=True)
class Setup:
    """The engine's settings that memory depends on, with llama.cpp's names and meaning.

    `n_ctx` is for all sequences together; with `kv_unified` off each has its part of it for itself.
    `n_gpu_layers` -1 is all. `n_cpu_moe`: the experts of the first so many layers stay in RAM.
    `tensor_split`: shares of the layers on each GPU in the engine's order; empty leaves it to
    llama.cpp. Sliding-window layers are always sized with `swa_full` off.
    """

    n_ctx: int
    type_k: KvType = "f16"
    type_v: KvType = "f16"
    flash_attn: FlashAttn = "auto"
    n_seq_max: int = 1
    kv_unified: bool = True
    n_ubatch: int = 512
    n_outputs_max: int = 1
    n_gpu_layers: int = -1
    n_cpu_moe: int = 0
    tensor_split: tuple[float, ...] = ()
    use_repack: bool = True

    @property
    def n_ctx_seq(self) -> int:
        """The most tokens of one sequence."""
        if self.kv_unified or self.n_seq_max == 1:
            return self.n_ctx
        return pad_cells(-(-self.n_ctx // self.n_seq_max))


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a loaded model takes, before it is known which device holds what.

    `kv_bytes` is the KV cache and any recurrent state, `compute_bytes` the scratch memory of a
    step, `overhead_bytes` the program around it. `repack_bytes` is what a CPU adds when it
    reorders weights that are also mapped from the file; it is not in the total, and a bound unless
    the source is "exact".
    `layer_weights` and `layer_kv` split both by layer, `layer_experts` is the part of each layer's
    weights that belongs to its experts (empty: there are none). `input_bytes` are the weights that
    never leave RAM and `output_bytes` those behind the last layer. `tied_bytes` come on top when
    these go to a GPU, because the output is the embedding. `aliased_bytes` of the outputs are the
    same pages as the embedding's when they stay in RAM and the file is mapped; `lazy_bytes` of the
    inputs are read row by row from the mapped file in any load mode, so they need not fit.

    Source "exact": llama.cpp's own allocator was asked. "formula" is good to about a tenth and
    never far under. "filesize" is a rough upper bound for a model whose build is not known.
    "published" is somebody's figure for the whole.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    source: Source
    notes: tuple[str, ...] = ()
    repack_bytes: int = 0
    layer_weights: tuple[int, ...] = ()
    layer_kv: tuple[int, ...] = ()
    layer_experts: tuple[int, ...] = ()
    input_bytes: int = 0
    output_bytes: int = 0
    tied_bytes: int = 0
    aliased_bytes: int = 0
    lazy_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True)
class BufferUse:
    """What llama.cpp would allocate of one buffer type. `buffer` is its name ("CPU", "CPU_REPACK",
    "CUDA0", "CUDA_Host"), `device` the ggml device behind it ("CPU" for all kinds of RAM)."""

    buffer: str
    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True)
class Measurement:
    """The answer of llama.cpp's allocator for one Setup. Nothing of the program around it.

    `is_rough`: read from its log, rounded, and without what is reordered."""

    setup: Setup
    buffers: tuple[BufferUse, ...]
    is_rough: bool = False

    def on(self, device: str) -> BufferUse:
        """The sum of all buffers on `device`."""
        mine = [use for use in self.buffers if use.device == device]
        return BufferUse(
            device,
            device,
            sum(use.weights_bytes for use in mine),
            sum(use.kv_bytes for use in mine),
            sum(use.compute_bytes for use in mine),
        )

    @property
    def weights_bytes(self) -> int:
        return sum(use.weights_bytes for use in self.buffers)

    @property
    def kv_bytes(self) -> int:
        return sum(use.kv_bytes for use in self.buffers)

    @property
    def compute_bytes(self) -> int:
        return sum(use.compute_bytes for use in self.buffers)

    @property
    def repack_bytes(self) -> int:
        return sum(use.weights_bytes for use in self.buffers if use.buffer in REORDERED_BUFFERS)


class Allocator(Protocol):
    """Something that knows what llama.cpp would allocate for one model (`exact.ChildAllocator`)."""

    @property
    def devices(self) -> tuple[str, ...]:
        """ggml's names of the GPUs that its answers can place layers on, in its order; empty for a
        CPU build. A card may be named once more for each backend that lists it."""

    @property
    def problem(self) -> str | None:
        """Why it gave up, as a sentence; None as long as it answers."""

    def measure(self, setups: Sequence[Setup]) -> tuple[Measurement | None, ...]:
        """One answer a setup, in order; None where it cannot say. Never raises for the model's or
        the library's sake. Asking again costs nothing."""

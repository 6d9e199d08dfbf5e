"""Memory that a model needs, in closed form from its header. Pure.

Checked against llama.cpp's own allocator: weights and KV cache come out the same to the byte for
the architectures that `layers` knows, the compute buffer within about a tenth.
"""

from __future__ import annotations

import re

from llmrun.fit.layers import Layer, Layout, read_layout
from llmrun.fit.types import KV_BLOCKS, MIB, Estimate, KvType, Setup
from llmrun.gguf.types import ModelInfo

_PAD = 256  # llama.cpp rounds the cells of a cache up to this

# Python, the libraries, and tables that are not in any buffer; then the vocabulary, measured.
_HOST_BYTES = 64 * MIB
_VOCAB_ENTRY_BYTES = 160
_PROJECTOR_BYTES = 512 * MIB

# Tensors that stay in RAM whatever the number of GPU layers.
_INPUT_TENSORS = re.compile(
    r"(token_embd|position_embd|token_types|token_embd_norm|per_layer_token_embd)\b"
)
_BLOCK = re.compile(r"blk\.(\d{1,5})\.")
# Types of which the CPU backend may keep a second, reordered copy; which ones it does depends on
# the processor, so this is the bound.
_REPACKABLE = frozenset(
    {"Q2_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"}
)


def estimate(info: ModelInfo, setup: Setup) -> Estimate:
    """What `info` needs with these settings, wherever it is placed. An architecture whose rules are
    not known is answered from the file's size, with a note. A projector or adapter has no context:
    only its weights and a flat working space count."""
    if info.kind in ("projector", "adapter"):
        return Estimate(
            weights_bytes=info.tensor_bytes,
            kv_bytes=0,
            compute_bytes=_PROJECTOR_BYTES if info.kind == "projector" else 0,
            overhead_bytes=0,
            source="formula",
            notes=(f"a {info.kind}: counted beside its model",),
        )
    layout = read_layout(info)
    if layout is None:
        return _estimate_by_size(info, setup.n_ctx)
    return _estimate_by_layout(info, layout, setup)


def allows_kv_type(info: ModelInfo, kv_type: KvType) -> bool:
    """Whether the model's heads are whole blocks of `kv_type`; llama.cpp refuses it otherwise."""
    layout = read_layout(info)
    if layout is None:
        return KV_BLOCKS[kv_type][0] == 1
    return all(size % KV_BLOCKS[kv_type][0] == 0 for size in layout.head_sizes)


def _estimate_by_layout(info: ModelInfo, layout: Layout, setup: Setup) -> Estimate:
    n_seq, n_ubatch = setup.n_seq_max, setup.n_ubatch
    n_streams = 1 if setup.kv_unified else n_seq
    n_cells = _pad(-(-setup.n_ctx // n_streams))
    window = layout.n_swa * (n_seq if setup.kv_unified else 1) + n_ubatch
    n_cells_swa = min(n_cells, _pad(window))
    flash_attn = setup.flash_attn != "off"
    # Without FlashAttention V is stored transposed, every layer as wide as the widest.
    v_width = None if flash_attn else max((layer.v_width for layer in layout.layers), default=0)
    layer_kv = tuple(
        _layer_kv(
            layer,
            n_cells_swa if layer.is_swa else n_cells,
            setup.type_k,
            setup.type_v,
            v_width,
        )
        * n_streams
        + 4 * layer.state_values * max(1, n_seq)
        for layer in layout.layers
    )
    n_layers = len(layout.layers)
    layer_weights, input_bytes, output_bytes, skipped = _split_weights(info, n_layers)
    weights = sum(layer_weights) + input_bytes + output_bytes
    n_outputs = min(n_ubatch, max(setup.n_outputs_max, n_seq))
    has_attention = layout.is_encoder or any(layer.k_width for layer in layout.layers)
    compute = _compute_bytes(
        layout,
        n_cells=n_cells if has_attention else 0,
        n_cells_swa=n_cells_swa if layout.n_swa else 0,
        n_ubatch=n_ubatch,
        flash_attn=flash_attn,
        n_outputs=n_outputs,
    )
    notes = []
    if skipped:
        notes.append("the multi-token-prediction layers are not loaded")
    has_output = any(tensor.name == "output.weight" for tensor in info.header.tensors)
    tied = 0 if has_output else _tensor_bytes(info, "token_embd.weight")
    return Estimate(
        weights_bytes=weights,
        kv_bytes=sum(layer_kv),
        compute_bytes=compute,
        # The output rows lie a second time in a buffer of their own.
        overhead_bytes=_HOST_BYTES + (_VOCAB_ENTRY_BYTES + 4 * n_outputs) * layout.n_vocab,
        source="formula",
        notes=tuple(notes),
        repack_bytes=_repack_bytes(info),
        layer_weights=layer_weights,
        layer_kv=layer_kv,
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        tied_bytes=tied,
    )


def _layer_kv(
    layer: Layer, n_cells: int, type_k: KvType, type_v: KvType, v_width: int | None
) -> int:
    n_v = v_width if v_width is not None and layer.v_width else layer.v_width
    return (_row(type_k, layer.k_width) + _row(type_v, n_v)) * n_cells


def _compute_bytes(
    layout: Layout,
    *,
    n_cells: int,
    n_cells_swa: int,
    n_ubatch: int,
    flash_attn: bool,
    n_outputs: int,
) -> int:
    """The widest point of a step's graph: a feed-forward block with the attention masks, or the
    output rows. Cells are those of one stream."""
    n_embd = layout.n_embd
    body = 3 * max(layout.n_ff, 2 * layout.n_inner) + layout.n_residuals * n_embd
    if layout.n_expert_used:
        routed = 3 * layout.n_expert_used * layout.n_ff_expert + layout.n_expert_used * n_embd
        body = max(body, routed + 5 * n_embd + 3 * layout.n_ff_shared)
    body_bytes = 4 * n_ubatch * body
    if not flash_attn:
        scores = 4 * layout.n_head * n_cells * n_ubatch + 12 * n_ubatch * n_embd
        body_bytes = max(body_bytes, scores)
    mask_bytes = (2 if flash_attn else 4) * (n_cells + n_cells_swa) * n_ubatch
    output_bytes = 4 * (n_outputs * layout.n_vocab + 2 * n_ubatch * n_embd)
    per_layer_bytes = 4 * n_ubatch * len(layout.layers) * layout.n_embd_per_layer
    return max(body_bytes + mask_bytes, output_bytes) + per_layer_bytes


def _split_weights(info: ModelInfo, n_layers: int) -> tuple[tuple[int, ...], int, int, int]:
    """(bytes of each layer, of the input tensors, of all others, of blocks that are not loaded)."""
    layers = [0] * n_layers
    inputs = others = skipped = 0
    for tensor in info.header.tensors:
        block = _BLOCK.match(tensor.name)
        if block is None:
            if _INPUT_TENSORS.match(tensor.name):
                inputs += tensor.n_bytes
            else:
                others += tensor.n_bytes
        elif int(block[1]) < n_layers:
            layers[int(block[1])] += tensor.n_bytes
        else:
            skipped += tensor.n_bytes
    if not info.header.tensors:
        others = info.tensor_bytes
    return tuple(layers), inputs, others, skipped


def _repack_bytes(info: ModelInfo) -> int:
    return sum(
        tensor.n_bytes
        for tensor in info.header.tensors
        if tensor.type_name.upper() in _REPACKABLE
        and len(tensor.shape) >= 2
        and not _INPUT_TENSORS.match(tensor.name)
    )


def _estimate_by_size(info: ModelInfo, n_ctx: int) -> Estimate:
    """File size and a twentieth more, and a KV cache as if every layer kept all heads."""
    metadata = info.header.metadata

    def number(key: str) -> int:
        value = metadata.get(f"{info.architecture}.{key}")
        return value if isinstance(value, int) and 0 <= value < 1 << 20 else 0

    n_layers, n_embd = info.n_layers or 0, info.n_embd or 0
    n_head = number("attention.head_count")
    n_head_kv = number("attention.head_count_kv") or n_head
    d_head = number("attention.key_length") or (n_embd // n_head if n_head else 0)
    width = n_head_kv * d_head or n_embd
    return Estimate(
        weights_bytes=info.n_bytes * 21 // 20,
        output_bytes=info.n_bytes * 21 // 20,
        kv_bytes=2 * n_layers * width * 2 * _pad(n_ctx),
        compute_bytes=256 * MIB,
        overhead_bytes=_HOST_BYTES + _VOCAB_ENTRY_BYTES * (info.n_vocab or 0),
        source="filesize",
        notes=(f"the architecture {info.architecture!r} is not known here: a rough upper bound",),
    )


def _tensor_bytes(info: ModelInfo, name: str) -> int:
    return next((tensor.n_bytes for tensor in info.header.tensors if tensor.name == name), 0)


def _row(kv_type: KvType, n_values: int) -> int:
    n_block, n_bytes = KV_BLOCKS[kv_type]
    return n_values * n_bytes // n_block


def _pad(n_cells: int) -> int:
    return max(1, -(-n_cells // _PAD)) * _PAD

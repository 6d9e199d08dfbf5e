"""Memory that a model needs, in closed form from its header. Pure.

Checked against llama.cpp's own allocator: weights and KV cache come out the same to the byte for
the architectures that `layers` knows, the compute buffer within about a tenth.
"""

from __future__ import annotations

from llmrun.fit.layers import Layer, Layout, read_layout
from llmrun.fit.types import KV_BLOCKS, MIB, Estimate, KvType, Setup, pad_cells
from llmrun.fit.weights import split_weights
from llmrun.gguf.types import ModelInfo

# Python, the libraries, and tables that are not in any buffer; then the vocabulary, measured.
_HOST_BYTES = 64 * MIB
_VOCAB_ENTRY_BYTES = 160
_PROJECTOR_BYTES = 512 * MIB


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
        return _estimate_by_size(info, setup)
    return _estimate_by_layout(info, layout, setup)


def allows_kv_type(info: ModelInfo, kv_type: KvType) -> bool:
    """Whether the model's heads are whole blocks of `kv_type`; llama.cpp refuses it otherwise."""
    layout = read_layout(info)
    if layout is None:
        return KV_BLOCKS[kv_type][0] == 1
    return all(size % KV_BLOCKS[kv_type][0] == 0 for size in layout.head_sizes)


def has_recurrent_state(info: ModelInfo) -> bool:
    """Whether a part of the model is a state that cannot go back. False where the build is not
    known, which counts no less memory."""
    layout = read_layout(info)
    return layout is not None and any(layer.state_values for layer in layout.layers)


def needs_one_kv_type(info: ModelInfo) -> bool:
    """Whether llama.cpp refuses keys and values of different types: where both are one latent."""
    layout = read_layout(info)
    return layout is not None and layout.n_latent > 0


def _estimate_by_layout(info: ModelInfo, layout: Layout, setup: Setup) -> Estimate:
    n_seq = setup.n_seq_max
    n_streams = 1 if setup.kv_unified else n_seq
    n_cells = pad_cells(setup.n_ctx_seq)
    # No more tokens are computed at once than the context was asked to hold.
    n_ubatch = min(setup.n_ubatch, max(1, setup.n_ctx))
    window = layout.n_swa * (n_seq if setup.kv_unified else 1) + n_ubatch
    n_cells_swa = min(n_cells, pad_cells(window))
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
    n_outputs = min(n_ubatch, max(setup.n_outputs_max, n_seq))
    has_attention = layout.is_encoder or any(layer.k_width for layer in layout.layers)
    compute = _compute_bytes(
        layout,
        n_cells=n_cells if has_attention else 0,
        n_cells_swa=n_cells_swa if layout.n_swa else 0,
        n_ubatch=n_ubatch,
        flash_attn=flash_attn,
        n_outputs=n_outputs,
        n_seq=n_seq,
    )
    weights = split_weights(info, len(layout.layers), use_repack=setup.use_repack)
    notes = []
    if weights.skipped:
        notes.append("the multi-token-prediction layers are not loaded")
    if weights.lazy:
        notes.append("the per-layer embeddings are read from the file as they are needed")
    return Estimate(
        weights_bytes=weights.total,
        kv_bytes=sum(layer_kv),
        compute_bytes=compute,
        # The output rows lie a second time in a buffer of their own.
        overhead_bytes=_HOST_BYTES + (_VOCAB_ENTRY_BYTES + 4 * n_outputs) * layout.n_vocab,
        source="formula",
        notes=tuple(notes),
        repack_bytes=weights.repack,
        layer_weights=weights.layers,
        layer_kv=layer_kv,
        layer_experts=weights.experts,
        input_bytes=weights.inputs,
        output_bytes=weights.outputs,
        tied_bytes=weights.tied,
        aliased_bytes=weights.aliased,
        lazy_bytes=weights.lazy,
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
    n_seq: int,
) -> int:
    """The widest point of a step's graph: a feed-forward block, attention with all its scores, or
    the output rows. Cells are those of one stream.

    Counted in values a token that are alive at once, after llama.cpp's graphs; how many rows of
    n_embd stay beside them was fitted to what its allocator says. Where a family keeps fewer, the
    count is a little high rather than low.
    """
    n_embd = layout.n_embd
    n_per_layer = len(layout.layers) * layout.n_embd_per_layer
    widest = 3 * layout.n_ff + layout.n_residuals * n_embd
    if layout.n_expert_used:
        routed = layout.n_expert_used * (3 * layout.n_ff_expert + n_embd)
        shared = 3 * layout.n_ff_shared
        widest = max(widest, max(routed, shared) + 5 * n_embd)
    body_bytes = 4 * n_ubatch * (widest + n_per_layer)
    if layout.n_inner:
        # A Mamba or delta-net block: its input, gate, convolution and scan, and the new states.
        states = n_seq * max(layer.state_values for layer in layout.layers)
        scan = 6 * layout.n_inner + 2 * n_embd + layout.n_scan
        body_bytes = max(body_bytes, 4 * (n_ubatch * scan + states))
    if not flash_attn:
        kv_width = max((layer.k_width + layer.v_width for layer in layout.layers), default=0)
        around = 3 * (n_embd + layout.n_query) + kv_width + 2 * n_per_layer
        scores = 4 * n_ubatch * (layout.n_head * n_cells + around)
        body_bytes = max(body_bytes, scores + 2 * layout.n_latent * n_cells)
    mask_bytes = (2 if flash_attn else 4) * (n_cells + n_cells_swa) * n_ubatch
    # An encoder ends in its rows; it has no outputs over the vocabulary.
    n_logits = 0 if layout.is_encoder else n_outputs * layout.n_vocab
    output_bytes = 4 * (n_logits + n_ubatch * (4 * n_embd + n_per_layer))
    return max(body_bytes + mask_bytes, output_bytes)


def _estimate_by_size(info: ModelInfo, setup: Setup) -> Estimate:
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
    n_cells = pad_cells(setup.n_ctx_seq) * (1 if setup.kv_unified else setup.n_seq_max)
    return Estimate(
        weights_bytes=info.n_bytes * 21 // 20,
        output_bytes=info.n_bytes * 21 // 20,
        kv_bytes=2 * n_layers * width * 2 * n_cells,
        compute_bytes=256 * MIB,
        overhead_bytes=_HOST_BYTES + _VOCAB_ENTRY_BYTES * (info.n_vocab or 0),
        source="filesize",
        notes=(f"the architecture {info.architecture!r} is not known here: a rough upper bound",),
    )


def _row(kv_type: KvType, n_values: int) -> int:
    n_block, n_bytes = KV_BLOCKS[kv_type]
    return n_values * n_bytes // n_block

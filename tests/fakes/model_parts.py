"""Metadata and tensors that many families of models have (for `model_families`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]
Tensors = list[tuple[str, Shape]]


@dataclass(frozen=True, slots=True)
class Family:
    """A model's header before its quant: keys without the architecture's prefix, tensors with their
    shapes in ggml's order. `experts_type`: the experts are stored so, whatever the quant.
    `tables`: types of the embedding tables as published files have them, by quant and name, where
    they are not what the quantiser would choose today."""

    architecture: str
    keys: Mapping[str, object]
    tensors: Tensors
    experts_type: str | None = None
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def end_tensors(n_embd: int, n_vocab: int, *, tied: bool, norm: str = "output_norm") -> Tensors:
    ends = [("token_embd.weight", (n_embd, n_vocab)), (f"{norm}.weight", (n_embd,))]
    return ends if tied else [*ends, ("output.weight", (n_embd, n_vocab))]


def attention_tensors(
    b: str, n_embd: int, n_head: int, n_kv: int, d: int, *, qk_norm: bool
) -> Tensors:
    tensors = [
        (f"{b}attn_norm.weight", (n_embd,)),
        (f"{b}attn_q.weight", (n_embd, n_head * d)),
        (f"{b}attn_k.weight", (n_embd, n_kv * d)),
        (f"{b}attn_v.weight", (n_embd, n_kv * d)),
        (f"{b}attn_output.weight", (n_head * d, n_embd)),
    ]
    if qk_norm:
        tensors += [(f"{b}attn_q_norm.weight", (d,)), (f"{b}attn_k_norm.weight", (d,))]
    return tensors


def feed_forward_tensors(b: str, n_embd: int, n_ff: int, suffix: str = "") -> Tensors:
    return [
        (f"{b}ffn_gate{suffix}.weight", (n_embd, n_ff)),
        (f"{b}ffn_up{suffix}.weight", (n_embd, n_ff)),
        (f"{b}ffn_down{suffix}.weight", (n_ff, n_embd)),
    ]


def expert_tensors(b: str, n_embd: int, n_ff: int, n_expert: int) -> Tensors:
    return [
        (f"{b}ffn_gate_inp.weight", (n_embd, n_expert)),
        (f"{b}ffn_gate_exps.weight", (n_embd, n_ff, n_expert)),
        (f"{b}ffn_up_exps.weight", (n_embd, n_ff, n_expert)),
        (f"{b}ffn_down_exps.weight", (n_ff, n_embd, n_expert)),
    ]


def common_keys(
    n_layers: int, n_ctx: int, n_embd: int, n_ff: int | list[int], n_vocab: int
) -> dict[str, object]:
    return {
        "block_count": n_layers,
        "context_length": n_ctx,
        "embedding_length": n_embd,
        "feed_forward_length": n_ff,
        "vocab_size": n_vocab,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }


def head_keys(n_head: int, n_kv: int | list[int], d: int) -> dict[str, object]:
    return {
        "attention.head_count": n_head,
        "attention.head_count_kv": n_kv,
        "attention.key_length": d,
        "attention.value_length": d,
        "rope.dimension_count": d,
        "rope.freq_base": 1_000_000.0,
    }

"""Gemma 3, 3n and 4, layer by layer (for `model_families`)."""

from __future__ import annotations

from dataclasses import dataclass

from tests.fakes.model_parts import (
    Family,
    Tensors,
    attention_tensors,
    common_keys,
    end_tensors,
    feed_forward_tensors,
    head_keys,
)


def gemma3() -> Family:
    n_embd, n_ff, n_vocab = 2560, 10240, 262208
    keys = common_keys(34, 131072, n_embd, n_ff, n_vocab) | head_keys(8, 4, 256)
    keys |= {"attention.sliding_window": 1024, "rope.scaling.type": "linear"}
    keys |= {"rope.scaling.factor": 8.0}
    tensors = end_tensors(n_embd, n_vocab, tied=True)
    for i in range(34):
        b = f"blk.{i}."
        tensors += attention_tensors(b, n_embd, 8, 4, 256, qk_norm=True)
        tensors += [
            (f"{b}post_attention_norm.weight", (n_embd,)),
            (f"{b}ffn_norm.weight", (n_embd,)),
            *feed_forward_tensors(b, n_embd, n_ff),
            (f"{b}post_ffw_norm.weight", (n_embd,)),
        ]
    return Family("gemma3", keys, tensors)


def _per_layer_ends(n_embd: int, n_layers: int, n_vocab: int) -> Tensors:
    return [
        ("per_layer_token_embd.weight", (256 * n_layers, n_vocab)),
        ("per_layer_model_proj.weight", (n_embd, 256 * n_layers)),
        ("per_layer_proj_norm.weight", (256,)),
    ]


def _per_layer(b: str, n_embd: int) -> Tensors:
    return [
        (f"{b}inp_gate.weight", (n_embd, 256)),
        (f"{b}proj.weight", (256, n_embd)),
        (f"{b}post_norm.weight", (n_embd,)),
    ]


def gemma3n() -> Family:
    n_layers, n_embd, n_ff, n_vocab = 35, 2048, 16384, 262144
    keys = common_keys(n_layers, 32768, n_embd, n_ff, n_vocab) | head_keys(8, 2, 256)
    keys |= {
        "attention.sliding_window": 512,
        "attention.sliding_window_pattern": [i % 5 != 4 for i in range(n_layers)],
        "attention.shared_kv_layers": 15,
        "embedding_length_per_layer_input": 256,
        "altup.active_idx": 0,
        "altup.num_inputs": 4,
    }
    tensors = end_tensors(n_embd, n_vocab, tied=True) + _per_layer_ends(n_embd, n_layers, n_vocab)
    tensors += [
        ("altup_proj.weight", (n_embd, n_embd, 3)),
        ("altup_unembd_proj.weight", (n_embd, n_embd, 3)),
    ]
    for i in range(n_layers):
        b = f"blk.{i}."
        tensors += attention_tensors(b, n_embd, 8, 2, 256, qk_norm=True)
        tensors += [
            (f"{b}post_attention_norm.weight", (n_embd,)),
            (f"{b}ffn_norm.weight", (n_embd,)),
            *feed_forward_tensors(b, n_embd, n_ff),
            (f"{b}post_ffw_norm.weight", (n_embd,)),
            *_per_layer(b, n_embd),
            (f"{b}altup_correct_coef.weight", (4, 4)),
            (f"{b}altup_correct_scale.weight", (n_embd,)),
            (f"{b}altup_predict_coef.weight", (4, 16)),
            (f"{b}altup_router.weight", (n_embd, 4)),
            (f"{b}altup_router_norm.weight", (n_embd,)),
            (f"{b}laurel_l.weight", (n_embd, 64)),
            (f"{b}laurel_r.weight", (64, n_embd)),
            (f"{b}laurel_post_norm.weight", (n_embd,)),
        ]
    return Family("gemma3n", keys, tensors)


@dataclass(frozen=True, slots=True)
class Gemma4:
    """`n_kv`: KV heads of the full and of the sliding layers. `k_is_v`: the full layers have no
    values of their own."""

    n_layers: int
    period: int
    n_ctx: int
    n_embd: int
    n_ff: int | list[int]
    n_head: int
    n_kv: tuple[int, int]
    window: int
    n_shared: int = 0
    has_per_layer: bool = False
    k_is_v: bool = False
    n_expert: int = 0
    n_ff_expert: int = 0


def gemma4(model: Gemma4) -> Family:
    n_layers, n_embd, n_vocab = model.n_layers, model.n_embd, 262144
    sliding = [(i + 1) % model.period != 0 for i in range(n_layers)]
    keys = common_keys(n_layers, model.n_ctx, n_embd, model.n_ff, n_vocab)
    keys |= head_keys(model.n_head, [model.n_kv[is_swa] for is_swa in sliding], 512)
    keys |= {
        "attention.key_length_swa": 256,
        "attention.value_length_swa": 256,
        "rope.dimension_count_swa": 256,
        "rope.freq_base_swa": 10_000.0,
        "attention.sliding_window": model.window,
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": model.n_shared,
        "embedding_length_per_layer_input": 256 if model.has_per_layer else 0,
        "final_logit_softcapping": 30.0,
    }
    if model.n_expert:
        keys |= {
            "expert_count": model.n_expert,
            "expert_used_count": 8,
            "expert_feed_forward_length": model.n_ff_expert,
        }
    tensors = [*end_tensors(n_embd, n_vocab, tied=True), ("rope_freqs.weight", (256,))]
    if model.has_per_layer:
        tensors += _per_layer_ends(n_embd, n_layers, n_vocab)
    for i, is_swa in enumerate(sliding):
        b, d = f"blk.{i}.", 256 if is_swa else 512
        attention = attention_tensors(b, n_embd, model.n_head, model.n_kv[is_swa], d, qk_norm=True)
        if model.k_is_v and not is_swa:
            attention = [pair for pair in attention if "attn_v." not in pair[0]]
        n_ff = model.n_ff[i] if isinstance(model.n_ff, list) else model.n_ff
        tensors += [
            *attention,
            (f"{b}post_attention_norm.weight", (n_embd,)),
            (f"{b}layer_output_scale.weight", (1,)),
            (f"{b}ffn_norm.weight", (n_embd,)),
            *feed_forward_tensors(b, n_embd, n_ff),
            (f"{b}post_ffw_norm.weight", (n_embd,)),
        ]
        if model.n_expert:
            n_expert, n_ff_expert = model.n_expert, model.n_ff_expert
            tensors += [
                (f"{b}ffn_gate_inp.weight", (n_embd, n_expert)),
                (f"{b}ffn_gate_inp.scale", (n_embd,)),
                (f"{b}pre_ffw_norm_2.weight", (n_embd,)),
                (f"{b}post_ffw_norm_1.weight", (n_embd,)),
                (f"{b}post_ffw_norm_2.weight", (n_embd,)),
                (f"{b}ffn_gate_up_exps.weight", (n_embd, 2 * n_ff_expert, n_expert)),
                (f"{b}ffn_down_exps.weight", (n_ff_expert, n_embd, n_expert)),
                (f"{b}ffn_down_exps.scale", (n_expert,)),
            ]
        if model.has_per_layer:
            tensors += _per_layer(b, n_embd)
    tables = {"q4_0": {"token_embd.weight": "Q8_0", "per_layer_token_embd.weight": "Q4_0"}}
    if model.has_per_layer:
        tables["q4_k_m"] = {"per_layer_token_embd.weight": "Q5_K"}
    elif not model.n_expert:
        tables["q4_k_m"] = {"token_embd.weight": "Q4_K"}
    return Family("gemma4", keys, tensors, tables=tables)


E2B = Gemma4(
    35, 5, 131072, 1536, [6144] * 15 + [12288] * 20, 8, (1, 1), 512, 20, has_per_layer=True
)
E4B = Gemma4(42, 6, 131072, 2560, 10240, 8, (2, 2), 512, 18, has_per_layer=True)
M12B = Gemma4(48, 6, 262144, 3840, 15360, 16, (1, 8), 1024, k_is_v=True)
M26B = Gemma4(
    30, 6, 262144, 2816, 2112, 16, (2, 8), 1024, k_is_v=True, n_expert=128, n_ff_expert=704
)
M31B = Gemma4(60, 6, 262144, 5376, 21504, 32, (4, 16), 1024, k_is_v=True)

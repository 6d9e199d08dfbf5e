"""Metadata and tensor names of real models, layer by layer (for `model_shapes`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.fakes.model_gemma import E2B, E4B, M12B, M26B, M31B, gemma3, gemma3n, gemma4
from tests.fakes.model_parts import (
    Family,
    Tensors,
    attention_tensors,
    common_keys,
    end_tensors,
    expert_tensors,
    feed_forward_tensors,
    head_keys,
)


def _llama() -> Family:
    n_embd, n_ff, n_vocab = 4096, 14336, 128256
    keys = common_keys(32, 131072, n_embd, n_ff, n_vocab) | head_keys(32, 8, 128)
    tensors = [*end_tensors(n_embd, n_vocab, tied=False), ("rope_freqs.weight", (64,))]
    for i in range(32):
        b = f"blk.{i}."
        tensors += attention_tensors(b, n_embd, 32, 8, 128, qk_norm=False)
        tensors += [(f"{b}ffn_norm.weight", (n_embd,)), *feed_forward_tensors(b, n_embd, n_ff)]
    return Family("llama", keys, tensors)


def _qwen3moe() -> Family:
    n_layers, n_embd, n_vocab = 48, 2048, 151936
    keys = common_keys(n_layers, 40960, n_embd, 6144, n_vocab) | head_keys(32, 4, 128)
    keys |= {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768}
    tensors = end_tensors(n_embd, n_vocab, tied=False)
    for i in range(n_layers):
        b = f"blk.{i}."
        tensors += attention_tensors(b, n_embd, 32, 4, 128, qk_norm=True)
        tensors += [(f"{b}ffn_norm.weight", (n_embd,)), *expert_tensors(b, n_embd, 768, 128)]
    return Family("qwen3moe", keys, tensors)


def _delta_net(b: str, n_embd: int, n_group: int, n_rank: int, n_state: int) -> Tensors:
    keys, values = n_group * n_state, n_rank * n_state
    return [
        (f"{b}attn_norm.weight", (n_embd,)),
        (f"{b}attn_qkv.weight", (n_embd, 2 * keys + values)),
        (f"{b}attn_gate.weight", (n_embd, values)),
        (f"{b}ssm_conv1d.weight", (4, 2 * keys + values)),
        (f"{b}ssm_dt.bias", (n_rank,)),
        (f"{b}ssm_a", (n_rank,)),
        (f"{b}ssm_beta.weight", (n_embd, n_rank)),
        (f"{b}ssm_alpha.weight", (n_embd, n_rank)),
        (f"{b}ssm_norm.weight", (n_state,)),
        (f"{b}ssm_out.weight", (values, n_embd)),
    ]


def _qwen35(n_layers: int, n_embd: int, n_head: int, n_kv: int, n_ff: int, n_rank: int) -> Family:
    """Three gated delta nets to one attention layer. `n_ff` 0: 256 experts of 512 values."""
    n_vocab = 248320
    keys = common_keys(n_layers, 262144, n_embd, n_ff or 512, n_vocab) | head_keys(
        n_head, n_kv, 256
    )
    keys |= {
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 128 * n_rank,
        "ssm.state_size": 128,
        "ssm.time_step_rank": n_rank,
        "ssm.group_count": 16,
        "full_attention_interval": 4,
    }
    if not n_ff:
        keys |= {"expert_count": 256, "expert_used_count": 8, "expert_feed_forward_length": 512}
        keys |= {"expert_shared_feed_forward_length": 512}
    tensors = end_tensors(n_embd, n_vocab, tied=False)
    for i in range(n_layers):
        b = f"blk.{i}."
        if (i + 1) % 4 == 0:
            attention = attention_tensors(b, n_embd, n_head, n_kv, 256, qk_norm=True)
            # The query's projection brings a gate with it.
            attention[1] = (f"{b}attn_q.weight", (n_embd, 2 * n_head * 256))
            tensors += attention
        else:
            tensors += _delta_net(b, n_embd, 16, n_rank, 128)
        tensors.append((f"{b}post_attention_norm.weight", (n_embd,)))
        if n_ff:
            tensors += feed_forward_tensors(b, n_embd, n_ff)
        else:
            tensors += expert_tensors(b, n_embd, 512, 256)
            tensors.append((f"{b}ffn_gate_inp_shexp.weight", (n_embd,)))
            tensors += feed_forward_tensors(b, n_embd, 512, "_shexp")
    return Family("qwen35" if n_ff else "qwen35moe", keys, tensors)


def _gpt_oss() -> Family:
    n_layers, n_embd, n_vocab = 24, 2880, 201088
    keys = common_keys(n_layers, 131072, n_embd, 2880, n_vocab) | head_keys(64, 8, 64)
    keys |= {
        "expert_count": 32,
        "expert_used_count": 4,
        "expert_feed_forward_length": 2880,
        "attention.sliding_window": 128,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
    }
    tensors = end_tensors(n_embd, n_vocab, tied=False)
    for i in range(n_layers):
        b = f"blk.{i}."
        tensors += attention_tensors(b, n_embd, 64, 8, 64, qk_norm=False)
        tensors += [
            (f"{b}attn_q.bias", (4096,)),
            (f"{b}attn_k.bias", (512,)),
            (f"{b}attn_v.bias", (512,)),
            (f"{b}attn_output.bias", (n_embd,)),
            (f"{b}attn_sinks.weight", (64,)),
            (f"{b}post_attention_norm.weight", (n_embd,)),
            *expert_tensors(b, n_embd, 2880, 32),
            (f"{b}ffn_gate_inp.bias", (32,)),
            (f"{b}ffn_gate_exps.bias", (2880, 32)),
            (f"{b}ffn_up_exps.bias", (2880, 32)),
            (f"{b}ffn_down_exps.bias", (n_embd, 32)),
        ]
    return Family("gpt-oss", keys, tensors, experts_type="MXFP4")


def _deepseek2() -> Family:
    n_layers, n_embd, n_head, n_vocab = 27, 2048, 16, 102400
    keys = common_keys(n_layers, 163840, n_embd, 10944, n_vocab)
    keys |= {
        "attention.head_count": n_head,
        "attention.head_count_kv": 1,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "attention.kv_lora_rank": 512,
        "rope.dimension_count": 64,
        "rope.freq_base": 10_000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096,
        "rope.scaling.yarn_log_multiplier": 0.0707,
        "leading_dense_block_count": 1,
        "expert_count": 64,
        "expert_used_count": 6,
        "expert_feed_forward_length": 1408,
        "expert_shared_count": 2,
        "expert_weights_scale": 1.0,
    }
    tensors = end_tensors(n_embd, n_vocab, tied=False)
    for i in range(n_layers):
        b = f"blk.{i}."
        tensors += [
            (f"{b}attn_norm.weight", (n_embd,)),
            (f"{b}attn_q.weight", (n_embd, n_head * 192)),
            (f"{b}attn_kv_a_mqa.weight", (n_embd, 576)),
            (f"{b}attn_kv_a_norm.weight", (512,)),
            (f"{b}attn_k_b.weight", (128, 512, n_head)),
            (f"{b}attn_v_b.weight", (512, 128, n_head)),
            (f"{b}attn_output.weight", (n_head * 128, n_embd)),
            (f"{b}ffn_norm.weight", (n_embd,)),
        ]
        if i == 0:
            tensors += feed_forward_tensors(b, n_embd, 10944)
        else:
            tensors += expert_tensors(b, n_embd, 1408, 64)
            tensors += feed_forward_tensors(b, n_embd, 2816, "_shexp")
    return Family("deepseek2", keys, tensors)


def _mamba1(b: str, n_embd: int, *, norms: bool) -> Tensors:
    """A Mamba block of expansion 2, state 16 and the usual rank of n_embd / 16."""
    inner, rank = 2 * n_embd, n_embd // 16
    tensors = [
        (f"{b}attn_norm.weight", (n_embd,)),
        (f"{b}ssm_in.weight", (n_embd, 2 * inner)),
        (f"{b}ssm_conv1d.weight", (4, inner)),
        (f"{b}ssm_conv1d.bias", (inner,)),
        (f"{b}ssm_x.weight", (inner, rank + 32)),
        (f"{b}ssm_dt.weight", (rank, inner)),
        (f"{b}ssm_dt.bias", (inner,)),
        (f"{b}ssm_a", (16, inner)),
        (f"{b}ssm_d", (inner,)),
        (f"{b}ssm_out.weight", (inner, n_embd)),
    ]
    if norms:
        tensors += [(f"{b}ssm_{n}_norm.weight", (w,)) for n, w in (("dt", rank), ("b", 16))]
        tensors.append((f"{b}ssm_c_norm.weight", (16,)))
    return tensors


def _ssm_keys(n_inner: int, n_state: int, n_rank: int, n_group: int = 0) -> dict[str, object]:
    keys: dict[str, object] = {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": n_inner,
        "ssm.state_size": n_state,
        "ssm.time_step_rank": n_rank,
    }
    return keys | ({"ssm.group_count": n_group} if n_group else {})


def _mamba() -> Family:
    n_embd, n_vocab = 2560, 50280
    keys = common_keys(64, 1_048_576, n_embd, 0, n_vocab) | _ssm_keys(5120, 16, 160)
    keys |= {"attention.head_count": 0}
    tensors = end_tensors(n_embd, n_vocab, tied=True)
    for i in range(64):
        tensors += _mamba1(f"blk.{i}.", n_embd, norms=False)
    return Family("mamba", keys, tensors)


def _lfm2() -> Family:
    n_embd, n_ff, n_vocab = 2048, 8192, 65536
    n_kv = [8 if i in (2, 5, 8, 10, 12, 14) else 0 for i in range(16)]
    keys = common_keys(16, 128000, n_embd, n_ff, n_vocab)
    keys |= {
        "attention.head_count": 32,
        "attention.head_count_kv": n_kv,
        "shortconv.l_cache": 3,
        "rope.freq_base": 1_000_000.0,
    }
    tensors = end_tensors(n_embd, n_vocab, tied=True, norm="token_embd_norm")
    for i, heads in enumerate(n_kv):
        b = f"blk.{i}."
        if heads:
            tensors += attention_tensors(b, n_embd, 32, heads, 64, qk_norm=True)
        else:
            tensors += [
                (f"{b}attn_norm.weight", (n_embd,)),
                (f"{b}shortconv.conv.weight", (3, n_embd)),
                (f"{b}shortconv.in_proj.weight", (n_embd, 3 * n_embd)),
                (f"{b}shortconv.out_proj.weight", (n_embd, n_embd)),
            ]
        tensors += [(f"{b}ffn_norm.weight", (n_embd,)), *feed_forward_tensors(b, n_embd, n_ff)]
    return Family("lfm2", keys, tensors)


def _jamba() -> Family:
    n_embd, n_ff, n_vocab = 2560, 8192, 65536
    n_kv = [1 if i % 14 == 12 else 0 for i in range(28)]
    keys = common_keys(28, 262144, n_embd, n_ff, n_vocab) | _ssm_keys(5120, 16, 160)
    keys |= {"attention.head_count": 20, "attention.head_count_kv": n_kv}
    tensors = end_tensors(n_embd, n_vocab, tied=True)
    for i, heads in enumerate(n_kv):
        b = f"blk.{i}."
        if heads:
            tensors += attention_tensors(b, n_embd, 20, heads, 128, qk_norm=False)
        else:
            tensors += _mamba1(b, n_embd, norms=True)
        tensors += [(f"{b}ffn_norm.weight", (n_embd,)), *feed_forward_tensors(b, n_embd, n_ff)]
    return Family("jamba", keys, tensors)


def _mamba2(b: str, n_embd: int, n_inner: int, n_state: int, n_rank: int, n_group: int) -> Tensors:
    conv = n_inner + 2 * n_group * n_state
    return [
        (f"{b}attn_norm.weight", (n_embd,)),
        (f"{b}ssm_in.weight", (n_embd, n_inner + conv + n_rank)),
        (f"{b}ssm_conv1d.weight", (4, conv)),
        (f"{b}ssm_conv1d.bias", (conv,)),
        (f"{b}ssm_dt.bias", (n_rank,)),
        (f"{b}ssm_a", (1, n_rank)),
        (f"{b}ssm_d", (1, n_rank)),
        (f"{b}ssm_norm.weight", (n_inner // n_group, n_group)),
        (f"{b}ssm_out.weight", (n_inner, n_embd)),
    ]


def _granite_hybrid() -> Family:
    n_embd, n_vocab = 1536, 100352
    n_kv = [4 if i in (5, 15, 25, 35) else 0 for i in range(40)]
    keys = common_keys(40, 131072, n_embd, 512, n_vocab) | _ssm_keys(3072, 128, 48, 1)
    keys |= {
        "attention.head_count": 12,
        "attention.head_count_kv": n_kv,
        "rope.dimension_count": 128,
        "expert_count": 64,
        "expert_used_count": 6,
        "expert_shared_feed_forward_length": 1024,
    }
    tensors = end_tensors(n_embd, n_vocab, tied=True)
    for i, heads in enumerate(n_kv):
        b = f"blk.{i}."
        if heads:
            tensors += attention_tensors(b, n_embd, 12, heads, 128, qk_norm=False)
        else:
            tensors += _mamba2(b, n_embd, 3072, 128, 48, 1)
        tensors += [(f"{b}ffn_norm.weight", (n_embd,)), *expert_tensors(b, n_embd, 512, 64)]
        tensors += feed_forward_tensors(b, n_embd, 1024, "_shexp")
    return Family("granitehybrid", keys, tensors)


def _nemotron_h() -> Family:
    """Each layer is only one of a Mamba 2 block (M), attention (*) or a feed-forward block (-)."""
    pattern = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
    n_embd, n_ff, n_vocab = 4480, 15680, 131072
    n_kv = [8 if kind == "*" else 0 for kind in pattern]
    keys = common_keys(
        len(pattern), 131072, n_embd, [n_ff if k == "-" else 0 for k in pattern], n_vocab
    )
    keys |= head_keys(40, n_kv, 128) | _ssm_keys(10240, 128, 128, 8)
    keys |= {"attention.layer_norm_epsilon": 1e-5}
    tensors = end_tensors(n_embd, n_vocab, tied=False)
    for i, kind in enumerate(pattern):
        b = f"blk.{i}."
        if kind == "M":
            tensors += _mamba2(b, n_embd, 10240, 128, 128, 8)
        elif kind == "*":
            tensors += attention_tensors(b, n_embd, 40, 8, 128, qk_norm=False)
        else:
            tensors += [
                (f"{b}attn_norm.weight", (n_embd,)),
                (f"{b}ffn_up.weight", (n_embd, n_ff)),
                (f"{b}ffn_down.weight", (n_ff, n_embd)),
            ]
    return Family("nemotron_h", keys, tensors)


FAMILIES: Mapping[str, Callable[[], Family]] = {
    "gemma-4-e2b": lambda: gemma4(E2B),
    "gemma-4-e4b": lambda: gemma4(E4B),
    "gemma-4-12b": lambda: gemma4(M12B),
    "gemma-4-26b-a4b": lambda: gemma4(M26B),
    "gemma-4-31b": lambda: gemma4(M31B),
    "gemma-3-4b": gemma3,
    "gemma-3n-e4b": gemma3n,
    "llama-3.1-8b": _llama,
    "qwen3-30b-a3b": _qwen3moe,
    "qwen3.5-35b-a3b": lambda: _qwen35(40, 2048, 16, 2, 0, 32),
    "qwen3.5-9b": lambda: _qwen35(32, 4096, 16, 4, 12288, 32),
    "qwen3.5-0.8b": lambda: _qwen35(24, 1024, 8, 2, 3584, 16),
    "gpt-oss-20b": _gpt_oss,
    "deepseek-v2-lite": _deepseek2,
    "mamba-2.8b": _mamba,
    "lfm2-1.2b": _lfm2,
    "jamba-3b": _jamba,
    "granite-4-tiny": _granite_hybrid,
    "nemotron-nano-9b": _nemotron_h,
}

"""A tiny random mixture of experts (qwen3moe): one that can really be decoded."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

from tests.fakes.gguf_builder import GgufBuilder, _tiny_vocabulary

F32 = 0


def tiny_moe(path: Path, *, n_vocab: int = 512, n_layers: int = 3, seed: int = 1) -> Path:
    """Write it to `path`. The same arguments give the same bytes."""
    n_embd, n_head, d_head, n_ff, n_expert = 64, 4, 16, 32, 8
    tokens, types = _tiny_vocabulary(n_vocab)
    builder = GgufBuilder("qwen3moe")
    builder.add("general.type", "model").add("general.name", "tiny moe")
    builder.add("general.file_type", 0).add("general.quantization_version", 2)
    for key, value in (
        ("block_count", n_layers),
        ("context_length", 2048),
        ("embedding_length", n_embd),
        ("feed_forward_length", n_ff),
        ("expert_feed_forward_length", n_ff),
        ("expert_count", n_expert),
        ("expert_used_count", 2),
        ("attention.head_count", n_head),
        ("attention.head_count_kv", 2),
        ("attention.key_length", d_head),
        ("attention.value_length", d_head),
        ("attention.layer_norm_rms_epsilon", 1e-5),
        ("rope.freq_base", 10000.0),
    ):
        builder.add(f"qwen3moe.{key}", value)
    builder.add("tokenizer.ggml.model", "llama").add("tokenizer.ggml.pre", "default")
    builder.add("tokenizer.ggml.tokens", tokens).add("tokenizer.ggml.token_type", types)
    scores = [len(token) * 100.0 - i if types[i] == 1 else 0.0 for i, token in enumerate(tokens)]
    builder.add("tokenizer.ggml.scores", scores)
    builder.add("tokenizer.ggml.bos_token_id", 1).add("tokenizer.ggml.eos_token_id", 2)
    builder.add("tokenizer.ggml.unknown_token_id", 0)

    rng = random.Random(seed)

    def tensor(name: str, shape: tuple[int, ...], values: list[float]) -> None:
        builder.tensor(f"{name}.weight", shape, F32, struct.pack(f"<{len(values)}f", *values))

    def normal(name: str, *shape: int) -> None:
        tensor(name, shape, [rng.gauss(0, 0.3) for _ in range(math.prod(shape))])

    def ones(name: str, n: int) -> None:
        tensor(name, (n,), [1.0] * n)

    normal("token_embd", n_embd, n_vocab)
    normal("output", n_embd, n_vocab)
    ones("output_norm", n_embd)
    for i in range(n_layers):
        b = f"blk.{i}"
        ones(f"{b}.attn_norm", n_embd)
        ones(f"{b}.ffn_norm", n_embd)
        ones(f"{b}.attn_q_norm", d_head)
        ones(f"{b}.attn_k_norm", d_head)
        normal(f"{b}.attn_q", n_embd, n_head * d_head)
        normal(f"{b}.attn_k", n_embd, 2 * d_head)
        normal(f"{b}.attn_v", n_embd, 2 * d_head)
        normal(f"{b}.attn_output", n_head * d_head, n_embd)
        normal(f"{b}.ffn_gate_inp", n_embd, n_expert)
        normal(f"{b}.ffn_gate_exps", n_embd, n_ff, n_expert)
        normal(f"{b}.ffn_up_exps", n_embd, n_ff, n_expert)
        normal(f"{b}.ffn_down_exps", n_ff, n_embd, n_expert)
    return builder.write(path)

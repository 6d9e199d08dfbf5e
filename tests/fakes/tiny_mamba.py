"""A tiny random Mamba: a model with a recurrent state, which no package carries."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from tests.fakes.gguf_builder import GgufBuilder, _tiny_vocabulary

F32 = 0


def tiny_mamba(path: Path, *, n_vocab: int = 512, n_layers: int = 2, seed: int = 1) -> Path:
    """Write it to `path`. The same arguments give the same bytes."""
    n_embd, n_inner, n_state, n_conv, n_rank = 64, 128, 16, 4, 4
    tokens, types = _tiny_vocabulary(n_vocab)
    builder = GgufBuilder("mamba")
    builder.add("general.type", "model").add("general.name", "tiny mamba")
    builder.add("general.file_type", 0).add("general.quantization_version", 2)
    builder.add("mamba.block_count", n_layers).add("mamba.context_length", 2048)
    builder.add("mamba.embedding_length", n_embd).add("mamba.feed_forward_length", 0)
    builder.add("mamba.attention.head_count", 0)
    builder.add("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    builder.add("mamba.ssm.conv_kernel", n_conv).add("mamba.ssm.inner_size", n_inner)
    builder.add("mamba.ssm.state_size", n_state).add("mamba.ssm.time_step_rank", n_rank)
    builder.add("tokenizer.ggml.model", "llama").add("tokenizer.ggml.pre", "default")
    builder.add("tokenizer.ggml.tokens", tokens).add("tokenizer.ggml.token_type", types)
    scores = [len(token) * 100.0 - i if types[i] == 1 else 0.0 for i, token in enumerate(tokens)]
    builder.add("tokenizer.ggml.scores", scores)
    builder.add("tokenizer.ggml.bos_token_id", 1).add("tokenizer.ggml.eos_token_id", 2)
    builder.add("tokenizer.ggml.unknown_token_id", 0)

    rng = random.Random(seed)

    def tensor(name: str, shape: tuple[int, ...], values: list[float]) -> None:
        builder.tensor(name, shape, F32, struct.pack(f"<{len(values)}f", *values))

    def normal(name: str, shape: tuple[int, ...], scale: float = 0.2) -> None:
        n = 1
        for dimension in shape:
            n *= dimension
        tensor(name, shape, [rng.gauss(0, scale) for _ in range(n)])

    normal("token_embd.weight", (n_embd, n_vocab), 0.5)
    tensor("output_norm.weight", (n_embd,), [1.0] * n_embd)
    for i in range(n_layers):
        block = f"blk.{i}"
        tensor(f"{block}.attn_norm.weight", (n_embd,), [1.0] * n_embd)
        normal(f"{block}.ssm_in.weight", (n_embd, 2 * n_inner))
        normal(f"{block}.ssm_conv1d.weight", (n_conv, n_inner))
        normal(f"{block}.ssm_conv1d.bias", (n_inner,))
        normal(f"{block}.ssm_x.weight", (n_inner, n_rank + 2 * n_state))
        normal(f"{block}.ssm_dt.weight", (n_rank, n_inner))
        normal(f"{block}.ssm_dt.bias", (n_inner,))
        # Decay rates: negative, so that the state fades.
        decays = [-float(1 + k) for k in range(n_state)] * n_inner
        tensor(f"{block}.ssm_a", (n_state, n_inner), decays)
        tensor(f"{block}.ssm_d", (n_inner,), [1.0] * n_inner)
        normal(f"{block}.ssm_out.weight", (n_inner, n_embd))
    return builder.write(path)

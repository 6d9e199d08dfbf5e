"""A tiny random qwen3: as a reranker with two labels, or without a classifier."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

from tests.fakes.gguf_builder import GgufBuilder, _tiny_vocabulary

F32 = 0
RERANK_TEMPLATE = "<|im_start|>judge\n{query}\n{document}<|im_end|>\nyes or no: "


def tiny_qwen3(
    path: Path,
    *,
    is_reranker: bool = True,
    labels: tuple[str, ...] = ("no", "yes"),
    metadata: dict[str, object] | None = None,
) -> Path:
    """Write it to `path`. The same arguments give the same bytes."""
    n_vocab, n_layers, n_embd, n_head, d_head, n_ff = 512, 2, 64, 4, 16, 96
    tokens, types = _tiny_vocabulary(n_vocab)
    builder = GgufBuilder("qwen3")
    builder.add("general.type", "model").add("general.name", "tiny qwen3")
    builder.add("general.file_type", 0).add("general.quantization_version", 2)
    for key, value in (
        ("block_count", n_layers),
        ("context_length", 2048),
        ("embedding_length", n_embd),
        ("feed_forward_length", n_ff),
        ("attention.head_count", n_head),
        ("attention.head_count_kv", 2),
        ("attention.key_length", d_head),
        ("attention.value_length", d_head),
        ("attention.layer_norm_rms_epsilon", 1e-5),
        ("rope.freq_base", 10000.0),
    ):
        builder.add(f"qwen3.{key}", value)
    if is_reranker:
        builder.add("qwen3.pooling_type", 4)
        builder.add("qwen3.classifier.output_labels", list(labels))
        builder.add("tokenizer.chat_template.rerank", RERANK_TEMPLATE)
    builder.add("tokenizer.ggml.model", "llama").add("tokenizer.ggml.pre", "default")
    builder.add("tokenizer.ggml.tokens", tokens).add("tokenizer.ggml.token_type", types)
    scores = [len(token) * 100.0 - i if types[i] == 1 else 0.0 for i, token in enumerate(tokens)]
    builder.add("tokenizer.ggml.scores", scores)
    builder.add("tokenizer.ggml.bos_token_id", 1).add("tokenizer.ggml.eos_token_id", 2)
    builder.add("tokenizer.ggml.unknown_token_id", 0)
    builder.add("tokenizer.ggml.add_space_prefix", False)
    for name, value in (metadata or {}).items():
        builder.add(name, value)

    rng = random.Random(3)

    def tensor(name: str, shape: tuple[int, ...], values: list[float]) -> None:
        builder.tensor(f"{name}.weight", shape, F32, struct.pack(f"<{len(values)}f", *values))

    def normal(name: str, *shape: int) -> None:
        tensor(name, shape, [rng.gauss(0, 0.2) for _ in range(math.prod(shape))])

    normal("token_embd", n_embd, n_vocab)
    tensor("output_norm", (n_embd,), [1.0] * n_embd)
    if is_reranker:
        normal("cls.output", n_embd, len(labels))
    for i in range(n_layers):
        b = f"blk.{i}"
        for name, n in (("attn_norm", n_embd), ("ffn_norm", n_embd)):
            tensor(f"{b}.{name}", (n,), [1.0] * n)
        for name in ("attn_q_norm", "attn_k_norm"):
            tensor(f"{b}.{name}", (d_head,), [1.0] * d_head)
        normal(f"{b}.attn_q", n_embd, n_head * d_head)
        normal(f"{b}.attn_k", n_embd, 2 * d_head)
        normal(f"{b}.attn_v", n_embd, 2 * d_head)
        normal(f"{b}.attn_output", n_head * d_head, n_embd)
        normal(f"{b}.ffn_gate", n_embd, n_ff)
        normal(f"{b}.ffn_up", n_embd, n_ff)
        normal(f"{b}.ffn_down", n_ff, n_embd)
    return builder.write(path)

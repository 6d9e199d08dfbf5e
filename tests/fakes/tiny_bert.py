"""A tiny random BERT with a WordPiece vocabulary, and what its rows must be, computed apart.

`TinyBert.rows` is the model in numpy: every token looks at every other one, which a causal or a
mixed-up batch would not give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.fakes.gguf_builder import GgufBuilder

PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = ("the", "cat", "dog", "sat", "ran", "on", "mat", "moon", "what", "is", "a")
N_EMBD, N_HEAD, N_FF, N_LAYERS = 32, 4, 64, 2


def vocabulary() -> tuple[list[str], list[int]]:
    """Words begin with U+2581; what goes on inside a word has nothing in front."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += [f"\u2581{word}" for word in (*WORDS, *letters, "?", ".", "[", "]")]
    tokens += letters
    tokens = list(dict.fromkeys(tokens))
    return tokens, [3, 2, 3, 3, 3] + [1] * (len(tokens) - 5)


@dataclass
class TinyBert:
    """`classifier`: a dense layer and an output with `n_classes` rows behind the first token."""

    n_ctx_train: int = 64
    pooling_type: int | None = 1
    classifier: bool = False
    n_classes: int = 1
    labels: tuple[str, ...] = ()
    seed: int = 1
    extra: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens, self.types = vocabulary()
        rng = np.random.default_rng(self.seed)
        self.weights: dict[str, Any] = {}

        def normal(name: str, n_out: int, n_in: int, scale: float = 0.3) -> None:
            self.weights[f"{name}.weight"] = rng.normal(0, scale, (n_out, n_in))

        def affine(name: str, n_out: int, n_in: int) -> None:
            normal(name, n_out, n_in)
            self.weights[f"{name}.bias"] = rng.normal(0, 0.1, n_out)

        def norm(name: str) -> None:
            self.weights[f"{name}.weight"] = rng.normal(1, 0.1, N_EMBD)
            self.weights[f"{name}.bias"] = rng.normal(0, 0.1, N_EMBD)

        normal("token_embd", len(self.tokens), N_EMBD, 1.0)
        normal("token_types", 2, N_EMBD, 0.5)
        normal("position_embd", self.n_ctx_train, N_EMBD, 0.5)
        norm("token_embd_norm")
        for i in range(N_LAYERS):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                affine(f"blk.{i}.{name}", N_EMBD, N_EMBD)
            norm(f"blk.{i}.attn_output_norm")
            affine(f"blk.{i}.ffn_up", N_FF, N_EMBD)
            affine(f"blk.{i}.ffn_down", N_EMBD, N_FF)
            norm(f"blk.{i}.layer_output_norm")
        if self.classifier:
            affine("cls", N_EMBD, N_EMBD)
            affine("cls.output", self.n_classes, N_EMBD)
        # What the file holds.
        self.weights = {name: value.astype(np.float32) for name, value in self.weights.items()}

    def write(self, path: Path) -> Path:
        builder = GgufBuilder("bert")
        builder.add("general.type", "model").add("general.name", "tiny bert")
        builder.add("general.file_type", 0).add("general.quantization_version", 2)
        builder.add("bert.block_count", N_LAYERS).add("bert.context_length", self.n_ctx_train)
        builder.add("bert.embedding_length", N_EMBD).add("bert.feed_forward_length", N_FF)
        builder.add("bert.attention.head_count", N_HEAD)
        builder.add("bert.attention.layer_norm_epsilon", 1e-12)
        builder.add("bert.attention.causal", False)
        if self.pooling_type is not None:
            builder.add("bert.pooling_type", self.pooling_type)
        if self.labels:
            builder.add("bert.classifier.output_labels", list(self.labels))
        builder.add("tokenizer.ggml.model", "bert").add("tokenizer.ggml.pre", "default")
        builder.add("tokenizer.ggml.token_type_count", 2)
        builder.add("tokenizer.ggml.tokens", self.tokens)
        builder.add("tokenizer.ggml.token_type", self.types)
        builder.add("tokenizer.ggml.bos_token_id", CLS)
        builder.add("tokenizer.ggml.unknown_token_id", UNK)
        builder.add("tokenizer.ggml.seperator_token_id", SEP)
        builder.add("tokenizer.ggml.padding_token_id", PAD)
        builder.add("tokenizer.ggml.mask_token_id", MASK)
        for key, value in self.extra.items():
            builder.add(key, value)
        for name, value in self.weights.items():
            builder.tensor(name, tuple(reversed(value.shape)), 0, value.tobytes())
        return builder.write(path)

    def rows(self, tokens: Sequence[int]) -> Any:
        """The last layer's row of each token."""
        w = self.weights
        x = w["token_embd.weight"][list(tokens)] + w["token_types.weight"][0]
        x = self._norm("token_embd_norm", x + w["position_embd.weight"][: len(tokens)])
        for i in range(N_LAYERS):
            blk = f"blk.{i}"
            heads = []
            q, k, v = (self._affine(f"{blk}.attn_{one}", x) for one in "qkv")
            d = N_EMBD // N_HEAD
            for head in range(N_HEAD):
                part = slice(head * d, (head + 1) * d)
                scores = q[:, part] @ k[:, part].T / math.sqrt(d)
                scores = np.exp(scores - scores.max(axis=1, keepdims=True))
                heads.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, part])
            mixed = self._affine(f"{blk}.attn_output", np.concatenate(heads, axis=1))
            x = self._norm(f"{blk}.attn_output_norm", mixed + x)
            inner = self._affine(f"{blk}.ffn_up", x)
            inner *= 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
            x = self._norm(f"{blk}.layer_output_norm", x + self._affine(f"{blk}.ffn_down", inner))
        return x

    def scores(self, tokens: Sequence[int]) -> Any:
        """The classifier's outputs."""
        hidden = np.tanh(self._affine("cls", self.rows(tokens)[:1]))
        return self._affine("cls.output", hidden)[0]

    def _affine(self, name: str, x: Any) -> Any:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, name: str, x: Any) -> Any:
        x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

"""Setups that cover what memory depends on, small enough to be loaded for real."""

from __future__ import annotations

from llmrun.fit.types import Setup

REAL_SETUPS = (
    Setup(2048),
    Setup(512),
    Setup(4096, n_ubatch=256),
    Setup(8192, n_outputs_max=32),
    Setup(2100),
    Setup(8192, "q8_0", "q8_0"),
    Setup(8192, "q4_0", "q4_0"),
    Setup(4096, "q8_0", "f16"),
    Setup(4096, "bf16", "bf16"),
    Setup(2048, "f32", "f32"),
    Setup(4096, flash_attn="off"),
    Setup(4096, "q8_0", "f16", flash_attn="off"),
    Setup(4096, flash_attn="on"),
    Setup(8192, n_seq_max=4, n_outputs_max=35),
    Setup(8192, n_seq_max=4, n_outputs_max=4, kv_unified=False),
    Setup(8192, n_seq_max=4, n_outputs_max=8, kv_unified=False, flash_attn="off"),
    Setup(4096, n_ubatch=128),
    Setup(4096, n_ubatch=1024),
    Setup(2048, n_ubatch=2048),
    Setup(4096, n_outputs_max=64),
    Setup(4096, use_repack=False),
)

"""llama.cpp's parameter structures from `EngineOptions`: one place for the engine and its probe."""

from __future__ import annotations

import ctypes
import math
import os
from typing import Any

from llmrun.engine.ggml import Ggml
from llmrun.engine.types import EngineOptions
from llmrun.errors import UsageError

_KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}  # enum ggml_type
_FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS


def check_options(options: EngineOptions) -> None:
    """Raise UsageError for what the library would abort on, take silently or refuse."""
    if options.n_ctx < 1:
        raise UsageError("the context must have at least one token", hint="pass --ctx 4096")
    if not 1 <= options.n_seq_max <= _MAX_SEQUENCES:
        raise UsageError(f"{options.n_seq_max} sequences: 1 to {_MAX_SEQUENCES} are possible")
    if options.n_ubatch < options.n_seq_max:
        # Each running sequence needs its row in every step.
        raise UsageError(f"n_ubatch {options.n_ubatch} is below n_seq_max {options.n_seq_max}")
    if options.n_cpu_moe < 0:
        raise UsageError(f"the experts of {options.n_cpu_moe} layers cannot stay in RAM")
    if options.tensor_split and not (
        all(0 <= share < math.inf for share in options.tensor_split) and any(options.tensor_split)
    ):
        raise UsageError("a tensor split must be shares of 0 and more, not all 0")
    if options.flash_attn == "off" and options.type_v not in ("f16", "f32", "bf16"):
        raise UsageError(
            f"a {options.type_v} V cache needs FlashAttention",
            hint="drop --flash-attn off, or pass --kv-type f16",
        )


def fill_model_params(C: Any, options: EngineOptions) -> tuple[Any, object]:
    """`llama_model_params` of `options`, and what has to live until the model is loaded."""
    params = C.llama_model_default_params()
    params.n_gpu_layers = options.n_gpu_layers
    params.check_tensors = options.check_tensors
    params.use_extra_bufts = options.use_repack
    if not options.use_mmap:
        params.load_mode = C.LLAMA_LOAD_MODE_NONE
    if options.n_gpu_layers == 0:
        # All of the model's GPUs are taken away (by this setting alone: llama_prepare_model_devices
        # of its src/llama.cpp). Left to itself a build with GPUs starts their drivers, computes
        # long prompts there with copies of the weights (op_offload of the context), and keeps
        # weights in pinned memory instead of reordering them: none of it is in a plan for the CPU.
        params.split_mode = C.LLAMA_SPLIT_MODE_NONE
        params.main_gpu = -1
    keep: list[object] = []
    if options.n_cpu_moe:
        # Ended by an entry of two NULLs.
        overrides = (_BufferOverride * 2)()
        overrides[0].pattern = _match_experts(options.n_cpu_moe)
        overrides[0].buffer_type = Ggml(C).cpu_buffer_type()
        params.tensor_buft_overrides = ctypes.addressof(overrides)
        keep.append(overrides)
    if options.tensor_split:
        n_devices = C.llama_max_devices()
        if len(options.tensor_split) > n_devices:
            raise UsageError(
                f"a tensor split of {len(options.tensor_split)} parts",
                why=f"llama.cpp can use {n_devices} devices",
            )
        shares = (ctypes.c_float * n_devices)(*options.tensor_split)
        params.tensor_split = shares
        keep.append(shares)
    return params, keep


class _BufferOverride(ctypes.Structure):
    """llama_model_tensor_buft_override: tensors whose name matches go to this buffer type."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _match_experts(n_layers: int) -> bytes:
    """A C++ regular expression for the routed experts' tensors of the first `n_layers` layers.

    llama.cpp compiles each expression anew for each tensor: one with all numbers is the cheapest.
    """
    experts = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
    if n_layers >= _MAX_LAYERS:
        return experts.encode()
    numbers = "|".join(str(i) for i in range(n_layers))
    return rf"^blk\.({numbers}){experts}".encode()


def fill_context_params(C: Any, options: EngineOptions, *, n_outputs_max: int = 0) -> Any:
    """`llama_context_params` of `options`. The rows of logits in a step are at least n_seq_max."""
    params = C.llama_context_default_params()
    params.n_ctx = options.n_ctx
    # One batch is one micro-batch, so that a stop never waits for more than one.
    params.n_batch = params.n_ubatch = options.n_ubatch
    params.n_seq_max = options.n_seq_max
    # A batch's logits cost n_vocab floats a row: only as many rows as can be sampled in one step.
    params.n_outputs_max = max(n_outputs_max, options.n_seq_max)
    n_threads = options.n_threads or default_threads()
    params.n_threads = n_threads
    params.n_threads_batch = options.n_threads_batch or n_threads
    params.flash_attn_type = _FLASH_ATTN[options.flash_attn]
    params.type_k = _KV_TYPES[options.type_k]
    params.type_v = _KV_TYPES[options.type_v]
    # Window layers keep only their window (the default keeps all: up to ten times the memory);
    # `prefix_cache.window_allows` is the rule that this asks for.
    params.swa_full = False
    params.kv_unified = options.kv_unified
    return params


def default_threads() -> int:
    """Processors this process may run on. The planner knows better; this is for bare use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)

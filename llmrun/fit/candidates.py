"""What a user asked for, and the contexts and KV types to try for it, best first. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrun.engine.types import Speculative, count_outputs
from llmrun.errors import UsageError
from llmrun.fit.formula import (
    allows_kv_type,
    estimate,
    has_recurrent_state,
    needs_one_kv_type,
)
from llmrun.fit.types import KV_BLOCKS, FlashAttn, GpuLayers, KvType, Setup
from llmrun.gguf.types import ModelInfo

# Automatic contexts, tried from the largest.
_CONTEXTS = (32768, 16384, 8192, 4096, 2048)
USUAL_N_CTX = 8192
LEAST_N_CTX = 2048
_ENCODER_N_CTX = 2048
_UNKNOWN_N_CTX = 4096
_N_UBATCH = 512
# A longer context than usual is taken unasked only where its cache is small beside the weights,
# because clearing the cache delays every start (about 0.5 s a GiB on a CPU).
_CHEAP_SHARE = 4
_BY_MEMORY = "as much as memory allows"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for; "auto" and None leave it to the planner.

    `n_ctx_enough` bounds the automatic context: a length beyond which nothing is gained, such as
    that of the prompt and the longest answer of a one-off run. `n_gpu_layers` -1 is "all".
    `n_seq` sequences share the context; with `kv_unified` False each has its part for itself, and
    None stands for True here (see `parallel.list_caches`).
    `n_cpu_moe`: the experts of so many layers stay in RAM. `tensor_split`: the GPUs' shares of the
    layers, in the engine's order; empty is automatic. `companions_bytes`: memory that a projector
    or drafter takes beside the model. `speculative`: guessed tokens take room for their logits.

    The last three bound what is chosen automatically (see `gate.shrink`) and never touch what was
    asked for.
    """

    n_ctx: int | None = None
    n_gpu_layers: GpuLayers = "auto"
    type_k: KvType | Literal["auto"] = "auto"
    type_v: KvType | Literal["auto"] = "auto"
    flash_attn: FlashAttn = "auto"
    n_seq: int = 1
    kv_unified: bool | None = None
    n_ubatch: int | None = None
    n_threads: int | None = None
    n_ctx_enough: int | None = None
    n_cpu_moe: int | Literal["auto", "all"] = "auto"
    tensor_split: tuple[float, ...] = ()
    companions_bytes: int = 0
    speculative: Speculative = "auto"
    n_ctx_max: int | None = None
    n_gpu_layers_max: int | None = None
    n_cpu_moe_min: int = 0

    @property
    def shares_cells(self) -> bool:
        """Whether all sequences have one cache; so has a single one."""
        return self.kv_unified is not False or self.n_seq == 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A context and KV types, with the reason for the context in words."""

    n_ctx: int
    type_k: KvType
    type_v: KvType
    reason: str

    @property
    def reason_at_worst(self) -> str:
        """The reason of the last candidate when not even it fits with the margin."""
        why = "the shortest that is chosen unasked"
        if self.n_ctx > LEAST_N_CTX:
            why = "memory is short, but less context would save little of it"
        return self.reason.replace(_BY_MEMORY, why)


def check_wishes(info: ModelInfo, wishes: Wishes) -> None:
    """Raise UsageError for what llama.cpp would refuse, and for files that are no model."""
    if info.kind in ("projector", "adapter"):
        raise UsageError(
            f"this file is a {info.kind}, not a model",
            why="it only works together with the model that it was made for",
            hint="name the model's own GGUF file",
        )
    for value, flag in ((wishes.n_ctx, "--ctx"), (wishes.n_threads, "--threads")):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, not {value}")
    type_v = _fill_types(info, wishes, "f16")[1]
    if wishes.flash_attn == "off" and _is_quantized(type_v):
        raise UsageError(
            f"a KV cache of type {type_v} needs FlashAttention",
            why="llama.cpp cannot keep quantised values without it",
            hint="drop --flash-attn off, or pass --kv-type f16",
        )
    for kv_type in (wishes.type_k, wishes.type_v):
        if kv_type != "auto" and _is_quantized(kv_type) and not _allows(info, kv_type):
            raise UsageError(
                f"this model cannot have a KV cache of type {kv_type}",
                why=f"its attention heads are not whole blocks of {KV_BLOCKS[kv_type][0]} values",
                hint="pass --kv-type f16",
            )
    asked = {wishes.type_k, wishes.type_v} - {"auto"}
    if len(asked) > 1 and needs_one_kv_type(info):
        raise UsageError(
            f"this model cannot have keys in {wishes.type_k} and values in {wishes.type_v}",
            why="its KV cache holds both as one",
            hint="pass one type for both: --kv-type f16",
        )


def choose_n_ubatch(info: ModelInfo, wishes: Wishes) -> int:
    """512, llama.cpp's own: a larger one makes prompts little faster and costs four times the
    scratch memory. An encoder has to see its whole text in one micro-batch, and every sequence
    needs a row."""
    if wishes.n_ubatch is not None:
        return wishes.n_ubatch
    n_ubatch = max(_N_UBATCH, wishes.n_seq)
    if info.kind in ("embedder", "reranker"):
        return max(n_ubatch, wishes.n_ctx or min(info.n_ctx_train or 512, _ENCODER_N_CTX))
    return n_ubatch


def list_candidates(info: ModelInfo, wishes: Wishes, n_ubatch: int) -> list[Candidate]:
    """Contexts and KV types in order of preference; the context never grows along the list. The
    first ones are at least as long as is usual, the shorter ones a last resort."""
    plain = _fill_types(info, wishes, "f16")
    small = smaller_kv_types(info, wishes)
    found = []
    for n_ctx, reason in _list_contexts(info, wishes, plain, n_ubatch):
        found.append(Candidate(n_ctx, *plain, reason))
        if small is not None and (wishes.n_ctx is not None or n_ctx <= USUAL_N_CTX):
            found.append(Candidate(n_ctx, *small, f"{reason}; KV cache in q8_0 to save memory"))
    return found


def smaller_kv_types(info: ModelInfo, wishes: Wishes) -> tuple[KvType, KvType] | None:
    """The types of a KV cache in q8_0, as far as the wishes leave them open; None when they leave
    nothing open or the model cannot have it."""
    if "auto" not in (wishes.type_k, wishes.type_v) or wishes.flash_attn == "off":
        return None
    if not allows_kv_type(info, "q8_0"):
        return None
    types = _fill_types(info, wishes, "q8_0")
    return types if "q8_0" in types else None


def _fill_types(info: ModelInfo, wishes: Wishes, default: KvType) -> tuple[KvType, KvType]:
    """The asked KV types, and `default` for those that are not; where a model needs one type for
    both, the one that was asked for stands for the other."""
    type_k, type_v = wishes.type_k, wishes.type_v
    if needs_one_kv_type(info):
        type_k, type_v = (
            (type_v if type_k == "auto" else type_k),
            (type_k if type_v == "auto" else type_v),
        )
    return (default if type_k == "auto" else type_k, default if type_v == "auto" else type_v)


def n_outputs_of(info: ModelInfo, wishes: Wishes, n_ubatch: int) -> int:
    """Rows of logits in a step; by the engine's own rule."""
    return count_outputs(
        n_seq_max=wishes.n_seq,
        n_ubatch=n_ubatch,
        speculative=wishes.speculative,
        has_state=has_recurrent_state(info),
    )


def setup_of(info: ModelInfo, candidate: Candidate, wishes: Wishes, n_ubatch: int) -> Setup:
    """The settings of a candidate on the CPU, where no weight is kept twice for a GPU."""
    return Setup(
        candidate.n_ctx,
        candidate.type_k,
        candidate.type_v,
        wishes.flash_attn,
        n_seq_max=wishes.n_seq,
        kv_unified=wishes.shares_cells,
        n_ubatch=n_ubatch,
        n_outputs_max=n_outputs_of(info, wishes, n_ubatch),
        n_gpu_layers=0,
    )


def _list_contexts(
    info: ModelInfo, wishes: Wishes, types: tuple[KvType, KvType], n_ubatch: int
) -> list[tuple[int, str]]:
    """(n_ctx, why), longest first."""
    trained = info.n_ctx_train
    if wishes.n_ctx is not None:
        reason = f"context {wishes.n_ctx}: as asked"
        if trained and wishes.n_ctx > trained:
            reason += f", beyond the {trained} that the model was trained for: answers may degrade"
        return [(wishes.n_ctx, reason)]
    limit = trained or _UNKNOWN_N_CTX
    if info.kind in ("embedder", "reranker"):
        limit = min(limit, _ENCODER_N_CTX)
    enough = wishes.n_ctx_enough
    if enough is not None:
        limit = min(limit, max(LEAST_N_CTX, -(-enough // 1024) * 1024))
    bound = wishes.n_ctx_max
    if bound is not None:
        limit = max(1, min(limit, bound))
    first = min(limit, _CONTEXTS[0])
    contexts = [first, *(n for n in _CONTEXTS if n < first)]
    cheap = [n for n in contexts if n <= USUAL_N_CTX or _is_cheap(info, n, wishes, types, n_ubatch)]
    found = []
    for n_ctx in cheap:
        if n_ctx == trained:
            reason = f"context {n_ctx}: the model's own limit"
        elif n_ctx == bound:
            reason = f"context {n_ctx}: shortened after an attempt that failed"
        elif n_ctx == limit and enough is not None:
            reason = f"context {n_ctx}: enough for this prompt and answer"
        elif n_ctx == cheap[0]:
            reason = f"context {n_ctx}: chosen to start fast; --ctx takes up to {trained}"
            if not trained:
                reason = f"context {n_ctx}: the model does not say its limit"
        else:
            reason = f"context {n_ctx}: {_BY_MEMORY}"
        found.append((n_ctx, reason))
    return found


def _is_cheap(
    info: ModelInfo, n_ctx: int, wishes: Wishes, types: tuple[KvType, KvType], n_ubatch: int
) -> bool:
    need = estimate(info, setup_of(info, Candidate(n_ctx, *types, ""), wishes, n_ubatch))
    return need.source == "formula" and need.kv_bytes * _CHEAP_SHARE <= need.weights_bytes


def _is_quantized(kv_type: KvType | Literal["auto"]) -> bool:
    return kv_type != "auto" and KV_BLOCKS[kv_type][0] > 1


def _allows(info: ModelInfo, kv_type: KvType) -> bool:
    """Unlike `allows_kv_type`, trusts the user where the architecture is not known."""
    rough = estimate(info, Setup(1)).source == "filesize"
    return rough or allows_kv_type(info, kv_type)

"""From machine, model and wishes to settings, with reasons. Pure.

What the user fixed stays fixed. The rest is given up in this order: context length down to 8192,
then a KV cache in q8_0, then GPU layers, then shorter contexts still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmrun.errors import UsageError, WillNotFitError
from llmrun.fit.formula import allows_kv_type, estimate
from llmrun.fit.placement import Placement, Pools, place
from llmrun.fit.types import KV_BLOCKS, Estimate, FlashAttn, GpuLayers, KvType, Setup
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine
from llmrun.hardware.threads import choose_threads
from llmrun.text import format_bytes

Verdict = Literal["fits", "tight", "does_not_fit"]

# Automatic contexts, tried from the largest.
_CONTEXTS = (32768, 16384, 8192, 4096, 2048)
_USUAL_N_CTX = 8192
_LEAST_N_CTX = 2048
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
    """

    n_ctx: int | None = None
    n_gpu_layers: GpuLayers = "auto"
    type_k: KvType | Literal["auto"] = "auto"
    type_v: KvType | Literal["auto"] = "auto"
    flash_attn: FlashAttn = "auto"
    n_seq: int = 1
    n_ubatch: int | None = None
    n_threads: int | None = None
    n_ctx_enough: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings for the engine, and how they fit.

    `n_gpu_layers`: -1 is all, also where no GPU is known. Weights that the CPU reorders
    (`use_repack`) are a second copy of those mapped from the file (`use_mmap`): both are set only
    where there is room for both. `budget_bytes` is what may be taken of all memory pools together
    and `available_bytes` what is free in them; 0 when it is not known. `placement` has each pool's
    share. Verdict "tight" eats into the margin. `n_ctx_that_fits` is the largest context that would
    fit when the planned one does not, None without one.
    """

    n_ctx: int
    n_gpu_layers: int
    type_k: KvType
    type_v: KvType
    flash_attn: FlashAttn
    n_ubatch: int
    n_threads: int
    n_threads_batch: int
    use_mmap: bool
    use_repack: bool
    estimate: Estimate
    budget_bytes: int
    available_bytes: int
    placement: Placement
    verdict: Verdict
    reasons: tuple[str, ...]
    n_ctx_that_fits: int | None = None


@dataclass(frozen=True, slots=True)
class _Candidate:
    n_ctx: int
    type_k: KvType
    type_v: KvType
    reason: str

    @property
    def reason_at_worst(self) -> str:
        """The reason of the last candidate when not even it fits with the margin."""
        return self.reason.replace(_BY_MEMORY, "the shortest that is chosen unasked")


def plan(machine: Machine, info: ModelInfo, wishes: Wishes | None = None) -> Plan:
    """The best settings for `info` on `machine` within `wishes`. Always a plan, whatever its
    verdict: see `require_fit`.

    Raises UsageError for wishes that llama.cpp would refuse, and for files that are no model.
    """
    wishes = wishes or Wishes()
    _check(info, wishes)
    n_ubatch = _choose_n_ubatch(info, wishes)
    pools = Pools.of(machine)
    candidates = _list_candidates(info, wishes, n_ubatch)

    def needs(candidate: _Candidate) -> Estimate:
        return _estimate(info, candidate, wishes, n_ubatch)

    def settle(candidate: _Candidate, placement: Placement, verdict: Verdict) -> Plan:
        threads = choose_threads(machine.cpu)
        n_threads = wishes.n_threads
        need = placement.estimate
        # A model too large for RAM can at least be paged in from its file.
        is_hopeless = verdict == "does_not_fit"
        use_mmap = is_hopeless or placement.slack_bytes >= need.repack_bytes
        return Plan(
            n_ctx=candidate.n_ctx,
            n_gpu_layers=placement.n_gpu_layers,
            type_k=candidate.type_k,
            type_v=candidate.type_v,
            flash_attn=wishes.flash_attn,
            n_ubatch=n_ubatch,
            n_threads=n_threads or threads.n_threads,
            n_threads_batch=n_threads or threads.n_threads_batch,
            use_mmap=use_mmap,
            use_repack=not is_hopeless,
            estimate=need,
            budget_bytes=pools.budget_bytes,
            available_bytes=pools.available_bytes,
            placement=placement,
            verdict=verdict,
            reasons=(
                candidate.reason if verdict == "fits" else candidate.reason_at_worst,
                *placement.reasons,
                *(() if n_threads else threads.reasons),
                *(() if use_mmap else _say_read(need)),
                *need.notes,
                *(() if pools.is_known else ("free memory could not be read: not checked",)),
            ),
            n_ctx_that_fits=_largest_that_fits(info, wishes, pools, candidate, n_ubatch)
            if is_hopeless
            else None,
        )

    wanted_layers = wishes.n_gpu_layers
    usual = min(_USUAL_N_CTX, candidates[0].n_ctx)
    if wanted_layers == "auto" and pools.has_gpu:
        # All layers on the GPU if the usual context can be kept, else what part of them goes.
        tries: list[tuple[GpuLayers, list[_Candidate]]] = [
            ("all", [candidate for candidate in candidates if candidate.n_ctx >= usual]),
            ("auto", [candidate for candidate in candidates if candidate.n_ctx <= usual]),
        ]
    else:
        tries = [(wanted_layers, candidates)]
    for n_gpu_layers, some in tries:
        for candidate in some:
            placement = place(needs(candidate), pools, n_gpu_layers)
            if placement.fits:
                return settle(candidate, placement, "fits")
    # Only the smallest may be tight: more memory must never end in less context.
    last = candidates[-1]
    placement = place(needs(last), pools.without_margin(), wanted_layers)
    return settle(last, placement, "tight" if placement.fits else "does_not_fit")


def require_fit(plan: Plan, *, force: bool = False) -> None:
    """Raise WillNotFitError when the plan's verdict is "does_not_fit", unless `force`."""
    if force or plan.verdict != "does_not_fit":
        return
    need = plan.placement.estimate
    short = plan.placement.worst
    message = (
        f"this model needs {format_bytes(need.total_bytes)} of memory with a context of "
        f"{plan.n_ctx}, and {format_bytes(plan.available_bytes)} are free"
    )
    why = (
        f"weights {format_bytes(need.weights_bytes)}, KV cache {format_bytes(need.kv_bytes)}, "
        f"working memory {format_bytes(need.compute_bytes + need.overhead_bytes)}"
    )
    if short is not None and len(plan.placement.shares) > 1:
        why += (
            f"; {short.device} would have to hold {format_bytes(short.used_bytes)} "
            f"and can take {format_bytes(short.budget_bytes)}"
        )
    if plan.n_ctx_that_fits is not None:
        hint = f"pass --ctx {plan.n_ctx_that_fits}, or --force to try it all the same"
    else:
        hint = (
            "name a smaller quant (such as :q4_k_m or :q3_k_m) or a smaller model, close other "
            "programs, or pass --force to try it all the same"
        )
    raise WillNotFitError(message, why=why, hint=hint)


def _check(info: ModelInfo, wishes: Wishes) -> None:
    if info.kind in ("projector", "adapter"):
        raise UsageError(
            f"this file is a {info.kind}, not a model",
            why="it only works together with the model that it was made for",
            hint="name the model's own GGUF file",
        )
    for value, flag in ((wishes.n_ctx, "--ctx"), (wishes.n_threads, "--threads")):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, not {value}")
    if wishes.flash_attn == "off" and _is_quantized(wishes.type_v):
        raise UsageError(
            f"a KV cache of type {wishes.type_v} needs FlashAttention",
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


def _is_quantized(kv_type: KvType | Literal["auto"]) -> bool:
    return kv_type != "auto" and KV_BLOCKS[kv_type][0] > 1


def _allows(info: ModelInfo, kv_type: KvType) -> bool:
    """Unlike `allows_kv_type`, trusts the user where the architecture is not known."""
    rough = estimate(info, Setup(1)).source == "filesize"
    return rough or allows_kv_type(info, kv_type)


def _choose_n_ubatch(info: ModelInfo, wishes: Wishes) -> int:
    """An encoder has to see its whole text in one micro-batch."""
    if wishes.n_ubatch is not None:
        return wishes.n_ubatch
    if info.kind in ("embedder", "reranker"):
        return max(_N_UBATCH, wishes.n_ctx or min(info.n_ctx_train or 512, _ENCODER_N_CTX))
    return _N_UBATCH


def _list_candidates(info: ModelInfo, wishes: Wishes, n_ubatch: int) -> list[_Candidate]:
    """Contexts and KV types in order of preference; the context never grows along the list."""
    plain: tuple[KvType, KvType] = (
        "f16" if wishes.type_k == "auto" else wishes.type_k,
        "f16" if wishes.type_v == "auto" else wishes.type_v,
    )
    small: tuple[KvType, KvType] = (
        "q8_0" if wishes.type_k == "auto" else wishes.type_k,
        "q8_0" if wishes.type_v == "auto" else wishes.type_v,
    )
    can_shrink = small != plain and wishes.flash_attn != "off" and allows_kv_type(info, "q8_0")
    found = []
    for n_ctx, reason in _list_contexts(info, wishes, plain, n_ubatch):
        found.append(_Candidate(n_ctx, *plain, reason))
        if can_shrink and (wishes.n_ctx is not None or n_ctx <= _USUAL_N_CTX):
            shrunk = f"{reason}; KV cache in q8_0 to save memory"
            found.append(_Candidate(n_ctx, *small, shrunk))
    return found


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
        limit = min(limit, max(_LEAST_N_CTX, -(-enough // 1024) * 1024))
    first = min(limit, _CONTEXTS[0])
    contexts = [first, *(n for n in _CONTEXTS if n < first)]
    cheap = [
        n for n in contexts if n <= _USUAL_N_CTX or _is_cheap(info, n, wishes, types, n_ubatch)
    ]
    found = []
    for n_ctx in cheap:
        if n_ctx == trained:
            reason = f"context {n_ctx}: the model's own limit"
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
    need = _estimate(info, _Candidate(n_ctx, *types, ""), wishes, n_ubatch)
    return need.source == "formula" and need.kv_bytes * _CHEAP_SHARE <= need.weights_bytes


def _estimate(info: ModelInfo, candidate: _Candidate, wishes: Wishes, n_ubatch: int) -> Estimate:
    return estimate(
        info,
        Setup(
            candidate.n_ctx,
            candidate.type_k,
            candidate.type_v,
            wishes.flash_attn,
            n_seq_max=wishes.n_seq,
            n_ubatch=n_ubatch,
            n_outputs_max=wishes.n_seq,
        ),
    )


def _largest_that_fits(
    info: ModelInfo, wishes: Wishes, pools: Pools, candidate: _Candidate, n_ubatch: int
) -> int | None:
    """The largest shorter context, in steps of 1024, that fits with the candidate's KV types."""
    low, high = 0, candidate.n_ctx // 1024
    while low < high:
        middle = (low + high + 1) // 2
        shorter = _Candidate(middle * 1024, candidate.type_k, candidate.type_v, "")
        need = _estimate(info, shorter, wishes, n_ubatch)
        if place(need, pools, wishes.n_gpu_layers).fits:
            low = middle
        else:
            high = middle - 1
    return low * 1024 if 0 < low * 1024 < candidate.n_ctx else None


def _say_read(need: Estimate) -> tuple[str, ...]:
    if not need.repack_bytes:
        return ()
    return (
        "weights are read, not mapped: the CPU's reordered copy could take up to "
        f"{format_bytes(need.repack_bytes)} more",
    )

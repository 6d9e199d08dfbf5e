"""What stands between a plan and the engine: the refusal, and the next smaller attempt. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmrun.errors import WillNotFitError
from llmrun.fit.candidates import LEAST_N_CTX, Wishes, smaller_kv_types
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine
from llmrun.text import format_bytes

if TYPE_CHECKING:
    from llmrun.fit.plan import Plan

# One step to the CPU is a tenth of the layers.
_LAYER_STEPS = 10


def require_fit(plan: Plan, *, force: bool = False, alternatives: Sequence[str] = ()) -> None:
    """Raise WillNotFitError when the plan's verdict is "no", unless `force`.

    `alternatives` are the caller's words for what would run ("the quant Q3_K_M (3.1 GB): llmrun
    run x:q3_k_m"), best first; a shorter context that fits is said before them.
    """
    if force or plan.verdict != "no":
        return
    need, shares = plan.placement.estimate, plan.placement.shares
    needed, free = format_bytes(plan.placement.total_bytes), format_bytes(plan.available_bytes)
    if needed == free:
        free = f"{format_bytes(abs(plan.placement.total_bytes - plan.available_bytes))} less"
    message = (
        f"this model needs {needed} of memory with a context of {plan.n_ctx}, and {free} are free"
    )
    rest = plan.placement.total_bytes - need.weights_bytes - need.kv_bytes
    why = (
        f"weights {format_bytes(need.weights_bytes)}, KV cache {format_bytes(need.kv_bytes)}, "
        f"working memory {format_bytes(rest)}"
    )
    if len(shares) > 1:
        for share in shares:
            if share.used_bytes > share.free_bytes and share.total_bytes:
                why += (
                    f"; {share.device} would have to hold {format_bytes(share.used_bytes)} "
                    f"and has {format_bytes(share.free_bytes)} free"
                )
    ways = list(alternatives)
    if plan.n_ctx_that_fits is not None:
        ways.insert(0, f"pass --ctx {plan.n_ctx_that_fits}")
    if not alternatives and plan.n_ctx_that_fits is None:
        ways += [
            "name a smaller quant (such as :q4_k_m or :q3_k_m) or a smaller model",
            "close other programs",
        ]
    hint = f"{', '.join(ways)}, or --force to try it all the same"
    raise WillNotFitError(message, why=why, hint=hint)


def shrink(plan: Plan, wishes: Wishes, machine: Machine, info: ModelInfo) -> Wishes | None:
    """The wishes for the next smaller attempt after the engine could not get the memory that `plan`
    promised; None when all that is left was fixed by the user.

    One step a call: first a context shorter by up to a quarter, then a KV cache in q8_0, then a
    tenth of the experts or layers from the GPU to the CPU, then shorter contexts still. The new
    plan takes no more than this one of anything.
    """
    bounded = _bound(plan, wishes, machine)
    if plan.n_ctx > LEAST_N_CTX and wishes.n_ctx is None and wishes.n_ctx_max is None:
        return replace(bounded, n_ctx_max=_shorter(plan.n_ctx))
    types = smaller_kv_types(info, wishes)
    if types is not None and types != (plan.type_k, plan.type_v):
        return replace(bounded, type_k=types[0], type_v=types[1])
    moved = _move_to_cpu(plan, bounded, wishes, machine)
    if moved is not None:
        return moved
    if plan.n_ctx > LEAST_N_CTX and wishes.n_ctx is None:
        return replace(bounded, n_ctx_max=_shorter(plan.n_ctx))
    return None


def _bound(plan: Plan, wishes: Wishes, machine: Machine) -> Wishes:
    """Wishes under which no choice takes more than in `plan`."""
    bounded = replace(wishes, n_ctx_max=plan.n_ctx)
    if wishes.type_k == "auto" and plan.type_k != "f16":
        bounded = replace(bounded, type_k=plan.type_k)
    if wishes.type_v == "auto" and plan.type_v != "f16":
        bounded = replace(bounded, type_v=plan.type_v)
    if machine.devices and wishes.n_gpu_layers == "auto":
        bounded = replace(
            bounded,
            n_gpu_layers_max=None if plan.n_gpu_layers < 0 else plan.n_gpu_layers,
            n_cpu_moe_min=max(plan.n_cpu_moe, wishes.n_cpu_moe_min),
        )
    return bounded


def _shorter(n_ctx: int) -> int:
    """Three quarters, rounded up to whole 1024, and at least one of these less."""
    n_steps = min(-(-n_ctx * 3 // 4096), (n_ctx - 1) // 1024)
    return max(LEAST_N_CTX, n_steps * 1024)


def _move_to_cpu(plan: Plan, bounded: Wishes, wishes: Wishes, machine: Machine) -> Wishes | None:
    placement = plan.placement
    if not placement.n_on_gpu:
        return None
    n_layers = len(placement.layer_devices)
    step = max(1, n_layers // _LAYER_STEPS)
    has_experts = any(placement.estimate.layer_experts)
    if has_experts and wishes.n_cpu_moe == "auto" and plan.n_cpu_moe < n_layers:
        return replace(bounded, n_cpu_moe_min=min(n_layers, plan.n_cpu_moe + step))
    if wishes.n_gpu_layers == "auto":
        return replace(bounded, n_gpu_layers_max=max(0, placement.n_on_gpu - step))
    return None

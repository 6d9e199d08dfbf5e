"""Puts what llama.cpp's allocator said into an estimate of the closed form. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmrun.fit.types import MIB, Estimate, Measurement
from llmrun.text import format_bytes

# Below these parts of what the header says, an answer was misread. Weights of an architecture that
# is not known are compared with the file, a part of which may not be loaded.
_LEAST_WEIGHTS = 0.98
_LEAST_WEIGHTS_UNKNOWN = 0.8
_MAX_HEADER_BYTES = 64 * MIB
_FILE_SIZE_SURPLUS = 21 / 20  # of an estimate from the file's size
_KV_TOLERANCE = 0.01
_MOST_KV = 4
_TOTAL_TOLERANCE = 0.10
_TOTAL_TOLERANCE_BYTES = 256 * MIB


def calibrate(estimate: Estimate, measurement: Measurement) -> Estimate:
    """`estimate` with the measured totals and source "exact"; its splits by layer are scaled to
    them. Both must be of the same setup.

    The measured weights are those of a load that reads them (`use_mmap` off), where a tied output
    may be a copy of the embedding even in RAM. The closed form counts them the same way and has
    in `aliased_bytes` what of it a mapped file saves, which stays as it is. A measurement from the
    log (`is_rough`) does not know what is reordered: there the closed form's bound stays.

    An answer that cannot be right (weights below what the file holds, a KV cache below the closed
    form's or many times as large) is refused: the estimate comes back as it was, with a note. A KV
    cache that is larger by more than a hundredth is believed, as it can have a reason that the
    header does not tell (a device without FlashAttention), and noted; so is a total that differs by
    more than a tenth and 256 MiB.
    """
    fault = _find_fault(estimate, measurement)
    if fault is not None:
        return replace(estimate, notes=(*estimate.notes, f"estimated, not measured: {fault}"))
    weights, kv = measurement.weights_bytes, measurement.kv_bytes
    layer_weights, (inputs, outputs) = _scale_weights(estimate, weights)
    ratio = weights / estimate.weights_bytes if estimate.weights_bytes else 1.0
    exact = replace(
        estimate,
        weights_bytes=weights,
        kv_bytes=kv,
        compute_bytes=measurement.compute_bytes,
        source="exact",
        repack_bytes=estimate.repack_bytes if measurement.is_rough else measurement.repack_bytes,
        layer_weights=layer_weights,
        layer_kv=_scale(estimate.layer_kv, kv) if estimate.layer_kv else (),
        layer_experts=tuple(
            min(round(part * ratio), whole)
            for part, whole in zip(estimate.layer_experts, layer_weights, strict=True)
        )
        if estimate.layer_experts
        else (),
        input_bytes=inputs,
        output_bytes=outputs,
        notes=_drop_guesses(estimate),
    )
    return replace(exact, notes=(*exact.notes, *_compare(estimate, exact)))


def _find_fault(estimate: Estimate, measurement: Measurement) -> str | None:
    weights, kv = measurement.weights_bytes, measurement.kv_bytes
    if estimate.source == "formula":
        # A copy of a tied output is there or not, as the processor has it.
        copy = min(estimate.input_bytes, estimate.output_bytes)
        least = _LEAST_WEIGHTS * (estimate.weights_bytes - copy)
    else:
        n_bytes = estimate.weights_bytes / _FILE_SIZE_SURPLUS
        least = _LEAST_WEIGHTS_UNKNOWN * (n_bytes - _MAX_HEADER_BYTES)
    if weights < least or not weights:
        return (
            f"llama.cpp reports {format_bytes(weights)} of weights, less than the "
            f"{format_bytes(round(least))} in the file"
        )
    if estimate.source == "formula":
        expected = estimate.kv_bytes
        if kv < (1 - _KV_TOLERANCE) * expected or kv > _MOST_KV * expected:
            return (
                f"llama.cpp reports a KV cache of {format_bytes(kv)}, and by the header it is "
                f"{format_bytes(expected)}"
            )
    return None


def _compare(estimate: Estimate, exact: Estimate) -> tuple[str, ...]:
    """What to say where the two tiers disagree."""
    if estimate.source != "formula":
        return ()
    notes = []
    if exact.kv_bytes > (1 + _KV_TOLERANCE) * estimate.kv_bytes:
        notes.append(
            f"llama.cpp's KV cache of {format_bytes(exact.kv_bytes)} is larger than the "
            f"{format_bytes(estimate.kv_bytes)} that the header lets expect: counted in full"
        )
    difference = abs(exact.total_bytes - estimate.total_bytes)
    if difference > max(_TOTAL_TOLERANCE * exact.total_bytes, _TOTAL_TOLERANCE_BYTES):
        notes.append(
            f"less certain than usual: llama.cpp's own figure is "
            f"{format_bytes(exact.total_bytes)}, the closed form's "
            f"{format_bytes(estimate.total_bytes)}"
        )
    return tuple(notes)


def _drop_guesses(estimate: Estimate) -> tuple[str, ...]:
    """Without the remark that the figures are an upper bound, which they no longer are."""
    return tuple(note for note in estimate.notes if "upper bound" not in note)


def _scale_weights(estimate: Estimate, weights: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(each layer, (inputs, outputs)), in the estimate's proportions and `weights` in all."""
    parts = (*estimate.layer_weights, estimate.input_bytes, estimate.output_bytes)
    if not any(parts):
        return estimate.layer_weights, (0, weights)
    scaled = _scale(parts, weights)
    return scaled[:-2], (scaled[-2], scaled[-1])


def _scale(parts: Sequence[int], total: int) -> tuple[int, ...]:
    """`parts` in their proportions with the sum `total`. All 0 stays so, but for the last one."""
    whole = sum(parts)
    if whole == total:
        return tuple(parts)
    scaled = []
    passed = taken = 0
    for part in parts:
        passed += part
        # Rounded at the running sum, so that nothing is lost in the end.
        end = total * passed // whole if whole else 0
        scaled.append(end - taken)
        taken = end
    if scaled:
        scaled[-1] += total - taken
    return tuple(scaled)

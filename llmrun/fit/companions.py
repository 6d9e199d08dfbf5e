"""Memory that a projector and a drafter add to the model that they belong to. Pure.

Both go to the GPU where there is one, beside the model, and may be moved to RAM whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llmrun.fit.formula import estimate
from llmrun.fit.types import GIB, MIB, Estimate, Setup, Source
from llmrun.gguf.types import ModelInfo

CompanionKind = Literal["projector", "drafter"]

# Scratch memory of an image encoder; Ollama keeps 1 GiB free for it on a GPU. The figure for RAM is
# an experience, not a rule.
_PROJECTOR_GPU_BYTES = GIB
_PROJECTOR_HOST_BYTES = GIB // 2
# A step of a block or two, with the output rows.
_SHARED_DRAFTER_BYTES = 64 * MIB
# Drafters that are blocks of their target: they read its cache, or keep one for a block or two, and
# cannot run alone. By file name or catalog, where no header tells.
_SHARED_KINDS = frozenset({"mtp", "eagle3", "dflash", "dspark"})
_SHARED_ARCHITECTURES = frozenset({"eagle3", "dflash", "dspark"})


@dataclass(frozen=True, slots=True)
class Companion:
    """What a projector or drafter takes. `work_gpu_bytes` and `work_host_bytes` are its scratch
    memory there; it needs one of them. Source "formula": its header was read."""

    kind: CompanionKind
    weights_bytes: int
    kv_bytes: int
    work_gpu_bytes: int
    work_host_bytes: int
    source: Source
    notes: tuple[str, ...] = ()

    def bytes_on(self, device: Literal["gpu", "ram"]) -> int:
        work = self.work_gpu_bytes if device == "gpu" else self.work_host_bytes
        return self.weights_bytes + self.kv_bytes + work


def companion_bytes(companions: Iterable[Companion], device: Literal["gpu", "ram"] = "gpu") -> int:
    """What all of them take together on one device. On a GPU it is never less than in RAM, so it
    is the figure to plan with before the place is known."""
    return sum(companion.bytes_on(device) for companion in companions)


def projector_need(n_bytes: int, info: ModelInfo | None = None) -> Companion:
    """A multimodal projector (mmproj) from its header, or from the size of its file."""
    return Companion(
        kind="projector",
        weights_bytes=n_bytes if info is None else info.tensor_bytes,
        kv_bytes=0,
        work_gpu_bytes=_PROJECTOR_GPU_BYTES,
        work_host_bytes=_PROJECTOR_HOST_BYTES,
        source="filesize" if info is None else "formula",
        notes=("the projector's working memory is a rule of thumb",),
    )


def drafter_need(
    n_bytes: int,
    setup: Setup,
    info: ModelInfo | None = None,
    *,
    kind: str | None = None,
    target: ModelInfo | None = None,
) -> Companion:
    """A drafter for a target that runs with `setup`, from its header, or from the size of its file
    and `kind` ("mtp", "eagle3"; None is a model of its own).

    One that works on its target's hidden states counts its own tensors, and a cache for as many
    layers as it has where it does not read the target's. One that is a model of its own counts as
    that, with the target's context; where no header tells, its cache is taken to be a quarter of
    the target's.
    """
    if info is not None and not _is_shared(info, kind):
        return _of_estimate(estimate(info, setup), "drafter")
    if info is None and kind not in _SHARED_KINDS:
        cache = estimate(target, setup).kv_bytes // 4 if target is not None else 0
        return Companion(
            "drafter", n_bytes, cache, 256 * MIB, 256 * MIB, "filesize", ("a rough guess",)
        )
    return Companion(
        kind="drafter",
        weights_bytes=n_bytes if info is None else info.tensor_bytes,
        kv_bytes=_shared_kv(info, target, setup, kind),
        work_gpu_bytes=_SHARED_DRAFTER_BYTES,
        work_host_bytes=_SHARED_DRAFTER_BYTES,
        source="filesize" if info is None else "formula",
        notes=("the drafter shares its target's weights and cache",),
    )


def _is_shared(info: ModelInfo, kind: str | None) -> bool:
    return (
        kind in _SHARED_KINDS
        or info.architecture in _SHARED_ARCHITECTURES
        or info.architecture.endswith("-assistant")
        or (info.kind == "drafter" and bool(_count(info, "nextn_predict_layers")))
    )


def _shared_kv(
    info: ModelInfo | None, target: ModelInfo | None, setup: Setup, kind: str | None
) -> int:
    if info is not None and info.architecture.endswith("-assistant"):
        return 0  # it reads the target's
    if target is None or (info is None and kind == "mtp" and _shares_cache(target)):
        return 0
    n_layers = 1
    if info is not None:
        n_layers = _count(info, "nextn_predict_layers") or info.n_layers or 1
    return n_layers * _layer_cache(estimate(target, setup))


def _shares_cache(target: ModelInfo) -> bool:
    return target.architecture == "gemma4"


def _layer_cache(need: Estimate) -> int:
    """The cache of the largest of a model's layers: a drafting block is a full attention layer."""
    return max(need.layer_kv, default=0)


def _count(info: ModelInfo, key: str) -> int:
    value = info.header.metadata.get(f"{info.architecture}.{key}")
    return value if type(value) is int and 0 <= value < 512 else 0


def _of_estimate(need: Estimate, kind: CompanionKind) -> Companion:
    work = need.compute_bytes
    return Companion(
        kind=kind,
        weights_bytes=need.weights_bytes,
        kv_bytes=need.kv_bytes,
        work_gpu_bytes=work,
        work_host_bytes=work,
        source=need.source,
        notes=need.notes,
    )

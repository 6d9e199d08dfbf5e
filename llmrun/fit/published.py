"""What is said about a model's memory when its header cannot be read. Pure.

Two last resorts: somebody's published figure for the whole, under that name, and a guess from sizes
alone, good enough to order a catalog by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

from llmrun.fit.types import KV_BLOCKS, MIB, Estimate, KvType
from llmrun.text import escape_line


class PublishedFigure(Protocol):
    """`gb` (10^9 bytes) to run `quant`, says `source`."""

    @property
    def quant(self) -> str: ...
    @property
    def gb(self) -> float: ...
    @property
    def source(self) -> str: ...


class PublishedEntry(Protocol):
    """The part of a catalog's entry that is used here. `min_memory_gb` is for its `quant`."""

    @property
    def quant(self) -> str: ...
    @property
    def min_memory_gb(self) -> float | None: ...
    @property
    def min_memory_source(self) -> str | None: ...
    @property
    def memory(self) -> Sequence[PublishedFigure]: ...


_GB = 1_000_000_000
_BITS = re.compile(r"(?:I?Q|MXFP|NVFP|SFP|FP|BF|F)(\d{1,2})")
_SIXTEEN = {"F16", "FP16", "BF16"}

# A cache of a token in f16 for a model of ten billion parameters with plain attention and shared KV
# heads (Llama 3, Qwen 3), and how much of it other families need: for the first 8,192 tokens, and
# for those beyond, of which a sliding window keeps few.
_KV_BYTES = 160_000
_USUAL_N_CTX = 8192
_KV_SHARES = {
    "gemma-4": (0.7, 0.25),
    "gemma-3": (0.5, 0.2),
    "gemma-3n": (0.2, 0.1),
    "qwen3.5": (0.25, 0.25),
    "qwen3.6": (0.25, 0.25),
    "qwen3.8": (0.3, 0.3),
    "gpt-oss": (0.15, 0.15),
    "lfm2": (0.15, 0.15),
    "lfm2.5": (0.15, 0.15),
    "nemotron-3": (0.2, 0.15),
    "glm-4.7": (0.3, 0.3),
}
_GUESS_COMPUTE_BYTES = 256 * MIB
_GUESS_OVERHEAD_BYTES = 96 * MIB


def published_need(entry: PublishedEntry, quant: str | None = None) -> Estimate | None:
    """The published requirement for `quant` (None: the entry's own), or None when nobody gives one.

    The figure is for the whole at whatever context its source had in mind, so it stands as
    `weights_bytes` with nothing beside. Of several the first with the very quant counts, then the
    first with as many bits; the notes say whose it is and for what.
    """
    wanted = _normal(quant or entry.quant)
    for matches in (_is_same, _is_alike):
        for figure in entry.memory:
            if figure.gb > 0 and matches(_normal(figure.quant), wanted):
                return _published(figure.gb, figure.source, figure.quant)
    gb, source = entry.min_memory_gb, entry.min_memory_source
    if gb and gb > 0 and source and _is_alike(_normal(entry.quant), wanted):
        return _published(gb, source, entry.quant)
    return None


def guess_from_catalog(
    n_bytes: int | None,
    n_params: int | None,
    n_ctx: int,
    *,
    family: str | None = None,
    kv_type: KvType = "f16",
) -> Estimate | None:
    """A guess for a model of which only the file's size is known, or else its parameters (then as
    Q4_K_M); None with neither. `family` is the catalog's.

    Beside the closed form on nineteen real models at 8,192 tokens it is from 5 % under to 45 % over
    (8 % from eight billion parameters on) for those with attention, far over for recurrent ones.
    """
    if not n_bytes and not n_params:
        return None
    weights = n_bytes or int((n_params or 0) * 0.61)
    params = n_params or int(weights / 0.61)
    n_block, block_bytes = KV_BLOCKS[kv_type]
    first, beyond = _KV_SHARES.get(family or "", (1.0, 1.0))
    n_plain = first * min(n_ctx, _USUAL_N_CTX) + beyond * max(0, n_ctx - _USUAL_N_CTX)
    per_token = _kv_per_token(params) * block_bytes / n_block / 2
    return Estimate(
        weights_bytes=weights,
        kv_bytes=int(per_token * n_plain),
        compute_bytes=_GUESS_COMPUTE_BYTES,
        overhead_bytes=_GUESS_OVERHEAD_BYTES,
        source="filesize",
        notes=("a guess from the file's size",),
        output_bytes=weights,
    )


def _kv_per_token(n_params: int) -> float:
    billions = n_params / 1e9
    small = min(1.0, max(0.2, billions / 0.8))
    return _KV_BYTES * max(math.sqrt(billions / 10), small)


def _published(gb: float, source: str, quant: str) -> Estimate:
    n_bytes = int(gb * _GB)
    return Estimate(
        weights_bytes=n_bytes,
        kv_bytes=0,
        compute_bytes=0,
        overhead_bytes=0,
        source="published",
        notes=(f"{gb:g} GB for {escape_line(quant)}, says {escape_line(source)}",),
        output_bytes=n_bytes,
    )


def _normal(quant: str) -> str:
    return quant.upper().removeprefix("UD-").removeprefix("I1-")


def _is_same(figure: str, wanted: str) -> bool:
    return figure == wanted or {figure, wanted} <= _SIXTEEN


def _is_alike(figure: str, wanted: str) -> bool:
    given, asked = _BITS.match(figure), _BITS.match(wanted)
    return given is not None and asked is not None and given[1] == asked[1]

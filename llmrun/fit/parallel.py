"""How many requests a loaded model works on at once, and the context they share. Pure but for the
plans it asks for.

All streams share one cache (llama.cpp's unified KV), so what is chosen is its size in all: the
context of one stream times their number where that fits as well as one stream does. A request may
take more than its part while others take less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llmrun.fit.candidates import USUAL_N_CTX, Wishes
from llmrun.fit.plan import Plan
from llmrun.fit.types import GIB, Estimate
from llmrun.gguf.types import ModelInfo

MAX_STREAMS = 256  # LLAMA_MAX_SEQ
LEAST_STREAM_N_CTX = 4096
"""A stream with less context is of little use."""

# Streams that are chosen unasked. A GPU computes many rows in the time of one; a CPU soon takes
# longer for each, and more streams then only make all of them slow.
_STREAMS_ON_GPU = 8
_STREAMS_ON_CPU = 4
# A stream's context, and how large the whole cache may then get unasked: so many bytes, or this
# part of the weights, whichever is more. Clearing it delays the start, by 0.5 s a GiB on a CPU.
_UNASKED: tuple[tuple[int, int, float], ...] = (
    (USUAL_N_CTX, GIB, 0.5),
    (LEAST_STREAM_N_CTX, 2 * GIB, 1.0),
)
# Only where the number of streams was asked for: nobody gains by more streams that are so short.
_UNASKED_SHORT: tuple[tuple[int, int, float], ...] = (
    (LEAST_STREAM_N_CTX // 2, 2 * GIB, 1.0),
    (LEAST_STREAM_N_CTX // 4, 2 * GIB, 1.0),
)


@dataclass(frozen=True, slots=True)
class _Share:
    """`n_ctx` tokens for all streams together. What the cache may take of memory: `most_bytes` or
    `most_share` of the weights."""

    n_streams: int
    n_ctx: int
    most_bytes: int = 0
    most_share: float = math.inf

    def allows(self, need: Estimate) -> bool:
        return need.kv_bytes <= max(self.most_bytes, self.most_share * need.weights_bytes)


def choose_parallel(
    info: ModelInfo,
    wishes: Wishes,
    alone: Plan,
    make_plan: Callable[[Wishes], Plan],
    *,
    n_streams: int | None = None,
) -> Plan:
    """The plan for `n_streams` at once (None: as many as are of use and fit).

    `alone` is the plan of `wishes` for one stream. With `wishes.n_ctx` each stream is to have that
    much. What one stream would get (its place, its KV type) is not given up for more of them; for a
    number that was asked for the shared context gets shorter instead, at the worst as short as one
    stream's, and that plan may have any verdict.
    """
    if n_streams == 1:
        return alone
    if n_streams is None and alone.verdict in ("tight", "no"):
        return alone
    for share in _list_shares(info, wishes, alone, n_streams):
        made = make_plan(replace(wishes, n_seq=share.n_streams, n_ctx=share.n_ctx))
        if not (_is_as_good(made, alone) and share.allows(made.estimate)):
            continue
        each = share.n_ctx // share.n_streams
        words = f"context {share.n_ctx}: {each} for each of {share.n_streams} requests at once"
        return replace(made, reasons=(words, *made.reasons[1:]))
    if n_streams is None:
        return alone
    return make_plan(replace(wishes, n_seq=n_streams))


def request_limit(info: ModelInfo, wishes: Wishes, plan: Plan) -> int:
    """The most tokens that one request can have: what was asked for, else all of the cache up to
    what the model was trained for."""
    limit = wishes.n_ctx or info.n_ctx_train or plan.n_ctx
    return min(plan.n_ctx, limit)


def _list_shares(
    info: ModelInfo, wishes: Wishes, alone: Plan, n_streams: int | None
) -> Iterator[_Share]:
    """What to try, best first."""
    if n_streams is None:
        most = _STREAMS_ON_GPU if alone.placement.is_whole else _STREAMS_ON_CPU
        numbers = range(most, 1, -1)
        contexts = _UNASKED
    else:
        numbers = range(n_streams, n_streams - 1, -1)
        contexts = (*_UNASKED, *_UNASKED_SHORT)
    trained = info.n_ctx_train or LEAST_STREAM_N_CTX
    for number in numbers:
        if wishes.n_ctx is None:
            for each, most_bytes, most_share in contexts:
                n_ctx = max(alone.n_ctx, number * min(trained, each))
                yield _Share(number, n_ctx, most_bytes, most_share)
        else:
            # A number that was asked for stands; then the context gives way.
            n_least = number if n_streams is None else 1
            for n_parts in range(number, n_least - 1, -1):
                yield _Share(number, n_parts * wishes.n_ctx)


def _is_as_good(made: Plan, alone: Plan) -> bool:
    return (
        made.verdict == alone.verdict
        and made.verdict not in ("tight", "no")
        and (made.type_k, made.type_v) == (alone.type_k, alone.type_v)
        and made.placement.n_on_gpu >= alone.placement.n_on_gpu
        and made.n_cpu_moe <= alone.n_cpu_moe
        and made.use_mmap >= alone.use_mmap
    )

"""How many requests a loaded model works on at once, and the cache they have. Pure but for the
plans it asks for.

What is chosen is the size of the cache in all: the context of one stream times their number where
that fits as well as one stream does. In one cache for all streams (llama.cpp's unified KV) a
request may take more than its part while others take less, but every row looks for its own among
the tokens of all. With a cache for each stream it looks at its own alone, and its part is all that
a request can have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llmrun.fit.candidates import USUAL_N_CTX, Wishes
from llmrun.fit.formula import has_recurrent_state
from llmrun.fit.layers import read_layout
from llmrun.fit.plan import Plan
from llmrun.fit.types import GIB, Estimate, Setup
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
    number that was asked for the context in all gets shorter instead, at the worst as short as one
    stream's, and that plan may have any verdict. Each has a cache of its own where `list_caches`
    says so and that fits as well.
    """
    if n_streams == 1:
        return alone
    if n_streams is None and alone.verdict in ("tight", "no"):
        return alone
    for share in _list_shares(info, wishes, alone, n_streams):
        shared = replace(wishes, n_seq=share.n_streams, n_ctx=share.n_ctx)
        most = _most_of_one(info, wishes, share.n_ctx)
        for kv_unified in list_caches(info, shared, most):
            made = make_plan(replace(shared, kv_unified=kv_unified))
            if is_as_good(made, alone) and share.allows(made.estimate):
                return replace(made, reasons=(_describe(made), *made.reasons[1:]))
    if n_streams is None:
        return alone
    return make_plan(replace(wishes, n_seq=n_streams))


def request_limit(info: ModelInfo, wishes: Wishes, plan: Plan) -> int:
    """The most tokens that one request can have: what was asked for, else what the model was
    trained for; and no more than its sequence can have in the cache of `plan`."""
    n_ctx_seq = plan.setup.n_ctx_seq
    return min(n_ctx_seq, _most_of_one(info, wishes, n_ctx_seq))


def list_caches(info: ModelInfo, wishes: Wishes, n_ctx_most: int) -> tuple[bool, ...]:
    """The caches (`kv_unified`) to try for the sequences and the context of `wishes`, best first.
    `n_ctx_most`: the most tokens of one request.

    Unless the user says which: one for each sequence where no request loses by that, else one for
    all. A recurrent state, and the cache of a draft model, are kept for all in one.
    """
    if wishes.n_seq == 1:
        return (True,)
    if wishes.kv_unified is not None:
        return (wishes.kv_unified,)
    each = Setup(wishes.n_ctx or 0, n_seq_max=wishes.n_seq, kv_unified=False).n_ctx_seq
    can_be_apart = (
        read_layout(info) is not None  # else it may have such a state
        and not has_recurrent_state(info)
        and wishes.speculative != "draft"
    )
    return (False, True) if can_be_apart and n_ctx_most <= each else (True,)


def _most_of_one(info: ModelInfo, wishes: Wishes, n_ctx: int) -> int:
    """What a request may have of an unbounded cache; `n_ctx` where nothing bounds it."""
    return wishes.n_ctx or info.n_ctx_train or n_ctx


def _describe(made: Plan) -> str:
    each = made.n_ctx // made.n_seq
    where = "" if made.kv_unified else ", in a cache of its own"
    return f"context {made.n_ctx}: {each} for each of {made.n_seq} requests at once{where}"


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


def is_as_good(made: Plan, alone: Plan) -> bool:
    """Whether nothing that `alone` has was given up: a place with a margin, the KV type."""
    return (
        made.verdict == alone.verdict
        and made.verdict not in ("tight", "no")
        and (made.type_k, made.type_v) == (alone.type_k, alone.type_v)
        and made.placement.n_on_gpu >= alone.placement.n_on_gpu
        and made.n_cpu_moe <= alone.n_cpu_moe
        and made.use_mmap >= alone.use_mmap
    )

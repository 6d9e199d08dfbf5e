"""The fit table: each quant of a model at each context on one machine. Pure, but for what the
options' allocators do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrun.fit.plan import Plan, Wishes, plan
from llmrun.fit.quants import QuantOption, QuantPick, choose_quant, derive_info
from llmrun.fit.types import Measurement, Setup
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine

CONTEXTS = (4096, 8192, 32768, 131072)
"""Contexts that a row is made for, besides the model's own limit."""


@dataclass(frozen=True, slots=True)
class Row:
    """A quant at a context, with the plan to run it so. `reasons` are the plan's, for the
    recommended row with those of the choice before them. `is_derived`: its header was not read, so
    its parts are those of another quant scaled to the size of its file."""

    option: QuantOption
    plan: Plan
    reasons: tuple[str, ...]
    is_recommended: bool = False
    is_derived: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows by quant in the order of the options, then by context. One of them is recommended,
    unless none runs. `pick` is the choice that it comes from."""

    rows: tuple[Row, ...]
    pick: QuantPick

    @property
    def recommended(self) -> Row | None:
        return next((row for row in self.rows if row.is_recommended), None)


def list_contexts(info: ModelInfo, n_ctx: int | None = None) -> tuple[int, ...]:
    """The contexts of the rows: `n_ctx` alone if it is given, else `CONTEXTS` below the model's
    limit, and the limit itself."""
    if n_ctx is not None:
        return (n_ctx,)
    limit = info.n_ctx_train
    if not limit:
        return CONTEXTS[:2]
    return (*(n for n in CONTEXTS if n < limit), limit)


def build_rows(
    machine: Machine,
    options: Sequence[QuantOption],
    wishes: Wishes,
    *,
    preferred: str,
    like: ModelInfo,
) -> Table:
    """The table for `options` (one at least, labels differ). `like` is the header of one of them;
    those that have none of their own are derived from it. `preferred` is the label of the quant
    that is taken where it does well.

    Allocators are asked as the rows need it; see `ask_at_once`. Raises UsageError for wishes that
    llama.cpp would refuse, and for files that are no model.
    """
    contexts = list_contexts(like, wishes.n_ctx)
    pick = choose_quant(machine, options, wishes, preferred=preferred, like=like)
    rows: list[Row] = []
    for option in options:
        info = option.info or derive_info(like, option.n_bytes, option.label)
        own = {
            n_ctx: plan(machine, info, replace(wishes, n_ctx=n_ctx), allocator=option.allocator)
            for n_ctx in contexts
        }
        is_picked = option.label == pick.option.label and pick.plan.runs
        if is_picked:
            own[pick.plan.n_ctx] = pick.plan
        for n_ctx, made in sorted(own.items()):
            is_it = is_picked and n_ctx == pick.plan.n_ctx
            reasons = tuple(dict.fromkeys((*(pick.reasons if is_it else ()), *made.reasons)))
            rows.append(Row(option, made, reasons, is_it, option.info is None))
    return Table(tuple(rows), pick)


class _Listener:
    """An allocator that knows nothing and remembers what it was asked."""

    problem: str | None = None

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices
        self.asked: dict[Setup, None] = {}

    def measure(self, setups: Sequence[Setup]) -> tuple[Measurement | None, ...]:
        self.asked.update(dict.fromkeys(setups))
        return (None,) * len(setups)


def ask_at_once(machine: Machine, option: QuantOption, wishes: Wishes) -> None:
    """Have the option's allocator, if it has one, answer in one go all that the rows of this quant
    are likely to ask it; it remembers. Raises as `build_rows` does."""
    info, allocator = option.info, option.allocator
    if info is None or allocator is None:
        return
    listener = _Listener(allocator.devices)
    for n_ctx in dict.fromkeys((*list_contexts(info, wishes.n_ctx), wishes.n_ctx)):
        plan(machine, info, replace(wishes, n_ctx=n_ctx), allocator=listener)
    if listener.asked:
        allocator.measure(tuple(listener.asked))

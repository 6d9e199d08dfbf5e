"""Which models of a catalog suit a machine, best first, before any of their files is looked at.
Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, TypeVar

from llmrun.fit.placement import Choice, Placement, Task, place
from llmrun.fit.plan import Verdict, Wishes, plan
from llmrun.fit.pools import Pools
from llmrun.fit.published import PublishedFigure, guess_from_catalog, published_need
from llmrun.fit.speed import Forecast, forecast
from llmrun.fit.types import Estimate, Source
from llmrun.gguf.types import Header, ModelInfo
from llmrun.hardware.machine import Machine

FLUENT_TOK_S = 6.0
"""About as fast as most people read; what is slower is a trial of patience."""

_N_CTX = 8192
# Layers that a model without a header is taken to have: it only matters where it is split.
_N_BLOCKS = 32
# Models whose sizes differ by less are alike; then the catalog's order decides.
_ALIKE = 1.15
# Of RAM whose speed was not measured: that of an old laptop, to judge fluency with.
_SLOW_RAM_BYTES_S = 25e9
_NOT_FOR_CHAT: tuple[Literal["embedding", "rerank"], ...] = ("embedding", "rerank")


class Entry(Protocol):
    """What is asked of a catalog's entry (`catalog.entries.CatalogEntry`)."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def quant(self) -> str: ...
    @property
    def n_bytes(self) -> int | None: ...
    @property
    def n_params(self) -> int | None: ...
    @property
    def n_params_active(self) -> int | None: ...
    @property
    def n_ctx(self) -> int | None: ...
    @property
    def min_memory_gb(self) -> float | None: ...
    @property
    def min_memory_source(self) -> str | None: ...
    @property
    def memory(self) -> Sequence[PublishedFigure]: ...
    def has(self, capability: Literal["embedding", "rerank"], /) -> bool: ...


E = TypeVar("E", bound=Entry)
E_co = TypeVar("E_co", bound=Entry, covariant=True)


class Entries(Protocol[E_co]):
    """A catalog (`catalog.entries.Catalog`)."""

    def entries(self) -> Iterable[E_co]: ...


@dataclass(frozen=True, slots=True)
class Ranked(Generic[E]):
    """A model as it would run here: in its default quant, with an everyday context.

    `needed_bytes` is all memory that it takes. `source` "formula": its header was known.
    `forecast` is None where the speed of a memory is not known, `tok_s_guess` is good enough to
    order by even then.
    """

    entry: E
    n_bytes: int
    n_ctx: int
    needed_bytes: int
    verdict: Verdict
    source: Source
    forecast: Forecast | None
    tok_s_guess: float | None
    placement: Placement
    reasons: tuple[str, ...] = ()

    @property
    def is_fluent(self) -> bool:
        """Whether it answers about as fast as people read."""
        return self.tok_s_guess is None or self.tok_s_guess >= FLUENT_TOK_S

    @property
    def suits(self) -> bool:
        """Whether it can be recommended: it fits where it is fast, with a margin, and is fluent."""
        return self.verdict == "fits" and self.is_fluent

    @property
    def runs(self) -> bool:
        return self.verdict != "no"

    @property
    def quality(self) -> int:
        """A stand-in for how good its answers are: the number of parameters, on a coarse scale; of
        a mixture of experts the geometric mean of all and those that are used."""
        n_all = max(1, self.entry.n_params or 1)
        n = math.sqrt(n_all * min(n_all, self.entry.n_params_active or n_all))
        return round(math.log(n, _ALIKE))


def rank(
    catalog: Entries[E], machine: Machine, *, infos: Mapping[str, ModelInfo] | None = None
) -> tuple[Ranked[E], ...]:
    """The catalog's chat models of known size, best first: those that suit by quality, then the
    others that are fluent, then the slow ones by quality and speed, then those that do not run, the
    smallest first.

    `infos` are headers by the entry's name, where they are at hand: they are judged as `plan` does,
    the others by published figures or the size of their file.
    """
    found = []
    for entry in catalog.entries():
        if entry.n_bytes and not any(entry.has(what) for what in _NOT_FOR_CHAT):
            info = (infos or {}).get(entry.name)
            found.append(
                _by_header(entry, info, machine) if info else judge_by_size(entry, machine)
            )
    return tuple(sorted(found, key=_order))


def best_for(catalog: Entries[E], machine: Machine) -> Ranked[E] | None:
    """The catalog's best chat model for the machine; None when none runs or the memory could not be
    read."""
    if not machine.memory.is_known:
        return None
    return next((ranked for ranked in rank(catalog, machine) if ranked.runs), None)


def _order(ranked: Ranked[E]) -> tuple[int, float]:
    if not ranked.runs:
        return (3, ranked.needed_bytes)
    if ranked.is_fluent:
        return (0 if ranked.suits else 1, -ranked.quality)
    # Where all are slow, twice the speed is worth a model of a quarter of the size.
    speed = max(ranked.tok_s_guess or 0, 1e-3)
    return (2, -ranked.quality - 2 * math.log(speed, _ALIKE))


def _by_header(entry: E, info: ModelInfo, machine: Machine) -> Ranked[E]:
    n_ctx = min(_N_CTX, info.n_ctx_train or _N_CTX)
    made = plan(machine, info, Wishes(n_ctx=n_ctx))
    speed = made.forecast or forecast(info, made.placement, _with_speed(machine))
    return Ranked(
        entry=entry,
        n_bytes=info.n_bytes,
        n_ctx=made.n_ctx,
        needed_bytes=made.placement.total_bytes,
        verdict=made.verdict,
        source=made.source,
        forecast=made.forecast,
        tok_s_guess=speed.middle if speed is not None else None,
        placement=made.placement,
        reasons=made.reasons[1:],
    )


def judge_by_size(
    entry: E,
    machine: Machine,
    *,
    quant: str | None = None,
    n_bytes: int | None = None,
    n_ctx: int | None = None,
    published: bool = False,
) -> Ranked[E]:
    """How `entry` would run without a look at its header, by default in its own quant, whose size
    must be known then. `published`: by somebody's figure for the quant where there is one. (These
    are for whatever context and overhead each source had in mind, so they compare badly.)"""
    quant, n_bytes = quant or entry.quant, n_bytes or entry.n_bytes or 0
    n_ctx = n_ctx or min(_N_CTX, entry.n_ctx or _N_CTX)
    guess = guess_from_catalog(n_bytes, entry.n_params, n_ctx, family=entry.family)
    assert guess is not None  # it has a size
    info = _stub_info(entry, n_bytes)
    has_experts = info.n_expert is not None
    verdict, placement = _place(guess, machine, n_ctx, has_experts=has_experts)
    known = forecast(info, placement, machine)
    speed = known or forecast(info, placement, _with_speed(machine))
    need = guess
    figure = published_need(entry, quant) if published else None
    # Some figures are of a smaller file, or round down.
    if figure is not None and figure.total_bytes >= n_bytes:
        need = figure
        verdict, placement = _place(figure, machine, n_ctx, has_experts=has_experts)
    return Ranked(
        entry=entry,
        n_bytes=n_bytes,
        n_ctx=n_ctx,
        needed_bytes=placement.total_bytes,
        verdict=verdict,
        source=need.source,
        forecast=known,
        tok_s_guess=speed.middle if speed is not None else None,
        placement=placement,
        reasons=(*placement.reasons, *need.notes),
    )


def _place(
    need: Estimate, machine: Machine, n_ctx: int, *, has_experts: bool
) -> tuple[Verdict, Placement]:
    """As the planner does, but with one context: all on the GPU, part of it, none, then without
    margins."""
    task = Task.of(need, _N_BLOCKS)
    if has_experts:
        # All of it counts as experts: how many are used decides the speed (see `_stub_info`).
        task = replace(task, need=replace(task.need, layer_experts=task.need.layer_weights))
    pools = Pools.of(machine)
    host = Choice(0, companions_on_gpu=False)
    ways: tuple[tuple[Verdict, Choice], ...] = (("fits", host),)
    if pools.has_gpu:
        split = Choice(None, companions_on_gpu=False)
        ways = (("fits", Choice(task.n_places)), ("partly_on_cpu", split), ("cpu_only", host))
    for verdict, choice in ways:
        placement = place(task, pools, choice)
        if placement.fits and (choice.n_on_gpu is not None or placement.n_on_gpu > 1):
            return verdict, replace(placement, n_ctx=n_ctx)
    for _, choice in ways:
        placement = place(task, pools.without_margin(), choice)
        if placement.fits:
            return "tight", replace(placement, n_ctx=n_ctx)
    return "no", replace(placement, n_ctx=n_ctx)


def _with_speed(machine: Machine) -> Machine:
    """The machine with a speed for every memory, to guess with."""
    memory = machine.memory
    if memory.bandwidth_bytes_s is None:
        memory = replace(memory, bandwidth_bytes_s=_SLOW_RAM_BYTES_S)
    devices = tuple(
        device
        if device.bandwidth_bytes_s is not None
        # The slowest cards that people compute with are so fast.
        else replace(device, bandwidth_bytes_s=max(4 * _SLOW_RAM_BYTES_S, 1.0))
        for device in machine.devices
    )
    return replace(machine, memory=memory, devices=devices)


def _stub_info(entry: Entry, n_bytes: int) -> ModelInfo:
    """As much of a header as the forecast asks for. The experts of a mixture are its parameters."""
    n_all, n_active = entry.n_params, entry.n_params_active
    is_mixture = n_all is not None and n_active is not None and n_active < n_all
    return ModelInfo(
        architecture="",
        name=entry.name,
        kind="model",
        quant=entry.quant,
        quant_mix=(),
        n_params=entry.n_params or 0,
        n_bytes=n_bytes,
        tensor_bytes=n_bytes,
        n_layers=_N_BLOCKS,
        n_ctx_train=None,
        n_embd=None,
        n_vocab=None,
        n_swa=None,
        n_expert=n_all if is_mixture else None,
        n_expert_used=n_active if is_mixture else None,
        licence=None,
        chat_template=None,
        sampling={},
        header=Header(3, {}, (), 0, 0),
    )

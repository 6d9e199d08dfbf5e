"""`llmrun fit`: how a model would run here or elsewhere. Nothing but headers is fetched."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from llmrun.cli.fit_result import (
    DeviceData,
    FitResult,
    FitRow,
    MachineData,
    MemoryData,
    ModelData,
    RankResult,
    RankRow,
    SettingsData,
)
from llmrun.cli.judge import UPDATE_ENGINE
from llmrun.cli.options import Invocation, OptionalModelArgument, Outcome, register
from llmrun.errors import HubUnreachableError, NotFoundError, UsageError
from llmrun.text import escape_line, format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from llmrun.catalog.entries import CatalogEntry
    from llmrun.cli.fit_models import Examined
    from llmrun.fit.placement import Share
    from llmrun.fit.ranking import Ranked
    from llmrun.fit.speed import Forecast
    from llmrun.fit.table import Row
    from llmrun.hardware.machine import Machine


def fit(
    invocation: Invocation,
    model: OptionalModelArgument = None,
    quant: Annotated[
        str | None, typer.Option("--quant", metavar="QUANT", help="Only this quant.")
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine", metavar="NAME|FILE", help="Plan for another machine, such as m2-8gb."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="As if so much RAM were there and free: 16GiB."
        ),
    ] = None,
    projector: Annotated[
        bool, typer.Option("--projector", help="With the projector for images, if there is one.")
    ] = False,
) -> Outcome:
    """Show how a model would run here, before it is downloaded.

    Without MODEL: the catalog's models, best first for this machine.
    """
    here = invocation.services.machine()
    target = _choose_machine(invocation, here, machine, memory)
    if model is None:
        if quant is not None:
            raise UsageError("--quant needs a model", hint="llmrun fit --help")
        return _rank(invocation, target)
    from llmrun.cli.fit_models import Examined, examine

    try:
        found = examine(
            invocation,
            model,
            quant,
            here=here,
            target=target,
            is_here=machine is None,
            with_projector=projector,
        )
    except HubUnreachableError as error:
        listed = _list_published(invocation, model, quant)
        if listed is None:
            raise
        invocation.output.warn(f"{error.message}: these are published figures and guesses")
        return _by_catalog(invocation, *listed, target)
    if isinstance(found, Examined):
        return _table(invocation, found, target)
    if found.entry is None:
        raise NotFoundError(f"no header of {found.reference} can be had", hint="llmrun list")
    return _by_catalog(
        invocation, found.entry, {c.label: c.n_bytes for c in found.alternatives}, target
    )


def _list_published(
    invocation: Invocation, text: str, quant: str | None
) -> tuple[CatalogEntry, Mapping[str, int]] | None:
    """The catalog's entry for what `text` and `quant` name, and the sizes of the quants that are
    meant; None where the catalog knows none."""
    from llmrun.catalog.names import CatalogRef, parse_reference

    named = parse_reference(text)
    if not isinstance(named, CatalogRef) or named.revision is not None:
        return None
    entry = invocation.services.catalog().get(named.name)
    if entry is None or entry.n_bytes is None:
        return None
    wanted = quant or named.tag
    sizes = {
        label: n_bytes
        for label, n_bytes in {**entry.sizes, entry.quant: entry.n_bytes}.items()
        if wanted is None or label.lower() == wanted.lower()
    }
    return (entry, sizes) if sizes else None


def _choose_machine(
    invocation: Invocation, here: Machine, name: str | None, memory: str | None
) -> Machine:
    """Raises NotFoundError and UsageError."""
    if name is not None:
        from llmrun.hardware.known import load_machine

        machine = load_machine(name)
    else:
        from llmrun.cli.measure import with_ram_bandwidth

        machine = with_ram_bandwidth(here, invocation.environment.state_dir)
    return machine if memory is None else _with_memory(machine, memory)


def _with_memory(machine: Machine, text: str) -> Machine:
    """The machine with so much RAM, all of it free. What of it a GPU may use grows or shrinks
    with it."""
    try:
        n_bytes = parse_bytes(text)
    except ValueError:
        n_bytes = 0
    if not 1 << 20 <= n_bytes < 1 << 60:
        raise UsageError(
            f"{escape_line(text)!r} is no size of memory",
            hint="write it as 16GiB, 24GB or 512M",
        )
    before = machine.memory.total_bytes
    devices = []
    for device in machine.devices:
        if device.shares_host_memory and before:
            part = min(n_bytes, device.total_bytes * n_bytes // before)
            device = replace(device, total_bytes=part, free_bytes=part)
        devices.append(device)
    memory = replace(
        machine.memory, total_bytes=n_bytes, available_bytes=n_bytes, limit_source="--memory"
    )
    return replace(machine, memory=memory, devices=tuple(devices))


# ---- one model


def _table(invocation: Invocation, found: Examined, target: Machine) -> FitResult:
    resolved, info = found.resolved, found.like
    entry = resolved.entry
    notes = found.notes
    if any(row.plan.runs and not row.plan.use_repack for row in found.table.rows):
        notes += (
            "a tight row may keep the weights in the mapped file: less memory, slower prompts",
        )
    rows = tuple(_row(row, found.references[row.option.label]) for row in found.table.rows)
    best = next((row for row in rows if row.recommended), None)
    if found.is_unknown:
        notes += (
            "this build of llama.cpp cannot run the model: it does not know the architecture "
            f"'{info.architecture}', and a newer one may",
        )
        advice = f"try: {UPDATE_ENGINE}"
    elif best is not None:
        advice = f"try: llmrun chat {shlex.quote(best.model)}{_context_flag(invocation)}"
    else:
        advice = (
            _shorter(found.table.rows, found)
            or _smaller(found)
            or _what_would_run(invocation, target, entry)
        )
    return FitResult(
        machine=describe(target),
        model=ModelData(
            model=resolved.base or resolved.reference,
            title=resolved.title,
            repo=resolved.repo,
            commit=resolved.commit,
            origin=resolved.origin,
            architecture=info.architecture,
            params=info.n_params or None,
            params_active=entry.n_params_active if entry else None,
            layers=info.n_layers,
            experts=info.n_expert,
            context=info.n_ctx_train,
        ),
        rows=rows,
        notes=notes,
        advice=advice,
    )


def _row(row: Row, reference: str) -> FitRow:
    made, info, label = row.plan, row.option.info, row.option.label
    if label.lower().endswith(".gguf") and info is not None and info.quant is not None:
        label = info.quant  # a file whose name does not tell it
    return FitRow(
        quant=label,
        model=reference,
        size=row.option.n_bytes,
        n_ctx=made.n_ctx,
        verdict=made.verdict,
        settings=SettingsData(
            n_ctx=made.n_ctx,
            type_k=made.type_k,
            type_v=made.type_v,
            flash_attn=made.flash_attn,
            n_gpu_layers=made.n_gpu_layers,
            n_cpu_moe=made.n_cpu_moe,
            tensor_split=made.tensor_split,
            n_ubatch=made.n_ubatch,
            use_mmap=made.use_mmap,
            use_repack=made.use_repack,
            n_threads=made.n_threads,
        ),
        memory=_memory(made.shares),
        source=made.source,
        tok_s=_round_speed(made.forecast) if made.runs else None,
        recommended=row.is_recommended,
        reasons=row.reasons,
    )


def _memory(shares: Iterable[Share]) -> tuple[MemoryData, ...]:
    return tuple(
        MemoryData(
            device=share.device,
            weights=share.weights_bytes,
            kv=share.kv_bytes,
            compute=share.compute_bytes,
            overhead=share.overhead_bytes,
            free=share.free_bytes,
            total=share.total_bytes,
        )
        for share in shares
    )


def _by_catalog(
    invocation: Invocation, entry: CatalogEntry, sizes: Mapping[str, int], target: Machine
) -> FitResult:
    """What can be said without any header: by published figures, and the `sizes` of the quants."""
    from llmrun.fit.ranking import judge_by_size

    n_ctx = invocation.settings.ctx
    judged = {
        label: judge_by_size(
            entry, target, quant=label, n_bytes=sizes[label], n_ctx=n_ctx, published=True
        )
        for label in sorted(sizes, key=lambda label: sizes[label])
    }
    best = judged.get(entry.quant)
    if best is None or not best.runs:
        running = [ranked for ranked in judged.values() if ranked.runs]
        best = max(running, key=lambda ranked: ranked.n_bytes, default=None)
    rows = tuple(
        FitRow(
            quant=label,
            model=entry.name if label == entry.quant else f"{entry.name}:{label.lower()}",
            size=ranked.n_bytes,
            n_ctx=ranked.n_ctx,
            verdict=ranked.verdict,
            settings=None,
            memory=_memory(ranked.placement.shares),
            source=ranked.source,
            tok_s=_speed(ranked),
            recommended=ranked is best,
            reasons=ranked.reasons,
        )
        for label, ranked in judged.items()
    )
    chosen = next((row for row in rows if row.recommended), None)
    if chosen is not None:
        advice = f"try: llmrun pull {shlex.quote(chosen.model)}"
    else:
        advice = _what_would_run(invocation, target, entry)
    return FitResult(
        machine=describe(target),
        model=ModelData(
            model=entry.name,
            title=entry.title,
            repo=entry.repo,
            commit=None,
            origin="catalog",
            architecture=None,
            params=entry.n_params,
            params_active=entry.n_params_active,
            layers=None,
            experts=None,
            context=entry.n_ctx,
        ),
        rows=rows,
        notes=("no header of this model could be read, so nothing here is exact",),
        advice=advice,
    )


def _context_flag(invocation: Invocation) -> str:
    """What keeps the context that the table was asked for."""
    n_ctx = invocation.settings.ctx
    is_flag = invocation.settings.sources["ctx"].kind == "flag"
    return f" --ctx {n_ctx}" if n_ctx is not None and is_flag else ""


def _shorter(rows: Iterable[Row], found: Examined) -> str | None:
    """The longest context that would fit where none of the asked ones does."""
    fitting = [row for row in rows if row.plan.n_ctx_that_fits is not None]
    best = max(fitting, key=lambda row: row.plan.n_ctx_that_fits or 0, default=None)
    if best is None:
        return None
    n_ctx, reference = best.plan.n_ctx_that_fits, found.references[best.option.label]
    return (
        f"what would run: {best.option.label} with a context of {n_ctx}: "
        f"llmrun chat {shlex.quote(reference)} --ctx {n_ctx}"
    )


def _smaller(found: Examined) -> str | None:
    if found.instead is None:
        return None
    choice, reference = found.instead
    return (
        f"what would run: {choice.label} ({format_bytes(choice.n_bytes)}): "
        f"llmrun chat {shlex.quote(reference)}"
    )


def _what_would_run(invocation: Invocation, target: Machine, entry: CatalogEntry | None) -> str:
    """A sentence for a model of which nothing runs."""
    from llmrun.fit.ranking import best_for

    best = best_for(invocation.services.catalog(), target)
    if best is None or best.entry is entry:
        return "nothing in the catalog would run there"
    return (
        f"what would run: {best.entry.title} ({format_bytes(best.n_bytes)}): "
        f"llmrun chat {shlex.quote(best.entry.name)}"
    )


# ---- the catalog


def _rank(invocation: Invocation, target: Machine) -> RankResult:
    from llmrun.cli.fit_models import kept_headers
    from llmrun.fit.ranking import rank

    catalog = invocation.services.catalog()
    ranked = rank(catalog, target, infos=kept_headers(invocation, catalog))
    is_known = target.memory.is_known
    best = next((each for each in ranked if each.runs), None) if is_known else None
    rows = tuple(
        RankRow(
            model=each.entry.name,
            title=each.entry.title,
            quant=each.entry.quant,
            size=each.n_bytes,
            params=each.entry.n_params,
            params_active=each.entry.n_params_active,
            verdict=each.verdict,
            needed=each.needed_bytes,
            source=each.source,
            tok_s=_speed(each),
            recommended=each is best,
            command=f"llmrun pull {shlex.quote(each.entry.name)}",
            reasons=each.reasons,
        )
        for each in ranked
    )
    n_ctx = max((each.n_ctx for each in ranked), default=0)
    notes: tuple[str, ...] = (
        f"memory with a context of {n_ctx} tokens; `llmrun fit MODEL` says it exactly",
    )
    if is_known and best is None:
        notes += ("nothing in the catalog runs there",)
    if not is_known:
        notes += ("how much memory is free could not be read: nothing is recommended",)
    return RankResult(describe(target), rows, notes)


def _speed(ranked: Ranked[CatalogEntry]) -> tuple[float, float] | None:
    return _round_speed(ranked.forecast) if ranked.runs else None


def _round_speed(speed: Forecast | None) -> tuple[float, float] | None:
    """As `pull` gives it."""
    return (round(speed.low, 1), round(speed.high, 1)) if speed is not None else None


# ---- the machine


def describe(machine: Machine) -> MachineData:
    return MachineData(
        name=machine.name,
        cpu=machine.cpu.name,
        cores=machine.cpu.n_physical,
        ram_total=machine.memory.total_bytes,
        ram_free=machine.memory.available_bytes,
        devices=tuple(
            DeviceData(
                device=device.name,
                description=device.description,
                memory="shared" if device.shares_host_memory else "own",
                free=device.free_bytes,
                total=device.total_bytes,
            )
            for device in machine.devices
            if device.kind != "cpu"
        ),
        notes=machine.notes,
    )


def add_to(app: typer.Typer) -> None:
    register(app, "fit", fit, "load")

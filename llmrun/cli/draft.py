"""The model that drafts for another one: found, counted in, and brought here with it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrun.cli.options import Invocation
from llmrun.errors import UsageError

if TYPE_CHECKING:
    from llmrun.catalog.types import Lister, Resolved
    from llmrun.fit.plan import Wishes
    from llmrun.fit.types import Setup
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.machine import Machine


@dataclass(frozen=True, slots=True)
class Draft:
    """`info` is None for a model inside a package that was not fetched yet."""

    resolved: Resolved
    info: ModelInfo | None


def find_draft(invocation: Invocation, target: Resolved, hub: Lister | None = None) -> Draft | None:
    """The draft model that goes with `target`: the one that was named, else the catalog's; None
    unless `--speculative draft` is in force.

    Raises UsageError where there is none or it cannot draft, and as `resolve_model` does.
    """
    from llmrun.cli.acquire import read_model_info, resolve_model
    from llmrun.engine.draft_file import check_draft_kind

    settings = invocation.settings
    if settings.speculative != "draft":
        if settings.draft_model and settings.sources["draft_model"].kind == "flag":
            raise UsageError(
                "--draft-model guesses only with --speculative draft",
                hint=f"--speculative draft --draft-model {shlex.quote(settings.draft_model)}",
            )
        return None
    resolved = resolve_model(invocation, settings.draft_model or _own_draft(target), hub=hub)
    info = read_model_info(invocation, resolved)
    if info is not None:
        check_draft_kind(resolved.reference, info.kind)
    return Draft(resolved, info)


def _own_draft(target: Resolved) -> str:
    entry = target.entry
    own = None if entry is None else entry.drafter
    if own is not None and own.kind is None:
        return f"{own.repo}/{own.file}"
    why = "none is known that goes with this model"
    if own is not None:
        why = f"this model's own drafter is of kind {own.kind}, which cannot be used yet"
    raise UsageError(
        "no draft model is named",
        why=why,
        hint="add --draft-model with a smaller model of the same family, or --speculative auto",
    )


def count_draft(
    invocation: Invocation, machine: Machine, draft: Draft, info: ModelInfo, wishes: Wishes
) -> Wishes:
    """`wishes` with the memory that the draft model takes beside the model `info`, in the context
    that both can have. Raises UsageError when the headers show different vocabularies."""
    from llmrun.fit.companions import companion_bytes, drafter_need
    from llmrun.fit.plan import plan

    theirs = draft.info.n_vocab if draft.info is not None else None
    if theirs and info.n_vocab and theirs != info.n_vocab:
        raise UsageError(
            "the draft model has another vocabulary",
            why=f"{draft.resolved.reference} has {theirs} tokens, the model has {info.n_vocab}",
            hint="name a smaller model of the same family",
        )
    device: Literal["gpu", "ram"] = "gpu" if machine.devices else "ram"

    def count(setup: Setup) -> Wishes:
        # As `engine.draft_file` opens it.
        setup = replace(
            setup, type_k="f16", type_v="f16", n_outputs_max=1, n_cpu_moe=0, kv_unified=True
        )
        need = drafter_need(draft.resolved.n_bytes, setup, draft.info, target=info)
        n_bytes = companion_bytes([need], device)
        return replace(wishes, companions_bytes=wishes.companions_bytes + n_bytes)

    alone = plan(machine, info, wishes)
    return count(plan(machine, info, count(alone.setup)).setup)


def fetch_draft(invocation: Invocation, draft: Draft | None, events: bool) -> tuple[Path, ...]:
    """The draft model's files in order, downloaded where they are not here."""
    from llmrun.cli import acquire

    if draft is None or draft.resolved.is_on_disk:
        return () if draft is None else draft.resolved.local_paths
    return acquire.fetch(invocation, draft.resolved, events, False)

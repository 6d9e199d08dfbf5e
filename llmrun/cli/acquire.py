"""From what a user typed to files on this machine, judged before they are downloaded.

resolve the reference → read the header (remote or local) → plan → download or unpack → read the
header of what arrived. Used by `run`, `chat` and `pull`; `show` uses the first steps.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.cli.options import Invocation
from llmrun.cli.stored import get_again
from llmrun.config import Settings
from llmrun.errors import GgufError, HubUnreachableError
from llmrun.text import format_bytes, format_count
from llmrun.ui.progress import progress_for

if TYPE_CHECKING:
    from llmrun.catalog.entries import CatalogEntry
    from llmrun.catalog.types import Resolved
    from llmrun.fit.plan import Plan, Wishes
    from llmrun.gguf.types import ModelInfo
    from llmrun.hub.types import RepoListing


@dataclass(frozen=True, slots=True)
class Acquired:
    """A model on disk whose header passed, with the plan to run it. `paths` are its files in
    order; `was_downloaded` is False for one that was here before."""

    resolved: Resolved
    info: ModelInfo
    plan: Plan
    paths: tuple[Path, ...]
    was_downloaded: bool

    @property
    def reference(self) -> str:
        return self.resolved.reference

    @property
    def entry(self) -> CatalogEntry | None:
        return self.resolved.entry


def wishes_of(settings: Settings, n_ctx_enough: int | None = None) -> Wishes:
    """The planner's wishes from the load options."""
    from llmrun.fit.plan import Wishes

    # `config.parse_value` admits only the words of the option table, which are those of Wishes.
    return Wishes(
        n_ctx=settings.ctx,
        n_gpu_layers=settings.gpu_layers,  # type: ignore[arg-type]
        type_k=settings.kv_type,  # type: ignore[arg-type]
        type_v=settings.kv_type,  # type: ignore[arg-type]
        flash_attn=settings.flash_attn,  # type: ignore[arg-type]
        n_threads=settings.threads,
        n_ctx_enough=n_ctx_enough,
    )


def resolve_model(invocation: Invocation, text: str, *, prefer_cache: bool = True) -> Resolved:
    """What `text` means. `prefer_cache`: a model on disk answers without asking the hub."""
    from llmrun.catalog.resolve import resolve

    services = invocation.services
    resolved = resolve(
        text,
        catalog=services.catalog(),
        hub=_LateHub(invocation),
        store=services.store(),
        prefer_cache=prefer_cache,
        cache=services.hub_cache,
    )
    for note in resolved.notes:
        invocation.output.note(note)
    return resolved


@dataclass(frozen=True, slots=True)
class _LateHub:
    """The hub, made when it is first asked: a model on disk needs none of it."""

    invocation: Invocation

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        hub = self.invocation.services.hub(offline=self.invocation.settings.offline)
        return hub.listing(repo, revision)


def read_model_info(invocation: Invocation, resolved: Resolved) -> ModelInfo | None:
    """What the header says, read from disk or from byte ranges of the hub's files; None for a
    model inside a package that was not fetched yet. Raises GgufError and the hub's errors."""
    from llmrun.gguf.header import read_header
    from llmrun.gguf.info import build_info, read_info

    if resolved.local_paths:
        try:
            # A file of unknown origin gets the slower checks each time; a download got them once.
            return read_info(resolved.local_paths, thorough=resolved.origin == "local")
        except GgufError as error:
            if resolved.origin != "local":
                error.hint = get_again(resolved.reference)
            raise
    if resolved.repo is None or resolved.commit is None:
        return None
    hub = invocation.services.hub(offline=invocation.settings.offline)
    try:
        headers = [
            read_header(hub.open_source(resolved.repo, resolved.commit, file), name=file.path)
            for file in resolved.files
        ]
        return build_info(headers, resolved.n_bytes)
    except GgufError as error:
        error.hint = f"llmrun search {shlex.quote(resolved.repo.rpartition('/')[2])}"
        raise


def acquire(
    invocation: Invocation,
    text: str,
    wishes: Wishes,
    *,
    prefer_cache: bool = True,
    events: bool = False,
    projector: bool = False,
) -> Acquired:
    """Get the model onto this machine.

    Raises WillNotFitError before a byte of weights is downloaded, unless `--force`. `events`: the
    command streams JSON. `projector`: download that too, in the same transaction.
    """
    from llmrun.fit.plan import plan, require_fit
    from llmrun.gguf.info import read_info

    settings, output = invocation.settings, invocation.output
    resolved = resolve_model(invocation, text, prefer_cache=prefer_cache)
    machine = invocation.services.machine()
    info = read_model_info(invocation, resolved)
    made = None
    if info is not None:
        made = plan(machine, info, wishes)
        require_fit(made, force=settings.force)
        if not resolved.is_on_disk:
            output.note(describe_fit(made))
    needs_projector = projector and resolved.projector is not None
    if resolved.is_on_disk and not needs_projector:
        paths, was_downloaded = resolved.local_paths, False
    else:
        paths, was_downloaded = fetch(invocation, resolved, events, needs_projector), True
        info = None
    if info is None or made is None:
        info = read_info(paths, thorough=was_downloaded)
        made = plan(machine, info, wishes)
        require_fit(made, force=settings.force)
    return Acquired(resolved, info, made, paths, was_downloaded)


def fetch(
    invocation: Invocation, resolved: Resolved, events: bool, projector: bool
) -> tuple[Path, ...]:
    """Download what `resolved` lacks; the model's files in order."""
    progress = progress_for(invocation.output, events=events)
    hub = invocation.services.hub(offline=invocation.settings.offline)
    if hub.offline:
        # Offline is offline: the package index is not asked either.
        flag = "--offline" if invocation.settings.offline else "HF_HUB_OFFLINE"
        raise HubUnreachableError(
            f"{resolved.reference} is not on this machine",
            why=f"{flag} is in force",
            hint="llmrun list",
        )
    if resolved.bundled is not None and resolved.repo is None:
        from llmrun.hub.bundled import fetch_bundled

        path = fetch_bundled(resolved.bundled, invocation.environment.data_dir, progress=progress)
        return (path,)
    from llmrun.hub.download import download

    paths = download(hub, resolved.file_set(projector=projector), progress=progress)
    return tuple(paths[: len(resolved.files)])


def describe_fit(made: Plan) -> str:
    """One line: does it fit, what it takes, at which context."""
    verdict = {"fits": "fits", "tight": "fits, but tightly", "does_not_fit": "does not fit"}
    free = f" of {format_bytes(made.available_bytes)} free" if made.available_bytes else ""
    return (
        f"{verdict[made.verdict]}: {format_bytes(made.estimate.total_bytes)}{free} memory, "
        f"context {format_count(made.n_ctx)}"
    )

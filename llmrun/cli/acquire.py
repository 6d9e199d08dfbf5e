"""From what a user typed to files on this machine, judged before they are downloaded.

resolve the reference → read the header (remote or local) → judge → download or unpack → read the
header of what arrived → plan again. Used by `run`, `chat` and `pull`; `show` uses the first steps.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrun.cli.judge import (
    RemoteModel,
    describe_fit,
    judge_download,
    plan_on_disk,
    require_fit,
)
from llmrun.cli.options import Invocation
from llmrun.cli.stored import get_again
from llmrun.config import Settings
from llmrun.errors import GgufError, HubUnreachableError
from llmrun.ui.progress import progress_for

if TYPE_CHECKING:
    from llmrun.bench.profile import Profile
    from llmrun.catalog.entries import CatalogEntry
    from llmrun.catalog.types import Lister, Resolved
    from llmrun.fit.plan import Plan, Wishes
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.machine import Machine
    from llmrun.hub.types import DownloadProgress, RemoteFile, RepoListing

HEADERS_FOLDER = "headers"
"""Where in the cache folder the headers of remote files are kept."""


@dataclass(frozen=True, slots=True)
class Acquired:
    """A model on disk whose header passed, with the plan to run it. `paths` are its files in
    order; `was_downloaded` is False for one that was here before. `wishes` and `machine`
    are what the plan was made from. `profile`: what the plan was changed to (see
    `open_model.with_profile`). `draft_paths`: the files of the model that drafts for it."""

    resolved: Resolved
    info: ModelInfo
    plan: Plan
    paths: tuple[Path, ...]
    was_downloaded: bool
    wishes: Wishes
    machine: Machine
    profile: Profile | None = None
    draft_paths: tuple[Path, ...] = ()

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
        n_cpu_moe=settings.cpu_moe,  # type: ignore[arg-type]
        tensor_split=settings.tensor_split,
        type_k=settings.kv_type,  # type: ignore[arg-type]
        type_v=settings.kv_type,  # type: ignore[arg-type]
        flash_attn=settings.flash_attn,  # type: ignore[arg-type]
        n_ubatch=settings.ubatch,
        n_threads=settings.threads,
        n_ctx_enough=n_ctx_enough,
        speculative=settings.speculative,  # type: ignore[arg-type]
        kv_unified={"on": True, "off": False}.get(settings.kv_unified),
    )


def resolve_model(
    invocation: Invocation,
    text: str,
    *,
    prefer_cache: bool = True,
    hub: Lister | None = None,
) -> Resolved:
    """What `text` means. `prefer_cache`: a model on disk answers without asking the hub (`hub`, by
    default the invocation's)."""
    from llmrun.catalog.resolve import resolve

    services = invocation.services
    resolved = resolve(
        text,
        catalog=services.catalog(),
        hub=hub or _LateHub(invocation),
        store=services.store(),
        prefer_cache=prefer_cache,
        cache=services.hub_cache,
    )
    for note in resolved.notes:
        invocation.output.note(note)
    return resolved


class _LateHub:
    """The hub, made when it is first asked: a model on disk needs none of it. Two questions about
    one repository get one answer."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        self._known: dict[tuple[str, str], RepoListing] = {}

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        if (repo, revision) not in self._known:
            hub = self._invocation.services.hub(offline=self._invocation.settings.offline)
            self._known[repo, revision] = hub.listing(repo, revision)
        return self._known[repo, revision]


def read_model_info(invocation: Invocation, resolved: Resolved) -> ModelInfo | None:
    """What the header says, read from disk or from byte ranges of the hub's files; None for a
    model inside a package that was not fetched yet. Raises GgufError and the hub's errors."""
    if not resolved.local_paths:
        model = read_remote_model(invocation, resolved)
        return None if model is None else model.info
    from llmrun.gguf.info import read_info

    try:
        # A file of unknown origin gets the slower checks each time; a download got them once.
        return read_info(resolved.local_paths, thorough=resolved.origin == "local")
    except GgufError as error:
        if resolved.origin != "local":
            error.hint = get_again(resolved.reference)
        raise


def read_remote_model(invocation: Invocation, resolved: Resolved) -> RemoteModel | None:
    """The headers of a model on the hub, each read once for parser and allocator and kept in the
    cache folder; None for a model that has no repository. Raises as `read_model_info` does."""
    from llmrun.gguf.info import build_info
    from llmrun.hub.header_cache import HeaderCache

    if resolved.repo is None or resolved.commit is None:
        return None
    hub = invocation.services.hub(offline=invocation.settings.offline)
    cache = HeaderCache(invocation.environment.cache_dir / HEADERS_FOLDER)
    try:
        found = [
            cache.get(resolved.repo, resolved.commit, file, hub.open_source)
            for file in resolved.files
        ]
        info = build_info([each.header for each in found], resolved.n_bytes)
    except GgufError as error:
        error.hint = f"llmrun search {shlex.quote(resolved.repo.rpartition('/')[2])}"
        raise
    return RemoteModel(
        info,
        tuple(
            (file.path.rpartition("/")[2], each.raw, file.n_bytes)
            for file, each in zip(resolved.files, found, strict=True)
        ),
    )


def acquire(
    invocation: Invocation,
    text: str,
    wishes: Wishes,
    *,
    prefer_cache: bool = True,
    events: bool = False,
    projector: bool = False,
    draft: bool = True,
    progress: DownloadProgress | None = None,
) -> Acquired:
    """Get the model onto this machine, with a plan of this moment.

    Raises WillNotFitError for a model that is here and will not fit, and before a byte of weights
    is downloaded, unless `--force`. After a download the plan is made anew from what is free then,
    and it is for the caller to refuse it (`judge.require_fit`).
    `events`: the command streams JSON. `projector`: download that too, in the same transaction.
    `draft`: also the model that drafts for it, where the settings want one. `progress` is told of
    the model's download in the place of the screen.
    """
    from llmrun.cli.draft import count_draft, fetch_draft, find_draft
    from llmrun.fit.plan import plan
    from llmrun.gguf.info import read_info

    output, services = invocation.output, invocation.services
    hub = _LateHub(invocation)
    resolved = resolve_model(invocation, text, prefer_cache=prefer_cache, hub=hub)
    machine = services.machine()
    needs_projector = projector and resolved.projector is not None
    if projector and resolved.projector is not None:
        wishes = _with_projector(wishes, resolved.projector, machine)
    drafter = find_draft(invocation, resolved, hub) if draft else None
    if resolved.is_on_disk:
        info = read_model_info(invocation, resolved)
        assert info is not None
        if drafter is not None:
            wishes = count_draft(invocation, machine, drafter, info, wishes)
        made = plan_on_disk(invocation, machine, info, resolved.local_paths, wishes)
        require_fit(invocation, resolved, info, made, wishes, machine)
        if needs_projector:
            fetch(invocation, resolved, events, needs_projector)
        paths = resolved.local_paths
        draft_paths = fetch_draft(invocation, drafter, events)
        return Acquired(
            resolved, info, made, paths, needs_projector, wishes, machine, None, draft_paths
        )

    def find(reference: str) -> tuple[Resolved, RemoteModel | None]:
        other = resolve_model(invocation, reference, prefer_cache=False, hub=hub)
        return other, read_remote_model(invocation, other)

    judged = None
    model = read_remote_model(invocation, resolved)
    if model is not None:
        if drafter is not None:
            wishes = count_draft(invocation, machine, drafter, model.info, wishes)
        judged = judge_download(invocation, resolved, model, wishes, machine, find)
        resolved = judged.resolved
        for note in judged.notes:
            output.note(note)
        output.note(describe_fit(judged.plan))
    paths = resolved.local_paths
    if not paths or needs_projector:
        paths = fetch(invocation, resolved, events, needs_projector, progress)
    info = read_info(paths, thorough=True)
    machine = services.machine()
    if judged is not None:
        made = plan(machine, info, wishes, allocator=judged.allocator)
    else:
        made = plan_on_disk(invocation, machine, info, paths, wishes)
    draft_paths = fetch_draft(invocation, drafter, events)
    return Acquired(resolved, info, made, paths, True, wishes, machine, None, draft_paths)


def _with_projector(wishes: Wishes, projector: RemoteFile, machine: Machine) -> Wishes:
    """`wishes` with the memory that `projector` will take beside the model."""
    from llmrun.fit.companions import companion_bytes, projector_need

    device: Literal["gpu", "ram"] = "gpu" if machine.devices else "ram"
    need = companion_bytes([projector_need(projector.n_bytes)], device)
    return replace(wishes, companions_bytes=wishes.companions_bytes + need)


def fetch(
    invocation: Invocation,
    resolved: Resolved,
    events: bool,
    projector: bool,
    progress: DownloadProgress | None = None,
) -> tuple[Path, ...]:
    """Download what `resolved` lacks; the model's files in order."""
    progress = progress or progress_for(invocation.output, events=events)
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

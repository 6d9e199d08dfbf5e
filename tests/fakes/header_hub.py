"""A hub whose files are headers in front of nothing: what is judged before a download is read from
it, and weights cannot be."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from llmrun.errors import NotFoundError
from llmrun.gguf.types import ByteSource
from llmrun.hub.types import RemoteFile, RepoListing
from tests.fakes.model_shapes import HeaderSource, build_shape, write_sparse

COMMIT = "c0ffee" + "0" * 34
PROJECTOR = "mmproj-F16.gguf"


class HeaderHub:
    """One repository with `shape` (of `model_shapes.SHAPES`) in some quants. `opened` are the
    files that were read, `n_listings` how often the repository was listed."""

    offline = False

    def __init__(
        self,
        shape: str,
        quants: Sequence[str],
        *,
        repo: str = "org/tall-GGUF",
        projector_bytes: int = 0,
    ) -> None:
        self.repo = repo
        self.shape = shape
        self.opened: list[str] = []
        self.n_listings = 0
        self._quants = {f"tall-{quant.upper()}.gguf": quant for quant in quants}
        files = [
            RemoteFile(path, build_shape(shape, quant)[1], _sha256(path))
            for path, quant in self._quants.items()
        ]
        if projector_bytes:
            files.append(RemoteFile(PROJECTOR, projector_bytes, "ab" * 32))
        self._files = tuple(files)

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        self.n_listings += 1
        if repo != self.repo:
            raise NotFoundError(f"no repository {repo}")
        return RepoListing(repo, revision, COMMIT, self._files)

    def commit_of(self, repo: str, revision: str) -> str:
        return self.listing(repo, revision).commit

    def open_source(self, repo: str, commit: str, file: RemoteFile) -> ByteSource:
        self.opened.append(file.path)
        header, n_bytes = build_shape(self.shape, self._quants[file.path])
        return HeaderSource(header, n_bytes)

    def write(self, folder: Path, path: str) -> Path:
        """What a download of the file would leave: a sparse file."""
        return write_sparse(folder / path, self.shape, self._quants[path])


def _sha256(path: str) -> str:
    """Any hash that is the file's own."""
    return hashlib.sha256(path.encode()).hexdigest()

"""Headers of remote files, kept so that a model can be judged again without asking the hub.

What is kept is the start of the file as the hub sent it, up to its data. It is parsed anew each
time: the cache is trusted no more than the hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmrun.errors import GgufError
from llmrun.gguf.header import read_header
from llmrun.gguf.source import BytesSource
from llmrun.gguf.types import ByteSource, Header
from llmrun.hub.cache_folder import CacheFolder
from llmrun.hub.types import RemoteFile

MAX_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RawHeader:
    """A checked header with its bytes: those of the file before its data."""

    header: Header
    raw: bytes


class RecordingSource:
    """Passes reads on and keeps what they brought of the start of the file."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._start = bytearray()

    @property
    def n_bytes(self) -> int:
        return self._source.n_bytes

    def read(self, offset: int, n_bytes: int) -> bytes:
        data = self._source.read(offset, n_bytes)
        if offset <= len(self._start):
            self._start += data[len(self._start) - offset :]
        return data

    def start(self, n_bytes: int) -> bytes:
        """The first `n_bytes`; zeros where they were not read (the padding behind a header)."""
        return bytes(self._start[:n_bytes]).ljust(n_bytes, b"\0")


class HeaderCache:
    """Headers in `folder`, found by the file's SHA-256, or by its place in a repository at a fixed
    commit where it has none. See `CacheFolder` for what may be lost."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._entries = CacheFolder(folder, max_bytes)

    def load(self, repo: str, commit: str, file: RemoteFile) -> RawHeader | None:
        """The header of `file` if it is here and still passes the reader's checks."""
        raw = self._entries.read(_name(repo, commit, file))
        if raw is None:
            return None
        try:
            header = read_header(BytesSource(raw, file.n_bytes), name=file.path)
        except GgufError:
            return None
        return RawHeader(header, raw)

    def get(
        self,
        repo: str,
        commit: str,
        file: RemoteFile,
        open_source: Callable[[str, str, RemoteFile], ByteSource],
    ) -> RawHeader:
        """The header of `file`, from here or else by `open_source` (`Hub.open_source`), kept then.

        Raises GgufError, and what the source raises.
        """
        found = self.load(repo, commit, file)
        if found is not None:
            return found
        source = RecordingSource(open_source(repo, commit, file))
        header = read_header(source, name=file.path)
        found = RawHeader(header, source.start(header.data_offset))
        self._entries.write(_name(repo, commit, file), found.raw)
        return found


def _name(repo: str, commit: str, file: RemoteFile) -> str:
    if file.sha256 is not None:
        return file.sha256
    return hashlib.sha256("\0".join((repo, commit, file.path)).encode()).hexdigest()

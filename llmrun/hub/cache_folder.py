"""A folder of small files that may be lost: bounded, checked, shared by processes.

Each entry is one file: a line that names the format, the SHA-256 of the rest, the rest. It is
written beside its place and moved there, so a reader sees all of it or nothing. Only the user may
look into the folder: names and times of the entries tell what was looked at.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from pathlib import Path

_MAGIC = b"llmrun-cache-1\n"
_HEAD_BYTES = len(_MAGIC) + hashlib.sha256().digest_size
_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = "unfinished-"
_UNFINISHED_S = 3600.0  # a file left by a crash; a write takes no such time


class CacheFolder:
    """Entries by name (64 hex digits), of `max_bytes` in all: the least recently used one goes
    first.

    Nothing here raises for the disk's sake: an entry that cannot be read, or is not as it was
    written, is not there, and one that cannot be written is not kept.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    def read(self, name: str) -> bytes | None:
        """What was written under `name`, or None. Counts as a use."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        payload = memoryview(data)[_HEAD_BYTES:]
        if data[:_HEAD_BYTES] != _MAGIC + hashlib.sha256(payload).digest():
            _remove(path)
            return None
        try:
            os.utime(path)
        except OSError:  # a folder of somebody else's
            pass
        return bytes(payload)

    def write(self, name: str, payload: bytes) -> None:
        """Keep `payload` under `name`, in place of what was there."""
        if _HEAD_BYTES + len(payload) > self._max_bytes:
            return
        fresh = self.folder / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as out:
                out.write(_MAGIC + hashlib.sha256(payload).digest())
                out.write(payload)
            os.replace(fresh, self._path(name))
        except OSError:
            _remove(fresh)
            return
        self._make_room(self._path(name))

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a name of an entry: {name!r}")
        return self.folder / name

    def _make_room(self, newest: Path) -> None:
        entries: list[tuple[float, int, Path]] = []
        try:
            with os.scandir(self.folder) as items:
                for item in items:
                    path, status = Path(item.path), item.stat(follow_symlinks=False)
                    if item.name.startswith(_UNFINISHED):
                        if time.time() - status.st_mtime > _UNFINISHED_S:
                            _remove(path)
                    elif path != newest:
                        entries.append((status.st_mtime, status.st_size, path))
            n_bytes = newest.stat().st_size + sum(size for _, size, _ in entries)
        except OSError:  # another process is at it as well
            return
        for _, size, path in sorted(entries):
            if n_bytes <= self._max_bytes:
                return
            _remove(path)
            n_bytes -= size


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass

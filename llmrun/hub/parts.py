"""The record of which bytes of a partial download are on disk, kept beside the partial file.

    {"llmrun_parts": 1, "path": "x-Q4_0.gguf", "size": 10000000, "boot": "…", "done": [[0, 65536]]}
    65536 131072
    …

The first line holds what was flushed to the device when it was written; each line after it is a
range that was written since, so it survives the end of the process but not of the machine. On
loading, those lines count only when the machine has not been started again (`boot`). One small
append per received chunk costs microseconds and loses at most that chunk to a kill.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import threading
from pathlib import Path

from llmrun.hub.layout import PARTS_SUFFIX

MAX_RECORD_BYTES = 64 * 1024 * 1024

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)
_LINE = re.compile(r"(\d{1,18}) (\d{1,18})")

Range = tuple[int, int]


class Parts:
    """Done ranges [start, end) of a file of `size` bytes, shared by the threads that fetch it.

    `record` may be read by anyone with `load_done`; only the holder of the download lock writes.
    Opening continues a trusted record and otherwise starts an empty partial file. Raises OSError.
    """

    def __init__(self, record: Path, partial: Path, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self._record = record
        self._partial = partial
        self._lock = threading.Lock()
        self._done = load_done(record, partial, size)
        self._fd = -1
        if not self._done:
            # Made anew and never opened through a link that somebody put there.
            partial.unlink(missing_ok=True)
            partial.open("xb").close()
        self._flush()
        self._write_record(self._done, [])

    def add(self, start: int, end: int) -> None:
        """Bytes [start, end) have been written to the partial file. Raises OSError."""
        with self._lock:
            _write_all(self._fd, b"%d %d\n" % (start, end))
            _insert(self._done, start, end)

    def missing(self) -> list[Range]:
        """The ranges that are not done, in file order."""
        with self._lock:
            found, position = [], 0
            for start, end in self._done:
                if start > position:
                    found.append((position, start))
                position = end
            if position < self.size:
                found.append((position, self.size))
            return found

    def prefix_end(self) -> int:
        """All bytes before this offset are done."""
        with self._lock:
            return self._done[0][1] if self._done and self._done[0][0] == 0 else 0

    @property
    def n_done(self) -> int:
        with self._lock:
            return sum(end - start for start, end in self._done)

    def checkpoint(self) -> None:
        """Flush the partial file to its device, then say so in the record. Raises OSError."""
        with self._lock:
            flushed = list(self._done)
        self._flush()
        with self._lock:
            if self._fd >= 0:
                self._write_record(flushed, self._done)

    def clear(self) -> None:
        """Forget everything and empty the partial file."""
        with self._lock:
            self._done = []
            os.truncate(self._partial, 0)
            self._write_record([], [])

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _flush(self) -> None:
        fd = os.open(self._partial, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _write_record(self, flushed: list[Range], done: list[Range]) -> None:
        header = {
            "llmrun_parts": 1,
            "path": self.path,
            "size": self.size,
            "boot": _boot_id(),
            "done": flushed,
        }
        lines = [json.dumps(header), *(f"{start} {end}" for start, end in done)]
        name = self._record.name.removesuffix(PARTS_SUFFIX) + ".llmrun.parts-new.incomplete"
        fresh = self._record.with_name(name)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        try:
            _write_all(fd, ("\n".join(lines) + "\n").encode())
            # Windows cannot replace a file that is open.
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            if os.name == "nt":
                os.close(fd)
                os.replace(fresh, self._record)
                fd = os.open(self._record, os.O_WRONLY | os.O_APPEND)
            else:
                os.replace(fresh, self._record)
        except BaseException:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        self._fd = fd


def read_target(record: Path) -> tuple[str, int] | None:
    """Which file of the repository a record is for, and that file's size; None when unreadable."""
    try:
        with record.open("rb") as file:
            header = json.loads(file.readline(MAX_RECORD_BYTES))
        path, size = header["path"], header["size"]
    except _UNREADABLE:
        return None
    return (path, size) if isinstance(path, str) and type(size) is int else None


def load_done(record: Path, partial: Path, size: int) -> list[Range]:
    """The ranges of `partial` that can be trusted. Empty when either file is missing or odd."""
    try:
        status = partial.lstat()
        on_disk = status.st_size
        if not stat.S_ISREG(status.st_mode) or on_disk > size:
            return []
        if record.stat().st_size > MAX_RECORD_BYTES:
            return []
        first, *rest = record.read_text("ascii").split("\n")
        header = json.loads(first)
        if header["llmrun_parts"] != 1 or header["size"] != size:
            return []
        ranges = [(start, end) for start, end in header["done"]]
        if _same_boot(record):
            # A kill can cut the last line short; a full disk can leave a torn one in the middle.
            ranges += [(int(m[1]), int(m[2])) for m in map(_LINE.fullmatch, rest[:-1]) if m]
        done: list[Range] = []
        for start, end in ranges:
            if type(start) is not int or type(end) is not int or start < 0:
                return []
            if start < min(end, on_disk):
                _insert(done, start, min(end, on_disk))
    except _UNREADABLE:
        return []
    return done


def _write_all(fd: int, data: bytes) -> None:
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _insert(done: list[Range], start: int, end: int) -> None:
    """Add [start, end) to sorted disjoint ranges, in place."""
    at = len(done)
    while at > 0 and done[at - 1][0] > start:
        at -= 1
    if at > 0 and done[at - 1][1] >= start:
        at -= 1
        start, end = done[at][0], max(end, done[at][1])
    upto = at
    while upto < len(done) and done[upto][0] <= end:
        end = max(end, done[upto][1])
        upto += 1
    done[at:upto] = [(start, end)]


def _same_boot(record: Path) -> bool | None:
    """Whether `record` was written since the machine was started; None when it cannot be read."""
    try:
        with record.open("rb") as file:
            header = json.loads(file.readline(MAX_RECORD_BYTES))
        return bool(header["boot"] == _boot_id())
    except _UNREADABLE:
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        import psutil

        return f"{psutil.boot_time():.0f}"

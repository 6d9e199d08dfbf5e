"""Random access to a remote file by range requests."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from llmrun.errors import HubUnreachableError, NotFoundError
from llmrun.hub.layout import RepoPaths
from llmrun.hub.mapping import map_errors, unreachable
from llmrun.hub.parts import load_done
from llmrun.hub.transport import RangeNotSatisfiableError, WrongReplyError, open_range
from llmrun.hub.types import RemoteFile

if TYPE_CHECKING:
    from llmrun.hub.client import Hub

# Small reads are read ahead of; large ones come from a reader that knows what it needs.
FIRST_WINDOW_BYTES = 16 * 1024
WINDOW_GROWTH = 8
WINDOW_BYTES = 8 * 1024 * 1024
MAX_CACHED_BYTES = 128 * 1024 * 1024
READ_TIMEOUT_S = 10.0
N_ATTEMPTS = 3


class RemoteSource:
    """A `ByteSource` over one file at one commit.

    Reads of less than FIRST_WINDOW_BYTES are read ahead of, in windows that grow up to
    WINDOW_BYTES; larger ones fetch what they ask for and no more. What was read is kept, the oldest
    dropped above MAX_CACHED_BYTES. Bytes that a download has brought to this machine are read from
    there.
    """

    def __init__(self, hub: Hub, repo: str, commit: str, file: RemoteFile) -> None:
        self._hub, self._repo, self._commit, self._file = hub, repo, commit, file
        self._windows: dict[int, bytes] = {}  # by offset, oldest first
        self._next_bytes = FIRST_WINDOW_BYTES
        self._lock = threading.Lock()

    @property
    def n_bytes(self) -> int:
        """Size of the whole file by the repository's listing."""
        return self._file.n_bytes

    def read(self, offset: int, n_bytes: int) -> bytes:
        """The bytes from `offset`; fewer only where the file ends.

        Raises HubUnreachableError, AuthError, NotFoundError.
        """
        end = min(offset + n_bytes, self.n_bytes)
        is_small = n_bytes < FIRST_WINDOW_BYTES
        pieces = []
        with self._lock:
            while offset < end:
                start, window = self._window(offset, end, is_small)
                piece = window[offset - start : end - start]
                pieces.append(piece)
                offset += len(piece)
        return b"".join(pieces)

    def _window(self, offset: int, end: int, ahead: bool) -> tuple[int, bytes]:
        """A window that holds `offset`, with its start. With `ahead` it may reach beyond `end`."""
        for start, window in self._windows.items():
            if start <= offset < start + len(window):
                return start, window
        if ahead:
            end = max(end, offset + self._next_bytes)
            self._next_bytes = min(self._next_bytes * WINDOW_GROWTH, WINDOW_BYTES)
        end = min(end, offset + WINDOW_BYTES, self.n_bytes)
        end = min([end, *(start for start in self._windows if start > offset)])
        window = self._local(offset, end) or self._fetch(offset, end)
        self._windows[offset] = window
        while sum(map(len, self._windows.values())) > MAX_CACHED_BYTES and len(self._windows) > 1:
            del self._windows[next(iter(self._windows))]
        return offset, window

    def _local(self, start: int, end: int) -> bytes | None:
        """What a finished or unfinished download holds from `start` on, up to `end`; or None."""
        if self._file.sha256 is None:
            return None
        paths, etag = RepoPaths(self._hub.cache, self._repo), self._file.sha256
        partial = paths.partial(etag)
        done = load_done(paths.parts(etag), partial, self.n_bytes)
        done_end = next((last for first, last in done if first <= start < last), None)
        try:
            path = paths.blob(etag) if done_end is None else partial
            if done_end is None and path.stat().st_size != self.n_bytes:
                return None
            with path.open("rb") as data:
                data.seek(start)
                return data.read(min(end, done_end or end) - start)
        except OSError:
            return None

    def _fetch(self, start: int, end: int) -> bytes:
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        self._hub.ensure_reachable(self._repo)
        data = bytearray()
        failure: Exception | None = None
        for _ in range(N_ATTEMPTS):
            try:
                self._hub.call(self._repo, lambda: self._fetch_into(data, start, end))
            except RangeNotSatisfiableError:
                failure = WrongReplyError("the file is shorter than its listing says")
                break
            except WrongReplyError as error:
                failure = error
            except HubUnreachableError as error:
                if not isinstance(error.__cause__, httpx.TransportError):
                    raise
                failure = error
            if len(data) == end - start:
                return bytes(data)
        if isinstance(failure, HubUnreachableError):
            raise failure
        why = str(failure) if failure else f"it ended after {len(data)} of {end - start} bytes"
        raise unreachable(why=f"reading a part of {self._file.path} failed: {why}")

    def _fetch_into(self, data: bytearray, start: int, end: int) -> None:
        first = start + len(data)
        if first == end:
            return
        with (
            map_errors(self._repo),
            open_range(
                self._hub,
                self._repo,
                self._commit,
                self._file.path,
                first,
                end,
                self.n_bytes,
                READ_TIMEOUT_S,
            ) as reply,
        ):
            # A server that ignores Range sends the file from its start: skip up to our part, but
            # not through a file of many gigabytes.
            skip = first - reply.start
            if skip > 4 * WINDOW_BYTES:
                raise NotFoundError(
                    "this hub cannot send a part of a file", hint="llmrun pull MODEL"
                )
            for chunk in reply.chunks():
                kept = chunk[skip:] if skip else chunk
                skip -= min(skip, len(chunk))
                data += kept[: end - start - len(data)]
                if len(data) == end - start:
                    return

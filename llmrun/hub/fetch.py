"""One file over several ranged connections into a partial file that can be continued.

Worker threads claim missing ranges in file order, write what arrives and record it; the calling
thread hashes behind them in file order. Connections that break, stall or lie are opened again with
back-off. A server that ignores Range is read over one connection from the first byte.
"""

from __future__ import annotations

import errno
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrun.errors import DamagedFileError, HubUnreachableError
from llmrun.hub.mapping import (
    MAX_TOTAL_WAIT_S,
    disk_error,
    endpoint,
    map_errors,
    retry_wait_s,
    told_wait_s,
    unreachable,
)
from llmrun.hub.parts import Parts, Range
from llmrun.hub.transport import RangeNotSatisfiableError, WrongReplyError, open_range
from llmrun.hub.types import RemoteFile
from llmrun.text import escape_line, format_bytes

if TYPE_CHECKING:
    from llmrun.hub.client import Hub

HASH_BLOCK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and times of a download; tests make them small.

    A claim is the range that a connection asks for at once: a share of what is left, between the
    two bounds, so that few requests are made and no connection is left with a long tail.
    """

    min_claim_bytes: int = 8 * 1024 * 1024
    max_claim_bytes: int = 256 * 1024 * 1024
    read_timeout_s: float = 10.0
    stall_s: float = 30.0
    stall_bytes: int = 64 * 1024
    n_attempts: int = 7
    backoff_s: float = 0.5
    max_backoff_s: float = 8.0
    checkpoint_s: float = 10.0
    poll_s: float = 0.05


class _RangeIgnoredError(Exception):
    """The server sends the file from its start whatever range is asked for."""


class _WriteError(Exception):
    """The disk refused; HTTP errors are OSErrors too, so this keeps them apart."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(slots=True)
class _Run:
    """State that the threads of one attempt share."""

    claims: list[Range]
    single: bool
    stop: threading.Event = field(default_factory=threading.Event)
    wake: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        with self.lock:
            if self.error is None and not self.stop.is_set():
                self.error = error
        self.stop.set()
        self.wake.set()


class FileFetch:
    """Fetches `file` of `repo` at `commit` into `partial`, continuing what `record` says is there.

    `on_bytes(n)` is told of bytes written (negative when thrown away) and `note(text)` of retries,
    both from worker threads.
    """

    def __init__(
        self,
        hub: Hub,
        repo: str,
        commit: str,
        file: RemoteFile,
        partial: Path,
        record: Path,
        *,
        on_bytes: Callable[[int], None],
        note: Callable[[str], None],
        limits: Limits,
        n_connections: int,
        cancelled: Callable[[], bool],
    ) -> None:
        self._hub, self._repo, self._commit, self._file = hub, repo, commit, file
        self._partial, self._record = partial, record
        self._on_bytes, self._note = on_bytes, note
        self._limits, self._n_connections = limits, n_connections
        self._cancelled = cancelled

    def run(self) -> str:
        """Fetch what is missing; return the sha256 of the whole file, which is then complete.

        On every error and on KeyboardInterrupt (also raised when cancelled) the partial file and
        its record stay, so that a later run continues. Raises LlmrunError.
        """
        n_single = n_refused = 0
        try:
            parts = Parts(self._record, self._partial, self._file.path, self._file.n_bytes)
        except OSError as error:
            raise disk_error(error, self._partial.parent, self._file.n_bytes) from error
        try:
            while True:
                try:
                    return self._run_once(parts, single=n_single > 0)
                except _RangeIgnoredError as error:
                    n_single += 1
                    if n_single > self._limits.n_attempts:
                        raise unreachable(why="the transfer breaks off again and again") from error
                    self._note("the server cannot send ranges: from the start, one connection")
                except RangeNotSatisfiableError as error:
                    n_refused += 1
                    if n_refused > 1:
                        raise DamagedFileError(
                            f"{escape_line(self._file.path)} is shorter on the server than its "
                            f"listing says ({format_bytes(self._file.n_bytes)})",
                            hint="try again later; tell the repository's owner if it stays so",
                        ) from error
                    self._note("the server refuses the range: starting again")
                self._on_bytes(-parts.n_done)
                parts.clear()
        except _WriteError as error:
            raise disk_error(
                error.cause, self._partial.parent, self._file.n_bytes - parts.n_done
            ) from error
        except OSError as error:
            raise disk_error(error, self._partial.parent) from error
        finally:
            parts.close()

    def _run_once(self, parts: Parts, *, single: bool) -> str:
        run = _Run(claims=parts.missing(), single=single)
        n_missing = sum(end - start for start, end in run.claims)
        n_useful = -(-n_missing // self._limits.min_claim_bytes)
        n_workers = 1 if single else max(1, min(self._n_connections, n_useful))
        workers = [
            threading.Thread(target=self._work, args=(run, parts), name=f"fetch-{i}", daemon=True)
            for i in range(n_workers if n_missing else 0)
        ]
        try:
            for worker in workers:
                worker.start()
            return self._follow(run, parts, workers)
        finally:
            run.stop.set()
            # A worker that waits for data cannot be woken; it writes nothing once stopped.
            deadline = time.monotonic() + 1.0
            for worker in workers:
                if worker.ident is not None:
                    worker.join(max(0.0, deadline - time.monotonic()))
            # Without it a kill of the process still loses nothing, only one of the machine would.
            with suppress(OSError):
                parts.checkpoint()

    def _follow(self, run: _Run, parts: Parts, workers: list[threading.Thread]) -> str:
        """Hash in file order behind the workers until the file is complete."""
        digest, hashed = hashlib.sha256(), 0
        next_checkpoint = time.monotonic() + self._limits.checkpoint_s
        with self._partial.open("rb", buffering=0) as data:
            while True:
                if self._cancelled():
                    raise KeyboardInterrupt
                working = any(worker.is_alive() for worker in workers)
                if run.error is not None:
                    raise run.error
                ready = parts.prefix_end()
                if ready > hashed:
                    block = data.read(min(ready - hashed, HASH_BLOCK_BYTES))
                    if not block:
                        raise OSError(errno.EIO, "the partial file was cut short")
                    digest.update(block)
                    hashed += len(block)
                elif working:
                    run.wake.wait(self._limits.poll_s)
                    run.wake.clear()
                elif hashed == self._file.n_bytes:
                    return digest.hexdigest()
                else:
                    raise AssertionError("all workers ended with bytes missing")
                if time.monotonic() >= next_checkpoint:
                    parts.checkpoint()
                    next_checkpoint = time.monotonic() + self._limits.checkpoint_s

    def _work(self, run: _Run, parts: Parts) -> None:
        try:
            try:
                out = self._partial.open("r+b", buffering=0)
            except OSError as error:
                raise _WriteError(error) from error
            with out:
                while not run.stop.is_set() and (claim := self._take(run)) is not None:
                    self._fetch_claim(run, parts, out, *claim)
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            run.fail(error)
        finally:
            run.wake.set()

    def _take(self, run: _Run) -> Range | None:
        with run.lock:
            if not run.claims:
                return None
            start, end = run.claims[0]
            if not run.single:
                n_left = sum(last - first for first, last in run.claims)
                share = n_left // (2 * self._n_connections)
                limits = self._limits
                want = max(limits.min_claim_bytes, min(limits.max_claim_bytes, share))
                if end - start >= want + limits.min_claim_bytes // 2:
                    run.claims[0] = (start + want, end)
                    return start, start + want
            del run.claims[0]
            return start, end

    def _fetch_claim(self, run: _Run, parts: Parts, out: FileIO, start: int, end: int) -> None:
        """Bring bytes [start, end), over as many connections in turn as it takes."""
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        position, attempt, waited = start, 0, 0.0
        while position < end and not run.stop.is_set():
            before = position
            wait: float | None = None
            try:
                for n_bytes in self._stream(run, parts, out, position, end):
                    position += n_bytes
                reason = "the connection ended early"
            except (WrongReplyError, httpx.TransportError) as error:
                reason = escape_line(str(error)) or type(error).__name__
            except HfHubHTTPError as error:
                wait = self._wait_after(error, attempt)
                if wait is None:
                    with map_errors(self._repo):
                        raise
                reason = f"the hub answers {error.response.status_code}"
            if position >= end or run.stop.is_set():
                return
            if position > before:
                attempt, waited = 0, 0.0
                if run.single:
                    raise _RangeIgnoredError
            attempt += 1
            if wait is None:
                wait = min(
                    self._limits.backoff_s * 2.0 ** (attempt - 1), self._limits.max_backoff_s
                )
                wait *= random.uniform(0.75, 1.25)  # noqa: S311 - spreads the retries
            waited += wait
            if attempt >= self._limits.n_attempts or waited > MAX_TOTAL_WAIT_S:
                raise HubUnreachableError(
                    f"the download of {escape_line(self._file.path)} does not go on",
                    why=f"{reason}; tried {attempt} times",
                    hint="run the same command again: it continues where it stopped",
                )
            if attempt > 1 or wait > 2:
                self._note(f"{reason}; trying again in {wait:.0f} s")
            run.stop.wait(wait)

    def _stream(
        self, run: _Run, parts: Parts, out: FileIO, position: int, end: int
    ) -> Iterator[int]:
        """Write one reply's bytes from `position`; yield how many after each piece."""
        with open_range(
            self._hub,
            self._repo,
            self._commit,
            self._file.path,
            position,
            end,
            self._file.n_bytes,
            self._limits.read_timeout_s,
        ) as reply:
            if reply.start != position:
                raise _RangeIgnoredError
            out.seek(position)
            window_start, window_bytes = time.monotonic(), 0
            for piece in reply.chunks():
                if run.stop.is_set():
                    return
                chunk = piece[: end - position]
                try:
                    _write_all(out, chunk)
                    parts.add(position, position + len(chunk))
                except OSError as error:
                    raise _WriteError(error) from error
                position += len(chunk)
                self._on_bytes(len(chunk))
                yield len(chunk)
                # Leaving a reply before its end costs the connection: only when more is coming.
                if position == end < reply.end:
                    return
                window_bytes += len(chunk)
                now = time.monotonic()
                if now - window_start > self._limits.stall_s:
                    if window_bytes < self._limits.stall_bytes:
                        raise WrongReplyError("the connection is stalling")
                    window_start, window_bytes = now, 0

    def _wait_after(self, error: Any, attempt: int) -> float | None:
        """Seconds to wait after an error status, None when it is final."""
        response = error.response
        refused_elsewhere = response.status_code in (401, 403) and not str(response.url).startswith(
            endpoint() + "/"
        )
        if refused_elsewhere:
            # A signed link of the storage behind the hub has run out: the hub makes a new one.
            return self._limits.backoff_s
        wait = retry_wait_s(response.status_code, response.headers, attempt)
        if wait is not None and told_wait_s(response.status_code, response.headers) is None:
            wait = min(wait, self._limits.max_backoff_s)
        return wait


def _write_all(out: FileIO, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[out.write(view) :]

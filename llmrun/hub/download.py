"""A set of files into the shared hub cache: all of them verified, or none of them visible.

1. What the cache has already is left alone, without a request.
2. Each missing file's lock is taken: the hub's own lock, so that other programs wait as well.
3. Free disk space is checked, then each file is fetched and its sha256 compared.
4. Verified files get their final blob names; when all of the set are there, the snapshot's links
   are made, and the branch's ref is written if the branch still points to this commit.

The locks are held until the links exist, so nobody prunes a blob before it is in use.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from llmrun.errors import DamagedFileError, DiskFullError, LlmrunError, UsageError
from llmrun.gguf.naming import safe_repo_path
from llmrun.hub import layout
from llmrun.hub.client import Hub
from llmrun.hub.fetch import FileFetch, Limits
from llmrun.hub.layout import RepoPaths
from llmrun.hub.locks import hold
from llmrun.hub.mapping import disk_error, endpoint, endpoint_host, map_errors, offline_error
from llmrun.hub.parts import load_done
from llmrun.hub.types import DownloadProgress, FileSet, RemoteFile
from llmrun.text import escape_line, format_bytes

# The hub's storage sends no larger file over plain HTTP; above it only its xet protocol works.
MAX_HTTP_BYTES = 50 * 10**9
DISK_MARGIN = 0.05
LOCK_POLL_S = 0.25


def download(
    hub: Hub,
    file_set: FileSet,
    *,
    progress: DownloadProgress,
    n_connections: int = 4,
    cancel: threading.Event | None = None,
    limits: Limits | None = None,
) -> tuple[Path, ...]:
    """Bring all files of `file_set` into the cache; return their snapshot paths in its order.

    What an earlier, interrupted call brought is continued. `progress.note` may be called before
    `begin` (while waiting for another process); `begin` and `end` not at all when nothing is
    missing. Raises DiskFullError, DamagedFileError, AuthError, NotFoundError, HubUnreachableError;
    KeyboardInterrupt on Ctrl-C or when `cancel` is set, with everything received kept.
    """
    _check(file_set)
    return _Transfer(hub, file_set, progress, n_connections, cancel, limits or Limits()).run()


def missing_bytes(hub: Hub, file_set: FileSet) -> int:
    """How many bytes `download` would have to transfer now."""
    paths = RepoPaths(hub.cache, file_set.repo)
    return sum(_n_missing(paths, f) for f in file_set.files if not is_present(hub, file_set, f))


def is_present(hub: Hub, file_set: FileSet, file: RemoteFile) -> bool:
    """Whether the cache shows `file` at its snapshot path, with the right size."""
    pointer = RepoPaths(hub.cache, file_set.repo).pointer(file_set.commit, file.path)
    return _has_size(pointer, file.n_bytes)


def cached_paths(hub: Hub, file_set: FileSet) -> tuple[Path, ...] | None:
    """The snapshot paths when the whole set is in the cache, else None. No request is made."""
    if not all(is_present(hub, file_set, file) for file in file_set.files):
        return None
    paths = RepoPaths(hub.cache, file_set.repo)
    return tuple(paths.pointer(file_set.commit, file.path) for file in file_set.files)


class _Transfer:
    def __init__(
        self,
        hub: Hub,
        file_set: FileSet,
        progress: DownloadProgress,
        n_connections: int,
        cancel: threading.Event | None,
        limits: Limits,
    ) -> None:
        self._hub, self._set, self._progress = hub, file_set, progress
        self._n_connections, self._cancel, self._limits = n_connections, cancel, limits
        self._paths = RepoPaths(hub.cache, file_set.repo)

    def run(self) -> tuple[Path, ...]:
        present = cached_paths(self._hub, self._set)
        if present is not None:
            self._record_branch()
            return present
        if self._hub.offline:
            raise offline_error(self._set.repo)
        self._hub.ensure_reachable(self._set.repo)
        self._warn_of_plain_http()
        try:
            with ExitStack() as locks:
                # One order for all processes, so that overlapping sets cannot wait in a circle.
                large = [f for f in self._absent() if not _needs_library(f)]
                for sha256 in sorted({str(file.sha256) for file in large}):
                    locks.enter_context(self._locked(sha256))
                wanted = self._absent()
                if wanted:
                    self._fetch_all(wanted)
                for file in wanted:
                    if not _needs_library(file):
                        self._link(file)
        except OSError as error:
            raise disk_error(error, self._hub.cache) from error
        self._record_branch()
        return self._pointers()

    def _absent(self) -> list[RemoteFile]:
        return [f for f in self._set.files if not is_present(self._hub, self._set, f)]

    def _pointers(self) -> tuple[Path, ...]:
        """The paths as huggingface_hub gives them: no request is made for files that are there."""
        from huggingface_hub import hf_hub_download

        repo, commit = self._set.repo, self._set.commit
        self._hub.configure()
        with map_errors(repo):
            return tuple(
                Path(hf_hub_download(repo, f.path, revision=commit, cache_dir=self._hub.cache))
                for f in self._set.files
            )

    def _fetch_all(self, wanted: list[RemoteFile]) -> None:
        n_missing = sum(_n_missing(self._paths, file) for file in wanted)
        self._check_disk(n_missing)
        n_present = sum(file.n_bytes for file in wanted) - n_missing
        self._progress.begin(tuple(wanted), n_present)
        try:
            # Files that become visible as they arrive come last.
            for file in sorted(wanted, key=_needs_library):
                if _needs_library(file):
                    self._fetch_by_library(file)
                else:
                    self._fetch(file)
                self._progress.finish_file(file.path)
        finally:
            self._progress.end()

    def _fetch(self, file: RemoteFile) -> None:
        """Make the verified blob of `file`."""
        assert file.sha256 is not None
        blob, partial = self._paths.blob(file.sha256), self._paths.partial(file.sha256)
        record = self._paths.parts(file.sha256)
        if _has_size(blob, file.n_bytes):
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        fetch = FileFetch(
            self._hub,
            self._set.repo,
            self._set.commit,
            file,
            partial,
            record,
            on_bytes=lambda n_bytes: self._progress.advance(file.path, n_bytes),
            note=self._progress.note,
            limits=self._limits,
            n_connections=self._n_connections,
            cancelled=self._is_cancelled,
        )
        actual = fetch.run()
        if actual != file.sha256:
            partial.unlink(missing_ok=True)
            record.unlink(missing_ok=True)
            raise DamagedFileError(
                f"{escape_line(file.path)} arrived damaged and was thrown away",
                why=f"its sha256 is {actual}, the hub promised {file.sha256}",
                hint="run the same command again; if it stays so, the file on the hub is broken",
            )
        os.replace(partial, blob)
        record.unlink(missing_ok=True)
        _flush_folder(blob.parent)

    def _fetch_by_library(self, file: RemoteFile) -> None:
        """Small git files, which have no sha256 to check, and files too large for plain HTTP."""
        from huggingface_hub import constants, hf_hub_download

        if file.n_bytes > MAX_HTTP_BYTES:
            if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
                raise LlmrunError(
                    f"{escape_line(file.path)} is too large to come over plain HTTP "
                    f"({format_bytes(file.n_bytes)})",
                    hint="pip install hf_xet, and unset HF_HUB_DISABLE_XET",
                )
            self._progress.note(f"{escape_line(file.path)}: this large file cannot be resumed")
        repo, commit = self._set.repo, self._set.commit
        with map_errors(repo):
            path = hf_hub_download(repo, file.path, revision=commit, cache_dir=self._hub.cache)
        if file.sha256 is not None:
            with Path(path).open("rb") as data:
                actual = hashlib.file_digest(data, "sha256").hexdigest()
            if actual != file.sha256:
                raise DamagedFileError(
                    f"{escape_line(file.path)} arrived damaged",
                    why=f"its sha256 is {actual}, the hub promised {file.sha256}",
                    hint=f"llmrun rm {repo} --all --yes",
                )
        self._progress.advance(file.path, file.n_bytes)

    def _link(self, file: RemoteFile) -> None:
        """Show the blob in the snapshot, by a relative link or, where there are none, by a move."""
        from huggingface_hub import constants

        assert file.sha256 is not None
        blob = self._paths.blob(file.sha256)
        pointer = self._paths.pointer(self._set.commit, file.path)
        if _has_size(pointer, file.n_bytes):
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        if not constants.HF_HUB_DISABLE_SYMLINKS:
            try:
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
                return
            except FileExistsError:
                return
            except (OSError, NotImplementedError):
                pass
        if sum(other.sha256 == file.sha256 for other in self._absent()) > 1:
            shutil.copyfile(blob, pointer)
        else:
            os.replace(blob, pointer)

    def _record_branch(self) -> None:
        """Write `refs/<branch>` when the branch still points to this commit; else leave it alone.

        A ref to another commit would make the hub's tools fetch files that nobody verified.
        """
        revision, commit, repo = self._set.revision, self._set.commit, self._set.repo
        known = layout.read_ref(repo, revision, cache=self._hub.cache)
        if revision == commit or known == commit or self._hub.offline:
            return
        try:
            if self._hub.commit_of(repo, revision) != commit:
                return
            ref = self._paths.ref(safe_repo_path(revision))
            ref.parent.mkdir(parents=True, exist_ok=True)
            fresh = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            fresh.write_text(commit, "ascii")
            os.replace(fresh, ref)
        except (LlmrunError, OSError) as error:
            self._progress.note(f"the branch {escape_line(revision)} was not recorded: {error}")

    @contextmanager
    def _locked(self, etag: str) -> Iterator[None]:
        told = False
        while True:
            if self._is_cancelled():
                raise KeyboardInterrupt
            with hold(self._paths.lock(etag), LOCK_POLL_S) as held:
                if held:
                    yield
                    return
            if not told:
                self._progress.note("another process is downloading this file; waiting")
                told = True

    def _check_disk(self, n_missing: int) -> None:
        needed = int(n_missing * (1 + DISK_MARGIN))
        free = free_bytes(self._hub.cache)
        if free < needed:
            raise DiskFullError(
                f"not enough room on the disk of {self._hub.cache}: "
                f"{format_bytes(needed - free)} are missing",
                why=f"{format_bytes(needed)} are needed, {format_bytes(free)} are free; "
                "delete models, or set HF_HOME to a folder on a larger disk",
                hint="llmrun prune",
            )

    def _warn_of_plain_http(self) -> None:
        from huggingface_hub import get_token

        url = urlsplit(endpoint())
        local = url.hostname in {"localhost", "127.0.0.1", "::1"}
        if url.scheme == "http" and not local and get_token():
            self._progress.note(f"your token goes to {endpoint_host()} unencrypted (http)")

    def _is_cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.is_set()


def free_bytes(folder: Path) -> int:
    """Free space for this user on the disk where `folder` is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _check(file_set: FileSet) -> None:
    """Refuse what could leave the cache folder. Raises DamagedFileError, UsageError."""
    try:
        layout.repo_folder(file_set.repo)
    except ValueError as error:
        raise UsageError(str(error), hint="write it as OWNER/NAME") from error
    if not layout.COMMIT.fullmatch(file_set.commit):
        raise DamagedFileError("the hub names no valid commit", hint="check HF_ENDPOINT")
    for file in file_set.files:
        safe_repo_path(file.path)
        if file.sha256 is not None and not layout.SHA256.fullmatch(file.sha256):
            raise DamagedFileError(
                f"the hub gives no valid sha256 for {escape_line(file.path)}",
                hint="check HF_ENDPOINT",
            )


def _n_missing(paths: RepoPaths, file: RemoteFile) -> int:
    if file.sha256 is None:
        return file.n_bytes
    if _has_size(paths.blob(file.sha256), file.n_bytes):
        return 0
    done = load_done(paths.parts(file.sha256), paths.partial(file.sha256), file.n_bytes)
    return file.n_bytes - sum(end - start for start, end in done)


def _needs_library(file: RemoteFile) -> bool:
    return file.sha256 is None or file.n_bytes > MAX_HTTP_BYTES


def _has_size(path: Path, n_bytes: int) -> bool:
    try:
        return path.stat().st_size == n_bytes
    except OSError:
        return False


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power failure, where the system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

"""The hub as the rest of llmrun sees it: listings, search, headers of remote files.

huggingface_hub does the talking. What it lacks is added here: time limits, one fast attempt when
the host does not answer, retries that honour rate limits, safe file names, and llmrun's errors.
huggingface_hub is imported on first use; it reads `HF_*` variables at that moment.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrun import __version__
from llmrun.errors import DamagedFileError, LlmrunError
from llmrun.gguf.naming import quant_of, role_of, safe_repo_path
from llmrun.gguf.types import ByteSource
from llmrun.hub import layout
from llmrun.hub.mapping import (
    MAX_TOTAL_WAIT_S,
    map_errors,
    offline_error,
    retry_wait_s,
    unreachable,
)
from llmrun.hub.types import RemoteFile, RepoListing, SearchHit
from llmrun.text import escape_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_FILES = 50_000
MAX_RETRIES = 4
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
N_LISTING_THREADS = 8


class Hub:
    """A connection to the hub that `HF_ENDPOINT` names, and the cache folder that goes with it.

    `offline` forbids every request, as `HF_HUB_OFFLINE` does; such calls raise HubUnreachableError.
    Safe to use from several threads.
    """

    def __init__(self, *, offline: bool = False, cache: Path | None = None) -> None:
        self.cache = cache or layout.cache_dir()
        self._offline = offline
        self._reachable = False
        self._configured = False
        self._lock = threading.Lock()

    @property
    def offline(self) -> bool:
        """Whether requests are forbidden, by the argument or by the environment."""
        value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
        return self._offline or value.upper() in {"1", "ON", "YES", "TRUE"}

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        """All files of `repo` at the commit that `revision` names now. Writes nothing to the cache.

        Files whose names or hashes are unsafe are left out. Raises NotFoundError, AuthError,
        HubUnreachableError, DamagedFileError (more than MAX_FILES entries).
        """
        api = self.api(repo)
        info = self.call(
            repo, lambda: api.model_info(repo, revision=revision, timeout=READ_TIMEOUT_S)
        )
        commit = str(info.sha or "")
        if not layout.COMMIT.fullmatch(commit):
            raise DamagedFileError(f"the hub names no commit for {repo}", hint="check HF_ENDPOINT")
        with map_errors(repo):  # the library tries pages of a tree again by itself
            tree = api.list_repo_tree(repo, recursive=True, revision=commit)
            entries = list(islice(tree, MAX_FILES + 1))
        if len(entries) > MAX_FILES:
            raise DamagedFileError(
                f"{repo} lists more than {MAX_FILES} files",
                hint="name another repository; model repositories have a few dozen",
            )
        files = tuple(sorted(_safe_files(entries), key=lambda file: file.path))
        return RepoListing(
            repo=repo,
            revision=revision,
            commit=commit,
            files=files,
            gated=bool(info.gated),
            licence=_licence_of(info),
        )

    def commit_of(self, repo: str, revision: str) -> str:
        """The commit that `revision` names now. Writes nothing to the cache."""
        api = self.api(repo)
        info = self.call(
            repo, lambda: api.model_info(repo, revision=revision, timeout=READ_TIMEOUT_S)
        )
        return str(info.sha)

    def open_source(self, repo: str, commit: str, file: RemoteFile) -> ByteSource:
        """Random access to a remote file by range requests, cached in memory while it lives."""
        from llmrun.hub.remote import RemoteSource

        return RemoteSource(self, repo, commit, file)

    def search(self, text: str, limit: int = 10) -> tuple[SearchHit, ...]:
        """Repositories with GGUF files that match `text`, the most downloaded first.

        The hub's search gives no sizes, so each hit's listing is asked as well; where that fails
        its sizes are None.
        """
        api = self.api("")
        found = self.call(
            "",
            lambda: list(
                api.list_models(
                    search=text,
                    filter="gguf",
                    sort="downloads",
                    limit=limit,
                    expand=["downloads", "likes", "lastModified", "gated", "gguf", "siblings"],
                )
            ),
        )
        with ThreadPoolExecutor(N_LISTING_THREADS) as pool:
            return tuple(pool.map(lambda info: self._search_hit(api, info), found[:limit]))

    def api(self, repo: str) -> HfApi:
        """huggingface_hub's own client, once the hub is known to answer.

        Raises HubUnreachableError at once when offline, and within seconds when the host cannot be
        resolved or connected to.
        """
        self.ensure_reachable(repo)
        from huggingface_hub import HfApi

        return HfApi(library_name="llmrun", library_version=__version__)

    def call(self, repo: str, action: Callable[[], Any]) -> Any:
        """Run `action`, again after 429 and 5xx as told or with back-off, and map its errors."""
        from huggingface_hub.errors import HfHubHTTPError

        waited = 0.0
        for attempt in range(MAX_RETRIES + 1):
            try:
                with map_errors(repo):
                    return action()
            except LlmrunError as error:
                cause = error.__cause__
                if not isinstance(cause, HfHubHTTPError) or attempt == MAX_RETRIES:
                    raise
                wait = retry_wait_s(cause.response.status_code, cause.response.headers, attempt)
                if wait is None or waited + wait > MAX_TOTAL_WAIT_S:
                    raise
            self._sleep(wait)
            waited += wait
        raise AssertionError("unreachable")

    def ensure_reachable(self, repo: str) -> None:
        """Raise HubUnreachableError when offline or when the host takes no connections."""
        if self.offline:
            raise offline_error(repo)
        self.configure()
        with self._lock:
            if not self._reachable:
                _probe_host()
                self._reachable = True

    def configure(self) -> None:
        """Settle huggingface_hub's process-wide state: time limits, silence, privacy. Once."""
        with self._lock:
            if self._configured:
                return
            self._configured = True
        if os.environ.get("DO_NOT_TRACK") or os.environ.get("HF_HUB_DISABLE_TELEMETRY"):
            os.environ.setdefault("HF_XET_TELEMETRY_ENABLED", "0")
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        if "HF_HUB_VERBOSITY" not in os.environ:
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() not in {"0", "OFF", "NO"}:
            disable_progress_bars()
        set_client_factory(_client_with_limits)

    def _search_hit(self, api: HfApi, info: Any) -> SearchHit:
        repo = str(info.id)
        sizes: dict[str, int] = {}
        try:
            layout.repo_folder(repo)
            with map_errors(repo):
                entries = list(islice(api.list_repo_tree(repo, recursive=True), MAX_FILES))
            sizes = {file.path: file.n_bytes for file in _safe_files(entries)}
        except (LlmrunError, ValueError):
            sizes = {}
        names = list(sizes) or [str(s.rfilename) for s in info.siblings or ()]
        quants: dict[str, int | None] = {}
        for name in names:
            quant = quant_of(name)
            if quant and name.lower().endswith(".gguf") and role_of(name) == "model":
                size = sizes.get(name)
                quants[quant] = None if size is None else (quants.get(quant) or 0) + size
        gguf = info.gguf if isinstance(info.gguf, dict) else {}
        updated = getattr(info, "last_modified", None)
        return SearchHit(
            repo=escape_line(repo),
            n_downloads=int(info.downloads or 0),
            n_likes=int(info.likes or 0),
            updated=updated.date().isoformat() if updated else None,
            n_params=_whole(gguf.get("total")),
            architecture=_text(gguf.get("architecture")),
            n_ctx_train=_whole(gguf.get("context_length")),
            gated=bool(info.gated),
            quants=tuple(quants.items()),
        )

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _safe_files(entries: Iterable[Any]) -> Iterable[RemoteFile]:
    """Files with safe names, sizes and hashes; folders and everything doubtful left out."""
    for entry in entries:
        size = getattr(entry, "size", None)
        if not isinstance(size, int) or size < 0:
            continue
        try:
            path = safe_repo_path(str(entry.path))
        except DamagedFileError:
            continue
        lfs = getattr(entry, "lfs", None)
        sha256 = getattr(lfs, "sha256", None)
        if lfs is not None and not (isinstance(sha256, str) and layout.SHA256.fullmatch(sha256)):
            continue
        yield RemoteFile(path, size, sha256)


def _licence_of(info: Any) -> str | None:
    card = getattr(info, "card_data", None)
    licence = getattr(card, "license", None)
    if isinstance(licence, list):
        licence = ", ".join(str(part) for part in licence)
    if licence == "other":
        licence = getattr(card, "license_name", None) or licence
    if not licence:
        tags = getattr(info, "tags", None) or ()
        licence = next((str(t)[8:] for t in tags if str(t).startswith("license:")), None)
    return escape_line(str(licence)) if licence else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return escape_line(value) if isinstance(value, str) else None


def _client_with_limits() -> Any:
    """huggingface_hub's default HTTP client has no time limit at all; this one has."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    return client


def _probe_host() -> None:
    """Connect to the hub's host once, in a thread, so that a dead resolver cannot hold us up.

    With a proxy in between nothing is probed: the proxy resolves the name.
    """
    from huggingface_hub import constants

    parsed = urllib.parse.urlsplit(constants.ENDPOINT)
    host = parsed.hostname or ""
    proxies = urllib.request.getproxies()
    proxied = proxies.get(parsed.scheme) or proxies.get("all")
    if proxied and not urllib.request.proxy_bypass(host):
        return
    port = parsed.port or (443 if parsed.scheme == "https" else 80)
    failure: list[str] = []
    done = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
        except (OSError, UnicodeError) as error:
            failure.append(str(error) or type(error).__name__)
        done.set()

    threading.Thread(target=connect, name="hub-probe", daemon=True).start()
    if not done.wait(CONNECT_TIMEOUT_S):
        raise unreachable(why=f"no answer within {CONNECT_TIMEOUT_S:.0f} s")
    if failure:
        raise unreachable(why=escape_line(failure[0]))

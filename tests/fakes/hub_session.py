"""A loopback hub with this process's huggingface_hub pointed at it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmrun.hub.client import Hub
from llmrun.hub.download import download
from llmrun.hub.fetch import Limits
from llmrun.hub.layout import RepoPaths
from llmrun.hub.types import FileSet
from tests.fakes.loopback_hub import CANARY_TOKEN, Content, LoopbackHub
from tests.fakes.progress import RecordingProgress

KIB = 1024
# Small enough that a file of a few hundred kilobytes takes several connections and claims.
FAST = Limits(
    min_claim_bytes=64 * KIB,
    max_claim_bytes=256 * KIB,
    read_timeout_s=0.4,
    stall_s=5.0,
    n_attempts=4,
    backoff_s=0.01,
    max_backoff_s=0.02,
    poll_s=0.005,
)


class HubSession:
    """`hub` talks to `server`; `cache` is the hub cache below the test's folder."""

    def __init__(self, server: LoopbackHub, hub: Hub) -> None:
        self.server, self.hub, self.cache = server, hub, hub.cache
        self.progress = RecordingProgress()
        self.slept: list[float] = []

    def file_set(self, repo: str, *names: str) -> FileSet:
        listing = self.hub.listing(repo)
        files = tuple(f for f in listing.files if not names or f.path in names)
        return FileSet(repo, listing.revision, listing.commit, files)

    def pull(
        self,
        wanted: FileSet | str,
        *,
        n_connections: int = 3,
        cancel: threading.Event | None = None,
        limits: Limits = FAST,
    ) -> tuple[Path, ...]:
        file_set = self.file_set(wanted) if isinstance(wanted, str) else wanted
        return download(
            self.hub,
            file_set,
            progress=self.progress,
            n_connections=n_connections,
            cancel=cancel,
            limits=limits,
        )

    def paths(self, repo: str) -> RepoPaths:
        return RepoPaths(self.cache, repo)

    def blobs(self, repo: str) -> set[str]:
        folder = self.paths(repo).root / "blobs"
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def visible(self, repo: str) -> set[str]:
        snapshots = self.paths(repo).root / "snapshots"
        return {path.name for path in snapshots.rglob("*") if not path.is_dir()}


@contextmanager
def hub_session(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    repos: Mapping[str, Mapping[str, Content]],
) -> Iterator[HubSession]:
    """Serve `repos` and connect to them; undone at the end. Back-off inside the library is void."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with LoopbackHub(repos) as server:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", CANARY_TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        session = HubSession(server, Hub(cache=tmp_path / "hub"))
        monkeypatch.setattr(Hub, "_sleep", lambda _self, seconds: session.slept.append(seconds))
        huggingface_hub.close_session()
        try:
            yield session
        finally:
            huggingface_hub.close_session()

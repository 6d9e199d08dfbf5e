"""Listings, searches and remote headers from a hub on loopback."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun.errors import AuthError, HubUnreachableError, LlmrunError, NotFoundError, UsageError
from llmrun.hub import remote
from llmrun.hub.client import Hub
from llmrun.hub.types import RemoteFile
from tests.fakes.hub_session import HubSession, hub_session
from tests.fakes.progress import RecordingProgress

DATA = random.Random(5).randbytes(100_000)
REPOS = {
    "org/a-GGUF": {
        "a-Q4_0.gguf": DATA,
        "a-Q8_0-00001-of-00002.gguf": DATA[:70],
        "a-Q8_0-00002-of-00002.gguf": DATA[:30],
        "mmproj-a-F16.gguf": DATA[:10],
        "README.md": b"hi",
    },
    "org/b-GGUF": {"b-Q4_0.gguf": DATA[:500]},
}


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubSession]:
    monkeypatch.setattr(remote, "FIRST_WINDOW_BYTES", 500)
    monkeypatch.setattr(remote, "WINDOW_GROWTH", 2)
    monkeypatch.setattr(remote, "WINDOW_BYTES", 1000)
    with hub_session(monkeypatch, tmp_path, REPOS) as opened:
        yield opened


def test_a_listing_is_pinned_and_leaves_no_trace(session: HubSession) -> None:
    listing = session.hub.listing("org/a-GGUF")
    repo = session.server.repos["org/a-GGUF"]
    assert (listing.commit, listing.revision) == (repo.main, "main")
    assert (listing.licence, listing.gated) == ("apache-2.0", False)
    by_path = {file.path: file for file in listing.files}
    assert by_path["a-Q4_0.gguf"].sha256 == repo.sha256(DATA)
    assert by_path["a-Q4_0.gguf"].n_bytes == len(DATA)
    assert by_path["README.md"].sha256 is None
    assert not session.cache.exists()


def test_the_tree_is_asked_at_the_commit(session: HubSession) -> None:
    first = session.server.repos["org/a-GGUF"].main
    session.hub.listing("org/a-GGUF")
    tree = [r.path for r in session.server.requests if "/tree/" in r.path]
    assert len(tree) == 1 and f"/tree/{first}" in tree[0]


def test_rate_limits_and_server_errors_are_waited_out(session: HubSession) -> None:
    session.server.inject(
        "status", match="/api/", times=1, status=429, headers={"RateLimit": '"api";r=0;t=17'}
    )
    session.server.inject("status", match="/tree/", times=2, status=503)
    assert session.hub.listing("org/a-GGUF").files
    assert session.slept == [17.0]
    assert sum("/tree/" in request.path for request in session.server.requests) == 3


def test_a_server_that_stays_broken_is_left_soon(session: HubSession) -> None:
    session.server.inject("status", match="/api/", status=503)
    with pytest.raises(HubUnreachableError) as caught:
        session.hub.listing("org/a-GGUF")
    assert "503" in caught.value.message
    assert len(session.server.requests) == 5 and sum(session.slept) < 10


def test_a_rate_limit_of_hours_is_not_waited_for(session: HubSession) -> None:
    session.server.inject(
        "status", match="/api/", status=429, headers={"RateLimit": '"api";r=0;t=7200'}
    )
    with pytest.raises(HubUnreachableError, match="limits how often"):
        session.hub.listing("org/a-GGUF")
    assert session.slept == []


@pytest.mark.parametrize(
    ("repo", "revision", "error"),
    [
        ("org/none", "main", NotFoundError),
        ("org/a-GGUF", "no-such-branch", NotFoundError),
        ("org//x", "main", UsageError),
        ("org/x/y", "main", UsageError),
    ],
)
def test_what_is_not_there(
    session: HubSession, repo: str, revision: str, error: type[LlmrunError]
) -> None:
    with pytest.raises(error) as caught:
        session.hub.listing(repo, revision)
    assert caught.value.hint
    assert session.slept == []


def test_a_private_repository_without_a_token(
    session: HubSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.server.repos["org/a-GGUF"].private = True
    assert session.hub.listing("org/a-GGUF").files
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(NotFoundError, match="or it is private"):
        session.hub.listing("org/a-GGUF")


def test_a_wrong_token(session: HubSession) -> None:
    session.server.inject("status", match="/api/", status=401)
    with pytest.raises(AuthError) as caught:
        session.hub.listing("org/a-GGUF")
    assert caught.value.hint == "hf auth login"


def test_a_dead_host_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{reserved.getsockname()[1]}")
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Hub, "_sleep", lambda *_: pytest.fail("waited"))
        with pytest.raises(HubUnreachableError) as caught:
            Hub(cache=tmp_path).listing("org/x")
    assert caught.value.exit_code == 6
    assert "127.0.0.1" in caught.value.message


def test_a_name_that_never_resolves_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llmrun.hub import client

    never = threading.Event()

    def hang(*_: object, **__: object) -> None:
        never.wait()
        raise OSError

    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(client.socket, "create_connection", hang)
    monkeypatch.setattr(client.urllib.request, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        with pytest.raises(HubUnreachableError):
            Hub(cache=tmp_path).listing("org/x")
    finally:
        never.set()


@pytest.mark.parametrize("by_environment", [True, False])
def test_offline_asks_nobody(
    session: HubSession, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    if by_environment:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = Hub(offline=not by_environment, cache=session.cache)
    for action in (
        lambda: hub.listing("org/a-GGUF"),
        lambda: hub.search("a"),
        lambda: hub.open_source("org/a-GGUF", "a" * 40, RemoteFile("x", 9, None)).read(0, 4),
    ):
        with pytest.raises(HubUnreachableError, match="offline mode"):
            action()
    assert session.server.requests == []


def test_a_search_gives_quants_with_sizes(session: HubSession) -> None:
    hits = session.hub.search("gguf", limit=5)
    assert [hit.repo for hit in hits] == ["org/a-GGUF", "org/b-GGUF"]
    assert dict(hits[0].quants) == {"Q4_0": len(DATA), "Q8_0": 100}
    assert (hits[0].n_downloads, hits[0].architecture, hits[0].n_ctx_train) == (
        1234,
        "llama",
        8192,
    )
    assert hits[0].updated == "2026-10-01"


def test_a_hit_that_cannot_be_listed_has_no_sizes(session: HubSession) -> None:
    session.server.inject("status", match="/tree/", status=500)
    assert session.hub.search("b-GGUF")[0].quants == (("Q4_0", None),)


def open_remote(session: HubSession) -> tuple[remote.RemoteSource, str]:
    listing = session.hub.listing("org/a-GGUF")
    file = next(f for f in listing.files if f.path == "a-Q4_0.gguf")
    source = session.hub.open_source("org/a-GGUF", listing.commit, file)
    assert isinstance(source, remote.RemoteSource)
    return source, file.path


def test_remote_bytes_come_in_windows_and_once(session: HubSession) -> None:
    source, path = open_remote(session)
    assert source.n_bytes == len(DATA)
    assert source.read(0, 24) == DATA[:24]
    assert source.read(24, 900) == DATA[24:924]
    assert source.read(990, 2020) == DATA[990:3010]
    assert source.read(700, 100) == DATA[700:800]
    assert source.read(len(DATA) - 5, 99) == DATA[-5:]
    assert source.read(len(DATA) - 50, 60) == DATA[-50:]
    assert source.read(len(DATA), 1) == b""
    assert [r.range for r in session.server.gets(path)] == [
        "bytes=0-499",
        "bytes=500-923",
        "bytes=990-1989",
        "bytes=1990-2989",
        "bytes=2990-3009",
        "bytes=99995-99999",
        "bytes=99950-99994",
    ]


def test_old_windows_are_dropped(session: HubSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_CACHED_BYTES", 2500)
    source, path = open_remote(session)
    assert source.read(0, len(DATA)) == DATA
    assert sum(map(len, source._windows.values())) <= 2500
    assert source.read(0, 10) == DATA[:10]
    assert len(session.server.gets(path)) > 100


def test_bytes_on_this_machine_are_not_asked_for(session: HubSession) -> None:
    cancel = threading.Event()

    class Watch(RecordingProgress):
        def advance(self, path: str, n_bytes: int) -> None:
            super().advance(path, n_bytes)
            if self.n_bytes[path] >= 20_000:
                cancel.set()

    session.progress = Watch()
    session.server.chunk_bytes, session.server.delay_s = 4096, 0.005
    with pytest.raises(KeyboardInterrupt):
        session.pull(session.file_set("org/a-GGUF", "a-Q4_0.gguf"), cancel=cancel)
    session.server.requests.clear()
    source, path = open_remote(session)
    assert source.read(0, 4000) == DATA[:4000]
    assert session.server.gets(path) == []
    assert source.read(len(DATA) - 10, 10) == DATA[-10:]
    assert len(session.server.gets(path)) == 1


@pytest.mark.parametrize("kind", ["drop", "rst", "truncate", "wrong_content_range"])
def test_a_broken_read_is_tried_again(session: HubSession, kind: str) -> None:
    source, path = open_remote(session)
    session.server.inject(kind, match=path, times=2, after=100)
    assert source.read(1500, 100) == DATA[1500:1600]


def test_a_read_that_stays_broken_is_an_error(session: HubSession) -> None:
    source, path = open_remote(session)
    session.server.inject("truncate", match=path, after=10)
    with pytest.raises(HubUnreachableError):
        source.read(0, 500)
    assert len(session.server.gets(path)) == remote.N_ATTEMPTS


def test_without_ranges_the_start_of_a_file_can_be_read(session: HubSession) -> None:
    source, path = open_remote(session)
    session.server.inject("ignore_range", match=path)
    assert source.read(0, 1500) == DATA[:1500]
    with pytest.raises(NotFoundError, match="part of a file"):
        source.read(90_000, 10)


def test_a_gated_header_says_where_to_accept(session: HubSession) -> None:
    source, _ = open_remote(session)
    session.server.repos["org/a-GGUF"].gated = "auto"
    with pytest.raises(AuthError, match="licence"):
        source.read(0, 4)

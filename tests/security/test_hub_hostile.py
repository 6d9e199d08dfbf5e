"""A hub that wants out of the cache folder, into the terminal, or at the token."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmrun.errors import DamagedFileError, LlmrunError
from llmrun.hub import client
from llmrun.hub.download import download
from llmrun.hub.types import FileSet, RemoteFile
from tests.fakes.hub_session import FAST, HubSession, hub_session
from tests.fakes.loopback_hub import CANARY_TOKEN
from tests.fakes.progress import RecordingProgress

DATA = random.Random(3).randbytes(150_000)
SHA = "a" * 64
HOSTILE = [
    "../../x.gguf",
    "a/../../x.gguf",
    "/etc/x.gguf",
    "C:\\x.gguf",
    "a\\..\\x.gguf",
    "a/\x1b[31m.gguf",
    "a\x00b.gguf",
    "a/./x.gguf",
    "a//x.gguf",
    "",
    ".",
    "\u202ex.gguf",
    "x" * 300 + ".gguf",
]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubSession]:
    with hub_session(monkeypatch, tmp_path, {"org/x": {"x-Q4_0.gguf": DATA}}) as opened:
        yield opened


def entry(path: str, size: object = 5, oid: object = SHA) -> dict[str, object]:
    lfs = {"oid": oid, "size": size, "pointerSize": 1}
    return {"type": "file", "path": path, "size": size, "oid": "b" * 40, "lfs": lfs}


def test_hostile_names_are_left_out_of_the_listing(session: HubSession) -> None:
    session.server.repos["org/x"].extra_tree = [entry(path) for path in HOSTILE]
    assert [file.path for file in session.hub.listing("org/x").files] == ["x-Q4_0.gguf"]


@pytest.mark.parametrize("oid", ["../" * 8, "A" * 64, "a" * 63, "a" * 65, "", "a" * 63 + "\n"])
def test_hostile_hashes_are_left_out_of_the_listing(session: HubSession, oid: str) -> None:
    session.server.repos["org/x"].extra_tree = [entry("y-Q8_0.gguf", oid=oid)]
    assert [file.path for file in session.hub.listing("org/x").files] == ["x-Q4_0.gguf"]


def test_a_negative_size_is_left_out(session: HubSession) -> None:
    session.server.repos["org/x"].extra_tree = [entry("y-Q8_0.gguf", size=-1)]
    assert len(session.hub.listing("org/x").files) == 1


@pytest.mark.parametrize("path", HOSTILE)
def test_a_hostile_name_is_not_downloaded(session: HubSession, tmp_path: Path, path: str) -> None:
    wanted = session.file_set("org/x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DamagedFileError):
        session.pull(replace(wanted, files=(*wanted.files, RemoteFile(path, 5, SHA))))
    assert sorted(tmp_path.rglob("*")) == before
    assert session.server.gets("x-Q4_0.gguf") == []


@pytest.mark.parametrize("commit", ["main", "../../..", "A" * 40, "a" * 39, "a" * 40 + "/.."])
def test_a_hostile_commit_is_refused(session: HubSession, tmp_path: Path, commit: str) -> None:
    wanted = replace(session.file_set("org/x"), commit=commit)
    with pytest.raises(DamagedFileError):
        session.pull(wanted)
    assert not session.cache.exists()


@pytest.mark.parametrize("repo", ["../../x", "org/..", "/abs", "a/b/c", "org\\x"])
def test_a_hostile_repository_name_is_refused(session: HubSession, repo: str) -> None:
    wanted = FileSet(repo, "main", "a" * 40, (RemoteFile("x.gguf", 5, SHA),))
    with pytest.raises(LlmrunError):
        session.pull(wanted)
    assert not session.cache.exists()


def test_a_hostile_branch_name_writes_no_ref(session: HubSession, tmp_path: Path) -> None:
    wanted = session.file_set("org/x")
    repo = session.server.repos["org/x"]
    for revision in ("../../../escaped", "a/../../../escaped"):
        repo.commits[revision] = repo.commits[repo.main]
        session.pull(replace(wanted, revision=revision))
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_tree_without_end_is_cut(session: HubSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_FILES", 1000)
    session.server.repos["org/x"].extra_tree = [entry(f"f{n}.gguf") for n in range(2000)]
    with pytest.raises(DamagedFileError, match="more than 1000 files"):
        session.hub.listing("org/x")


def test_what_the_hub_says_is_escaped(session: HubSession) -> None:
    session.server.repos["org/x"].tags = ["license:\x1b]0;owned\x07"]
    session.server.repos["org/x"].gguf = {"total": "9", "architecture": "\x1b[2J"}
    listing = session.hub.listing("org/x")
    assert "\x1b" not in str(listing.licence)
    (hit,) = session.hub.search("x")
    assert "\x1b" not in str(hit.architecture)
    assert hit.n_params is None


def test_error_messages_are_escaped(session: HubSession) -> None:
    session.server.inject(
        "status", match="/api/", status=403, headers={"X-Error-Message": "\x1b[31mred"}
    )
    with pytest.raises(LlmrunError) as caught:
        session.hub.listing("org/x")
    error = caught.value
    assert "\x1b" not in f"{error.message}{error.why}{error.hint}"


@pytest.mark.parametrize("use_fault", [None, "rst", "corrupt", "gated", "api"])
def test_the_token_is_seen_by_the_hub_only_and_shown_to_nobody(
    session: HubSession, tmp_path: Path, use_fault: str | None
) -> None:
    session.server.use_cdn = True
    wanted = session.file_set("org/x")
    if use_fault == "gated":
        session.server.repos["org/x"].gated = True
    elif use_fault == "api":
        session.server.inject("status", match="/resolve/", status=401)
    elif use_fault:
        session.server.inject(use_fault, match="x-Q4_0", after=10_000, times=2)
    shown = ""
    try:
        session.pull(wanted)
    except LlmrunError as error:
        shown = f"{error.message}{error.why}{error.hint}"
    cdn = [r.authorization for r in session.server.requests if r.origin == "cdn"]
    assert set(cdn) <= {None}
    assert bool(cdn) == (use_fault not in ("gated", "api"))
    assert CANARY_TOKEN not in shown + "".join(session.progress.notes)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert CANARY_TOKEN.encode() not in path.read_bytes()


def test_a_header_window_from_the_storage_carries_no_token(session: HubSession) -> None:
    session.server.use_cdn = True
    listing = session.hub.listing("org/x")
    source = session.hub.open_source("org/x", listing.commit, listing.files[0])
    assert source.read(0, 100) == DATA[:100]
    assert {r.authorization for r in session.server.requests if r.origin == "cdn"} == {None}


def test_an_endless_body_stops_at_the_files_size(session: HubSession) -> None:
    wanted = session.file_set("org/x")
    short = replace(wanted, files=(replace(wanted.files[0], n_bytes=1000),))
    session.server.inject("no_size")
    session.server.inject("ignore_range")
    with pytest.raises(LlmrunError):
        session.pull(short)
    assert not any(p.stat().st_size > 1000 for p in session.cache.rglob("*.llmrun.incomplete"))


def test_a_link_planted_as_partial_file_is_not_written_through(
    session: HubSession, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    wanted = session.file_set("org/x")
    partial = session.paths("org/x").partial(str(wanted.files[0].sha256))
    partial.parent.mkdir(parents=True)
    partial.symlink_to(precious)
    with contextlib.suppress(LlmrunError):
        download(session.hub, wanted, progress=RecordingProgress(), limits=FAST)
    assert precious.read_bytes() == b"mine"

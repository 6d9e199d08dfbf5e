"""Headers and listings that are kept: found again, bounded, and never trusted."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from llmrun.errors import GgufError, HubUnreachableError, NotFoundError
from llmrun.gguf.source import BytesSource
from llmrun.hub.cache_folder import CacheFolder
from llmrun.hub.header_cache import HeaderCache, RecordingSource
from llmrun.hub.listing_cache import ListingCache, RememberingLister
from llmrun.hub.types import RemoteFile, RepoListing
from tests.fakes.gguf_builder import tiny_llama_builder

NAMES = [f"{i:064x}" for i in range(5)]
DATA = tiny_llama_builder().build()
FILE = RemoteFile("m.gguf", len(DATA), "ab" * 32)
GIT_FILE = RemoteFile("m.gguf", len(DATA), None)


class Opener:
    """`Hub.open_source` of one file, counting."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.n_opened = 0

    def __call__(self, repo: str, commit: str, file: RemoteFile) -> BytesSource:
        self.n_opened += 1
        return BytesSource(self.data)


def unreachable(repo: str, commit: str, file: RemoteFile) -> BytesSource:
    raise HubUnreachableError("not now")


# ---- the folder


def test_an_entry_comes_back_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "a" / "b", 10_000)
    assert folder.read(NAMES[0]) is None
    folder.write(NAMES[0], b"one")
    folder.write(NAMES[0], b"other")
    assert folder.read(NAMES[0]) == b"other"
    (path,) = folder.folder.iterdir()
    if os.name == "posix":
        assert stat.S_IMODE(folder.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_entry_is_not_there(tmp_path: Path, damage: bytes | None) -> None:
    folder = CacheFolder(tmp_path, 10_000)
    folder.write(NAMES[0], b"payload")
    path = tmp_path / NAMES[0]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"?" if damage is None else damage)
    assert folder.read(NAMES[0]) is None
    folder.write(NAMES[0], b"again")
    assert folder.read(NAMES[0]) == b"again"


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 3 * 1100)
    for age, name in enumerate(NAMES[:3]):
        folder.write(name, bytes(1000))
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    assert folder.read(NAMES[0]) is not None  # used now
    folder.write(NAMES[3], bytes(1000))
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {NAMES[0], NAMES[2], NAMES[3]}


def test_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 500)
    folder.write(NAMES[0], bytes(400))
    folder.write(NAMES[1], bytes(500))
    assert folder.read(NAMES[1]) is None and folder.read(NAMES[0]) is not None


def test_leftovers_of_a_crash_are_swept(tmp_path: Path) -> None:
    old, fresh = tmp_path / "unfinished-1-a", tmp_path / "unfinished-2-b"
    for path in (old, fresh):
        path.write_bytes(b"x")
    os.utime(old, (1000, 1000))
    CacheFolder(tmp_path, 500).write(NAMES[0], b"x")
    assert not old.exists() and fresh.exists()


def test_a_folder_that_cannot_be_made_loses_the_entry_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = CacheFolder(tmp_path / "file", 500)
    folder.write(NAMES[0], b"x")
    assert folder.read(NAMES[0]) is None


def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a name"):
        CacheFolder(tmp_path, 500).write("../x", b"x")


# ---- headers


@pytest.mark.parametrize("file", [FILE, GIT_FILE], ids=["sha256", "place"])
def test_a_header_is_asked_for_once(tmp_path: Path, file: RemoteFile) -> None:
    cache, opener = HeaderCache(tmp_path), Opener()
    first = cache.get("org/a", "c" * 40, file, opener)
    assert first.raw == DATA[: first.header.data_offset]
    again = HeaderCache(tmp_path).get("org/a", "c" * 40, file, unreachable)
    assert again == first and opener.n_opened == 1
    # Content is content wherever it lies; a place without a hash is only that place.
    elsewhere = HeaderCache(tmp_path).load("org/b", "d" * 40, file)
    assert (elsewhere is not None) == (file is FILE)


def test_a_damaged_header_is_fetched_again(tmp_path: Path) -> None:
    cache, opener = HeaderCache(tmp_path), Opener()
    cache.get("org/a", "c" * 40, FILE, opener)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    assert cache.get("org/a", "c" * 40, FILE, opener).raw in DATA
    assert opener.n_opened == 2
    assert cache.load("org/a", "c" * 40, FILE) is not None


def test_a_kept_header_passes_the_readers_checks_or_is_not_used(tmp_path: Path) -> None:
    CacheFolder(tmp_path, 10**6).write("ab" * 32, b"GGUF but no header")
    assert HeaderCache(tmp_path).load("org/a", "c" * 40, FILE) is None


def test_a_bad_header_is_an_error_and_not_kept(tmp_path: Path) -> None:
    with pytest.raises(GgufError):
        HeaderCache(tmp_path).get("org/a", "c" * 40, FILE, Opener(b"<html>" + bytes(100)))
    assert not list(tmp_path.iterdir())


def test_the_start_of_a_file_is_recorded_as_it_is_read() -> None:
    source = RecordingSource(BytesSource(bytes(range(100))))
    assert source.read(0, 10) == bytes(range(10))
    source.read(5, 10)
    source.read(50, 10)  # beyond a gap: not the start
    assert source.start(15) == bytes(range(15))
    assert source.start(17) == bytes(range(15)) + b"\0\0"


# ---- listings

LISTING = RepoListing("org/a", "main", "c" * 40, (FILE, RemoteFile("R.md", 3, None)), True, "mit")


class FakeHub:
    def __init__(self) -> None:
        self.error: Exception | None = None

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        if self.error is not None:
            raise self.error
        return LISTING


def test_a_listing_is_remembered_for_when_the_hub_is_away(tmp_path: Path) -> None:
    hub, now = FakeHub(), [1000.0]
    lister = RememberingLister(hub, ListingCache(tmp_path), lambda: now[0])
    assert lister.listing("org/a") == LISTING and lister.age_s == 0
    hub.error, now[0] = HubUnreachableError("away"), 4600.0
    assert lister.listing("org/a") == LISTING and lister.age_s == 3600
    for repo, revision in (("org/b", "main"), ("org/a", "dev")):
        with pytest.raises(HubUnreachableError):
            lister.listing(repo, revision)


def test_what_the_hub_says_now_counts_more(tmp_path: Path) -> None:
    hub = FakeHub()
    lister = RememberingLister(hub, ListingCache(tmp_path), lambda: 1000.0)
    lister.listing("org/a")
    hub.error = NotFoundError("gone")
    with pytest.raises(NotFoundError):
        lister.listing("org/a")


@pytest.mark.parametrize(
    "change",
    [
        {"files": [["../x", 1, None]]},
        {"files": [["x", -1, None]]},
        {"files": [["x", 1, "zz"]]},
        {"commit": "main"},
        {"stored_at": "now"},
        {"repo": "org/other"},
        {"files": None},
    ],
)
def test_a_kept_listing_is_checked(tmp_path: Path, change: dict[str, object]) -> None:
    cache = ListingCache(tmp_path)
    cache.store(LISTING, 1000.0)
    (path,) = tmp_path.iterdir()
    folder = CacheFolder(tmp_path, 10**6)
    good = json.loads(folder.read(path.name) or b"")
    assert cache.load("org/a") is not None
    folder.write(path.name, json.dumps(good | change).encode())
    assert cache.load("org/a") is None

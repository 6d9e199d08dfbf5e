"""The resumable, verified download against a hub on loopback with faults switched on."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from llmrun.errors import (
    AuthError,
    DamagedFileError,
    DiskFullError,
    HubUnreachableError,
    LlmrunError,
    NotFoundError,
)
from llmrun.hub import download as download_module
from llmrun.hub.layout import read_ref
from llmrun.hub.types import FileSet, RemoteFile
from tests.fakes.hub_session import FAST, KIB, HubSession, hub_session
from tests.fakes.loopback_hub import CANARY_TOKEN
from tests.fakes.progress import RecordingProgress

MODEL = random.Random(1).randbytes(700_001)
SHARDS = [random.Random(n).randbytes(200_000 + n) for n in (2, 3)]
PROJECTOR = random.Random(4).randbytes(30_000)
REPOS = {
    "org/one": {"one-Q4_0.gguf": MODEL, "README.md": b"hello"},
    "org/set": {
        "set-Q8_0-00001-of-00002.gguf": SHARDS[0],
        "set-Q8_0-00002-of-00002.gguf": SHARDS[1],
        "mmproj-set-F16.gguf": PROJECTOR,
    },
}
FILE = "one-Q4_0.gguf"
SHA = hashlib.sha256(MODEL).hexdigest()


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubSession]:
    with hub_session(monkeypatch, tmp_path, REPOS) as opened:
        yield opened


def ranges(session: HubSession, path: str = FILE) -> list[tuple[int, int]]:
    """The ranges asked for, as (first, last)."""
    asked = [request.range for request in session.server.gets(path)]
    pairs = [text.removeprefix("bytes=").split("-") for text in asked if text]
    return sorted((int(first), int(last)) for first, last in pairs)


def test_a_file_arrives_over_several_ranges_and_is_published(session: HubSession) -> None:
    (path,) = session.pull(session.file_set("org/one", FILE))
    assert path.read_bytes() == MODEL
    asked = ranges(session)
    assert len(asked) > 2
    assert asked[0][0] == 0 and asked[-1][1] == len(MODEL) - 1
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(asked))
    assert session.blobs("org/one") == {SHA}
    assert path.is_symlink() and path.resolve().name == SHA
    commit = session.server.repos["org/one"].main
    assert path.parent.name == commit
    assert read_ref("org/one", cache=session.cache) == commit
    assert session.progress.calls == ["begin", "end"]
    assert session.progress.n_bytes == {FILE: len(MODEL)}
    assert session.progress.finished == [FILE]


def test_other_tools_find_the_file_and_ask_only_for_its_metadata(session: HubSession) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache

    (path,) = session.pull(session.file_set("org/one", FILE))
    n_gets = len(session.server.gets(FILE))
    found = hf_hub_download("org/one", FILE, cache_dir=session.cache)
    assert Path(found) == path
    assert len(session.server.gets(FILE)) == n_gets
    assert try_to_load_from_cache("org/one", FILE, cache_dir=session.cache) == str(path)
    scan = scan_cache_dir(session.cache)
    assert not scan.warnings and not scan.incomplete_files
    assert [repo.repo_id for repo in scan.repos] == ["org/one"]


def test_what_is_in_the_cache_needs_no_request(session: HubSession) -> None:
    wanted = session.file_set("org/one")
    first = session.pull(wanted)
    session.server.requests.clear()
    assert session.pull(wanted) == first
    assert session.server.requests == []


def test_small_files_come_along(session: HubSession) -> None:
    paths = session.pull("org/one")
    assert {path.name: path.read_bytes() for path in paths} == {FILE: MODEL, "README.md": b"hello"}


def test_a_blob_of_an_older_commit_is_not_fetched_again(session: HubSession) -> None:
    session.pull(session.file_set("org/one", FILE))
    session.server.repos["org/one"].move({FILE: MODEL, "new.md": b"x"})
    session.server.requests.clear()
    (path,) = session.pull(session.file_set("org/one", FILE))
    assert path.read_bytes() == MODEL
    assert session.server.gets(FILE) == []


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("drop", {"after": 30_000}),
        ("rst", {"after": 30_000}),
        ("stall", {"after": 30_000}),
        ("truncate", {"after": 30_000}),
        ("status", {"status": 503}),
        ("status", {"status": 500}),
        ("status", {"status": 429, "headers": {"RateLimit": '"resolvers";r=0;t=0'}}),
        ("status", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("wrong_content_range", {}),
        ("no_size", {}),
        ("xet", {}),
        ("no_etag", {}),
    ],
)
def test_a_fault_that_passes_is_survived(
    session: HubSession, kind: str, settings: dict[str, object]
) -> None:
    session.server.chunk_bytes = 8 * KIB
    session.server.inject(kind, match="/resolve/", times=3, **settings)
    (path,) = session.pull(session.file_set("org/one", FILE))
    assert path.read_bytes() == MODEL
    assert session.blobs("org/one") == {SHA}
    assert session.progress.n_bytes[FILE] == len(MODEL)
    # A reset may throw away what lies in the sockets, and a reply with a wrong range is not read.
    if kind not in ("rst", "wrong_content_range"):
        assert session.server.served[FILE] == len(MODEL)


def test_many_drops_end_well_as_long_as_bytes_arrive(session: HubSession) -> None:
    session.server.chunk_bytes = 4 * KIB
    session.server.inject("drop", match=FILE, times=30, after=20_000)
    (path,) = session.pull(session.file_set("org/one", FILE), n_connections=1)
    assert path.read_bytes() == MODEL
    assert len(session.server.gets(FILE)) > 30


def test_a_trickle_counts_as_stalled(session: HubSession) -> None:
    session.server.chunk_bytes = 512
    session.server.delay_s = 0.01
    limits = replace(FAST, stall_s=0.05, stall_bytes=64 * KIB, min_claim_bytes=len(MODEL))
    # Bytes arrive, so it would go on for ever: it is enough that connections are opened anew.
    cancel = threading.Event()

    class Watch(RecordingProgress):
        def advance(self, path: str, n_bytes: int) -> None:
            super().advance(path, n_bytes)
            if len(session.server.gets(FILE)) >= 3:
                cancel.set()

    session.progress = Watch()
    with pytest.raises(KeyboardInterrupt):
        session.pull(session.file_set("org/one", FILE), limits=limits, cancel=cancel)
    starts = [first for first, _ in ranges(session)]
    assert len(set(starts)) == len(starts), "each new connection goes on where the last one was"


def interrupt(session: HubSession, wanted: FileSet, n_bytes: int) -> RecordingProgress:
    """Start to download and cancel after `n_bytes`; what was told of it."""
    cancel = threading.Event()

    class Watch(RecordingProgress):
        def advance(self, path: str, n: int) -> None:
            super().advance(path, n)
            if self.n_bytes[path] >= n_bytes:
                cancel.set()

    session.progress = Watch()
    session.server.chunk_bytes, session.server.delay_s = 8 * KIB, 0.002
    with pytest.raises(KeyboardInterrupt):
        session.pull(wanted, cancel=cancel)
    told, session.progress = session.progress, RecordingProgress()
    session.server.delay_s = 0.0
    session.server.requests.clear()
    return told


def test_interrupted_it_keeps_every_byte_and_continues(session: HubSession) -> None:
    wanted = session.file_set("org/one", FILE)
    told = interrupt(session, wanted, 200_000)
    had = told.n_bytes[FILE]
    assert told.calls == ["begin", "end"]
    assert session.visible("org/one") == set()
    assert {name.partition(".")[2] for name in session.blobs("org/one")} == {
        "llmrun.incomplete",
        "llmrun.parts.incomplete",
    }
    assert download_module.missing_bytes(session.hub, wanted) == len(MODEL) - had
    (path,) = session.pull(wanted)
    assert path.read_bytes() == MODEL
    assert session.progress.n_present == had
    assert sum(last - first + 1 for first, last in ranges(session)) == len(MODEL) - had
    assert session.blobs("org/one") == {SHA}


def test_corrupted_data_is_thrown_away_and_both_hashes_are_named(session: HubSession) -> None:
    session.server.inject("corrupt", match=FILE)
    with pytest.raises(DamagedFileError) as caught:
        session.pull(session.file_set("org/one", FILE))
    wrong = hashlib.sha256(MODEL[:-1] + bytes([MODEL[-1] ^ 1])).hexdigest()
    assert caught.value.exit_code == 7
    assert SHA in str(caught.value.why) and wrong in str(caught.value.why)
    assert session.blobs("org/one") == set()
    assert session.visible("org/one") == set()
    session.server.faults.clear()
    assert session.pull(session.file_set("org/one", FILE))[0].read_bytes() == MODEL


def test_a_partial_file_that_was_changed_on_disk_is_found_out(session: HubSession) -> None:
    wanted = session.file_set("org/one", FILE)
    interrupt(session, wanted, 200_000)
    partial = session.paths("org/one").partial(SHA)
    with partial.open("r+b") as data:
        data.write(b"\0\0\0\0")
    with pytest.raises(DamagedFileError):
        session.pull(wanted)
    assert session.blobs("org/one") == set()


def test_shards_and_projector_are_one_transaction(session: HubSession) -> None:
    second = "set-Q8_0-00002-of-00002.gguf"
    session.server.inject("corrupt", match=second)
    wanted = session.file_set("org/set")
    with pytest.raises(DamagedFileError):
        session.pull(wanted)
    assert session.visible("org/set") == set()
    assert read_ref("org/set", cache=session.cache) is None
    session.server.faults.clear()
    session.server.served.clear()
    paths = session.pull(wanted)
    assert [path.read_bytes() for path in paths] == [PROJECTOR, *SHARDS]
    assert session.server.served == {second: len(SHARDS[1])}


def test_a_server_that_ignores_ranges_is_read_from_the_start(session: HubSession) -> None:
    session.server.inject("ignore_range")
    session.server.inject("drop", match=FILE, times=1, after=50_000)
    (path,) = session.pull(session.file_set("org/one", FILE))
    assert path.read_bytes() == MODEL
    assert session.progress.n_bytes[FILE] == len(MODEL)
    assert any("cannot send ranges" in note for note in session.progress.notes)


def test_a_refused_range_starts_the_file_again_once(session: HubSession) -> None:
    session.server.inject("status", match=FILE, status=416, times=1)
    assert session.pull(session.file_set("org/one", FILE))[0].read_bytes() == MODEL
    assert any("starting again" in note for note in session.progress.notes)


def test_a_file_shorter_than_listed_is_an_error(session: HubSession) -> None:
    wanted = session.file_set("org/one", FILE)
    longer = replace(wanted, files=(replace(wanted.files[0], n_bytes=len(MODEL) + 100_000),))
    with pytest.raises(LlmrunError):
        session.pull(longer)
    assert session.visible("org/one") == set()


def test_a_larger_partial_file_starts_again(session: HubSession) -> None:
    partial = session.paths("org/one").partial(SHA)
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * (len(MODEL) + 1))
    assert session.pull(session.file_set("org/one", FILE))[0].read_bytes() == MODEL


def test_a_wrong_range_for_ever_gives_up_and_keeps_the_partial(session: HubSession) -> None:
    session.server.inject("wrong_content_range", match=FILE)
    with pytest.raises(HubUnreachableError) as caught:
        session.pull(session.file_set("org/one", FILE))
    assert "tried 4 times" in str(caught.value.why)
    assert len(session.server.gets(FILE)) <= 4 * 3
    assert session.visible("org/one") == set()


def test_a_long_rate_limit_is_told_and_not_waited_for(session: HubSession) -> None:
    session.server.inject(
        "status", match=FILE, status=429, headers={"RateLimit": '"resolvers";r=0;t=9000'}
    )
    with pytest.raises(HubUnreachableError) as caught:
        session.pull(session.file_set("org/one", FILE))
    assert "9000 s" in str(caught.value.why)


def test_too_little_disk_is_refused_before_the_first_byte(
    session: HubSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "free_bytes", lambda folder: 500_000)
    with pytest.raises(DiskFullError) as caught:
        session.pull(session.file_set("org/one", FILE))
    assert caught.value.exit_code == 5
    assert "235 kB are missing" in caught.value.message
    assert session.server.gets(FILE) == []
    assert session.progress.calls == []


def test_bytes_that_are_there_count_for_the_disk_check(
    session: HubSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = session.file_set("org/one", FILE)
    interrupt(session, wanted, 300_000)
    missing = download_module.missing_bytes(session.hub, wanted)
    assert 0 < missing < len(MODEL)
    monkeypatch.setattr(download_module, "free_bytes", lambda folder: int(missing * 1.06))
    assert session.pull(wanted)[0].read_bytes() == MODEL


def test_without_symlinks_the_file_is_not_there_twice(
    session: HubSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    wanted = session.file_set("org/one", FILE)
    (path,) = session.pull(wanted)
    assert not path.is_symlink() and path.read_bytes() == MODEL
    assert session.blobs("org/one") == set()
    session.server.requests.clear()
    assert session.pull(wanted) == (path,)
    assert session.server.requests == []


def test_a_branch_that_moved_meanwhile_is_not_recorded(session: HubSession) -> None:
    wanted = session.file_set("org/one", FILE)
    session.server.repos["org/one"].move({FILE: b"another file"})
    (path,) = session.pull(wanted)
    assert path.read_bytes() == MODEL and path.parent.name == wanted.commit
    assert read_ref("org/one", cache=session.cache) is None
    (moved,) = session.pull(session.file_set("org/one", FILE))
    assert moved.read_bytes() == b"another file"
    assert read_ref("org/one", cache=session.cache) == session.server.repos["org/one"].main


def test_a_gated_repository_says_where_to_accept_the_licence(session: HubSession) -> None:
    wanted = session.file_set("org/one", FILE)
    session.server.repos["org/one"].gated = "manual"
    with pytest.raises(AuthError) as caught:
        session.pull(wanted)
    assert caught.value.exit_code == 4
    assert f"{session.server.url}/org/one" in str(caught.value.why)
    assert caught.value.hint == "hf auth login"
    assert len(session.server.gets(FILE)) <= 3, "a refusal is not tried again"


@pytest.mark.parametrize(
    ("status", "error"), [(401, AuthError), (403, AuthError), (404, NotFoundError)]
)
def test_refusals_are_final(session: HubSession, status: int, error: type[LlmrunError]) -> None:
    wanted = session.file_set("org/one", FILE)
    session.server.inject("status", match=FILE, status=status)
    with pytest.raises(error):
        session.pull(wanted)
    assert len(session.server.gets(FILE)) <= 3
    assert session.progress.calls == ["begin", "end"]


def test_the_token_stays_with_the_hub(session: HubSession) -> None:
    session.server.use_cdn = True
    (path,) = session.pull(session.file_set("org/one", FILE))
    assert path.read_bytes() == MODEL
    by_origin = {
        origin: {r.authorization for r in session.server.requests if r.origin == origin}
        for origin in ("hub", "cdn")
    }
    assert by_origin == {"hub": {f"Bearer {CANARY_TOKEN}"}, "cdn": {None}}
    assert CANARY_TOKEN not in "".join(session.progress.notes)


def test_a_signed_link_that_ran_out_is_asked_for_again(session: HubSession) -> None:
    session.server.use_cdn = True
    wanted = session.file_set("org/one", FILE)
    session.server.inject("status", match=f"/{SHA}/", status=403, times=2)
    assert session.pull(wanted)[0].read_bytes() == MODEL


def test_offline_with_the_file_missing_is_an_error(session: HubSession) -> None:
    from llmrun.hub.client import Hub

    wanted = session.file_set("org/one", FILE)
    session.hub = Hub(offline=True, cache=session.cache)
    session.server.requests.clear()
    with pytest.raises(HubUnreachableError):
        session.pull(wanted)
    assert session.server.requests == []


def test_an_empty_file_is_a_file(session: HubSession) -> None:
    session.server.repos["org/one"].move({"empty-Q4_0.gguf": b""})
    (path,) = session.pull("org/one")
    assert path.read_bytes() == b""


def test_two_names_for_the_same_content_are_fetched_once(session: HubSession) -> None:
    session.server.repos["org/one"].move({"a-Q4_0.gguf": MODEL, "b-Q4_0.gguf": MODEL})
    paths = session.pull("org/one")
    assert [path.read_bytes() for path in paths] == [MODEL, MODEL]
    assert sum(session.server.served.values()) == len(MODEL)


def test_a_file_without_a_valid_hash_is_refused(session: HubSession) -> None:
    wanted = session.file_set("org/one", FILE)
    bad = replace(wanted, files=(RemoteFile("x.gguf", 3, "../../../etc/passwd"),))
    with pytest.raises(DamagedFileError):
        session.pull(bad)

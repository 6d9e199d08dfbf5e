"""Saved prefixes on disk: what comes back is what was written, under its own key, or nothing."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.engine import state_store
from llmrun.engine.state_store import PrefixKey, StateStore, identify_files
from llmrun.engine.types import SavedPrefix
from tests.fakes.fake_engine import fake_facts

KEY = PrefixKey("model-sha256", "build 3 f16", "template")
TOKENS = tuple(range(1000, 1100))
SAVED = SavedPrefix(TOKENS, b"state " * 50, 7, ((40, b"at forty"), (90, b"at ninety")))
PLAIN, WINDOW = fake_facts(), fake_facts(n_swa=16)
LARGE = 1 << 30


class Bench:
    def __init__(self, folder: Path, max_bytes: int = LARGE) -> None:
        self.problems: list[str] = []
        self.store = StateStore(folder / "prefixes", max_bytes, self.problems.append)

    @property
    def paths(self) -> list[Path]:
        return sorted(self.store.folder.glob("*"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def same(loaded: SavedPrefix | None, saved: SavedPrefix) -> bool:
    return loaded is not None and (
        (loaded.tokens, bytes(loaded.state), loaded.pos_min)
        == (saved.tokens, bytes(saved.state), saved.pos_min)
        and [(n, bytes(s)) for n, s in loaded.checkpoints]
        == [(n, bytes(s)) for n, s in saved.checkpoints]
    )


# ---- keeping and finding


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50).map(tuple),
    state=st.binary(max_size=200),
    pos_min=st.integers(0, 100),
    checkpoints=st.lists(st.tuples(st.integers(1, 50), st.binary(max_size=30)), max_size=3),
    words=st.tuples(st.text(max_size=9), st.text(max_size=9), st.text(max_size=9)),
    owner=st.text(min_size=1, max_size=9),
)
@settings(max_examples=60)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    tokens: tuple[int, ...],
    state: bytes,
    pos_min: int,
    checkpoints: list[tuple[int, bytes]],
    words: tuple[str, str, str],
    owner: str,
) -> None:
    bench = Bench(tmp_path_factory.mktemp("store"))
    saved = SavedPrefix(tokens, state, pos_min, tuple(checkpoints))
    key = PrefixKey(*words)
    assert bench.store.save(key, saved, owner=owner, title="m")
    assert same(bench.store.load_owned(key, owner), saved)
    assert bench.problems == []


def test_only_the_user_may_look(bench: Bench) -> None:
    bench.store.folder.mkdir(parents=True, mode=0o755)
    bench.store.save(KEY, SAVED, owner="me")
    (path,) = bench.paths
    assert stat.S_IMODE(bench.store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["model", "engine", "template"])
def test_another_key_or_owner_gets_nothing(bench: Bench, name: str) -> None:
    other = replace(KEY, **{name: "other"})
    bench.store.save(KEY, SAVED)
    bench.store.save(KEY, SAVED, owner="me")
    assert bench.store.find(other, (*TOKENS, 1), PLAIN) is None
    assert bench.store.load_owned(other, "me") is None
    assert bench.store.load_owned(KEY, "you") is None
    # Even where a file lies under the other key's name.
    for path in bench.paths:
        os.rename(path, path.with_name(path.name.replace(KEY.name, other.name)))
    assert bench.store.find(other, (*TOKENS, 1), PLAIN) is None
    assert bench.store.load_owned(other, "me") is None
    assert len(bench.problems) == 2 and "another model or build" in bench.problems[0]
    assert len(bench.paths) == 2


def test_the_longest_common_prefix_is_found(bench: Bench) -> None:
    for n in (10, 30, 20):
        bench.store.save(KEY, replace(SAVED, tokens=(*TOKENS[:n], 5), checkpoints=()))
    bench.store.save(KEY, SAVED, owner="a conversation")
    match = bench.store.find(KEY, TOKENS, PLAIN)
    assert match is not None and (match.n_tokens, match.n_common, match.n_usable) == (31, 30, 30)
    loaded = bench.store.load(KEY, match)
    assert loaded is not None and len(loaded.tokens) == 31
    assert bench.store.find(KEY, (7, *TOKENS), PLAIN) is None


def test_the_last_token_of_a_prompt_is_never_common(bench: Bench) -> None:
    bench.store.save(KEY, SAVED)
    match = bench.store.find(KEY, TOKENS, PLAIN)
    assert match is not None and match.n_common == 99


@pytest.mark.parametrize(
    ("n_same", "facts", "n_usable"),
    [
        (100, WINDOW, 100),  # all of it: nothing is taken back
        (25, WINDOW, 25),  # 25 - 16 is not before 7
        (22, WINDOW, 0),
        (22, PLAIN, 22),
        (99, fake_facts(is_recurrent=True), 90),
        (60, fake_facts(is_hybrid=True), 40),
        (39, fake_facts(is_recurrent=True), 0),
    ],
)
def test_what_a_model_forgets_is_not_usable(bench: Bench, n_same, facts, n_usable) -> None:
    bench.store.save(KEY, SAVED)
    match = bench.store.find(KEY, (*TOKENS[:n_same], 1, 2), facts)
    assert match is not None and (match.n_common, match.n_usable) == (n_same, n_usable)


def test_an_owner_has_one_file_a_key_and_can_be_forgotten(bench: Bench) -> None:
    other = replace(KEY, model="other")
    bench.store.save(KEY, SAVED, owner="me")
    bench.store.save(KEY, replace(SAVED, state=b"new"), owner="me")
    bench.store.save(other, SAVED, owner="me")
    bench.store.save(KEY, SAVED, owner="you")
    assert len(bench.paths) == 3
    bench.store.forget("me")
    assert len(bench.paths) == 1
    assert bench.store.load_owned(KEY, "you") is not None


def test_a_longer_one_takes_the_place_of_its_beginning(bench: Bench) -> None:
    bench.store.save(KEY, SAVED)
    match = bench.store.find(KEY, (*TOKENS, 1), PLAIN)
    assert bench.store.save(KEY, replace(SAVED, tokens=(*TOKENS, 1)), replaces=match)
    assert len(bench.paths) == 1


# ---- bounds


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    one = replace(SAVED, state=bytes(10_000), checkpoints=())
    bench = Bench(tmp_path, max_bytes=35_000)
    for i, owner in enumerate("abc"):
        bench.store.save(KEY, one, owner=owner)
        os.utime(bench.store.folder / state_store._file_name(KEY, owner), (i, i))
    assert bench.store.load_owned(KEY, "a") is not None  # used now
    assert bench.store.save(KEY, one, owner="d")
    left = [owner for owner in "abcd" if bench.store.load_owned(KEY, owner) is not None]
    assert left == ["a", "c", "d"]
    assert not bench.store.save(KEY, replace(one, state=bytes(40_000)), owner="e")
    assert len(bench.paths) == 3


def test_with_no_space_nothing_is_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bytes=0)
    assert not bench.store.save(KEY, SAVED)
    assert bench.paths == []


def test_a_full_disk_is_left_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    assert not bench.store.save(KEY, SAVED)
    assert bench.paths == []


def test_a_folder_that_cannot_be_made_loses_the_prefix_only(tmp_path: Path) -> None:
    (tmp_path / "prefixes").write_text("a file")
    bench = Bench(tmp_path)
    assert not bench.store.save(KEY, SAVED)
    assert bench.store.find(KEY, TOKENS, PLAIN) is None
    assert bench.store.list() == ()
    bench.store.forget("me")


def test_the_list_and_what_is_removed(bench: Bench) -> None:
    bench.store.save(KEY, SAVED, owner="me", title="smollm2")
    (path,) = bench.paths
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = bench.store.folder / f"unfinished-{dead.pid}-00"
    old.write_bytes(b"x" * 9)
    fresh = bench.store.folder / f"unfinished-{os.getpid()}-00"
    fresh.write_bytes(b"being written")
    (bench.store.folder / "notes.txt").write_text("somebody's")
    listed = bench.store.list()
    assert [(s.path, s.title, s.owner, s.n_tokens, s.unfinished) for s in listed] == [
        (path, "smollm2", "me", 100, False),
        (old, "", "", 0, True),
    ]
    assert bench.store.remove(listed) == listed[0].n_bytes + 9
    assert len(bench.paths) == 2
    # A save clears what a kill left, too.
    os.utime(fresh, (0, 0))
    bench.store.save(KEY, SAVED)
    assert not fresh.exists()


# ---- damage


def damaged(data: bytes, draw: st.DataObject) -> bytes:
    kind = draw.draw(st.sampled_from(["flip", "cut", "grow", "zero", "splice"]))
    at = draw.draw(st.integers(0, len(data) - 1))
    if kind == "flip":
        bit = 1 << draw.draw(st.integers(0, 7))
        return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "grow":
        return data + draw.draw(st.binary(min_size=1, max_size=50))
    n = draw.draw(st.integers(1, 60))
    if kind == "zero":
        return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]
    return data[:at] + draw.draw(st.binary(max_size=60)) + data[at + n :]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_is_never_loaded(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    bench = Bench(tmp_path_factory.mktemp("store"))
    bench.store.save(KEY, SAVED)
    (path,) = bench.paths
    whole = path.read_bytes()
    broken = damaged(whole, data)
    path.write_bytes(broken)
    match = bench.store.find(KEY, (*TOKENS, 1), PLAIN)
    loaded = bench.store.load(KEY, match) if match is not None else None
    if broken == whole:
        assert same(loaded, SAVED)
        return
    assert loaded is None
    # Told once; what was ours is gone, and what never was is left.
    assert len(bench.problems) == 1
    assert path.exists() == ("ignored" in bench.problems[0])


@pytest.mark.parametrize("put", ["link", "folder", "fifo", "empty"])
def test_what_is_no_file_of_ours_is_not_opened(bench: Bench, tmp_path: Path, put: str) -> None:
    bench.store.save(KEY, SAVED)
    (path,) = bench.paths
    os.rename(path, tmp_path / "elsewhere")
    makers: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "empty": path.touch,
    }
    makers[put]()
    assert bench.store.find(KEY, (*TOKENS, 1), PLAIN) is None
    bench.store.list()


def test_an_error_while_reading_is_no_damage(bench: Bench, monkeypatch) -> None:
    bench.store.save(KEY, SAVED, owner="me")

    def fail(_file: object, _n: int) -> memoryview:
        raise OSError(5, "the disk is ill")

    monkeypatch.setattr(state_store, "_read_all", fail)
    assert bench.store.load_owned(KEY, "me") is None
    assert len(bench.paths) == 1


# ---- kills and company

WRITER = """
    import sys
    from pathlib import Path
    from llmrun.engine.state_store import PrefixKey, StateStore
    from llmrun.engine.types import SavedPrefix

    store = StateStore(Path(sys.argv[1]), 1 << 30, print)
    n = 0
    print("ready", flush=True)
    while True:
        n += 1
        state = bytes([n % 251]) * 3_000_000
        store.save(PrefixKey("m", "e", "t"), SavedPrefix((n % 251,) * 64, state), owner="me")
"""


def test_a_kill_in_the_middle_leaves_all_or_the_one_before(bench: Bench) -> None:
    """SIGKILL in the middle of a write, twelve times; what is loaded is always whole."""
    rng = random.Random(5)
    key = PrefixKey("m", "e", "t")
    n_unfinished = 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(bench.store.folder)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.random() * 0.03)
        while not any(f"-{process.pid}-" in path.name for path in bench.paths):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        n_unfinished += sum(path.name.startswith("unfinished") for path in bench.paths)
        loaded = bench.store.load_owned(key, "me")
        if loaded is not None:
            assert bytes(loaded.state) == bytes([loaded.tokens[0]]) * 3_000_000
    assert bench.problems == []
    assert loaded is not None
    assert n_unfinished > 0  # some kills did hit a write
    bench.store.save(KEY, SAVED)
    assert len(bench.paths) == 2  # what the killed ones left is gone


def test_many_at_once(bench: Bench) -> None:
    """Readers, writers and evictions of several threads and a process: only whole files."""
    bench.store.max_bytes = 20_000_000
    ended = threading.Event()
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while not ended.is_set():
            owner = rng.choice("abcdefghi")
            if rng.random() < 0.5:
                state = owner.encode() * rng.randrange(1_000_000, 3_000_000)
                bench.store.save(KEY, SavedPrefix((len(state),), state), owner=owner)
            else:
                loaded = bench.store.load_owned(KEY, owner)
                if loaded is not None and bytes(loaded.state) != owner.encode() * loaded.tokens[0]:
                    wrong.append(owner)
            if rng.random() < 0.1:
                bench.store.forget(owner)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    ended.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and bench.problems == []
    assert not [path for path in bench.paths if path.name.startswith("unfinished")]


# ---- which model


def test_files_are_told_apart(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "model.gguf"
    link.symlink_to(blob)
    assert identify_files([link]) == "ab" * 32
    local = tmp_path / "local.gguf"
    local.write_bytes(b"weights")
    before = identify_files([local])
    assert before == identify_files([local]) != identify_files([link])
    assert identify_files([local, link]) != identify_files([link, local])
    os.utime(local, (1, 1))
    assert identify_files([local]) != before

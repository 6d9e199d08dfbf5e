"""The store over a cache that real downloads filled: list, verify, remove, prune."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun.hub import usage
from llmrun.hub.locks import hold
from llmrun.hub.store import Store
from llmrun.hub.types import StoredModel
from tests.fakes.hub_session import HubSession, hub_session
from tests.fakes.progress import RecordingProgress

BYTES = {n: random.Random(n).randbytes(100_000 + n) for n in range(6)}
REPOS = {
    "org/a-GGUF": {
        "a-Q4_0.gguf": BYTES[0],
        "a-Q8_0-00001-of-00002.gguf": BYTES[1],
        "a-Q8_0-00002-of-00002.gguf": BYTES[2],
        "mmproj-a-F16.gguf": BYTES[3],
        "README.md": b"hi",
    },
    "org/plain": {"model.safetensors": BYTES[4]},
    "org/odd": {"weights.gguf": BYTES[5]},
}


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubSession]:
    with hub_session(monkeypatch, tmp_path, REPOS) as opened:
        yield opened


@pytest.fixture
def store(session: HubSession, tmp_path: Path) -> Store:
    return Store(session.cache, tmp_path / "data", tmp_path / "state")


def by_reference(store: Store) -> dict[str, StoredModel]:
    models = store.models()
    found = {model.reference: model for model in models}
    assert len(found) == len(models)
    return found


def disk_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def interrupt(session: HubSession, repo: str, name: str, n_bytes: int = 30_000) -> None:
    cancel = threading.Event()

    class Watch(RecordingProgress):
        def advance(self, path: str, n: int) -> None:
            super().advance(path, n)
            if self.n_bytes[path] >= n_bytes:
                cancel.set()

    session.progress = Watch()
    session.server.chunk_bytes, session.server.delay_s = 4096, 0.005
    with pytest.raises(KeyboardInterrupt):
        session.pull(session.file_set(repo, name), cancel=cancel)
    session.progress, session.server.delay_s = RecordingProgress(), 0.0


def test_each_quant_is_a_model_with_its_shards_and_siblings(
    session: HubSession, store: Store
) -> None:
    assert store.models() == ()
    for repo in REPOS:
        session.pull(repo)
    models = by_reference(store)
    assert set(models) == {"org/a-GGUF:Q4_0", "org/a-GGUF:Q8_0", "org/odd:weights.gguf"}
    q8 = models["org/a-GGUF:Q8_0"]
    assert [file.path for file in q8.files] == [
        "a-Q8_0-00001-of-00002.gguf",
        "a-Q8_0-00002-of-00002.gguf",
        "mmproj-a-F16.gguf",
    ]
    assert q8.n_bytes == len(BYTES[1]) + len(BYTES[2])
    assert (q8.state, q8.origin, q8.quant) == ("complete", "hub-cache", "Q8_0")
    assert q8.commit == session.server.repos["org/a-GGUF"].main
    assert q8.files[0].local_path.read_bytes() == BYTES[1]
    assert models["org/odd:weights.gguf"].quant is None


def test_the_newest_commit_of_a_quant_is_shown(session: HubSession, store: Store) -> None:
    session.pull("org/a-GGUF")
    repo = session.server.repos["org/a-GGUF"]
    old = repo.main
    repo.move({"a-Q4_0.gguf": BYTES[5]})
    session.pull("org/a-GGUF")
    models = by_reference(store)
    assert models["org/a-GGUF:Q4_0"].commit == repo.main
    assert models["org/a-GGUF:Q8_0"].commit == old


def test_a_missing_shard_is_partial_and_a_broken_link_damaged(
    session: HubSession, store: Store
) -> None:
    paths = session.pull("org/a-GGUF")
    by_name = {path.name: path for path in paths}
    by_name["a-Q8_0-00002-of-00002.gguf"].unlink()
    by_name["a-Q4_0.gguf"].resolve().unlink()
    models = by_reference(store)
    assert models["org/a-GGUF:Q8_0"].state == "partial"
    assert models["org/a-GGUF:Q4_0"].state == "damaged"
    (result, *_) = store.verify(models["org/a-GGUF:Q4_0"])
    assert (result.ok, result.actual) == (False, None)


def test_an_unfinished_download_is_shown_with_its_bytes(session: HubSession, store: Store) -> None:
    interrupt(session, "org/a-GGUF", "a-Q4_0.gguf")
    (model,) = store.models()
    assert (model.reference, model.state, model.quant) == ("org/a-GGUF:Q4_0", "partial", "Q4_0")
    assert 30_000 <= model.n_bytes < len(BYTES[0])
    assert model.files[0].path == "a-Q4_0.gguf"


def test_another_programs_leftover_is_shown_and_pruned(session: HubSession, store: Store) -> None:
    blobs = session.paths("org/z").root / "blobs"
    blobs.mkdir(parents=True)
    (blobs / ("f" * 64 + ".12ab34cd.incomplete")).write_bytes(b"x" * 5000)
    (model,) = store.models()
    assert (model.reference, model.state, model.n_bytes) == ("org/z", "partial", 5000)
    (orphan,) = store.orphans()
    assert (orphan.kind, orphan.n_bytes) == ("partial", 4096 if orphan.n_bytes == 4096 else 5000)
    assert store.prune(store.orphans()) == orphan.n_bytes
    assert not blobs.parent.exists()


def test_find_takes_what_people_type(session: HubSession, store: Store) -> None:
    session.pull("org/a-GGUF")
    assert [m.reference for m in store.find("ORG/a-gguf:q4_0")] == ["org/a-GGUF:Q4_0"]
    assert len(store.find("org/a-GGUF")) == 2
    assert [m.quant for m in store.find("org/a-GGUF:a-Q4_0.gguf")] == ["Q4_0"]
    path = store.find("org/a-GGUF:Q4_0")[0].files[0].local_path
    assert [m.quant for m in store.find(str(path))] == ["Q4_0"]
    assert store.find("org/a-GGUF:Q2_K") == ()


def test_verify_finds_one_flipped_bit(session: HubSession, store: Store) -> None:
    session.pull("org/a-GGUF")
    model = by_reference(store)["org/a-GGUF:Q8_0"]
    seen: list[int] = []
    session.server.requests.clear()
    results = store.verify(model, seen.append)
    assert [result.ok for result in results] == [True, True, True]
    assert sum(seen) == sum(file.n_bytes for file in model.files)
    blob = model.files[1].local_path.resolve()
    data = bytearray(blob.read_bytes())
    data[77] ^= 1
    blob.write_bytes(data)
    results = store.verify(model)
    assert [result.ok for result in results] == [True, False, True]
    assert results[1].expected == hashlib.sha256(BYTES[2]).hexdigest()
    assert results[1].actual == hashlib.sha256(data).hexdigest()
    assert session.server.requests == []


def test_one_quant_is_removed_and_the_other_stays(session: HubSession, store: Store) -> None:
    session.pull("org/a-GGUF")
    session.pull("org/odd")
    before = disk_bytes(session.cache)
    freed = store.remove(store.find("org/a-GGUF:Q8_0"))
    assert freed == len(BYTES[1]) + len(BYTES[2])
    assert disk_bytes(session.cache) == before - freed
    assert set(by_reference(store)) == {"org/a-GGUF:Q4_0", "org/odd:weights.gguf"}
    (left,) = store.find("org/a-GGUF:Q4_0")
    assert [result.ok for result in store.verify(left)] == [True, True]
    assert [file.path for file in left.files][1:] == ["mmproj-a-F16.gguf"]


def test_the_last_quant_takes_its_siblings_along(session: HubSession, store: Store) -> None:
    wanted = session.file_set("org/a-GGUF", "a-Q4_0.gguf", "mmproj-a-F16.gguf")
    session.pull(wanted)
    freed = store.remove(store.models())
    assert freed == len(BYTES[0]) + len(BYTES[3])
    assert store.models() == ()
    assert not session.paths("org/a-GGUF").root.exists()


def test_a_removed_quant_goes_from_all_snapshots(session: HubSession, store: Store) -> None:
    session.pull(session.file_set("org/odd", "weights.gguf"))
    repo = session.server.repos["org/odd"]
    repo.move({"weights.gguf": BYTES[4]})
    session.pull("org/odd")
    assert store.remove(store.find("org/odd")) == len(BYTES[4]) + len(BYTES[5])
    assert store.models() == ()


def test_a_damaged_model_can_be_removed(session: HubSession, store: Store) -> None:
    paths = session.pull("org/a-GGUF")
    next(p for p in paths if p.name == "a-Q4_0.gguf").resolve().unlink()
    store.remove(store.find("org/a-GGUF:Q4_0"))
    assert set(by_reference(store)) == {"org/a-GGUF:Q8_0"}
    from huggingface_hub import scan_cache_dir

    assert not scan_cache_dir(session.cache).warnings


def test_a_partial_can_be_removed_but_not_while_it_is_downloaded(
    session: HubSession, store: Store
) -> None:
    interrupt(session, "org/a-GGUF", "a-Q4_0.gguf")
    etag = hashlib.sha256(BYTES[0]).hexdigest()
    with hold(session.paths("org/a-GGUF").lock(etag), 1) as held:
        assert held
        store.remove(store.models())
        assert store.orphans() == ()
        assert len(store.models()) == 1
    assert store.remove(store.models()) > 0
    assert store.models() == ()
    assert not session.paths("org/a-GGUF").root.exists()


def test_removing_keeps_an_unfinished_download_of_the_same_repository(
    session: HubSession, store: Store
) -> None:
    session.pull(session.file_set("org/a-GGUF", "a-Q4_0.gguf"))
    interrupt(session, "org/a-GGUF", "a-Q8_0-00001-of-00002.gguf")
    store.remove(m for m in store.models() if m.state == "complete")
    assert [(m.reference, m.state) for m in store.models()] == [("org/a-GGUF:Q8_0", "partial")]
    assert session.pull("org/a-GGUF")


def test_prune_takes_partials_and_unreferenced_blobs_only(
    session: HubSession, store: Store
) -> None:
    session.pull("org/odd")
    assert store.orphans() == ()
    interrupt(session, "org/a-GGUF", "a-Q4_0.gguf")
    loose = session.paths("org/odd").blob("c" * 64)
    loose.write_bytes(b"y" * 8192)
    os.utime(loose, (time.time() - 500, time.time() - 500))
    orphans = store.orphans()
    assert sorted(o.kind for o in orphans) == ["blob", "partial", "record"]
    (blob,) = [o for o in orphans if o.kind == "blob"]
    assert (blob.path, blob.n_bytes, blob.repo) == (loose, 8192, "org/odd")
    assert 490 < blob.age_s < 600
    assert store.prune(orphans) == sum(o.n_bytes for o in orphans)
    assert store.orphans() == ()
    assert set(by_reference(store)) == {"org/odd:weights.gguf"}
    assert all(result.ok for result in store.verify(store.models()[0]))


def test_a_blob_that_came_into_use_is_not_pruned(session: HubSession, store: Store) -> None:
    (path,) = session.pull("org/odd")
    link = path.readlink()
    path.unlink()
    orphans = store.orphans()
    assert [o.kind for o in orphans] == ["blob"]
    path.symlink_to(link)
    assert store.prune(orphans) == 0
    assert path.read_bytes() == BYTES[5]


def test_last_used_is_kept_and_shared(session: HubSession, store: Store, tmp_path: Path) -> None:
    session.pull("org/a-GGUF")
    assert store.last_used() is None
    store.record_use("org/a-GGUF:Q4_0")
    other = Store(session.cache, tmp_path / "data", tmp_path / "state")
    other.record_use(store.find("org/a-GGUF:Q8_0")[0].files[0].local_path)
    models = by_reference(store)
    times = [models[f"org/a-GGUF:{quant}"].last_used for quant in ("Q4_0", "Q8_0")]
    assert all(moment and abs(moment - time.time()) < 600 for moment in times)
    assert store.last_used() == str(models["org/a-GGUF:Q8_0"].files[0].local_path)


def test_a_damaged_record_of_uses_is_survived(tmp_path: Path) -> None:
    log = usage.UsageLog(tmp_path)
    log.record("a", 5.0)
    with (tmp_path / "usage.jsonl").open("ab") as out:
        out.write(b'{"model": "b"}\n[1]\n\xff\xfe{"model": "c", "us')
    log.record("d", 7.0)
    assert log.load() == {"a": 5.0, "d": 7.0}


def test_the_record_of_uses_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_BYTES", 500)
    log = usage.UsageLog(tmp_path)
    for n in range(200):
        log.record(f"model-{n % 3}", float(n))
    assert log.load() == {"model-0": 198.0, "model-1": 199.0, "model-2": 197.0}
    assert (tmp_path / "usage.jsonl").stat().st_size < 700


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, not a folder")
    usage.UsageLog(tmp_path / "state").record("a")


def test_packaged_models_are_listed_verified_and_removed(store: Store, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(BYTES[0]).hexdigest()
    file = tmp_path / "data" / "models" / "tiny" / sha256 / "Tiny.Q4_1.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(BYTES[0])
    (model,) = store.models()
    assert (model.reference, model.origin, model.quant) == ("tiny", "bundled", "Q4_1")
    assert [result.ok for result in store.verify(model)] == [True]
    assert store.find("TINY") == (model,)
    assert store.remove([model]) == len(BYTES[0])
    assert store.models() == ()
    assert not file.parent.parent.exists()


def test_folders_that_are_no_repositories_are_left_alone(session: HubSession, store: Store) -> None:
    for name in ("models--", "models--a--b--c--d", "datasets--x--y", "models--a b--c"):
        (session.cache / name / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (session.cache / "models--org--file").write_text("not a folder")
    assert store.models() == ()
    assert store.orphans() == ()
    shutil.rmtree(session.cache)
    assert store.models() == ()

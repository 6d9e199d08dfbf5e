"""Files in the store that nothing refers to: unfinished downloads and blobs without a snapshot."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmrun.hub import layout
from llmrun.hub.layout import PARTS_SUFFIX, RepoPaths
from llmrun.hub.locks import hold, is_held


@dataclass(frozen=True, slots=True)
class Orphan:
    """Something that may be deleted. `n_bytes` is the disk space it takes, `age_s` the seconds
    since it was last written, `repo` whose it is (a packaged model's name for those)."""

    path: Path
    n_bytes: int
    kind: Literal["partial", "record", "blob"]
    age_s: float
    repo: str


def find_orphans(cache_dir: Path, data_dir: Path, *, now: float | None = None) -> list[Orphan]:
    """What `prune` may delete, largest first. What a live process downloads now is left out."""
    moment = time.time() if now is None else now
    found = [*_in_cache(cache_dir, moment), *_in_data(data_dir, moment)]
    return sorted(found, key=lambda orphan: (-orphan.n_bytes, str(orphan.path)))


def delete_orphans(orphans: Iterable[Orphan], cache_dir: Path) -> int:
    """Delete what is still an orphan, each under its download lock; the bytes freed."""
    freed = 0
    touched: set[Path] = set()
    for orphan in orphans:
        if orphan.path.is_dir():
            with hold(orphan.path.with_name("fetch.lock"), 0.1) as held:
                if held:
                    shutil.rmtree(orphan.path)
                    freed += orphan.n_bytes
            continue
        paths = RepoPaths(cache_dir, orphan.repo)
        with hold(paths.lock(_etag_of(orphan.path)), 0.1) as held:
            in_use = orphan.kind == "blob" and orphan.path.name in _referenced(paths)
            if held and not in_use and orphan.path.exists():
                orphan.path.unlink()
                freed += orphan.n_bytes
                touched.add(paths.root)
    for root in touched:
        for folder in (root / "blobs", root):
            try:
                folder.rmdir()
            except OSError:
                break
    return freed


def _in_cache(cache_dir: Path, now: float) -> Iterator[Orphan]:
    for root in sorted(cache_dir.glob("models--*")):
        repo = layout.repo_of_folder(root.name)
        if repo is None or not _is_repo(repo):
            continue
        paths = RepoPaths(cache_dir, repo)
        referenced = _referenced(paths)
        for path in sorted((root / "blobs").glob("*")):
            # A link leads into a store that repositories share: only the library may delete there.
            if path.is_symlink() or not path.is_file() or path.name in referenced:
                continue
            kind: Literal["partial", "record", "blob"] = "blob"
            if path.name.endswith(".incomplete"):
                is_record = path.name.endswith(PARTS_SUFFIX) or ".parts-new." in path.name
                kind = "record" if is_record else "partial"
            if not is_held(paths.lock(_etag_of(path))):
                yield _orphan(path, kind, now, repo)


def _in_data(data_dir: Path, now: float) -> Iterator[Orphan]:
    for path in sorted((data_dir / "models").glob("*/fetch.incomplete")):
        if not is_held(path.with_name("fetch.lock")):
            n_bytes = sum(_disk_bytes(file) for file in path.rglob("*") if file.is_file())
            age = max(0.0, now - path.stat().st_mtime)
            yield Orphan(path, n_bytes, "partial", age, path.parent.name)


def _orphan(
    path: Path, kind: Literal["partial", "record", "blob"], now: float, repo: str
) -> Orphan:
    try:
        age = max(0.0, now - path.stat().st_mtime)
    except OSError:
        age = 0.0
    return Orphan(path, _disk_bytes(path), kind, age, repo)


def _referenced(paths: RepoPaths) -> set[str]:
    """Names of the blobs that some snapshot links to."""
    links = (path for path in layout.walk_files(paths.root / "snapshots") if path.is_symlink())
    return {path.readlink().name for path in links}


def _etag_of(path: Path) -> str:
    return path.name.partition(".")[0]


def _disk_bytes(path: Path) -> int:
    """Space on disk: a partial file has holes, so its size says too much."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_size if os.name == "nt" else min(status.st_size, status.st_blocks * 512)


def _is_repo(repo: str) -> bool:
    try:
        layout.repo_folder(repo)
    except ValueError:
        return False
    return True

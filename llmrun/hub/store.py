"""The models on this machine: those in the shared hub cache and those that came with a package.

Reading the store imports no huggingface_hub; deleting goes through it, because only it keeps the
references of blobs that repositories share.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmrun.gguf.naming import quant_of, role_of, shard_of
from llmrun.hub import layout
from llmrun.hub.housekeeping import Orphan, delete_orphans, find_orphans
from llmrun.hub.layout import PARTIAL_SUFFIX, PARTS_SUFFIX, RepoPaths
from llmrun.hub.locks import hold
from llmrun.hub.parts import load_done, read_target
from llmrun.hub.types import StoredFile, StoredModel
from llmrun.hub.usage import UsageLog

READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """One file rehashed. `expected` is None where the store kept no hash (then `ok` is None);
    `actual` is None when the file is not there or cannot be read."""

    file: StoredFile
    expected: str | None
    actual: str | None
    ok: bool | None


class Store:
    """The shared hub cache in `cache_dir`, packaged models below `data_dir`/models, and the record
    of last uses in `state_dir`. None of them needs to exist."""

    def __init__(self, cache_dir: Path, data_dir: Path, state_dir: Path) -> None:
        self._cache, self._data = cache_dir, data_dir
        self._usage = UsageLog(state_dir)

    def models(self) -> tuple[StoredModel, ...]:
        """Every model, one for each quant of each repository, by reference.

        A quant that lies in several snapshots is shown from the newest. The first of `files` are
        the model's own (all shards, in order); projectors and drafters of its snapshot follow.
        `n_bytes` sums the model's own. A set with missing shards is `partial`.
        """
        used = self._usage.load()
        found: list[StoredModel] = []
        for repo in self._repos():
            found += self._repo_models(repo, used)
            found += self._partial_models(repo)
        found += self._bundled_models(used)
        return tuple(sorted(found, key=lambda model: (model.reference.lower(), model.state)))

    def find(self, reference: str) -> tuple[StoredModel, ...]:
        """The models that `reference` means: a full reference, a repository, a packaged model's
        name, or a file's path. The case of the quant does not matter. Empty when none."""
        wanted = reference.lower()
        models = self.models()
        exact = tuple(m for m in models if m.reference.lower() == wanted)
        if exact:
            return exact
        return tuple(
            model
            for model in models
            if model.repo.lower() == wanted
            or any(
                wanted in (f"{model.repo}:{file.path}".lower(), str(file.local_path).lower())
                for file in model.files
            )
        )

    def record_use(self, model: str | Path) -> None:
        """Note that `model` (a reference as `models` gives it, or a file's path) is used now."""
        self._usage.record(str(model))

    def last_used(self) -> str | None:
        """What `record_use` was last called with; None before the first time."""
        used = self._usage.load()
        return max(used, key=lambda model: used[model]) if used else None

    def remove(self, models: Iterable[StoredModel]) -> int:
        """Delete `models` and return the bytes freed.

        A quant goes from all snapshots of its repository; projectors and drafters go with the last
        model that has use for them. Blobs that another snapshot needs stay.
        """
        freed = 0
        chosen = tuple(models)
        for model in chosen:
            if model.origin == "bundled":
                for folder in {file.local_path.parent for file in model.files}:
                    shutil.rmtree(folder)
                    _remove_if_empty(folder.parent)
                freed += model.n_bytes
            elif model.commit is None:
                freed += self._remove_partial(model)
        for repo in sorted({m.repo for m in chosen if m.origin == "hub-cache" and m.commit}):
            going = [m for m in chosen if m.repo == repo and m.commit and m.origin == "hub-cache"]
            freed += self._remove_files(repo, going)
        return freed

    def verify(
        self, model: StoredModel, on_bytes: Callable[[int], None] = lambda n_bytes: None
    ) -> tuple[VerifyResult, ...]:
        """Rehash every file of `model`, offline; `on_bytes(n)` is told of progress."""
        return tuple(_verify_file(file, on_bytes) for file in model.files)

    def orphans(self) -> tuple[Orphan, ...]:
        """Unfinished downloads and blobs that no snapshot refers to, largest first."""
        return tuple(find_orphans(self._cache, self._data))

    def prune(self, orphans: Iterable[Orphan]) -> int:
        """Delete `orphans`, but for what has come into use since; the bytes freed."""
        return delete_orphans(orphans, self._cache)

    def _repos(self) -> Iterator[str]:
        try:
            folders = sorted(self._cache.iterdir())
        except OSError:
            return
        for folder in folders:
            repo = layout.repo_of_folder(folder.name)
            if repo is not None and folder.is_dir():
                try:
                    layout.repo_folder(repo)
                except ValueError:
                    continue
                yield repo

    def _repo_models(self, repo: str, used: dict[str, float]) -> list[StoredModel]:
        found: dict[tuple[str | None, str], StoredModel] = {}
        for commit, _ in layout.snapshots(repo, cache=self._cache):
            files = layout.snapshot_files(repo, commit, cache=self._cache)
            ggufs = [file for file in files if file.path.lower().endswith(".gguf")]
            groups = group_models(ggufs)
            siblings = [f for f in ggufs if role_of(f.path) in ("projector", "drafter")]
            quants = [quant_of(own[0].path) for own in groups.values()]
            for stem, own in groups.items():
                quant = quant_of(own[0].path)
                if (quant, stem) in found:
                    continue
                tag = quant if quant and quants.count(quant) == 1 else own[0].path
                reference = f"{repo}:{tag}"
                rest = tuple(f for f in siblings if f not in own)
                found[quant, stem] = StoredModel(
                    reference=reference,
                    repo=repo,
                    commit=commit,
                    quant=quant,
                    files=(*own, *rest),
                    n_bytes=sum(file.n_bytes for file in own),
                    last_used=_last_used(used, reference, own),
                    state=_state_of(own),
                    origin="hub-cache",
                )
        return list(found.values())

    def _partial_models(self, repo: str) -> list[StoredModel]:
        """Unfinished downloads, ours and those of other programs, one for each quant."""
        blobs = RepoPaths(self._cache, repo).root / "blobs"
        found: dict[str, list[StoredFile]] = {}
        try:
            partials = sorted(blobs.glob("*.incomplete"))
        except OSError:
            return []
        for partial in partials:
            if partial.name.endswith(PARTS_SUFFIX) or ".parts-new." in partial.name:
                continue
            etag = partial.name.partition(".")[0]
            path, n_bytes = partial.name, _size(partial)
            if partial.name.endswith(PARTIAL_SUFFIX):
                record = partial.with_name(etag + PARTS_SUFFIX)
                target = read_target(record)
                path, size = target or (path, 0)
                n_bytes = sum(end - start for start, end in load_done(record, partial, size))
            sha256 = etag if layout.SHA256.fullmatch(etag) else None
            tag = quant_of(path) or (path if path != partial.name else "")
            found.setdefault(tag, []).append(StoredFile(path, partial, n_bytes, sha256))
        return [
            StoredModel(
                reference=f"{repo}:{tag}" if tag else repo,
                repo=repo,
                commit=None,
                quant=quant_of(files[0].path),
                files=tuple(files),
                n_bytes=sum(file.n_bytes for file in files),
                last_used=None,
                state="partial",
                origin="hub-cache",
            )
            for tag, files in found.items()
        ]

    def _bundled_models(self, used: dict[str, float]) -> list[StoredModel]:
        found = []
        for path in sorted((self._data / "models").glob("*/*/*.gguf")):
            sha256, name = path.parent.name, path.parent.parent.name
            if not layout.SHA256.fullmatch(sha256):
                continue
            file = StoredFile(path.name, path, _size(path), sha256)
            found.append(
                StoredModel(
                    reference=name,
                    repo=name,
                    commit=None,
                    quant=quant_of(path.name),
                    files=(file,),
                    n_bytes=file.n_bytes,
                    last_used=_last_used(used, name, [file]),
                    state="complete",
                    origin="bundled",
                )
            )
        return found

    def _remove_partial(self, model: StoredModel) -> int:
        freed = 0
        for file in model.files:
            etag = file.local_path.name.partition(".")[0]
            lock = RepoPaths(self._cache, model.repo).lock(etag)
            with hold(lock, 0.1) as held:
                if held:
                    freed += file.n_bytes
                    file.local_path.unlink(missing_ok=True)
                    file.local_path.with_name(etag + PARTS_SUFFIX).unlink(missing_ok=True)
        root = RepoPaths(self._cache, model.repo).root
        _remove_if_empty(root / "blobs")
        _remove_if_empty(root)
        return freed

    def _remove_files(self, repo: str, going: list[StoredModel]) -> int:
        paths = {f.path for m in going for f in _own_files(m)}
        staying = [
            model for model in self._repo_models(repo, {}) if model.files[0].path not in paths
        ]
        if not staying:
            paths |= {file.path for model in going for file in model.files}
        _drop_broken(RepoPaths(self._cache, repo), paths)
        return _delete_through_library(self._cache, repo, paths)


def group_models(files: Iterable[StoredFile]) -> dict[str, list[StoredFile]]:
    """The GGUF files of one snapshot as models: path without shard number -> its files, in order.

    Projectors and the like are left out; drafters count where there is nothing else.
    """
    listed = list(files)
    for role in ("model", "drafter"):
        groups: dict[str, list[StoredFile]] = {}
        for file in sorted(listed, key=lambda file: file.path):
            if role_of(file.path) == role:
                shard = shard_of(file.path)
                groups.setdefault(shard.prefix if shard else file.path, []).append(file)
        if groups:
            return groups
    return {}


def _own_files(model: StoredModel) -> tuple[StoredFile, ...]:
    """The shards of `model` without its siblings."""
    first = shard_of(model.files[0].path)
    if first is None:
        return model.files[:1]
    shards = [(file, shard_of(file.path)) for file in model.files]
    return tuple(file for file, shard in shards if shard and shard.prefix == first.prefix)


def _state_of(own: list[StoredFile]) -> Literal["complete", "partial", "damaged"]:
    if not all(file.local_path.exists() for file in own):
        return "damaged"
    shard = shard_of(own[0].path)
    return "partial" if shard is not None and len(own) < shard.count else "complete"


def _last_used(used: dict[str, float], reference: str, own: list[StoredFile]) -> float | None:
    times = [used[key] for key in (reference, str(own[0].local_path)) if key in used]
    return max(times, default=None)


def _verify_file(file: StoredFile, on_bytes: Callable[[int], None]) -> VerifyResult:
    digest = hashlib.sha256()
    try:
        with file.local_path.open("rb", buffering=0) as data:
            while block := data.read(READ_BYTES):
                digest.update(block)
                on_bytes(len(block))
    except OSError:
        return VerifyResult(file, file.sha256, None, False)
    actual = digest.hexdigest()
    return VerifyResult(
        file, file.sha256, actual, None if file.sha256 is None else actual == file.sha256
    )


def _drop_broken(paths: RepoPaths, wanted: set[str]) -> None:
    """Unlink links of `wanted` that lead nowhere and refs to no snapshot: the library hides
    repositories that have either, and could delete nothing in them."""
    for snapshot in (paths.root / "snapshots").glob("*"):
        for link in layout.walk_files(snapshot):
            if link.relative_to(snapshot).as_posix() in wanted and not link.exists():
                link.unlink(missing_ok=True)
    refs = paths.root / "refs"
    for ref in [path for path in refs.rglob("*") if path.is_file()]:
        commit = ref.read_text("ascii", "replace").strip()
        if not layout.COMMIT.fullmatch(commit) or not paths.snapshot(commit).is_dir():
            ref.unlink(missing_ok=True)


def _delete_through_library(cache: Path, repo: str, paths: set[str]) -> int:
    from huggingface_hub import scan_cache_dir

    freed = 0
    found = [r for r in scan_cache_dir(cache).repos if r.repo_id == repo and r.repo_type == "model"]
    if found:
        files = [
            file
            for revision in found[0].revisions
            for file in revision.files
            if file.file_path.relative_to(revision.snapshot_path).as_posix() in paths
        ]
        strategy = scan_cache_dir(cache).delete_files(*files)
        freed = strategy.expected_freed_size
        strategy.execute()
    scan = scan_cache_dir(cache)
    found = [r for r in scan.repos if r.repo_id == repo and r.repo_type == "model"]
    empty = [rev.commit_hash for r in found for rev in r.revisions if not rev.files]
    # A whole repository goes with its last revision: not while a download into it is unfinished.
    blobs = RepoPaths(cache, repo).root / "blobs"
    everything = found and len(empty) == len(found[0].revisions)
    if empty and not (everything and any(blobs.glob("*.incomplete"))):
        scan.delete_revisions(*empty).execute()
    return freed


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return

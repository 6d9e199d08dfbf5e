"""The published layout of the shared hub cache, read without importing huggingface_hub.

    <cache>/models--org--name/blobs/<etag>  snapshots/<commit>/<path> -> blobs  refs/<branch>
    <cache>/.locks/models--org--name/<etag>.lock

The etag of a large file is its sha256. `blobs/<etag>` may itself be a link into a store that
several repositories share. Names ending in `.incomplete` are unfinished downloads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmrun.hub.types import StoredFile

SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
PARTIAL_SUFFIX = ".llmrun.incomplete"
PARTS_SUFFIX = ".llmrun.parts.incomplete"

_REPO_PART = re.compile(r"[A-Za-z0-9._-]+")


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The shared cache folder, found by the same variables in the same order as the hub's tools."""
    env = os.environ if environ is None else environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(name):
            return _expanded(env[name], env)
    if env.get("HF_HOME"):
        return _expanded(env["HF_HOME"], env) / "hub"
    base = env.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(base, env) / "huggingface" / "hub"


def _expanded(text: str, env: Mapping[str, str]) -> Path:
    home = env.get("HOME")
    if home and (text == "~" or text.startswith("~/")):
        return Path(home + text[1:])
    return Path(text).expanduser()


def repo_folder(repo: str) -> str:
    """`org/name` -> `models--org--name`. Raises ValueError when `repo` is not a repository id."""
    parts = repo.split("/")
    if len(parts) > 2 or any(
        not _REPO_PART.fullmatch(part) or part.strip(".") == "" or "--" in part for part in parts
    ):
        raise ValueError(f"not a repository id: {repo!r}")
    return "--".join(("models", *parts))


def repo_of_folder(folder: str) -> str | None:
    """`models--org--name` -> `org/name`; None for every other folder name."""
    kind, _, rest = folder.partition("--")
    return rest.replace("--", "/") if kind == "models" and rest else None


@dataclass(frozen=True, slots=True)
class RepoPaths:
    """Where the parts of one repository lie. Builds names only, touches nothing."""

    cache: Path
    repo: str

    @property
    def root(self) -> Path:
        return self.cache / repo_folder(self.repo)

    def blob(self, etag: str) -> Path:
        return self.root / "blobs" / etag

    def partial(self, etag: str) -> Path:
        return self.root / "blobs" / (etag + PARTIAL_SUFFIX)

    def parts(self, etag: str) -> Path:
        return self.root / "blobs" / (etag + PARTS_SUFFIX)

    def lock(self, etag: str) -> Path:
        return self.cache / ".locks" / repo_folder(self.repo) / f"{etag}.lock"

    def snapshot(self, commit: str) -> Path:
        return self.root / "snapshots" / commit

    def pointer(self, commit: str, path: str) -> Path:
        return self.snapshot(commit).joinpath(*path.split("/"))

    def ref(self, revision: str) -> Path:
        return self.root.joinpath("refs", *revision.split("/"))


def read_ref(repo: str, revision: str = "main", *, cache: Path | None = None) -> str | None:
    """The commit that `revision` had when it was last recorded; None when there is no record."""
    try:
        text = RepoPaths(cache or cache_dir(), repo).ref(revision).read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    return text if COMMIT.fullmatch(text) else None


def snapshots(repo: str, *, cache: Path | None = None) -> tuple[tuple[str, Path], ...]:
    """All snapshots of `repo` that hold a file, best first: refs/main's, then newest by mtime."""
    paths = RepoPaths(cache or cache_dir(), repo)
    main = read_ref(repo, cache=paths.cache)
    try:
        folders = list((paths.root / "snapshots").iterdir())
    except OSError:
        return ()
    used = [
        folder
        for folder in folders
        if COMMIT.fullmatch(folder.name) and folder.is_dir() and any(walk_files(folder))
    ]
    used.sort(key=lambda folder: (folder.name == main, folder.stat().st_mtime), reverse=True)
    return tuple((folder.name, folder) for folder in used)


def snapshot_files(repo: str, commit: str, *, cache: Path | None = None) -> tuple[StoredFile, ...]:
    """The files of one snapshot by name. A broken link has `n_bytes` 0.

    `sha256` is what the file should have by its blob's name, None for small git files and where
    the file was stored without links.
    """
    root = RepoPaths(cache or cache_dir(), repo).snapshot(commit)
    files = [stored_file(root, path) for path in walk_files(root)]
    return tuple(sorted(files, key=lambda file: file.path))


def stored_file(snapshot: Path, path: Path) -> StoredFile:
    """Describe `path` below `snapshot`; the name of the first link's target is its hash."""
    sha256: str | None = None
    if path.is_symlink():
        name = path.readlink().name
        sha256 = name if SHA256.fullmatch(name) else None
    try:
        n_bytes = path.stat().st_size
    except OSError:
        n_bytes = 0
    return StoredFile(path.relative_to(snapshot).as_posix(), path, n_bytes, sha256)


def walk_files(folder: Path) -> Iterator[Path]:
    """Every file and link below `folder`, links to folders not followed."""
    for parent, folders, names in os.walk(folder):
        for name in names:
            yield Path(parent) / name
        for name in folders:
            path = Path(parent) / name
            if path.is_symlink():
                yield path

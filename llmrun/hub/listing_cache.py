"""What the hub listed of a repository, kept for the time when it cannot be asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmrun.errors import DamagedFileError, HubUnreachableError
from llmrun.gguf.naming import safe_repo_path
from llmrun.hub import layout
from llmrun.hub.cache_folder import CacheFolder
from llmrun.hub.types import RemoteFile, RepoListing
from llmrun.text import escape_line

MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class KeptListing:
    """`stored_at` is seconds since the epoch."""

    listing: RepoListing
    stored_at: float


class ListingCache:
    """Listings in `folder` by repository and revision. See `CacheFolder` for what may be lost."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._entries = CacheFolder(folder, max_bytes)

    def load(self, repo: str, revision: str = "main") -> KeptListing | None:
        data = self._entries.read(_name(repo, revision))
        if data is None:
            return None
        try:
            kept = _from_json(json.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError, DamagedFileError):
            return None
        asked = (kept.listing.repo, kept.listing.revision)
        return kept if asked == (repo, revision) else None

    def store(self, listing: RepoListing, now: float) -> None:
        text = json.dumps(_as_json(listing, now), separators=(",", ":"))
        self._entries.write(_name(listing.repo, listing.revision), text.encode())


class Listing(Protocol):
    """The hub, as far as it is asked here."""

    def listing(self, repo: str, revision: str = "main") -> RepoListing: ...


class RememberingLister:
    """`Hub.listing` that remembers its answers, and gives the last one when the hub cannot be
    asked. `age_s` is how old the answer of the last call is; 0 when it is the hub's own."""

    def __init__(self, hub: Listing, cache: ListingCache, now: Callable[[], float]) -> None:
        self._hub, self._cache, self._now = hub, cache, now
        self.age_s = 0.0

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        """Raises as `Hub.listing` does, HubUnreachableError only where nothing is remembered."""
        try:
            found = self._hub.listing(repo, revision)
        except HubUnreachableError:
            kept = self._cache.load(repo, revision)
            if kept is None:
                raise
            self.age_s = max(1.0, self._now() - kept.stored_at)
            return kept.listing
        self.age_s = 0.0
        self._cache.store(found, self._now())
        return found


def _name(repo: str, revision: str) -> str:
    return hashlib.sha256(f"{repo}@{revision}".encode()).hexdigest()


def _as_json(listing: RepoListing, now: float) -> dict[str, Any]:
    return {
        "stored_at": now,
        "repo": listing.repo,
        "revision": listing.revision,
        "commit": listing.commit,
        "gated": listing.gated,
        "licence": listing.licence,
        "files": [[file.path, file.n_bytes, file.sha256] for file in listing.files],
    }


def _from_json(found: Any) -> KeptListing:
    """Raises ValueError, KeyError, TypeError or DamagedFileError for what `_as_json` never made."""
    licence, commit, stored_at = found["licence"], found["commit"], found["stored_at"]
    if not layout.COMMIT.fullmatch(commit) or not isinstance(stored_at, int | float):
        raise ValueError("no commit or no time")
    files = []
    for path, n_bytes, sha256 in found["files"]:
        if type(n_bytes) is not int or n_bytes < 0:
            raise ValueError("no size")
        if sha256 is not None and not layout.SHA256.fullmatch(sha256):
            raise ValueError("no hash")
        files.append(RemoteFile(safe_repo_path(path), n_bytes, sha256))
    return KeptListing(
        RepoListing(
            repo=str(found["repo"]),
            revision=str(found["revision"]),
            commit=commit,
            files=tuple(files),
            gated=bool(found["gated"]),
            licence=escape_line(licence) if isinstance(licence, str) else None,
        ),
        float(stored_at),
    )

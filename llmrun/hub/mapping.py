"""Exceptions of huggingface_hub and its HTTP client turned into llmrun's error tree.

All text that comes from the hub is escaped here, so it may be printed as it is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llmrun.errors import (
    AuthError,
    DiskFullError,
    HubUnreachableError,
    LlmrunError,
    NotFoundError,
    UsageError,
)
from llmrun.text import escape_line, format_bytes

DISK_FULL_ERRNOS = frozenset(
    code for code in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG) if code is not None
)
MAX_WAIT_S = 300.0
MAX_TOTAL_WAIT_S = 360.0
_RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_DISK_WORKS = "models on disk still work"


@contextmanager
def map_errors(repo: str) -> Iterator[None]:
    """Run hub calls about `repo` (may be empty) and raise only LlmrunError for what they raise."""
    from huggingface_hub import errors as hf
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        yield
    except hf.GatedRepoError as error:
        raise gated_error(repo) from error
    except hf.RepositoryNotFoundError as error:
        raise repo_not_found(repo) from error
    except hf.RevisionNotFoundError as error:
        raise NotFoundError(
            f"{repo} has no such branch, tag or commit",
            hint=f"llmrun show {escape_line(repo)}",
        ) from error
    except hf.RemoteEntryNotFoundError as error:
        raise NotFoundError(
            f"a file is not in {repo} (any more)", hint=f"llmrun show {escape_line(repo)}"
        ) from error
    except hf.HfHubHTTPError as error:
        raise status_error(repo, error.response.status_code, error.response.headers) from error
    except hf.LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, hf.HfHubHTTPError):
            raise status_error(repo, cause.response.status_code, cause.response.headers) from error
        if isinstance(cause, hf.OfflineModeIsEnabled):
            raise offline_error(repo) from error
        raise unreachable(why=_reason(cause or error)) from error
    except hf.OfflineModeIsEnabled as error:
        raise offline_error(repo) from error
    except hf.HFValidationError as error:
        raise UsageError(
            f"not a repository name: {escape_line(repo)!r}",
            hint="write it as OWNER/NAME, as on the hub's page",
        ) from error
    except (hf.FileMetadataError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(why=_reason(error)) from error


def gated_error(repo: str) -> AuthError:
    """The licence of `repo` has to be accepted by a logged-in person first."""
    return AuthError(
        f"{repo} asks you to accept its licence first",
        why=f"open {page_url(repo)} in a browser, log in and accept, then log in here",
        hint="hf auth login",
    )


def repo_not_found(repo: str) -> NotFoundError:
    """The hub answers the same for a repository that does not exist and one you may not see."""
    return NotFoundError(
        f"the hub has no repository {escape_line(repo)}, or it is private",
        why="a private one is seen only after `hf auth login` with a token that may read it",
        hint=f"llmrun search {escape_line(repo.rpartition('/')[2])}",
    )


def status_error(repo: str, status: int, headers: Mapping[str, str]) -> LlmrunError:
    """The error for an HTTP status of the hub that is final."""
    about = f" for {repo}" if repo else ""
    if status == 401:
        return AuthError(
            f"the hub refuses the login{about}",
            why="the token is wrong or has expired, or the repository is gated or private",
            hint="hf auth login",
        )
    if status == 403:
        return AuthError(
            f"the token has no right to read{about}",
            why=f"it needs read access, and the licence on {page_url(repo)} accepted"
            if repo
            else None,
            hint="hf auth login",
        )
    if status in (404, 410):
        return repo_not_found(repo)
    if status == 429:
        wait = told_wait_s(429, headers)
        told = f"; it says to come back in {wait:.0f} s" if wait is not None else ""
        return HubUnreachableError(
            "the hub limits how often you may ask",
            why=f"too many requests from this address{told}; the limit is higher after a login",
            hint="hf auth login",
        )
    return HubUnreachableError(
        f"the hub answers with error {status}{about}",
        why=("the trouble is on the hub's side: try again later; " if status >= 500 else "")
        + _DISK_WORKS,
        hint="llmrun list",
    )


def offline_error(repo: str) -> HubUnreachableError:
    """Offline mode forbids to ask the hub."""
    by_env = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return HubUnreachableError(
        f"offline mode: the hub is not asked{f' about {repo}' if repo else ''}",
        why=("HF_HUB_OFFLINE is set; " if by_env else "--offline is in force; ") + _DISK_WORKS,
        hint="llmrun list",
    )


def unreachable(why: str | None) -> HubUnreachableError:
    """The hub did not answer at all."""
    return HubUnreachableError(
        f"the hub cannot be reached ({endpoint_host()})",
        why=f"{why or 'no answer'}; check the connection, the proxy and HF_ENDPOINT; {_DISK_WORKS}",
        hint="llmrun list",
    )


def endpoint() -> str:
    """The hub's origin (`HF_ENDPOINT`) without a trailing slash."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT).rstrip("/")


def endpoint_host() -> str:
    """Host and port of the hub, safe to print."""
    scheme, found, rest = endpoint().partition("://")
    return escape_line((rest if found else scheme).rpartition("@")[2])


def page_url(repo: str) -> str:
    """The page of `repo` for a person to open."""
    return f"{escape_line(endpoint())}/{escape_line(repo)}"


def told_wait_s(status: int, headers: Mapping[str, str]) -> float | None:
    """How long the hub says to wait: `RateLimit` (429, nothing left), else `Retry-After`."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    if status == 429:
        info = parse_ratelimit_headers(headers)
        if info is not None and info.remaining == 0:
            return float(info.reset_in_seconds)
    text = str(headers.get("retry-after", "")).strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 8 else None


def retry_wait_s(status: int, headers: Mapping[str, str], attempt: int) -> float | None:
    """Seconds to wait before asking again (`attempt` counts from 0), None when it is no use."""
    if status not in _RETRY_STATUS:
        return None
    told = told_wait_s(status, headers)
    if told is not None:
        return told if told <= MAX_WAIT_S else None
    return min(0.5 * 2.0**attempt, 8.0)


def disk_error(error: OSError, folder: Path, n_bytes_missing: int | None = None) -> LlmrunError:
    """A failed write to `folder` as an error for people."""
    if error.errno in DISK_FULL_ERRNOS:
        needed = f"{format_bytes(n_bytes_missing)} are still to come; " if n_bytes_missing else ""
        return DiskFullError(
            f"cannot write to {folder}: {error.strerror}",
            why=f"{needed}what was downloaded is kept: make room, and run the same command again",
            hint="llmrun prune",
        )
    return LlmrunError(
        f"cannot write to {folder}: {error.strerror or type(error).__name__}",
        hint="check the folder's permissions, or set HF_HOME to another folder",
    )


def _reason(error: BaseException) -> str:
    text = escape_line(str(error)).strip() or type(error).__name__
    return text[:300]

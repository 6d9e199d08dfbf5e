"""One range of one remote file over HTTP: the request, and what the reply has to look like.

Shared by the download and by the reader of remote headers. The resolve URL is asked anew each
time, because the signed links that it redirects to expire.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrun import __version__

if TYPE_CHECKING:
    from llmrun.hub.client import Hub

_CONTENT_RANGE = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)")


class WrongReplyError(Exception):
    """The reply's ranges or sizes contradict the request."""


class RangeNotSatisfiableError(Exception):
    """Status 416: the server holds fewer bytes than were asked for."""


@dataclass(frozen=True, slots=True)
class RangeReply:
    """A reply that holds [start, end); `start` is 0 instead of as asked when Range was ignored."""

    start: int
    end: int
    response: Any

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes from the socket, at most about 64 KiB at a time."""
        yield from self.response.iter_raw()


@contextmanager
def open_range(
    hub: Hub, repo: str, commit: str, path: str, start: int, end: int, size: int, timeout_s: float
) -> Iterator[RangeReply]:
    """Ask for bytes [start, end) of `path` at `commit`, a file of `size` bytes.

    `timeout_s` bounds connecting and each wait for data. Raises HfHubHTTPError for error statuses,
    httpx.TransportError for a broken transport, RangeNotSatisfiableError and WrongReplyError.
    """
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers, httpx  # type: ignore[attr-defined]

    hub.configure()
    headers = build_hf_headers(library_name="llmrun", library_version=__version__)
    headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
    url = hf_hub_url(repo, path, revision=commit)
    timeout = httpx.Timeout(timeout_s)
    with get_session().stream(
        "GET", url, headers=headers, timeout=timeout, follow_redirects=True
    ) as response:
        if response.status_code == 416:
            raise RangeNotSatisfiableError
        hf_raise_for_status(response)
        first, last = _body_range(response, start, end, size)
        yield RangeReply(first, last, response)


def _body_range(response: Any, start: int, end: int, size: int) -> tuple[int, int]:
    if response.status_code == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
        if match is None:
            raise WrongReplyError("a partial reply without a valid Content-Range")
        first, last, total = match.groups()
        if int(first) != start or int(last) < start or (total != "*" and int(total) != size):
            raise WrongReplyError(
                f"asked for bytes {start}-{end - 1}/{size}, got {first}-{last}/{total}"
            )
        return start, int(last) + 1
    if response.status_code == 200:
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) != size:
            raise WrongReplyError(f"the file has {length} bytes on the server, {size} in its list")
        return 0, size
    raise WrongReplyError(f"unexpected status {response.status_code}")

"""Rate limits, and what the hub's errors become."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from llmrun.errors import AuthError, DiskFullError, HubUnreachableError, LlmrunError, NotFoundError
from llmrun.hub.mapping import (
    disk_error,
    offline_error,
    retry_wait_s,
    status_error,
    told_wait_s,
    unreachable,
)


@pytest.mark.parametrize(
    ("status", "headers", "attempt", "wait"),
    [
        (429, {"ratelimit": '"resolvers";r=0;t=42'}, 0, 42.0),
        (429, {"ratelimit": '"resolvers";r=5;t=42', "retry-after": "7"}, 0, 7.0),
        (429, {"retry-after": "7"}, 3, 7.0),
        (429, {}, 0, 0.5),
        (429, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1, 1.0),
        (429, {"ratelimit": '"resolvers";r=0;t=90000'}, 0, None),
        (503, {"retry-after": "3"}, 0, 3.0),
        (500, {}, 2, 2.0),
        (502, {}, 20, 8.0),
        (404, {}, 0, None),
        (401, {"retry-after": "3"}, 0, None),
        (403, {}, 0, None),
    ],
)
def test_the_wait_is_as_told_and_bounded(
    status: int, headers: dict[str, str], attempt: int, wait: float | None
) -> None:
    assert retry_wait_s(status, headers, attempt) == wait


@pytest.mark.parametrize("text", ["", "-1", "1e9", "9" * 40, "٣", "nan"])
def test_nonsense_in_retry_after_is_ignored(text: str) -> None:
    assert told_wait_s(503, {"retry-after": text}) is None


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, AuthError, 4),
        (403, AuthError, 4),
        (404, NotFoundError, 3),
        (429, HubUnreachableError, 6),
        (500, HubUnreachableError, 6),
        (418, HubUnreachableError, 6),
    ],
)
def test_statuses_have_exit_codes(status: int, kind: type[LlmrunError], code: int) -> None:
    error = status_error("org/x", status, {})
    assert type(error) is kind and error.exit_code == code and error.hint


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_exit_5(code: int) -> None:
    error = disk_error(OSError(code, "as asked"), Path("/data"), 5_000_000)
    assert isinstance(error, DiskFullError) and error.exit_code == 5
    assert "5.00 MB" in str(error.why)


def test_other_disk_trouble_is_exit_1() -> None:
    error = disk_error(PermissionError(errno.EACCES, "Permission denied"), Path("/data"))
    assert type(error) is LlmrunError and "/data" in error.message


def test_offline_says_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert str(offline_error("").why).startswith("HF_HUB_OFFLINE is set")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert str(offline_error("").why).startswith("--offline is in force")


def test_what_to_try_is_a_command_that_can_be_pasted() -> None:
    statuses = (401, 403, 404, 429, 500, 418)
    errors = [status_error("org/x", status, {}) for status in statuses]
    full = disk_error(OSError(errno.ENOSPC, "full"), Path("/data"), 5)
    for error in (*errors, offline_error("org/x"), unreachable(None), full):
        assert re.fullmatch(r"(llmrun|hf) [a-z]+( \S+)?", error.hint or ""), error.hint


def test_an_endpoint_without_a_scheme_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    assert "(nonsense)" in unreachable("no name").message

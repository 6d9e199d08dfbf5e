"""What clients hear of the program's errors."""

from __future__ import annotations

import pytest

from llmrun.errors import (
    AuthError,
    ContextOverflowError,
    EngineError,
    HubUnreachableError,
    LlmrunError,
    NotFoundError,
    TemplateError,
    UsageError,
    WillNotFitError,
)
from llmrun.server.failures import api_error_of, as_api_error
from llmrun.server.types import ApiError


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (UsageError("bad"), 400, False),
        (TemplateError("bad"), 400, False),
        (ContextOverflowError(9, 5), 400, False),
        (AuthError("bad"), 403, False),
        (NotFoundError("bad"), 404, False),
        (EngineError("bad"), 500, False),
        (LlmrunError("bad"), 500, False),
        (HubUnreachableError("bad"), 503, True),
        (WillNotFitError("bad"), 503, False),
    ],
)
def test_each_error_has_its_status(error: LlmrunError, status: int, retry: bool) -> None:
    found = as_api_error(error)
    assert (found.status, found.retry_after_s is not None) == (status, retry)


def test_the_words_say_why() -> None:
    assert api_error_of(UsageError("bad", why="too long")).message == "bad: too long"
    found = api_error_of(NotFoundError("no such model", hint="llmrun pull x"))
    assert found.message == "no such model (llmrun pull x)"
    assert (found.code, found.param) == ("model_not_found", "model")


def test_an_overflow_says_by_how_much() -> None:
    found = api_error_of(ContextOverflowError(9, 5))
    assert found.fields == {"n_prompt_tokens": 9, "n_ctx": 5}
    assert found.kind == "context_overflow"


def test_a_defect_says_nothing() -> None:
    found = as_api_error(KeyError("a secret prompt"))
    assert found.status == 500 and "secret" not in found.message
    assert as_api_error(MemoryError()).retry_after_s is not None
    own = ApiError("rate_limit", "wait")
    assert as_api_error(own) is own

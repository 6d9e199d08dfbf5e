"""What a client hears of an error of the program's own."""

from __future__ import annotations

from llmrun.errors import (
    AuthError,
    ContextOverflowError,
    EngineStoppedError,
    HubUnreachableError,
    LlmrunError,
    NotFoundError,
    TemplateError,
    UsageError,
    WillNotFitError,
)
from llmrun.server.types import ApiError, ErrorKind

_HUB_RETRY_S = 30.0
_MEMORY_RETRY_S = 10.0
_RELOAD_RETRY_S = 1.0


def api_error_of(error: LlmrunError) -> ApiError:
    """The error with its kind, code and words. Where asking again is of no use, it has no
    `retry_after_s`."""
    words = error.message if not error.why else f"{error.message}: {error.why}"
    if isinstance(error, ContextOverflowError):
        return ApiError(
            "context_overflow",
            f"request ({error.n_prompt} tokens) exceeds the available context size "
            f"({error.n_ctx} tokens)",
            code=error.code,
            fields={"n_prompt_tokens": error.n_prompt, "n_ctx": error.n_ctx},
        )
    if isinstance(error, NotFoundError):
        hint = f" ({error.hint})" if error.hint else ""
        return ApiError("not_found", words + hint, param="model", code="model_not_found")
    if isinstance(error, EngineStoppedError):
        # Why it did is the log's: the next request loads the model again.
        return ApiError(
            "unavailable",
            "the model's engine has stopped and is started again: try again",
            code=error.code,
            retry_after_s=_RELOAD_RETRY_S,
        )
    if isinstance(error, HubUnreachableError):
        return ApiError("unavailable", words, code=error.code, retry_after_s=_HUB_RETRY_S)
    kinds: tuple[tuple[type[LlmrunError], ErrorKind], ...] = (
        (UsageError, "invalid_request"),
        (TemplateError, "invalid_request"),
        (AuthError, "permission"),
        (WillNotFitError, "unavailable"),
    )
    kind: ErrorKind = next((kind for of, kind in kinds if isinstance(error, of)), "internal")
    return ApiError(kind, words, code=error.code)


def as_api_error(error: BaseException) -> ApiError:
    """Any error in a client's words. What is no LlmrunError is a defect, of which it hears
    nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LlmrunError):
        return api_error_of(error)
    if isinstance(error, MemoryError):
        return ApiError("unavailable", "out of memory", retry_after_s=_MEMORY_RETRY_S)
    return ApiError("internal", "something went wrong inside the server")

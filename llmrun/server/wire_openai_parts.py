"""Members that chat and legacy completions of the OpenAI dialect share: usage, timings, errors,
the head of an answer. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmrun import __version__
from llmrun.engine.types import TokenLogprob
from llmrun.server.types import (
    AnswerContext,
    ApiError,
    ErrorAnswer,
    ErrorKind,
    Finished,
    Reason,
)
from llmrun.server.wire_json import quote

EVENT_STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

# What the dialect writes for a token that cannot be.
_LEAST_LOGPROB = -9999.0

# The types of llama.cpp's server, which are the original's where that has one.
_TYPES: dict[ErrorKind, str] = {
    "invalid_request": "invalid_request_error",
    "context_overflow": "exceed_context_size_error",
    "authentication": "authentication_error",
    "permission": "permission_error",
    "not_found": "not_found_error",
    "method_not_allowed": "invalid_request_error",
    "timeout": "timeout_error",
    "too_large": "invalid_request_error",
    "unsupported_media_type": "invalid_request_error",
    "rate_limit": "rate_limit_error",
    "internal": "server_error",
    "not_supported": "not_supported_error",
    "unavailable": "unavailable_error",
}
_CODES: dict[ErrorKind, str] = {
    "context_overflow": "context_length_exceeded",
    "authentication": "invalid_api_key",
    "rate_limit": "rate_limit_exceeded",
}


def error_body(error: ApiError) -> dict[str, object]:
    """`{"error": {message, type, param, code}}`, with the error's own fields beside these."""
    inner: dict[str, object] = dict(error.fields)
    inner |= {
        "message": error.message,
        "type": _TYPES[error.kind],
        "param": error.param,
        "code": error.code or _CODES.get(error.kind),
    }
    return {"error": inner}


def encode_error(error: ApiError) -> ErrorAnswer:
    """The answer that the dialect's clients understand.

    They try again on 408, 409, 429 and from 500 on: after `Retry-After` where it is there, and
    not at all where `x-should-retry` is false, which it is for what will not pass by itself.
    """
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.status >= 500:
        headers["x-should-retry"] = "false"
    if error.kind == "authentication":
        headers["WWW-Authenticate"] = "Bearer"
    return ErrorAnswer(error.status, error_body(error), headers)


def head_of(context: AnswerContext, prefix: str, kind: str) -> dict[str, object]:
    """The members with which every answer and chunk begins."""
    return {
        "id": f"{prefix}-{context.id}",
        "object": kind,
        "created": int(context.created_s),
        "model": context.model,
        "system_fingerprint": f"llmrun-{__version__}",
    }


def encode_usage(finishes: Sequence[Finished], n: int = 1) -> dict[str, object]:
    """The `usage` of one answer. Each `n` replies in turn share a prompt, which counts once; its
    cached tokens are those that were there before the first of them."""
    prompts = [finishes[at : at + n] for at in range(0, len(finishes), n)]
    n_prompt = sum(group[0].usage.n_prompt for group in prompts)
    n_cached = sum(min(finish.usage.n_cached for finish in group) for group in prompts)
    n_completion = sum(finish.usage.n_completion for finish in finishes)
    usage: dict[str, object] = {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_completion,
        "total_tokens": n_prompt + n_completion,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }
    counts = [finish.n_thinking for finish in finishes if finish.n_thinking is not None]
    if counts:
        usage["completion_tokens_details"] = {"reasoning_tokens": sum(counts)}
    return usage


def encode_timings(finishes: Sequence[Finished], n: int = 1) -> dict[str, object]:
    """`timings` with the names of llama.cpp's server. Replies ran beside one another, so their
    tokens add up and the longest time counts; `prompt_n` are the tokens that were computed."""
    prompts = [finishes[at : at + n] for at in range(0, len(finishes), n)]
    n_cached = sum(min(finish.usage.n_cached for finish in group) for group in prompts)
    n_read = sum(group[0].usage.n_prompt for group in prompts) - n_cached
    n_predicted = sum(finish.usage.n_completion for finish in finishes)
    prompt_s = max((finish.prompt_s for finish in finishes), default=0.0)
    predicted_s = max((finish.decode_s for finish in finishes), default=0.0)
    timings: dict[str, object] = {"cache_n": n_cached}
    timings |= _rates("prompt", n_read, prompt_s)
    timings |= _rates("predicted", n_predicted, predicted_s)
    n_drafted = sum(finish.usage.n_drafted for finish in finishes)
    if n_drafted:
        n_accepted = sum(finish.usage.n_accepted for finish in finishes)
        timings |= {"draft_n": n_drafted, "draft_n_accepted": n_accepted}
    return timings


def _rates(name: str, n_tokens: int, seconds: float) -> dict[str, object]:
    return {
        f"{name}_n": n_tokens,
        f"{name}_ms": round(seconds * 1000, 3),
        f"{name}_per_token_ms": round(seconds * 1000 / n_tokens, 3) if n_tokens else 0.0,
        f"{name}_per_second": round(n_tokens / seconds, 3) if seconds > 0 else 0.0,
    }


def finite_logprob(logprob: float) -> float:
    """A log probability as JSON can say it."""
    return min(logprob, 0.0) if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB


def piece_text(piece: bytes) -> str:
    r"""A token's text; bytes that are a part of a character as `\xe2`."""
    return piece.decode("utf-8", "backslashreplace")


def encode_token_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
    """The `logprobs` of a chat choice."""
    return {
        "content": [
            {
                **_token(found.piece, found.logprob),
                "top_logprobs": [_token(piece, logprob) for _, piece, logprob in found.top],
            }
            for found in logprobs
        ],
        "refusal": None,
    }


def _token(piece: bytes, logprob: float) -> dict[str, object]:
    return {
        "token": piece_text(piece),
        "logprob": finite_logprob(logprob),
        "bytes": list(piece),
    }


def encode_reason(reason: Reason) -> str:
    """The `finish_reason`. A reply that was cut off is not whole, as one that grew too long."""
    return "length" if reason == "cancelled" else reason


def encode_event(value: object) -> bytes:
    """A server-sent event."""
    return f"data: {quote(value)}\n\n".encode()

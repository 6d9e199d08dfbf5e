"""Anthropic's messages API: what it is answered. Pure.

Requests are read in `wire_anthropic_request`. An answer's blocks are thinking, text and calls; text
behind a call gets a block of its own where it is streamed, and belongs to the one text where it is
not. White space alone makes no block beside a call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from llmrun.engine.types import Usage
from llmrun.server.sse import COMMENT, MEDIA_TYPE, encode_event
from llmrun.server.types import (
    AnswerContext,
    ApiError,
    CallArguments,
    CallStarted,
    ChatRequest,
    ErrorAnswer,
    ErrorKind,
    Finished,
    ModelCard,
    Reply,
    ReplyEvent,
    Started,
    TextPart,
    ThinkingPart,
)
from llmrun.server.wire_anthropic_request import parse_count_tokens, parse_messages
from llmrun.server.wire_anthropic_schema import SCHEMA_COUNT, SCHEMA_MESSAGES
from llmrun.server.wire_json import to_json

__all__ = [
    "SCHEMA_COUNT",
    "SCHEMA_MESSAGES",
    "MessageEncoder",
    "encode_count",
    "encode_error",
    "encode_message",
    "encode_model",
    "encode_models",
    "parse_count_tokens",
    "parse_messages",
]

SIGNATURE = "llmrun"
"""Thinking has to be signed: some clients give none back that is not. Nothing is checked by it."""

_ERROR_TYPES: Mapping[ErrorKind, str] = {
    "invalid_request": "invalid_request_error",
    "context_overflow": "invalid_request_error",
    "authentication": "authentication_error",
    "permission": "permission_error",
    "not_found": "not_found_error",
    "method_not_allowed": "invalid_request_error",
    "timeout": "timeout_error",
    "too_large": "request_too_large",
    "unsupported_media_type": "invalid_request_error",
    "rate_limit": "rate_limit_error",
    "internal": "api_error",
    "not_supported": "api_error",
    "unavailable": "api_error",
}


# ---- answers


def encode_message(
    context: AnswerContext, request: ChatRequest, replies: Sequence[Reply]
) -> dict[str, object]:
    """The body of a whole answer. The dialect knows one reply to a request: the first."""
    reply = replies[0]
    content: list[dict[str, object]] = []
    if reply.thinking:
        content.append({"type": "thinking", "thinking": reply.thinking, "signature": SIGNATURE})
    if reply.text.strip() or (reply.text and not reply.calls) or not (content or reply.calls):
        content.append({"type": "text", "text": reply.text})
    for call in reply.calls:
        block = {"type": "tool_use", "id": call.id or "", "name": call.name}
        content.append({**block, "input": dict(call.arguments)})
    return {
        **_message(context, content),
        **_end(request, reply.finish),
        "usage": _usage(reply.finish),
    }


def encode_count(n_tokens: int) -> dict[str, object]:
    """The body of an answer to count_tokens."""
    return {"input_tokens": n_tokens}


def encode_models(cards: Sequence[ModelCard]) -> dict[str, object]:
    """The body of the list of models: all of them on one page."""
    return {
        "data": [encode_model(card) for card in cards],
        "has_more": False,
        "first_id": cards[0].name if cards else None,
        "last_id": cards[-1].name if cards else None,
    }


def encode_model(card: ModelCard) -> dict[str, object]:
    """One model. When it was made is not known: the time is that of its file."""
    made = datetime.fromtimestamp(card.modified_s, UTC)
    return {
        "type": "model",
        "id": card.name,
        "display_name": card.name,
        "created_at": made.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": card.n_ctx or None,
        "max_tokens": card.n_ctx or None,
    }


def encode_error(error: ApiError) -> ErrorAnswer:
    """The dialect's error. Its client tries again after every 5xx, so what will not get better is
    marked as such; what will is 529."""
    headers: dict[str, str] = {}
    status, kind = error.status, _ERROR_TYPES[error.kind]
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        if error.kind == "unavailable":
            status, kind = 529, "overloaded_error"
    elif status >= 500:
        headers["x-should-retry"] = "false"
    body = {"type": "error", "error": {"type": kind, "message": _words(error)}}
    return ErrorAnswer(status, body, headers)


def _words(error: ApiError) -> str:
    n_prompt, n_ctx = error.fields.get("n_prompt_tokens"), error.fields.get("n_ctx")
    if error.kind == "context_overflow" and n_prompt is not None and n_ctx is not None:
        # The words by which clients know that the conversation is to be made shorter.
        return f"prompt is too long: {n_prompt} tokens > {n_ctx} maximum"
    if error.param is not None and error.param not in error.message:
        return f"{error.param}: {error.message}"
    return error.message


def _message(context: AnswerContext, content: Sequence[object]) -> dict[str, object]:
    return {
        "id": f"msg_{context.id}",
        "type": "message",
        "role": "assistant",
        "model": context.model,
        "content": list(content),
        "stop_reason": None,
        "stop_sequence": None,
    }


def _end(request: ChatRequest, finish: Finished) -> dict[str, object]:
    is_asked = finish.stop is not None and finish.stop in request.generation.stop
    reason = _stop_reason(request, finish)
    if reason == "end_turn" and is_asked:
        return {"stop_reason": "stop_sequence", "stop_sequence": finish.stop}
    return {"stop_reason": reason, "stop_sequence": None}


def _stop_reason(request: ChatRequest, finish: Finished) -> str:
    if finish.reason == "stop":
        return "end_turn"
    if finish.reason == "tool_calls":
        return "tool_use"
    n_max = request.generation.max_tokens
    if finish.reason == "length" and (n_max is None or finish.usage.n_completion < n_max):
        return "model_context_window_exceeded"
    # A cancelled answer is one cut short, too, and the dialect has no word for it.
    return "max_tokens"


def _usage(finish: Finished) -> dict[str, object]:
    """The tokens of prompt and answer: what came from the cache is not among `input_tokens`."""
    usage = finish.usage
    details: dict[str, object] = {}
    if finish.n_thinking is not None:
        details["output_tokens_details"] = {"thinking_tokens": finish.n_thinking}
    return {
        "input_tokens": usage.n_prompt - usage.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.n_cached,
        "output_tokens": usage.n_completion,
        **details,
    }


# ---- streamed answers


class MessageEncoder:
    """A streamed answer: message_start, the blocks one after another, message_delta, message_stop.

    What came from the cache is known at the end only: message_start counts the whole prompt as
    read, message_delta puts that right.
    """

    media_type = MEDIA_TYPE

    def __init__(self, context: AnswerContext, request: ChatRequest) -> None:
        self._context = context
        self._request = request
        self._is_started = False
        self._n_blocks = 0
        self._open: Literal["thinking", "text", "tool_use"] | None = None
        self._calls: dict[int, int] = {}
        self._held = ""
        self._delta = b""

    def feed(self, index: int, event: ReplyEvent) -> bytes:
        start = b"" if self._is_started else self._start(event)
        if isinstance(event, TextPart):
            return start + self._text(event.text)
        if isinstance(event, ThinkingPart):
            return start + self._thinking(event.text)
        if isinstance(event, CallStarted):
            return start + self._call(event)
        if isinstance(event, CallArguments):
            return start + self._arguments(event)
        if isinstance(event, Finished):
            return start + self._end(event)
        return start

    def finish(self) -> bytes:
        return encode_event("message_stop", {"type": "message_stop"})

    def fail(self, error: ApiError) -> bytes:
        return encode_event("error", encode_error(error).body)

    def keep_alive(self) -> bytes:
        # message_start has to be the first event.
        return encode_event("ping", {"type": "ping"}) if self._is_started else COMMENT

    def _start(self, event: ReplyEvent) -> bytes:
        self._is_started = True
        n_prompt = event.n_prompt if isinstance(event, Started) else 0
        usage = _usage(Finished("stop", Usage(n_prompt, 0, 0)))
        message = {**_message(self._context, ()), "usage": usage}
        return encode_event("message_start", {"type": "message_start", "message": message})

    def _text(self, text: str) -> bytes:
        if self._open == "text":
            return self._piece(text)
        self._held += text
        if not self._held or self._held.isspace():
            return b""
        text, self._held = self._held, ""
        return self._begin("text", {"type": "text", "text": ""}) + self._piece(text)

    def _thinking(self, text: str) -> bytes:
        if not text:
            return b""
        if self._open == "thinking":
            return self._piece(text)
        block = {"type": "thinking", "thinking": "", "signature": ""}
        return self._begin("thinking", block) + self._piece(text)

    def _call(self, event: CallStarted) -> bytes:
        self._held = ""
        self._calls[event.index] = self._n_blocks
        block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
        return self._begin("tool_use", block)

    def _arguments(self, event: CallArguments) -> bytes:
        block = self._calls.get(event.index)
        if block is None or not event.text:
            return b""
        return _delta_head(block, "input_json_delta", "partial_json") + _tail(event.text)

    def _end(self, event: Finished) -> bytes:
        parts = []
        if not self._calls and (self._held or self._n_blocks == 0):
            text, self._held = self._held, ""
            parts.append(self._begin("text", {"type": "text", "text": ""}))
            parts.append(self._piece(text) if text else b"")
        parts.append(self._stop())
        delta = _end(self._request, event)
        data = {"type": "message_delta", "delta": delta, "usage": _usage(event)}
        parts.append(encode_event("message_delta", data))
        return b"".join(parts)

    def _begin(
        self, kind: Literal["thinking", "text", "tool_use"], block: Mapping[str, object]
    ) -> bytes:
        """Close the block before and open one; its pieces come by `_piece`."""
        stop = self._stop()
        index, self._n_blocks, self._open = self._n_blocks, self._n_blocks + 1, kind
        if kind != "tool_use":
            field = "text" if kind == "text" else "thinking"
            self._delta = _delta_head(index, f"{field}_delta", field)
        data = {"type": "content_block_start", "index": index, "content_block": block}
        return stop + encode_event("content_block_start", data)

    def _piece(self, text: str) -> bytes:
        # This runs for every token: only the text itself is encoded.
        return self._delta + _tail(text) if text else b""

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        index, signature = self._n_blocks - 1, b""
        if self._open == "thinking":
            signature = _delta_head(index, "signature_delta", "signature") + _tail(SIGNATURE)
        self._open = None
        data = {"type": "content_block_stop", "index": index}
        return signature + encode_event("content_block_stop", data)


def _delta_head(index: int, kind: str, field: str) -> bytes:
    """A content_block_delta up to the JSON string that is its text."""
    return (
        "event: content_block_delta\n"
        f'data: {{"type":"content_block_delta","index":{index},'
        f'"delta":{{"type":"{kind}","{field}":'
    ).encode()


def _tail(text: str) -> bytes:
    return to_json(text) + b"}}\n\n"

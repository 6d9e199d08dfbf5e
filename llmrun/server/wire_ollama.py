"""Ollama's dialect: answers to `/api/chat` and `/api/generate`, and its errors.

A stream, which is what a client gets that does not ask for another form, is one JSON object a line.
The last has `done`, `done_reason` and the times in nanoseconds. Requests are read by
`wire_ollama_parse`, models and embeddings are in `wire_ollama_models`; their names are here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from llmrun.engine.types import TokenLogprob
from llmrun.server.reading import arguments_object
from llmrun.server.types import (
    AnswerContext,
    ApiError,
    CallArguments,
    CallStarted,
    ChatRequest,
    ErrorAnswer,
    Finished,
    Reply,
    ReplyEvent,
    TextPart,
    ThinkingPart,
)
from llmrun.server.wire_json import to_json
from llmrun.server.wire_ollama_models import (
    API_VERSION,
    SCHEMA_EMBED,
    SCHEMA_EMBEDDING,
    SCHEMA_SHOW,
    encode_embed,
    encode_embedding,
    encode_ps,
    encode_show,
    encode_tags,
    encode_version,
    parse_embed,
    parse_embedding,
    parse_show,
    timestamp,
)
from llmrun.server.wire_ollama_parse import (
    SCHEMA_CHAT,
    SCHEMA_GENERATE,
    Action,
    GenerateRequest,
    action_of,
    parse_chat,
    parse_generate,
    plain_name,
)

__all__ = [
    "API_VERSION",
    "SCHEMA_CHAT",
    "SCHEMA_EMBED",
    "SCHEMA_EMBEDDING",
    "SCHEMA_GENERATE",
    "SCHEMA_SHOW",
    "Action",
    "ChatEncoder",
    "GenerateEncoder",
    "GenerateRequest",
    "action_of",
    "encode_chat",
    "encode_embed",
    "encode_embedding",
    "encode_error",
    "encode_generate",
    "encode_idle_chat",
    "encode_idle_generate",
    "encode_ps",
    "encode_show",
    "encode_tags",
    "encode_version",
    "parse_chat",
    "parse_embed",
    "parse_embedding",
    "parse_generate",
    "parse_show",
    "plain_name",
]

_LOWEST_LOGPROB = -9999.0
"""For a token that the model held impossible: JSON has no infinity."""


# ---- whole answers


def encode_chat(
    context: AnswerContext, request: ChatRequest, replies: Sequence[Reply]
) -> dict[str, object]:
    """The one answer to `/api/chat` that is not streamed; this dialect has no more than one."""
    reply = replies[0]
    message: dict[str, object] = {"role": "assistant", "content": reply.text}
    if reply.thinking:
        message["thinking"] = reply.thinking
    if reply.calls:
        message["tool_calls"] = _calls(reply)
    body = {**_head(context), "message": message, **_end(reply.finish)}
    if request.generation.n_logprobs is not None:
        body["logprobs"] = [_logprob(each) for each in reply.logprobs]
    return body


def encode_generate(
    context: AnswerContext, request: GenerateRequest, replies: Sequence[Reply]
) -> dict[str, object]:
    """The one answer to `/api/generate` that is not streamed."""
    reply = replies[0]
    body = {**_head(context), "response": reply.text}
    if reply.thinking:
        body["thinking"] = reply.thinking
    body |= _end(reply.finish)
    if request.generation.n_logprobs is not None:
        body["logprobs"] = [_logprob(each) for each in reply.logprobs]
    return body


def encode_idle_chat(context: AnswerContext, action: Action) -> dict[str, object]:
    """The answer where `action_of` says `load` or `unload`, and that has been done: one object,
    also for a client that wants a stream."""
    message = {"role": "assistant", "content": ""}
    return {**_head(context), "message": message, "done": True, "done_reason": action}


def encode_idle_generate(context: AnswerContext, action: Action) -> dict[str, object]:
    """As `encode_idle_chat`, for `/api/generate`."""
    return {**_head(context), "response": "", "done": True, "done_reason": action}


def encode_error(error: ApiError) -> ErrorAnswer:
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return ErrorAnswer(error.status, {"error": error.message}, headers)


def _head(context: AnswerContext) -> dict[str, object]:
    return {"model": context.model, "created_at": timestamp(context.created_s)}


def _end(finish: Finished) -> dict[str, object]:
    return {
        "done": True,
        # There are but these two: calls end an answer as text does, and one that was cut short
        # is one that could have been longer.
        "done_reason": "stop" if finish.reason in {"stop", "tool_calls"} else "length",
        "total_duration": _ns(finish.total_s),
        "load_duration": _ns(finish.load_s),
        "prompt_eval_count": finish.usage.n_prompt,
        "prompt_eval_duration": _ns(finish.prompt_s),
        "eval_count": finish.usage.n_completion,
        "eval_duration": _ns(finish.decode_s),
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9) if math.isfinite(seconds) else 0


def _calls(reply: Reply) -> list[dict[str, object]]:
    texts = reply.arguments_texts
    has_texts = len(texts) == len(reply.calls)
    return [
        _call(i, call.id, call.name, arguments_object(texts[i]) if has_texts else call.arguments)
        for i, call in enumerate(reply.calls)
    ]


def _call(index: int, id: str | None, name: str, arguments: object) -> dict[str, object]:
    function = {"index": index, "name": name, "arguments": arguments}
    return {"id": id, "function": function} if id else {"function": function}


def _logprob(found: TokenLogprob) -> dict[str, object]:
    body = _token(found.piece, found.logprob)
    if found.top:
        body["top_logprobs"] = [_token(piece, logprob) for _, piece, logprob in found.top]
    return body


def _token(piece: bytes, logprob: float) -> dict[str, object]:
    return {
        "token": piece.decode("utf-8", "replace"),
        "logprob": logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB,
        "bytes": list(piece),
    }


# ---- streams


class _LineEncoder:
    """One streamed answer, an object a line. `before` and `after` stand around the content's JSON
    text in a line with nothing but content, which is what most lines are."""

    media_type: ClassVar[str] = "application/x-ndjson"

    def __init__(self, context: AnswerContext, before: bytes, after: bytes) -> None:
        self._context = context
        self._before = before
        self._after = after
        self._open_call: CallStarted | None = None
        self._arguments: list[str] = []

    def feed(self, index: int, event: ReplyEvent) -> bytes:
        """A call is told once it is whole: when the next part comes that is not its own."""
        if isinstance(event, TextPart):
            line = self._text(event) if event.text or event.logprobs else b""
            return self._end_call() + line if self._open_call else line
        if isinstance(event, CallArguments):
            if self._open_call:
                self._arguments.append(event.text)
            return b""
        if isinstance(event, ThinkingPart):
            if not event.text:
                return b""
            thinking = b'"","thinking":' + to_json(event.text)
            return self._end_call() + self._before + thinking + self._after + b',"done":false}\n'
        if isinstance(event, CallStarted):
            line = self._end_call()
            self._open_call = event
            return line
        if isinstance(event, Finished):
            return self._end_call() + self._last(event)
        return b""

    def finish(self) -> bytes:
        return b""

    def fail(self, error: ApiError) -> bytes:
        return to_json({"error": error.message}) + b"\n"

    def keep_alive(self) -> bytes:
        """White space before the next object; an empty line would not do, as clients read each
        line as JSON."""
        return b" "

    def _text(self, part: TextPart) -> bytes:
        line = self._before + to_json(part.text) + self._after
        if part.logprobs:
            line += b',"logprobs":' + to_json([_logprob(each) for each in part.logprobs])
        return line + b',"done":false}\n'

    def _end_call(self) -> bytes:
        call = self._open_call
        if call is None:
            return b""
        arguments = arguments_object("".join(self._arguments))
        self._open_call = None
        self._arguments.clear()
        calls = to_json([_call(call.index, call.id, call.name, arguments)])
        return self._before + b'"","tool_calls":' + calls + self._after + b',"done":false}\n'

    def _last(self, finish: Finished) -> bytes:
        # `_end` is an object of its own, so its opening bracket goes.
        return self._before + b'""' + self._after + b"," + to_json(_end(finish))[1:] + b"\n"


class ChatEncoder(_LineEncoder):
    """The streamed answer to `/api/chat`."""

    def __init__(self, context: AnswerContext, request: ChatRequest) -> None:
        head = to_json(_head(context))[:-1]
        super().__init__(context, head + b',"message":{"role":"assistant","content":', b"}")


class GenerateEncoder(_LineEncoder):
    """The streamed answer to `/api/generate`."""

    def __init__(self, context: AnswerContext, request: GenerateRequest) -> None:
        super().__init__(context, to_json(_head(context))[:-1] + b',"response":', b"")

"""OpenAI's Responses API: what it is answered. Pure.

Requests are read in `wire_responses_request`; errors are those of `wire_openai`. An answer's items
are reasoning, a message and function calls; text behind a call is a message of its own where it is
streamed, and belongs to the one message where it is not. White space alone makes no message beside
a call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from llmrun.engine.types import TokenLogprob
from llmrun.server.sse import COMMENT, MEDIA_TYPE, encode_event
from llmrun.server.types import (
    AnswerContext,
    ApiError,
    CallArguments,
    CallStarted,
    ChatRequest,
    Finished,
    Reply,
    ReplyEvent,
    TextPart,
    ThinkingPart,
)
from llmrun.server.wire_json import quote
from llmrun.server.wire_responses_request import parse_response
from llmrun.server.wire_responses_schema import SCHEMA_RESPONSE

__all__ = ["SCHEMA_RESPONSE", "ResponseEncoder", "encode_response", "parse_response"]

_Status = Literal["in_progress", "completed", "incomplete", "failed"]
_ItemKind = Literal["reasoning", "message", "function_call"]
# JSON has no infinity: what cannot be is as unlikely as the dialect can say.
_LEAST_LOGPROB = -9999.0


def encode_response(
    context: AnswerContext, request: ChatRequest, replies: Sequence[Reply]
) -> dict[str, object]:
    """The body of a whole answer. The dialect knows one reply to a request: the first."""
    reply = replies[0]
    status = _status_of(reply.finish)
    items: list[dict[str, object]] = []
    if reply.thinking:
        items.append(_reasoning(context, len(items), reply.thinking, "completed"))
    if reply.text.strip() or (reply.text and not reply.calls) or not (items or reply.calls):
        part = _output_text(reply.text, reply.logprobs)
        items.append(_message(context, len(items), [part], "completed"))
    for i, call in enumerate(reply.calls):
        given = reply.arguments_texts[i] if i < len(reply.arguments_texts) else ""
        arguments = given or json.dumps(dict(call.arguments), ensure_ascii=False)
        n = len(items)
        items.append(_call(context, n, call.id or "", call.name, arguments, "completed"))
    items[-1]["status"] = status
    return _body(context, request, status, items, reply.finish)


def _status_of(finish: Finished) -> Literal["completed", "incomplete"]:
    return "completed" if finish.reason in ("stop", "tool_calls") else "incomplete"


def _body(
    context: AnswerContext,
    request: ChatRequest,
    status: _Status,
    items: Sequence[Mapping[str, object]],
    finish: Finished | None = None,
) -> dict[str, object]:
    details = None
    if finish is not None and status == "incomplete":
        # The end of the context is one to the number of tokens, too; being cancelled is not.
        details = {"reason": "max_output_tokens" if finish.reason == "length" else None}
    is_done = finish is not None and status == "completed"
    return {
        "id": f"resp_{context.id}",
        "object": "response",
        "created_at": int(context.created_s),
        "completed_at": int(context.created_s + finish.total_s) if finish and is_done else None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": details,
        "model": context.model,
        "output": list(items),
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
        "usage": _usage(finish),
        **request.echo,
    }


def _usage(finish: Finished | None) -> dict[str, object] | None:
    """The tokens of prompt and answer."""
    if finish is None:
        return None
    usage = finish.usage
    return {
        "input_tokens": usage.n_prompt,
        "input_tokens_details": {"cached_tokens": usage.n_cached, "cache_write_tokens": 0},
        "output_tokens": usage.n_completion,
        "output_tokens_details": {"reasoning_tokens": finish.n_thinking or 0},
        "total_tokens": usage.n_prompt + usage.n_completion,
    }


def _reasoning(context: AnswerContext, n: int, text: str, status: _Status) -> dict[str, object]:
    return {
        "id": f"rs_{context.id}_{n}",
        "type": "reasoning",
        "status": status,
        "summary": [],
        "content": [_reasoning_text(text)] if text else [],
    }


def _reasoning_text(text: str) -> dict[str, object]:
    return {"type": "reasoning_text", "text": text}


def _message(
    context: AnswerContext, n: int, content: Sequence[object], status: _Status
) -> dict[str, object]:
    return {
        "id": f"msg_{context.id}_{n}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": list(content),
    }


def _output_text(text: str, logprobs: Sequence[TokenLogprob] = ()) -> dict[str, object]:
    found = [_logprob(entry) for entry in logprobs]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": found}


def _call(
    context: AnswerContext, n: int, call_id: str, name: str, arguments: str, status: _Status
) -> dict[str, object]:
    return {
        "id": f"fc_{context.id}_{n}",
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def _logprob(entry: TokenLogprob) -> dict[str, object]:
    top = [_chance(piece, logprob) for _, piece, logprob in entry.top]
    return {**_chance(entry.piece, entry.logprob), "top_logprobs": top}


def _chance(piece: bytes, logprob: float) -> dict[str, object]:
    return {
        "token": piece.decode("utf-8", "replace"),
        "bytes": list(piece),
        "logprob": max(logprob, _LEAST_LOGPROB),
    }


# ---- streamed answers


class ResponseEncoder:
    """A streamed answer: response.created, the items one after another, response.completed or
    response.incomplete with all of it. Events are numbered from 0."""

    media_type = MEDIA_TYPE

    def __init__(self, context: AnswerContext, request: ChatRequest) -> None:
        self._context = context
        self._request = request
        self._n_events = 0
        self._items: list[dict[str, object]] = []
        self._open: _OpenItem | None = None
        self._has_calls = False
        self._held: list[TextPart] = []
        self._finish: Finished | None = None

    def feed(self, index: int, event: ReplyEvent) -> bytes:
        start = b"" if self._n_events else self._start()
        if isinstance(event, TextPart):
            return start + self._text(event)
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
        if self._finish is None:
            return b""
        status = _status_of(self._finish)
        body = _body(self._context, self._request, status, self._items, self._finish)
        return self._event(f"response.{status}", {"response": body})

    def fail(self, error: ApiError) -> bytes:
        """response.failed for readers of events, and an error that the dialect's own client raises
        with these words: of the other event it would say only that no answer came."""
        failed = b""
        if self._n_events:
            body = _body(self._context, self._request, "failed", self._items)
            body["error"] = {"code": _error_code(error), "message": error.message}
            failed = self._event("response.failed", {"response": body})
        told = {"code": error.code or _error_code(error), "message": error.message}
        told_more = {**told, "param": error.param}
        nested = {**told_more, "type": _error_type(error)}
        return failed + self._event("error", {**told_more, "error": nested})

    def keep_alive(self) -> bytes:
        return COMMENT

    def _event(self, name: str, members: Mapping[str, object]) -> bytes:
        data = {"type": name, "sequence_number": self._n_events, **members}
        self._n_events += 1
        return encode_event(name, data)

    def _start(self) -> bytes:
        body = _body(self._context, self._request, "in_progress", ())
        created = self._event("response.created", {"response": body})
        return created + self._event("response.in_progress", {"response": body})

    def _text(self, part: TextPart) -> bytes:
        if self._open is not None and self._open.kind == "message":
            return self._text_piece(part)
        self._held.append(part)
        if all(not held.text or held.text.isspace() for held in self._held):
            return b""
        return self._begin_text()

    def _begin_text(self) -> bytes:
        """Open a message with all that was held back."""
        held, self._held = self._held, []
        parts = [self._begin("message")]
        parts += [self._text_piece(part) for part in held]
        return b"".join(parts)

    def _text_piece(self, part: TextPart) -> bytes:
        assert self._open is not None
        self._open.logprobs += part.logprobs
        if not part.text and not part.logprobs:
            return b""
        return self._piece(part.text, [_logprob(entry) for entry in part.logprobs])

    def _thinking(self, text: str) -> bytes:
        if not text:
            return b""
        start = b""
        if self._open is None or self._open.kind != "reasoning":
            start = self._begin("reasoning")
        return start + self._piece(text)

    def _call(self, event: CallStarted) -> bytes:
        self._held = []
        self._has_calls = True
        return self._begin("function_call", event)

    def _arguments(self, event: CallArguments) -> bytes:
        item = self._open
        if item is None or item.call is None or item.call.index != event.index or not event.text:
            return b""
        return self._piece(event.text)

    def _end(self, finish: Finished) -> bytes:
        self._finish = finish
        is_blank = not self._items and self._open is None
        text = b""
        if not self._has_calls and (is_blank or any(held.text for held in self._held)):
            text = self._begin_text()
        return text + self._close(_status_of(finish))

    def _begin(self, kind: _ItemKind, call: CallStarted | None = None) -> bytes:
        """Close the item before and open one."""
        closed = self._close("completed")
        n = len(self._items)
        item = _OpenItem(kind, n, call)
        self._open = item
        shown = item.show(self._context, "in_progress", is_begun=False)
        added = self._event("response.output_item.added", {"output_index": n, "item": shown})
        item.where = {"item_id": shown["id"], "output_index": n}
        part = item.part("")
        if part is None:
            item.delta_name = "response.function_call_arguments.delta"
            item.delta_head = quote(item.where)[1:-1]
            return closed + added
        item.where["content_index"] = 0
        item.delta_name = f"response.{part['type']}.delta"
        item.delta_head = quote(item.where)[1:-1]
        opened = self._event("response.content_part.added", {**item.where, "part": part})
        return closed + added + opened

    def _piece(self, text: str, logprobs: Sequence[object] = ()) -> bytes:
        # This runs for every token: only the text itself is encoded.
        item = self._open
        assert item is not None
        item.texts.append(text)
        n, self._n_events = self._n_events, self._n_events + 1
        more = f',"logprobs":{quote(list(logprobs))}' if item.kind == "message" else ""
        return (
            f"event: {item.delta_name}\n"
            f'data: {{"type":"{item.delta_name}","sequence_number":{n},{item.delta_head},'
            f'"delta":{quote(text)}{more}}}\n\n'
        ).encode()

    def _close(self, status: _Status) -> bytes:
        """Say that the open item is done."""
        item = self._open
        if item is None:
            return b""
        parts = []
        if item.call is not None and not item.texts:
            # No arguments are an object without members.
            parts.append(self._piece("{}"))
        self._open = None
        text = "".join(item.texts)
        part = item.part(text)
        shown = item.show(self._context, status, is_begun=True)
        self._items.append(shown)
        if item.call is not None:
            done = {**item.where, "name": item.call.name, "arguments": text}
            parts.append(self._event("response.function_call_arguments.done", done))
        if part is not None:
            done = {**item.where, "text": text}
            if item.kind == "message":
                done["logprobs"] = part["logprobs"]
            parts.append(self._event(f"response.{part['type']}.done", done))
            parts.append(self._event("response.content_part.done", {**item.where, "part": part}))
        shown_done = {"output_index": item.n, "item": shown}
        parts.append(self._event("response.output_item.done", shown_done))
        return b"".join(parts)


class _OpenItem:
    """The item that is being streamed, and what of it was."""

    def __init__(self, kind: _ItemKind, n: int, call: CallStarted | None) -> None:
        self.kind = kind
        self.n = n
        self.call = call
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.where: dict[str, object] = {}
        self.delta_name = ""
        self.delta_head = ""

    def part(self, text: str) -> dict[str, object] | None:
        """The one part of its content; a call has none."""
        if self.kind == "reasoning":
            return _reasoning_text(text)
        if self.kind == "message":
            return _output_text(text, self.logprobs)
        return None

    def show(self, context: AnswerContext, status: _Status, *, is_begun: bool) -> dict[str, object]:
        """The whole item; `is_begun` off: as it is before its first part."""
        text = "".join(self.texts)
        if self.call is not None:
            return _call(context, self.n, self.call.id, self.call.name, text, status)
        if self.kind == "reasoning":
            return _reasoning(context, self.n, text, status)
        content = [_output_text(text, self.logprobs)] if is_begun else []
        return _message(context, self.n, content, status)


def _error_code(error: ApiError) -> str:
    """One of the few codes that a failed response may have."""
    if error.kind == "rate_limit":
        return "rate_limit_exceeded"
    if error.kind in ("invalid_request", "context_overflow"):
        return "invalid_prompt"
    return "server_error"


def _error_type(error: ApiError) -> str:
    return "invalid_request_error" if error.status < 500 else "server_error"

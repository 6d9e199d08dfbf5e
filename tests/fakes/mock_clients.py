"""The real `anthropic` and `openai` clients, answered by the wire formats in this process: what
they send is parsed, what is encoded they read."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import anthropic
import openai

from llmrun.server import wire_anthropic, wire_openai, wire_responses
from llmrun.server.reading import read_json
from llmrun.server.types import ApiError, ChatRequest, ErrorAnswer, ReplyEvent
from llmrun.server.wire_json import to_json
from tests.fakes.reply_events import CONTEXT, collect, stream

Answer = tuple[int, dict[str, str], bytes]

# The clients' newer versions bring their HTTP library under another name.
_HTTP = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


class Wire:
    """The server's side. `events` are the reply to every request, or `error` is; `requests` what
    was asked."""

    def __init__(self, events: Sequence[ReplyEvent] = (), error: ApiError | None = None) -> None:
        self.events = events
        self.error = error
        self.error_after: int | None = None
        self.requests: list[ChatRequest] = []

    def anthropic(self, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(
            api_key="k",
            base_url="http://localhost",
            http_client=_HTTP.Client(transport=_HTTP.MockTransport(self._handle)),
            **{"max_retries": 0, **options},
        )

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            api_key="k",
            base_url="http://localhost/v1",
            http_client=_HTTP.Client(transport=_HTTP.MockTransport(self._handle)),
            **{"max_retries": 0, **options},
        )

    def _handle(self, http: Any) -> Any:
        status, headers, body = self.answer(http.url.path, http.read())
        return _HTTP.Response(status, headers=headers, content=body)

    def answer(self, path: str, body: bytes) -> Answer:
        if path == "/v1/messages":
            return self._reply(
                body,
                wire_anthropic.parse_messages,
                wire_anthropic.encode_message,
                wire_anthropic.MessageEncoder,
                wire_anthropic.encode_error,
            )
        if path == "/v1/messages/count_tokens":
            self.requests.append(wire_anthropic.parse_count_tokens(read_json(body)))
            return 200, _JSON, to_json(wire_anthropic.encode_count(42))
        assert path == "/v1/responses"
        return self._reply(
            body,
            wire_responses.parse_response,
            wire_responses.encode_response,
            wire_responses.ResponseEncoder,
            wire_openai.encode_error,
        )

    def _reply(
        self,
        body: bytes,
        parse: Callable[[object], ChatRequest],
        encode: Callable[..., dict[str, object]],
        encoder_type: Callable[..., Any],
        encode_error: Callable[[ApiError], ErrorAnswer],
    ) -> Answer:
        try:
            request = parse(read_json(body))
            self.requests.append(request)
            if self.error is not None and self.error_after is None:
                raise self.error
        except ApiError as error:
            answer = encode_error(error)
            return answer.status, {**_JSON, **answer.headers}, to_json(answer.body)
        if not request.generation.stream:
            return 200, _JSON, to_json(encode(CONTEXT, request, [collect(self.events)]))
        encoder = encoder_type(CONTEXT, request)
        headers = {"content-type": encoder.media_type}
        if self.error is None:
            return 200, headers, stream(encoder, self.events)
        parts = [encoder.feed(0, event) for event in self.events[: self.error_after]]
        return 200, headers, b"".join([*parts, encoder.fail(self.error)])


_JSON = {"content-type": "application/json"}

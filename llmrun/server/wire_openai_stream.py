"""A streamed chat completion of the OpenAI dialect.

    data: {…"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}
    data: {…"choices":[{"index":0,"delta":{"content":"Hel"},"finish_reason":null}]}
    data: {…"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"timings":{…}}
    data: {…"choices":[],"usage":{…},"timings":{…}}          with stream_options.include_usage
    data: [DONE]

The role comes with the first piece, so that the time to it is the time to the first token. With
`include_usage` all other chunks have `"usage":null`; `timings` are on the last chunk of all.
"""

from __future__ import annotations

from llmrun.server.types import (
    AnswerContext,
    CallArguments,
    CallStarted,
    ChatRequest,
    Finished,
    ReplyEvent,
    Started,
    TextPart,
    ThinkingPart,
)
from llmrun.server.wire_json import quote
from llmrun.server.wire_openai_chunks import ChunkEncoder
from llmrun.server.wire_openai_parts import encode_reason, encode_token_logprobs, head_of


class ChatEncoder(ChunkEncoder):
    """See `types.StreamEncoder`. What every chunk has in common is encoded once."""

    def __init__(self, context: AnswerContext, request: ChatRequest) -> None:
        head = head_of(context, "chatcmpl", "chat.completion.chunk")
        super().__init__(head, request.generation, request.generation.n)
        self._with_logprobs = request.generation.n_logprobs is not None
        self._legacy = request.legacy_functions
        self._open = f'data: {quote(head)[:-1]},"choices":[{{"index":'
        self._unfinished = '},"finish_reason":null}]' + self._close
        self._begun: set[int] = set()

    def feed(self, index: int, event: ReplyEvent) -> bytes:
        if isinstance(event, Started):
            return b""
        begin = "" if index in self._begun else self._begin(index, event)
        if isinstance(event, TextPart):
            chunk = self._text(index, event)
        elif isinstance(event, ThinkingPart):
            chunk = self._delta(index, f'"reasoning_content":{quote(event.text)}')
        elif isinstance(event, Finished):
            chunk = self._finish(index, event)
        else:
            chunk = self._call(index, event)
        return (begin + chunk).encode()

    def _begin(self, index: int, event: ReplyEvent) -> str:
        self._begun.add(index)
        # A reply of calls alone has no content at all.
        content = '""' if isinstance(event, TextPart | Finished) else "null"
        return self._delta(index, f'"role":"assistant","content":{content}')

    def _delta(self, index: int, members: str) -> str:
        return f'{self._open}{index},"delta":{{{members}{self._unfinished}'

    def _text(self, index: int, part: TextPart) -> str:
        if self._with_logprobs and part.logprobs:
            logprobs = quote(encode_token_logprobs(part.logprobs))
            members = f'"content":{quote(part.text)}}},"logprobs":{logprobs}'
            # The delta is closed already, so this is the chunk without the brace that does it.
            return f'{self._open}{index},"delta":{{{members}{self._unfinished[1:]}'
        if not part.text:
            return ""
        return f'{self._open}{index},"delta":{{"content":{quote(part.text)}{self._unfinished}'

    def _call(self, index: int, part: CallStarted | CallArguments) -> str:
        if isinstance(part, CallStarted):
            function = quote({"name": part.name, "arguments": ""})
            begin = f'"id":{quote(part.id)},"type":"function",'
        else:
            function = f'{{"arguments":{quote(part.text)}}}'
            begin = ""
        if self._legacy:
            # The older form has room for one call.
            return "" if part.index else self._delta(index, f'"function_call":{function}')
        call = f'{{"index":{part.index},{begin}"function":{function}}}'
        return self._delta(index, f'"tool_calls":[{call}]')

    def _finish(self, index: int, finish: Finished) -> str:
        timings = self._end_reply(index, finish)
        reason = encode_reason(finish.reason)
        if self._legacy and reason == "tool_calls":
            reason = "function_call"
        return (
            f'{self._open}{index},"delta":{{}},"finish_reason":"{reason}"}}]{timings}{self._close}'
        )

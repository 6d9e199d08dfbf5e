"""The OpenAI dialect's legacy `/v1/completions`: text that is gone on with, without any template.
Pure.

The choices of `n` answers to several prompts stand prompt by prompt: choice `i` answers prompt
`i // n`. `echo` is done here, so the replies given to the encoders are without the prompt.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llmrun.engine.types import TokenLogprob
from llmrun.server.reading import Fields
from llmrun.server.types import (
    AnswerContext,
    Finished,
    Reply,
    ReplyEvent,
    TextPart,
    TextRequest,
    ThinkingPart,
)
from llmrun.server.wire_json import quote
from llmrun.server.wire_openai_chunks import ChunkEncoder
from llmrun.server.wire_openai_fields import MAX_N, MAX_TOKEN, MAX_TOP_LOGPROBS, read_generation
from llmrun.server.wire_openai_parts import (
    encode_reason,
    encode_timings,
    encode_usage,
    finite_logprob,
    head_of,
    piece_text,
)
from llmrun.server.wire_openai_schema import SCHEMA_COMPLETION

__all__ = ["SCHEMA_COMPLETION", "CompletionEncoder", "encode_completion", "parse_completion"]

_MAX_PROMPTS = 128
_MAX_PROMPT_TOKENS = 1 << 24
_DEFAULT_MAX_TOKENS = 16
"""The dialect's own, documented default."""


def parse_completion(body: object) -> TextRequest:
    """The body of `POST /v1/completions`. Raises ApiError."""
    fields = Fields(body)
    prompts = _read_prompts(fields)
    n_logprobs = fields.integer("logprobs", low=0, high=MAX_TOP_LOGPROBS)
    generation = read_generation(
        fields, n_logprobs=n_logprobs, default_max_tokens=_DEFAULT_MAX_TOKENS
    )
    if len(prompts) * generation.n > _MAX_PROMPTS:
        raise fields.error("n", f"times the prompts must not be more than {_MAX_PROMPTS}")
    best_of = fields.integer("best_of", low=1, high=MAX_N)
    if best_of is not None and best_of != generation.n:
        raise fields.error("best_of", "must be n: answers are not ranked here")
    echo = fields.flag("echo")
    if echo and n_logprobs is not None:
        raise fields.error("echo", "cannot be true with logprobs: the prompt's are not computed")
    if echo and any(not isinstance(prompt, str) for prompt in prompts):
        raise fields.error("echo", "needs the prompt as text")
    return TextRequest(generation, prompts, echo=echo, suffix=fields.text("suffix") or None)


def _read_prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    """A text, texts, tokens, or arrays of tokens."""
    value = fields.require("prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise fields.error("prompt", "must be a string or an array of strings or tokens")
    if not value:
        raise fields.error("prompt", "must not be empty")
    if not isinstance(value[0], str | list):
        return (_read_tokens(fields, "prompt", value),)
    items = fields.items("prompt", max_items=_MAX_PROMPTS)
    prompts: list[str | tuple[int, ...]] = []
    for i, item in enumerate(items):
        if isinstance(item, str) and isinstance(value[0], str):
            prompts.append(item)
        elif isinstance(item, list) and isinstance(value[0], list):
            prompts.append(_read_tokens(fields, f"prompt[{i}]", item))
        else:
            raise fields.error(f"prompt[{i}]", "must be of the kind of the first prompt")
    return tuple(prompts)


def _read_tokens(fields: Fields, name: str, values: list[object]) -> tuple[int, ...]:
    if not values:
        raise fields.error(name, "must not be empty")
    if len(values) > _MAX_PROMPT_TOKENS:
        raise fields.error(name, f"must not have more than {_MAX_PROMPT_TOKENS} tokens")
    tokens = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKEN:
            raise fields.error(name, "must have the numbers of tokens")
        tokens.append(value)
    return tuple(tokens)


def encode_completion(
    context: AnswerContext, request: TextRequest, replies: Sequence[Reply]
) -> dict[str, object]:
    """A `text_completion` of whole replies, one choice each."""
    n = request.generation.n
    finishes = [reply.finish for reply in replies]
    choices = []
    for index, reply in enumerate(replies):
        logprobs = _Logprobs().encode(reply.logprobs) if _wants_logprobs(request) else None
        choices.append(
            {
                "text": _echo_of(request, index) + reply.text,
                "index": index,
                "logprobs": logprobs,
                "finish_reason": encode_reason(reply.finish.reason),
            }
        )
    return {
        **head_of(context, "cmpl", "text_completion"),
        "choices": choices,
        "usage": encode_usage(finishes, n),
        "timings": encode_timings(finishes, n),
    }


def _wants_logprobs(request: TextRequest) -> bool:
    return request.generation.n_logprobs is not None


def _echo_of(request: TextRequest, index: int) -> str:
    prompt = request.prompts[index // request.generation.n] if request.echo else ""
    return prompt if isinstance(prompt, str) else ""


class _Logprobs:
    """The `logprobs` of one choice, which may come in several parts. Offsets count characters of
    the answer; a token that ends inside a character stands where that begins."""

    def __init__(self) -> None:
        self._n_chars = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        offsets = []
        for found in logprobs:
            offsets.append(self._n_chars)
            self._n_chars += len(self._decoder.decode(found.piece))
        return {
            "tokens": [_token_text(found.piece) for found in logprobs],
            "token_logprobs": [finite_logprob(found.logprob) for found in logprobs],
            "top_logprobs": [_encode_top(found) for found in logprobs],
            "text_offset": offsets,
        }


def _encode_top(found: TokenLogprob) -> dict[str, float]:
    """From token to log probability, best first; the token that was taken is among them."""
    top: dict[str, float] = {}
    for _, piece, logprob in found.top:
        top.setdefault(_token_text(piece), finite_logprob(logprob))
    top.setdefault(_token_text(found.piece), finite_logprob(found.logprob))
    return top


def _token_text(piece: bytes) -> str:
    r"""Like `piece_text`; a token that is no text by itself is written `bytes:\xe2\x80`."""
    text = piece_text(piece)
    return text if text.encode() == piece else f"bytes:{text}"


class CompletionEncoder(ChunkEncoder):
    """A streamed text completion: `types.StreamEncoder`. The chunks have the shape of the whole
    answer; `[DONE]` ends them."""

    def __init__(self, context: AnswerContext, request: TextRequest) -> None:
        head = head_of(context, "cmpl", "text_completion")
        n_replies = request.generation.n * len(request.prompts)
        super().__init__(head, request.generation, n_replies)
        self._request = request
        self._open = f'data: {quote(head)[:-1]},"choices":[{{"text":'
        self._logprobs = [_Logprobs() for _ in range(n_replies)]
        self._begun: set[int] = set()

    def feed(self, index: int, event: ReplyEvent) -> bytes:
        if isinstance(event, TextPart | ThinkingPart):
            logprobs = event.logprobs if isinstance(event, TextPart) else ()
            return self._text(index, event.text, logprobs).encode()
        if isinstance(event, Finished):
            return (self._text(index, "") + self._finish(index, event)).encode()
        return b""

    def _text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] = ()) -> str:
        if index not in self._begun:
            self._begun.add(index)
            text = _echo_of(self._request, index) + text
        encoded = "null"
        if logprobs and _wants_logprobs(self._request):
            encoded = quote(self._logprobs[index].encode(logprobs))
        elif not text:
            return ""
        return self._chunk(index, quote(text), encoded, "null", "")

    def _finish(self, index: int, finish: Finished) -> str:
        timings = self._end_reply(index, finish)
        return self._chunk(index, '""', "null", f'"{encode_reason(finish.reason)}"', timings)

    def _chunk(self, index: int, text: str, logprobs: str, reason: str, timings: str) -> str:
        return (
            f'{self._open}{text},"index":{index},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}]{timings}{self._close}'
        )

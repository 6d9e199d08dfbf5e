"""What the streams of chat and of legacy completions of the OpenAI dialect have in common: their
ends. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from llmrun.server.types import ApiError, Finished, Generation
from llmrun.server.wire_json import quote
from llmrun.server.wire_openai_parts import (
    DONE,
    EVENT_STREAM,
    KEEP_ALIVE,
    encode_event,
    encode_timings,
    encode_usage,
    error_body,
)


class ChunkEncoder:
    """The part of a `types.StreamEncoder` that is behind the replies' text. `head` are the members
    that every chunk begins with, `n_replies` as many as there will be.

    With `include_usage` all chunks have `"usage":null` (`_close` is where a chunk ends), and one
    with the usage follows; the timings are on the last chunk of all.
    """

    media_type = EVENT_STREAM

    def __init__(self, head: Mapping[str, object], generation: Generation, n_replies: int) -> None:
        self._head = head
        self._n = generation.n
        self._n_replies = n_replies
        self._with_usage = generation.include_usage
        self._close = ',"usage":null}\n\n' if self._with_usage else "}\n\n"
        self._finishes: dict[int, Finished] = {}
        self._has_failed = False

    def finish(self) -> bytes:
        if self._has_failed:
            return b""
        if not self._with_usage:
            return DONE
        finishes = self._ordered()
        last = {
            **self._head,
            "choices": [],
            "usage": encode_usage(finishes, self._n),
            "timings": encode_timings(finishes, self._n),
        }
        return encode_event(last) + DONE

    def fail(self, error: ApiError) -> bytes:
        """Without `[DONE]`: clients take that for a success."""
        self._has_failed = True
        return encode_event(error_body(error))

    def keep_alive(self) -> bytes:
        return KEEP_ALIVE

    def _end_reply(self, index: int, finish: Finished) -> str:
        """Note a reply's end; the timings, with a comma before, if its chunk is to have them."""
        self._finishes[index] = finish
        if self._with_usage or len(self._finishes) < self._n_replies:
            return ""
        return f',"timings":{quote(encode_timings(self._ordered(), self._n))}'

    def _ordered(self) -> list[Finished]:
        return [self._finishes[index] for index in sorted(self._finishes)]

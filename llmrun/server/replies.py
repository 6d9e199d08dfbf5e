"""From an engine's events to the parts of a reply: thinking, text, tool calls. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from llmrun.chat.messages import ToolCall
from llmrun.chat.parsing import Delta, PlainSplitter, Splitter
from llmrun.chat.tool_calls import CallStart, CallText, Plain, ToolSplitter
from llmrun.engine.types import FinishEvent, TextEvent, TokenLogprob
from llmrun.server.reading import arguments_object
from llmrun.server.types import (
    CallArguments,
    CallStarted,
    Finished,
    Reason,
    Reply,
    ReplyEvent,
    TextPart,
    ThinkingPart,
)


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class ReplyReader:
    """The events of one reply, piece by piece.

    `splitter` takes thinking out of the model's text, `tools` (None: nothing is a call) calls out
    of the answer. With `parallel` off only the first call counts, and `is_complete` tells that it
    has been read. `trims_start`: white space before the answer is dropped.
    """

    def __init__(
        self,
        splitter: Splitter | None = None,
        tools: ToolSplitter | None = None,
        *,
        parallel: bool = True,
        load_s: float = 0.0,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._splitter = splitter or PlainSplitter()
        self._tools = tools
        self._parallel = parallel
        self.load_s = load_s
        self._new_id = new_id
        self._n_calls = 0
        self._n_thinking = 0
        self._logprobs: list[TokenLogprob] = []
        self._is_behind_tags = not isinstance(self._splitter, PlainSplitter)
        self.is_complete = False

    def read(self, event: TextEvent) -> list[ReplyEvent]:
        """The parts that new text settles."""
        self._logprobs += event.logprobs
        deltas = self._splitter.feed(event.text)
        if deltas and all(delta.kind == "thinking" for delta in deltas):
            self._n_thinking += len(event.tokens)
        return self._parts(deltas)

    def end(self, finish: FinishEvent) -> list[ReplyEvent]:
        """What was held back, and the last event."""
        parts = self._parts(self._splitter.flush())
        if self._tools is not None:
            parts += self._calls(self._tools.flush())
        if self._logprobs and not self._n_calls:
            parts.append(TextPart("", self._take_logprobs("")))
        reason: Reason = finish.reason
        # Where all that counts has been read, it does not matter how the engine came to its end.
        if self._n_calls and (finish.reason == "stop" or self.is_complete):
            reason = "tool_calls"
        usage, timings = finish.usage, finish.timings
        n_read = usage.n_prompt - usage.n_cached
        return [
            *parts,
            Finished(
                reason,
                usage,
                finish.stop,
                finish.seed,
                timings.total_s + self.load_s,
                self.load_s,
                n_read / timings.prompt_tok_s if timings.prompt_tok_s > 0 else 0.0,
                usage.n_completion / timings.decode_tok_s if timings.decode_tok_s > 0 else 0.0,
                self._n_thinking or None,
            ),
        ]

    def _parts(self, deltas: Iterable[Delta]) -> list[ReplyEvent]:
        parts: list[ReplyEvent] = []
        for delta in deltas:
            if delta.kind == "thinking":
                parts.append(ThinkingPart(delta.text))
                # They are the thinking's: no dialect has a place for these.
                self._drop_logprobs()
            elif self._tools is None:
                parts.append(TextPart(delta.text, self._take_logprobs(delta.text)))
            else:
                parts += self._calls(self._tools.feed(delta.text))
        return parts

    def _calls(self, found: Sequence[Plain | CallStart | CallText]) -> list[ReplyEvent]:
        parts: list[ReplyEvent] = []
        for part in found:
            if self.is_complete:
                break
            if isinstance(part, Plain):
                if self._n_calls and not part.text.strip():
                    continue  # between two calls
                parts.append(TextPart(part.text, self._take_logprobs(part.text)))
                continue
            # Those of a call are told nowhere either.
            self._drop_logprobs()
            if isinstance(part, CallStart):
                if self._n_calls and not self._parallel:
                    self.is_complete = True
                    break
                self._n_calls += 1
                parts.append(CallStarted(part.index, self._new_id(), part.name))
            elif part.text:
                parts.append(CallArguments(part.index, part.text))
        return parts

    def _drop_logprobs(self) -> None:
        self._logprobs.clear()
        self._is_behind_tags = True

    def _take_logprobs(self, text: str) -> tuple[TokenLogprob, ...]:
        """Those that came with `text`, without the tags that may stand in front of it."""
        taken = tuple(self._logprobs)
        self._logprobs.clear()
        if self._is_behind_tags and taken:
            data = b"".join(each.piece for each in taken)
            n_left = len(data) - max(0, data.rfind(text.encode("utf-8", "replace")))
            for i in range(len(taken) - 1, -1, -1):
                if n_left <= 0:
                    taken = taken[i + 1 :]
                    break
                n_left -= len(taken[i].piece)
            self._is_behind_tags = False
        return taken


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: str = ""


class ReplyCollector:
    """Puts a reply's events together."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[int, _Call] = {}
        self._logprobs: list[TokenLogprob] = []
        self._finish: Finished | None = None

    def feed(self, event: ReplyEvent) -> None:
        if isinstance(event, TextPart):
            self._texts.append(event.text)
            self._logprobs += event.logprobs
        elif isinstance(event, ThinkingPart):
            self._thoughts.append(event.text)
        elif isinstance(event, CallStarted):
            self._calls[event.index] = _Call(event.id, event.name)
        elif isinstance(event, CallArguments):
            self._calls[event.index].arguments += event.text
        elif isinstance(event, Finished):
            self._finish = event

    def reply(self) -> Reply:
        """The whole reply; to be asked after its `Finished`."""
        assert self._finish is not None
        calls = [self._calls[index] for index in sorted(self._calls)]
        return Reply(
            self._finish,
            "".join(self._texts),
            "".join(self._thoughts),
            tuple(ToolCall(call.name, arguments_object(call.arguments), call.id) for call in calls),
            tuple(call.arguments for call in calls),
            tuple(self._logprobs),
        )

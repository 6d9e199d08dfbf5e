"""Replies as events, for the tests of the wire formats: made by hand, or by hypothesis."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hypothesis import strategies as st

from llmrun.chat.messages import ToolCall
from llmrun.engine.types import TokenLogprob, Usage
from llmrun.server.types import (
    AnswerContext,
    CallArguments,
    CallStarted,
    Finished,
    Reason,
    Reply,
    ReplyEvent,
    Started,
    StreamEncoder,
    TextPart,
    ThinkingPart,
)

CONTEXT = AnswerContext("0a1b2c", 1_750_000_000.25, "tiny")
USAGE = Usage(n_prompt=30, n_completion=7, n_cached=20)


def finished(reason: Reason = "stop", stop: str | None = None) -> Finished:
    return Finished(reason, USAGE, stop, seed=3, total_s=2.0, n_thinking=4)


def events_of(*parts: ReplyEvent, finish: Finished | None = None) -> list[ReplyEvent]:
    """A whole reply: its parts between the first event and the last."""
    return [Started(USAGE.n_prompt), *parts, finish or finished()]


def collect(events: Sequence[ReplyEvent]) -> Reply:
    """The same reply in one piece."""
    names: dict[int, tuple[str, str]] = {}
    arguments: dict[int, str] = {}
    text = thinking = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    for event in events:
        if isinstance(event, TextPart):
            text += event.text
            logprobs += event.logprobs
        elif isinstance(event, ThinkingPart):
            thinking += event.text
        elif isinstance(event, CallStarted):
            names[event.index] = (event.name, event.id)
            arguments[event.index] = ""
        elif isinstance(event, CallArguments):
            arguments[event.index] += event.text
    finish = events[-1]
    assert isinstance(finish, Finished)
    calls = tuple(
        ToolCall(name, json.loads(arguments[i] or "{}"), call_id)
        for i, (name, call_id) in names.items()
    )
    return Reply(finish, text, thinking, calls, tuple(arguments.values()), logprobs)


def stream(encoder: StreamEncoder, events: Sequence[ReplyEvent]) -> bytes:
    """All bytes of a streamed answer."""
    return b"".join([*(encoder.feed(0, event) for event in events), encoder.finish()])


def read_events(data: bytes) -> list[tuple[str, dict[str, object]]]:
    """Server-sent events, each with its name. Comments are passed over."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if lines:
            event, value = lines
            assert event.startswith("event: ") and value.startswith("data: ")
            found.append((event[7:], json.loads(value[6:])))
    return found


_TEXTS = st.text(max_size=8) | st.sampled_from([" ", "\n\n", "\u2028", "\x85", '"', "\\", "é"])
_TOKENS = st.builds(
    TokenLogprob,
    token=st.integers(0, 9),
    piece=st.binary(max_size=3),
    logprob=st.floats(max_value=0, allow_nan=False),
    top=st.lists(
        st.tuples(st.integers(0, 9), st.binary(max_size=3), st.floats(-9, 0)), max_size=2
    ).map(tuple),
)


@st.composite
def replies(draw: st.DrawFn, *, with_logprobs: bool = False) -> list[ReplyEvent]:
    """Any reply: thinking, then text and calls in any order, all in pieces."""
    tokens = st.lists(_TOKENS, max_size=2).map(tuple) if with_logprobs else st.just(())
    parts: list[ReplyEvent] = [ThinkingPart(t) for t in draw(st.lists(_TEXTS, max_size=3))]
    n_calls = 0
    for kind in draw(st.lists(st.sampled_from(["text", "call"]), max_size=5)):
        if kind == "text":
            parts.append(TextPart(draw(_TEXTS), draw(tokens)))
            continue
        parts.append(CallStarted(n_calls, f"call_{n_calls}", draw(st.sampled_from(["f", "g"]))))
        given = draw(st.dictionaries(st.text(max_size=3), st.integers() | _TEXTS, max_size=2))
        text = json.dumps(given, ensure_ascii=False)
        cut = draw(st.integers(0, len(text)))
        parts += [CallArguments(n_calls, piece) for piece in (text[:cut], text[cut:])]
        n_calls += 1
    ends: list[Reason] = ["tool_calls", "length"] if n_calls else ["stop", "length"]
    n_prompt, n_completion = draw(st.integers(1, 99)), draw(st.integers(0, 99))
    usage = Usage(n_prompt, n_completion, draw(st.integers(0, n_prompt)))
    finish = Finished(
        draw(st.sampled_from(ends)), usage, total_s=1.0, n_thinking=draw(st.none() | st.just(3))
    )
    return [Started(n_prompt), *parts, finish]

"""From the engine's events to the parts of a reply: thinking, text, calls, and their numbers."""

from __future__ import annotations

import itertools

import pytest

from llmrun.chat.parsing import THINK, make_splitter
from llmrun.chat.tool_calls import make_tool_splitter
from llmrun.chat.tool_formats import HERMES, ToolSpec
from llmrun.engine.types import FinishEvent, TextEvent, Timings, TokenLogprob, Usage
from llmrun.server.replies import ReplyCollector, ReplyReader, new_call_id
from llmrun.server.types import (
    CallArguments,
    CallStarted,
    Finished,
    Reply,
    ReplyEvent,
    TextPart,
    ThinkingPart,
)

TOOLS = [ToolSpec("f", "", {"type": "object", "properties": {"a": {"type": "integer"}}})]
TIMINGS = Timings(ttft_s=0.5, prompt_tok_s=100.0, decode_tok_s=10.0, total_s=2.0)


def call(a: int, name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": {a}}}}}\n</tool_call>'


def reader(*, thinks: bool = False, tools: bool = False, **options: object) -> ReplyReader:
    numbers = itertools.count()
    return ReplyReader(
        make_splitter(THINK, False, HERMES if tools else None) if thinks else None,
        make_tool_splitter(HERMES, TOOLS) if tools else None,
        new_id=lambda: f"call_{next(numbers)}",
        **options,  # type: ignore[arg-type]
    )


def logprob(char: str) -> TokenLogprob:
    return TokenLogprob(ord(char), char.encode(), -0.5, ())


def finish(reason: str = "stop", n: int = 20) -> FinishEvent:
    return FinishEvent(reason, Usage(30, n, 10), TIMINGS, 7, None, ())  # type: ignore[arg-type]


def read(
    made: ReplyReader, text: str, size: int, end: FinishEvent | None = None, *, logs: bool = False
) -> list[ReplyEvent]:
    """The events of `text` in pieces of `size`, each character a token."""
    events: list[ReplyEvent] = []
    for at in range(0, len(text), size):
        piece = text[at : at + size]
        tokens = tuple(map(ord, piece))
        events += made.read(TextEvent(piece, tokens, tuple(map(logprob, piece)) if logs else ()))
    return events + made.end(end or finish())


def reply(events: list[ReplyEvent]) -> Reply:
    collector = ReplyCollector()
    for event in events:
        collector.feed(event)
    return collector.reply()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_thinking_text_and_calls_are_taken_apart_however_they_are_cut(size: int) -> None:
    text = f"<think>\nHm, {{f}}.\n</think>\n\nLet me see.\n{call(1)}\n{call(2)}"
    events = read(reader(thinks=True, tools=True), text, size)
    whole = reply(events)
    assert whole.thinking == "Hm, {f}."
    assert whole.text.strip() == "Let me see."
    assert [(c.name, c.arguments, c.id) for c in whole.calls] == [
        ("f", {"a": 1}, "call_0"),
        ("f", {"a": 2}, "call_1"),
    ]
    assert whole.arguments_texts == ('{"a": 1}', '{"a": 2}')
    assert whole.finish.reason == "tool_calls"
    kinds = [type(event) for event in events]
    assert kinds.index(ThinkingPart) < kinds.index(TextPart) < kinds.index(CallStarted)
    assert kinds[-1] is Finished


def test_without_tools_what_looks_like_a_call_is_text() -> None:
    whole = reply(read(reader(), call(1), 4))
    assert (whole.text, whole.calls, whole.finish.reason) == (call(1), (), "stop")


def test_a_malformed_call_is_text() -> None:
    text = '<tool_call>\n{"name": }\n</tool_call>'
    whole = reply(read(reader(tools=True), text, 5))
    assert (whole.text, whole.calls, whole.finish.reason) == (text, (), "stop")


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("reason", ["cancelled", "stop", "length"])
def test_where_only_one_call_is_wanted_the_first_counts(size: int, reason: str) -> None:
    made = reader(tools=True, parallel=False)
    events = read(made, f"{call(1)}\n{call(2)}\nand more", size, finish(reason))
    whole = reply(events)
    assert made.is_complete
    assert [c.arguments for c in whole.calls] == [{"a": 1}]
    assert (whole.text.strip(), whole.finish.reason) == ("", "tool_calls")


def test_a_call_that_is_cut_ends_for_the_reason_of_the_engine() -> None:
    whole = reply(read(reader(tools=True), call(12345)[:-24], 3, finish("length")))
    assert whole.finish.reason == "length"
    assert whole.calls[0].name == "f" and "raw" in whole.calls[0].arguments
    assert reply(read(reader(), "a", 1, finish("cancelled"))).finish.reason == "cancelled"


def test_the_log_probabilities_of_text_come_with_it_in_order() -> None:
    events = read(reader(thinks=True), "<think>ab</think>\n\nHi < there", 2, logs=True)
    whole = reply(events)
    text = b"".join(each.piece for each in whole.logprobs).decode()
    assert whole.text == "Hi < there" and text.strip() == "Hi < there"
    assert all(b"think" not in each.piece for each in whole.logprobs)


def test_log_probabilities_of_calls_belong_to_no_text() -> None:
    events = read(reader(tools=True), f"Hi.\n{call(1)}", 1, logs=True)
    whole = reply(events)
    assert "".join(each.piece.decode() for each in whole.logprobs).startswith("Hi.")
    assert b"{" not in b"".join(each.piece for each in whole.logprobs)
    # Nothing that a client would take for further text follows the call.
    kinds = [type(event) for event in events]
    assert TextPart not in kinds[kinds.index(CallStarted) :]


def test_log_probabilities_without_text_of_their_own_are_not_lost() -> None:
    """The first bytes of a character that never ends have no text."""
    made = reader()
    events = [*made.read(TextEvent("", (1,), (logprob("x"),))), *made.end(finish())]
    assert [each.piece for each in reply(events).logprobs] == [b"x"]


def test_the_numbers_of_the_end() -> None:
    made = reader(thinks=True)
    made.load_s = 3.0
    end = read(made, "<think>abc</think>\n\nHi", 1)[-1]
    assert isinstance(end, Finished)
    assert end.usage == Usage(30, 20, 10) and end.seed == 7
    assert (end.total_s, end.load_s) == (5.0, 3.0)
    assert (end.prompt_s, end.decode_s) == (0.2, 2.0)  # 20 tokens were read, 20 written
    assert end.n_thinking == 3
    slow = FinishEvent("stop", Usage(1, 0, 0), Timings(0, 0, 0, 0), 7, None, ())
    still = reader().end(slow)[-1]
    assert isinstance(still, Finished)
    assert (still.prompt_s, still.decode_s, still.n_thinking) == (0.0, 0.0, None)


def test_arguments_that_are_none_stay_whole() -> None:
    collector = ReplyCollector()
    for event in (
        CallStarted(0, "x", "f"),
        CallArguments(0, "[1"),
        Finished("stop", Usage(1, 1, 0)),
    ):
        collector.feed(event)
    assert collector.reply().calls[0].arguments == {"raw": "[1"}


def test_ids_of_calls_cannot_be_guessed() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(each) == 29 and each.startswith("call_") for each in ids)

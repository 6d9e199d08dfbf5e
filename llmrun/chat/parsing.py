"""Splits a model's text into thinking and answer while it streams.

Tags differ by family and may be cut anywhere between two pieces of text, so the splitter holds back
what could still become a tag. However the text is cut, the joined result is the same.

Calls of tools are part of the answer: `tool_calls` takes them out of it. A splitter made for a tool
format ends thinking where a call begins, and passes gpt-oss's calls on in one form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

from llmrun.chat.tool_formats import HARMONY as HARMONY_CALLS
from llmrun.chat.tool_formats import ToolFormat
from llmrun.engine.types import Tokenizer

DeltaKind = Literal["thinking", "answer"]


@dataclass(frozen=True, slots=True)
class Delta:
    """A new piece of a reply."""

    kind: DeltaKind
    text: str


@dataclass(frozen=True, slots=True)
class ThinkingFormat:
    """How a family marks its thinking.

    `anywhere`: the tags cannot be text, so they count wherever they stand; other tags count only
    before the answer's first character. `is_harmony`: gpt-oss's messages with channels.
    `closing` is what ends, or forestalls, thinking when it is put behind a rendered prompt.
    """

    name: str
    start: str
    end: str
    closing: str
    anywhere: bool = False
    is_harmony: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        return _HARMONY_TAGS if self.is_harmony else (self.start, self.end)


_HARMONY_TAGS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")

HARMONY = ThinkingFormat(
    "gpt-oss",
    "<|channel|>analysis<|message|>",
    "<|end|>",
    "<|channel|>final<|message|>",
    anywhere=True,
    is_harmony=True,
)
GEMMA_4 = ThinkingFormat(
    "gemma-4", "<|channel>thought\n", "<channel|>", "<channel|>", anywhere=True
)
MINISTRAL = ThinkingFormat("ministral", "[THINK]", "[/THINK]", "[/THINK]", anywhere=True)
COMMAND = ThinkingFormat(
    "command", "<|START_THINKING|>", "<|END_THINKING|>", "<|END_THINKING|>", anywhere=True
)
SEED = ThinkingFormat("seed", "<seed:think>", "</seed:think>", "</seed:think>")
THINK = ThinkingFormat("think", "<think>", "</think>", "\n</think>\n\n")

# In this order: gpt-oss and Gemma 4 sources may hold other families' tags in comments.
_BY_MARK = (
    ("<|channel|>", HARMONY),
    ("<|channel>", GEMMA_4),
    ("[THINK]", MINISTRAL),
    ("<|START_THINKING|>", COMMAND),
    ("<seed:think>", SEED),
    ("<think>", THINK),
    ("</think>", THINK),
)


def detect_format(template_source: str | None, tokenizer: Tokenizer) -> ThinkingFormat | None:
    """The thinking tags of a model, or None for one that does not think.

    They show in the template. Some fine-tunes of thinking models have a plain ChatML template, but
    still the pair of tags in their vocabulary; a base model without a template gives no signal.
    """
    if not template_source:
        return None
    for mark, fmt in _BY_MARK:
        if mark in template_source:
            return fmt
    found = {literal.text for literal in tokenizer.special_literals("<think></think>")}
    return THINK if found >= {"<think>", "</think>"} else None


class Tagged(Protocol):
    """A `ThinkingFormat` or a `ToolFormat`."""

    @property
    def tags(self) -> tuple[str, ...]: ...


def needs_special_text(fmt: Tagged, tokenizer: Tokenizer) -> bool:
    """Whether the tags are control tokens, which appear in the text only on request."""
    literals = tokenizer.special_literals("".join(fmt.tags))
    return any(literal.is_control for literal in literals)


def starts_inside(rendered_prompt: str, fmt: ThinkingFormat) -> bool:
    """Whether the model's first token is thinking already: the prompt ends in an unclosed tag."""
    return rendered_prompt.rstrip().endswith(fmt.start.rstrip())


class Splitter(Protocol):
    """Takes the text of one reply piece by piece."""

    def feed(self, text: str) -> list[Delta]:
        """The parts of the reply that `text` settles."""

    def flush(self) -> list[Delta]:
        """What was held back, when no more text comes."""


def make_splitter(
    fmt: ThinkingFormat | None, starts_inside: bool = False, tools: ToolFormat | None = None
) -> Splitter:
    """The splitter for a format; None passes all text on as answer.

    `tools`: the model may call tools in this format. Calls are then in the answer as a
    `tool_calls.ToolSplitter` for the same format takes them.
    """
    if fmt is None:
        return PlainSplitter()
    if fmt.is_harmony:
        return HarmonySplitter(starts_inside, passes_calls=tools is HARMONY_CALLS)
    return StreamSplitter(fmt, starts_inside, tools.thinking_ends if tools is not None else ())


class PlainSplitter:
    """All text is the answer."""

    def feed(self, text: str) -> list[Delta]:
        return [Delta("answer", text)] if text else []

    def flush(self) -> list[Delta]:
        return []


class StreamSplitter:
    """Splits at a pair of tags.

    White space around the tags is dropped, as are empty thoughts and end tags with no thought to
    end. Thinking that was left open ends before one of `further_ends` too; these are answer.
    """

    def __init__(
        self,
        fmt: ThinkingFormat,
        starts_inside: bool = False,
        further_ends: tuple[str, ...] = (),
    ) -> None:
        # The start tag counts without its newline too: thinking is stripped anyway.
        self._start = fmt.start.rstrip()
        self._end = fmt.end
        self._further_ends = further_ends
        self._anywhere = fmt.anywhere
        self._inside = starts_inside
        self._pending = ""
        self._reply = _Reply()
        if starts_inside:
            self._reply.cross_tag()

    def feed(self, text: str) -> list[Delta]:
        self._pending += text
        while self._settle_tag():
            pass
        n_held = _n_held(self._pending, self._open_tags())
        ready = self._pending[: len(self._pending) - n_held]
        self._pending = self._pending[len(ready) :]
        self._emit(ready)
        return self._reply.take()

    def flush(self) -> list[Delta]:
        rest, self._pending = self._pending, ""
        self._emit(rest)
        self._reply.end()
        return self._reply.take()

    def _settle_tag(self) -> bool:
        """Settle pending text up to and with the next tag; False when there is no whole tag."""
        at, tag = _find_first(self._pending, self._open_tags())
        if not tag:
            return False
        before = self._pending[:at]
        ends_as_answer = tag in self._further_ends
        self._pending = self._pending[at + (0 if ends_as_answer else len(tag)) :]
        self._emit(before)
        if tag not in self._open_tags():
            self._emit(tag)  # the answer began before it, so it is text
        else:
            self._inside = tag == self._start
            self._reply.cross_tag()
        return True

    def _open_tags(self) -> tuple[str, ...]:
        """The tags that would count now."""
        if self._inside:
            return (self._end, *self._further_ends)
        if self._anywhere or not self._reply.has_answer:
            return (self._start, self._end)
        return ()

    def _emit(self, text: str) -> None:
        if self._inside:
            self._reply.add_thinking(text)
        else:
            self._reply.add_answer(text)


class HarmonySplitter:
    """Splits the messages of gpt-oss: `<|channel|>NAME<|message|>TEXT<|end|><|start|>assistant…`.

    Channel `analysis` is thinking, all others are the answer; a stray channel name in front of
    another one does not count. Text where a header should be is answer.

    A message to `functions.NAME`, in whatever channel, is a call. With `passes_calls` it is in the
    answer behind `<|channel|>commentary to=functions.NAME<|message|>`, which cannot be text, since
    these tags never are; otherwise its arguments alone are.
    """

    def __init__(self, starts_inside: bool = False, *, passes_calls: bool = False) -> None:
        self._passes_calls = passes_calls
        self._in_header = not starts_inside
        self._kind: DeltaKind = "thinking"
        self._pending = ""
        self._reply = _Reply()
        if starts_inside:
            self._reply.cross_tag()

    def feed(self, text: str) -> list[Delta]:
        self._pending += text
        while self._settle_header() if self._in_header else self._settle_tag():
            pass
        if not self._in_header:
            n_held = _n_held(self._pending, _BODY_ENDS)
            ready = self._pending[: len(self._pending) - n_held]
            self._pending = self._pending[len(ready) :]
            self._emit(ready)
        return self._reply.take()

    def flush(self) -> list[Delta]:
        rest, self._pending = self._pending, ""
        if not self._in_header:
            self._emit(rest)
        elif "<|" not in rest:
            self._reply.add_answer(rest)
        self._reply.end()
        return self._reply.take()

    def _settle_header(self) -> bool:
        """Read a whole header off the pending text; False when it needs more text."""
        header, mark, body = self._pending.partition("<|message|>")
        called = None
        # Without the mark, the text may end with a part of it.
        limit = _MAX_HEADER if mark else _MAX_HEADER + len("<|message|>") - 1
        if len(header) > limit or not _may_be_header(header):
            self._kind = "answer"
        elif mark:
            channel = header.rpartition("<|channel|>")[2].split()
            self._kind = "thinking" if channel[:1] == ["analysis"] else "answer"
            self._pending = body
            called = _CALLED.search(header)
        else:
            return False
        self._in_header = False
        self._reply.cross_tag(is_message=True)
        if called and self._passes_calls:
            self._kind = "answer"
            self._emit(f"{HARMONY_CALLS.call_start}{called[1]}{HARMONY_CALLS.name_end}")
        return True

    def _settle_tag(self) -> bool:
        at, tag = _find_first(self._pending, _BODY_ENDS)
        if not tag:
            return False
        self._emit(self._pending[:at])
        is_end = tag not in ("<|start|>", "<|channel|>")
        self._pending = self._pending[at + (len(tag) if is_end else 0) :]
        self._in_header = True
        return True

    def _emit(self, text: str) -> None:
        if self._kind == "thinking":
            self._reply.add_thinking(text)
        else:
            self._reply.add_answer(text)


_CALLED = re.compile(r"\bto=functions\.([^\s<>]+)")
_BODY_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
_MAX_HEADER = 256


def _may_be_header(text: str) -> bool:
    text = text.lstrip()
    return any(
        text.startswith(start) or start.startswith(text)
        for start in ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "to=")
    )


class _Reply:
    """Collects deltas: strips thoughts, sets one off from the next, trims what follows a tag."""

    def __init__(self) -> None:
        self.has_answer = False
        self._has_thinking = False
        self._begins = True  # no text of the current stretch has been passed on yet
        self._after_tag = False
        self._is_message = False
        self._space = ""  # white space held back until text follows it
        self._deltas: list[Delta] = []

    def cross_tag(self, *, is_message: bool = False) -> None:
        """A tag: white space around it is no text. `is_message`: a new message begins."""
        self._space = ""
        self._begins = True
        self._after_tag = True
        self._is_message = is_message

    def add_thinking(self, text: str) -> None:
        body = self._without_held_space(text)
        if body and self._begins:
            body = body.lstrip()
            if self._has_thinking:
                body = "\n\n" + body
        if body:
            self._begins = False
            self._has_thinking = True
            self._deltas.append(Delta("thinking", body))

    def add_answer(self, text: str) -> None:
        if self._begins:
            # White space may still stand before a tag.
            text = self._space + text
            self._space = ""
            if not text.strip():
                self._space = text
                return
            if self._is_message or not self.has_answer:
                text = text.lstrip() if self._after_tag else text
            if self._is_message and self.has_answer:
                text = "\n\n" + text
            self._begins = False
            self.has_answer = True
        if text:
            self._deltas.append(Delta("answer", text))

    def end(self) -> None:
        """No more text: held white space is an answer's own unless a tag came before it."""
        if self._space and not self._after_tag:
            self._deltas.append(Delta("answer", self._space))
        self._space = ""

    def take(self) -> list[Delta]:
        """The deltas so far, neighbours of one kind joined."""
        merged: list[Delta] = []
        for delta in self._deltas:
            if merged and merged[-1].kind == delta.kind:
                merged[-1] = Delta(delta.kind, merged[-1].text + delta.text)
            else:
                merged.append(delta)
        self._deltas = []
        return merged

    def _without_held_space(self, text: str) -> str:
        text = self._space + text
        body = text.rstrip()
        self._space = text[len(body) :]
        return body


def _find_first(text: str, tags: tuple[str, ...]) -> tuple[int, str]:
    """Place and name of the first tag in `text`; an empty name when there is none."""
    found = [(text.find(tag), tag) for tag in tags]
    return min(((at, tag) for at, tag in found if at >= 0), default=(-1, ""))


def _n_held(text: str, tags: tuple[str, ...]) -> int:
    """The length of the longest end of `text` that could be the start of a tag."""
    longest = max((len(tag) - 1 for tag in tags), default=0)
    for n in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-n:]) for tag in tags):
            return n
    return 0

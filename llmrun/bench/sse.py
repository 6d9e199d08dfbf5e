"""The stream of an OpenAI-compatible answer: server-sent events of JSON. Pure and bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_EVENT_BYTES = 1 << 20


class WrongStreamError(Exception):
    """The stream is none of this kind; the message is a part of a sentence for users."""


class StreamedError(Exception):
    """The server says in the stream that it failed; the argument is what it says."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: text that came (of an answer or of thinking), the counts of tokens if this event
    has them, and whether it says that the answer is complete."""

    text: str = ""
    n_tokens: int | None = None
    n_prompt: int | None = None
    is_last: bool = False


class EventReader:
    """Takes bytes as they arrive and gives the events that are complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._n_data = 0

    def feed(self, content: bytes) -> Iterator[Event]:
        """Raises WrongStreamError and StreamedError."""
        lines = (self._rest + content).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            event = self._take(line.rstrip(b"\r"))
            if event is not None:
                yield event
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise WrongStreamError("one event of its stream is too long")

    def end(self) -> Iterator[Event]:
        """The event that the stream's end completes, if there is one."""
        for line in (self._rest, b""):
            event = self._take(line.rstrip(b"\r"))
            if event is not None:
                yield event
        self._rest = b""

    def _take(self, line: bytes) -> Event | None:
        if line.startswith(b"data:"):
            data = line[5:].removeprefix(b" ")
            self._n_data += len(data)
            if self._n_data > _MAX_EVENT_BYTES:
                raise WrongStreamError("one event of its stream is too long")
            self._data.append(data)
            return None
        if line or not self._data:
            return None
        whole = b"\n".join(self._data)
        self._data, self._n_data = [], 0
        return _parse(whole)


def _parse(data: bytes) -> Event:
    if data.strip() == b"[DONE]":
        return Event(is_last=True)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise WrongStreamError("its stream holds something that is no JSON") from None
    if not isinstance(value, dict):
        raise WrongStreamError("its stream holds something that is no object")
    if value.get("error"):
        raise StreamedError(value["error"])
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    if not isinstance(choice, dict):
        raise WrongStreamError("its stream holds a choice that is no object")
    usage = value.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Event(
        text=_text_of(choice),
        n_tokens=_count(counts.get("completion_tokens")),
        n_prompt=_count(counts.get("prompt_tokens")),
        is_last=isinstance(choice.get("finish_reason"), str),
    )


def _text_of(choice: dict[str, object]) -> str:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        # Servers name thinking in one of two ways; some send both with the same text.
        parts = (
            delta.get("content"),
            delta.get("reasoning_content") or delta.get("reasoning"),
        )
    else:
        parts = (choice.get("text"), None)
    return "".join(part for part in parts if isinstance(part, str))


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
        return None
    return value

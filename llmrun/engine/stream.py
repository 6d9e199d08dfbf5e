"""The reader's end of a running generation."""

from __future__ import annotations

import queue
from collections.abc import Callable

from llmrun.engine.sequence import Sequence
from llmrun.engine.types import Event, FinishEvent

# How often a waiting reader looks up: for Ctrl-C where a plain wait cannot be interrupted
# (Windows), and for a last event that an interrupt took away between the queue and the caller.
_READER_WAIT_S = 0.5


_LAST = (FinishEvent, BaseException)  # what no other event follows


class Stream:
    """The events of one request, in order; ends after its FinishEvent.

    Iterate from one thread. `cancel` may come from any.
    """

    def __init__(self, sequence: Sequence, abort: Callable[[], None]) -> None:
        self._sequence = sequence
        self._abort = abort
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._last: Event | BaseException | None = None
        self._done = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        if self._done:
            raise StopIteration
        event: Event | BaseException | None = None
        while event is None:
            # Order matters: what was put before `_last` was set is in the queue.
            last = self._last
            try:
                event = self._events.get(timeout=_READER_WAIT_S if last is None else 0)
            except queue.Empty:
                event = last
        if isinstance(event, BaseException):
            self._done = True
            raise event
        if isinstance(event, FinishEvent):
            self._done = True
        return event

    def cancel(self) -> None:
        """Ask for an end within one micro-batch. Harmless when the stream is over."""
        self._sequence.cancelled = True
        if self._last is None:
            self._abort()

    def put(self, event: Event | BaseException) -> None:
        """For the engine's thread."""
        self._events.put(event)
        if isinstance(event, _LAST):
            self._last = event

"""The reader's end of a running generation."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

from llmrun.engine.sequence import Sequence
from llmrun.engine.types import Event, FinishEvent

# How often a waiting reader looks up: for Ctrl-C where a plain wait cannot be interrupted
# (Windows), and for a last event that an interrupt took away between the queue and the caller.
_READER_WAIT_S = 0.5


_LAST = (FinishEvent, BaseException)  # what no other event follows

_log = logging.getLogger("llmrun.llama")


class Stream:
    """The events of one request, in order; ends after its FinishEvent.

    Read from one thread, by iterating or by `take`. `cancel` may come from any.
    """

    def __init__(self, sequence: Sequence, abort: Callable[[], None]) -> None:
        self._sequence = sequence
        self._abort = abort
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._listener: Callable[[], None] | None = None
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

    def listen(self, listener: Callable[[], None]) -> None:
        """See `engine.types.StreamLike.listen`. The last one given counts."""
        # Set before the queue is looked at, while `put` fills the queue before it looks here: one
        # of the two calls the listener, at times both.
        self._listener = listener
        if not self._events.empty() or (self._last is not None and not self._done):
            self._call_listener()

    def take(self) -> list[Event]:
        """See `engine.types.StreamLike.take`."""
        events: list[Event] = []
        while not self._done:
            last = self._last  # before the queue is looked at, as above
            try:
                event: Event | BaseException | None = self._events.get_nowait()
            except queue.Empty:
                event = last
            if event is None:
                break
            if not isinstance(event, BaseException):
                events.append(event)
                self._done = isinstance(event, FinishEvent)
            elif events:
                # It comes with the next call, for which somebody has to be told.
                self._last = event
                self._call_listener()
                break
            else:
                self._done = True
                raise event
        return events

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
        if self._listener is not None:
            self._call_listener()

    def _call_listener(self) -> None:
        """A listener that fails harms its own reader only, not the engine or its other readers."""
        listener = self._listener
        if listener is None:
            return
        try:
            listener()
        except BaseException as error:  # noqa: BLE001 - whose it is cannot be told from here
            _log.warning("a reader of an answer could not be told of it: %r", error)

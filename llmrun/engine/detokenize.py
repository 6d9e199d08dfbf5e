"""From token bytes to text: whole characters only, and nothing from a stop string on. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class IncrementalText:
    """Joins the byte pieces of one answer to text; a character split over tokens waits.

    Bytes that are no UTF-8 become U+FFFD, as they would in the whole.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting = False

    def feed(self, piece: bytes) -> str:
        if not self._waiting:
            try:
                return piece.decode()  # nearly every piece is whole characters: one C call
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(piece)
        self._waiting = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """The text of bytes that still wait; call once at the end."""
        self._waiting = False
        return self._decoder.decode(b"", True)


class StopMatcher:
    """Finds the first of some stop strings in text that comes in pieces.

    Text that could be the start of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text to emit, the stop string that was met or None). After a stop, feed no more."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(index, stop) for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            index, stop = min(found, key=lambda item: (item[0], -len(item[1])))
            self._held = ""
            return text[:index], stop
        n_held = self._n_held(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], None

    def flush(self) -> str:
        """What was held back; the answer ended without the stop string."""
        held, self._held = self._held, ""
        return held

    def _n_held(self, text: str) -> int:
        """Length of the longest end of `text` that is a true start of a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

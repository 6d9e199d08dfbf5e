"""Lines of a log that must never keep the server waiting for who reads them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_MAX_LINES = 1000


class LineWriter:
    """Gives lines to `write` from a thread of its own. What it cannot get rid of (a full pipe, a
    stopped terminal) is dropped beyond MAX_LINES; how much, is told with the next line."""

    def __init__(self, write: Callable[[str], None], n_max: int = _MAX_LINES) -> None:
        self._write = write
        self._lines: queue.Queue[str] = queue.Queue(n_max)
        self._n_dropped = 0
        threading.Thread(target=self._run, name="llmrun-log", daemon=True).start()

    def put(self, line: str) -> None:
        """From any thread; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._n_dropped += 1

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            n_dropped, self._n_dropped = self._n_dropped, 0
            try:
                self._write(f"{line} ({n_dropped} lines left out)" if n_dropped else line)
            except (OSError, ValueError):  # the reader has gone
                continue

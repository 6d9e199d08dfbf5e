"""A download's watcher that keeps what it is told."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TextIO

from llmrun.hub.types import RemoteFile


class RecordingProgress:
    def __init__(self, echo: TextIO | None = None) -> None:
        self.calls: list[str] = []
        self.notes: list[str] = []
        self.n_present = 0
        self.n_bytes: Counter[str] = Counter()
        self.finished: list[str] = []
        self._echo = echo
        self._lock = threading.Lock()

    def begin(self, files: tuple[RemoteFile, ...], n_bytes_present: int) -> None:
        self.calls.append("begin")
        self.n_present = n_bytes_present

    def advance(self, path: str, n_bytes: int) -> None:
        with self._lock:
            self.n_bytes[path] += n_bytes

    def finish_file(self, path: str) -> None:
        self.finished.append(path)

    def note(self, message: str) -> None:
        self.notes.append(message)
        if self._echo is not None:
            print(message, file=self._echo, flush=True)

    def end(self) -> None:
        self.calls.append("end")

"""llama.cpp's log goes to Python's `logging` ("llmrun.llama"), never to stderr by itself."""

from __future__ import annotations

import collections
import logging
from typing import Any

_logger = logging.getLogger("llmrun.llama")
# Without any handler Python prints warnings to stderr by itself; the command line adds its own.
_logger.addHandler(logging.NullHandler())

# ggml_log_level: 0 none, 1 debug, 2 info, 3 warn, 4 error, 5 continue the previous line.
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
_CONTINUE = 5
_WARN = 3


class LogSink:
    """Receives llama.cpp's log lines; keeps the last warnings and errors to explain a failure.

    The C side calls from any thread. Nothing here may raise: ctypes would print the exception.
    llama.cpp's own warnings are mostly remarks for its developers, so each level is one lower here.
    """

    def __init__(self) -> None:
        self._level = 0
        self.recent: collections.deque[str] = collections.deque(maxlen=20)

    def write(self, level: int, text: bytes | None, _user: Any = None) -> None:
        try:
            if level != _CONTINUE:
                self._level = level
            if not text:
                return
            if self._level >= _WARN:
                line = text.decode("utf-8", "replace").strip()
                if line.strip("."):
                    self.recent.append(line)
            number = _LEVELS.get(self._level, logging.DEBUG)
            if _logger.isEnabledFor(number):
                _logger.log(number, "%s", text.decode("utf-8", "replace").rstrip("\n"))
        except BaseException:  # noqa: BLE001 - an exception must not leave a C callback
            return

    def last_reason(self) -> str | None:
        """The most recent warnings and errors in one line, for the `why` of an error."""
        lines = list(dict.fromkeys(self.recent))[-3:]
        return "; ".join(lines) if lines else None

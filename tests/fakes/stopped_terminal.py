"""Streams on which nothing can be written until a test lets it, and an output to them."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

from llmrun.cli.serve_log import LogOutput
from llmrun.config import Environment
from llmrun.ui.output import Output

PATIENCE_S = 30.0
"""Only for a test that would hang: nothing waits for so long."""


class Stopped(io.StringIO):
    """Takes nothing but while `is_going` is set."""

    def __init__(self, *, is_terminal: bool = False) -> None:
        super().__init__()
        self.is_going = threading.Event()
        self.is_waited_for = False
        """Somebody wants to write, and cannot."""
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> int:
        if not self.is_going.is_set():
            self.is_waited_for = True
            assert self.is_going.wait(PATIENCE_S)
            self.is_waited_for = False
        return super().write(text)

    def until_waited_for(self) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not self.is_waited_for:
            assert time.monotonic() < give_up, "nobody writes"
            time.sleep(0.001)


def output_to(stream: io.StringIO, *, n_max: int = 1000, verbose: int = 1) -> LogOutput:
    folder = Path("unused")
    environment = Environment(
        io.StringIO(), io.StringIO(), stream, {}, folder, folder, folder, folder
    )
    return LogOutput(Output(environment, command="serve", verbose=verbose), n_max)

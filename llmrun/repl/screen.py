"""What the session shows: results on one console, notes and errors on the other."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmrun.errors import LlmrunError
from llmrun.text import escape_controls, escape_line
from llmrun.ui.live_rows import split_cells, write_text
from llmrun.ui.markdown import MarkdownStream, PlainStream, TextStream
from llmrun.ui.wrapped import WrappedStream

if TYPE_CHECKING:
    from rich.console import Console


class Screen:
    """`console` gets answers and what commands show, `err_console` notes, questions and errors.

    All text is escaped here or in the streams made here.
    """

    def __init__(self, console: Console, err_console: Console, *, show_markdown: bool) -> None:
        self.console = console
        self.err_console = err_console
        self.show_markdown = show_markdown
        self._has_status = False

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    def say(self, text: str = "", style: str = "") -> None:
        """A result of a command."""
        self._print(self.console, text, style)

    def note(self, text: str = "", style: str = "dim") -> None:
        """A remark that is no result."""
        self._print(self.err_console, text, style)

    def error(self, error: LlmrunError) -> None:
        """All three parts of an error."""
        self._print(self.err_console, f"error: {error.message}", "red")
        if error.why:
            self._print(self.err_console, error.why, "")
        if error.hint:
            self._print(self.err_console, f"try: {error.hint}", "")

    def status(self, text: str) -> None:
        """A passing remark in the current row, gone with the next `clear_status`."""
        if not self._can_redraw:
            return
        room = max(self.err_console.width - 1, 1)
        row, _ = split_cells(escape_line(text), room)
        write_text(self.err_console, f"\r\x1b[K\x1b[?7l{self._dim(row)}\x1b[?7h")
        self._has_status = True

    def clear_status(self) -> None:
        if self._has_status:
            write_text(self.err_console, "\r\x1b[K")
            self._has_status = False

    def make_answer_stream(self) -> TextStream:
        if self.show_markdown and self.console.is_terminal and not self.console.is_dumb_terminal:
            return MarkdownStream(self.console)
        return PlainStream(lambda text: write_text(self.console, text))

    def make_thinking_stream(self) -> TextStream:
        from rich.style import Style

        return WrappedStream(self.console, Style(dim=True))

    @property
    def _can_redraw(self) -> bool:
        console = self.err_console
        return console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self.err_console.color_system else text

    def _print(self, console: Console, text: str, style: str) -> None:
        from rich.text import Text

        safe = escape_controls(text)
        if not console.is_terminal:
            write_text(console, safe + "\n")
            return
        console.print(Text(safe, style=style), soft_wrap=False)


@contextlib.contextmanager
def quiet_keyboard() -> Iterator[None]:
    """Keep keys that are typed during an answer from being echoed into it.

    They are not lost: the input line reads them afterwards. Does nothing where stdin is no
    terminal or the system has no termios.
    """
    try:
        import termios

        fd = sys.stdin.fileno()
        is_terminal = os.isatty(fd)
    except (ImportError, OSError, ValueError, AttributeError):
        is_terminal = False
    if not is_terminal:
        yield
        return
    before: list[Any] = termios.tcgetattr(fd)
    silent = [*before[:3], before[3] & ~(termios.ECHO | termios.ECHONL), *before[4:]]
    try:
        termios.tcsetattr(fd, termios.TCSANOW, silent)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)

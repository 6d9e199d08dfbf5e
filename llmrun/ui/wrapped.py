"""Plain text in one style, wrapped at words while it streams in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmrun.text import escape_controls
from llmrun.ui.live_rows import LiveRows
from llmrun.ui.markdown_inline import RowFlow

if TYPE_CHECKING:
    from rich.console import Console
    from rich.style import Style


class WrappedStream:
    """A `ui.markdown.TextStream` for a terminal. Blank space at both ends is left out."""

    def __init__(self, console: Console, style: Style) -> None:
        self._rows = LiveRows(console)
        self._style = style
        self._flow: RowFlow | None = None
        self._held = ""

    def feed(self, text: str) -> None:
        text = self._held + escape_controls(text)
        if self._flow is None:
            text = text.lstrip()
        body = text.rstrip()
        self._held = text[len(body) :]
        if not body:
            return
        if self._rows.shrank():
            self._rows.keep()
            if self._flow:
                self._flow.drop_tail()
        if self._flow is None:
            self._flow = RowFlow(self._rows.width)
        self._flow.width = self._rows.width
        for row in self._flow.add(body, self._style):
            self._rows.commit(row)
        self._rows.show([self._flow.tail()])
        self._rows.flush()

    def finish(self) -> None:
        if self._flow:
            for row in self._flow.finish():
                self._rows.commit(row)
        self._rows.show(())
        self._rows.flush()
        self._flow, self._held = None, ""

"""Rows of styled text written once each, below them a small tail that may still change.

Finished rows are never touched again, so nothing here depends on the height of the window or on
what scrolled away. The tail is at most `MAX_TAIL_ROWS` rows, drawn with the terminal's automatic
wrap off: a character that the terminal shows wider than expected can then not push the tail over
more rows than are erased later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmrun.text import escape_controls

if TYPE_CHECKING:
    from rich.console import Console
    from rich.style import Style

Piece = tuple[str, "Style"]
Row = Sequence[Piece]

MAX_TAIL_ROWS = 5

_VARIATION_SELECTOR = "\ufe0f"


def count_cells(text: str) -> int:
    """Columns that `text` needs at most on any terminal.

    Counted character by character: terminals that join emoji sequences need fewer columns,
    terminals that do not must still not overflow.
    """
    if text.isascii():
        return len(text)
    from rich.cells import get_character_cell_size

    return sum(map(get_character_cell_size, text)) + text.count(_VARIATION_SELECTOR)


def split_cells(text: str, n_cells: int) -> tuple[str, str]:
    """Cut `text` after at most `n_cells` columns, but after one character at least."""
    if text.isascii():
        return text[: max(n_cells, 1)], text[max(n_cells, 1) :]
    used = 0
    for i, char in enumerate(text):
        used += count_cells(char)
        if used > n_cells and i:
            return text[:i], text[i:]
    return text, ""


def merge_pieces(row: Row) -> list[Piece]:
    """The same row with neighbours of one style joined and empty pieces left out."""
    merged: list[Piece] = []
    for text, style in row:
        if not text:
            continue
        if merged and merged[-1][1] == style:
            merged[-1] = (merged[-1][0] + text, style)
        else:
            merged.append((text, style))
    return merged


def _added_pieces(old: list[Piece], new: list[Piece]) -> list[Piece] | None:
    """What must be written after `old` to get `new`; None when `new` does not begin with `old`."""
    if not old:
        return new
    k = len(old) - 1
    if len(new) <= k or new[:k] != old[:k]:
        return None
    (old_text, old_style), (new_text, new_style) = old[k], new[k]
    if old_style != new_style or not new_text.startswith(old_text):
        return None
    return merge_pieces([(new_text[len(old_text) :], new_style), *new[k + 1 :]])


class LiveRows:
    """Writes finished rows and a changing tail to one console. Call `flush` after each change.

    Where the console is no terminal (or a dumb one) the tail is not drawn and only finished rows
    are written. Everything written passes `escape_controls`: the only control sequences that
    reach the terminal are the ones made here.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._out: list[str] = []
        self._tail: list[list[Piece]] = []
        self._tail_width = 0
        self._is_live = (
            console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows
        )

    @property
    def width(self) -> int:
        """Columns that a row may use. The last column stays free: a full row would put some
        terminals into a wrap-pending state in which erasing misbehaves."""
        return max(self._console.width - 1, 4)

    @property
    def n_tail_rows_max(self) -> int:
        return max(1, min(MAX_TAIL_ROWS, self._console.height - 2))

    def shrank(self) -> bool:
        """Whether the window became narrower than a row of the tail.

        How a terminal re-flows such a row is not known, so it must not be erased: `keep` it.
        """
        if not self._tail:
            return False
        width = self._console.width
        return width < self._tail_width and any(
            sum(count_cells(text) for text, _ in row) > width for row in self._tail
        )

    def keep(self) -> None:
        """Turn the tail, as it is on the screen, into finished rows."""
        if self._tail:
            self._out.append("\n")
            self._tail = []

    def commit(self, row: Row = ()) -> None:
        """Write a finished row in place of the tail."""
        self._erase()
        self._out.append(self._render(merge_pieces(row)).rstrip(" ") + "\n")

    def append(self, text: str, style: Style) -> None:
        """Write text at the cursor that the terminal may wrap as it likes: lines of code."""
        self._erase()
        if text:
            self._out.append(self._render([(text, style)]))

    def end_line(self) -> None:
        """End a line that was written with `append`."""
        self._out.append("\n")

    def show(self, rows: Sequence[Row]) -> None:
        """Draw `rows` as the tail; only the last `n_tail_rows_max` of them are shown."""
        if not self._is_live:
            return
        tail = [merge_pieces(row) for row in rows[-self.n_tail_rows_max :]]
        if not any(tail):
            self._erase()
            return
        if tail == self._tail:
            return
        added = None
        if self._tail and len(tail) == len(self._tail) and tail[:-1] == self._tail[:-1]:
            added = _added_pieces(self._tail[-1], tail[-1])
        if added is not None:
            drawn = self._render(added)
        else:
            drawn = self._to_tail_start()
            drawn += "\x1b[K\n".join(self._render(row) for row in tail) + "\x1b[J"
        self._out.append(f"\x1b[?7l{drawn}\x1b[?7h")
        self._tail = tail
        self._tail_width = self._console.width

    def flush(self) -> None:
        """Hand all that was collected to the terminal in one write."""
        if not self._out:
            return
        text = "".join(self._out)
        self._out = []
        write_text(self._console, text)

    def _to_tail_start(self) -> str:
        if not self._tail:
            return ""
        n_up = len(self._tail) - 1
        return f"\x1b[{n_up}A\r" if n_up else "\r"

    def _erase(self) -> None:
        if self._tail:
            self._out.append(self._to_tail_start() + "\x1b[J")
            self._tail = []

    def _render(self, row: Row) -> str:
        from rich.color import ColorSystem

        name = self._console.color_system
        system = (
            {
                "standard": ColorSystem.STANDARD,
                "256": ColorSystem.EIGHT_BIT,
                "truecolor": ColorSystem.TRUECOLOR,
            }.get(name)
            if name
            else None
        )
        plain = system is None or not self._is_live
        parts: list[str] = []
        for text, style in row:
            text = escape_controls(text)
            if plain or not style:
                parts.append(text)
                continue
            if self._console.no_color:
                style = style.without_color
            parts.append(style.render(text, color_system=system))
        return "".join(parts)


def write_text(console: Console, text: str) -> None:
    """Write to the console's file and flush; what its encoding lacks becomes `?`."""
    file = console.file
    try:
        file.write(text)
    except UnicodeEncodeError:
        encoding = getattr(file, "encoding", None) or "ascii"
        file.write(text.encode(encoding, "replace").decode(encoding))
    file.flush()


def wrap_raw(text: str, width: int) -> list[str]:
    """Cut plain text into rows of at most `width` columns, without regard to words."""
    rows: list[str] = []
    for line in text.split("\n"):
        rest = line.replace("\t", " ")
        while True:
            head, rest = split_cells(rest, width)
            rows.append(head)
            if not rest:
                break
    return rows

"""Answers on a terminal, as they stream in: Markdown rendered append-only, or plain text.

Finished rows are written once and never touched again; below them at most a few rows are redrawn
(`live_rows`). Every character is parsed once, so the work is linear in the length of the answer.
Text is escaped before Markdown sees it and again when it is written, because Markdown's numeric
character references can spell characters that were not in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from llmrun.text import escape_controls
from llmrun.ui.live_rows import LiveRows, Piece, Row, count_cells, wrap_raw
from llmrun.ui.markdown_blocks import Container, Item, LineStart, Quote, read_line_start
from llmrun.ui.markdown_inline import InlineStream, make_parser, wrap_inline
from llmrun.ui.markdown_table import render_table, split_cells_of, wants_table

if TYPE_CHECKING:
    from rich.console import Console

_BULLETS = "•◦▪"
_PREVIEW_CHARS = 600


class TextStream(Protocol):
    """Where an answer goes while it is generated."""

    def feed(self, text: str) -> None:
        """Show more text; pieces may end anywhere."""

    def finish(self) -> None:
        """Show what is left. The cursor then stands at the start of a row. Feeding starts anew."""


class PlainStream:
    """Text as it is, with control characters escaped. `write` gets every piece at once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._ends_line = True

    def feed(self, text: str) -> None:
        if text:
            self._write(escape_controls(text))
            self._ends_line = text.endswith("\n")

    def finish(self) -> None:
        if not self._ends_line:
            self._write("\n")
        self._ends_line = True


class MarkdownStream:
    """Renders Markdown on `console` while it arrives.

    Not rendered: tables without a leading `|`, headings underlined with `===`, HTML and link
    definitions; they appear as they were written. Line ends inside a paragraph are kept.
    """

    def __init__(self, console: Console) -> None:
        from rich.style import Style

        self._rows = LiveRows(console)
        self._parse = make_parser()
        self._none = Style()
        self._dim = Style(dim=True)
        self._heading = {1: Style(bold=True, underline=True), 2: Style(bold=True)}
        self._heading_low = Style(bold=True, italic=True)
        self._code_style = Style(color="cyan")
        self._reset()

    def _reset(self) -> None:
        self._mode: Literal["start", "inline", "buffer", "fence_start", "code"] = "start"
        self._head = ""  # the line so far, while its kind is not known
        self._start: LineStart | None = None
        self._body: list[str] = []  # the rest of a line that is handled when complete
        self._preview = ""  # the end of that, for the tail
        self._containers: tuple[Container, ...] = ()
        self._n_fresh = 0  # how many of the innermost items did not show their marker yet
        self._paragraph: InlineStream | None = None
        self._table: list[str] = []
        self._fence = ""
        self._fence_indent = 0
        self._wants_gap = False
        self._gap_containers: tuple[Container, ...] = ()
        self._has_output = False

    def feed(self, text: str) -> None:
        text = escape_controls(text)
        if self._rows.shrank():
            self._rows.keep()
            if self._paragraph:
                self._paragraph.drop_tail()
        if self._paragraph:
            self._paragraph.set_width(self._rows.width)
        pos = 0
        while pos < len(text):
            if self._mode in ("start", "fence_start"):
                char = text[pos]
                pos += 1
                if self._mode == "start":
                    self._feed_start(char)
                else:
                    self._feed_fence_start(char)
                continue
            end = text.find("\n", pos)
            piece = text[pos:] if end < 0 else text[pos:end]
            self._feed_rest(piece)
            pos += len(piece)
            if end >= 0:
                self._end_line()
                pos += 1
        self._rows.show(self._tail())
        self._rows.flush()

    def finish(self) -> None:
        if self._mode == "start" and self._head:
            self._feed_start("\n")
        elif self._mode == "fence_start":
            self._feed_fence_start("\n")
        elif self._mode != "start":
            self._end_line()
        self._close_blocks()
        self._show_empty_items()
        self._rows.show(())
        self._rows.flush()
        self._reset()

    # Lines ---------------------------------------------------------------------------------------

    def _feed_start(self, char: str) -> None:
        is_complete = char == "\n"
        if not is_complete:
            self._head += char
        start = read_line_start(
            self._head,
            self._containers,
            in_paragraph=self._paragraph is not None,
            is_complete=is_complete,
        )
        if start is None:
            return
        self._head = ""
        self._begin_line(start)
        if is_complete:
            self._end_line()

    def _begin_line(self, start: LineStart) -> None:
        self._start = start
        if self._table and (start.kind != "table" or start.containers != self._containers):
            self._close_blocks()
        if start.is_lazy and self._paragraph:
            self._paragraph.feed("\n")
            self._mode = "inline"
            self._feed_rest(start.body)
            return
        if start.kind != "table" or not self._table:
            self._close_blocks()
        self._open_containers(start)
        if start.kind == "paragraph":
            first, rest = self._prefixes()
            self._paragraph = InlineStream(
                self._commit,
                self._parse,
                self._none,
                width=self._rows.width,
                first=first,
                rest=rest,
            )
            self._mode = "inline"
        elif start.kind == "code":
            self._open_gap()
            self._mode = "code"
        else:
            self._mode = "buffer"
        self._feed_rest(start.body)

    def _feed_rest(self, text: str) -> None:
        if self._mode == "inline":
            assert self._paragraph is not None
            self._paragraph.feed(text)
        elif self._mode == "code":
            self._rows.append(text, self._code_style)
        else:
            self._body.append(text)
            self._preview = (self._preview + text)[-_PREVIEW_CHARS:]

    def _end_line(self) -> None:
        """The line is complete: its newline was read."""
        mode, self._mode = self._mode, "start"
        if mode == "code":
            self._rows.end_line()
            if self._fence:
                self._mode = "fence_start"
            return
        if mode != "buffer":
            return
        body, self._body, self._preview = "".join(self._body), [], ""
        assert self._start is not None
        kind = self._start.kind
        if kind == "blank":
            self._want_gap()
        elif kind == "heading":
            self._write_heading(body)
        elif kind == "rule":
            first, _ = self._prefixes()
            used = sum(count_cells(text) for text, _ in first)
            self._commit([*first, ("─" * max(self._rows.width - used, 3), self._dim)])
        elif kind == "table":
            self._table.append(body)
        elif kind == "fence":
            self._open_fence(body)

    # Blocks --------------------------------------------------------------------------------------

    def _close_blocks(self) -> None:
        """End the open paragraph or table."""
        if self._paragraph:
            self._paragraph.finish()
            self._paragraph = None
        if self._table:
            lines, self._table = self._table, []
            self._write_table(lines)

    def _open_containers(self, start: LineStart) -> None:
        if start.kind == "blank":
            self._containers = start.containers
            return
        n_kept = len(start.containers) - start.n_new
        if start.n_new or n_kept < len(self._containers):
            self._show_empty_items()
            self._n_fresh = start.n_new
        self._containers = start.containers

    def _show_empty_items(self) -> None:
        """Write the markers of items that got no text."""
        if self._n_fresh:
            first, _ = self._prefixes()
            self._commit(first)

    def _prefixes(self) -> tuple[list[Piece], list[Piece]]:
        """What stands before the first row of a block, and before its other rows."""
        first: list[Piece] = []
        rest: list[Piece] = []
        n_items = 0
        n_old = len(self._containers) - self._n_fresh
        for i, container in enumerate(self._containers):
            if isinstance(container, Quote):
                first.append(("▌ ", self._dim))
                rest.append(("▌ ", self._dim))
                continue
            marker = container.marker
            if marker in "-*+":
                marker = _BULLETS[min(n_items, len(_BULLETS) - 1)]
            n_items += 1
            blank = " " * (len(marker) + 1)
            first.append((f"{marker} " if i >= n_old else blank, self._none))
            rest.append((blank, self._none))
        self._n_fresh = 0
        while sum(count_cells(text) for text, _ in first) > self._rows.width // 2:
            first, rest = first[1:], rest[1:]
        return first, rest

    def _write_heading(self, body: str) -> None:
        level = len(body) - len(body.lstrip("#"))
        text = body[level:].strip()
        bare = text.rstrip("#")
        if bare != text and (not bare or bare.endswith(" ")):
            text = bare.rstrip()
        style = self._heading.get(level, self._heading_low)
        pieces = [(part, style + own) for part, own in self._parse(text)]
        first, rest = self._prefixes()
        self._want_gap()
        for row in wrap_inline(pieces, width=self._rows.width, first=first, rest=rest):
            self._commit(row)

    def _write_table(self, lines: list[str]) -> None:
        first, rest = self._prefixes()
        used = sum(count_cells(text) for text, _ in rest)
        if wants_table(lines, self._rows.width - used):
            cells = [
                [self._parse(cell) for cell in split_cells_of(line)]
                for i, line in enumerate(lines)
                if i != 1
            ]
            table_rows = render_table(cells, lines[1], self._rows.width - used)
            for i, row in enumerate(table_rows):
                self._commit([*(rest if i else first), *row])
            return
        for i, line in enumerate(lines):
            prefix = rest if i else first
            for row in wrap_inline(
                self._parse(line), width=self._rows.width, first=prefix, rest=rest
            ):
                self._commit(row)

    def _open_fence(self, body: str) -> None:
        text = body.lstrip(" ")
        run = len(text) - len(text.lstrip(text[0]))
        info = text[run:].strip()
        if text[0] == "`" and "`" in info:
            first, rest = self._prefixes()
            for row in wrap_inline(
                self._parse(text), width=self._rows.width, first=first, rest=rest
            ):
                self._commit(row)
            return
        first, _ = self._prefixes()
        label = f"─── {info}" if info else "───"
        for row in wrap_inline(
            [(label, self._dim)], width=self._rows.width, first=first, rest=first
        ):
            self._commit(row)
        self._fence = text[0] * run
        self._fence_indent = len(body) - len(text) + _indent_of(self._containers)
        self._mode = "fence_start"

    def _feed_fence_start(self, char: str) -> None:
        """The first characters of a line inside a fence, held back while it may be the last one."""
        if char in (" ", "\t", self._fence[0]) and char != "\n":
            self._body.append(char)
            return
        in_quote = any(isinstance(c, Quote) for c in self._containers)
        if char == ">" and in_quote and not "".join(self._body).strip():
            self._body.clear()
            return
        held = "".join(self._body)
        self._body.clear()
        if char == "\n":
            mark = held.strip()
            if len(mark) >= len(self._fence) and mark == self._fence[0] * len(mark):
                self._rows.commit([("───", self._dim)])
                self._fence = ""
                self._mode = "start"
                return
        n_cut = min(self._fence_indent, len(held) - len(held.lstrip(" ")))
        if char == "\n":
            self._rows.append(held[n_cut:], self._code_style)
            self._rows.end_line()
            return
        self._mode = "code"
        self._rows.append(held[n_cut:] + char, self._code_style)

    # Output --------------------------------------------------------------------------------------

    def _want_gap(self) -> None:
        if not self._wants_gap:
            self._wants_gap = True
            self._gap_containers = self._containers

    def _open_gap(self) -> None:
        """Write the blank row that separates blocks, once something follows it."""
        if self._wants_gap and self._has_output:
            quotes: list[Piece] = []
            for before, now in zip(self._gap_containers, self._containers, strict=False):
                if not (isinstance(before, Quote) and isinstance(now, Quote)):
                    break
                quotes.append(("▌ ", self._dim))
            self._rows.commit(quotes)
        self._wants_gap = False
        self._has_output = True

    def _commit(self, row: Row) -> None:
        self._open_gap()
        self._rows.commit(row)

    def _tail(self) -> Sequence[Row]:
        width = self._rows.width
        rows: list[Row] = []
        if self._paragraph:
            rows.extend(self._paragraph.tail())
        if self._mode == "start" and self._head.strip():
            rows.extend([(line, self._none)] for line in wrap_raw(self._head, width))
        elif self._mode == "buffer":
            rows.extend([(line, self._dim)] for line in wrap_raw(self._preview, width))
        elif self._table:
            rows.append([(f"table, {len(self._table)} rows …"[:width], self._dim)])
        if rows and self._wants_gap and self._has_output:
            rows.insert(0, [])
        return rows


def _indent_of(containers: tuple[Container, ...]) -> int:
    """Columns that code inside these containers is indented by."""
    return sum(c.content for c in containers if isinstance(c, Item))

"""Tables of Markdown: recognised and laid out once they are complete."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmrun.ui.live_rows import Piece, Row

_DELIMITER = re.compile(r"\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
_PIPE = re.compile(r"(?<!\\)\|")
_MIN_COLUMN_CELLS = 4


def split_cells_of(line: str) -> list[str]:
    """The cells of one table row; `\\|` is a bar inside a cell."""
    text = line.strip()
    text = text.removeprefix("|")
    if text.endswith("|") and not text.endswith("\\|"):
        text = text[:-1]
    return [cell.strip().replace("\\|", "|") for cell in _PIPE.split(text)]


def wants_table(lines: Sequence[str], width: int) -> bool:
    """Whether these lines are a table (header, delimiter row) that fits `width` columns at all."""
    if len(lines) < 2 or not _DELIMITER.fullmatch(lines[1].strip()):
        return False
    n_columns = len(split_cells_of(lines[0]))
    return (
        n_columns == len(split_cells_of(lines[1])) and n_columns * (_MIN_COLUMN_CELLS + 2) <= width
    )


def render_table(
    cells: Sequence[Sequence[Sequence[Piece]]], delimiter: str, width: int
) -> list[Row]:
    """Lay out parsed cells, header first, in at most `width` columns."""
    import io

    from rich import box
    from rich.console import Console, JustifyMethod
    from rich.style import Style
    from rich.table import Table
    from rich.text import Text

    def text_of(pieces: Sequence[Piece]) -> Text:
        return Text.assemble(*((text, style) for text, style in pieces))

    none = Style()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for cell, mark in zip(cells[0], split_cells_of(delimiter), strict=True):
        justify: JustifyMethod = (
            "left" if not mark.endswith(":") else "center" if mark.startswith(":") else "right"
        )
        table.add_column(text_of(cell), justify=justify, overflow="fold")
    n_columns = len(cells[0])
    for row in cells[1:]:
        # Cells beyond the last column are kept in that column.
        extra = [piece for cell in row[n_columns:] for piece in ((" ", none), *cell)]
        fitting = [*row[: n_columns - 1], [*row[n_columns - 1], *extra]] if extra else row
        padded = [text_of(cell) for cell in fitting]
        table.add_row(*padded, *([""] * (n_columns - len(padded))))
    layout = Console(file=io.StringIO(), width=width, color_system=None)
    return [
        [(segment.text, segment.style or none) for segment in line if not segment.control]
        for line in layout.render_lines(table, pad=False)
    ]

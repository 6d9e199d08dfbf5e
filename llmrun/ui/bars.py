"""Bars of stacked amounts, one a row, and lines in several styles. They say the same without
colour: each kind of part has its own character, and where only ASCII can be shown an ASCII one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmrun.text import escape_line
from llmrun.ui.output import Output

Segment = tuple[str, str]
"""(text, Rich style). The text is safe to print."""

_FRAME = ("▕", "▏")
_ASCII_FRAME = ("[", "]")
_LEAST_WIDTH = 10


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of part: its name in the legend, its character, the one in ASCII, its style."""

    name: str
    char: str
    ascii_char: str
    style: str


@dataclass(frozen=True, slots=True)
class Bar:
    """`amounts` are those of the kinds in order, in one unit. `note` stands behind the bar."""

    label: str
    amounts: tuple[int, ...]
    note: str = ""
    note_style: str = ""


def render_bars(
    kinds: Sequence[Kind], bars: Sequence[Bar], width: int, *, ascii_only: bool = False
) -> list[list[Segment]]:
    """The rows of `bars`, each of its own full length, within `width` columns: label, bar, note.

    Where that leaves too little for the bar, the note goes to a row of its own; a terminal narrower
    still gets the notes alone. A part that is not 0 has at least one character if there are enough.
    """
    if not bars:
        return []
    labels = [escape_line(bar.label) for bar in bars]
    notes = [escape_line(bar.note) for bar in bars]
    label_width, note_width = max(map(len, labels)), max(map(len, notes))
    open_, close = _ASCII_FRAME if ascii_only else _FRAME
    n_cells = width - label_width - 2 - 2 - 2 - note_width
    has_own_row = n_cells < _LEAST_WIDTH
    if has_own_row:
        n_cells = width - label_width - 2 - 2
    rows: list[list[Segment]] = []
    for bar, label, note in zip(bars, labels, notes, strict=True):
        row: list[Segment] = [(f"{label:<{label_width}}  ", "")]
        if n_cells >= _LEAST_WIDTH:
            row.append((open_, "dim"))
            for kind, n in zip(kinds, share_out(bar.amounts, n_cells), strict=True):
                if n:
                    row.append(((kind.ascii_char if ascii_only else kind.char) * n, kind.style))
            row.append((close, "dim"))
            if has_own_row:
                rows.append(row)
                row = [(" " * (label_width + 2), "")]
            else:
                row.append(("  ", ""))
        row.append((note, bar.note_style))
        rows.append(row)
    return rows


def render_legend(
    kinds: Sequence[Kind], width: int, *, ascii_only: bool = False
) -> list[list[Segment]]:
    """What the characters mean, in as many rows as `width` columns need."""
    rows: list[list[Segment]] = []
    left = 0
    for kind in kinds:
        char = kind.ascii_char if ascii_only else kind.char
        entry = [(char * 2, kind.style), (f" {kind.name}", "")]
        n_columns = 3 + len(kind.name)
        if rows and n_columns + 2 <= left:
            rows[-1] += [("  ", ""), *entry]
            left -= n_columns + 2
        else:
            rows.append(entry)
            left = width - n_columns
    return rows


def share_out(amounts: Sequence[int], n_cells: int) -> list[int]:
    """Whole cells for `amounts`, `n_cells` in all, by the largest remainder; at least one for each
    that is above 0 where there are enough. All 0 gives all 0."""
    total = sum(amounts)
    if total <= 0 or n_cells <= 0:
        return [0] * len(amounts)
    cells = [amount * n_cells // total for amount in amounts]
    by_rest = sorted(range(len(amounts)), key=lambda i: -(amounts[i] * n_cells % total))
    for i in by_rest[: n_cells - sum(cells)]:
        cells[i] += 1
    for i, amount in enumerate(amounts):
        largest = max(range(len(cells)), key=cells.__getitem__)
        if amount > 0 and cells[i] == 0 and cells[largest] > 1:
            cells[i] += 1
            cells[largest] -= 1
    return cells


def show_segments(output: Output, row: Sequence[Segment]) -> None:
    """Print one line of the result: in colour on a terminal, plain text elsewhere."""
    if not output.environment.stdout_is_tty:
        output.line("".join(text for text, _ in row).rstrip())
        return
    from rich.text import Text

    output.stdout.print(Text.assemble(*((text, style) for text, style in row)))


def is_ascii_only(output: Output) -> bool:
    """Whether the result's stream cannot show the characters of a bar."""
    encoding = getattr(output.environment.stdout, "encoding", None) or "utf-8"
    try:
        "".join(("▕▏█▓▒░·►─", "")).encode(encoding)
    except (UnicodeError, LookupError):
        return True
    return False

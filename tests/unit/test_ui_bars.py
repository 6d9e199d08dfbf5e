"""Bars: honest lengths, the same without colour, and lines that fit."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.config import Environment
from llmrun.ui.bars import (
    Bar,
    Kind,
    is_ascii_only,
    render_bars,
    render_legend,
    share_out,
    show_segments,
)
from llmrun.ui.output import Output
from tests.fakes.cli import Tty

KINDS = (Kind("used", "█", "#", "blue"), Kind("free", "·", ".", "green"))


def text_of(row: list[tuple[str, str]]) -> str:
    return "".join(text for text, _ in row)


def test_a_bar_is_as_long_as_told_and_its_parts_are_in_proportion() -> None:
    bars = [Bar("RAM", (30, 70), "3 of 10"), Bar("CUDA0", (1, 999), "1")]
    rows = [text_of(row) for row in render_bars(KINDS, bars, 41)]
    assert rows == [
        "RAM    ▕" + "█" * 7 + "·" * 16 + "▏  3 of 10",
        "CUDA0  ▕" + "█" + "·" * 22 + "▏  1",
    ]


def test_without_unicode_other_characters_say_the_same() -> None:
    (row,) = render_bars(KINDS, [Bar("RAM", (50, 50), "x")], 30, ascii_only=True)
    text = text_of(row)
    assert text.isascii() and text.count("#") == text.count(".") == 10
    assert text_of(render_legend(KINDS, 80, ascii_only=True)[0]) == "## used  .. free"
    assert [text_of(row) for row in render_legend(KINDS, 15)] == ["██ used", "·· free"]


@pytest.mark.parametrize("width", [10, 20, 30, 45, 80])
def test_a_narrow_terminal_gets_the_note_below_or_alone(width: int) -> None:
    note = "4.98 GB of 16.0 GB"
    rows = [text_of(row) for row in render_bars(KINDS, [Bar("RAM", (1, 1), note)], width)]
    assert note in "".join(rows)
    if width >= 23:
        assert max(map(len, rows)) <= width
    if width >= 30:
        assert "█" in "".join(rows)


def test_labels_cannot_drive_the_terminal() -> None:
    (row,) = render_bars(KINDS, [Bar("a\x1b[2J", (1, 1), "n\x07")], 80)
    assert "\x1b" not in text_of(row) and "\x07" not in text_of(row)


@given(st.lists(st.integers(0, 10**13), max_size=7), st.integers(0, 200))
def test_cells_add_up(amounts: list[int], n_cells: int) -> None:
    cells = share_out(amounts, n_cells)
    assert len(cells) == len(amounts) and all(n >= 0 for n in cells)
    if sum(amounts) and n_cells:
        assert sum(cells) == n_cells
    n_parts = sum(amount > 0 for amount in amounts)
    for amount, n in zip(amounts, cells, strict=True):
        assert n == 0 or amount > 0
        if amount and n_cells >= n_parts:
            assert n > 0


def test_nothing_has_no_bar() -> None:
    assert render_bars(KINDS, [], 80) == [] and share_out([0, 0], 9) == [0, 0]


def output(stream: io.StringIO, tmp_path: Path, **environ: str) -> Output:
    folders = [tmp_path] * 4
    world = {"TERM": "xterm-256color", "COLUMNS": "80"} | environ
    return Output(Environment(io.StringIO(), stream, io.StringIO(), world, *folders))


def test_colour_is_for_terminals_only(tmp_path: Path) -> None:
    row = [("ab", "green"), ("  ", "")]
    plain = io.StringIO()
    show_segments(output(plain, tmp_path), row)
    assert plain.getvalue() == "ab\n"
    coloured = Tty()
    show_segments(output(coloured, tmp_path), row)
    assert "\x1b[32mab" in coloured.getvalue()
    without = Tty()
    show_segments(output(without, tmp_path, NO_COLOR="1"), row)
    assert "\x1b[32m" not in without.getvalue()


def test_the_streams_encoding_decides_about_characters(tmp_path: Path) -> None:
    for encoding, expected in (("utf-8", False), ("ascii", True), ("latin-1", True)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        assert is_ascii_only(output(stream, tmp_path)) is expected  # type: ignore[arg-type]
    assert is_ascii_only(output(io.StringIO(), tmp_path)) is False

"""Inline Markdown as a stream: styled rows come out as soon as they cannot change any more.

A piece of text is parsed once, at the first space (or wide character) where no emphasis, code span
or link is open. A construct that stays open for `MAX_OPEN_CHARS` is taken literally.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from llmrun.ui.live_rows import Piece, Row, count_cells, split_cells, wrap_raw

if TYPE_CHECKING:
    from rich.style import Style

MAX_OPEN_CHARS = 320

_SPECIAL = re.compile(r"[\\`*_~\[<&]")
# Wide scripts are written without spaces: a row may break after each of their characters. Emoji
# are left out, because a sequence of several makes one picture.
_WIDE = (
    "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6"
)
_WIDE_ASTRAL = "\U00020000-\U0003fffd"
_CUT = re.compile(f"[\\s{_WIDE}{_WIDE_ASTRAL}]")
_RUNS = re.compile(f"\n|[^\\S\n]+|[{_WIDE}{_WIDE_ASTRAL}]|[^\\s{_WIDE}{_WIDE_ASTRAL}]+")
# Closing punctuation of wide scripts stays on the row of what it closes.
_NO_ROW_START = frozenset("、。，．！？；：）」』】》〉〕ー…")
_MARKS = re.compile(r"\\.|`+|\*+|_+|~~+|\[|\](?:\()?|\)", re.DOTALL)
_LATEX_ESCAPE = re.compile(r"\\(?=[()\[\]])")

Parse = Callable[[str], list[Piece]]


def has_open_mark(text: str) -> bool:
    """Whether emphasis, strikethrough, a code span or a link may still be open after `text`.

    A cheap approximation of CommonMark's delimiter rules: a wrong answer changes how marks look,
    never what text is shown.
    """
    stack: list[tuple[str, int]] = []
    pos = 0
    while match := _MARKS.search(text, pos):
        mark, pos = match.group(), match.end()
        kind = mark[0]
        if kind == "\\":
            continue
        if kind == "`":
            end = re.compile(rf"(?<!`){mark}(?!`)").search(text, pos)
            if end is None:
                return True
            pos = end.end()
            continue
        if kind == "[":
            stack.append(("[", 1))
            continue
        if kind == "]":
            if ("[", 1) in stack:
                while stack.pop() != ("[", 1):
                    pass
                if mark == "](":
                    stack.append(("(", 1))
            continue
        if kind == ")":
            if ("(", 1) in stack:
                while stack.pop() != ("(", 1):
                    pass
            continue
        before = text[match.start() - 1 : match.start()]
        _track_run(stack, kind, len(mark), before, text[pos : pos + 1])
    return bool(stack)


def _track_run(stack: list[tuple[str, int]], kind: str, n: int, before: str, after: str) -> None:
    can_open = bool(after) and not after.isspace()
    can_close = bool(before) and not before.isspace()
    if kind == "_":
        can_open = can_open and not before.isalnum()
        can_close = can_close and not after.isalnum()
    if can_close:
        for i in range(len(stack) - 1, -1, -1):
            if stack[i][0] != kind:
                continue
            n_open = stack[i][1]
            del stack[i:]
            if n_open > n:
                stack.append((kind, n_open - n))
            n = max(0, n - n_open)
            if n == 0:
                return
            break
    if can_open:
        stack.append((kind, n))


def make_parser() -> Parse:
    """A function that turns inline Markdown into styled text. Links show their target."""
    from markdown_it import MarkdownIt
    from rich.style import Style

    md = MarkdownIt("commonmark", {"html": False}).enable("strikethrough")
    opening = {
        "strong": Style(bold=True),
        "em": Style(italic=True),
        "s": Style(strike=True),
        "link": Style(underline=True),
    }
    code = Style(color="cyan")
    target = Style(dim=True)

    def parse(text: str) -> list[Piece]:
        # `\(` and `\[` begin formulas far more often in answers than they escape a bracket.
        tokens = md.parseInline(_LATEX_ESCAPE.sub(r"\\\\", text))
        pieces: list[Piece] = []
        styles = [Style()]
        href = link_text = ""
        for token in tokens[0].children or []:
            name, _, kind = token.type.rpartition("_")
            if name in opening and kind == "open":
                styles.append(styles[-1] + opening[name])
                if name == "link":
                    href, link_text = str(token.attrs.get("href", "")), ""
            elif name in opening and kind == "close":
                styles.pop()
                if name == "link" and href and href.removeprefix("mailto:") != link_text:
                    pieces.append((f" ({href})", target))
            elif token.type == "code_inline":
                pieces.append((token.content, styles[-1] + code))
                link_text += token.content
            elif token.type in ("softbreak", "hardbreak"):
                pieces.append(("\n", styles[-1]))
            elif token.type == "image":
                pieces.append((token.content, styles[-1] + opening["em"]))
                pieces.append((f" ({token.attrs.get('src', '')})", target))
            else:
                pieces.append((token.content, styles[-1]))
                link_text += token.content
        return pieces

    return parse


class RowFlow:
    """Greedy word wrap of styled text: `add` yields each row once it is full."""

    def __init__(self, width: int, first: Row = (), rest: Row = ()) -> None:
        self.width = width
        self._row = list(first)
        self._rest = list(rest)
        self._n_prefix = len(self._row)
        self._cells = sum(count_cells(text) for text, _ in self._row)
        self._rest_cells = sum(count_cells(text) for text, _ in self._rest)
        self._space: Piece | None = None
        self._word: list[Piece] = []
        self._word_cells = 0

    def add(self, text: str, style: Style) -> Iterator[Row]:
        for match in _RUNS.finditer(text):
            run = match.group()
            if run == "\n":
                yield from self._place_word()
                yield self._take_row()
            elif run.isspace():
                yield from self._place_word()
                if len(self._row) > self._n_prefix:
                    self._space = (" ", style)
            else:
                if _CUT.match(run) and run not in _NO_ROW_START:
                    yield from self._place_word()
                self._word.append((run, style))
                self._word_cells += count_cells(run)
                yield from self._chop_word()

    def finish(self) -> Iterator[Row]:
        """The last row, if it holds anything."""
        yield from self._place_word()
        if self._row and (len(self._row) > self._n_prefix or self._row[-1][0].strip()):
            yield self._take_row()

    def tail(self, *, is_followed: bool = False) -> list[Piece]:
        """The row that is still open. `is_followed`: more text will be shown behind it."""
        space = [self._space] if self._space and (self._word or is_followed) else []
        return [*self._row, *space, *self._word]

    def drop_tail(self) -> None:
        """Forget the open row: it was written in another way."""
        self._take_row()
        self._word, self._word_cells = [], 0

    def _take_row(self) -> Row:
        row = self._row
        self._row = list(self._rest)
        self._n_prefix = len(self._row)
        self._cells = self._rest_cells
        self._space = None
        return row

    def _place_word(self) -> Iterator[Row]:
        if not self._word:
            return
        n_space = 1 if self._space else 0
        if self._cells + n_space + self._word_cells > self.width and self._has_text():
            yield self._take_row()
            n_space = 0
        if self._space and n_space:
            self._row.append(self._space)
        self._space = None
        self._row.extend(self._word)
        self._cells += n_space + self._word_cells
        self._word, self._word_cells = [], 0

    def _has_text(self) -> bool:
        return len(self._row) > self._n_prefix

    def _chop_word(self) -> Iterator[Row]:
        """Cut a word that is longer than a whole row."""
        while self._word_cells > max(self.width - self._rest_cells, 1):
            if self._has_text():
                yield self._take_row()
            room = max(self.width - self._cells, 1)
            rest: list[Piece] = []
            for text, style in self._word:
                if rest:
                    rest.append((text, style))
                    continue
                cells = count_cells(text)
                if cells <= room:
                    self._row.append((text, style))
                    room -= cells
                    continue
                head, left = split_cells(text, room) if room else ("", text)
                self._row.append((head, style))
                rest.append((left, style))
            yield self._take_row()
            self._word = [piece for piece in rest if piece[0]]
            self._word_cells = sum(count_cells(text) for text, _ in self._word)


class InlineStream:
    """One paragraph, fed in pieces of any size; `emit` receives each finished row."""

    def __init__(
        self,
        emit: Callable[[Row], None],
        parse: Parse,
        base: Style,
        *,
        width: int,
        first: Row = (),
        rest: Row = (),
    ) -> None:
        self._emit = emit
        self._parse = parse
        self._base = base
        self._width = width
        self._flow = RowFlow(width, first, rest)
        self._unit = ""
        self._has_special = False

    def feed(self, text: str) -> None:
        pos = 0
        while pos < len(text):
            # A cut point, or the end of what an open construct may hold, whichever comes first.
            limit = pos + MAX_OPEN_CHARS + 1 - len(self._unit)
            match = _CUT.search(text, pos, limit)
            end = match.end() if match else min(limit, len(text))
            self._grow(text[pos:end])
            pos = end
            if match:
                self._cut()
            if len(self._unit) > MAX_OPEN_CHARS:
                self._flush_unit()

    def finish(self) -> None:
        self._flush_unit()
        self._emit_all(self._flow.finish())

    def tail(self) -> list[Row]:
        """The open row and the text that is not parsed yet, cut into rows."""
        row = self._flow.tail(is_followed=bool(self._unit))
        if not self._unit:
            return [row]
        used = sum(count_cells(text) for text, _ in row)
        lines = wrap_raw(" " * used + self._unit, self._width)
        more: list[Row] = [[(line, self._base)] for line in lines[1:]]
        return [[*row, (lines[0][used:], self._base)], *more]

    def set_width(self, width: int) -> None:
        """The window changed: rows from here on have at most `width` columns."""
        self._width = self._flow.width = width

    def drop_tail(self) -> None:
        self._flow.drop_tail()
        self._unit, self._has_special = "", False

    def _grow(self, text: str) -> None:
        self._unit += text
        if not self._has_special:
            self._has_special = _SPECIAL.search(text) is not None

    def _cut(self) -> None:
        if self._has_special and has_open_mark(self._unit):
            return
        self._flush_unit()

    def _flush_unit(self) -> None:
        unit, has_special = self._unit, self._has_special
        self._unit, self._has_special = "", False
        if not has_special:
            self._emit_all(self._flow.add(unit, self._base))
            return
        body = unit.rstrip()
        space = unit[len(body) :]
        if space.startswith("\n") and body.endswith("\\"):
            body = body[:-1]  # a hard line break; every line end is one here
        start = body[: len(body) - len(body.lstrip())]
        self._emit_all(self._flow.add(start, self._base))
        for text, style in self._parse(body[len(start) :]):
            self._emit_all(self._flow.add(text, self._base + style))
        self._emit_all(self._flow.add(space, self._base))

    def _emit_all(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._emit(row)


def wrap_inline(
    pieces: Sequence[Piece], *, width: int, first: Row = (), rest: Row = ()
) -> list[Row]:
    """Wrap text that is complete already."""
    flow = RowFlow(width, first, rest)
    rows = [row for text, style in pieces for row in flow.add(text, style)]
    return [*rows, *flow.finish()]

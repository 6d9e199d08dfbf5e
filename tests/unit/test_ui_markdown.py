"""The streaming renderer: what it shows, that chunks do not matter, and that the work is linear."""

from __future__ import annotations

import io
import re

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llmrun.ui import markdown, markdown_inline
from llmrun.ui.live_rows import count_cells
from llmrun.ui.markdown import MarkdownStream, PlainStream
from llmrun.ui.wrapped import WrappedStream

SAMPLE = """\
# Heading with `code`

A paragraph that is long enough to wrap, with **bold text that spans quite some words so that it
wraps too**, a [link](https://example.org/x) and `inline code`. Use **kwargs, 2 * 3 and snake_case.
Second line.

1. First
   - nested with more text than fits into one row of a terminal that is only forty columns wide
     - third
2. Second

   More of the second.
3. Third
  - sloppy nesting
***
> quoted **bold**
> more
>
> - item

```python
def f(x):
    return x  # a comment that is longer than the window of forty columns

```

| Name | Größe | 说明 |
|:-----|------:|:--:|
| a `x` | 12 | 中文 |
| **b** | 3456 | ok | extra |

中文段落没有空格,所以必须在字符之间换行。这里有**粗体**文字和`代码`。这里继续写很多字直到超过一行。
Family 👨‍👩‍👧‍👦 and flags 🇩🇪 and ❤️ end.

    indented code

Formula \\( a_1 + b_2 \\) and &amp; done
"""


def plain_rows(text: str, step: int = 0, width: int = 60) -> list[str]:
    """Rendered without a terminal: finished rows only."""
    out = io.StringIO()
    stream = MarkdownStream(Console(file=out, width=width, force_terminal=False))
    feed(stream, text, step)
    return out.getvalue().split("\n")[:-1]


def feed(stream, text, step=0):
    for i in range(0, len(text), step or max(len(text), 1)):
        stream.feed(text[i : i + (step or len(text))])
    stream.finish()


def on_terminal(text: str, step: int = 0, width: int = 40, height: int = 25, make=MarkdownStream):
    """The lines of a terminal with all that scrolled away, and the bytes that were written."""
    out = io.StringIO()
    console = Console(
        file=out, width=width, height=height, force_terminal=True, color_system="256", _environ={}
    )
    feed(make(console), text, step)
    screen = pyte.HistoryScreen(width, height, history=100_000, ratio=1)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(out.getvalue())
    history = ["".join(line[i].data for i in range(width)) for line in screen.history.top]
    return [line.rstrip() for line in [*history, *screen.display]], out.getvalue(), screen


@pytest.mark.parametrize(
    ("source", "rows"),
    [
        ("Hello **bold** and *it* and `c d`.", ["Hello bold and it and c d."]),
        ("one\ntwo", ["one", "two"]),
        ("one\n\n\n\ntwo", ["one", "", "two"]),
        ("# Title #\ntext", ["Title", "text"]),
        ("text\n# Title", ["text", "", "Title"]),
        ("- a\n- b\n  - c", ["• a", "• b", "  ◦ c"]),
        ("- a\n\n  more\n- b", ["• a", "", "  more", "• b"]),
        ("- a\nlazy", ["• a", "  lazy"]),
        ("1. a\n  - b", ["1. a", "   ◦ b"]),
        ("9. a\n10. b", ["9. a", "10. b"]),
        ("born\n1984. A year", ["born", "1984. A year"]),
        ("> a\n> b\n\nc", ["▌ a", "▌ b", "", "c"]),
        ("---", ["─" * 59]),
        ("**not closed", ["**not closed"]),
        ("a * b * c and 2 ** 3", ["a * b * c and 2 ** 3"]),
        ("snake_case_name __init__", ["snake_case_name init"]),
        ("[t](http://u/x) <http://v/>", ["t (http://u/x) http://v/"]),
        ("![alt](pic.png)", ["alt (pic.png)"]),
        ("\\*not\\* \\(x_1\\)", ["*not* \\(x_1\\)"]),
        ("<div>&lt;b&gt;</div>", ["<div><b></div>"]),
        ("```py\nx = 1\n\ty\n```\nend", ["─── py", "x = 1", "\ty", "───", "end"]),
        ("```\n**raw** <b> &amp;\n```", ["───", "**raw** <b> &amp;", "───"]),
        ("````\n```\n````", ["───", "```", "───"]),
        ("- a\n  ```\n  x\n    y\n  ```", ["• a", "  ───", "x", "  y", "───"]),
        ("    code\nx", ["code", "x"]),
        ("```\nunclosed", ["───", "unclosed"]),
        ("| a | b |\n|---|--:|\n| 1 | 2 |", ["a   b", "─────", "1   2"]),
        ("| no table", ["| no table"]),
        ("#hash", ["#hash"]),
        ("", []),
        ("\n\n", []),
        ("-", ["•"]),
    ],
)
def test_blocks(source, rows):
    assert plain_rows(source) == rows
    assert plain_rows(source, step=1) == rows


@pytest.mark.parametrize("width", [20, 40, 80])
def test_character_by_character_equals_whole(width):
    whole = plain_rows(SAMPLE, width=width)
    for step in (1, 2, 7):
        assert plain_rows(SAMPLE, step, width) == whole
    screen_whole = on_terminal(SAMPLE, 0, width)[0]
    for step in (1, 3):
        assert on_terminal(SAMPLE, step, width)[0] == screen_whole


PIECES = st.sampled_from(
    [*"ab中。*_`~#>|-+1.)([]!\\<&; \t\n", "word", "**", "```", "\n\n", "- ", "> ", "1. ", "    ",
     "🎉", "| a | b |\n", "|-|-|\n", "](u)"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=60), st.integers(1, 5))
def test_chunks_do_not_matter_for_any_text(pieces, step):
    text = "".join(pieces)
    assert plain_rows(text, step, 24) == plain_rows(text, 0, 24)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=60))
def test_no_letter_is_lost(pieces):
    text = "".join(pieces)
    shown = "".join(plain_rows(text, width=500))
    for letter in "ab中🎉w":
        assert shown.count(letter) >= text.count(letter)


def test_rows_fit_and_no_line_is_doubled_on_a_narrow_terminal():
    lines = [f"第{i}行 wide 文字 🎉🎉🎉 **粗{i}体 bold** 中 end{i}x" for i in range(40)]
    for width in (10, 14, 23):
        shown, _, _ = on_terminal("\n".join(lines), 1, width, height=6)
        text = "".join(shown).replace(" ", "")
        for i in range(40):
            assert text.count(f"end{i}x") == 1
            assert text.count(f"第{i}行") == 1


@pytest.mark.parametrize("width", [8, 13, 40])
def test_no_row_is_wider_than_the_window_on_any_terminal(width):
    text = "👩‍👩‍👧‍👦❤️中文 wide **文字❤️** `co de` averyveryveryverylongword " * 5
    for row in plain_rows(text, width=width):
        assert count_cells(row) < width


def test_open_text_is_visible_before_its_line_ends():
    out = io.StringIO()
    console = Console(file=out, width=40, height=10, force_terminal=True, _environ={})
    stream = MarkdownStream(console)
    screen = pyte.Screen(40, 10)
    screen.set_mode(pyte.modes.LNM)
    stream.feed("A **bold sta")
    pyte.Stream(screen).feed(out.getvalue())
    assert screen.display[0].rstrip() == "A **bold sta"
    out.seek(0)
    out.truncate()
    stream.feed("rt** ok")
    pyte.Stream(screen).feed(out.getvalue())
    assert screen.display[0].rstrip() == "A bold start ok"


def test_finished_rows_are_never_erased():
    _, written, _ = on_terminal(SAMPLE, 1, 40, height=12)
    ups = [int(n) for n in re.findall(r"\x1b\[(\d+)A", written)]
    assert ups, "the sample has marks that stay open over more than one row"
    assert max(ups) < 5
    assert "\x1b[2J" not in written and "\x1b[H" not in written


def test_only_added_text_is_written_while_a_row_grows():
    out = io.StringIO()
    stream = MarkdownStream(Console(file=out, width=80, force_terminal=True, _environ={}))
    stream.feed("Hello ")
    stream.feed("there ")
    out.seek(0)
    out.truncate()
    stream.feed("friend")
    assert "friend" in out.getvalue()
    assert "Hello" not in out.getvalue()


def test_code_is_written_at_once_and_never_rewritten():
    out = io.StringIO()
    stream = MarkdownStream(Console(file=out, width=20, force_terminal=True, _environ={}))
    stream.feed("```\nx = ")
    assert re.sub(r"\x1b\[\d*m", "", out.getvalue()).endswith("x = ")
    out.seek(0)
    out.truncate()
    stream.feed("a long line of code that is wider than the window\n")
    assert out.getvalue() == "\x1b[36ma long line of code that is wider than the window\x1b[0m\n"


class ResizableConsole(Console):
    now = 60

    @property
    def width(self):
        return self.now

    @width.setter
    def width(self, value):
        self.now = value


def test_a_row_wider_than_a_shrunken_window_is_kept_not_erased():
    out = io.StringIO()
    console = ResizableConsole(file=out, height=10, force_terminal=True, _environ={})
    stream = MarkdownStream(console)
    stream.feed("words that fill most of a row of this window, ")
    console.now = 20
    out.seek(0)
    out.truncate()
    stream.feed("and more")
    stream.finish()
    written = out.getvalue()
    assert written.startswith("\n")
    assert "\x1b[1A" not in written
    assert "words" not in written
    assert written.endswith("\r\x1b[Jand more\n")


def test_text_is_wrapped_to_the_new_width():
    out = io.StringIO()
    console = ResizableConsole(file=out, height=10, force_terminal=False)
    stream = MarkdownStream(console)
    stream.feed("short ")
    console.now = 12
    stream.feed("words follow in the same paragraph")
    stream.finish()
    assert out.getvalue() == "short words\nfollow in\nthe same\nparagraph\n"


def test_a_row_that_still_fits_is_drawn_anew():
    out = io.StringIO()
    console = ResizableConsole(file=out, height=10, force_terminal=True, _environ={})
    stream = MarkdownStream(console)
    stream.feed("# short")
    console.now = 20
    stream.feed(" title\n")
    stream.finish()
    screen = pyte.Screen(60, 10)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(out.getvalue())
    assert [line.rstrip() for line in screen.display[:2]] == ["short title", ""]


@pytest.mark.parametrize(
    "unit",
    [
        "plain words and more of them ",
        "**bold** `code` [a](b) word ",
        "**never closed ",
        "中文字没有空格",
        "x",
        "- item of a list\n",
        "> quote\n",
        "| a | b |\n",
        "# heading\n",
        "- - ",
        "`",
        "[[[",
        "\\",
        "code\n",
    ],
)
@pytest.mark.parametrize("head", ["", "```\n", "# ", "| a |\n|---|\n"])
def test_work_is_linear(monkeypatch, unit, head):
    """Characters parsed, scanned and written grow with the text, not with its square."""
    count = {"n": 0}

    def counting(function):
        def counted(text, *args, **kwargs):
            count["n"] += len(text)
            return function(text, *args, **kwargs)

        return counted

    parser = markdown_inline.make_parser()
    monkeypatch.setattr(markdown, "make_parser", lambda: counting(parser))
    monkeypatch.setattr(markdown, "read_line_start", counting(markdown.read_line_start))
    monkeypatch.setattr(markdown, "wrap_raw", counting(markdown.wrap_raw))
    monkeypatch.setattr(markdown_inline, "wrap_raw", counting(markdown_inline.wrap_raw))
    monkeypatch.setattr(markdown_inline, "has_open_mark", counting(markdown_inline.has_open_mark))

    def work(n_chars):
        count["n"] = 0
        out = io.StringIO()
        console = Console(file=out, width=80, height=24, force_terminal=True, _environ={})
        text = head + (unit * (n_chars // len(unit) + 1))[:n_chars]
        feed(MarkdownStream(console), text, 16)
        return count["n"] + len(out.getvalue())

    small, large = work(4_000), work(16_000)
    assert large < 4.6 * small + 4_000


def test_a_stream_can_be_used_again():
    out = io.StringIO()
    stream = MarkdownStream(Console(file=out, width=40))
    feed(stream, "- a\n\n```\ncode")
    feed(stream, "plain")
    assert out.getvalue().endswith("code\nplain\n")


def test_an_encoding_without_the_characters_gets_question_marks():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=40)
    feed(MarkdownStream(console), "- größe")
    assert raw.getvalue() == b"? gr??e\n"


def test_plain_stream():
    parts: list[str] = []
    stream = PlainStream(parts.append)
    feed(stream, "a **b**\x1b[2J", 1)
    assert "".join(parts) == "a **b**\\x1b[2J\n"
    feed(stream, "c\n")
    assert "".join(parts).endswith("\nc\n")


def test_wrapped_stream_wraps_at_words_and_drops_outer_blanks():
    shown, _, _ = on_terminal(
        "\n\nsome thinking that goes on and on\n\n", 1, 20,
        make=lambda console: WrappedStream(console, console.get_style("dim")),
    )  # fmt: skip
    assert [line for line in shown if line] == ["some thinking that", "goes on and on"]


def test_cells_are_an_upper_bound():
    assert count_cells("abc") == 3
    assert count_cells("中文") == 4
    assert count_cells("👨‍👩‍👧") == 6
    assert count_cells("❤️") == 2

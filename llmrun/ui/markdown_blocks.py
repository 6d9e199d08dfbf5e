"""Which block a line of Markdown begins or continues, decided from as little of it as possible.

The container rules (quotes, list items, lazy continuation) are CommonMark's, with three
deliberate deviations for text that language models write: a list nested by two columns is nested
whatever the width of its parent's marker; code needs a fence once inside a list; a line of dashes
is a rule, never an underline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

MAX_UNDECIDED_CHARS = 120
MAX_DEPTH = 12

LineKind = Literal["blank", "paragraph", "heading", "fence", "table", "rule", "code", "item"]
"""`item`: a list item that is empty so far."""


@dataclass(frozen=True, slots=True)
class Quote:
    """A block quote."""


@dataclass(frozen=True, slots=True)
class Item:
    """A list item. `offset` is the column of its marker and `content` that of its text, both
    relative to the container around it."""

    marker: str
    offset: int
    content: int


Container = Quote | Item


@dataclass(frozen=True, slots=True)
class LineStart:
    """`containers` are open on this line, the last `n_new` of them begin on it. `body` is what
    follows their marks. `is_lazy`: the line continues the open paragraph."""

    kind: LineKind
    containers: tuple[Container, ...]
    n_new: int
    body: str
    is_lazy: bool = False


_RULE = re.compile(r"([-*_])[ \t]*(?:\1[ \t]*){2,}")
_RULE_SO_FAR = re.compile(r"([-*_])[ \t]*(?:\1[ \t]*)*")
_MARKER = re.compile(r"([-*+]|\d{1,9}[.)])( +)(?=\S)")
_MARKER_ALONE = re.compile(r"([-*+]|\d{1,9}[.)]) *")
_MARKER_SO_FAR = re.compile(r"(?:[-*+]|\d{1,9}[.)]?) *")
_HEADING = re.compile(r"#{1,6}(?: |$)")


def read_line_start(
    line: str,
    containers: tuple[Container, ...],
    *,
    in_paragraph: bool,
    is_complete: bool,
) -> LineStart | None:
    """Classify a line from its beginning.

    Returns None while more characters are needed, never when `is_complete`. Once an answer is
    given, longer beginnings of the same line would give the same one with a longer body.
    """
    line = line.replace("\t", "    ")
    is_final = is_complete or len(line) >= MAX_UNDECIDED_CHARS
    kept: list[Container] = []
    for container in containers:
        if not line.strip(" ") and not is_final:
            return None
        if isinstance(container, Quote):
            stripped = line.lstrip(" ")
            if not stripped.startswith(">") or len(line) - len(stripped) > 3:
                break
            if stripped == ">" and not is_final:
                return None
            line = stripped[1:].removeprefix(" ")
        else:
            indent = len(line) - len(line.lstrip(" "))
            if line.strip(" ") and indent < container.content:
                marker = _MARKER.match(line, indent) or _RULE_SO_FAR.fullmatch(line, indent)
                if indent < container.offset + 2 or not marker:
                    break
                line = line[indent:]
            else:
                line = line[container.content :]
        kept.append(container)
    if not line.strip(" "):
        if not is_final:
            return None
        items = [c for c in containers[len(kept) :] if isinstance(c, Item)]
        after = tuple(kept) if len(items) < len(containers) - len(kept) else (*kept, *items)
        return LineStart("blank", after, 0, "")
    return _read_blocks(line, tuple(kept), containers, in_paragraph, is_final)


def _read_blocks(
    line: str,
    kept: tuple[Container, ...],
    before: tuple[Container, ...],
    in_paragraph: bool,
    is_final: bool,
) -> LineStart | None:
    is_matched = len(kept) == len(before)
    if len(kept) < len(before) and isinstance(before[len(kept)], Item):
        # The marker of a sibling item may stand up to three columns further right.
        line = line if len(line) - len(line.lstrip(" ")) > 3 else line.lstrip(" ")
    opened = list(kept)
    n_new = 0

    def found(kind: LineKind, body: str) -> LineStart:
        return LineStart(kind, tuple(opened), n_new, body)

    while True:
        text = line.lstrip(" ")
        indent = len(line) - len(text)
        may_continue = in_paragraph and n_new == 0
        marker = _MARKER.match(text)
        if indent >= 4 and not marker and not may_continue and not opened and text:
            return found("code", line[4:])
        if text.startswith(">") and indent < 4 and len(opened) < MAX_DEPTH:
            if text == ">" and not is_final:
                return None
            opened.append(Quote())
            n_new += 1
            line = text[1:].removeprefix(" ")
            continue
        if is_final and _RULE.fullmatch(text):
            return found("rule", "")
        if not is_final and (_RULE_SO_FAR.fullmatch(text) or _MARKER_SO_FAR.fullmatch(text)):
            return None
        is_item = marker is not None and len(opened) < MAX_DEPTH
        if marker and is_item and not (may_continue and is_matched and _late(marker)):
            width = len(marker[1]) + (len(marker[2]) if len(marker[2]) <= 4 else 1)
            opened.append(Item(marker[1], indent, indent + width))
            n_new += 1
            line = text[width:]
            continue
        alone = _MARKER_ALONE.fullmatch(text)
        if alone and not may_continue and len(opened) < MAX_DEPTH:
            opened.append(Item(alone[1], indent, indent + len(alone[1]) + 1))
            n_new += 1
            return found("item", "")
        break
    if not text:
        return found("item" if n_new else "blank", "") if is_final else None
    if indent < 4:
        kind = _leaf_kind(text, is_final)
        if kind is None:
            return None
        if kind != "paragraph":
            return found(kind, text if kind != "fence" else line)
    if may_continue:
        return LineStart("paragraph", before, 0, text, is_lazy=True)
    return found("paragraph", text)


def _late(marker: re.Match[str]) -> bool:
    """Only a list that begins with 1 may interrupt a paragraph: `2024. A year` is text."""
    return marker[1][0].isdigit() and marker[1][:-1] != "1"


def _leaf_kind(text: str, is_final: bool) -> LineKind | None:
    if text[0] == "#":
        if not is_final and text == "#" * len(text) and len(text) <= 6:
            return None
        return "heading" if _HEADING.match(text) else "paragraph"
    if text[0] in "`~":
        run = len(text) - len(text.lstrip(text[0]))
        if run >= 3:
            return "fence"
        return None if run == len(text) and not is_final else "paragraph"
    if text[0] == "|":
        return "table"
    return "paragraph"

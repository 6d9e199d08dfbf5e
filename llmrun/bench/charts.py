"""Charts as SVG text for a page that styles them. Pure.

Each is a picture with a title and a description that says its values in words. Colours are classes
(`s0` to `s3` for series, `good`, `bad`, `even` for factors): the page decides light and dark.
Shapes and words say the same as the colours do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from llmrun.text import escape_line

MAX_SERIES = 4
"""So many can be told apart."""

WIDTH = 640
_LINE_HEIGHT = 300
_CHAR = 6.8  # columns of a letter of the page's 12 px type, on the wide side
_BAR = 16
_MAX_LABEL = 36
_INSET = 26  # of the first and last point, so that no value covers a tick
_TICK_ROOM = 46

# XML has no place for these, and nobody sees them.
_NOT_XML = str.maketrans("", "", "\ufffe\uffff")


@dataclass(frozen=True, slots=True)
class Value:
    """A middle with its spread."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    """A line, or the bars of one colour: a value for each label, None where there is none."""

    label: str
    values: tuple[Value | None, ...]


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor around 1 with an interval; `low` and `high` 0 where it is not known."""

    label: str
    value: Value
    kind: Literal["good", "bad", "even"]
    words: str


def safe(text: str) -> str:
    """`text` for HTML and XML, in content and in attributes; control characters in visible form."""
    return escape(escape_line(text).translate(_NOT_XML), quote=True)


def draw_lines(
    key: str,
    title: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    x_title: str,
    write: Callable[[float], str],
) -> str:
    """Values by `labels`, which stand at equal distances, one line a series; from 0 up."""
    shown = series[:MAX_SERIES]
    has_ends = len(shown) > 1
    left, right, top = 64, 96 if has_ends else 36, 18
    bottom = _LINE_HEIGHT - 46
    ticks = find_ticks(max((v.high for s in shown for v in s.values if v), default=1.0))
    step = (WIDTH - left - right - 2 * _INSET) / max(len(labels) - 1, 1)

    def x_of(i: int) -> float:
        return left + _INSET + i * step if len(labels) > 1 else (left + WIDTH - right) / 2

    def y_of(value: float) -> float:
        return bottom - value / ticks[-1] * (bottom - top)

    parts = []
    for tick in ticks:
        y = y_of(tick)
        kind = "axis" if tick == 0 else "grid"
        parts.append(_line(left, y, WIDTH - right, y, kind))
        parts.append(_text(left - 8, y + 4, f"{tick:g}", "tick", "end"))
    for i, label in enumerate(labels):
        parts.append(_text(x_of(i), bottom + 18, label, "tick", "middle"))
    parts.append(_text((left + WIDTH - right) / 2, bottom + 38, x_title, "tick", "middle"))
    ends: list[tuple[float, str, int]] = []
    for number, entry in enumerate(shown):
        points = [(i, v) for i, v in enumerate(entry.values) if v is not None]
        path = " ".join(f"{x_of(i):.1f},{y_of(v.middle):.1f}" for i, v in points)
        if len(points) > 1:
            parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        for i, value in points:
            x, y = x_of(i), y_of(value.middle)
            words = f"{entry.label}, {labels[i]}: {_words(value, write)}"
            mark = _line(x, y_of(value.low), x, y_of(value.high), f"whisker s{number}")
            mark += _marker(number, x, y)
            parts.append(f"<g><title>{safe(words)}</title>{mark}</g>")
            if not has_ends:
                parts.append(
                    _text(x, y_of(value.high) - 10, write(value.middle), "value", "middle")
                )
        if points and has_ends:
            i, value = points[-1]
            ends.append((y_of(value.middle), write(value.middle), number))
    for y, text, number in _spread_out(ends, 14):
        parts.append(_text(WIDTH - right + 12, y + 4, text, f"value t{number}", "start"))
    said = [
        f"{entry.label}: "
        + ", ".join(f"{labels[i]} {_words(v, write)}" for i, v in enumerate(entry.values) if v)
        for entry in shown
    ]
    height = _LINE_HEIGHT + _legend_height(shown)
    parts += _legend(shown, left, _LINE_HEIGHT + 12)
    return _svg(key, title, f"By {x_title}. {'; '.join(said)}.", height, parts)


def draw_bars(
    key: str,
    title: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    write: Callable[[float], str],
) -> str:
    """Horizontal bars from 0: a group for each label, in it a bar for each series."""
    shown = series[:MAX_SERIES]
    left = _label_room(labels)
    largest = max((v.high for s in shown for v in s.values if v), default=1.0) or 1.0
    right = 16 + _CHAR * max([len(write(v.middle)) for s in shown for v in s.values if v] + [4])
    scale = (WIDTH - left - right) / largest
    parts, said = [], []
    y = 12.0
    for i, label in enumerate(labels):
        bars = [(number, s.values[i], s.label) for number, s in enumerate(shown)]
        there = [(number, value, name) for number, value, name in bars if value is not None]
        middle = y + len(there) * (_BAR + 3) / 2 + 2
        parts.append(_text(left - 10, middle, _shorten(label), "label", "end"))
        for number, value, name in there:
            width = max(value.middle * scale, 1.0)
            who = f"{name}, {label}" if len(shown) > 1 else label
            bar = f'<path class="bar f{number}" d="{_rounded(left, y, width, _BAR)}"/>'
            if value.high > value.low:
                centre = y + _BAR / 2
                bar += _line(
                    left + value.low * scale, centre, left + value.high * scale, centre, "spread"
                )
            reach = left + max(width, value.high * scale)
            parts.append(f"<g><title>{safe(f'{who}: {_words(value, write)}')}</title>{bar}</g>")
            parts.append(_text(reach + 6, y + _BAR - 4, write(value.middle), "value", "start"))
            said.append(f"{who} {_words(value, write)}")
            y += _BAR + 3
        y += 10
    parts.insert(0, _line(left, 4, left, y - 4, "axis"))
    parts += _legend(shown, left, y + 14)
    return _svg(key, title, f"{'; '.join(said)}.", y + _legend_height(shown) + 8, parts)


def draw_factors(key: str, title: str, factors: Sequence[Factor], *, below: str, above: str) -> str:
    """Horizontal bars from 1, by their logarithms, so that twice is as long as half; an interval
    each where it is known. `below` and `above` say what the sides mean."""
    left = _label_room([factor.label for factor in factors])
    right = 24 + _CHAR * max(len(factor.words) for factor in factors)
    # An interval may reach far; the picture is made for the factors, with a little more.
    logs = [_log(f.value.middle) for f in factors if f.value.middle > 0]
    ends = [_log(v) for f in factors for v in (f.value.low, f.value.high) if v > 0]
    reach = max([*logs, math.log(1.15)]) * 1.2
    lowest = min([*logs, 0.0])
    has_losses = lowest < -0.005 or min([*ends, 0.0]) < -0.02
    start = min(lowest * 1.2, -0.22 * reach) if has_losses else -0.05 * reach
    if lowest < 0:
        reach = max(reach, -0.22 * start)
    scale = (WIDTH - left - right) / (reach - start)

    def x_of(factor: float) -> float:
        return left + (min(max(_log(factor), start), reach) - start) * scale

    top, parts, said = 40.0, [], []
    height = top + len(factors) * (_BAR + 10)
    for tick in _factor_ticks(start, reach, _TICK_ROOM / scale):
        kind = "axis" if tick == 1 else "grid"
        parts.append(_line(x_of(tick), top - 8, x_of(tick), height, kind))
        parts.append(_text(x_of(tick), top - 14, f"×{tick:g}", "tick", "middle"))
    parts.append(_text(x_of(1) + 8, 12, f"{above} →", "tick", "start"))
    if has_losses:
        parts.append(_text(x_of(1) - 8, 12, f"← {below}", "tick", "end"))
    y = top
    for factor in factors:
        value = factor.value
        parts.append(_text(left - 10, y + _BAR - 4, _shorten(factor.label), "label", "end"))
        words = f"{factor.label}: {factor.words}"
        if value.middle > 0:
            a, b = sorted((x_of(1), x_of(value.middle)))
            rect = f'<rect x="{a:.1f}" y="{y:.1f}" width="{max(b - a, 1):.1f}" height="{_BAR}"'
            drawn = f'{rect} class="bar {factor.kind}"/>'
            if 0 < value.low < value.high:
                words += f", 99 % interval ×{value.low:.3g} to ×{value.high:.3g}"
                centre = y + _BAR / 2
                drawn += _line(x_of(value.low), centre, x_of(value.high), centre, "spread")
            parts.append(f"<g><title>{safe(words)}</title>{drawn}</g>")
        parts.append(
            _text(WIDTH - right + 16, y + _BAR - 4, factor.words, f"value {factor.kind}", "start")
        )
        said.append(words)
        y += _BAR + 10
    return _svg(key, title, f"{'; '.join(said)}.", height + 4, parts)


def find_ticks(largest: float, n: int = 4) -> list[float]:
    """Round numbers from 0 to at least `largest`, about `n` steps."""
    if not (math.isfinite(largest) and largest > 0):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / n))
    step = next((power * m for m in (1, 2, 2.5, 5, 10) if power * m * n >= largest), power * 10)
    return [step * i for i in range(math.ceil(largest / step - 1e-9) + 1)]


def _log(factor: float) -> float:
    """Of a factor that a picture has room for."""
    return math.log(min(max(factor, 1e-6), 1e6))


def _factor_ticks(start: float, reach: float, room: float) -> list[float]:
    """Round factors with their logarithms within these ends, `room` or more between them."""
    near = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4)
    middle = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
    far = tuple(2.0**i for i in range(-20, 21))
    ticks = near if reach - start < 0.6 else middle if reach - start < 1.8 else far
    kept = [1.0]
    for side in ([t for t in reversed(ticks) if t < 1], [t for t in ticks if t > 1]):
        last = 0.0
        for tick in side:
            at = math.log(tick)
            if start <= at <= reach and abs(at - last) >= room:
                kept.append(tick)
                last = at
    return sorted(kept)


def _words(value: Value, write: Callable[[float], str]) -> str:
    if value.low == value.high:
        return write(value.middle)
    return f"{write(value.middle)} ({write(value.low)} to {write(value.high)})"


def _spread_out(
    ends: Sequence[tuple[float, str, int]], least: float
) -> list[tuple[float, str, int]]:
    """The same texts, moved down where they would cover each other."""
    placed: list[tuple[float, str, int]] = []
    for y, text, number in sorted(ends):
        lowest = placed[-1][0] + least if placed else y
        placed.append((max(y, lowest), text, number))
    return placed


def _label_room(labels: Sequence[str]) -> float:
    longest = max((min(len(label), _MAX_LABEL) for label in labels), default=0)
    return 18 + _CHAR * longest


def _shorten(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else label[: _MAX_LABEL - 1] + "…"


def _legend_height(series: Sequence[Series]) -> float:
    return 22 * len(series) if len(series) > 1 else 0


def _legend(series: Sequence[Series], x: float, y: float) -> list[str]:
    """One line a series: names may be long."""
    if len(series) < 2:
        return []
    parts = []
    for number, entry in enumerate(series):
        centre = y + 22 * number
        parts.append(_marker(number, x + 6, centre))
        label = entry.label if len(entry.label) <= 80 else entry.label[:79] + "…"
        parts.append(_text(x + 20, centre + 4, label, "label", "start"))
    return parts


def _marker(number: int, x: float, y: float) -> str:
    kind = f'class="mark f{number}"'
    if number == 1:
        return f'<rect {kind} x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    if number == 2:
        return f'<path {kind} d="M{x:.1f} {y - 6:.1f} l6 10.5 h-12 z"/>'
    if number == 3:
        return f'<path {kind} d="M{x:.1f} {y - 6:.1f} l6 6 l-6 6 l-6 -6 z"/>'
    return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="5"/>'


def _rounded(x: float, y: float, width: float, height: float) -> str:
    """A bar that is round at its end alone."""
    r = min(4.0, width)
    return (
        f"M{x:.1f} {y:.1f} h{width - r:.1f} q{r:.1f} 0 {r:.1f} {r:.1f} "
        f"v{height - 2 * r:.1f} q0 {r:.1f} {-r:.1f} {r:.1f} h{r - width:.1f} z"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{safe(text)}</text>'


def _svg(key: str, title: str, words: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'aria-labelledby="{safe(key)}-title {safe(key)}-words">'
        f'<title id="{safe(key)}-title">{safe(title)}</title>'
        f'<desc id="{safe(key)}-words">{safe(words)}</desc>' + "".join(parts) + "</svg>"
    )

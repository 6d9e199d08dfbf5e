"""A run of `bench` for the terminal, as CSV and as Markdown; `to_dict` is it for JSON. Pure."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from llmrun.bench.compare import Difference, Row, compare_measures
from llmrun.bench.record import to_dict
from llmrun.bench.types import Ablation, BenchRun, Measure
from llmrun.bench.words import (
    Forecasts,
    by_group,
    describe_facts,
    describe_group,
    describe_measure,
    describe_notes,
    describe_settings,
    describe_verdict,
    find_speed,
    format_factor,
    format_range,
    format_spread,
    format_time,
    format_value,
    label_ablations,
)
from llmrun.text import escape_line
from llmrun.ui.bars import Segment

__all__ = [
    "Forecasts",
    "render_comparison",
    "render_history",
    "render_lines",
    "to_csv",
    "to_dict",
    "to_markdown",
]

Line = list[Segment]

_STYLES = {
    "faster": "green",
    "better": "green",
    "slower": "red",
    "worse": "red",
    "no difference": "dim",
    "unknown": "dim",
}
_BAR_CELLS = 12
_LEAST_WIDTH = 20


def render_lines(
    run: BenchRun,
    forecast: Forecasts | None = None,
    *,
    width: int = 80,
    ascii_only: bool = False,
) -> list[Line]:
    """The report for a terminal of `width` columns, to be shown by `ui.bars.show_segments`: facts,
    a table for each group, a bar for each ablation, notes."""
    lines: list[Line] = _render_facts(run, width)
    expected = forecast or {}
    groups = by_group(run.measures)
    rows = [_cells(measure, expected) for _, measures in groups for measure in measures]
    done = 0
    for group, measures in groups:
        some = rows[done : done + len(measures)]
        done += len(measures)
        lines += [[], [(escape_line(describe_group(group)), "bold")]]
        lines += _table(_MEASURE_COLUMNS, some, width, like=rows)
    if run.ablations:
        lines += [[], [("What pays here", "bold")]]
        lines += _render_ablations(run.ablations, width, ascii_only)
    for note in describe_notes(run):
        lines += [[], *_wrap("note: ", note, width, "yellow")]
    return lines


def render_comparison(
    rows: Sequence[Row],
    differences: Sequence[Difference] = (),
    *,
    labels: tuple[str, str] = ("A", "B"),
    width: int = 80,
) -> list[Line]:
    """What `compare` and `find_differences` gave, for a terminal."""
    lines: list[Line] = []
    if differences:
        lines = _table(
            (_Column("differs in", 9), _Column(labels[0], 8), _Column(labels[1], 8)),
            [[(d.what, ""), (d.a, ""), (d.b, "")] for d in differences],
            width,
        )
        lines.append([])
    if not rows:
        return [*lines, [("these runs measured nothing in common", "")]]
    columns = (
        _Column("what", 9),
        _Column(labels[0], 7, True),
        _Column(labels[1], 7, True),
        _Column("ratio", 8, True),
        _Column("99 % interval", 5, True),
        _Column(f"{labels[1]} is", 9),
    )
    cells = []
    for row in rows:
        style = _STYLES[row.verdict]
        interval = f"{format_factor(row.low)} - {format_factor(row.high)}" if row.ratio else "-"
        cells.append(
            [
                (describe_measure(row.name), ""),
                (format_value(row.a.middle, row.a.unit), ""),
                (format_value(row.b.middle, row.b.unit), ""),
                (format_factor(row.ratio), style),
                (interval, ""),
                (describe_verdict(row.verdict), style),
            ]
        )
    lines += _table(columns, cells, width)
    notes = [f"{describe_measure(row.name)}: {row.note}" for row in rows if row.note]
    for note in notes:
        lines += [[], *_wrap("note: ", note, width, "yellow")]
    return lines


def render_history(runs: Sequence[BenchRun], *, width: int = 80) -> list[Line]:
    """One line a run: id, time, model, where, and the two speeds that say most."""
    columns = (
        _Column("run", 9),
        _Column("time", 4),
        _Column("model", 8),
        _Column("target", 5),
        _Column("prompt", 6, True),
        _Column("generation", 7, True),
    )
    cells = []
    for run in runs:
        model = f"{run.model} ({run.quant})" if run.quant else run.model
        cells.append(
            [
                (run.id, ""),
                (format_time(run.started_at), ""),
                (model, ""),
                (run.target, ""),
                (_write_speed(run, "pp"), ""),
                (_write_speed(run, "tg"), ""),
            ]
        )
    return _table(columns, cells, width)


def to_csv(run: BenchRun) -> str:
    """A line for each measure, and two (off, on) for each ablation; all values in one cell. Text
    that a spreadsheet would take for a formula begins with an apostrophe."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    started = datetime.fromtimestamp(run.started_at, UTC).isoformat(timespec="seconds")
    of_run = [run.id, started, run.model, run.quant, run.model_sha256, run.machine, run.build]
    head = [_csv_text(value) for value in (*of_run, run.target)]
    for measure in run.measures:
        writer.writerow([*head, "measure", *_csv_measure(measure, measure.name)])
    for ablation in run.ablations:
        name = f"{ablation.setting}/{ablation.workload}"
        for kind, measure in (("off", ablation.off), ("on", ablation.on)):
            writer.writerow([*head, kind, *_csv_measure(measure, name)])
    return file.getvalue()


def to_markdown(run: BenchRun, forecast: Forecasts | None = None) -> str:
    """A heading, facts, a table for each group, what pays, notes."""
    lines = [f"# {_markdown(run.model)}", ""]
    lines += [f"- {_markdown(key)}: {_markdown(value)}" for key, value in describe_facts(run)]
    settings = ", ".join(f"{key} {value}" for key, value in describe_settings(run.settings))
    if settings:
        lines.append(f"- settings: {_markdown(settings)}")
    expected = forecast or {}
    for group, measures in by_group(run.measures):
        lines += ["", f"## {_markdown(describe_group(group))}", ""]
        rows = [[text for text, _ in _cells(measure, expected)] for measure in measures]
        lines += _markdown_table([column.head for column in _MEASURE_COLUMNS], rows, "lrrrr")
    if run.ablations:
        rows = [
            [
                entry.setting,
                entry.workload,
                format_value(entry.off.middle, entry.off.unit),
                format_value(entry.on.middle, entry.on.unit),
                format_factor(entry.gain),
                _judge(entry)[0],
            ]
            for entry in run.ablations
        ]
        lines += ["", "## What pays here", ""]
        head = ["setting", "workload", "off", "on", "gain", "so it is"]
        lines += _markdown_table(head, rows, "llrrrl")
    for note in describe_notes(run):
        lines += ["", f"Note: {_markdown(note)}"]
    return "\n".join(lines) + "\n"


# ---- lines


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    importance: int  # columns of the least importance go first where the terminal is narrow
    is_right: bool = False


_MEASURE_COLUMNS = (
    _Column("what", 9),
    _Column("median", 8, True),
    _Column("spread", 5, True),
    _Column("repeats", 2, True),
    _Column("forecast", 4, True),
)


def _cells(measure: Measure, expected: Forecasts) -> list[Segment]:
    forecast = expected.get(measure.name)
    return [
        (describe_measure(measure.name), ""),
        (format_value(measure.middle, measure.unit), "bold"),
        (format_spread(measure), ""),
        (str(len(measure.values)), "dim"),
        (format_range(forecast, measure.unit) if forecast else "", "dim"),
    ]


def _table(
    columns: Sequence[_Column],
    rows: Sequence[Sequence[Segment]],
    width: int,
    *,
    like: Sequence[Sequence[Segment]] | None = None,
) -> list[Line]:
    """Columns that are empty are left out, and the least important ones that have no room. The
    columns are as wide as they would be for the rows `like`."""
    from rich.cells import cell_len

    cells: list[Line] = [[(column.head, "dim") for column in columns]]
    cells += [[(escape_line(text), style) for text, style in row] for row in rows]
    measured = [[escape_line(text) for text, _ in row] for row in (rows if like is None else like)]
    measured_all = [[column.head for column in columns], *measured]
    widths = [max(cell_len(row[i]) for row in measured_all) for i in range(len(columns))]
    kept = [i for i in range(len(columns)) if any(row[i] for row in measured)]
    while len(kept) > 1 and sum(widths[i] + 2 for i in kept) > width:
        kept.remove(min(kept, key=lambda i: columns[i].importance))
    lines = []
    for row in cells:
        line: Line = []
        for i in kept:
            text, style = row[i]
            gap = " " * (widths[i] - cell_len(text))
            line += [("  ", ""), (gap + text if columns[i].is_right else text + gap, style)]
        lines.append(line)
    return lines


def _render_facts(run: BenchRun, width: int) -> list[Line]:
    facts = describe_facts(run)
    settings = describe_settings(run.settings)
    if settings:
        facts.append(("settings", ", ".join(f"{key} {value}" for key, value in settings)))
    n = max(len(key) for key, _ in facts)
    lines: list[Line] = []
    for key, value in facts:
        lines += _wrap(f"{key:<{n}}  ", value, width)
    return lines


def _wrap(head: str, text: str, width: int, style: str = "dim") -> list[Line]:
    """`head` in its style and the text behind it, broken between words, indented below itself."""
    import textwrap

    room = max(width - len(head), _LEAST_WIDTH)
    parts = textwrap.wrap(escape_line(text), room, break_on_hyphens=False) or [""]
    first: Line = [(head, style), (parts[0], "")]
    return [first, *([(" " * len(head) + part, "")] for part in parts[1:])]


def _render_ablations(ablations: Sequence[Ablation], width: int, ascii_only: bool) -> list[Line]:
    """Sorted by what they buy; bars to the right of the middle help, to the left they cost. Their
    length is by factors: twice is as far to the right as half is to the left."""
    ordered = sorted(ablations, key=lambda entry: -entry.gain)
    logs = [
        math.log(min(max(entry.gain, 1e-6), 1e6)) if entry.gain > 0 else 0.0 for entry in ordered
    ]
    reach = max([abs(value) for value in logs] + [math.log(1.1)])
    n_left = max((_n_cells(value, reach) for value in logs if value < 0), default=0)
    rows = []
    for entry, name, log in zip(ordered, label_ablations(ordered), logs, strict=True):
        verdict, style = _judge(entry)
        bar = _bar(_n_cells(log, reach), log < 0, n_left, ascii_only)
        values = (
            f"{format_value(entry.off.middle, entry.off.unit)} -> "
            f"{format_value(entry.on.middle, entry.on.unit)}"
        )
        rows.append(
            [
                (name, ""),
                (format_factor(entry.gain), style),
                (bar, style),
                (verdict, style),
                (values, ""),
            ]
        )
    columns = (
        _Column("with", 9),
        _Column("gain", 8, True),
        _Column("", 6),
        _Column("so it is", 7),
        _Column("off -> on", 5),
    )
    lines = _table(columns, rows, width)
    if ascii_only:
        lines = [[(text.replace("×", "x"), style) for text, style in line] for line in lines]
    return lines


def _n_cells(log: float, reach: float) -> int:
    return round(abs(log) / reach * _BAR_CELLS)


def _bar(n_cells: int, is_loss: bool, n_left: int, ascii_only: bool) -> str:
    full, axis = ("#", "|") if ascii_only else ("█", "│")
    left = (full * n_cells if is_loss else "").rjust(n_left)
    right = ("" if is_loss else full * n_cells).ljust(_BAR_CELLS)
    return left + axis + right


def _judge(ablation: Ablation) -> tuple[str, str]:
    """Verdict and style."""
    row = compare_measures(ablation.off, ablation.on)
    return describe_verdict(row.verdict), _STYLES[row.verdict]


def _write_speed(run: BenchRun, kind: Literal["pp", "tg"]) -> str:
    measure = find_speed(run, kind)
    return format_value(measure.middle, measure.unit) if measure is not None else "-"


# ---- files

_CSV_HEAD = (
    "run", "started_at", "model", "quant", "model_sha256", "machine", "build", "target", "kind",
    "group", "name", "unit", "median", "low", "high", "n", "values", "parameters",
)  # fmt: skip
_FORMULA = re.compile(r"[=+\-@\t\r]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#|~!])")


def _csv_text(text: str | None) -> str:
    safe = escape_line(text or "")
    return f"'{safe}" if _FORMULA.match(safe) else safe


def _csv_measure(measure: Measure, name: str) -> list[str | int]:
    low, high = measure.spread
    return [
        _csv_text(measure.group),
        _csv_text(name),
        measure.unit,
        *(f"{value:.6g}" if measure.unit != "bytes" else f"{value:.0f}"
          for value in (measure.middle, low, high)),
        len(measure.values),
        " ".join(f"{value:.6g}" for value in measure.values),
        _csv_text(_join(measure.parameters)),
    ]  # fmt: skip


def _join(parameters: Mapping[str, object]) -> str:
    return "; ".join(f"{key}={value}" for key, value in parameters.items())


def _markdown(text: str) -> str:
    """Text that stays text: neither Markdown nor HTML of its own."""
    text = escape_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Columns without any content are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    rules = ["---:" if align[i] == "r" else "---" for i in kept]
    lines = [[head[i] for i in kept], rules]
    lines += [[_markdown(row[i]) for i in kept] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]

"""What `llmrun fit` answers, and how it looks. Memory is in bytes throughout."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from llmrun.text import escape_line, format_bytes, format_count, format_speed
from llmrun.ui.bars import (
    Bar,
    Kind,
    Segment,
    is_ascii_only,
    render_bars,
    render_legend,
    show_segments,
)
from llmrun.ui.output import Output

VERDICTS = {
    "fits": ("fits", "green"),
    "tight": ("tight", "yellow"),
    "partly_on_cpu": ("partly on CPU", "cyan"),
    "cpu_only": ("CPU only", "magenta"),
    "no": ("no", "red"),
}
"""Word and colour of each verdict."""

_KINDS = (
    Kind("weights", "█", "#", "blue"),
    Kind("KV cache", "▓", "=", "cyan"),
    Kind("compute", "▒", "+", "magenta"),
    Kind("other programs", "░", "%", "bright_black"),
    Kind("free", "·", ".", "green"),
)
_MAX_BAR_WIDTH = 100
_MARK_WIDTH = 2


@dataclass(frozen=True, slots=True)
class DeviceData:
    """`memory` "own" or "shared" (a part of the RAM). 0: not known."""

    device: str
    description: str
    memory: str
    free: int
    total: int


@dataclass(frozen=True, slots=True)
class MachineData:
    """The machine that is planned for; `name` is null for this one. `ram_free` is what can be had
    now. `devices` are the GPUs that the engine can use."""

    name: str | None
    cpu: str | None
    cores: int
    ram_total: int
    ram_free: int
    devices: tuple[DeviceData, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelData:
    """What is known of the model whatever its quant. `companions` are the bytes of a projector and
    drafter that are counted in; header facts are null without a header."""

    model: str
    title: str
    repo: str | None
    commit: str | None
    origin: str
    architecture: str | None
    params: int | None
    params_active: int | None
    layers: int | None
    experts: int | None
    context: int | None


@dataclass(frozen=True, slots=True)
class SettingsData:
    """What the engine would be told, with llama.cpp's names. `n_gpu_layers` -1 is all,
    `tensor_split` empty is by free memory."""

    n_ctx: int
    type_k: str
    type_v: str
    flash_attn: str
    n_gpu_layers: int
    n_cpu_moe: int
    tensor_split: tuple[float, ...]
    n_ubatch: int
    use_mmap: bool
    use_repack: bool
    n_threads: int


@dataclass(frozen=True, slots=True)
class MemoryData:
    """What one memory would hold, what is free in it now and its size (0: not known). `compute` is
    the working memory of a step, `overhead` the program and what comes beside the model."""

    device: str
    weights: int
    kv: int
    compute: int
    overhead: int
    free: int
    total: int

    @property
    def used(self) -> int:
        return self.weights + self.kv + self.compute + self.overhead


@dataclass(frozen=True, slots=True)
class FitRow:
    """A quant at a context. `model` is what to type for it. `verdict`: fits, tight, partly_on_cpu,
    cpu_only or no. `settings` are null where no header is known. `source`: exact (llama.cpp's own
    allocator was asked), formula, published or filesize. `tok_s` is [low, high], null when it
    cannot be said. At most one row is `recommended`."""

    quant: str
    model: str
    size: int
    n_ctx: int
    verdict: str
    settings: SettingsData | None
    memory: tuple[MemoryData, ...]
    source: str
    tok_s: tuple[float, float] | None
    recommended: bool
    reasons: tuple[str, ...]

    @property
    def used(self) -> int:
        return sum(entry.used for entry in self.memory)


@dataclass(frozen=True, slots=True)
class FitResult:
    """`advice` is for people: the command for the recommended row, or what would run instead."""

    machine: MachineData
    model: ModelData
    rows: tuple[FitRow, ...]
    notes: tuple[str, ...]
    advice: str

    def show(self, output: Output) -> None:
        width = min(output.stdout.width, _MAX_BAR_WIDTH)
        ascii_only = is_ascii_only(output)
        _say(output, _describe_model(self.model))
        for line in describe_machine(self.machine):
            _say(output, line, indent=4)
        output.line()
        _show_table(output, _fit_columns(self.rows, output), self.rows, ascii_only)
        best = next((row for row in self.rows if row.recommended), None)
        shown = best or min(self.rows, key=lambda row: (row.used, row.n_ctx))
        output.line()
        what = "recommended" if best else "none of these runs; least is needed by"
        _say(output, f"{what}: {shown.quant} with a context of {shown.n_ctx} tokens")
        for reason in shown.reasons if best else ():
            _say(output, f"  - {reason}", indent=4)
        bars = [_bar_of(entry) for entry in shown.memory if entry.total]
        if bars:
            output.line()
            for segments in render_bars(_KINDS, bars, width, ascii_only=ascii_only):
                show_segments(output, segments)
            for segments in render_legend(_KINDS, width, ascii_only=ascii_only):
                show_segments(output, segments)
        output.line()
        for note in self.notes:
            _say(output, note)
        output.line(escape_line(self.advice))


@dataclass(frozen=True, slots=True)
class RankRow:
    """A catalog model in its default quant. `needed`: memory with an everyday context. `source` as
    in `FitRow`. `command` gets it."""

    model: str
    title: str
    quant: str
    size: int
    params: int | None
    params_active: int | None
    verdict: str
    needed: int
    source: str
    tok_s: tuple[float, float] | None
    recommended: bool
    command: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RankResult:
    """The catalog's chat models, best first for the machine."""

    machine: MachineData
    models: tuple[RankRow, ...]
    notes: tuple[str, ...]

    def show(self, output: Output) -> None:
        for line in describe_machine(self.machine):
            _say(output, line, indent=4)
        output.line()
        _show_table(output, _RANK_COLUMNS, self.models, is_ascii_only(output))
        output.line()
        for note in self.notes:
            _say(output, note)
        best = next((row for row in self.models if row.recommended), None)
        if best is not None:
            output.line(f"best here: {escape_line(best.command)}")


def _say(output: Output, text: str, indent: int = 2) -> None:
    """One line; on a terminal as many as it takes, broken between words."""
    text = escape_line(text)
    if not output.environment.stdout_is_tty:
        output.line(text)
        return
    width = max(output.stdout.width, 2 * indent + 1)
    broken = textwrap.fill(
        text, width, subsequent_indent=" " * indent, break_on_hyphens=False, tabsize=1
    )
    output.line(broken)


def describe_machine(machine: MachineData) -> list[str]:
    """One line, and one for each GPU; sizes with what of them is free."""
    parts = [machine.cpu] if machine.cpu and not machine.devices else []
    parts.append(f"{machine.cores} core{'s' if machine.cores != 1 else ''}")
    parts.append(f"RAM {_free_of(machine.ram_total, machine.ram_free)}")
    lines = [f"on {machine.name or 'this machine'}: {', '.join(parts)}"]
    for device in machine.devices:
        memory = _free_of(device.total, device.free)
        if device.memory == "shared" and device.total:
            memory = f"up to {format_bytes(device.total)} of the RAM"
        name = f"{device.device}: {device.description}" if device.description else device.device
        lines.append(f"  {name}, {memory}")
    return [escape_line(line) for line in lines]


def _free_of(total: int, free: int) -> str:
    if not total:
        return "of unknown size"
    return f"{format_bytes(total)} ({format_bytes(free)} free)"


def _describe_model(model: ModelData) -> str:
    active = f" ({format_count(model.params_active)} active)" if model.params_active else ""
    facts = [
        model.architecture,
        f"{format_count(model.params)} parameters{active}" if model.params else None,
        f"context up to {format_count(model.context)}" if model.context else None,
    ]
    return ", ".join([f"{model.title} ({model.model})", *(fact for fact in facts if fact)])


def _bar_of(entry: MemoryData) -> Bar:
    """The whole of one memory; where the need is more than there is, of need and use together."""
    taken = max(0, entry.total - entry.free)
    left = max(0, entry.free - entry.used)
    is_over = entry.used > entry.free
    note = f"{format_bytes(entry.used)} of {format_bytes(entry.free)} free"
    return Bar(
        entry.device,
        (entry.weights, entry.kv, entry.compute + entry.overhead, taken, left),
        note,
        "red" if is_over else "",
    )


# ---- tables


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    is_right: bool
    importance: int  # columns of the least importance go first where the terminal is narrow


Cell = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Columns:
    columns: tuple[_Column, ...]
    repeats: bool = True

    def cells(self, row: object, before: object | None) -> list[Cell]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _FitColumns(_Columns):
    devices: tuple[str, ...] = ()

    def cells(self, row: object, before: object | None) -> list[Cell]:
        assert isinstance(row, FitRow) and isinstance(before, FitRow | None)
        is_new = before is None or before.model != row.model
        is_first = self.repeats or is_new or row.recommended
        word, colour = VERDICTS[row.verdict]
        by_device = {entry.device: entry for entry in row.memory}
        about = "" if row.source == "exact" else "~"
        if len(self.devices) > 1:
            memory = [
                _size(by_device[d].used, about) if d in by_device else "-" for d in self.devices
            ]
        else:
            memory = [_size(row.used, about)]
        kv = sum(entry.kv for entry in row.memory)
        return [
            (row.quant if is_first else "", ""),
            (format_bytes(row.size) if is_first else "", ""),
            (format_count(row.n_ctx), ""),
            (word, colour),
            *((text, "") for text in memory),
            (format_bytes(kv) if row.settings else "-", ""),
            (format_speed(row.tok_s), ""),
        ]


class _RankColumns(_Columns):
    __slots__ = ()

    def cells(self, row: object, before: object | None) -> list[Cell]:
        assert isinstance(row, RankRow)
        word, colour = VERDICTS[row.verdict]
        params = format_count(row.params) if row.params else "-"
        if row.params and row.params_active and row.params_active < row.params:
            params += f"/{format_count(row.params_active)}"
        return [
            (row.model, ""),
            (params, ""),
            (row.quant, ""),
            (format_bytes(row.size), ""),
            (word, colour),
            (_size(row.needed, "" if row.source == "exact" else "~"), ""),
            (format_speed(row.tok_s), ""),
            (row.source, "dim"),
        ]


_RANK_COLUMNS = _RankColumns(
    (
        _Column("model", False, 9),
        _Column("parameters", True, 5),
        _Column("quant", False, 3),
        _Column("size", True, 6),
        _Column("verdict", False, 9),
        _Column("memory", True, 7),
        _Column("tok/s", True, 8),
        _Column("source", False, 1),
    )
)


def _fit_columns(rows: Sequence[FitRow], output: Output) -> _FitColumns:
    devices = tuple(dict.fromkeys(entry.device for row in rows for entry in row.memory))
    memory = devices if len(devices) > 1 else ("memory",)
    return _FitColumns(
        (
            _Column("quant", False, 9),
            _Column("size", True, 4),
            _Column("ctx", True, 9),
            _Column("verdict", False, 9),
            *(_Column(device, True, 6) for device in memory),
            _Column("KV", True, 3),
            _Column("tok/s", True, 8),
        ),
        # For programs every line is whole; people see better where a quant begins.
        repeats=not output.environment.stdout_is_tty,
        devices=devices,
    )


def _show_table(
    output: Output, columns: _Columns, rows: Sequence[FitRow | RankRow], ascii_only: bool
) -> None:
    """A head and rows, the recommended one marked. On a terminal that is too narrow the least
    important columns are left out."""
    from rich.cells import cell_len

    heads: list[Cell] = [(column.head, "bold") for column in columns.columns]
    table = [heads]
    before = None
    for row in rows:
        table.append([(escape_line(t), style) for t, style in columns.cells(row, before)])
        before = row
    widths = [max(cell_len(line[i][0]) for line in table) for i in range(len(heads))]
    kept = list(range(len(heads)))
    if output.environment.stdout_is_tty:
        while (
            len(kept) > 1
            and _MARK_WIDTH + sum(widths[i] + 2 for i in kept) - 2 > output.stdout.width
        ):
            kept.remove(min(kept, key=lambda i: columns.columns[i].importance))
    mark = "> " if ascii_only else "► "
    for number, line in enumerate(table):
        is_best = number > 0 and rows[number - 1].recommended
        segments: list[Segment] = [(mark, "bold green") if is_best else ("  ", "")]
        for i in kept:
            text, style = line[i]
            gap = " " * (widths[i] - cell_len(text))
            full = gap + text if columns.columns[i].is_right else text + gap
            segments.append((full, f"bold {style}" if is_best else style))
            segments.append(("  ", ""))
        show_segments(output, segments[:-1])


def _size(n_bytes: int, about: str) -> str:
    return about + format_bytes(n_bytes)

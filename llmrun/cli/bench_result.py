"""What `llmrun bench` says: to people, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrun.ui.output import Output

if TYPE_CHECKING:
    from llmrun.bench.compare import Difference, Row
    from llmrun.bench.types import BenchRun
    from llmrun.ui.bars import Segment


@dataclass(frozen=True, slots=True)
class ProfileData:
    """What was found by `--tune`: settings, how many times as fast as before, and where they are
    kept."""

    threads: int
    threads_batch: int
    ubatch: int
    kv_type: str
    speculative: str
    gain: float
    path: Path


@dataclass(frozen=True, slots=True)
class CompareRow:
    """`b` against `a`: medians, their ratio and the interval that holds the true one with 99 %
    confidence (all 0 when that cannot be said)."""

    name: str
    unit: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    verdict: str
    note: str


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    what: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class BenchResult:
    """`runs` as the history keeps them (see `bench.record`): the engine's, then the server's.
    `comparison` is the second against the first. `report` is the HTML file that was written."""

    runs: tuple[Mapping[str, Any], ...]
    comparison: tuple[CompareRow, ...]
    profile: ProfileData | None
    report: Path | None

    def show(self, output: Output) -> None:
        from llmrun.bench.record import from_dict

        runs = [from_dict(run) for run in self.runs]
        for number, run in enumerate(runs):
            if number:
                output.line()
            show_run(run, output)
        if len(runs) > 1:
            output.line()
            _show_comparison(runs[0], runs[1], output)
        if self.profile is not None:
            output.line()
            _show_profile(self.profile, output)
        if self.report is not None:
            output.note(f"report: {self.report}")


@dataclass(frozen=True, slots=True)
class BenchHistoryResult:
    """The newest first, as the history keeps them."""

    runs: tuple[Mapping[str, Any], ...]

    def show(self, output: Output) -> None:
        from llmrun.bench.record import from_dict
        from llmrun.bench.report import render_history

        if not self.runs:
            output.note("nothing measured yet; try: llmrun bench")
            return
        runs = [from_dict(run) for run in self.runs]
        _show_lines(render_history(runs, width=output.stdout.width), output)
        output.note("compare two: llmrun bench compare RUN RUN")


@dataclass(frozen=True, slots=True)
class BenchCompareResult:
    a: Mapping[str, Any]
    b: Mapping[str, Any]
    rows: tuple[CompareRow, ...]
    differences: tuple[DifferenceRow, ...]

    def show(self, output: Output) -> None:
        from llmrun.bench.record import from_dict

        _show_comparison(from_dict(self.a), from_dict(self.b), output)


def compare_row(row: Row) -> CompareRow:
    return CompareRow(
        name=row.name,
        unit=row.a.unit,
        a=row.a.middle,
        b=row.b.middle,
        ratio=row.ratio,
        low=row.low,
        high=row.high,
        verdict=row.verdict,
        note=row.note,
    )


def difference_row(difference: Difference) -> DifferenceRow:
    return DifferenceRow(difference.what, difference.a, difference.b)


def forecasts_of(run: BenchRun) -> dict[str, tuple[float, float]]:
    """What the planner expected, by the name of the measure: the process's memory before the model
    was loaded, and what the plan says that the model takes."""
    found = {}
    for measure in run.measures:
        planned, before = measure.parameters.get("forecast"), measure.parameters.get("before")
        if isinstance(planned, int | float) and isinstance(before, int | float):
            found[measure.name] = (float(planned + before),) * 2
    return found


def show_run(run: BenchRun, output: Output) -> None:
    from llmrun.bench.report import render_lines
    from llmrun.ui.bars import is_ascii_only

    width, ascii_only = output.stdout.width, is_ascii_only(output)
    lines = render_lines(run, forecasts_of(run), width=width, ascii_only=ascii_only)
    _show_lines(lines, output)


def _show_comparison(a: BenchRun, b: BenchRun, output: Output) -> None:
    from llmrun.bench.compare import compare, find_differences
    from llmrun.bench.report import render_comparison
    from llmrun.bench.words import label_runs

    first, second = label_runs([a, b])
    _show_lines(
        render_comparison(
            compare(a, b),
            find_differences(a, b),
            labels=(first, second),
            width=output.stdout.width,
        ),
        output,
    )


def _show_profile(profile: ProfileData, output: Output) -> None:
    threads = f"{profile.threads} threads"
    if profile.threads_batch != profile.threads:
        threads += f", {profile.threads_batch} for prompts"
    output.line(
        f"profile: {threads}, ubatch {profile.ubatch}, KV cache {profile.kv_type}, "
        f"speculation {profile.speculative}: {profile.gain:.2f} times as fast"
    )
    output.note(f"run, chat and serve use it from now on: {profile.path}")


def _show_lines(lines: Sequence[Sequence[Segment]], output: Output) -> None:
    from llmrun.ui.bars import show_segments

    for line in lines:
        show_segments(output, line)

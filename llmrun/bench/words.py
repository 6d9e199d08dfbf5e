"""How the report's numbers and names are written for people, in every form of it. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from llmrun.bench.compare import Verdict
from llmrun.bench.types import Ablation, BenchRun, Measure, Unit
from llmrun.text import format_bytes

Forecasts = Mapping[str, tuple[float, float]]
"""What was expected beforehand: low and high by the name of the measure, in its unit."""

_GROUPS = {
    "prompt": "Prompt processing",
    "generation": "Generation",
    "latency": "Latency",
    "streams": "Parallel streams",
    "load": "Loading",
    "memory": "Memory",
}
_NAMES = {
    "ttft_cold": "first token, cold",
    "ttft_warm": "first token, warm prefix",
    "load": "load time",
    "memory_peak": "peak of the process",
    "memory_model": "of that, by the model",
    "memory_forecast": "forecast for the model",
}
_SPEED = re.compile(r"(pp|tg)([0-9]{1,9})(?:@([0-9]{1,9}))?")
_SHARE = re.compile(r"bandwidth_share(?:@([0-9]{1,9}))?")
_STREAMS = re.compile(r"streams([0-9]{1,6})")
_PERCENTILE = re.compile(r"itl_p([0-9]{1,3})")


def describe_measure(name: str) -> str:
    """`tg128@4096` -> `generation, 128 tokens at depth 4096`; other names as they are."""
    if match := _SPEED.fullmatch(name):
        kind, n, depth = match.groups()
        what = "prompt" if kind == "pp" else "generation"
        return f"{what}, {n} tokens" + (f" at depth {depth}" if depth and int(depth) else "")
    if match := _SHARE.fullmatch(name):
        return "of the bandwidth limit" + (f" at depth {match[1]}" if match[1] else "")
    if match := _STREAMS.fullmatch(name):
        return f"{match[1]} streams" if match[1] != "1" else "1 stream"
    if match := _PERCENTILE.fullmatch(name):
        return f"between tokens, p{match[1]}"
    return _NAMES.get(name, name)


def describe_group(group: str) -> str:
    return _GROUPS.get(group, group)


def by_group(measures: Iterable[Measure]) -> list[tuple[str, list[Measure]]]:
    """The measures that have values, in groups: the known ones in their order, then the others."""
    groups: dict[str, list[Measure]] = {name: [] for name in _GROUPS}
    for measure in measures:
        if measure.values:
            groups.setdefault(measure.group, []).append(measure)
    return [(name, some) for name, some in groups.items() if some]


def format_value(value: float, unit: Unit) -> str:
    """Three digits that count, with the unit: `76.3 tok/s`, `42.1 ms`, `1.24 s`, `83 %`."""
    if not math.isfinite(value):
        return "-"
    if unit == "bytes":
        return format_bytes(round(value))
    if unit == "share":
        return f"{value * 100:.0f} %"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{format_number(value * 1000)} ms"
    if unit == "count":
        return format_number(value)
    return f"{format_number(value)} {unit}"


def format_spread(measure: Measure) -> str:
    """From the smallest to the largest value, the unit once; "-" of a single value."""
    if len(measure.values) < 2:
        return "-"
    low, high = (format_value(value, measure.unit) for value in measure.spread)
    if low == high:
        return low
    number, _, unit = low.rpartition(" ")
    return f"{number} - {high}" if number and high.endswith(f" {unit}") else f"{low} - {high}"


def format_range(expected: tuple[float, float], unit: Unit) -> str:
    """A forecast, as `format_spread`."""
    low, high = expected
    return format_value(low, unit) if low == high else format_spread(_of(unit, (low, high)))


def format_number(value: float) -> str:
    """`0.0421`, `4.21`, `42.1`, `421`, `4210`; at most a million million in full."""
    size = abs(value)
    if size >= 1e12 or (0 < size < 1e-4):
        return f"{value:.2e}"
    if size >= 99.95:
        return f"{value:.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995 or size == 0:
        return f"{value:.2f}"
    return f"{value:.4f}".rstrip("0")


def format_factor(value: float) -> str:
    """`×1.32`, `×0.91`, `×12.4`; "-" where it cannot be said (0)."""
    if not (value > 0 and math.isfinite(value)):
        return "-"
    return f"×{value:.2f}" if 0.095 <= value < 9.995 else f"×{format_number(value)}"


def describe_verdict(verdict: Verdict) -> str:
    """For people: "no difference" claims more than that none was seen."""
    words: Mapping[str, str] = {"no difference": "within noise", "unknown": "too few values"}
    return words.get(verdict, verdict)


def format_time(started_at: float) -> str:
    """UTC, to the minute."""
    return f"{datetime.fromtimestamp(started_at, UTC):%Y-%m-%d %H:%M} UTC"


def describe_facts(run: BenchRun) -> list[tuple[str, str]]:
    """What and where it was, without the settings."""
    model = f"{run.model} ({run.quant})" if run.quant and run.quant not in run.model else run.model
    facts = [("model", model), ("machine", run.machine), ("build", run.build)]
    if run.target != "engine":
        facts.append(("server", run.target))
    return [*facts, ("time", format_time(run.started_at)), ("run", run.id)]


def describe_settings(settings: Mapping[str, object]) -> list[tuple[str, str]]:
    """Those that are set."""
    words = {True: "on", False: "off"}
    return [
        (key, words[value] if isinstance(value, bool) else str(value))
        for key, value in settings.items()
        if value is not None
    ]


def describe_notes(run: BenchRun) -> list[str]:
    notes = list(run.notes)
    if not run.is_complete:
        notes.insert(0, "interrupted: not everything was measured")
    return notes


def label_ablations(ablations: Sequence[Ablation]) -> list[str]:
    """The setting, with the workload where it was measured with several."""
    settings = [ablation.setting for ablation in ablations]
    return [
        f"{entry.setting}: {entry.workload}" if settings.count(entry.setting) > 1 else entry.setting
        for entry in ablations
    ]


def find_speed(run: BenchRun, kind: Literal["pp", "tg"]) -> Measure | None:
    """Of prompts or generation, with nothing in the context before; that of the number of tokens
    nearest to 512 where there are several."""
    found = [
        (abs(int(match[2]) - 512), measure)
        for measure in run.measures
        if measure.values and (match := _SPEED.fullmatch(measure.name))
        if match[1] == kind and not int(match[3] or 0) and measure.unit == "tok/s"
    ]
    return min(found, key=lambda entry: entry[0])[1] if found else None


def label_runs(runs: Sequence[BenchRun]) -> list[str]:
    """A short name for each by what they differ in: model, quant, target, build, time; the first
    of these that tells them all apart, else their ids."""
    candidates = (
        [run.target if run.target != "engine" else "llmrun" for run in runs],
        [run.quant or "-" for run in runs],
        [run.model for run in runs],
        [run.machine for run in runs],
        [run.build for run in runs],
        [format_time(run.started_at) for run in runs],
    )
    if len(runs) == 1:
        return candidates[2]
    for names in candidates:
        if len(set(names)) == len(runs):
            return names
    return [run.id for run in runs]


def _of(unit: Unit, values: tuple[float, ...]) -> Measure:
    return Measure("", unit, values, True)

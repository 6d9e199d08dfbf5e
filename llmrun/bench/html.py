"""A run of `bench` as one page that needs nothing else: charts to look at, tables to read. Pure.

No script, no font, no picture from elsewhere; the page itself forbids them. Names and notes may
hold anything: all of it is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmrun.bench.charts import (
    MAX_SERIES,
    Factor,
    Series,
    Value,
    draw_bars,
    draw_factors,
    draw_lines,
    safe,
)
from llmrun.bench.compare import Row, compare, compare_measures, find_differences
from llmrun.bench.types import BenchRun, Measure, Unit
from llmrun.bench.words import (
    by_group,
    describe_facts,
    describe_group,
    describe_measure,
    describe_notes,
    describe_settings,
    describe_verdict,
    find_speed,
    format_factor,
    format_number,
    format_spread,
    format_value,
    label_ablations,
    label_runs,
)

_KINDS = {"faster": "good", "better": "good", "slower": "bad", "worse": "bad"}
_SPEED = re.compile(r"(pp|tg)([0-9]{1,9})(?:@([0-9]{1,9}))?")
_MAX_ROWS = 40

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #17202b;
  --soft: #566273; --grid: #e3e7ec; --axis: #8c97a5; --edge: #dde2e8;
  --good: #0f766e; --bad: #c2410c; --even: #7b8794;
  --c0: #2563eb; --c1: #c2570c; --c2: #0d8a7e; --c3: #8b3fd9; }
@media (prefers-color-scheme: dark) { :root { --page: #10141a; --card: #181e26; --ink: #e8edf3;
  --soft: #a3afbd; --grid: #2a333e; --axis: #6c7a8a; --edge: #2a333e; --good: #2dd4bf;
  --bad: #fb923c; --even: #8f9bab; --c0: #6ea8fe; --c1: #f7a14a; --c2: #2dd4bf; --c3: #c49bff; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 24px 16px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1360px; margin: 0 auto; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 4px; }
p { margin: 0 0 10px; color: var(--soft); overflow-wrap: anywhere; max-width: 90ch; }
.note { border-left: 4px solid var(--bad); padding: 4px 12px; color: var(--ink); }
.keys { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 12px;
  margin: 18px 0; padding: 0; }
.keys div { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 12px 16px; }
.keys dt { color: var(--soft); font-size: .85rem; }
.keys dd { margin: 0; font-size: 1.45rem; font-weight: 600; }
.keys dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.charts { columns: 2 500px; column-gap: 16px; margin-bottom: 16px; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 16px; margin: 0 0 16px; min-width: 0; }
.charts section { break-inside: avoid; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 460px; max-width: 720px; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  fill: var(--soft); }
svg .value, svg .label { fill: var(--ink); }
svg .value { font-weight: 600; }
svg .value.good { fill: var(--good); } svg .value.bad { fill: var(--bad); }
svg .value.even { fill: var(--soft); font-weight: 400; }
.grid { stroke: var(--grid); } .axis { stroke: var(--axis); }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.whisker { stroke-width: 1.5; opacity: .7; }
.spread { stroke: var(--ink); stroke-width: 1.5; opacity: .75; }
.mark { stroke: var(--card); stroke-width: 1.5; }
.line.s1 { stroke-dasharray: 7 4; } .line.s2 { stroke-dasharray: 2 4; }
.line.s3 { stroke-dasharray: 10 3 2 3; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); }
.bar.good { fill: var(--good); } .bar.bad { fill: var(--bad); } .bar.even { fill: var(--even); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 12px 0 2px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; }
tbody th { font-weight: 400; }
td.n, th.n { text-align: right; white-space: nowrap; }
footer { color: var(--soft); font-size: .85rem; }
@media print { body { background: none; } section, .keys div { break-inside: avoid; } }
"""


def to_html(run: BenchRun, others: Sequence[BenchRun] = ()) -> str:
    """The page for `run`; `others` are drawn beside it (three at most) and compared with it."""
    shown = (run, *others[: MAX_SERIES - 1])
    names = label_runs(shown)
    charts = [*_chart_results(shown, names), *_chart_ablations(run)]
    for other, name in zip(shown[1:], names[1:], strict=True):
        charts += _chart_comparison(run, other, names[0], name)
    body = [_head(run, len(others) - len(shown) + 1), _key_figures(run)]
    if charts:
        body.append(f'<div class="charts">{"".join(charts)}</div>')
    body.append(_tables(run))
    body += [
        _comparison_table(run, other, names[0], name)
        for other, name in zip(shown[1:], names[1:], strict=True)
    ]
    body.append(_facts_table(run))
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>llmrun bench: {safe(run.model)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in body if part)}\n"
        "<footer>Each value is the median of its repeats; spread is from the smallest to the "
        "largest. Made by llmrun bench.</footer>\n</main>\n</body>\n</html>\n"
    )


# ---- what stands above the charts


def _head(run: BenchRun, n_left_out: int) -> str:
    facts = [f"{key}: {value}" for key, value in describe_facts(run) if key != "model"]
    quant = f" ({run.quant})" if run.quant and run.quant not in run.model else ""
    lines = [f"<h1>{safe(run.model)}{safe(quant)}</h1>", f"<p>{safe(' · '.join(facts))}</p>"]
    notes = describe_notes(run)
    if n_left_out > 0:
        notes.append(f"{n_left_out} more runs are not shown: four can be told apart")
    lines += [f'<p class="note">{safe(note)}</p>' for note in notes]
    return f"<header>{''.join(lines)}</header>"


def _key_figures(run: BenchRun) -> str:
    """The few numbers that most people look for."""
    wanted = (
        ("Generation", find_speed(run, "tg")),
        ("Prompt processing", find_speed(run, "pp")),
        ("First token, cold", _named(run, "ttft_cold")),
        ("First token, warm prefix", _named(run, "ttft_warm")),
        ("Most streams together", _best_streams(run)),
        ("Peak memory", _named(run, "memory_peak")),
    )
    tiles = []
    for words, measure in wanted:
        if measure is None:
            continue
        value = format_value(measure.middle, measure.unit)
        small = describe_measure(measure.name)
        if len(measure.values) > 1:
            small += f", {format_spread(measure)}"
        tiles.append(
            f"<div><dt>{safe(words)}</dt><dd>{safe(value)}<small>{safe(small)}</small></dd></div>"
        )
    return f'<dl class="keys">{"".join(tiles)}</dl>' if tiles else ""


def _named(run: BenchRun, name: str) -> Measure | None:
    return next((m for m in run.measures if m.name == name and m.values), None)


def _best_streams(run: BenchRun) -> Measure | None:
    found = [m for m in run.measures if m.name.startswith("streams") and m.values]
    return max(found, key=lambda measure: measure.middle, default=None)


# ---- charts


def _chart_results(runs: Sequence[BenchRun], names: Sequence[str]) -> list[str]:
    charts = [
        _chart_generation(runs, names),
        _chart_prompts(runs, names),
        _chart_streams(runs, names),
        _chart_named(
            runs, names, "gaps", "Time between tokens", "What a reader waits for each token; lower "
            "is better.", {"itl_p50": "half are below", "itl_p95": "95 % are below",
                           "itl_p99": "99 % are below"}, "ms",
        ),
        _chart_named(
            runs, names, "first", "Time to the first token", "Reading the whole prompt, and a "
            "prompt whose beginning is in the cache; lower is better.",
            {"ttft_cold": "cold", "ttft_warm": "warm prefix"}, "s",
        ),
        _chart_named(
            runs, names, "memory", "Memory", "The process at its peak, and the planner's forecast.",
            {"memory_peak": "peak of the process", "memory_model": "of that, the model",
             "memory_forecast": "forecast for it"}, "bytes",
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart]


def _chart_generation(runs: Sequence[BenchRun], names: Sequence[str]) -> str:
    """By depth, with the number of tokens that most runs generated."""
    tables = [_speeds(run, "tg") for run in runs]
    counts = [n for table in tables for n, _ in table]
    if not counts:
        return ""
    n_tokens = max(set(counts), key=counts.count)
    depths = sorted({depth for table in tables for n, depth in table if n == n_tokens})
    series = [
        Series(name, tuple(_value(table.get((n_tokens, depth))) for depth in depths))
        for table, name in zip(tables, names, strict=True)
    ]
    if len(depths) < 2 and len(_with_values(series)) < 2:
        return ""
    return _line_section(
        "generation", "Generation", f"Speed of {n_tokens} tokens by how much is in the context "
        "before them; higher is better.", depths, series, "tokens in the context before",
    )  # fmt: skip


def _chart_prompts(runs: Sequence[BenchRun], names: Sequence[str]) -> str:
    """By the prompt's length: alone a line for each depth, with others a line for each run."""
    tables = [_speeds(run, "pp") for run in runs]
    lengths = sorted({n for table in tables for n, _ in table})
    depths = sorted({depth for _, depth in tables[0]})
    if len(_with_values([Series("", tuple(_value(m) for m in t.values())) for t in tables])) > 1:
        series = [
            Series(name, tuple(_value(table.get((n, 0))) for n in lengths))
            for table, name in zip(tables, names, strict=True)
        ]
        words = "Speed of reading prompts with nothing in the context; higher is better."
    else:
        series = [
            Series(f"at depth {depth}", tuple(_value(tables[0].get((n, depth))) for n in lengths))
            for depth in depths[:MAX_SERIES]
        ]
        words = "Speed of reading prompts, by how much is in the context; higher is better."
    if len(lengths) < 2 and len(_with_values(series)) < 2:
        return ""
    return _line_section(
        "prompt", "Prompt processing", words, lengths, series, "tokens of the prompt"
    )


def _chart_streams(runs: Sequence[BenchRun], names: Sequence[str]) -> str:
    tables: list[Mapping[int, Measure]] = [
        {
            int(m.name[7:]): m
            for m in run.measures
            if re.fullmatch(r"streams[0-9]{1,6}", m.name) and m.values
        }
        for run in runs
    ]
    counts = sorted({n for table in tables for n in table})
    series = [
        Series(name, tuple(_value(table.get(n)) for n in counts))
        for table, name in zip(tables, names, strict=True)
    ]
    if len(counts) < 2:
        return ""
    return _line_section(
        "streams", "Parallel streams", "Tokens a second of all streams together; higher is better.",
        counts, series, "streams at once",
    )  # fmt: skip


def _line_section(
    key: str, title: str, words: str, xs: Sequence[int], series: Sequence[Series], x_title: str
) -> str:
    chart = draw_lines(
        key,
        f"{title} in tok/s",
        [str(x) for x in xs],
        _with_values(series),
        x_title=x_title,
        write=format_number,
    )
    return _section(title, f"{words} In tok/s.", chart)


def _chart_named(
    runs: Sequence[BenchRun],
    names: Sequence[str],
    key: str,
    title: str,
    words: str,
    labels: Mapping[str, str],
    unit: Unit,
) -> str:
    """Bars for the measures of these names, where their unit is this one."""
    found = [
        {m.name: m for m in run.measures if m.name in labels and m.unit == unit and m.values}
        for run in runs
    ]
    kept = [name for name in labels if any(name in table for table in found)]
    if not kept:
        return ""
    series = [
        Series(who, tuple(_value(table.get(name)) for name in kept))
        for table, who in zip(found, names, strict=True)
    ]
    chart = draw_bars(
        key,
        title,
        [labels[name] for name in kept],
        _with_values(series),
        write=lambda value: format_value(value, unit),
    )
    return _section(title, words, chart)


def _chart_ablations(run: BenchRun) -> list[str]:
    entries = [entry for entry in run.ablations if entry.gain > 0]
    if not entries:
        return []
    entries.sort(key=lambda entry: -entry.gain)
    rows = [
        _factor(name, compare_measures(entry.off, entry.on), entry.gain)
        for entry, name in zip(entries, label_ablations(entries), strict=True)
    ]
    words = (
        "The same work with each setting off and on, in turns. The line is the 99 % interval of "
        "the factor; grey is what the repeats cannot tell from no difference."
    )
    title = "What pays here"
    chart = draw_factors("pays", title, rows[:_MAX_ROWS], below="costs", above="pays")
    return [_section(title, words, chart)]


def _chart_comparison(a: BenchRun, b: BenchRun, name_a: str, name_b: str) -> list[str]:
    rows = [row for row in compare(a, b) if row.ratio]
    if not rows:
        return []
    factors = [_factor(describe_measure(row.name), row, row.gain) for row in rows[:_MAX_ROWS]]
    title = f"{name_b} against {name_a}"
    words = (
        "Factors of which more than 1 is better. The line is the 99 % interval; grey is what the "
        "repeats cannot tell from no difference."
    )
    chart = draw_factors(
        f"against-{b.id}".replace(" ", "-"), title, factors, below="worse", above="better"
    )
    return [_section(title, words, chart)]


def _factor(label: str, row: Row, gain: float) -> Factor:
    low, _, high = row.gain_interval
    kind = _KINDS.get(row.verdict, "even")
    words = format_factor(gain)
    if not row.is_difference:
        words += f" ({describe_verdict(row.verdict)})"
    return Factor(label, Value(gain, low, high), kind, words)  # type: ignore[arg-type]


def _speeds(run: BenchRun, kind: str) -> dict[tuple[int, int], Measure]:
    """By number of tokens and depth."""
    found = {}
    for measure in run.measures:
        match = _SPEED.fullmatch(measure.name)
        if match and match[1] == kind and measure.values and measure.unit == "tok/s":
            found[int(match[2]), int(match[3] or 0)] = measure
    return found


def _value(measure: Measure | None) -> Value | None:
    return Value(measure.middle, *measure.spread) if measure is not None else None


def _with_values(series: Sequence[Series]) -> list[Series]:
    return [entry for entry in series if any(value is not None for value in entry.values)]


# ---- tables


def _tables(run: BenchRun) -> str:
    parts = []
    for group, measures in by_group(run.measures):
        rows = [
            (
                describe_measure(m.name),
                format_value(m.middle, m.unit),
                format_spread(m),
                str(len(m.values)),
            )
            for m in measures
        ]
        parts.append(
            _table(describe_group(group), ("", "median", "spread", "repeats"), rows, "lrrr")
        )
    if run.ablations:
        entries = [
            (
                entry.setting,
                entry.workload,
                format_value(entry.off.middle, entry.off.unit),
                format_value(entry.on.middle, entry.on.unit),
                format_factor(entry.gain),
                describe_verdict(compare_measures(entry.off, entry.on).verdict),
            )
            for entry in run.ablations
        ]
        head = ("setting", "workload", "off", "on", "gain", "so it is")
        parts.append(_table("What pays here", head, entries, "llrrrl"))
    return _section("All values", "", *parts) if parts else ""


def _comparison_table(a: BenchRun, b: BenchRun, name_a: str, name_b: str) -> str:
    rows = [
        (
            describe_measure(row.name),
            format_value(row.a.middle, row.a.unit),
            format_value(row.b.middle, row.b.unit),
            format_factor(row.ratio),
            f"{format_factor(row.low)} - {format_factor(row.high)}" if row.ratio else "-",
            f"{describe_verdict(row.verdict)}{f'; {row.note}' if row.note else ''}",
        )
        for row in compare(a, b)
    ]
    differences = [(d.what, d.a, d.b) for d in find_differences(a, b)]
    parts = []
    if differences:
        parts.append(_table("They differ in", ("", name_a, name_b), differences, "lll"))
    if rows:
        head = ("", name_a, name_b, "ratio", "99 % interval", f"{name_b} is")
        parts.append(_table("Results", head, rows, "lrrrrl"))
    return _section(f"{name_b} against {name_a}", "", *parts) if parts else ""


def _facts_table(run: BenchRun) -> str:
    facts = describe_facts(run)
    if run.model_sha256:
        facts.append(("sha256", run.model_sha256))
    parts = [_table("Run", ("", ""), facts, "ll")]
    settings = describe_settings(run.settings)
    if settings:
        parts.append(_table("Settings", ("", ""), settings, "ll"))
    return _section("How it was measured", "", *parts)


def _section(title: str, words: str, *parts: str) -> str:
    said = f"<p>{safe(words)}</p>" if words else ""
    wide = "".join(f'<div class="wide">{part}</div>' for part in parts)
    return f"<section><h2>{safe(title)}</h2>{said}{wide}</section>"


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    def cell(tag: str, i: int, text: str, more: str = "") -> str:
        kind = ' class="n"' if align[i] == "r" else ""
        return f"<{tag}{kind}{more}>{safe(text)}</{tag}>"

    lines = [f"<table><caption>{safe(caption)}</caption>"]
    if any(head):
        cells = [cell("th", i, text, ' scope="col"') for i, text in enumerate(head)]
        lines.append(f"<thead><tr>{''.join(cells)}</tr></thead>")
    lines.append("<tbody>")
    for row in rows:
        first = cell("th", 0, row[0], ' scope="row"')
        rest = "".join(cell("td", i, text) for i, text in enumerate(row) if i)
        lines.append(f"<tr>{first}{rest}</tr>")
    return "".join([*lines, "</tbody></table>"])

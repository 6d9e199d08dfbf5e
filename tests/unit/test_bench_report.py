"""The report as lines, CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.bench.compare import compare, find_differences
from llmrun.bench.report import (
    render_comparison,
    render_history,
    render_lines,
    to_csv,
    to_dict,
    to_markdown,
)
from llmrun.bench.types import Ablation, Measure
from llmrun.bench.words import (
    describe_measure,
    format_factor,
    format_number,
    format_spread,
    format_value,
    label_runs,
)
from tests.fakes.bench_runs import hostile_run, make_run, measure


def text_of(lines) -> str:
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def test_everything_is_in_the_report():
    text = text_of(render_lines(make_run(notes=("the machine was busy",)), width=120))
    for words in (
        "smollm2-135m (Q4_1)",
        "A Machine, 2 cores",
        "n_ctx 8192, flash_attn auto, use_mmap on",
        "Prompt processing",
        "prompt, 512 tokens at depth 4096       420 tok/s    412 - 428 tok/s        5",
        "of the process",
        "412 MB",
        "730 ms",
        "note: the machine was busy",
    ):
        assert words in text, words
    assert "seed" not in text
    assert "forecast" not in text


def test_forecasts_stand_beside():
    text = text_of(
        render_lines(make_run(), {"tg128": (60.0, 100.0), "load": (1.0, 1.0)}, width=120)
    )
    (line,) = (line for line in text.splitlines() if "generation, 128 tokens  " in line)
    assert line.endswith("60.0 - 100 tok/s")
    assert any(line.endswith("1.00 s") for line in text.splitlines() if "load time" in line)


def test_bars_of_what_pays_are_in_order_and_say_what_is_noise():
    text = text_of(render_lines(make_run(), width=120))
    lines = text[text.index("What pays") :].splitlines()[2:6]
    assert [line.split("  ")[1].strip() for line in lines] == [
        "prefix cache", "speculation: edit", "speculation: new text", "KV q8_0",
    ]  # fmt: skip
    assert [line.count("█") for line in lines] == [12, 4, 0, 2]
    assert lines[3].index("█") < lines[3].index("│") == lines[0].index("│") < lines[0].index("█")
    assert "within noise" in lines[2]
    assert "slower" in lines[3]
    plain = text_of(render_lines(make_run(), width=120, ascii_only=True))
    assert plain.isascii()
    assert "x9.20" in plain


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_where_there_is_any_room(width):
    run = make_run(notes=("a note of several words that has to be broken somewhere",))
    rows = compare(run, make_run("other", factor=1.3))
    for lines in (
        render_lines(run, width=width),
        render_comparison(rows, find_differences(run, make_run(machine="B")), width=width),
        render_history([run, run], width=width),
    ):
        assert lines
        if width >= 60:
            assert max(len(line) for line in text_of(lines).splitlines()) <= width


def test_what_was_interrupted_says_so():
    run = make_run(is_complete=False, measures=(), ablations=())
    for text in (text_of(render_lines(run)), to_markdown(run)):
        assert "interrupted" in text


def test_comparison():
    a, b = make_run(), make_run("other", factor=1.3, machine="B")
    text = text_of(render_comparison(compare(a, b), find_differences(a, b), width=140))
    assert "machine     A Machine, 2 cores  B" in text
    (line,) = (line for line in text.splitlines() if "generation, 128 tokens  " in line)
    assert line.split() == [
        "generation,", "128", "tokens", "87.0", "tok/s", "113", "tok/s", "×1.30",
        "×1.26", "-", "×1.34", "faster",
    ]  # fmt: skip
    assert "too few values" in text
    assert "nothing in common" in text_of(render_comparison([]))


def test_history_lines():
    runs = [make_run(), make_run("b", measures=(), target="http://h/v1")]
    lines = text_of(render_history(runs, width=140)).splitlines()
    assert lines[1].endswith("705 tok/s  87.0 tok/s")
    assert lines[2].split()[-3:] == ["http://h/v1", "-", "-"]


def test_csv_reads_back():
    rows = list(csv.DictReader(io.StringIO(to_csv(make_run()))))
    assert len(rows) == 14 + 2 * 4
    row = next(row for row in rows if row["name"] == "tg128")
    assert (row["kind"], row["unit"], row["n"], float(row["median"])) == (
        "measure",
        "tok/s",
        "5",
        87,
    )
    assert [float(v) for v in row["values"].split()] == [86.13, 87, 88.74, 87.87, 85.26]
    assert row["started_at"] == "2026-01-31T14:25:01+00:00"
    assert [r["kind"] for r in rows[-2:]] == ["off", "on"]
    assert rows[-1]["name"] == "KV q8_0/generation"


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_no_cell_is_a_formula(start):
    run = make_run(model=f"{start}cmd|' /C calc'!A0", measures=(measure(f"{start}1"),))
    for row in csv.reader(io.StringIO(to_csv(run))):
        assert not any(cell.startswith(start) for cell in row)


def test_markdown_has_tables():
    text = to_markdown(make_run(), {"tg128": (60.0, 100.0)})
    assert (
        "| generation, 128 tokens | 87.0 tok/s | 85.3 - 88.7 tok/s | 5 | 60.0 - 100 tok/s |" in text
    )
    assert "| KV q8\\_0 | generation | 87.0 tok/s | 60.0 tok/s | ×0.69 | slower |" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith(" |")


NUMBERS = st.floats(0, 1e12) | st.sampled_from([0.0, 5e-324, 1e300, 1e-300])


@given(
    st.lists(st.lists(NUMBERS, max_size=3), min_size=2, max_size=2),
    st.sampled_from(["tok/s", "s", "ms", "bytes", "share", "count"]),
)
def test_any_numbers_can_be_reported(pair, unit):
    off, on = (Measure("tg128", unit, tuple(some), True, "generation") for some in pair)
    run = make_run(measures=(off,), ablations=(Ablation("s", "w", off, on),))
    assert render_lines(run)
    assert render_comparison(compare(run, make_run(measures=(on,))))
    assert to_csv(run)
    assert to_markdown(run)
    json.dumps(to_dict(run), allow_nan=False)


def test_hostile_text_stays_text():
    run = hostile_run()
    rows = compare(run, run)
    for text in (
        text_of(render_lines(run)),
        text_of(render_comparison(rows, find_differences(run, make_run()))),
        text_of(render_history([run])),
        to_csv(run),
        to_markdown(run),
    ):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\\x1b[31m" in text.replace("\\\\x1b\\[", "\\x1b[")
    assert "<script" not in to_markdown(run)
    assert "](http" not in to_markdown(run)
    heads = {line.count(" | ") for line in to_markdown(run).splitlines() if "script" in line}
    assert all(len(row) == 18 for row in csv.reader(io.StringIO(to_csv(run))))
    assert heads <= {0, 3, 5}


def test_json_is_json():
    odd = Measure("x", "s", (float("nan"), float("inf")), False, "g", {"n": float("inf")})
    run = make_run(measures=(odd,), ablations=(Ablation("s", "w", odd, odd),))
    data = json.loads(json.dumps(to_dict(run), allow_nan=False))
    assert data["measures"][0]["values"] == []
    assert data["measures"][0]["median"] is None
    assert data["ablations"][0]["gain"] is None or data["ablations"][0]["gain"] == 0
    assert json.loads(json.dumps(to_dict(make_run())))["measures"][3]["median"] == 87.0


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (76.34, "tok/s", "76.3 tok/s"),
        (1234.5, "tok/s", "1234 tok/s"),
        (0.0421, "s", "42.1 ms"),
        (3.21, "s", "3.21 s"),
        (0.0, "s", "0.00 s"),
        (412e6, "bytes", "412 MB"),
        (0.634, "share", "63 %"),
        (8, "count", "8.00"),
        (float("nan"), "s", "-"),
    ],
)
def test_values(value, unit, text):
    assert format_value(value, unit) == text


def test_spreads():
    assert format_spread(measure("x", "tok/s", 1.0)) == "-"
    assert format_spread(measure("x", "s", 0.5, 2.0)) == "500 ms - 2.00 s"
    assert format_spread(measure("x", "bytes", 5e6, 5e6)) == "5.00 MB"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_is_short(value):
    assert len(format_number(value)) <= 14
    assert len(format_factor(value)) <= 15


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pp512", "prompt, 512 tokens"),
        ("tg128@4096", "generation, 128 tokens at depth 4096"),
        ("streams1", "1 stream"),
        ("streams16", "16 streams"),
        ("itl_p99", "between tokens, p99"),
        ("bandwidth_share@4096", "of the bandwidth limit at depth 4096"),
        ("something_new", "something_new"),
    ],
)
def test_names(name, words):
    assert describe_measure(name) == words


def test_runs_are_told_apart_by_what_differs():
    a = make_run("1")
    assert label_runs([a]) == ["smollm2-135m"]
    assert label_runs([a, make_run("2", target="http://h/v1")]) == ["llmrun", "http://h/v1"]
    assert label_runs([a, make_run("2", quant="Q8_0")]) == ["Q4_1", "Q8_0"]
    assert label_runs([a, make_run("2", started_at=0.0)]) == [
        "2026-01-31 14:25 UTC", "1970-01-01 00:00 UTC",
    ]  # fmt: skip
    assert label_runs([a, make_run("2")]) == ["1", "2"]

"""The page: well formed, whole in itself, and all text is text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.bench.charts import (
    Factor,
    Series,
    Value,
    draw_bars,
    draw_factors,
    draw_lines,
    find_ticks,
)
from llmrun.bench.html import to_html
from llmrun.bench.types import Ablation, Measure
from tests.fakes.bench_runs import HOSTILE, hostile_run, make_run, measure

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that every element is closed by its own end, and keeps what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def pictures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def words_of(svg: ElementTree.Element) -> str:
    return " ".join(svg.itertext())


def test_all_that_was_measured_is_drawn():
    text = to_html(make_run())
    page = Page(text)
    found = {svg.find("title").text: svg for svg in pictures(text)}
    assert list(found) == [
        "Generation in tok/s", "Prompt processing in tok/s", "Parallel streams in tok/s",
        "Time between tokens", "Time to the first token", "Memory", "What pays here",
    ]  # fmt: skip
    assert "0 87.0 (85.3 to 88.7), 4096 52.0" in found["Generation in tok/s"].find("desc").text
    assert len(found["Parallel streams in tok/s"].findall(".//circle")) == 3
    assert len(found["Prompt processing in tok/s"].findall("polyline")) == 1
    kinds = [e.get("class") for e in found["What pays here"].iter("rect")]
    assert kinds == ["bar good", "bar good", "bar even", "bar bad"]
    assert "×0.69" in words_of(found["What pays here"])
    everything = " ".join(page.texts)
    for words in ("87.0 tok/s", "85.3 - 88.7 tok/s", "8192", "b179" * 16, "A Machine, 2 cores"):
        assert words in everything


def test_other_runs_stand_beside():
    others = [
        make_run("b", factor=1.4, target="http://localhost:8000/v1"),
        make_run("c", factor=0.7, target="http://localhost:11434/v1"),
    ]
    text = to_html(make_run(), others)
    Page(text)
    found = {svg.find("title").text: svg for svg in pictures(text)}
    assert "http://localhost:8000/v1 against llmrun" in found
    worse = found["http://localhost:11434/v1 against llmrun"]
    assert {e.get("class") for e in worse.iter("rect")} == {"bar bad"}
    lines = found["Parallel streams in tok/s"].findall("polyline")
    assert [line.get("class") for line in lines] == ["line s0", "line s1", "line s2"]
    assert "http://localhost:8000/v1" in words_of(found["Parallel streams in tok/s"])
    assert "differ in" in text


def test_four_can_be_told_apart():
    others = [make_run(str(n), target=f"http://h{n}/v1") for n in range(6)]
    text = to_html(make_run(), others)
    assert "3 more runs are not shown" in text
    assert "http://h2/v1" in text
    assert "http://h3/v1" not in text


def test_it_needs_nothing_else_and_says_so():
    for run in (make_run(), hostile_run()):
        page = Page(to_html(run, [make_run("b")]))
        assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
        for name, value in page.attributes:
            assert name not in ("src", "href", "action", "style", "srcset")
            assert not name.startswith("on")
            assert "url(" not in (value or "")
        policy = [v for n, v in page.attributes if n == "content" and "default-src" in v]
        assert policy[0].startswith("default-src 'none'")
    text = to_html(make_run())
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_pictures_have_words():
    text = to_html(make_run(), [make_run("b", factor=2)])
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    for svg in pictures(text):
        assert svg.get("role") == "img"
        said = svg.get("aria-labelledby").split()
        assert [svg.find("title").get("id"), svg.find("desc").get("id")] == said
        assert svg.find("title").text
        assert svg.find("desc").text
        assert svg.get("aria-labelledby") and set(said) <= set(page.ids)


def test_hostile_text_is_text():
    text = to_html(hostile_run(), [make_run("b", model=HOSTILE, target=HOSTILE + "2")])
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert "\x1b" not in text
    assert not set("\u202e\ufffe\uffff") & set(text)
    assert any("<script>alert(1)</script>\"'&\\x1b[31m" in part for part in page.texts)
    assert pictures(text)


@settings(max_examples=50)
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_any_text_gives_a_page(name, setting, note):
    bad = Measure(name, "tok/s", (1.0, 2.0), True, setting)
    run = make_run(
        name,
        model=name,
        target=setting,
        notes=(note,),
        measures=(bad, measure("tg128"), measure("tg128@10")),
        ablations=(Ablation(setting, note, bad, bad),),
    )
    text = to_html(run, [make_run(note, model=setting)])
    Page(text)
    assert pictures(text)


NUMBERS = st.floats(0, 1e12) | st.sampled_from([0.0, 5e-324, 1e300, 1e-300])


@settings(max_examples=100)
@given(
    st.lists(st.lists(NUMBERS, max_size=3), min_size=1, max_size=6),
    st.lists(st.lists(NUMBERS, min_size=1, max_size=3), min_size=2, max_size=2),
)
def test_any_numbers_give_a_page(values, pair):
    names = ["tg128", "tg128@4096", "pp128", "ttft_cold", "streams4", "memory_peak"]
    units = ["tok/s", "tok/s", "tok/s", "s", "tok/s", "bytes"]
    measures = tuple(
        Measure(names[i], units[i], tuple(some), True, "g") for i, some in enumerate(values)
    )
    off, on = (Measure("w", "tok/s", tuple(some), True) for some in pair)
    run = make_run(measures=measures, ablations=(Ablation("s", "w", off, on),))
    text = to_html(run, [make_run("b")])
    Page(text)
    for svg in pictures(text):
        for element in svg.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "width", "height", "cx", "cy", "points"):
                assert not re.search("nan|inf", element.get(name, ""))
            assert float(element.get("width", 0)) >= 0


def test_nothing_measured_is_a_page_too():
    run = make_run(measures=(), ablations=(), settings={}, is_complete=False)
    page = Page(to_html(run))
    assert "svg" not in page.tags
    assert any("interrupted" in text for text in page.texts)


@given(st.floats(1e-9, 1e15))
def test_ticks_reach_the_largest(largest):
    ticks = find_ticks(largest)
    assert ticks[0] == 0
    assert ticks[-1] >= largest * (1 - 1e-6)
    assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize("largest", [0.0, -1.0, float("nan"), float("inf")])
def test_ticks_of_nothing(largest):
    assert find_ticks(largest) == [0.0, 1.0]


def test_values_in_pictures_are_at_their_places():
    one = Value(50.0, 40.0, 60.0)
    svg = ElementTree.fromstring(
        draw_lines("k", "t", ["1", "2"], [Series("s", (one, Value(100.0, 100.0, 100.0)))],
                   x_title="x", write=str)
    )  # fmt: skip
    axis = float(svg.find("line[@class='axis']").get("y1"))
    low, high = (axis - float(c.get("cy")) for c in svg.iter("circle"))
    assert high == pytest.approx(2 * low, abs=0.3)
    svg = ElementTree.fromstring(
        draw_bars("k", "t", ["a", "b"], [Series("s", (one, None))], write=str)
    )
    assert len(list(svg.iter("path"))) == 1
    factors = [
        Factor("twice", Value(2.0, 0, 0), "good", "×2"),
        Factor("half", Value(0.5, 0.4, 0.6), "bad", "×0.5"),
        Factor("not known", Value(0.0, 0, 0), "even", "-"),
    ]
    svg = ElementTree.fromstring(draw_factors("k", "t", factors, below="b", above="a"))
    right, left = svg.iter("rect")
    assert float(right.get("width")) == pytest.approx(float(left.get("width")), abs=0.2)
    axis = float(svg.find("line[@class='axis']").get("x1"))
    assert float(right.get("x")) == pytest.approx(axis, abs=0.11)
    assert float(left.get("x")) + float(left.get("width")) == pytest.approx(axis, abs=0.2)

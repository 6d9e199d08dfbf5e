"""Patterns of strings: the grammar takes exactly what the regular expression takes."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmrun.chat import automaton as automata
from llmrun.chat.automaton import automaton, trie
from llmrun.chat.grammar_writer import GrammarWriter, json_chars
from llmrun.chat.regex_syntax import (
    ALL,
    PatternError,
    PatternTooLargeError,
    UnreadablePatternError,
    complement,
    parse_regex,
    union,
)
from llmrun.chat.string_gbnf import other_key_body, string_body, texts_body
from llmrun.chat.tool_gbnf import grammar_writer
from tests.fakes import gbnf


def rules_of(pattern: str, low: int = 0, high: int | None = None) -> dict[str, gbnf.Node]:
    writer = GrammarWriter({})
    body = string_body(writer, pattern, None, low, high)
    assert body is not None
    return gbnf.parse(writer.text(body))


def spelled(text: str) -> str:
    """As the grammars spell a string: with a backslash where there must be one."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


ATOMS = st.sampled_from(
    ["a", "b", "-", '"', ".", "[ab]", "[^a]", r"\d", r"\w", r"\s", r"\S", r"\W", r"\D", r"\\",
     r"\.", r"\n", "[a-c0]", r"[^\d\n]", r"[\w-]", "^", "$", r"\x41", r"\u00e9", "[^\"\\\\]"]
)  # fmt: skip
TIMES = st.sampled_from(["", "", "?", "*", "+", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?"])


def _repeated(atoms: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda atom, times: atom if atom in "^$" else atom + times, atoms, TIMES)


PATTERNS = st.recursive(
    _repeated(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map("|".join),
        _repeated(st.one_of(inner.map("({})".format), inner.map("(?:{})".format))),
    ),
    max_leaves=8,
)
TEXTS = st.lists(st.text(st.sampled_from('ab-c"\\ 0.\nAé_\t')), max_size=12)


@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
@given(pattern=PATTERNS, anchored=st.booleans(), texts=TEXTS, seed=st.integers(0, 99))
@example("a|^b|c$", False, ["xax", "bx", "xb", "xc", "cx", ""], 0)
@example("(a*)*b", True, ["aab", "", "b"], 0)
@example("(^|-)a($|-)", False, ["a", "-a-", "ba", "b-a"], 0)
@example("$^|a", True, ["", "a", "aa"], 0)
@example("(a*$)^b", False, ["", "aab"], 0)
def test_a_grammar_takes_what_the_expression_takes(pattern, anchored, texts, seed):
    if anchored:
        pattern = f"^({pattern})$"
    # ECMA-262's `$` is the very end, and its classes are those of ASCII.
    python = re.compile(pattern.replace("$", r"\Z"), re.ASCII)
    try:
        rules = rules_of(pattern)
    except PatternError:
        assert not any(python.search(text) for text in texts)
        return
    for text in ["", *texts]:
        assert gbnf.matches(rules, spelled(text)) == bool(python.search(text)), text
    drawn = gbnf.sentence(rules, seed)
    assert python.search(json.loads(drawn)), drawn


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(pattern=PATTERNS, low=st.integers(0, 3), more=st.none() | st.integers(0, 3), texts=TEXTS)
def test_a_pattern_and_lengths_hold_together(pattern, low, more, texts):
    high = None if more is None else low + more
    python = re.compile(pattern.replace("$", r"\Z"), re.ASCII)
    try:
        rules = rules_of(pattern, low, high)
    except PatternError:
        rules = {}
    for text in texts:
        fits = low <= len(text) and (high is None or len(text) <= high)
        takes = bool(rules) and gbnf.matches(rules, spelled(text))
        assert takes == (fits and bool(python.search(text)))


HOSTILE = [
    "^(a?){500}$",
    r"^(\w+\s?)*$",
    "^((a|b)*c?)*$",
    "^(a*)*$",
    r"(\w+\s?)*x",
    "^(a|a)*$",
    "^(a|aa)+$",
    "^(a*)*(a*)*b$",
    "^" + "a?" * 70 + "$",
    "^((a?){20}){20}$",
    "^(a*b?){0,40}$",
    "^(.*a){12}$",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_an_ambiguous_pattern_has_one_way(pattern):
    """For no character is there more than one next state, and the states stay few."""
    found = automaton([parse_regex(pattern)])
    assert found is not None and len(found.steps) <= 501
    for steps in found.steps:
        ranges = sorted(each for group in steps.values() for each in group)
        assert all(before[1] < after[0] for before, after in pairwise(ranges))


@pytest.mark.parametrize(
    "pattern",
    [
        "^a{2001}$",
        "^a{2001,}$",
        "^(a{1,3} ){0,1000000000}$",
        "^a{" + "9" * 5000 + "}$",
        "^(((a{2000}){2000}){2000})$",
        "((){2000}){2000}",
        "(a|b)*a(a|b){20}",
        "(.*a){2000}",
        "^(" + "|".join(f"(.*{i}){{200}}" for i in range(10)) + ")$",
        "(" * 2000 + ")" * 2000,
        "(a?b?c?d?){2000}" * 20,
    ],
)
def test_a_pattern_of_too_many_states_is_refused(pattern):
    with pytest.raises(PatternTooLargeError) as caught:
        rules_of(pattern)
    assert caught.value.message == "the JSON schema cannot be turned into a grammar"
    assert caught.value.why


def test_looking_at_a_pattern_has_an_end(monkeypatch):
    """Both bounds hold: neither the states nor the work beneath each of them can run away."""
    monkeypatch.setattr(automata, "MAX_STATES", 10)
    with pytest.raises(PatternTooLargeError, match="turned into"):
        rules_of("^a{20}$")
    monkeypatch.undo()
    monkeypatch.setattr(automata, "MAX_WORK", 10)
    with pytest.raises(PatternTooLargeError):
        rules_of("^[a-z]{5}$")


@pytest.mark.parametrize(
    "pattern",
    ["(?=a)", "a(?!b)", "(?<=a)b", r"(a)\1", r"\bword\b", r"\p{L}", "(?i)a", "(((", "a)", "[a",
     "*", "a**", "a{2}{3}", "[]", "[b-a]", r"[\d-z]", "a{3,2}", "\\", r"\q", r"\ud800"],
)  # fmt: skip
def test_what_is_not_regular_is_told_apart(pattern):
    with pytest.raises(UnreadablePatternError):
        parse_regex(pattern)
    assert string_body(GrammarWriter({}), pattern, None, 0, None) is None


@pytest.mark.parametrize(
    ("pattern", "takes", "refuses"),
    [
        (r"^[a-z]+(-[a-z]+)*$", ["a", "a-b"], ["", "a-", "-a", "A"]),
        (r"^([0-9]{1,3}\.){3}[0-9]{1,3}$", ["127.0.0.1"], ["127.0.0", "1.1.1.1111"]),
        (r"^\+?[1-9]\d{1,14}$", ["+12", "4915"], ["0", "+"]),
        (r"^[^@\s]+@[^@\s]+\.[a-z]{2,}$", ["a@b.de"], ["a@b", "a b@c.de"]),
        ("^a{,3}$", ["", "aaa"], ["aaaa"]),
        ("^a{x}{$", ["a{x}{"], ["ax"]),
        ("b", ["abc", "b"], ["", "ac"]),
        ("", ["", "x"], []),
        (r"^\ud83d\ude42\u{1F600}\/\cA$", ["🙂😀/\x01"], ["🙂"]),
        (r"^(?<year>\d{4})-(?P<m>\d\d)$", ["2024-11"], ["24-11"]),
        (r'^"[\\/]$', ['"\\', '"/'], ["\\"]),
        (r"^[\s\S]$", ["\n", "é", " "], ["", "aa"]),
        (r"^.$", ["\t", "🙂"], ["\n", "\r", "\u2028"]),
        (r"^[\b\]\-^]$", ["\b", "]", "-", "^"], ["b"]),
    ],
)
def test_usual_patterns(pattern, takes, refuses):
    rules = rules_of(pattern)
    assert [text for text in takes if not gbnf.matches(rules, spelled(text))] == []
    assert [text for text in refuses if gbnf.matches(rules, spelled(text))] == []
    for seed in range(20):
        json.loads(gbnf.sentence(rules, seed))


def test_a_string_never_holds_what_breaks_it():
    for pattern in (".", "[^a]", "^[^b]{1,4}$", r"\W"):
        for text in ('"a\nb"', '"\x00-"', '"-"-"', '"-\\-"', '"-\x7f"'):
            assert not gbnf.matches(rules_of(pattern), text), (pattern, text)


def test_what_no_string_can_be_is_refused():
    for pattern, low, high in (("a^b", 0, None), ("^a$", 2, None), ("^abc$", 0, 2)):
        with pytest.raises(PatternError) as caught:
            rules_of(pattern, low, high)
        assert "no string" in (caught.value.why or "")


def test_a_pattern_too_large_with_its_lengths_is_kept_without_them():
    rules = rules_of("^([a-z]{20} )*$", 0, 1000)
    assert gbnf.matches(rules, '"' + "a" * 20 + ' "')


@pytest.mark.parametrize("form", ["date", "time", "date-time", "uuid", "uuid4"])
def test_formats(form):
    good = {"date": "2024-12-31", "time": "23:59:59.125+01:00", "date-time": "2024-02-29T00:00:00Z"}
    writer = GrammarWriter({})
    rules = gbnf.parse(writer.text(string_body(writer, None, form, 0, None) or ""))
    text = good.get(form, "123e4567-e89b-12d3-a456-426614174000")
    assert gbnf.matches(rules, f'"{text}"')
    assert not gbnf.matches(rules, f'"{text}0"') and not gbnf.matches(rules, '""')
    assert string_body(writer, None, "email", 0, None) is None


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.text(st.sampled_from('ab"\\é\n'), min_size=1), min_size=1, max_size=40))
@example(["1", "12", "123", *map(str, range(2000, 2020))])
def test_listed_texts_are_all_and_only_those(texts):
    writer = GrammarWriter({})
    rules = gbnf.parse(writer.text(texts_body(writer, texts)))
    assert all(gbnf.matches(rules, text) for text in texts)
    for text in ("", "a", "ab", texts[0] + "a", texts[0][:-1]):
        assert gbnf.matches(rules, text) == (text in texts)
    found = trie(texts)
    assert len(found.accepting) == len(set(texts))


@pytest.mark.parametrize("style", ["json", "gemma"])
def test_the_key_of_another_member_is_none_of_those_that_are_named(style):
    writer = grammar_writer()
    body = other_key_body(writer, style, ["name", "na", 'q"t'])
    assert body is not None
    rules = gbnf.parse(writer.text(body))
    for key in ("name", "na", "n", "nam", "names", "other", "x1", 'q"t', 'q"', ""):
        is_possible = style == "json" or key.isidentifier()
        takes = gbnf.matches(rules, spelled(key) if style == "json" else key)
        assert takes == (is_possible and key not in ("name", "na", 'q"t')), key
    assert other_key_body(writer, style, [f"{i}" * 500 for i in range(50)]) is None


def test_one_character_is_spelled_in_one_way():
    writer = GrammarWriter({})
    for code in [*range(0x300), 0x2028, 0xFFFF, 0x1F600]:
        (body,) = json_chars(writer, ((code, code),))
        rules = gbnf.parse(f"root ::= {body}\n")
        assert gbnf.matches(rules, spelled(chr(code))[1:-1]), body


def test_ranges():
    assert union([(5, 9), (1, 2), (3, 4), (20, 30), (25, 26)]) == ((1, 9), (20, 30))
    assert complement(()) == ALL and complement(ALL) == ()
    assert complement(((0, 9), (20, 0x10FFFF))) == ((10, 19),)
    assert union([(0xD000, 0xE001)]) == ((0xD000, 0xD7FF), (0xE000, 0xE001))

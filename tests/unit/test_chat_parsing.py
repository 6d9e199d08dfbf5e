"""Splitting thinking from answers, for every family and every way of cutting the text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmrun.chat.parsing import (
    COMMAND,
    GEMMA_4,
    HARMONY,
    MINISTRAL,
    SEED,
    THINK,
    ThinkingFormat,
    detect_format,
    make_splitter,
    needs_special_text,
    starts_inside,
)
from tests.fakes.fake_tokenizer import FakeTokenizer

FORMATS = (THINK, GEMMA_4, HARMONY, MINISTRAL, COMMAND, SEED)


def split(fmt: ThinkingFormat | None, inside: bool, chunks: list[str]) -> tuple[str, str]:
    splitter = make_splitter(fmt, inside)
    deltas = [delta for chunk in chunks for delta in splitter.feed(chunk)] + splitter.flush()
    assert all(delta.text for delta in deltas)
    return (
        "".join(d.text for d in deltas if d.kind == "thinking"),
        "".join(d.text for d in deltas if d.kind == "answer"),
    )


CASES = [
    (None, False, "<think>all of it</think> is text", "", "<think>all of it</think> is text"),
    # Qwen3, SmolLM3: the model opens the tag.
    (THINK, False, "<think>\nSo: 2+2.\n</think>\n\nIt is 4.", "So: 2+2.", "It is 4."),
    (THINK, False, "\n<think>a</think>b", "a", "b"),
    (THINK, False, "Just an answer.\n", "", "Just an answer.\n"),
    (THINK, False, "  indented", "", "  indented"),
    (THINK, False, "<think>\n\n</think>\n\nNo thought.", "", "No thought."),
    # Qwen3.5, R1, GLM, Nemotron: the prompt opened it.
    (THINK, True, "\nHm, a  b\n\nc.\n</think>\n\nYes.", "Hm, a  b\n\nc.", "Yes."),
    (THINK, True, "never ends \n", "never ends", ""),
    (THINK, True, "\n", "", ""),
    (THINK, True, "a < b and </thin air", "a < b and </thin air", ""),
    # A lone end tag at the start; tags in an answer about tags are text.
    (THINK, False, "</think>\n\nHello", "", "Hello"),
    (THINK, False, "Write <think> and </think>.", "", "Write <think> and </think>."),
    (THINK, True, "t</think>Use <think>x</think>", "t", "Use <think>x</think>"),
    (SEED, False, "<seed:think>a</seed:think>b", "a", "b"),
    (GEMMA_4, False, "<|channel>thought\nplan\n<channel|>Done.", "plan", "Done."),
    (GEMMA_4, False, "Done.<|channel>thought\n<channel|>", "", "Done."),
    (GEMMA_4, False, "<channel|>Done.", "", "Done."),
    (GEMMA_4, False, "Do<channel|>ne.", "", "Done."),
    (GEMMA_4, True, "plan<channel|>Done.", "plan", "Done."),
    (GEMMA_4, False, "a<|channel>thought\nx<channel|> b<|channel>thought\ny<channel|>",
     "x\n\ny", "a b"),
    (MINISTRAL, False, "[THINK]x[/THINK]y", "x", "y"),
    (COMMAND, False, "<|START_THINKING|>x<|END_THINKING|>y", "x", "y"),
    (HARMONY, False,
     "<|channel|>analysis<|message|>Need 4.<|end|><|start|>assistant"
     "<|channel|>final<|message|>It is 4.", "Need 4.", "It is 4."),
    (HARMONY, False, "<|channel|>final<|message|>  Hi\n", "", "Hi\n"),
    (HARMONY, False,
     "<|channel|>commentary<|channel|>analysis<|message|>t<|end|>"
     "<|start|>assistant<|channel|>final<|message|>a", "t", "a"),
    (HARMONY, False,
     "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>analysis<|message|>two"
     "<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant"
     "<|channel|>final<|message|>Done.", "one\n\ntwo", "Wait.\n\nDone."),
    (HARMONY, False,
     " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}", "", "{}"),
    (HARMONY, False, "no channel at all", "", "no channel at all"),
    (HARMONY, False, "t", "", "t"),
    (HARMONY, True, "t<|end|><|start|>assistant<|channel|>final<|message|>a", "t", "a"),
    (HARMONY, False, "<|channel|>analysis<|message|>cut short", "cut short", ""),
    (HARMONY, False, "<|channel|>ana", "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "inside", "text", "thinking", "answer"), CASES)
def test_split_is_right_whole_and_character_by_character(fmt, inside, text, thinking, answer):
    assert split(fmt, inside, [text]) == (thinking, answer)
    assert split(fmt, inside, list(text)) == (thinking, answer)


def test_text_streams_before_the_reply_ends():
    splitter = make_splitter(THINK)
    assert splitter.feed("<think>Let me") != []
    assert [d.text for d in splitter.feed(" see</think>Yes")] == [" see", "Yes"]


def test_a_partial_tag_is_held_back_and_given_when_it_becomes_text():
    splitter = make_splitter(GEMMA_4)
    assert "".join(d.text for d in splitter.feed("a <chan")) == "a "
    assert "".join(d.text for d in splitter.feed("ge> b")) == "<change> b"


def _pieces() -> st.SearchStrategy[str]:
    tags = sorted({tag for fmt in FORMATS for tag in (*fmt.tags, fmt.start)})
    fragments = [tag[:i] for tag in tags for i in (1, len(tag) // 2, len(tag) - 1)]
    words = ["analysis", "final", "assistant", "thought\n", "\n", " ", "a", "to=", "<", "|>"]
    return st.lists(st.sampled_from([*tags, *fragments, *words]), max_size=14).map("".join)


@settings(deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    inside=st.booleans(),
    text=_pieces(),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
@example(THINK, False, "a <think>b", [1, 4])
@example(HARMONY, False, "</seed:think><|message|>", [2])
@example(HARMONY, False, "<|channel|>" + "a" * 240 + "<|message|>b", [258])
def test_any_cutting_gives_the_same_result(fmt, inside, text, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert split(fmt, inside, chunks) == split(fmt, inside, [text])


@settings(deadline=None)
@given(
    inside=st.booleans(),
    text=st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "a", "b c"])).map("".join),
)
def test_nothing_but_tags_and_white_space_is_lost(inside, text):
    thinking, answer = split(THINK, inside, [text])
    left = (thinking + answer).replace("<think>", "").replace("</think>", "")
    whole = text.replace("<think>", "").replace("</think>", "")
    assert "".join(left.split()) == "".join(whole.split())


@pytest.mark.parametrize(
    ("source", "fmt"),
    [
        (None, None),
        ("{{ '<|im_start|>' }}", None),
        ("{{ '<|im_start|>assistant\\n<think>\\n\\n</think>' }}", THINK),
        ("{{ content.split('</think>')[-1] }}", THINK),
        ("{{ '<|turn>model\\n<|channel>thought\\n<channel|>' }}", GEMMA_4),
        ("{{ '<|start|>assistant<|channel|>final<|message|>' }}", HARMONY),
        ("{{ '[THINK]' }}{# not <think> #}", MINISTRAL),
        ("{{ '<|START_THINKING|>' }}", COMMAND),
        ("{{ '<seed:think>' }}", SEED),
    ],
)
def test_format_is_detected_from_the_template(source, fmt):
    assert detect_format(source, FakeTokenizer()) is fmt


def test_format_is_detected_from_the_vocabulary_of_a_model_with_a_plain_template():
    tokenizer = FakeTokenizer(user_defined=("<think>", "</think>"))
    assert detect_format("plain", tokenizer) is THINK
    assert detect_format(None, tokenizer) is None


def test_special_text_is_needed_only_where_the_tags_are_control_tokens():
    assert needs_special_text(HARMONY, FakeTokenizer(control=("<|channel|>", "<|message|>")))
    assert not needs_special_text(THINK, FakeTokenizer(user_defined=("<think>", "</think>")))
    assert not needs_special_text(THINK, FakeTokenizer())


@pytest.mark.parametrize(
    ("prompt", "fmt", "inside"),
    [
        ("<|im_start|>assistant\n", THINK, False),
        ("<|im_start|>assistant\n<think>\n", THINK, True),
        ("<|assistant|><think>", THINK, True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", THINK, False),
        ("user\nwhat is <think>?<|im_end|>\nassistant\n", THINK, False),
        ("<|turn>model\n<|channel>thought\n<channel|>", GEMMA_4, False),
        ("<|turn>model\n<|channel>thought\n", GEMMA_4, True),
        ("<|start|>assistant", HARMONY, False),
    ],
)
def test_starts_inside_is_read_off_the_prompt(prompt, fmt, inside):
    assert starts_inside(prompt, fmt) is inside

"""Which syntax a model calls tools in: read off its chat template."""

from __future__ import annotations

import pytest

from llmrun.chat.parsing import needs_special_text
from llmrun.chat.tool_formats import (
    APRIEL,
    COMMAND,
    DEEPSEEK_R1,
    DEEPSEEK_V3_1,
    DEEPSEEK_V3_2,
    DEEPSEEK_V4,
    FALLBACK,
    FORMATS,
    FUNCTIONARY,
    GEMMA_4,
    GLM,
    GRANITE_3,
    HARMONY,
    HERMES,
    LFM2,
    LLAMA_3,
    MINIMAX,
    MISTRAL,
    MISTRAL_LIST,
    NEMOTRON_2,
    QWEN_CODER,
    SEED,
    ToolSpec,
    as_template_tools,
    detect_tool_format,
)
from tests.fakes.fake_tokenizer import FakeTokenizer

# What the families' templates hold, shortened to what tells them apart.
TEMPLATES = [
    ("{% for t in tools %}{% endfor %}<tool_call>\\n{\"name\": <n>, \"arguments\": <a>}", HERMES),
    ("{{ tools }} '<tool_call>\\n{\\\"name\\\": \\\"' + tool_call.arguments | tojson", HERMES),
    ("{{ tools }}<tool_call>\\n<function=f>\\n<parameter=p>", QWEN_CODER),
    ("{{ tools }}<seed:tool_call>\\n<function=f>\\n<parameter=p>", SEED),
    ("{{ tools }}<tool_call>{n}<arg_key>{k}</arg_key><arg_value>{v}</arg_value>", GLM),
    ("{{ tools }}<minimax:tool_call>\\n<invoke name=\"f\">", MINIMAX),
    ("{{ tools }}{% set dsml_token = '｜DSML｜' %}function_calls", DEEPSEEK_V3_2),
    ("{{ tools }}{% set dsml_token = '｜DSML｜' %}tool_calls", DEEPSEEK_V4),
    ("{{ tools }}'<｜tool▁calls▁begin｜>' + '\\n```json'", DEEPSEEK_R1),
    ("{{ tools }}'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'", DEEPSEEK_V3_1),
    ("{{ tools }}[SYSTEM_PROMPT]'[TOOL_CALLS]' + name + '[ARGS]'", MISTRAL),
    ("{{ tools }}'[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]'", MISTRAL),
    ("{{ tools }}\"[TOOL_CALLS][\"", MISTRAL_LIST),
    ("{{ tools }}'<|tool_call>call:' + name + '{'{# not <tool_call> #}", GEMMA_4),
    ("{{ tools }}\"<|start|>assistant to=functions.\" + name + \"<|channel|>comm", HARMONY),
    ("{{ tools }}<|tool_list_start|>", LFM2),
    ("{{ tools }}\"List of tools: [\"", LFM2),
    ("{{ tools }}<|START_ACTION|>[{\"tool_name\"", COMMAND),
    ("{{ tools }}<|tool_call|>", GRANITE_3),
    ("{{ tools }}<TOOLCALL>[", NEMOTRON_2),
    ("{{ tools }}<tool_calls>[{", APRIEL),
    ("{{ tools }}<|python_tag|><function=f>{}</function>", FUNCTIONARY),
    ("{{ tools }}{\"name\": function name, \"parameters\": args} ipython", LLAMA_3),
    # Not shown any tools, or in a syntax that is not read.
    ("{{ messages }}", FALLBACK),
    ("{{ messages }}<｜tool▁calls▁begin｜>", FALLBACK),
    ("{{ tools }}", FALLBACK),
    ("{{ tools }}<tool_call>\\n<invoke name=\"f\"> \"arguments\"", FALLBACK),
    ("{{ tools }}>>>all <function=f></function>", FALLBACK),
    (None, None),
    ("", None),
]  # fmt: skip


@pytest.mark.parametrize(("source", "fmt"), TEMPLATES)
def test_the_format_is_detected_from_the_template(source, fmt):
    assert detect_tool_format(source, FakeTokenizer()) is fmt


def test_every_format_is_detected_somewhere():
    assert {fmt.name for _, fmt in TEMPLATES if fmt} == {fmt.name for fmt in FORMATS}
    assert len({fmt.name for fmt in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize(
    ("fmt", "control"),
    [
        (HERMES, "<tool_call>"),
        (GEMMA_4, "<|tool_call>"),
        (GEMMA_4, '<|"|>'),
        (MISTRAL, "[ARGS]"),
        (MISTRAL, "[CALL_ID]"),
        (LLAMA_3, "<|python_tag|>"),
        (HARMONY, "<|channel|>"),
        (DEEPSEEK_R1, "<｜tool▁sep｜>"),
        (DEEPSEEK_R1, "<｜tool▁call▁end｜>"),
        (GLM, "<arg_value>"),
        (GLM, "</arg_key>"),
        (LFM2, "<|tool_call_end|>"),
    ],
)
def test_tags_that_are_control_tokens_must_be_shown(fmt, control):
    assert needs_special_text(fmt, FakeTokenizer(control=(control,)))
    assert not needs_special_text(fmt, FakeTokenizer(control=("<s>",), user_defined=(control,)))


def test_tools_have_the_shape_that_templates_read():
    schema = {"properties": {"a": {"type": "string"}}, "required": ["a"]}
    assert as_template_tools([ToolSpec("f", "does it", schema), ToolSpec("g")]) == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "does it",
                "parameters": {"type": "object", **schema},
            },
        },
        {
            "type": "function",
            "function": {
                "name": "g",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        },
    ]

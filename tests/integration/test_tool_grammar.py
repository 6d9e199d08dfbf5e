"""Forced calls of tools on a real model: the grammars parse, and what they allow is a call."""

from __future__ import annotations

import json

import pytest

from llmrun.chat.tool_calls import CallStart, CallText, make_tool_splitter
from llmrun.chat.tool_formats import (
    FORMATS,
    GEMMA_4,
    HERMES,
    LFM2,
    MISTRAL,
    QWEN_CODER,
    ToolSpec,
)
from llmrun.chat.tool_grammar import tool_grammar
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions, Request, SamplingParams, TextEvent
from tests.fakes.models import smollm2_path

WEATHER = ToolSpec(
    "get_weather",
    "The weather of a town",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "days": {"enum": [1, 2, 3]},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "days", "unit"],
    },
)
RICH = ToolSpec(
    "rich",
    "",
    {
        "properties": {
            'a "quoted" \\ name': {"const": 'v"\\\n'},
            "pattern": {"type": "string", "pattern": "^[a-c]{2}[^x]$"},
            "day": {"type": "string", "format": "date"},
            "long": {"type": "string", "minLength": 10, "maxLength": 1000},
            "tree": {"$ref": "#/$defs/tree"},
            "either": {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": 3}]},
            "untyped": {"description": "no type"},
            "map": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
            }
        },
    },
)


@pytest.fixture(scope="module")
def engine():
    with Engine.open([smollm2_path()], EngineOptions(n_ctx=1024)) as opened:
        yield opened


def _sample(engine: Engine, grammar: str, seed: int, max_tokens: int) -> str:
    text = "<|im_start|>user\nWeather in Rome for 2 days?<|im_end|>\n<|im_start|>assistant\n"
    prompt = engine.tokenizer.tokenize(text, add_special=False, parse_special=True)
    sampling = SamplingParams(temperature=0.7, seed=seed, grammar=grammar)
    request = Request(tuple(prompt), sampling, max_tokens=max_tokens)
    return "".join(e.text for e in engine.submit(request) if isinstance(e, TextEvent))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_the_binding_takes_every_grammar(engine, fmt):
    grammar = tool_grammar(fmt, [WEATHER, RICH, ToolSpec("none")], parallel=True)
    first = (fmt.begin or fmt.call_start or "{")[:1]
    assert _sample(engine, grammar, seed=1, max_tokens=2).startswith(first)


@pytest.mark.parametrize(
    "fmt", [HERMES, QWEN_CODER, GEMMA_4, MISTRAL, LFM2], ids=lambda fmt: fmt.name
)
def test_a_forced_call_of_a_small_model_fits_the_schema(engine, fmt):
    tools = [WEATHER, RICH]
    grammar = tool_grammar(fmt, tools, name="get_weather", parallel=False)
    text = _sample(engine, grammar, seed=1, max_tokens=120)
    splitter = make_tool_splitter(fmt, tools)
    events = splitter.feed(text) + splitter.flush()
    assert events[0] == CallStart(0, "get_weather"), text
    assert all(isinstance(event, CallText) for event in events[1:]), text
    arguments = json.loads("".join(e.text for e in events if isinstance(e, CallText)))
    assert arguments.keys() == {"city", "days", "unit"}
    assert isinstance(arguments["city"], str) and len(arguments["city"]) <= 20
    assert arguments["days"] in (1, 2, 3) and arguments["unit"] in ("celsius", "fahrenheit")

"""What a JSON schema promises: the output always parses."""

from __future__ import annotations

import json

import pytest

from llmrun.engine.grammar import grammar_of_schema
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions, Request, SamplingParams, TextEvent
from tests.fakes.models import smollm2_path


@pytest.fixture(scope="module")
def engine():
    with Engine.open([smollm2_path()], EngineOptions(n_ctx=1024)) as opened:
        yield opened


def _answer(engine: Engine, schema: dict[str, object], seed: int, bias: float) -> str:
    text = "<|im_start|>user\nWrite four lines.<|im_end|>\n<|im_start|>assistant\n"
    prompt = engine.tokenizer.tokenize(text, add_special=False, parse_special=True)
    breaks = [
        token
        for text in ("\n", "\n\n", "\t", '"', "\r", "\x01", "\x7f", "\\")
        for token in engine.tokenizer.tokenize(text, add_special=False, parse_special=False)
    ]
    sampling = SamplingParams(
        temperature=1.2,
        seed=seed,
        grammar=grammar_of_schema(json.dumps(schema)),
        logit_bias=tuple((token, bias) for token in sorted(set(breaks))),
    )
    request = Request(tuple(prompt), sampling, max_tokens=900)
    return "".join(e.text for e in engine.submit(request) if isinstance(e, TextEvent))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "string",
    [
        {"type": "string", "maxLength": 60},
        {"type": "string", "pattern": "^[^a].{1,20}$"},
        {"type": "string", "pattern": "^.{3,12}$"},
    ],
    ids=["characters", "negated class", "dot"],
)
@pytest.mark.parametrize("bias", [0.0, 12.0])
def test_a_string_never_holds_what_breaks_it(engine, string, seed, bias):
    """Also where the sampler is pushed towards newlines, quotes, backslashes and controls."""
    schema = {"type": "object", "properties": {"poem": string}, "required": ["poem"]}
    text = _answer(engine, schema, seed, bias)
    assert isinstance(json.loads(text)["poem"], str), text


def test_literals_and_plain_classes_stay_as_they_are():
    grammar = grammar_of_schema('{"enum": ["[^a]", "b"]}')
    assert '"\\"[^a]\\""' in grammar
    assert r"[0-9]" in grammar_of_schema('{"type": "integer"}')

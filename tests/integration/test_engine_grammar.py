"""What a JSON schema promises: the output always parses."""

from __future__ import annotations

import json

import pytest

from llmrun.chat.schema_grammar import schema_grammar
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions, Request, SamplingParams, TextEvent
from tests.fakes.grammar_drive import drive
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
        grammar=schema_grammar(json.dumps(schema)),
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


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^(a?){500}$", "a" * 400),
        (r"^(\w+\s?)*$", "a" * 200),
        ("^((a|b)*c?)*$", "ab" * 100 + "c"),
        ("^(a*)*$", "a" * 200),
        ("(.*a){12}", "a" * 200),
        ("^" + "a?" * 70, "a" * 70),
    ],
)
def test_under_an_ambiguous_pattern_llama_cpp_comes_to_an_end(pattern, text):
    grammar = schema_grammar(json.dumps({"type": "array", "items": {"pattern": pattern}}))
    assert drive(smollm2_path(), grammar, f'["{text}", "{text}') == "done"


def test_the_widest_schemas_that_are_taken_come_to_an_end():
    text = {"type": "string"}
    names = [f"key_{i}" for i in range(300)]
    optional = {"properties": dict.fromkeys(names, text)}
    choices = [{"properties": {"kind": {"const": n}}, "required": ["kind"]} for n in names]
    assert (
        drive(smollm2_path(), schema_grammar(json.dumps(optional)), '{"key_1": "x", "k') == "done"
    )
    united = schema_grammar(json.dumps({"anyOf": choices}))
    assert drive(smollm2_path(), united, '{"kind": "key_17"}') == "done"
    listed = schema_grammar(json.dumps({"enum": [f"a common beginning {i}" for i in range(5000)]}))
    assert drive(smollm2_path(), listed, '"a common beginning 4') == "done"

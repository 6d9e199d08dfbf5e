"""The engine on real models, against llama.cpp driven by hand, bit for bit where it is bit-stable:
one sequence, the same chunks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from llmrun.chat.schema_grammar import schema_grammar
from llmrun.engine.loop import Engine
from llmrun.engine.types import (
    EngineOptions,
    FinishEvent,
    PromptEvent,
    Request,
    SamplingParams,
    TextEvent,
)
from llmrun.errors import EngineError, UsageError
from tests.fakes.gguf_builder import GgufBuilder
from tests.fakes.low_level import PlainContext
from tests.fakes.models import gemma3_path, smollm2_path
from tests.unit.test_engine_loop import Outcome, read

GREEDY = SamplingParams(temperature=0)
# Another number of threads or rows rounds otherwise.
OPTIONS = EngineOptions(n_ctx=2048, n_threads=2, steady_threads=False, speculative="off")
STORY = "Once upon a time there was a fox who lived by the river. "


@pytest.fixture(scope="module")
def smol() -> Iterator[Engine]:
    with Engine.open([smollm2_path()], OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def gemma() -> Iterator[Engine]:
    with Engine.open([gemma3_path()], OPTIONS) as engine:
        yield engine


def tokens_of(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.tokenize(text, add_special=True, parse_special=False)


def long_prompt(engine: Engine, n_tokens: int, start: str = "") -> list[int]:
    """A text of exactly so many tokens that does not repeat itself."""
    text = start + " ".join(f"{n}. The fox saw {n * 7} fish." for n in range(n_tokens // 6))
    tokens = tokens_of(engine, text)
    assert len(tokens) >= n_tokens
    return tokens[:n_tokens]


def generate(
    engine: Engine, prompt: list[int], n: int, sampling: SamplingParams = GREEDY, **more: object
) -> Outcome:
    request = Request(tuple(prompt), sampling=sampling, max_tokens=n, **more)  # type: ignore[arg-type]
    return read(engine.submit(request))


# ---- greedy answers and conversations


@pytest.mark.parametrize("name", ["smol", "gemma"])
def test_greedy_equals_a_plain_loop(name: str, request: pytest.FixtureRequest) -> None:
    """A first answer, the next turn on its cache, and a turn taken back."""
    engine: Engine = request.getfixturevalue(name)
    path = smollm2_path() if name == "smol" else gemma3_path()
    prompt = tokens_of(engine, f"A story for {name}. " + STORY)
    more = tokens_of(engine, " And then the bear said that")[-6:]

    first = generate(engine, prompt, 12)
    turn = [*prompt, *first.tokens, *more]
    second = generate(engine, turn, 12)
    third = generate(engine, [*prompt, *more], 8)

    assert first.finish.usage.n_cached <= 2  # BOS and such of an earlier test
    assert second.finish.usage.n_cached == len(prompt) + len(first.tokens) - 1
    assert third.finish.usage.n_cached == len(prompt)
    with PlainContext(path, n_ctx=2048) as plain:
        if n := first.finish.usage.n_cached:
            plain.read(prompt[:n])
            plain.read(prompt[n:])
        else:
            plain.read(prompt)
        assert tuple(plain.greedy(12)) == first.tokens
        plain.read(turn[plain.pos :])
        assert tuple(plain.greedy(12)) == second.tokens
        plain.cut(len(prompt))
        plain.read(more)
        assert tuple(plain.greedy(8)) == third.tokens


def test_a_window_is_reused_while_it_is_there_and_read_again_when_not(gemma: Engine) -> None:
    """Gemma's window is 512: of 1700 tokens, 1300 can be gone back to, 700 cannot."""
    prompt = long_prompt(gemma, 1700, "Counting. ")
    other = tokens_of(gemma, " But a bear")[1:]
    generate(gemma, prompt, 1)
    near = generate(gemma, [*prompt[:1300], *other], 6)
    far_prompt = [*prompt[:700], *other]
    far = generate(gemma, far_prompt, 12)
    assert near.finish.usage.n_cached == 1300
    assert far.finish.usage.n_cached == 0
    with PlainContext(gemma3_path(), n_ctx=2048) as plain:
        plain.read(far_prompt)
        assert tuple(plain.greedy(12)) == far.tokens


def test_answers_at_once_are_as_good_as_alone() -> None:
    """Kernels round otherwise with other rows in the batch, so greedy answers may part where two
    tokens are as probable. Here the texts leave no such choice."""
    texts = ["1 2 3 4 5 6 7 8 9 10 11 12", "a b c d e f g h i j", "2 4 6 8 10 12 14 16 18"]
    with Engine.open([smollm2_path()], EngineOptions(n_ctx=512, n_seq_max=3)) as engine:
        streams = [
            engine.submit(Request(tuple(tokens_of(engine, text)), GREEDY, max_tokens=8))
            for text in texts
        ]
        answers = [read(stream).text for stream in streams]
    assert answers[0].startswith(" 13 1")
    assert answers[1].startswith(" k l m")
    assert answers[2].startswith(" 20 2")


# ---- text


def test_a_stop_string_over_token_borders(smol: Engine) -> None:
    prompt = tokens_of(smol, "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,")
    whole = generate(smol, prompt, 12)
    assert len(whole.tokens) == 12
    # From the middle of one token over all of the next to the middle of the third.
    pieces = [smol.tokenizer.piece(token).decode() for token in whole.tokens]
    before = "".join(pieces[:4])
    stop = "".join(pieces[4:7])[1:-1] or pieces[5]
    assert whole.text.index(stop) >= 0
    cut = generate(smol, prompt, 12, stop=("never", stop))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish.reason, cut.finish.stop) == ("stop", stop)
    assert before.startswith(cut.text[: len(before)])


def test_an_instruct_model_ends_by_itself(smol: Engine) -> None:
    text = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    prompt = smol.tokenizer.tokenize(text, add_special=False, parse_special=True)
    outcome = generate(smol, prompt, 60)
    assert outcome.finish.reason == "stop"
    assert "<|im_end|>" not in outcome.text
    assert outcome.finish.usage.n_completion == len(outcome.tokens) < 60


# ---- sampling


EVERY_SAMPLER = {
    "defaults": SamplingParams(seed=7),
    "typical": SamplingParams(typical_p=0.5, seed=7),
    "xtc": SamplingParams(xtc_probability=1.0, xtc_threshold=0.05, seed=7),
    "dry": SamplingParams(dry_multiplier=2.0, seed=7),
    "penalties": SamplingParams(
        repeat_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5, repeat_last_n=-1, seed=7
    ),
    "top_p over the whole vocabulary": SamplingParams(top_k=0, top_p=0.9, min_p=0.0, seed=7),
    "temperature only": SamplingParams(top_k=0, top_p=1.0, min_p=0.0, temperature=1.5, seed=7),
    "all": SamplingParams(
        typical_p=0.9,
        xtc_probability=0.5,
        dry_multiplier=1.0,
        repeat_penalty=1.1,
        logit_bias=((10, -1.0),),
        seed=7,
    ),
}


@pytest.mark.parametrize("name", EVERY_SAMPLER)
def test_a_seed_gives_the_same_text_again(smol: Engine, name: str) -> None:
    sampling = EVERY_SAMPLER[name]
    prompt = tokens_of(smol, STORY)
    generate(smol, prompt, 1)  # so that both start from the same chunks
    first, second = (generate(smol, prompt, 8, sampling) for _ in range(2))
    assert first.tokens == second.tokens
    assert len(first.tokens) == 8
    assert first.finish.seed == second.finish.seed == 7


def test_other_seeds_give_other_texts(smol: Engine) -> None:
    prompt = tokens_of(smol, STORY)
    sampling = [SamplingParams(temperature=1.5, seed=seed) for seed in range(4)]
    assert len({generate(smol, prompt, 8, params).text for params in sampling}) > 1


def test_a_drawn_seed_gives_its_text_again(smol: Engine) -> None:
    prompt = tokens_of(smol, STORY)
    generate(smol, prompt, 1)
    drawn = generate(smol, prompt, 8, SamplingParams(temperature=1.5))
    again = generate(smol, prompt, 8, SamplingParams(temperature=1.5, seed=drawn.finish.seed))
    assert again.tokens == drawn.tokens


def test_a_logit_bias_forces_and_bans_tokens(smol: Engine) -> None:
    prompt = tokens_of(smol, STORY)
    fox = smol.tokenizer.tokenize(" fox", add_special=False, parse_special=False)[0]
    forced = generate(smol, prompt, 4, SamplingParams(temperature=0, logit_bias=((fox, 100.0),)))
    assert forced.tokens == (fox,) * 4
    plain = generate(smol, prompt, 1)
    ban = ((plain.tokens[0], float("-inf")),)
    banned = generate(smol, prompt, 1, SamplingParams(temperature=0, logit_bias=ban))
    assert banned.tokens != plain.tokens


def test_dry_and_penalties_stop_a_loop(smol: Engine) -> None:
    prompt = tokens_of(smol, "the cat sat on the mat. " * 8 + "the cat")
    loop = generate(smol, prompt, 8)
    assert loop.text.startswith(" sat on the")
    for params in (
        SamplingParams(temperature=0, dry_multiplier=5.0, dry_breakers=()),
        SamplingParams(temperature=0, repeat_penalty=3.0, repeat_last_n=-1),
    ):
        assert not generate(smol, prompt, 8, params).text.startswith(" sat on the")


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=NAN),
        SamplingParams(min_p=NAN),
        SamplingParams(top_p=INFINITY),
        SamplingParams(repeat_penalty=0.0),
        SamplingParams(logit_bias=((10**6, 1.0),)),
        SamplingParams(logit_bias=((5, NAN),)),
    ],
)
def test_numbers_that_make_no_sense_fail_their_request_only(
    smol: Engine, params: SamplingParams
) -> None:
    with pytest.raises(UsageError):
        generate(smol, tokens_of(smol, "Hi"), 2, params)
    assert generate(smol, tokens_of(smol, "Hi"), 2).tokens


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repeat_penalty=1.1, repeat_last_n=2**31 - 1),
        SamplingParams(dry_multiplier=1.0, dry_last_n=2**31 - 1),
        SamplingParams(dry_multiplier=1.0, dry_breakers=("\udc80", "")),
        SamplingParams(top_k=2**40),
        SamplingParams(top_k=-5, top_p=-1.0, min_p=2.0, typical_p=0.0),
        SamplingParams(logit_bias=((5, INFINITY),)),
    ],
)
def test_extreme_numbers_do_no_harm(smol: Engine, params: SamplingParams) -> None:
    assert generate(smol, tokens_of(smol, "Hi there"), 2, params).finish.reason in (
        "length",
        "stop",
    )


# ---- grammars

SCHEMAS = [
    {"type": "boolean"},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
    },
    {"type": "array", "items": {"enum": ["fox", "bear", None, 7]}, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {"a": {"anyOf": [{"type": "null"}, {"const": "ü€"}]}, "b": {"type": "array",
        "items": {"type": "boolean"}, "maxItems": 2}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_under_a_schema_the_answer_always_parses(smol: Engine, schema: dict[str, object]) -> None:
    grammar = schema_grammar(json.dumps(schema))
    prompt = tokens_of(smol, "A fox as JSON:\n")
    for seed in range(4):
        params = SamplingParams(temperature=1.0, seed=seed, grammar=grammar)
        outcome = generate(smol, prompt, 200, params)
        assert outcome.finish.reason == "stop"
        value = json.loads(outcome.text)
        if schema.get("required"):
            assert set(value) == set(schema["required"])  # type: ignore[call-overload]


def test_under_a_schema_with_a_large_vocabulary(gemma: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=1, grammar=schema_grammar('{"type":"integer"}'))
    outcome = generate(gemma, tokens_of(gemma, "The number is"), 30, params)
    assert isinstance(json.loads(outcome.text), int)


def test_checking_one_token_equals_applying_the_grammar_first(smol: Engine) -> None:
    gbnf = 'root ::= " The" [a-z ]+ ("," | ".") [^0-9]*'
    prompt = tokens_of(smol, STORY)
    ours = generate(smol, prompt, 16, SamplingParams(temperature=0, grammar=gbnf))
    with PlainContext(smollm2_path(), n_ctx=2048) as plain:
        if n := ours.finish.usage.n_cached:
            plain.read(prompt[:n])
        plain.read(prompt[n:])
        assert tuple(plain.greedy_under_grammar(gbnf, 16)) == ours.tokens
    assert ours.text.startswith(" The")


DEEP = 20_000
BAD_GRAMMARS = {
    "undefined rule": "root ::= other",
    "left recursion": 'root ::= root "a"',
    "no root": 'other ::= "a"',
    "empty": "",
    "blank": "  \n",
    "unclosed": 'root ::= "a',
    "no grammar": "hello world",
    "too deep": "root ::= " + "(" * DEEP + '"a"' + ")" * DEEP,
    "too deep behind quotes": "root ::= " + '( ")" ' * DEEP + '"a"' + ")" * DEEP,
    "a long chain": "\n".join(f"r{i} ::= r{i + 1}" for i in range(DEEP)) + '\nroot ::= r0 "a"',
    "huge": 'root ::= "' + "a" * 600_000 + '"',
}


@pytest.mark.parametrize("name", BAD_GRAMMARS)
def test_a_bad_grammar_is_said_and_not_printed(
    smol: Engine, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    params = SamplingParams(grammar=BAD_GRAMMARS[name])
    with pytest.raises(UsageError, match="grammar"):
        generate(smol, tokens_of(smol, "Hi"), 2, params)
    assert capfd.readouterr() == ("", "")
    assert generate(smol, tokens_of(smol, "Hi"), 2).tokens


def test_a_grammar_that_only_ends(smol: Engine) -> None:
    outcome = generate(smol, tokens_of(smol, "Hi"), 5, SamplingParams(grammar='root ::= ""'))
    assert (outcome.text, outcome.finish.reason) == ("", "stop")


def test_a_finished_grammar_with_ignored_ends_says_no_more(smol: Engine) -> None:
    params = SamplingParams(temperature=0, grammar='root ::= "abc"')
    outcome = generate(smol, tokens_of(smol, "Hi"), 9, params, ignore_eog=True)
    assert (outcome.text, outcome.finish.reason) == ("abc", "length")


@pytest.mark.parametrize(
    "schema", ["", "no json", "[1]", '{"$ref": "#/nowhere"}', '{"type": "strange"}', "[" * 100_000]
)
def test_a_bad_schema_is_a_usage_error(schema: str) -> None:
    with pytest.raises(UsageError):
        schema_grammar(schema)


# ---- cancel


def test_a_cancel_ends_a_long_prompt_within_a_micro_batch(smol: Engine) -> None:
    prompt = long_prompt(smol, 2000, "Fish. ")
    stream = smol.submit(Request(tuple(prompt), GREEDY, max_tokens=5))
    first = next(stream)
    assert isinstance(first, PromptEvent)
    stream.cancel()
    rest = list(stream)
    assert isinstance(rest[-1], FinishEvent)
    assert rest[-1].reason == "cancelled"
    done = [event.n_done for event in rest if isinstance(event, PromptEvent)]
    assert max(done, default=0) <= first.n_done + 512
    assert not any(isinstance(event, TextEvent) for event in rest)

    # What was read is kept, what was begun is not, and the next answer is right.
    short = prompt[:520]
    again = generate(smol, short, 6)
    n_cached = again.finish.usage.n_cached
    assert n_cached in (first.n_done, 519)
    with PlainContext(smollm2_path(), n_ctx=2048) as plain:
        plain.read(short[:n_cached])
        plain.read(short[n_cached:])
        assert tuple(plain.greedy(6)) == again.tokens


def test_cancels_from_other_threads_in_mid_answer(smol: Engine) -> None:
    prompt = tokens_of(smol, STORY)
    for _ in range(3):
        stream = smol.submit(Request(tuple(prompt), GREEDY, ignore_eog=True))
        next(stream)
        thread = threading.Thread(target=stream.cancel)
        thread.start()
        events = list(stream)
        thread.join()
        assert isinstance(events[-1], FinishEvent) and events[-1].reason == "cancelled"


# ---- files that are no models


def test_an_engine_refuses_what_is_no_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bad")
    data = smollm2_path().read_bytes()
    cases = {"half.gguf": data[: len(data) // 2], "head.gguf": data[:1000], "text.gguf": b"hello"}
    for name, content in cases.items():
        path = folder / name
        path.write_bytes(content)
        with pytest.raises(Exception) as caught:
            Engine.open([path], OPTIONS)
        assert caught.value.exit_code == 7, name  # type: ignore[attr-defined]
    with pytest.raises(Exception) as caught:
        Engine.open([folder / "missing.gguf"], OPTIONS)
    assert caught.value.exit_code == 3  # type: ignore[attr-defined]


def test_a_projector_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("projector") / "mmproj.gguf"
    GgufBuilder("clip").add("general.type", "mmproj").write(path)
    with pytest.raises(UsageError, match="projector"):
        Engine.open([path], OPTIONS)


def test_a_load_that_is_stopped(smol: Engine) -> None:
    with pytest.raises(KeyboardInterrupt):
        Engine.open([smollm2_path()], OPTIONS, on_progress=lambda progress: progress < 0.5)
    with pytest.raises(ZeroDivisionError):
        Engine.open([smollm2_path()], OPTIONS, on_progress=lambda progress: bool(1 / 0))
    seen: list[float] = []
    with Engine.open([smollm2_path()], OPTIONS, on_progress=lambda p: not seen.append(p)) as engine:
        assert engine.load_s > 0
    assert seen == sorted(seen) and seen[-1] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(n_ctx=0),
        EngineOptions(n_seq_max=0),
        EngineOptions(n_seq_max=257, n_ubatch=512),
        EngineOptions(n_seq_max=8, n_ubatch=4),
        EngineOptions(type_v="q8_0", flash_attn="off"),
    ],
)
def test_options_that_llama_cpp_would_refuse_late(options: EngineOptions) -> None:
    with pytest.raises((UsageError, EngineError)) as caught:
        Engine.open([smollm2_path()], options)
    assert caught.value.exit_code == 2

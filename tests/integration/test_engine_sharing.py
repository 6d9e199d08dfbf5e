"""Many requests on real models: a prefix is read once for all, a checkpoint saves a re-reading, and
what comes out is what a plain loop gives.

Where a batch holds rows of several sequences, kernels round otherwise than alone; there each token
must be the plain loop's best, or as good within that noise (see test_engine_speculation).
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llmrun.engine import states
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions, FinishEvent, Request, SamplingParams
from tests.fakes.low_level import PlainContext
from tests.fakes.models import gemma3_path, smollm2_path
from tests.fakes.tiny_mamba import tiny_mamba
from tests.integration.test_engine_speculation import check_choices
from tests.unit.test_engine_loop import read

GREEDY = SamplingParams(temperature=0)
SYSTEM = "You are a careful clerk. " + " ".join(
    f"Rule {n}: item {n * 3} is kept." for n in range(20)
)


def open_checked(path: Path, **options: object) -> Engine:
    """As `Engine.open`, with the books compared whenever nothing runs."""
    given = {"n_ctx": 2048, "n_threads": 2, "speculative": "off", "steady_threads": False}
    engine = Engine.open([path], EngineOptions(**{**given, **options}))  # type: ignore[arg-type]
    engine._checks = True
    return engine


def tokens_of(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.tokenize(text, add_special=True, parse_special=False)


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("name", ["smol", "gemma"])
def test_a_new_prefix_of_several_requests_is_read_once(name: str, kv_unified: bool) -> None:
    path = smollm2_path() if name == "smol" else gemma3_path()
    questions = [" What is kept first?", " And then, what comes last?", " Who says so?"]
    n_ctx = 2048 if kv_unified else 3 * 768
    with open_checked(path, n_ctx=n_ctx, n_seq_max=3, kv_unified=kv_unified) as engine:
        prompts = [tokens_of(engine, SYSTEM + question) for question in questions]
        streams = [engine.submit(Request(tuple(p), GREEDY, 8, ignore_eog=True)) for p in prompts]
        outcomes = [read(stream) for stream in streams]
        # All are idle now; a prefix of one of them is shared again.
        again = read(engine.submit(Request(tuple(prompts[1]), GREEDY, 8, ignore_eog=True)))
    n_system = len(prompts[0]) - 12
    cached = [outcome.finish.usage.n_cached for outcome in outcomes]
    # The first may have been read in part before the others came; all of it was read once.
    assert cached[0] == 0 and min(cached[1:]) >= n_system
    assert again.finish.usage.n_cached == len(prompts[1]) - 1
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        check_choices(path, prompt, outcome.tokens)


def test_gemma_goes_back_to_where_the_prompt_ended() -> None:
    """Its window is 512 tokens. The answer and more went on for longer; then the next turn drops
    the answer, as templates do with thinking."""
    with open_checked(gemma3_path(), n_ubatch=256) as engine:
        rng = random.Random(1)
        prompt = (2, *(rng.randrange(2000, 9000) for _ in range(599)))
        read(engine.submit(Request(prompt, GREEDY, 1)))
        read(
            engine.submit(
                Request((*prompt, *(rng.randrange(2000, 9000) for _ in range(900))), GREEDY, 1)
            )
        )
        turn = [*prompt, *tokens_of(engine, " hello there, how")[1:]]
        second = read(engine.submit(Request(tuple(turn), GREEDY, 8, ignore_eog=True)))
    assert second.finish.usage.n_cached == 600
    with PlainContext(gemma3_path(), n_ctx=2048, n_ubatch=256) as plain:
        plain.read(prompt, 256)
        plain.read(turn[600:])
        for token in second.tokens:
            logits = plain.logits()
            assert logits[token] > logits.max() - 0.05
            plain.decode([token])


def test_a_recurrent_state_is_shared_and_taken_back(tmp_path: Path) -> None:
    path = tiny_mamba(tmp_path / "mamba.gguf")
    base = [5 + i * 7 % 300 for i in range(120)]
    with open_checked(path, n_seq_max=3, n_ubatch=32, n_threads=1) as engine:
        prompts = [[*base, 40 + n, 50 + n] for n in range(3)]
        streams = [engine.submit(Request(tuple(p), GREEDY, 8, ignore_eog=True)) for p in prompts]
        outcomes = [read(stream) for stream in streams]
        turn = [*prompts[0], 77, 78, 79]
        dropped = read(engine.submit(Request(tuple(turn), GREEDY, 8, ignore_eog=True)))
        same = read(engine.submit(Request(tuple(turn), GREEDY, 8, ignore_eog=True)))
    cached = [outcome.finish.usage.n_cached for outcome in outcomes]
    assert cached[0] == 0 and cached[1:] == [120, 120]
    assert dropped.finish.usage.n_cached == 120  # where they parted; the end is too near to it
    assert same.tokens == dropped.tokens
    cases = [*zip(prompts, outcomes, strict=True), (turn, dropped)]
    for prompt, outcome in cases:
        with PlainContext(path, n_ctx=2048, n_ubatch=32, n_threads=1) as plain:
            plain.read(prompt, 32)
            for token in outcome.tokens:
                logits = plain.logits()
                assert logits[token] > logits.max() - 0.05
                plain.decode([token])


def test_answers_that_outgrow_the_cache_take_turns() -> None:
    """Three answers of 120 tokens and their prompts in 256 cells."""
    with open_checked(smollm2_path(), n_ctx=256, n_seq_max=3) as engine:
        prompts = [tokens_of(engine, text) for text in ("1 2 3 4 5", "a b c d e", "one two three")]
        streams = [engine.submit(Request(tuple(p), GREEDY, 120, ignore_eog=True)) for p in prompts]
        outcomes = [read(stream) for stream in streams]
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert len(outcome.tokens) == 120
        check_choices(smollm2_path(), prompt, outcome.tokens)


@pytest.mark.parametrize("kv_unified", [True, False])
def test_many_short_requests_with_cancels_leave_nothing_behind(kv_unified: bool) -> None:
    rng = random.Random(7)
    options = {
        "n_ctx": 512 if kv_unified else 1024,
        "n_seq_max": 4,
        "n_ubatch": 64,
        "speculative": "auto",
        "kv_unified": kv_unified,
    }
    with open_checked(smollm2_path(), **options) as engine:
        start = tokens_of(engine, "The rules of the house are these.")
        for _ in range(12):
            streams = []
            for _ in range(6):
                prompt = (*start, *(rng.randrange(1000, 9000) for _ in range(rng.randrange(1, 30))))
                streams.append(engine.submit(Request(prompt, GREEDY, rng.randrange(1, 10))))
            for stream in streams:
                if rng.random() < 0.4:
                    stream.cancel()
                events = list(stream)
                assert isinstance(events[-1], FinishEvent)
        assert engine._core.active == []
        assert not engine._answers.streams
        last = tuple(start)
        assert read(engine.submit(Request(last, GREEDY, 4))).finish.reason in ("length", "stop")
    tree = engine._core.residents.cache.tree
    assert tree.n_cells() <= options["n_ctx"]  # type: ignore[operator]


@pytest.mark.parametrize("name", ["smol", "gemma"])
def test_sequences_change_places_without_a_trace(name: str) -> None:
    """Two long answers run apart once those between them have ended. Each is moved with what it
    holds, in the middle of its answer, and later turns still find what was there."""
    path = smollm2_path() if name == "smol" else gemma3_path()
    with open_checked(path, n_ctx=4 * 1024, n_seq_max=4, kv_unified=False) as engine:
        rng = random.Random(5)
        prompts = [[2, *(rng.randrange(2000, 9000) for _ in range(n))] for n in (40, 700, 300, 90)]
        streams = [
            engine.submit(Request(tuple(prompt), GREEDY, n_new, ignore_eog=True))
            for prompt, n_new in zip(prompts, (4, 48, 6, 40), strict=True)
        ]
        swapped: list[tuple[int, int]] = []
        swap = engine._backend.seq_swap

        def note_swap(a: int, b: int) -> bool:
            swapped.append((a, b))
            return swap(a, b)

        engine._backend.seq_swap = note_swap  # type: ignore[method-assign]
        outcomes = [read(stream) for stream in streams]
        turns = [[*p, *o.tokens, 5, 6] for p, o in zip(prompts, outcomes, strict=True)]
        later = [
            read(engine.submit(Request(tuple(turn), GREEDY, 4, ignore_eog=True))) for turn in turns
        ]
    assert swapped
    for turn, outcome in zip(turns, later, strict=True):
        assert outcome.finish.usage.n_cached == len(turn) - 3  # the last one was never decoded
    for prompt, outcome in [*zip(prompts, outcomes, strict=True), *zip(turns, later, strict=True)]:
        # After random tokens many are nearly as likely as the best.
        check_choices(path, prompt, outcome.tokens, least_best=0.8)


def test_a_second_conversation_starts_from_the_same_system_prompt() -> None:
    """The first went on far beyond Gemma's window; it stays whole, and the second reads only its
    own question."""
    rng = random.Random(9)
    system = [2, *(rng.randrange(2000, 9000) for _ in range(620))]
    first = [*system, *(rng.randrange(2000, 9000) for _ in range(900))]
    second = [*system, *(rng.randrange(2000, 9000) for _ in range(12))]
    for kv_unified, n_ctx in ((True, 4096), (False, 3 * 2048)):
        options = {"n_ctx": n_ctx, "n_seq_max": 3, "n_ubatch": 256, "kv_unified": kv_unified}
        with open_checked(gemma3_path(), **options) as engine:
            marks = (len(system),)
            read(engine.submit(Request(tuple(first), GREEDY, 1, come_back_to=marks)))
            other = read(engine.submit(Request(tuple(second), GREEDY, 8, ignore_eog=True)))
            again = read(engine.submit(Request((*first, 7), GREEDY, 1)))
        assert other.finish.usage.n_cached == len(system)
        assert again.finish.usage.n_cached == len(first)
        check_choices(gemma3_path(), second, other.tokens)


def test_what_takes_too_much_memory_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_MOST_MOVED_BYTES", 1 << 10)
    with open_checked(smollm2_path(), n_ctx=3 * 768, n_seq_max=3, kv_unified=False) as engine:
        prompts = [tokens_of(engine, SYSTEM + text) for text in (" Who?", " Why is it so?")]
        streams = [engine.submit(Request(tuple(p), GREEDY, 12, ignore_eog=True)) for p in prompts]
        outcomes = [read(stream) for stream in streams]
        assert not engine._backend.seq_swap(0, 2)
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        check_choices(smollm2_path(), prompt, outcome.tokens)

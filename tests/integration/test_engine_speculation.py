"""Guessing on real models: every token is the model's own choice.

Kernels round otherwise when a batch has several rows, so an answer may take another of two tokens
that are as probable. Hence each token is held against the logits of a plain loop that is led along
the same answer: it must be the best, or as good as the best within that noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun.engine.loop import Engine
from llmrun.engine.speculate import StepCosts
from llmrun.engine.types import EngineOptions, Request, SamplingParams
from llmrun.errors import UsageError
from tests.fakes.low_level import PlainContext
from tests.fakes.models import gemma3_path, smollm2_path
from tests.unit.test_engine_loop import Outcome, read

GREEDY = SamplingParams(temperature=0)
NOISE = 1.5  # the largest difference of a logit between a row alone and one among others
LIST = "".join(f"{n}. Item {n} of the list is not known to the reader.\n" for n in range(1, 12))


class FreeRows(StepCosts):
    """As if rows cost nothing: whatever can be guessed is."""

    def seconds(self, n_rows: int) -> float:
        return 1.0

    def knows(self, n_rows: int) -> bool:
        return True


def open_engine(path: Path, *, n_seq_max: int = 1) -> Engine:
    options = EngineOptions(
        n_ctx=2048, n_threads=2, n_seq_max=n_seq_max, speculative="ngram", steady_threads=False
    )
    engine = Engine.open([path], options)
    assert engine._core._drafter is not None
    engine._core._drafter._costs = FreeRows()
    return engine


@pytest.fixture(scope="module")
def smol() -> Iterator[Engine]:
    with open_engine(smollm2_path()) as engine:
        yield engine


def tokens_of(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.tokenize(text, add_special=True, parse_special=False)


def generate(engine: Engine, prompt: list[int], n: int, sampling: SamplingParams) -> Outcome:
    return read(engine.submit(Request(tuple(prompt), sampling, n, ignore_eog=True)))


def check_choices(
    path: Path, prompt: list[int], answer: tuple[int, ...], *, least_best: float = 0.95
) -> None:
    """Each token of the answer is the plain loop's choice after those before it, up to noise: few
    are another token that is as good, in a short answer one."""
    n_best = 0
    with PlainContext(path, n_ctx=2048) as plain:
        plain.read(prompt)
        for token in answer:
            logits = plain.logits()
            assert logits[token] > logits.max() - NOISE
            n_best += token == int(logits.argmax())
            plain.decode([token])
    assert n_best >= min(least_best * len(answer), len(answer) - 1)


def test_greedy_tokens_are_the_models_own(smol: Engine) -> None:
    prompt = tokens_of(smol, LIST)
    outcome = generate(smol, prompt, 80, GREEDY)
    assert outcome.finish.usage.n_drafted >= outcome.finish.usage.n_accepted > 30
    check_choices(smollm2_path(), prompt, outcome.tokens)


def test_beyond_a_window_wrong_guesses_are_taken_back() -> None:
    """Gemma's window is 512 tokens; this prompt is longer."""
    with open_engine(gemma3_path()) as engine:
        text = "".join(f"{n}. The number {n * 7} is not in this list.\n" for n in range(1, 60))
        prompt = tokens_of(engine, text)[:700]
        outcome = generate(engine, prompt, 60, GREEDY)
        assert outcome.finish.usage.n_drafted > outcome.finish.usage.n_accepted > 20
        check_choices(gemma3_path(), prompt, outcome.tokens)


def test_sampled_tokens_keep_their_distribution(smol: Engine) -> None:
    """Each row is drawn from the request's own chain, one draw a token: with its seed a request
    gives what it gives without guesses, up to rounding."""
    prompt = tokens_of(smol, "The cat sat on the mat. " * 8 + "The cat")
    drafter = smol._core._drafter
    assert drafter is not None
    generate(smol, prompt, 1, GREEDY)
    found: list[list[tuple[int, ...]]] = []
    n_drafted = n_accepted = 0
    for core_drafter in (drafter, None):
        smol._core._drafter = core_drafter
        answers = []
        for seed in range(100):
            sampling = SamplingParams(temperature=1.6, top_k=0, top_p=1, min_p=0, seed=seed)
            outcome = generate(smol, prompt, 3, sampling)
            answers.append(outcome.tokens)
            n_drafted += outcome.finish.usage.n_drafted
            n_accepted += outcome.finish.usage.n_accepted
        found.append(answers)
    smol._core._drafter = drafter
    assert n_drafted > n_accepted > 20
    guessed, plain = found
    n_same = sum(a == b for a, b in zip(guessed, plain, strict=True))
    assert n_same >= 85
    for place in range(3):
        counts = [Counter(answer[place] for answer in answers) for answers in found]
        n_moved = sum((counts[0] - counts[1]).values())
        assert n_moved <= 15
    assert len(set(plain)) > 30


def test_several_answers_guess_in_one_batch() -> None:
    texts = [LIST, "a b c d e f g h " * 6, "The cat sat on the mat. " * 8]
    with open_engine(smollm2_path(), n_seq_max=3) as engine:
        prompts = [tokens_of(engine, text) for text in texts]
        streams = [
            engine.submit(Request(tuple(prompt), GREEDY, 40, ignore_eog=True)) for prompt in prompts
        ]
        outcomes = [read(stream) for stream in streams]
    assert sum(outcome.finish.usage.n_accepted for outcome in outcomes) > 40
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        check_choices(smollm2_path(), prompt, outcome.tokens)


# ---- a second model that guesses


class CheapGuesses(StepCosts):
    """As if the small model's steps cost next to nothing, however slow the machine is just now."""

    def seconds(self, n_rows: int) -> float:
        return 1e-6


def open_with_draft(*, free: bool = True, n_seq_max: int = 1) -> Engine:
    """SmolLM2 drafts for itself."""
    path = smollm2_path()
    options = EngineOptions(
        n_ctx=2048,
        n_threads=2,
        n_seq_max=n_seq_max,
        speculative="draft",
        draft_model=(path,),
        steady_threads=False,
    )
    engine = Engine.open([path], options)
    assert engine._core._drafter is not None and engine._draft_model is not None
    if free:
        engine._core._drafter._costs = FreeRows()
        engine._draft_model.costs = CheapGuesses()
    return engine


def test_a_model_that_drafts_for_itself_is_nearly_always_right() -> None:
    with open_with_draft() as engine:
        prompt = tokens_of(engine, "The history of the bicycle begins in")
        outcome = generate(engine, prompt, 60, GREEDY)
        usage = outcome.finish.usage
        assert usage.n_drafted > 40
        assert usage.n_accepted >= 0.9 * usage.n_drafted
        sampled = generate(engine, prompt, 40, SamplingParams(temperature=1.2, seed=3))
        usage = sampled.finish.usage
        assert usage.n_drafted > usage.n_accepted > 5
        check_choices(smollm2_path(), prompt, outcome.tokens)


def test_several_answers_have_one_draft_model() -> None:
    texts = [LIST, "a b c d e f g h " * 6, "The cat sat on the mat. " * 8]
    with open_with_draft(n_seq_max=3) as engine:
        prompts = [tokens_of(engine, text) for text in texts]
        streams = [
            engine.submit(Request(tuple(prompt), GREEDY, 30, ignore_eog=True)) for prompt in prompts
        ]
        outcomes = [read(stream) for stream in streams]
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert outcome.finish.usage.n_accepted > 10
        check_choices(smollm2_path(), prompt, outcome.tokens)


def test_a_drafter_that_is_always_wrong_costs_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says the same token over and over; after a few tries it is left alone."""
    with open_with_draft(free=False) as engine:
        model = engine._draft_model
        assert model is not None
        new_sampler = model._backend.new_sampler

        def wrong(params: SamplingParams, seed: int) -> object:
            sampler = new_sampler(params, seed)
            sampler.sample = lambda _row: 5  # type: ignore[method-assign,misc]
            return sampler

        monkeypatch.setattr(model._backend, "new_sampler", wrong)
        prompt = tokens_of(engine, "The history of the bicycle begins in")
        outcome = generate(engine, prompt, 120, GREEDY)
        assert 0 < outcome.finish.usage.n_drafted < 60
        assert outcome.finish.usage.n_accepted == 0
    check_choices(smollm2_path(), prompt, outcome.tokens)


def test_models_of_two_families_do_not_go_together() -> None:
    options = EngineOptions(n_ctx=256, speculative="draft", draft_model=(gemma3_path(),))
    with pytest.raises(UsageError, match="another vocabulary") as caught:
        Engine.open([smollm2_path()], options)
    assert caught.value.why == "262144 tokens, the model has 49152"

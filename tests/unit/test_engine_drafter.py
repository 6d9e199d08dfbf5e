"""A second model guesses: answers stay the same whatever it says, and it rests when it is bad."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.draft_file import check_draft_kind
from llmrun.engine.loop import Engine
from llmrun.engine.types import Request, SamplingParams
from llmrun.errors import EngineError, UsageError
from tests.fakes.fake_backend import (
    FakeBackend,
    FakeSampler,
    copying_token,
    endless_token,
    hash_token,
    ideal_answer,
)
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.unit.test_engine_loop import Play, actions, backends, check_books, read, run


def wrong_token(tokens: tuple[int, ...]) -> int:
    """Never what `endless_token` says."""
    return 32


def often_right(tokens: tuple[int, ...]) -> int:
    digest = hashlib.blake2b(repr(tokens).encode(), digest_size=2, salt=b"often").digest()
    return endless_token(tokens) if digest[0] < 200 else 33 + digest[1] % 90


def target_of(**options: object) -> FakeBackend:
    given: dict[str, object] = {"n_ctx": 512, "n_batch": 32, "n_outputs_max": 32}
    return FakeBackend(**{**given, "next_token": endless_token, **options})  # type: ignore[arg-type]


def drafter_of(target: FakeBackend, **options: object) -> FakeBackend:
    given: dict[str, object] = {"n_ctx": target.n_ctx, "n_seq_max": target.n_seq_max, "n_batch": 32}
    return FakeBackend(**{**given, "next_token": endless_token, **options})  # type: ignore[arg-type]


def engine_of(
    target: FakeBackend, draft: FakeBackend, *, step_s: float = 0.06, guess_s: float = 0.004
) -> Engine:
    return Engine(
        target,
        speculative="draft",
        draft_backend=draft,
        clock=lambda: 1.0 + step_s * target.n_steps + guess_s * draft.n_steps,
    )


def check_drafter(engine: Engine, draft: FakeBackend) -> None:
    """After close: the drafter's cache holds what it is believed to hold."""
    assert draft.violations == []
    assert draft.open_samplers == []
    assert draft.n_closed == 1
    model = engine._draft_model
    assert model is not None
    for slot in model._slots:
        assert draft.held(slot.seq_id) == slot.tokens


def check_both(engine: Engine, target: FakeBackend, draft: FakeBackend) -> None:
    check_books(engine, target)
    check_drafter(engine, draft)


def ideal(request: Request, n_ctx: int = 512) -> tuple[int, ...]:
    return ideal_answer(request, n_ctx, endless_token).tokens


# ---- whatever happens


@settings(max_examples=150, deadline=None)
@given(
    backends(),
    st.integers(1, 9),
    st.fixed_dictionaries(
        {
            "n_ctx": st.sampled_from([16, 40, 64]),
            "n_batch": st.integers(2, 9),
            "n_swa": st.sampled_from([0, 0, 3]),
            "slack": st.integers(0, 4),
            "next_token": st.sampled_from([copying_token, hash_token, endless_token]),
        }
    ),
    st.lists(actions(), min_size=1, max_size=24),
)
def test_a_draft_model_changes_no_answer(
    options: dict[str, object],
    n_drafts: int,
    draft_options: dict[str, object],
    script: list[tuple[str, object]],
) -> None:
    n_seq_max = options["n_seq_max"]
    options["n_outputs_max"] = min(n_seq_max + n_drafts, options["n_batch"])  # type: ignore[operator,type-var]
    draft_options["n_batch"] = max(draft_options["n_batch"], n_seq_max)  # type: ignore[type-var]
    draft = FakeBackend(n_seq_max=n_seq_max, **draft_options)  # type: ignore[arg-type]
    play = Play(options, script, next_token=copying_token, speculative="draft", draft_backend=draft)
    play.run()
    check_drafter(play.engine, draft)


# ---- the same, feature by feature


def test_a_perfect_drafter_saves_steps() -> None:
    target = target_of()
    draft = drafter_of(target)
    request = Request((1, 2, 3), max_tokens=100)
    with engine_of(target, draft) as engine:
        outcome = read(engine.submit(request))
    usage = outcome.finish.usage
    assert outcome.tokens == ideal(request)
    assert usage.n_accepted > 60
    assert usage.n_accepted >= 0.9 * usage.n_drafted
    assert target.n_steps + usage.n_accepted == 100
    assert target.samplers[0].n_sampled == 100
    check_both(engine, target, draft)


def test_a_drafter_that_is_often_wrong_is_followed_as_far_as_it_is_right() -> None:
    target = target_of()
    draft = drafter_of(target, next_token=often_right)
    request = Request((1, 2, 3), max_tokens=200)
    with engine_of(target, draft) as engine:
        outcome = read(engine.submit(request))
    usage = outcome.finish.usage
    assert outcome.tokens == ideal(request)
    assert usage.n_drafted > usage.n_accepted > 60
    check_both(engine, target, draft)


def test_a_drafter_that_is_always_wrong_comes_to_rest() -> None:
    target = target_of()
    draft = drafter_of(target, next_token=wrong_token)
    request = Request((1, 2, 3), max_tokens=400)
    with engine_of(target, draft) as engine:
        outcome = read(engine.submit(request))
    usage = outcome.finish.usage
    assert outcome.tokens == ideal(request)
    assert usage.n_accepted == 0
    assert 0 < usage.n_drafted < 80
    assert 0.004 * draft.n_steps < 0.02 * 0.06 * target.n_steps
    check_both(engine, target, draft)


def test_a_drafter_as_slow_as_its_model_comes_to_rest() -> None:
    target = target_of()
    draft = drafter_of(target)
    with engine_of(target, draft, guess_s=0.06) as engine:
        outcome = run(engine, (1, 2, 3), 400)
    assert outcome.finish.usage.n_drafted < 40
    check_both(engine, target, draft)


def test_after_a_rest_it_is_tried_again() -> None:
    """Wrong for 150 tokens, right from then on, and never cheap."""

    def late(tokens: tuple[int, ...]) -> int:
        return endless_token(tokens) if len(tokens) > 150 else 32

    target = target_of(n_ctx=1024)
    draft = drafter_of(target, next_token=late)
    request = Request((1, 2, 3), max_tokens=900)
    with engine_of(target, draft, guess_s=0.02) as engine:
        outcome = read(engine.submit(request))
    assert outcome.tokens == ideal(request, 1024)
    assert outcome.finish.usage.n_accepted > 200
    early = [batch for batch in draft.batches if batch[-1].pos < 150]
    assert len(early) < 30
    check_both(engine, target, draft)


@pytest.mark.parametrize("n_batch", [4, 32])
def test_all_answers_are_guessed_in_the_same_steps(n_batch: int) -> None:
    target = target_of(n_seq_max=3, n_batch=16, n_outputs_max=16)
    draft = drafter_of(target, n_batch=n_batch)
    requests = [Request(prompt, max_tokens=60) for prompt in ((1, 2, 3), (9, 8), tuple(range(20)))]
    with engine_of(target, draft) as engine:
        with target.held_back():
            streams = [engine.submit(request) for request in requests]
        outcomes = [read(stream) for stream in streams]
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.tokens == ideal(request)
        assert outcome.finish.usage.n_accepted > 20
    # A small batch has no room to catch up with the long prompt.
    assert max(len(batch) for batch in draft.batches) == (3 if n_batch == 32 else 2)
    check_both(engine, target, draft)


def test_the_next_turn_is_read_from_where_it_differs() -> None:
    target = target_of()
    draft = drafter_of(target)
    with engine_of(target, draft) as engine:
        first = run(engine, range(60), 20)
        turn = (*range(60), *first.tokens, 70, 71)
        n_before = len(draft.batches)
        second = run(engine, turn, 20)
    assert second.finish.usage.n_accepted > 5
    n_rows = sum(len(chunk.tokens) for batch in draft.batches[n_before:] for chunk in batch)
    assert n_rows < 40
    check_both(engine, target, draft)


def test_a_common_beginning_is_read_once() -> None:
    target = target_of(n_seq_max=2)
    draft = drafter_of(target)
    common = tuple(range(100))
    requests = [Request((*common, n), max_tokens=100) for n in (200, 201)]
    with engine_of(target, draft) as engine:
        with target.held_back():
            streams = [engine.submit(request) for request in requests]
        outcomes = [read(stream) for stream in streams]
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.tokens == ideal(request)
        assert outcome.finish.usage.n_accepted > 20
    n_read = sum(chunk.pos < 90 for batch in draft.batches for chunk in batch)
    assert n_read <= 6  # six times the first is read in parts, and the second not at all
    check_both(engine, target, draft)


def test_a_full_cache_of_the_drafter_costs_no_answer() -> None:
    target = target_of(n_seq_max=2, n_ctx=200)
    draft = drafter_of(target, n_ctx=48)
    requests = [Request((1, 2, 3), max_tokens=90), Request((4, 5), max_tokens=90)]
    with engine_of(target, draft) as engine:
        with target.held_back():
            streams = [engine.submit(request) for request in requests]
        outcomes = [read(stream) for stream in streams]
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.tokens == ideal(request, 200)
    assert sum(outcome.finish.usage.n_accepted for outcome in outcomes) > 10
    check_both(engine, target, draft)


def test_idle_texts_make_room_in_the_drafters_cache() -> None:
    target = target_of(n_seq_max=2)
    draft = drafter_of(target, n_ctx=100)
    with engine_of(target, draft) as engine:
        outcomes = [run(engine, range(first, first + 40), 40) for first in (0, 100, 200)]
    assert all(outcome.finish.usage.n_accepted > 10 for outcome in outcomes)
    check_both(engine, target, draft)


def test_a_window_in_the_drafter() -> None:
    target = target_of()
    draft = drafter_of(target, n_swa=8, slack=16, next_token=often_right)
    request = Request(tuple(range(40)), max_tokens=100)
    with engine_of(target, draft) as engine:
        outcome = read(engine.submit(request))
        far = Request((*range(20), 99), max_tokens=60)
        again = read(engine.submit(far))
    assert outcome.tokens == ideal(request)
    assert again.tokens == ideal(far)
    assert outcome.finish.usage.n_accepted > 20
    # What it has forgotten is read again: a guess without it is garbage.
    assert again.finish.usage.n_accepted > 10
    check_both(engine, target, draft)


@pytest.mark.parametrize("end", [36, 37, 38, 39, 40])
def test_an_end_token_is_not_guessed_beyond(end: int) -> None:
    def ending(tokens: tuple[int, ...]) -> int:
        return 257 if len(tokens) == end else endless_token(tokens)

    target = target_of(next_token=ending)
    draft = drafter_of(target, next_token=ending)
    with engine_of(target, draft) as engine:
        outcome = run(engine, (1, 2, 3), 100)
    assert (len(outcome.tokens), outcome.finish.reason) == (end - 3, "stop")
    assert all(257 not in chunk.tokens for batch in draft.batches for chunk in batch)
    check_both(engine, target, draft)


def test_a_drafter_that_fails_leaves_the_answer_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail(step: int, _chunks: Sequence[Chunk]) -> None:
        if step == 10:
            raise EngineError("llama.cpp could not decode (code -3)")

    target = target_of()
    draft = drafter_of(target, on_decode=fail)
    request = Request((1, 2, 3), max_tokens=100)
    with engine_of(target, draft) as engine:
        outcome = read(engine.submit(request))
    assert outcome.tokens == ideal(request)
    assert "out of use" in caplog.text
    assert draft.n_steps == 10
    check_books(engine, target)
    assert draft.n_closed == 1


def test_guesses_that_were_not_checked_are_not_made_again() -> None:
    seen: list[tuple[int, int]] = []

    def abort(step: int, chunks: Sequence[Chunk]) -> None:
        seen.append((len(draft.batches), chunks[0].n_outputs))
        if chunks[0].n_outputs > 3 and sum(n > 3 for _, n in seen) == 2:
            target.request_abort()

    target = target_of(on_decode=abort)
    draft = drafter_of(target)
    request = Request((1, 2, 3), max_tokens=100)
    with engine_of(target, draft) as engine:
        outcome = read(engine.submit(request))
    assert outcome.tokens == ideal(request)
    aborted = target.results.index(DecodeResult.ABORTED)
    assert seen[aborted] == seen[aborted + 1]
    check_both(engine, target, draft)


def test_auto_and_ngram_need_no_drafter() -> None:
    for speculative in ("auto", "ngram"):
        target = target_of()
        with Engine(target, speculative=speculative) as engine:  # type: ignore[arg-type]
            assert engine._draft_model is None
            run(engine, (1, 2, 3), 5)


# ---- which models go together


def test_another_vocabulary_is_refused() -> None:
    target = target_of()
    other: list[tuple[FakeTokenizer, str]] = [
        (FakeTokenizer(("<s>", "</s>")), "258 tokens, the model has 260"),
        (
            FakeTokenizer(("<s>", "</s>", "<|im_start|>", "<|end|>"), eog=()),
            "its token 259 is b'<|end|>', the model's is b'<|im_end|>'",
        ),
    ]
    for tokenizer, why in other:
        with pytest.raises(UsageError, match="another vocabulary") as caught:
            engine_of(target, drafter_of(target, tokenizer=tokenizer))
        assert caught.value.why == why
        assert caught.value.hint


def test_a_part_of_a_model_is_no_draft_model() -> None:
    check_draft_kind("small.gguf", "model")
    for kind, words in (("drafter", "not a model of its own"), ("projector", "cannot draft")):
        with pytest.raises(UsageError, match=words):
            check_draft_kind("small.gguf", kind)


def test_a_recurrent_drafter_is_refused() -> None:
    target = target_of()
    with pytest.raises(UsageError, match="cannot take a guess back"):
        engine_of(target, drafter_of(target, recurrent=True))


def test_draft_without_a_drafter_is_refused() -> None:
    with pytest.raises(UsageError, match="no draft model"):
        Engine(target_of(), speculative="draft")


# ---- sampling

_N_DRAWS = 75  # a request
_N_REQUESTS = 40
_CHOICES = (65, 66, 67, 68)


def _weights(tokens: tuple[int, ...]) -> tuple[float, ...]:
    """A distribution over four tokens that depends on the one before."""
    first = tokens[-1] % 4
    return tuple((0.55, 0.25, 0.15, 0.05)[(first + i) % 4] for i in range(4))


class DrawingBackend(FakeBackend):
    """Its requests' samplers draw by `_weights` from a generator of their own."""

    def _choose(self, seq_id: int, value: int) -> int:
        """Of each row with logits what it follows: the last token is enough."""
        assert value != -1
        return self.held(seq_id)[-1]

    def new_sampler(self, params: SamplingParams, seed: int) -> FakeSampler:
        sampler = super().new_sampler(params, seed)
        generator = random.Random(seed)
        last = sampler.sample

        def draw(row: int) -> int:
            return generator.choices(_CHOICES, _weights((last(row),)))[0]

        sampler.sample = draw  # type: ignore[method-assign]
        return sampler


def _likeliest(tokens: tuple[int, ...]) -> int:
    weights = _weights(tokens)
    return _CHOICES[weights.index(max(weights))]


def _always_first(tokens: tuple[int, ...]) -> int:
    return _CHOICES[0]


def _chi_square(pairs: Counter[tuple[int, int]]) -> tuple[float, int]:
    """Of the tokens after each token, against `_weights`; and its degrees of freedom."""
    total, n_free = 0.0, 0
    for before in _CHOICES:
        n = sum(pairs[before, token] for token in _CHOICES)
        assert n > 100
        for token, weight in zip(_CHOICES, _weights((before,)), strict=True):
            total += (pairs[before, token] - n * weight) ** 2 / (n * weight)
        n_free += len(_CHOICES) - 1
    return total, n_free


@pytest.mark.parametrize("guesser", ["ngram", "likeliest", "biased"])
def test_sampling_keeps_its_distribution(guesser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of 3000 drawn tokens given the one before; the 99.9 % point of 12 degrees of
    freedom is 32.9. The seeds are fixed."""
    target = DrawingBackend(n_ctx=128, n_batch=32, n_outputs_max=32)
    draft: FakeBackend | None = None
    if guesser != "ngram":
        say: Callable[[tuple[int, ...]], int] = (
            _likeliest if guesser == "likeliest" else _always_first
        )
        draft = FakeBackend(n_ctx=128, n_batch=32, next_token=say)
    pairs: Counter[tuple[int, int]] = Counter()
    n_drafted = n_accepted = 0
    with Engine(
        target,
        speculative="ngram" if draft is None else "draft",
        draft_backend=draft,
        clock=lambda: 1.0 + 0.06 * target.n_steps,
    ) as engine:
        for seed in range(_N_REQUESTS):
            # No common beginning, so that each answer is drawn anew.
            request = Request((seed, 66, 67), SamplingParams(seed=seed), _N_DRAWS, ignore_eog=True)
            outcome = read(engine.submit(request))
            assert len(outcome.tokens) == _N_DRAWS
            pairs.update(zip(outcome.tokens, outcome.tokens[1:], strict=False))
            n_drafted += outcome.finish.usage.n_drafted
            n_accepted += outcome.finish.usage.n_accepted
    assert n_drafted > n_accepted > 300
    found, n_free = _chi_square(pairs)
    assert n_free == 12
    assert found < 32.9


def test_the_chi_square_notices_guesses_that_are_believed() -> None:
    """The test's own test: one guess in ten taken unchecked."""
    generator = random.Random(1)
    pairs: Counter[tuple[int, int]] = Counter()
    before = 65
    for _ in range(_N_REQUESTS * _N_DRAWS):
        token = generator.choices(_CHOICES, _weights((before,)))[0]
        if generator.random() < 0.1:
            token = _likeliest((before,))
        pairs[before, token] += 1
        before = token
    assert _chi_square(pairs)[0] > 32.9

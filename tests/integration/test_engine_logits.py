"""Logits read with numpy, on real models: the same greedy tokens as the library's own sampler, and
log probabilities that are the model's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrun.engine.llama import LlamaBackend
from llmrun.engine.loop import Engine
from llmrun.engine.sampling import LlamaSampler
from llmrun.engine.types import EngineOptions, Request, SamplingParams, TextEvent, TokenLogprob
from llmrun.errors import EngineError
from tests.fakes.low_level import PlainContext
from tests.fakes.models import gemma3_path, smollm2_path
from tests.integration.test_engine_speculation import LIST, FreeRows
from tests.unit.test_engine_loop import read

GREEDY = SamplingParams(temperature=0)
STORY = "Once upon a time there was a fox who lived by the river. "
PATHS: dict[str, Callable[[], Path]] = {"smol": smollm2_path, "gemma": gemma3_path}


@pytest.fixture(scope="module", params=PATHS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    options = EngineOptions(
        n_ctx=2048, n_threads=2, n_seq_max=4, speculative="ngram", steady_threads=False
    )
    with Engine.open([PATHS[request.param]()], options) as opened:
        assert opened._core._drafter is not None
        opened._core._drafter._costs = FreeRows()
        yield opened


def tokens_of(engine: Engine, text: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer.tokenize(text, add_special=True, parse_special=False))


def logprobs_of(engine: Engine, request: Request) -> list[TokenLogprob]:
    events = [event for event in engine.submit(request) if isinstance(event, TextEvent)]
    for event in events:
        assert tuple(found.token for found in event.logprobs) == event.tokens
    return [found for event in events for found in event.logprobs]


def test_greedy_takes_what_the_librarys_sampler_takes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row by both, over answers alone, in batches of several, and with guesses."""
    backend: Any = engine._backend
    new_sampler = backend.new_sampler
    rows: list[tuple[int, int]] = []

    def watched(params: SamplingParams, seed: int) -> LlamaSampler:
        sampler: LlamaSampler = new_sampler(params, seed)

        def sample(row: int) -> int:
            rows.append((sampler._rows.find_best(row), sampler._sample_in_c(row)))
            return rows[-1][0]

        sampler.sample = sample
        return sampler

    monkeypatch.setattr(backend, "new_sampler", watched)
    texts = (STORY, "The sea. " + STORY, "1 2 3 4 5 6 7 8 9 10 11", LIST)
    requests = [Request(tokens_of(engine, text), GREEDY, 32, ignore_eog=True) for text in texts]
    alone = read(engine.submit(requests[0]))
    streams = [engine.submit(request) for request in requests]
    together = [read(stream) for stream in streams]
    assert len(alone.tokens) == 32
    assert sum(outcome.finish.usage.n_accepted for outcome in together) > 10
    assert len(rows) >= 160
    assert [ours for ours, _ in rows] == [theirs for _, theirs in rows]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.8},
        {"logit_bias": ((5, 2.0),)},
        {"repeat_penalty": 1.1},
        {"frequency_penalty": 0.5},
        {"presence_penalty": 0.5},
        {"dry_multiplier": 0.8},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_logits_is_left_to_the_library(engine: Engine, change: dict[str, Any]) -> None:
    backend = engine._backend
    assert isinstance(backend, LlamaBackend)
    sampler = backend.new_sampler(SamplingParams(**{"temperature": 0.0, **change}), 1)
    plain = backend.new_sampler(GREEDY, 1)
    assert (sampler._takes_best, plain._takes_best) == (False, True)
    assert sampler.sample is sampler._sample_in_c
    sampler.close()
    plain.close()


@pytest.mark.parametrize("name", PATHS)
def test_log_probabilities_are_the_models(name: str) -> None:
    """Of an answer drawn with penalties and a temperature: of the model's own logits all the same.
    A single sequence and the same chunks, so that no rounding is between them."""
    path = PATHS[name]()
    options = EngineOptions(n_ctx=512, n_threads=2, speculative="off", steady_threads=False)
    sampling = SamplingParams(temperature=1.5, top_k=5, seed=3, repeat_penalty=1.3)
    with Engine.open([path], options) as engine:
        prompt = tokens_of(engine, STORY)
        asked = Request(prompt, sampling, 12, ignore_eog=True, n_logprobs=5)
        found = logprobs_of(engine, asked)
        pieces = {token: engine.tokenizer.piece(token) for o in found for token, _, _ in o.top}
    assert len(found) == 12
    with PlainContext(path, n_ctx=512) as plain:
        plain.read(prompt)
        for one in found:
            logits = plain.logits().astype(np.float64)
            exact = logits - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))
            assert one.logprob == pytest.approx(exact[one.token], abs=1e-4)
            order = np.lexsort((np.arange(len(exact)), -logits))[:5]
            assert [token for token, _, _ in one.top] == list(order)
            assert [chance for _, _, chance in one.top] == pytest.approx(exact[order], abs=1e-4)
            assert all(piece == pieces[token] for token, piece, _ in one.top)
            plain.decode([one.token])


def test_a_greedy_token_is_the_likeliest_of_its_row_also_where_it_was_guessed(
    engine: Engine,
) -> None:
    prompts = [tokens_of(engine, text) for text in (LIST, "Numbers. " + LIST)]
    before = engine.counters
    streams = [
        engine.submit(Request(prompt, GREEDY, 40, ignore_eog=True, n_logprobs=2))
        for prompt in prompts
    ]
    for stream in streams:
        found = [one for e in stream if isinstance(e, TextEvent) for one in e.logprobs]
        assert len(found) == 40
        for one in found:
            assert one.top[0] == (one.token, one.piece, one.logprob)
            assert one.top[1][2] <= one.logprob <= 0
    assert engine.counters.n_accepted - before.n_accepted > 10


def test_likely_tokens_under_a_grammar_are_still_the_models(engine: Engine) -> None:
    prompt = tokens_of(engine, STORY)
    sampling = SamplingParams(temperature=0, grammar='root ::= "zebra"')
    found = logprobs_of(engine, Request(prompt, sampling, n_logprobs=3))
    assert b"".join(one.piece for one in found) == b"zebra"
    assert found[0].logprob < found[0].top[2][2] < found[0].top[0][2]


def test_a_row_without_logits_is_an_error(engine: Engine) -> None:
    backend = engine._backend
    assert isinstance(backend, LlamaBackend)
    read(engine.submit(Request(tokens_of(engine, STORY), GREEDY, 2)))
    with pytest.raises(EngineError, match="no logits"):
        backend._logits.read(400)


SCRIPT = """
import sys
from pathlib import Path
from llmrun.engine import logits
from llmrun.engine.loop import Engine
from llmrun.engine.types import *
options = EngineOptions(n_ctx=512, n_threads=2, speculative="off", steady_threads=False)
def answer(n):
    request = Request(prompt, SamplingParams(temperature=0), n, ignore_eog=True)
    return [t for e in engine.submit(request) if isinstance(e, TextEvent) for t in e.tokens]
logits._NUMPY_PAYS_AFTER = 49152 * 20
with Engine.open([Path(sys.argv[1])], options) as engine:
    prompt = tuple(engine.tokenizer.tokenize("Once", add_special=True, parse_special=False))
    assert len(prompt) == 1
    first = answer(15)
    assert "numpy" not in sys.modules, "imported for a few tokens"
    assert answer(15) == first
    assert "numpy" in sys.modules, "never imported"
    assert answer(15) == first
"""


def test_a_few_greedy_tokens_import_no_numpy_and_many_do() -> None:
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(smollm2_path())],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (child.returncode, child.stderr) == (0, "")

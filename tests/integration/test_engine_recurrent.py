"""A model with a recurrent state: it goes on, it is never cut, and an abort spoils nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions, PromptEvent, Request, SamplingParams
from tests.fakes.low_level import PlainContext
from tests.fakes.tiny_mamba import tiny_mamba
from tests.unit.test_engine_loop import Outcome, read

GREEDY = SamplingParams(temperature=0)
PROMPT = [5 + i * 7 % 300 for i in range(70)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mamba(tmp_path_factory.mktemp("mamba") / "mamba.gguf")


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    options = EngineOptions(n_ctx=4096, n_seq_max=2, n_ubatch=32, n_threads=1)
    with Engine.open([path], options) as opened:
        assert opened.facts.is_recurrent
        yield opened


def generate(engine: Engine, prompt: list[int], n: int = 8) -> Outcome:
    return read(engine.submit(Request(tuple(prompt), GREEDY, max_tokens=n, ignore_eog=True)))


def plain(path: Path, prompt: list[int], n: int = 8) -> tuple[int, ...]:
    with PlainContext(path, n_ctx=4096, n_ubatch=32, n_threads=1) as context:
        context.read(prompt, 32)
        return tuple(context.greedy(n))


def test_greedy_equals_a_plain_loop(engine: Engine, path: Path) -> None:
    assert generate(engine, PROMPT).tokens == plain(path, PROMPT)


def test_the_next_turn_goes_on_and_a_changed_one_starts_over(engine: Engine, path: Path) -> None:
    first = generate(engine, PROMPT)
    turn = [*PROMPT, *first.tokens, 40, 41]
    second = generate(engine, turn)
    assert second.finish.usage.n_cached == len(PROMPT) + len(first.tokens) - 1
    assert second.tokens == plain(path, turn)
    changed = [*PROMPT[:50], 77, 78]
    third = generate(engine, changed)
    assert third.finish.usage.n_cached == 0
    assert third.tokens == plain(path, changed)


def test_a_cancel_spoils_neither_its_own_state_nor_its_neighbours(
    engine: Engine, path: Path
) -> None:
    """The library leaves an aborted state half changed and at its new position."""
    long = [5 + i * 11 % 400 for i in range(4000)]
    for _ in range(5):
        beside = engine.submit(Request(tuple(PROMPT), GREEDY, max_tokens=40, ignore_eog=True))
        cut = engine.submit(Request(tuple(long), GREEDY, max_tokens=8))
        assert isinstance(next(cut), PromptEvent)
        cut.cancel()
        assert read(cut).finish.reason == "cancelled"
        assert read(beside).tokens == plain(path, PROMPT, 40)
    assert generate(engine, long[:200]).tokens == plain(path, long[:200])

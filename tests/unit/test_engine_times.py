"""When each token came: only for requests that ask."""

from __future__ import annotations

import itertools

import pytest

from llmrun.engine.loop import Engine
from llmrun.engine.types import FinishEvent, Request, SamplingParams
from tests.fakes.fake_backend import FakeBackend, copying_token, endless_token

GREEDY = SamplingParams(temperature=0)


def finish_of(engine: Engine, **changes: object) -> FinishEvent:
    request = Request((40, 41, 42), GREEDY, max_tokens=9, ignore_eog=True, **changes)
    *_, last = engine.submit(request)
    assert isinstance(last, FinishEvent)
    return last


@pytest.mark.parametrize("speculative", ["off", "auto"])
def test_a_time_for_each_token(speculative) -> None:
    ticks = itertools.count()
    backend = FakeBackend(next_token=copying_token, n_outputs_max=4)
    with Engine(backend, clock=lambda: float(next(ticks)), speculative=speculative) as engine:
        finish = finish_of(engine, with_times=True)
    assert len(finish.token_times) == finish.usage.n_completion == 9
    assert finish.token_times[0] == finish.timings.ttft_s > 0
    assert all(a < b for a, b in itertools.pairwise(finish.token_times))


def test_none_unless_asked() -> None:
    with Engine(FakeBackend(next_token=endless_token)) as engine:
        assert finish_of(engine).token_times == ()

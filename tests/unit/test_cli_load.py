"""Ctrl-C while a model loads: the process must not go on, or end, below a thread in the library."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest

from llmrun.cli import open_model


class SlowLoad:
    """A load that is interrupted `n_signals` times and ends when it is told to stop."""

    def __init__(self, n_signals: int) -> None:
        self.n_signals = n_signals
        self.ended = False

    def open_engine(self, paths, options, info, on_progress):
        for _ in range(self.n_signals):
            os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 60
        while on_progress(0.5):
            assert time.monotonic() < deadline, "nobody stopped the load"
        self.ended = True
        return SimpleNamespace(close=lambda: None)


@pytest.mark.parametrize("n_signals", [1, 3])
def test_an_interrupted_load_is_stopped_and_waited_for(monkeypatch, n_signals):
    monkeypatch.setattr(open_model, "engine_options", lambda *_args: None)
    services = SlowLoad(n_signals)
    with pytest.raises(KeyboardInterrupt):
        open_model._load(services, SimpleNamespace(paths=(), info=None), None)
    assert services.ended


def test_an_error_of_the_load_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(open_model, "engine_options", lambda *_args: None)

    def fail(*_args):
        raise ValueError("no such model")

    services = SimpleNamespace(open_engine=fail)
    with pytest.raises(ValueError, match="no such model"):
        open_model._load(services, SimpleNamespace(paths=(), info=None), None)

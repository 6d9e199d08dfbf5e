"""Sends requests to an engine and takes their time, with somebody watching."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmrun.engine.types import (
    EngineLike,
    FinishEvent,
    PromptEvent,
    Request,
    SamplingParams,
    StreamLike,
    TextEvent,
)
from llmrun.errors import EngineError

GREEDY = SamplingParams(temperature=0)
TOKEN_UNITS = 8.0
"""A generated token takes about as long as so many of a prompt. For the progress bar only."""


class Watch(Protocol):
    """Who sees how far a measurement is. Its unit is the time of one token of a prompt."""

    def begin(self, n_units: float) -> None: ...

    def describe(self, text: str) -> None:
        """What is measured from here on."""

    def advance(self, n_units: float) -> None: ...


class NoWatch:
    """Nobody."""

    def begin(self, n_units: float) -> None: ...

    def describe(self, text: str) -> None: ...

    def advance(self, n_units: float) -> None: ...


class Portion:
    """A part of what `watch` sees: never more than `n_units`, and with `finish` all of them."""

    def __init__(self, watch: Watch, n_units: float) -> None:
        self._watch = watch
        self._n_left = n_units

    def begin(self, n_units: float) -> None: ...

    def describe(self, text: str) -> None:
        self._watch.describe(text)

    def advance(self, n_units: float) -> None:
        n_units = min(n_units, self._n_left)
        self._n_left -= n_units
        self._watch.advance(n_units)

    def finish(self) -> None:
        self.advance(self._n_left)


@dataclass(frozen=True, slots=True)
class Together:
    """Requests that ran at once: all their tokens, from the first submit to the last token."""

    finishes: tuple[FinishEvent, ...]
    seconds: float

    @property
    def n_tokens(self) -> int:
        return sum(finish.usage.n_completion for finish in self.finishes)

    @property
    def tok_s(self) -> float:
        return self.n_tokens / self.seconds if self.seconds > 0 else 0.0


class Driver:
    """One engine under measurement. `clock` gives seconds."""

    def __init__(
        self,
        engine: EngineLike,
        watch: Watch | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine = engine
        self._watch = watch or NoWatch()
        self._clock = clock

    def generate(
        self,
        prompt: Sequence[int],
        n_tokens: int,
        *,
        n_known: int = 0,
        sampling: SamplingParams = GREEDY,
    ) -> FinishEvent:
        """One answer of `n_tokens`, whatever the model wants to say; with 0 the prompt is only
        read. `n_known` of the prompt's tokens should be in the cache: for the progress bar.

        When it is interrupted, the engine is told to stop.
        """
        streams = [self._submit(prompt, n_tokens, sampling)]
        return self._follow(streams, [len(prompt)], n_tokens, n_known)[0]

    def generate_together(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Together:
        """The same for several prompts at once."""
        start_s = self._clock()
        streams: list[StreamLike] = []
        try:
            for prompt in prompts:  # not `extend`: what was submitted must be cancelled
                streams.append(self._submit(prompt, n_tokens, GREEDY))  # noqa: PERF401
        except BaseException:
            _cancel(streams)
            raise
        found = self._follow(streams, [len(prompt) for prompt in prompts], n_tokens, 0)
        return Together(tuple(found), self._clock() - start_s)

    def _submit(self, prompt: Sequence[int], n_tokens: int, sampling: SamplingParams) -> StreamLike:
        request = Request(
            tuple(prompt), sampling, max_tokens=n_tokens, ignore_eog=True, with_times=True
        )
        return self.engine.submit(request)

    def _follow(
        self, streams: list[StreamLike], lengths: list[int], n_tokens: int, n_known: int
    ) -> list[FinishEvent]:
        found = []
        try:
            for stream, n_prompt in zip(streams, lengths, strict=True):
                found.append(self._read(stream, n_prompt - n_known, n_tokens, n_known))
        except BaseException:
            _cancel(streams)
            raise
        return found

    def _read(self, stream: StreamLike, n_new: int, n_tokens: int, n_known: int) -> FinishEvent:
        """Read to the end. Whatever the events say, the watch advances by the request's units."""
        n_left = request_units(n_new, n_tokens)
        finish = None
        n_read = 0
        for event in stream:
            n_units = 0.0
            if isinstance(event, PromptEvent):
                done = max(0, event.n_done - n_known)
                n_units, n_read = float(done - n_read), max(n_read, done)
            elif isinstance(event, TextEvent):
                n_units = TOKEN_UNITS * len(event.tokens)
            elif isinstance(event, FinishEvent):
                finish = event
            n_units = min(max(n_units, 0.0), n_left)
            n_left -= n_units
            self._watch.advance(n_units)
        self._watch.advance(n_left)
        if finish is None:
            raise EngineError("an answer stopped before its end")
        return finish


def request_units(n_prompt: int, n_tokens: int) -> float:
    """What a request counts on the progress bar."""
    return n_prompt + TOKEN_UNITS * n_tokens


def _cancel(streams: Sequence[StreamLike]) -> None:
    for stream in streams:
        stream.cancel()

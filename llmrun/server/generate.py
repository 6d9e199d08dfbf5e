"""Runs replies on an engine and gives their events to asyncio, without a thread for each.

The engine's thread says that there is something to take; the event loop takes all there is at
once. Whoever leaves the iteration early (a client that has gone) frees the sequences: the engine
ends them before its next step.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from llmrun.engine.types import EngineLike, FinishEvent, StreamLike, TextEvent
from llmrun.server.prompts import ChatModel, Job
from llmrun.server.types import ReplyEvent, Started

QUIET_S = 10.0
"""How long a stream may be silent before its client is told that it is still there."""

Batch = list[tuple[int, ReplyEvent]]


class _Waker:
    """Wakes one task of the event loop from other threads; many calls before it runs are one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._is_called = False

    def call(self) -> None:
        """From any thread."""
        if self._is_called:
            return
        self._is_called = True
        # The loop is closed when the server has ended; then nobody waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        self._event.clear()
        # Before the caller looks for what there is: what comes later calls again.
        self._is_called = False


async def generate(model: ChatModel, jobs: Sequence[Job]) -> AsyncGenerator[Batch, None]:
    """The events of all jobs' replies as they come, with each job's number, in batches of what was
    there at one time; an empty one after each QUIET_S in which nothing came. Raises the LlmrunError
    of the first that fails; the others then end too."""
    waker = _Waker()
    running: dict[int, StreamLike] = {}
    sampled: dict[int, list[int]] = {i: [] for i in range(len(jobs))}
    try:
        _submit(model.engine, jobs, running, waker)
        yield [(i, Started(job.n_prompt)) for i, job in enumerate(jobs)]
        while running:
            await waker.wait(QUIET_S)
            found: Batch = []
            for i, stream in list(running.items()):
                events = stream.take()
                for event in events:
                    if isinstance(event, TextEvent):
                        sampled[i] += event.tokens
                        found += [(i, part) for part in jobs[i].reader.read(event)]
                        if jobs[i].reader.is_complete:
                            stream.cancel()
                    elif isinstance(event, FinishEvent):
                        found += [(i, part) for part in jobs[i].reader.end(event)]
                        del running[i]
                        _remember(model, jobs[i], sampled[i])
            yield found
    finally:
        for stream in running.values():
            stream.cancel()


def _submit(
    engine: EngineLike, jobs: Sequence[Job], running: dict[int, StreamLike], waker: _Waker
) -> None:
    for i, job in enumerate(jobs):
        running[i] = engine.submit(job.request)
    for stream in running.values():
        stream.listen(waker.call)


def _remember(model: ChatModel, job: Job, sampled: Sequence[int]) -> None:
    """Keep the turn, so that the conversation's next prompt has the same tokens as this one's
    answer."""
    if job.prompt is not None and sampled:
        model.turns.remember(job.prompt, job.request.prompt, sampled)

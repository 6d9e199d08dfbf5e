"""A clock that a test moves; implements `server.background.Clock`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

EPOCH = 2_000_000_000.0


class ManualClock:
    """Starts at 100 s. Timers go off in `advance` only."""

    def __init__(self) -> None:
        self._now = 100.0
        self._timers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self._now

    def epoch(self) -> float:
        return EPOCH + self._now

    async def sleep(self, seconds: float) -> None:
        await self._timer(seconds)

    async def wait(self, future: asyncio.Future[Any], seconds: float) -> bool:
        # Made here and now: in a task of its own it would begin later.
        timer = self._timer(seconds)
        await asyncio.wait({future, timer}, return_when=asyncio.FIRST_COMPLETED)
        return future.done()

    def _timer(self, seconds: float) -> asyncio.Future[None]:
        timer = asyncio.get_running_loop().create_future()
        if seconds > 0:
            self._timers.append((self._now + seconds, timer))
        else:
            timer.set_result(None)
        return timer

    async def advance(self, seconds: float) -> None:
        """Move on, and let run what that woke."""
        self._now += seconds
        due = [timer for at, timer in self._timers if at <= self._now]
        self._timers = [item for item in self._timers if item[0] > self._now]
        for timer in due:
            if not timer.done():
                timer.set_result(None)
        await turn()


async def turn(n: int = 20) -> None:
    """Let everything run that needs no thread and no time."""
    for _ in range(n):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object], what: str = "it") -> None:
    """Wait for what a thread does."""
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, f"{what} never happened"
        await asyncio.sleep(0.001)

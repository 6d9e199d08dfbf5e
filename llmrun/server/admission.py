"""How many requests one model works on at once, and how many may wait for that: first come first
served, and a clear no beyond. For one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from llmrun.server.background import Clock, SystemClock
from llmrun.server.types import ApiError

# A request's usual time as long as none has ended.
_FIRST_GUESS_S = 5.0
# How much the newest time counts in the running mean.
_NEWEST = 0.2
_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 60.0


@dataclass(eq=False, slots=True)
class _Waiter:
    n_places: int
    ready: asyncio.Future[None]


class Admission:
    """`n_running` places for requests that are worked on; up to `n_queued` requests wait.

    `wait_s`: the longest that one waits, None for ever. Safe against cancellation at any point: a
    request that goes away gives back its place, or leaves the queue.
    """

    def __init__(
        self,
        n_running: int,
        n_queued: int,
        *,
        wait_s: float | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._n_places = max(1, n_running)
        self._n_queued = max(0, n_queued)
        self._wait_s = wait_s
        self._clock = clock or SystemClock()
        self._n_taken = 0
        self._queue: deque[_Waiter] = deque()
        self._usual_s: float | None = None

    @property
    def n_running(self) -> int:
        """Places that are taken."""
        return self._n_taken

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @asynccontextmanager
    async def enter(self, n_places: int = 1) -> AsyncIterator[None]:
        """Wait for `n_places` (a request for several answers takes more than one; no more than
        there are), and hold them while the block runs.

        Raises ApiError: rate_limit when the queue is full, unavailable after `wait_s`; both say
        when to come again.
        """
        n_places = min(max(1, n_places), self._n_places)
        await self._take(n_places)
        started_s = self._clock.now()
        try:
            yield
        finally:
            self._learn(self._clock.now() - started_s)
            self._give_back(n_places)

    async def _take(self, n_places: int) -> None:
        if not self._queue and self._n_taken + n_places <= self._n_places:
            self._n_taken += n_places
            return
        if len(self._queue) >= self._n_queued:
            raise ApiError(
                "rate_limit",
                f"{self._n_taken} requests are running and {len(self._queue)} wait: try again soon",
                code="queue_full",
                retry_after_s=self._estimate_s(len(self._queue)),
            )
        waiter = _Waiter(n_places, asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        try:
            if self._wait_s is None:
                await waiter.ready
            elif not await self._clock.wait(waiter.ready, self._wait_s):
                raise ApiError(
                    "unavailable",
                    f"the request waited {self._wait_s:.0f} s for its turn: try again later",
                    code="queue_timeout",
                    retry_after_s=self._estimate_s(len(self._queue) - 1),
                )
        except BaseException:
            if waiter.ready.done() and not waiter.ready.cancelled():
                # The places came at the very moment at which the request went away.
                self._give_back(n_places)
            else:
                self._queue.remove(waiter)
                # Whoever stands behind a large request may have had room all along.
                self._call_next()
            raise

    def _give_back(self, n_places: int) -> None:
        self._n_taken -= n_places
        self._call_next()

    def _call_next(self) -> None:
        while self._queue and self._n_taken + self._queue[0].n_places <= self._n_places:
            waiter = self._queue.popleft()
            self._n_taken += waiter.n_places
            waiter.ready.set_result(None)

    def _learn(self, took_s: float) -> None:
        usual_s = took_s if self._usual_s is None else self._usual_s
        self._usual_s = usual_s + _NEWEST * (took_s - usual_s)

    def _estimate_s(self, n_before: int) -> float:
        """When a place in the queue may be free, with so many waiting before."""
        usual_s = _FIRST_GUESS_S if self._usual_s is None else self._usual_s
        estimate_s = usual_s * (n_before + 1) / self._n_places
        return min(_MOST_RETRY_S, max(_LEAST_RETRY_S, estimate_s))

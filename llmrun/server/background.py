"""Time and threads for the server's event loop: bounded waits, and blocking work off the loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Clock(Protocol):
    """Time as the server sees it; tests move their own."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""

    def epoch(self) -> float:
        """Seconds since 1970."""

    async def sleep(self, seconds: float) -> None: ...

    async def wait(self, future: asyncio.Future[Any], seconds: float) -> bool:
        """Whether `future` is done within `seconds`. It is not cancelled when it is not, nor when
        the one who waits is."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.monotonic()

    def epoch(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def wait(self, future: asyncio.Future[Any], seconds: float) -> bool:
        await asyncio.wait({future}, timeout=max(0.0, seconds))
        return future.done()


def run_in_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Start `work` in a thread of its own; its result or what it raises.

    The thread keeps the process from nothing: where the process ends, it ends. Cancelling the
    future stops only the waiting.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - handed to the one who waits
            # A future refuses StopIteration.
            failure = RuntimeError(str(error)) if isinstance(error, StopIteration) else error
        try:
            loop.call_soon_threadsafe(tell, result, failure)
        except RuntimeError:  # the loop has ended meanwhile, and nobody waits
            return

    threading.Thread(target=run, name=name, daemon=True).start()
    return future

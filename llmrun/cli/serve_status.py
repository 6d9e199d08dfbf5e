"""The live line of `serve` on a terminal: streams, speed, use of the cache."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING

from llmrun.text import escape_line

if TYPE_CHECKING:
    from rich.live import Live

    from llmrun.cli.serve_log import LogOutput
    from llmrun.engine.types import EngineCounters
    from llmrun.server.service import Service

_EVERY_S = 0.5


class StatusLine:
    """Shown on stderr where that is a terminal and nobody asked for quiet; else nothing. The event
    loop only finds the words: a terminal may be stopped."""

    def __init__(self, output: LogOutput, service: Service) -> None:
        self._output = output
        self._service = service
        self._task: asyncio.Task[None] | None = None
        self._live: Live | None = None
        self._last_s = 0.0
        self._n_last = 0

    def start(self) -> None:
        """In the event loop."""
        output = self._output
        if output.quiet or output.json or not output.environment.stderr_is_tty:
            return
        from rich.live import Live

        self._live = live = Live(console=output.stderr, auto_refresh=False, transient=True)
        output.put(live.start)
        self._task = asyncio.get_running_loop().create_task(self._run(live))

    def pause(self) -> None:
        """Take the line away; what is written later comes behind that."""
        if self._task is not None:
            self._task.cancel()
        if self._live is not None:
            self._output.put(self._live.stop)
            self._live = None

    async def stop(self) -> None:
        self.pause()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self, live: Live) -> None:
        from rich.text import Text

        while True:
            text = Text(self.line(), style="dim", overflow="ellipsis")
            # Where others wait to be written, the next line is as good.
            if self._output.is_idle:
                self._output.put(partial(live.update, text, refresh=True))
            await asyncio.sleep(_EVERY_S)

    def line(self) -> str:
        """What there is to say now."""
        counters = self._service.engine_counters()
        now_s = time.monotonic()
        n_tokens = sum(each.n_completion for _, each in counters)
        # A model that was unloaded took its count along.
        n_new = max(0, n_tokens - self._n_last) if self._last_s else 0
        rate = n_new / (now_s - self._last_s) if self._last_s else 0.0
        self._last_s, self._n_last = now_s, n_tokens
        return describe_status([each for _, each in counters], rate, self._loading())

    def _loading(self) -> list[str]:
        return [
            escape_line(f"{each.doing} {each.name} {each.share:.0%}")
            for each in self._service.host.loading()
        ]


def describe_status(counters: list[EngineCounters], tok_s: float, loading: list[str]) -> str:
    """`2 streams · 118 tok/s · KV 1234/16384 (8 %) · 3 waiting`."""
    n_running = sum(each.n_running for each in counters)
    n_waiting = sum(each.n_waiting for each in counters)
    n_cells = sum(each.n_cells for each in counters)
    n_ctx = sum(each.n_ctx for each in counters)
    parts = ["idle" if not n_running else "1 stream" if n_running == 1 else f"{n_running} streams"]
    if n_running:
        parts.append(f"{tok_s:.0f} tok/s")
    if n_ctx:
        parts.append(f"KV {n_cells}/{n_ctx} ({100 * n_cells // n_ctx} %)")
    if n_waiting:
        parts.append(f"{n_waiting} waiting")
    return " · ".join([*parts, *loading])

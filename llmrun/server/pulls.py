"""Models that are downloaded because somebody asked for them: one at a time, shared by all who ask
for the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from llmrun.errors import LlmrunError
from llmrun.server.background import Clock, run_in_thread
from llmrun.server.failures import api_error_of
from llmrun.server.types import ApiError, ModelCard
from llmrun.text import escape_line

_MAX_PULLS = 8
_LEAST_RETRY_S, _MOST_RETRY_S = 5.0, 60.0


@dataclass(eq=False, slots=True)
class _Pull:
    name: str
    began_s: float
    share: float = 0.0
    card: ModelCard | None = None
    error: ApiError | None = None
    task: asyncio.Task[None] | None = None


class Pulls:
    """`pull(name, on_progress)` downloads and blocks (see `opener.Opener.pull`). A request waits
    `wait_s` for that; an error stands for `retry_failed_s`. For one event loop."""

    def __init__(
        self,
        pull: Callable[[str, Callable[[float], None]], ModelCard],
        clock: Clock,
        wait_s: float,
        retry_failed_s: float,
    ) -> None:
        self._pull = pull
        self._clock = clock
        self._wait_s = wait_s
        self._retry_failed_s = retry_failed_s
        self._pulls: dict[str, _Pull] = {}
        self._failed: dict[str, tuple[ApiError, float]] = {}
        self._turn = asyncio.Lock()

    def running(self) -> list[tuple[str, float]]:
        """Each download's name and the share that is here."""
        return [(pull.name, pull.share) for pull in self._pulls.values()]

    async def get(self, name: str) -> ModelCard:
        """The model, once it is here. The download goes on whoever stops waiting.

        Raises ApiError: unavailable when it takes longer than one waits, rate_limit when too many
        others are asked for, and what the download failed with."""
        key = name.lower()
        pull = self._pulls.get(key) or self._begin(key, name)
        assert pull.task is not None
        if not await self._clock.wait(pull.task, self._wait_s):
            raise ApiError(
                "unavailable",
                f"{pull.name} is being downloaded ({pull.share:.0%} is here): try again later",
                code="model_downloading",
                retry_after_s=self._estimate_s(pull),
            )
        if pull.card is None:
            raise pull.error or ApiError("unavailable", "the download was stopped")
        return pull.card

    def close(self) -> None:
        """Stop waiting. The threads end with the process; what is here stays for the next time."""
        for pull in list(self._pulls.values()):
            if pull.task is not None:
                pull.task.cancel()

    def _begin(self, key: str, name: str) -> _Pull:
        now_s = self._clock.now()
        for other, (error, until_s) in list(self._failed.items()):
            if now_s >= until_s:
                del self._failed[other]
            elif other == key:
                raise error
        if len(self._pulls) >= _MAX_PULLS:
            raise ApiError(
                "rate_limit",
                f"{len(self._pulls)} models are being downloaded: try again later",
                code="queue_full",
                retry_after_s=_MOST_RETRY_S,
            )
        pull = _Pull(escape_line(name), now_s)
        self._pulls[key] = pull
        pull.task = asyncio.get_running_loop().create_task(self._run(key, name, pull))
        return pull

    async def _run(self, key: str, name: str, pull: _Pull) -> None:
        def note(share: float) -> None:
            pull.share = share

        try:
            async with self._turn:
                pull.began_s = self._clock.now()
                pull.card = await run_in_thread(lambda: self._pull(name, note), "llmrun-pull")
        except LlmrunError as error:
            pull.error = api_error_of(error)
        except Exception as error:  # noqa: BLE001 - told to those who wait
            pull.error = ApiError("internal", f"the download failed: {type(error).__name__}")
        finally:
            del self._pulls[key]
        if pull.error is not None:
            self._failed[key] = (pull.error, self._clock.now() + self._retry_failed_s)

    def _estimate_s(self, pull: _Pull) -> float:
        took_s = self._clock.now() - pull.began_s
        left_s = took_s * (1 - pull.share) / pull.share if pull.share > 0 else _MOST_RETRY_S
        return min(_MOST_RETRY_S, max(_LEAST_RETRY_S, left_s))

"""Loads models one at a time, and first makes the room that each of them needs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmrun.errors import EngineError, LlmrunError, WillNotFitError
from llmrun.server.admission import Admission
from llmrun.server.background import Clock, run_in_thread
from llmrun.server.opener import Judgment, Opened, Opener, Role, Room
from llmrun.server.shelf import Shelf, Slot
from llmrun.server.types import ApiError
from llmrun.text import escape_line

_log = logging.getLogger("llmrun.server")

RETRY_S = 5.0
"""When to ask again for a model that is on its way."""

_N_READERS = 2
"""Texts of one model that are tokenized at once beside its replies. More would only take more of
the processor's cores from these; with one, a short text would wait for every long one."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """`wait_s`: how long a load waits for other models to become idle. `max_queue` and
    `queue_wait_s` are those of each `Admission` of the loaded model. `retry_failed_s`: how long the
    error of a failed load stands for the next ones."""

    wait_s: float
    max_queue: int
    queue_wait_s: float | None
    retry_failed_s: float


class Loader:
    """Fills the slots of `shelf` with what `opener` loads. For one event loop."""

    def __init__(self, opener: Opener, shelf: Shelf, options: LoadOptions, clock: Clock) -> None:
        self._opener = opener
        self._shelf = shelf
        self._options = options
        self._clock = clock
        self._turn = asyncio.Lock()
        self._failures: dict[tuple[str, Role], tuple[LlmrunError | ApiError, float]] = {}
        self.is_closed = False

    def recent_failure(self, key: tuple[str, Role]) -> LlmrunError | ApiError | None:
        """The error of a load that has failed just now."""
        error, until_s = self._failures.get(key, (None, 0.0))
        if error is not None and self._clock.now() >= until_s:
            del self._failures[key]
            return None
        return error

    async def load(self, slot: Slot) -> None:
        """Load the slot's model, or note in it why that cannot be. Raises nothing else, but when
        cancelled."""
        shelf = self._shelf
        failure: LlmrunError | ApiError | None = None
        try:
            async with self._turn:
                await self._make_room(slot)
                await self._open(slot)
        except (LlmrunError, ApiError) as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - told to those who wait
            _log.exception("loading %s failed", escape_line(slot.card.name))
            # Its words may hold what is no client's business, such as paths; the log has them.
            failure = EngineError("the model could not be loaded", why=type(error).__name__)
        except BaseException:
            shelf.forget(slot)
            raise
        if failure is None:
            slot.used_s = self._clock.now()
            shelf.settle(slot)
        else:
            slot.failure = failure
            shelf.forget(slot)
            until_s = self._clock.now() + self._options.retry_failed_s
            self._failures[slot.key] = failure, until_s
        shelf.notify()

    def require_open(self) -> None:
        """Raise ApiError once the server is closing."""
        if self.is_closed:
            raise ApiError(
                "unavailable",
                "the server is shutting down",
                code="shutting_down",
                retry_after_s=RETRY_S,
            )

    # ---- loading

    async def _open(self, slot: Slot) -> None:
        """Load it into the memory that there is now; where that turns out to be less than was
        planned, into what the next idle models leave."""
        shelf = self._shelf

        def go_on(share: float) -> bool:
            slot.share = share
            return not self.is_closed

        while True:
            self.require_open()
            await shelf.wait_closed()
            slot.doing = "loading"
            try:
                opened = await self._open_in_thread(slot, shelf.room(), go_on)
            except WillNotFitError as error:
                idle = shelf.list_idle()
                if idle:
                    shelf.unload(idle[0])
                    continue
                if shelf.list_busy():
                    raise _in_the_way(slot) from error
                raise
            slot.opened = replace(
                opened,
                admission=self._admission(opened.n_parallel),
                token_admission=self._admission(_N_READERS),
            )
            return

    def _admission(self, n_places: int) -> Admission:
        options = self._options
        return Admission(
            n_places, options.max_queue, wait_s=options.queue_wait_s, clock=self._clock
        )

    async def _open_in_thread(
        self, slot: Slot, room: Room, go_on: Callable[[float], bool]
    ) -> Opened:
        loading = run_in_thread(
            lambda: self._opener.open(slot.card, slot.role, room, go_on), "llmrun-load"
        )
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            # Nobody will have it, so somebody has to free it.
            loading.add_done_callback(_close_result)
            raise

    # ---- making room

    async def _make_room(self, slot: Slot) -> None:
        """Evict what has to go for this model to run as well as it can. Raises WillNotFitError when
        it would not run with all others gone, and ApiError when these are in use for too long."""
        shelf = self._shelf
        until_s = self._clock.now() + self._options.wait_s
        held: list[Slot] = []
        try:
            while True:
                self.require_open()
                await shelf.wait_closed()
                idle = shelf.list_idle()
                judged = await self._judge(slot, idle)
                if judged.runs:
                    await self._evict(slot, idle, judged)
                    return
                busy = shelf.list_busy()
                if not busy or not (await self._judge(slot, [*idle, *busy])).runs:
                    raise judged.error or WillNotFitError(f"{slot.card.name} does not fit")
                if self._clock.now() >= until_s:
                    raise _in_the_way(slot)
                # With new requests coming in they would never be idle.
                for other in busy:
                    if not other.leaving:
                        other.leaving = True
                        held.append(other)
                # While it was judged, the end may have been told; nothing is told a second time.
                if shelf.list_busy() == busy and not self.is_closed:
                    await shelf.wait_changed(until_s - self._clock.now())
        finally:
            for other in held:
                if shelf.slots.get(other.key) is other:
                    shelf.stay(other)

    async def _evict(self, slot: Slot, idle: Sequence[Slot], best: Judgment) -> None:
        """Evict as few of `idle`, from the first on, as are needed for a plan as good as `best`."""
        for n in range(len(idle)):
            judged = await self._judge(slot, idle[:n])
            if judged.runs and judged.quality >= best.quality:
                idle = idle[:n]
                break
        for victim in idle:
            # It may have been taken into use meanwhile.
            if victim.is_idle:
                self._shelf.unload(victim)
        await self._shelf.wait_closed()

    async def _judge(self, slot: Slot, gone: Sequence[Slot]) -> Judgment:
        room = self._shelf.room(gone)
        return await run_in_thread(
            lambda: self._opener.judge(slot.card, slot.role, room), "llmrun-judge"
        )


def still_loading(slot: Slot) -> ApiError:
    """For a request that has waited long enough."""
    if slot.doing == "waiting":
        return _in_the_way(slot)
    return ApiError(
        "unavailable",
        f"{slot.card.name} is being loaded ({slot.share:.0%})",
        code="model_loading",
        retry_after_s=RETRY_S,
    )


def _in_the_way(slot: Slot) -> ApiError:
    return ApiError(
        "unavailable",
        f"{slot.card.name} waits for other models, which are in use",
        code="model_loading",
        retry_after_s=RETRY_S,
    )


def _close_result(loading: asyncio.Future[Opened]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        loading.result().close()

"""The loaded models of a server: who uses them, how long they stay, and how they go."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmrun.errors import LlmrunError
from llmrun.server.background import Clock, run_in_thread
from llmrun.server.opener import RAM, Opened, Role, Room
from llmrun.server.types import ApiError, ModelCard
from llmrun.text import escape_line

_log = logging.getLogger("llmrun.server")


@dataclass(eq=False, slots=True)
class Slot:
    """A model in one role, loaded or being loaded. `n_users` are the requests that have it or wait
    for it. `leaving`: it takes no more of them, because another model needs its memory. `failure`
    is why it could not be loaded. `gone` is done when it is neither loaded nor loading any more, or
    when it was to leave and does not. Times are the clock's."""

    card: ModelCard
    role: Role
    is_pinned: bool
    gone: asyncio.Future[None]
    keep_alive_s: float
    opened: Opened | None = None
    load: asyncio.Task[None] | None = None
    failure: LlmrunError | ApiError | None = None
    doing: Literal["waiting", "loading"] = "waiting"
    share: float = 0.0
    n_users: int = 0
    used_s: float = 0.0
    expires_s: float | None = None
    leaving: bool = False

    @property
    def key(self) -> tuple[str, Role]:
        return self.card.name, self.role

    @property
    def is_idle(self) -> bool:
        return self.opened is not None and self.n_users == 0


class Shelf:
    """The slots by model and role. For one event loop."""

    def __init__(self, clock: Clock) -> None:
        self.slots: dict[tuple[str, Role], Slot] = {}
        self._clock = clock
        self._closings: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._reaper: asyncio.Task[None] | None = None
        self._reap_at_s = math.inf
        self._reap_sooner = asyncio.Event()

    # ---- who is here

    def list_idle(self) -> list[Slot]:
        """What may be evicted at once, unused for longest first."""
        idle = [slot for slot in self.slots.values() if slot.is_idle and not slot.is_pinned]
        return sorted(idle, key=lambda slot: slot.used_s)

    def list_busy(self) -> list[Slot]:
        """What may be evicted once it is idle."""
        return [
            slot
            for slot in self.slots.values()
            if slot.opened is not None and slot.n_users and not slot.is_pinned
        ]

    def room(self, gone: Sequence[Slot] = ()) -> Room:
        """The room there would be without these."""
        unseen_bytes = 0
        freed: dict[str, int] = {}
        for slot in self.slots.values():
            opened = slot.opened
            if opened is None:
                continue
            if slot not in gone:
                unseen_bytes += opened.unseen_bytes
                continue
            for device, n_bytes in opened.uses.items():
                seen = n_bytes - (opened.unseen_bytes if device == RAM else 0)
                freed[device] = freed.get(device, 0) + max(0, seen)
        return Room(unseen_bytes, freed)

    # ---- going

    def settle(self, slot: Slot) -> None:
        """Decide when a model goes, if it is idle."""
        if not slot.is_idle or slot.is_pinned:
            return
        if slot.keep_alive_s == 0 and not slot.leaving:
            self.unload(slot)
            return
        slot.expires_s = None
        if slot.keep_alive_s > 0:
            slot.expires_s = self._clock.now() + slot.keep_alive_s
            if self._reaper is None or self._reaper.done():
                self._reaper = asyncio.get_running_loop().create_task(self._reap())
            elif slot.expires_s < self._reap_at_s:
                self._reap_sooner.set()

    def stay(self, slot: Slot) -> None:
        """A model that was to leave stays after all; those who wait for it to go look again."""
        slot.leaving = False
        slot.gone.set_result(None)
        slot.gone = asyncio.get_running_loop().create_future()
        self.settle(slot)

    def forget(self, slot: Slot) -> None:
        """The slot is not to be had from here on."""
        if self.slots.get(slot.key) is slot:
            del self.slots[slot.key]
        if not slot.gone.done():
            slot.gone.set_result(None)

    def unload(self, slot: Slot) -> None:
        """Free the model, in a thread; it is not to be had from here on."""
        self.forget(slot)
        opened, slot.opened = slot.opened, None
        if opened is None:
            return
        task = asyncio.get_running_loop().create_task(_close(opened))
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)

    async def wait_closed(self) -> None:
        """Until the memory of all that was unloaded is free."""
        while self._closings:
            await asyncio.wait(set(self._closings))

    async def close(self) -> None:
        """Free all, also what is in use."""
        if self._reaper is not None:
            self._reaper.cancel()
        for slot in list(self.slots.values()):
            self.unload(slot)
        await self.wait_closed()

    async def _reap(self) -> None:
        """Unload what nobody has asked for in time, as long as there is such."""
        while True:
            now_s = self._clock.now()
            times_s = []
            for slot in list(self.slots.values()):
                if not slot.is_idle or slot.expires_s is None or slot.leaving:
                    continue
                if slot.expires_s <= now_s:
                    self.unload(slot)
                else:
                    times_s.append(slot.expires_s)
            if not times_s:
                return
            self._reap_at_s = min(times_s)
            self._reap_sooner.clear()
            await self._wait(self._reap_sooner, self._reap_at_s - now_s)

    # ---- waiting

    def notify(self) -> None:
        """Wake those who wait for a change of any slot."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_changed(self, seconds: float) -> None:
        await self._wait(self._changed, seconds)

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        waiter = asyncio.ensure_future(event.wait())
        try:
            await self._clock.wait(waiter, seconds)
        finally:
            waiter.cancel()


async def _close(opened: Opened) -> None:
    try:
        await run_in_thread(opened.close, "llmrun-unload")
    except Exception:  # noqa: BLE001 - it is gone for the server in any case
        _log.exception("unloading %s failed", escape_line(opened.card.name))

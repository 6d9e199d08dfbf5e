"""The models of a server: loaded when first asked for, kept for a while, evicted when the next one
needs their memory.

Everything here lives in one event loop; what blocks (looking for models, planning, loading,
closing, downloading) runs in threads. A load belongs to nobody: clients wait for it, each for a
bounded time, and whoever goes away changes nothing for the others. One model loads at a time.

Memory: a model that would not run as well beside the loaded ones as it could evicts idle ones,
those unused for longest first, and no more than help. Where only busy ones are in the way, they
take no new requests until they are idle and gone. Pinned models are never evicted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from llmrun.errors import LlmrunError, NotFoundError
from llmrun.server.background import Clock, SystemClock, run_in_thread
from llmrun.server.failures import api_error_of
from llmrun.server.loader import RETRY_S, Loader, LoadOptions, still_loading
from llmrun.server.opener import Judgment, Opened, Opener, Role, Room
from llmrun.server.pulls import Pulls
from llmrun.server.shelf import Shelf, Slot
from llmrun.server.types import ApiError, LoadedCard, ModelCard, describe_models

__all__ = [
    "HostOptions",
    "Judgment",
    "LoadingCard",
    "ModelHost",
    "Opened",
    "Opener",
    "Role",
    "Room",
]

MAX_NAME_CHARS = 512
# Spellings of models' names that are remembered.
_MAX_NAMES = 1000


@dataclass(frozen=True, slots=True)
class HostOptions:
    """`keep_alive_s`: how long an idle model stays loaded (negative: for good). `pinned` are loaded
    at the start and stay. `allow_pull`: download what is asked for and not here. `load_wait_s`: how
    long a request waits for a model to be loaded or downloaded. `max_queue`: requests that wait for
    one model; `queue_wait_s`: how long each does at most. `retry_failed_s`: how long the error of a
    failed load stands for the next ones."""

    keep_alive_s: float = 300.0
    pinned: tuple[str, ...] = ()
    allow_pull: bool = False
    load_wait_s: float = 120.0
    max_queue: int = 64
    queue_wait_s: float | None = 600.0
    retry_failed_s: float = 5.0


@dataclass(frozen=True, slots=True)
class LoadingCard:
    """Something that is on its way. `share` of it is done, from 0 to 1. `waiting`: for the memory
    of other models, or for its turn."""

    name: str
    role: Role
    doing: Literal["waiting", "loading", "downloading"]
    share: float


class ModelHost:
    """See the module. Made and used in one event loop; `close` ends it."""

    def __init__(
        self, opener: Opener, options: HostOptions | None = None, *, clock: Clock | None = None
    ) -> None:
        self._opener = opener
        self._options = options = options or HostOptions()
        self._clock = clock or SystemClock()
        self._shelf = Shelf(self._clock)
        self._loader = Loader(
            opener,
            self._shelf,
            LoadOptions(
                options.load_wait_s,
                options.max_queue,
                options.queue_wait_s,
                options.retry_failed_s,
            ),
            self._clock,
        )
        self._pulls = Pulls(opener.pull, self._clock, options.load_wait_s, options.retry_failed_s)
        self._names: dict[str, str] = {}
        self._cards: list[ModelCard] = []
        self._pinned: dict[str, ModelCard] = {}

    # ---- what requests do

    @asynccontextmanager
    async def use(
        self, name: str, role: Role = "chat", keep_alive_s: float | None = None
    ) -> AsyncIterator[Opened]:
        """The model that a request calls `name`, loaded in `role`; it stays while the block runs,
        and for `keep_alive_s` afterwards (None: as the options say; negative: for good; 0: not at
        all; a pinned one stays in any case). An empty name means the only model there is.

        Raises ApiError: not_found for a model that is not here, unavailable with a time to try
        again while it is being loaded or downloaded for longer than a request waits, rate_limit
        when too many wait already, and what a load that failed came to.
        """
        slot = await self._hold(name, role)
        slot.keep_alive_s = self._options.keep_alive_s if keep_alive_s is None else keep_alive_s
        try:
            assert slot.opened is not None
            yield slot.opened
        finally:
            self._let_go(slot)

    async def unload(self, name: str) -> bool:
        """Have the model go in all its roles, in each as soon as it is idle; False for a pinned
        one, which stays. Raises ApiError for an unknown name."""
        card = await self.find(name)
        for slot in list(self._shelf.slots.values()):
            if slot.card.name == card.name and not slot.is_pinned:
                slot.keep_alive_s = 0.0
                self._shelf.settle(slot)
        return card.name not in self._pinned

    def discard(self, opened: Opened) -> None:
        """A loaded model turned out to be broken: the next request loads it anew."""
        for slot in list(self._shelf.slots.values()):
            if slot.opened is opened:
                slot.keep_alive_s, slot.is_pinned, slot.leaving = 0.0, False, False
                self._shelf.forget(slot)
                self._shelf.settle(slot)

    # ---- what is here

    def cards(self) -> list[ModelCard]:
        """The models that can be asked for, as of the start or the last `refresh`."""
        return list(self._cards)

    async def refresh(self) -> list[ModelCard]:
        """Look again which models there are."""
        self._cards = await run_in_thread(self._opener.cards, "llmrun-list")
        return list(self._cards)

    async def find(self, name: str) -> ModelCard:
        """The card of what a request calls `name`; loads and downloads nothing. Raises ApiError."""
        known = self._names.get(name)
        for slot in self._shelf.slots.values():
            if slot.opened is not None and slot.card.name == known:
                return slot.card
        if not name:
            return await self._find_only()
        if len(name) > MAX_NAME_CHARS:
            raise await self._not_found(NotFoundError("no model has a name of such length"))
        try:
            card = await run_in_thread(lambda: self._opener.find(name), "llmrun-find")
        except NotFoundError as error:
            raise await self._not_found(error) from None
        except LlmrunError as error:
            raise api_error_of(error) from None
        self._remember(name, card)
        return card

    def opened(self) -> list[Opened]:
        """The loaded models."""
        slots = self._shelf.slots.values()
        return [slot.opened for slot in slots if slot.opened is not None]

    def loaded(self) -> list[LoadedCard]:
        """The loaded models for people and clients; one may be there once for each role."""
        now_s = self._clock.now()
        found = []
        for slot in self._shelf.slots.values():
            opened = slot.opened
            if opened is None:
                continue
            expires_s = slot.expires_s
            if slot.n_users and not slot.is_pinned and slot.keep_alive_s >= 0:
                expires_s = now_s + slot.keep_alive_s
            found.append(
                LoadedCard(
                    opened.card,
                    opened.n_ctx,
                    opened.n_parallel,
                    opened.memory_bytes,
                    opened.gpu_bytes,
                    None if expires_s is None else self._clock.epoch() + expires_s - now_s,
                    opened.admission.n_running,
                )
            )
        return found

    def loading(self) -> list[LoadingCard]:
        """What is being loaded or downloaded."""
        found = [
            LoadingCard(slot.card.name, slot.role, slot.doing, slot.share)
            for slot in self._shelf.slots.values()
            if slot.opened is None
        ]
        pulling = self._pulls.running()
        return [*found, *(LoadingCard(name, "chat", "downloading", n) for name, n in pulling)]

    # ---- start and end

    async def start(self) -> None:
        """Look which models there are, and load the pinned ones. Raises the LlmrunError of the
        first that cannot be, or ApiError when the host is closed meanwhile."""
        for name in self._options.pinned:
            card = await run_in_thread(lambda: self._opener.find(name), "llmrun-find")  # noqa: B023
            self._pinned[card.name] = card
        await self.refresh()
        for card in self._pinned.values():
            slot = self._slot_of(card, _main_role(card))
            if slot.load is not None:
                await asyncio.shield(slot.load)
            if slot.failure is not None:
                raise slot.failure

    async def close(self) -> None:
        """Stop what loads, and free all models, also those in use."""
        self._loader.is_closed = True
        self._shelf.notify()
        self._pulls.close()
        slots = self._shelf.slots.values()
        loads = [slot.load for slot in slots if slot.load is not None]
        if loads:
            # A load hears of the end at its next piece of progress.
            await asyncio.wait(loads)
        await self._shelf.close()

    # ---- finding

    async def _find_or_pull(self, name: str) -> ModelCard:
        try:
            return await self.find(name)
        except ApiError as error:
            if error.kind != "not_found" or not self._options.allow_pull:
                raise
        if len(name) > MAX_NAME_CHARS:
            raise await self._not_found(NotFoundError("no model has a name of such length"))
        card = await self._pulls.get(name)
        self._remember(name, card)
        await self.refresh()
        return card

    async def _find_only(self) -> ModelCard:
        cards = list(self._pinned.values()) or self._cards or await self.refresh()
        if len(cards) == 1:
            return cards[0]
        raise ApiError(
            "invalid_request",
            f"the request names no model; here are: {describe_models(cards)}",
            param="model",
        )

    async def _not_found(self, error: NotFoundError) -> ApiError:
        cards = self._cards or await self.refresh()
        words = error.message if not error.why else f"{error.message}: {error.why}"
        words += f"; here are: {describe_models(cards)}"
        if error.hint:
            words += f"; to get it: {error.hint}"
        return ApiError("not_found", words, param="model", code="model_not_found")

    def _remember(self, name: str, card: ModelCard) -> None:
        if len(self._names) >= _MAX_NAMES:
            self._names.clear()
        self._names[name] = card.name

    # ---- holding

    async def _hold(self, name: str, role: Role) -> Slot:
        """A slot whose model is loaded, with one user more."""
        until_s = self._clock.now() + self._options.load_wait_s
        while True:
            self._loader.require_open()
            slot = self._slot_of(await self._find_or_pull(name), role)
            if slot.leaving:
                if not await self._clock.wait(slot.gone, until_s - self._clock.now()):
                    raise still_loading(slot)
                continue
            if slot.opened is None and slot.n_users >= max(1, self._options.max_queue):
                raise ApiError(
                    "rate_limit",
                    f"{slot.n_users} requests wait for {slot.card.name} to be loaded",
                    code="queue_full",
                    retry_after_s=RETRY_S,
                )
            slot.n_users += 1
            slot.expires_s = None
            if slot.opened is None:
                try:
                    await self._wait_loaded(slot, until_s)
                except BaseException:
                    self._let_go(slot)
                    raise
            return slot

    async def _wait_loaded(self, slot: Slot, until_s: float) -> None:
        assert slot.load is not None
        if not await self._clock.wait(slot.load, until_s - self._clock.now()):
            raise still_loading(slot)
        if slot.failure is not None:
            raise _api_error(slot.failure)
        self._loader.require_open()
        if slot.opened is None:
            # Its task was cancelled from outside, as when the event loop ends.
            raise still_loading(slot)

    def _slot_of(self, card: ModelCard, role: Role) -> Slot:
        """The slot, which begins to load where it is new. Raises ApiError where a load has just
        failed."""
        slot = self._shelf.slots.get((card.name, role))
        if slot is not None:
            return slot
        failure = self._loader.recent_failure((card.name, role))
        if failure is not None:
            raise _api_error(failure)
        loop = asyncio.get_running_loop()
        is_pinned = card.name in self._pinned
        slot = Slot(card, role, is_pinned, loop.create_future(), self._options.keep_alive_s)
        self._shelf.slots[slot.key] = slot
        slot.load = loop.create_task(self._loader.load(slot))
        return slot

    def _let_go(self, slot: Slot) -> None:
        slot.n_users -= 1
        slot.used_s = self._clock.now()
        if slot.n_users == 0:
            self._shelf.settle(slot)
            self._shelf.notify()


def _main_role(card: ModelCard) -> Role:
    if card.can_chat:
        return "chat"
    return "rank" if card.can_rerank else "embed"


def _api_error(error: LlmrunError | ApiError) -> ApiError:
    return error if isinstance(error, ApiError) else api_error_of(error)

"""Models that are nothing but sizes, in a memory of some size: a `server.opener.Opener`."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

from llmrun.engine.types import LoadProgress
from llmrun.errors import LlmrunError, NotFoundError, WillNotFitError
from llmrun.server.opener import RAM, Judgment, Opened, Role, Room
from llmrun.server.types import ModelCard
from tests.fakes.fake_engine import FakeEngine


class FakeOpener:
    """`sizes` are (bytes that a model needs to run at all, bytes with which it runs well) or one
    number for both; half of what a loaded model takes is unseen by the system. `log` is what was
    done, in order. `gates[name]`: the load waits for it. `errors[name]` is raised by the loads, one
    after the other. `hub` are the sizes of what can be pulled."""

    def __init__(
        self,
        memory: int,
        sizes: dict[str, int | tuple[int, int]],
        *,
        hub: dict[str, int] | None = None,
        n_parallel: int = 2,
    ) -> None:
        self.memory = memory
        self.sizes = {
            name: size if isinstance(size, tuple) else (size, size) for name, size in sizes.items()
        }
        self.hub = hub or {}
        self.n_parallel = n_parallel
        self.log: list[str] = []
        self.taken: dict[str, int] = {}
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, list[BaseException]] = defaultdict(list)
        self.pull_gate = threading.Event()
        self.pull_gate.set()
        self.pull_errors: list[LlmrunError] = []
        self.pull_share = 0.0
        self.n_finds = 0
        self.rooms: list[Room] = []
        self.engines: dict[str, FakeEngine] = {}

    def cards(self) -> list[ModelCard]:
        return [ModelCard(name, size[1]) for name, size in self.sizes.items()]

    def find(self, name: str) -> ModelCard:
        self.n_finds += 1
        for card in self.cards():
            if name.lower().removesuffix(":latest") == card.name:
                return card
        raise NotFoundError(f"no model is called '{name}'", hint=f"llmrun pull {name}")

    def judge(self, card: ModelCard, role: Role, room: Room) -> Judgment:
        self.rooms.append(room)
        free = self._free(room)
        least, most = self.sizes[card.name]
        if free < least:
            error = WillNotFitError(f"{card.name} needs {least}", why=f"{free} are free")
            return Judgment((0,), error)
        return Judgment((1, min(free, most)))

    def open(
        self, card: ModelCard, role: Role, room: Room, on_progress: LoadProgress | None = None
    ) -> Opened:
        self.log.append(f"load {card.name} {role}")
        gate = self.gates.get(card.name)
        if on_progress is not None:
            on_progress(0.25)
        if gate is not None:
            while not gate.wait(0.005):
                if on_progress is not None and not on_progress(0.5):
                    raise LlmrunError("the load was stopped")
        if self.errors[card.name]:
            raise self.errors[card.name].pop(0)
        least, most = self.sizes[card.name]
        free = self._free(room)
        if free < least:
            raise WillNotFitError(f"{card.name} needs {least}", why=f"{free} are free")
        key, size = f"{card.name} {role}", min(free, most)
        self.taken[key] = size
        engine = self.engines[key] = FakeEngine()

        def close() -> None:
            self.log.append(f"close {card.name} {role}")
            engine.close()
            self.taken.pop(key, None)

        return Opened(
            card,
            role,
            4096,
            close,
            engine=engine,
            n_parallel=self.n_parallel,
            uses={RAM: size},
            unseen_bytes=size // 2,
            load_s=0.5,
        )

    def pull(self, name: str, on_progress: Callable[[float], None]) -> ModelCard:
        self.log.append(f"pull {name}")
        on_progress(self.pull_share)
        self.pull_gate.wait(20)
        if self.pull_errors:
            raise self.pull_errors.pop(0)
        if name not in self.hub:
            raise NotFoundError(f"the hub has no {name}")
        self.sizes[name] = (self.hub[name], self.hub[name])
        return self.find(name)

    def _free(self, room: Room) -> int:
        # The system sees one half of what loaded models take.
        seen = sum(size - size // 2 for size in self.taken.values())
        return self.memory - seen - room.unseen_bytes + room.freed.get(RAM, 0)

"""The real application over a fake engine, served on loopback by uvicorn in a thread.

    with ChatServer([" Hello!"]) as server:
        httpx.get(server.url)

`server.engine.hold(n)` lets answers go on for n events only, until `release()`; `submitted` is set
when one is asked of the engine, `cancelled` when the server ends one early.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

import uvicorn

from llmrun.engine.types import Event, LoadProgress, Request
from llmrun.errors import NotFoundError
from llmrun.server.app import build_app, encode_error_for
from llmrun.server.guard import GuardOptions
from llmrun.server.host import HostOptions, Judgment, ModelHost, Opened, Role, Room
from llmrun.server.lifecycle import ServerState
from llmrun.server.limits import GuardMiddleware
from llmrun.server.page import pages
from llmrun.server.service import Service
from llmrun.server.types import ModelCard
from tests.fakes.fake_engine import CHATML, FakeEngine, FakeStream, Script, fake_facts

OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json", "/ui/*")
WAIT_S = 30.0

# Names the mark of thinking, as the templates of models that think do.
THINKING_CHATML = "{% set mark = '<think></think>' %}" + CHATML


class HeldEngine(FakeEngine):
    """A FakeEngine whose answers can be made to wait."""

    def __init__(self, answers: Sequence[Script], **options: object) -> None:
        super().__init__(answers, **options)  # type: ignore[arg-type]
        self.submitted = threading.Event()
        self.cancelled = threading.Event()
        self.hold_at: int | None = None
        self._held: list[HeldStream] = []

    def hold(self, n_events: int) -> None:
        self.hold_at = n_events

    def release(self) -> None:
        self.hold_at = None
        for stream in self._held:
            stream.wake()

    def submit(self, request: Request) -> HeldStream:  # type: ignore[override]
        stream = HeldStream(super().submit(request), self)
        self._held.append(stream)
        self.submitted.set()
        return stream


class HeldStream:
    """The part of StreamLike that the server uses."""

    def __init__(self, stream: FakeStream, engine: HeldEngine) -> None:
        self._stream = stream
        self._engine = engine
        self._n_taken = 0
        self._listener: Callable[[], None] | None = None

    def listen(self, listener: Callable[[], None]) -> None:
        self._listener = listener
        self._stream.listen(listener)

    def wake(self) -> None:
        if self._listener is not None:
            self._listener()

    def take(self) -> list[Event]:
        limit = self._engine.hold_at
        if limit is not None and self._n_taken >= limit:
            return []
        self._n_taken += 1
        return self._stream.take()

    def cancel(self) -> None:
        if not self._stream.finished:
            self._stream.cancel()
            self._engine.cancelled.set()


class FakeOpener:
    """Implements `host.Opener` with one engine for all of its models."""

    def __init__(self, engine: FakeEngine, names: Sequence[str], *, can_think: bool) -> None:
        self._engine = engine
        self._cards = [
            ModelCard(name, 600_000_000, 1_000_000_000, "Q4_0", "fake", 8192, can_think=can_think)
            for name in names
        ]

    def cards(self) -> list[ModelCard]:
        return list(self._cards)

    def find(self, name: str) -> ModelCard:
        for card in self._cards:
            if card.name == name:
                return card
        raise NotFoundError(f"there is no model {name}", hint=f"llmrun pull {name}")

    def judge(self, card: ModelCard, role: Role, room: Room) -> Judgment:
        return Judgment((1,))

    def open(
        self, card: ModelCard, role: Role, room: Room, on_progress: LoadProgress | None = None
    ) -> Opened:
        return Opened(
            card,
            role,
            self._engine.n_ctx,
            self._engine.close,
            engine=self._engine,  # type: ignore[arg-type]
            n_parallel=4,
        )

    def pull(self, name: str, on_progress: Callable[[float], None]) -> ModelCard:
        raise NotFoundError(f"there is no model {name}")


class ChatServer:
    """See the module. `host`, `state` and `engine` are the server's parts; `requests` are the
    paths that were asked for, with their methods."""

    def __init__(
        self,
        answers: Sequence[Script] = ("Hello!",),
        *,
        names: Sequence[str] = ("fake-1b",),
        api_keys: tuple[str, ...] = (),
        can_think: bool = False,
        n_ctx: int = 4096,
        port: int = 0,
    ) -> None:
        facts = fake_facts(THINKING_CHATML if can_think else CHATML)
        self.engine = HeldEngine(answers, facts=facts, n_ctx=n_ctx)
        self.state = ServerState()
        self.host = ModelHost(FakeOpener(self.engine, names, can_think=can_think), HostOptions())
        self._api_keys = api_keys
        self._socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ChatServer:
        started, host = threading.Event(), self.host
        service = Service(self.host, self.state, version="1.2.3")
        app = GuardMiddleware(
            build_app(service, ui=pages()),
            GuardOptions(api_keys=self._api_keys, open_paths=OPEN_PATHS),
            encode_error_for,
            self.state,
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await host.start()
                await super().startup(sockets)
                started.set()

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                await super().shutdown(sockets)
                await host.close()

        self._server = Server(
            uvicorn.Config(app, lifespan="off", ws="none", log_config=None, access_log=False)
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()
        assert started.wait(WAIT_S)
        self.state.become_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None and self._thread is not None
        self.engine.release()
        self._server.force_exit = True
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

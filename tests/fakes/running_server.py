"""The whole server in a thread: the real routes, guard, host of models and HTTP, over engines that
a test chooses.

    with fake_server({"m": lambda: FakeEngine(["Hello!"])}) as server:
        answer = server.ask("POST /v1/completions", {"model": "m", "prompt": "Hi"})

    with real_server(tmp_path, smollm2_path()) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llmrun.cli.serve_models import ServedModels
from llmrun.cli.services import Services
from llmrun.engine.embedder import Embedder
from llmrun.engine.types import EngineLike, LoadProgress
from llmrun.errors import LlmrunError, NotFoundError
from llmrun.hardware.machine import Cpu, Machine, Memory
from llmrun.server.app import build_app, encode_error_for
from llmrun.server.guard import GuardOptions
from llmrun.server.host import HostOptions, ModelHost
from llmrun.server.lifecycle import ServeOptions, ServerState, serve
from llmrun.server.limits import GuardMiddleware
from llmrun.server.opener import RAM, Judgment, Opened, Opener, Role, Room
from llmrun.server.service import Service
from llmrun.server.types import ModelCard
from tests.fakes.cli import GB, Cli, FakeServices
from tests.fakes.raw_http import PATIENCE_S, Answer, Client
from tests.fakes.served import invocation_of

VERSION = "1.2.3"
T = TypeVar("T")


class EngineOpener:
    """A `server.opener.Opener` of engines and embedders that functions make; memory is no matter.

    `models[name]` makes what answers for `name`: an engine for chat, or an Embedder. `gates[name]`:
    the load waits for it. What has been made is in `made`, by name.
    """

    def __init__(
        self, models: Mapping[str, Callable[[], Any]], *, n_parallel: int = 4, n_ctx: int = 4096
    ) -> None:
        self.models = dict(models)
        self.n_parallel = n_parallel
        self.n_ctx = n_ctx
        self.gates: dict[str, threading.Event] = {}
        self.loading = threading.Event()
        self.made: dict[str, Any] = {}

    def cards(self) -> list[ModelCard]:
        return [ModelCard(name, 1000, can_embed=True, can_rerank=True) for name in self.models]

    def find(self, name: str) -> ModelCard:
        for card in self.cards():
            if name.removesuffix(":latest") == card.name:
                return card
        raise NotFoundError("no such model", hint="llmrun pull it")

    def judge(self, card: ModelCard, role: Role, room: Room) -> Judgment:
        return Judgment((1,))

    def open(
        self, card: ModelCard, role: Role, room: Room, on_progress: LoadProgress | None = None
    ) -> Opened:
        self.loading.set()
        gate = self.gates.get(card.name)
        while gate is not None and not gate.wait(0.002):
            if on_progress is not None and not on_progress(0.5):
                raise LlmrunError("the load was stopped")
        made = self.made[card.name] = self.models[card.name]()
        is_embedder = isinstance(made, Embedder)
        return Opened(
            card,
            role,
            self.n_ctx,
            made.close,
            engine=None if is_embedder else made,
            embedder=made if is_embedder else None,
            n_parallel=self.n_parallel,
            uses={RAM: 1000},
        )

    def pull(self, name: str, on_progress: Callable[[float], None]) -> ModelCard:
        raise NotFoundError("nothing to pull from")


class RealServices(FakeServices):
    """Real engines, on a small machine that is always the same."""

    def machine(self) -> Machine:
        return Machine(Cpu(2, 2, 2), Memory(16 * GB, 16 * GB, bandwidth_bytes_s=5e10))

    def open_engine(self, *args: Any, **kwargs: Any) -> EngineLike:
        return Services.open_engine(self, *args, **kwargs)


class RunningServer:
    """A server that answers at `url`. `run` does something in its event loop."""

    def __init__(self, service: Service, state: ServerState, opener: Opener) -> None:
        self.service = service
        self.state = state
        self.opener = opener
        self.url = ""
        self.address = ("", 0)
        self.code: int | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._clients: list[Client] = []

    @property
    def host(self) -> ModelHost:
        return self.service.host

    def run(self, work: Callable[[], T]) -> T:
        """The result of `work()` in the server's event loop."""
        assert self.loop is not None

        async def call() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE_S)

    def until(self, condition: Callable[[], object], what: str = "it") -> None:
        """Wait for what the server does by itself; asked in its event loop."""
        give_up = time.monotonic() + PATIENCE_S
        while not self.run(condition):
            assert time.monotonic() < give_up, f"{what} never happened"
            time.sleep(0.002)

    def until_answered(self) -> None:
        """Until no request is being worked on; some of it is done after an answer's last byte."""
        self.until(lambda: not self.state.n_active, "the end of all requests")

    def until_idle(self) -> None:
        """Until nothing is being worked on: no request, and no sequence in any engine."""
        self.until(lambda: not self.state.n_active and not any(self.counts()), "the end of work")

    def counts(self) -> tuple[int, ...]:
        """What is taken: replies that run and wait in the engines, places and the queues in front
        of them. Of the event loop: by `run`."""
        opened = self.host.opened()
        counters = [each.engine.counters for each in opened if each.engine is not None]
        return (
            sum(each.n_running for each in counters),
            sum(each.n_waiting for each in counters),
            sum(each.admission.n_running for each in opened),
            sum(each.admission.n_waiting for each in opened),
        )

    def connect(self) -> Client:
        client = Client(self.address)
        self._clients.append(client)
        return client

    def ask(self, line: str, body: object = None, *headers: str) -> Answer:
        """One request on a connection of its own."""
        client = Client(self.address)
        try:
            data = b"" if body is None else json.dumps(body).encode()
            client.request(line, *headers, body=data)
            return client.read_answer()
        finally:
            client.close()

    def close_clients(self) -> None:
        for client in self._clients:
            client.close()


@contextlib.contextmanager
def running_server(
    opener: Opener,
    host_options: HostOptions | None = None,
    guard: GuardOptions | None = None,
    *,
    drain_s: float = 0.0,
) -> Iterator[RunningServer]:
    """The server over `opener` at a free port; ended and joined when the block is left."""
    state = ServerState()
    host = ModelHost(opener, host_options)
    server = RunningServer(Service(host, state, version=VERSION), state, opener)
    app = GuardMiddleware(
        build_app(server.service), guard or GuardOptions(), encode_error_for, state
    )
    ready: queue.Queue[str | BaseException] = queue.Queue()

    async def start() -> None:
        server.loop = asyncio.get_running_loop()
        await host.start()

    def run() -> None:
        try:
            server.code = serve(
                app,
                ServeOptions(port=0, drain_s=drain_s),
                state,
                on_start=start,
                on_ready=ready.put,
                on_stop=host.close,
            )
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    url = ready.get(timeout=PATIENCE_S * 4)  # real models are loaded before it is ready
    if isinstance(url, BaseException):
        thread.join()
        raise url
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    server.url, server.address = url, (parts.hostname, parts.port)
    try:
        yield server
    finally:
        state.ask_to_stop()
        server.close_clients()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the server does not end"


@contextlib.contextmanager
def fake_server(
    models: Mapping[str, Callable[[], Any]],
    *,
    guard: GuardOptions | None = None,
    n_parallel: int = 4,
    n_ctx: int = 4096,
    drain_s: float = 0.0,
    **host_options: Any,
) -> Iterator[RunningServer]:
    """A server of what these functions make, see `EngineOpener`, which is its `opener`."""
    opener = EngineOpener(models, n_parallel=n_parallel, n_ctx=n_ctx)
    with running_server(opener, HostOptions(**host_options), guard, drain_s=drain_s) as server:
        yield server


@contextlib.contextmanager
def real_server(
    folder: Path, *paths: Path, n_parallel: int = 4, pinned: bool = True, **settings: Any
) -> Iterator[RunningServer]:
    """A server of these files, each under its name without `.gguf`, all of them loaded if `pinned`.
    `folder` is for what the program writes; `settings` as on the command line."""
    cli = Cli(folder)
    environment = invocation_of(cli).environment
    services = RealServices(environment, cli.engine)
    options = {"speculative": "off", "ctx": 2048, **settings}
    invocation = invocation_of(cli, services, **options)
    opener = ServedModels(invocation, [str(path) for path in paths], n_parallel=n_parallel)
    names = opener.prepare()
    with running_server(opener, HostOptions(pinned=names if pinned else ())) as server:
        yield server

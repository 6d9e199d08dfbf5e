"""The whole program in one process: folders of its own, streams in memory, an engine of choice.

cli = Cli(tmp_path, engine=FakeEngine(["Hello!"]))
run = cli("run", cli.model(), "Hi")
assert (run.code, run.out) == (0, "Hello!\\n")
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrun.catalog.entries import Catalog
from llmrun.cli.app import main
from llmrun.cli.services import Services
from llmrun.config import Environment
from llmrun.engine.types import EngineLike, EngineOptions, LoadProgress
from llmrun.fit.types import Allocator, Measurement, Setup
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.engine_devices import EngineReport
from llmrun.hardware.machine import Cpu, Device, Machine, Memory
from llmrun.hardware.problem import Problem
from llmrun.hub.client import Hub
from tests.fakes.fake_engine import CHATML, FakeEngine
from tests.fakes.gguf_builder import tiny_llama_builder

GB = 10**9
COMMIT = "c0ffee" + "0" * 34


class Tty(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    @property
    def envelope(self) -> dict[str, Any]:
        """The last line of stdout as JSON."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def data(self) -> Any:
        return self.envelope["data"]


class SilentAllocator:
    """Implements `fit.types.Allocator` without an answer, so that the closed form counts."""

    devices = ()
    problem = "this one is a fake"

    def measure(self, setups: Sequence[Setup]) -> tuple[Measurement | None, ...]:
        return (None,) * len(setups)


class FakeServices(Services):
    """A machine with `memory` bytes free (a function: asked each time) and `devices`, and the
    engines that `engine` gives. `n_looks` counts how often the machine was looked at, `judged`
    holds the first file's name for each allocator that was made."""

    def __init__(
        self,
        environment: Environment,
        engine: EngineLike | Callable[[], EngineLike],
        memory: int | Callable[[], int] = 16 * GB,
        catalog: Catalog | None = None,
        devices: tuple[Device, ...] = (),
        hub: Hub | None = None,
        allocator: Allocator | None = None,
    ) -> None:
        super().__init__(environment)
        self._engine = engine
        self._memory = memory
        self._catalog = catalog
        self._devices = devices
        self._hub = hub
        self._allocator = allocator or SilentAllocator()
        self.opened: list[tuple[tuple[Path, ...], EngineOptions]] = []
        self.judged: list[str] = []
        self.n_looks = 0

    def machine(self) -> Machine:
        self.n_looks += 1
        free = self._memory() if callable(self._memory) else self._memory
        # With a bandwidth, nothing needs to be measured.
        return Machine(Cpu(8, 8, 4), Memory(free, free, bandwidth_bytes_s=5e10), self._devices)

    def find_problems(self, machine: Machine, engine: EngineReport) -> tuple[Problem, ...]:
        return ()

    def describe_engine(self) -> EngineReport:
        return EngineReport((), ("AVX2",), ("CPU",), "fake 1")

    def allocator_of_headers(
        self,
        headers: Sequence[tuple[str, bytes, int]],
        info: ModelInfo | None,
        machine: Machine,
    ) -> Allocator:
        self.judged.append(headers[0][0])
        return self._allocator

    def allocator_of_files(
        self, paths: Sequence[Path], info: ModelInfo, machine: Machine
    ) -> Allocator:
        self.judged.append(paths[0].name)
        return self._allocator

    def hub(self, *, offline: bool) -> Hub:
        return self._hub if self._hub is not None else super().hub(offline=offline)

    def catalog(self) -> Catalog:
        return self._catalog if self._catalog is not None else super().catalog()

    def open_engine(
        self,
        paths: Sequence[Path],
        options: EngineOptions,
        info: ModelInfo,
        on_progress: LoadProgress | None = None,
    ) -> EngineLike:
        self.opened.append((tuple(paths), options))
        if not isinstance(self._engine, FakeEngine):
            return self._engine()
        self._engine.closed = False
        return self._engine

    def now(self) -> float:
        return 2_000_000_000.0


class Cli:
    """Calls the program. `environ` is all of its environment; `HF_HUB_CACHE` lies in `folder`."""

    def __init__(
        self,
        folder: Path,
        engine: EngineLike | Callable[[], EngineLike] | None = None,
        *,
        memory: int | Callable[[], int] = 16 * GB,
        catalog: Catalog | None = None,
        devices: tuple[Device, ...] = (),
        hub: Hub | None = None,
        services: type[FakeServices] = FakeServices,
        allocator: Allocator | None = None,
    ) -> None:
        """`services`: a subclass with other methods. For the rest see FakeServices."""
        self.folder = folder
        self.engine = engine or FakeEngine()
        self.memory = memory
        self.catalog = catalog
        self.devices = devices
        self.hub = hub
        self.services_class = services
        self.allocator = allocator
        self.hub_cache = folder / "hub"
        self.environ = {"HF_HUB_CACHE": str(self.hub_cache), "COLUMNS": "100", "TERM": "xterm"}
        self.services: FakeServices | None = None

    def __call__(
        self,
        *arguments: str,
        stdin: str | io.TextIOBase = "",
        tty: bool = False,
        stdin_tty: bool | None = None,
        stdout: io.TextIOBase | None = None,
    ) -> Run:
        """`tty`: all streams are terminals, or all but stdin."""
        stream = Tty if tty else io.StringIO
        in_class = Tty if (tty if stdin_tty is None else stdin_tty) else io.StringIO
        out = stdout or stream()
        err = stream()
        environment = Environment(
            in_class(stdin) if isinstance(stdin, str) else stdin,
            out,
            err,
            self.environ,
            self.folder / "config",
            self.folder / "state",
            self.folder / "data",
            self.folder / "cache",
        )
        self.services = self.services_class(
            environment,
            self.engine,
            self.memory,
            self.catalog,
            self.devices,
            self.hub,
            self.allocator,
        )
        code = main(arguments, environment, self.services)
        return Run(code, out.getvalue() if hasattr(out, "getvalue") else "", err.getvalue())

    def write_config(self, text: str) -> Path:
        path = self.folder / "config" / "config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def model(self, name: str = "tiny-Q8_0.gguf", **builder: Any) -> str:
        """A local model file; its path."""
        path = self.folder / name
        path.write_bytes(model_bytes(**builder))
        return str(path)

    def store_model(
        self, repo: str = "org/tiny-GGUF", name: str = "tiny-Q8_0.gguf", **builder: Any
    ) -> Path:
        """A model in the shared hub cache; the path of its snapshot link."""
        content = model_bytes(**builder)
        root = self.hub_cache / ("models--" + repo.replace("/", "--"))
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        link = root / "snapshots" / COMMIT / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(COMMIT)
        blob.write_bytes(content)
        link.symlink_to(Path("../../blobs") / blob.name)
        return link

    def store_partial(self, repo: str = "org/half-GGUF", n_bytes: int = 5000) -> Path:
        """What another tool's interrupted download leaves behind."""
        root = self.hub_cache / ("models--" + repo.replace("/", "--"))
        path = root / "blobs" / f"{'ab' * 32}.1234abcd.incomplete"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * n_bytes)
        return path


def model_bytes(**builder: Any) -> bytes:
    builder.setdefault("chat_template", CHATML)
    builder.setdefault("file_type", 7)
    return tiny_llama_builder(**builder).build()

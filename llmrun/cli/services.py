"""What the commands work with, made on first use so that `--help` imports none of it.

Tests pass a subclass to `cli.app.main` that overrides one of the methods.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.config import Environment

if TYPE_CHECKING:
    from llmrun.catalog.entries import Catalog
    from llmrun.engine.embed_shape import EmbedOptions
    from llmrun.engine.embedder import Embedder
    from llmrun.engine.types import EngineLike, EngineOptions, LoadProgress
    from llmrun.fit.types import Allocator
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.advice import Problem
    from llmrun.hardware.engine_devices import EngineReport
    from llmrun.hardware.machine import Machine
    from llmrun.hub.client import Hub
    from llmrun.hub.store import Store


class Services:
    """The hub, the store, the catalog, the machine and the engine of one run of the program."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self._hubs: dict[bool, Hub] = {}

    @property
    def hub_cache(self) -> Path:
        """The folder that all tools of the hub share."""
        from llmrun.hub import layout

        return layout.cache_dir(self.environment.environ)

    def hub(self, *, offline: bool) -> Hub:
        if offline not in self._hubs:
            from llmrun.hub.client import Hub

            self._hubs[offline] = Hub(offline=offline, cache=self.hub_cache)
        return self._hubs[offline]

    def store(self) -> Store:
        from llmrun.hub.store import Store

        return Store(self.hub_cache, self.environment.data_dir, self.environment.state_dir)

    def catalog(self) -> Catalog:
        from llmrun.catalog.load import load_catalog

        return load_catalog()

    def machine(self) -> Machine:
        """What there is and what is free now, the GPUs that the engine can use included."""
        from llmrun.hardware.probe import detect_machine

        return detect_machine(devices=True)

    def find_problems(self, machine: Machine, engine: EngineReport) -> tuple[Problem, ...]:
        """What keeps the hardware from being used, and what mends it. Starts drivers' programs."""
        from llmrun.hardware.advice import find_problems

        return find_problems(machine, engine=engine)

    def describe_engine(self) -> EngineReport:
        """What the engine's library says of itself. Starts a process; never raises."""
        from llmrun.hardware.engine_devices import ask_engine
        from llmrun.hardware.probe import Probe

        return ask_engine(Probe(), always=True)

    def allocator_of_headers(
        self,
        headers: Sequence[tuple[str, bytes, int]],
        info: ModelInfo | None,
        machine: Machine,
    ) -> Allocator:
        """llama.cpp's allocator for files of which only the headers are here: (name, first bytes,
        size) of each. No process is started before it is asked. Without `info` no answer is kept.
        """
        from llmrun.fit.exact import ChildAllocator

        return ChildAllocator.of_headers(
            headers, info=info, cache=self.answers_dir, device_key=_describe_devices(machine)
        )

    def allocator_of_files(
        self, paths: Sequence[Path], info: ModelInfo, machine: Machine
    ) -> Allocator:
        """The same for files that are here."""
        from llmrun.fit.exact import ChildAllocator

        return ChildAllocator(
            paths, info=info, cache=self.answers_dir, device_key=_describe_devices(machine)
        )

    @property
    def answers_dir(self) -> Path:
        """Where the allocator's answers are kept."""
        return self.environment.cache_dir / "allocations"

    def open_engine(
        self,
        paths: Sequence[Path],
        options: EngineOptions,
        info: ModelInfo,
        on_progress: LoadProgress | None = None,
    ) -> EngineLike:
        """Load a model whose header is `info`. Raises EngineError, WillNotFitError."""
        from llmrun.engine.loop import Engine

        return Engine.open(paths, options, info=info, on_progress=on_progress)

    def open_embedder(
        self,
        paths: Sequence[Path],
        options: EmbedOptions,
        info: ModelInfo,
        on_progress: LoadProgress | None = None,
    ) -> Embedder:
        """Load a model for vectors or scores. Raises as `open_engine` does, and UsageError."""
        from llmrun.engine.embedder import Embedder

        return Embedder.open(paths, options, info=info, on_progress=on_progress)

    def grammar_of_schema(self, schema_text: str) -> str:
        """GBNF of a JSON schema. Raises UsageError."""
        from llmrun.chat.schema_grammar import schema_grammar

        return schema_grammar(schema_text)

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def known_names(self) -> list[str]:
        """Names for shell completion: stored models, then the catalog."""
        stored = [model.reference for model in self.store().models() if model.state == "complete"]
        return [*dict.fromkeys([*stored, *self.catalog().all_names()])]

    def close(self) -> None:
        """End of the run."""


def _describe_devices(machine: Machine) -> str:
    """Words that name the GPUs that are there; with others the allocator's answers are others."""
    return ",".join(f"{d.name}={d.description}/{d.total_bytes}" for d in machine.devices)

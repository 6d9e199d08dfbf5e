"""What the wrappers of an engine have in common."""

from __future__ import annotations

from collections.abc import Sequence

from llmrun.engine.types import (
    EngineCounters,
    EngineLike,
    ModelFacts,
    Request,
    SavedPrefix,
    StreamLike,
    Tokenizer,
)


class WrappedEngine:
    """Passes everything on to `engine`. See `engine.types.EngineLike`."""

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine

    @property
    def facts(self) -> ModelFacts:
        return self._engine.facts

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def n_ctx(self) -> int:
        return self._engine.n_ctx

    @property
    def load_s(self) -> float:
        return self._engine.load_s

    @property
    def counters(self) -> EngineCounters:
        return self._engine.counters

    @property
    def state_key(self) -> str:
        return self._engine.state_key

    def submit(self, request: Request) -> StreamLike:
        return self._engine.submit(request)

    def save_prefix(self, tokens: Sequence[int], max_bytes: int) -> SavedPrefix | None:
        return self._engine.save_prefix(tokens, max_bytes)

    def restore_prefix(self, saved: SavedPrefix) -> int:
        return self._engine.restore_prefix(saved)

    def close(self) -> None:
        self._engine.close()

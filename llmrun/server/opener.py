"""What the host of the models needs of whoever knows how to find, plan, load and download them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from llmrun.engine.types import EngineLike, LoadProgress, SamplingParams
from llmrun.errors import WillNotFitError
from llmrun.server.admission import Admission
from llmrun.server.types import ModelCard

if TYPE_CHECKING:
    from llmrun.engine.embedder import Embedder

Role = Literal["chat", "embed", "rank"]
"""What a model is loaded for; each is a load of its own."""

RAM = "RAM"
"""The name of the machine's memory among the devices."""


@dataclass(frozen=True, slots=True)
class Room:
    """How the free memory that the machine reports is to be read.

    `unseen_bytes` of the RAM count as free there but are in use: mapped weights of loaded models,
    which the system takes for a cache, and scratch memory that no step has touched yet. `freed`:
    bytes by device (RAM or the engine's name of a GPU) to count as free although they are not yet.
    """

    unseen_bytes: int = 0
    freed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judgment:
    """How well a model would run in some room. A `quality` that is greater is better: it runs (its
    first number is not 0), with a context of some use, where it belongs; more memory than that
    does not make it greater. `error` says why it does not run."""

    quality: tuple[int, ...]
    error: WillNotFitError | None = None

    @property
    def runs(self) -> bool:
        return self.error is None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Opened:
    """A loaded model, equal to itself only. By its role either `engine` or `embedder` is there.

    `n_parallel` requests can be worked on at once. `n_ctx` is the most tokens that one of them can
    have, prompt and answer together. With `kv_unified` all share the engine's cache, which may be
    larger; else each has one of its own.
    `sampling` is what the model's makers and the server's user want where a request says nothing.
    `max_tokens` bounds the answers to requests that set no bound, `stop` ends all answers.
    `uses` is the plan's memory by device, `unseen_bytes` what of the RAM among it the system
    reports as free all the same. `plan_line` is the plan in one line for people. `admission` is
    the host's: its places are the `n_parallel`; so is `token_admission`, for what needs the
    vocabulary only.
    """

    card: ModelCard
    role: Role
    n_ctx: int
    close: Callable[[], None]
    engine: EngineLike | None = None
    embedder: Embedder | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n_parallel: int = 1
    kv_unified: bool = True
    uses: Mapping[str, int] = field(default_factory=dict)
    unseen_bytes: int = 0
    load_s: float = 0.0
    plan_line: str = ""
    admission: Admission = field(default_factory=lambda: Admission(1, 0))
    token_admission: Admission = field(default_factory=lambda: Admission(1, 0))

    @property
    def memory_bytes(self) -> int:
        """RAM and GPUs together."""
        return sum(self.uses.values())

    @property
    def gpu_bytes(self) -> int:
        return sum(n_bytes for device, n_bytes in self.uses.items() if device != RAM)


class Opener(Protocol):
    """All methods block, and are called from threads, two of them at once now and then."""

    def cards(self) -> list[ModelCard]:
        """The models that can be asked for now."""

    def find(self, name: str) -> ModelCard:
        """The model that a request calls `name`. Never a file outside of what is served.

        Raises NotFoundError, whose hint is the command that gets the model where one would."""

    def judge(self, card: ModelCard, role: Role, room: Room) -> Judgment:
        """How well the model would run. Loads nothing. Raises the errors of `open` but for
        memory's."""

    def open(
        self, card: ModelCard, role: Role, room: Room, on_progress: LoadProgress | None = None
    ) -> Opened:
        """Load a model that is here. Raises LlmrunErrors: WillNotFitError, UsageError for a role
        that the model does not have, and those of broken files and of the engine."""

    def pull(self, name: str, on_progress: Callable[[float], None]) -> ModelCard:
        """Download what `name` means in the catalog or on the hub; `on_progress` is told the share
        that is here, from other threads. Raises LlmrunErrors."""

"""What the parts of the embedder pass to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmrun.engine.embed_shape import Pooling
from llmrun.engine.types import ModelFacts, Tokenizer


@dataclass(frozen=True, slots=True)
class EmbedFacts(ModelFacts):
    """`ModelFacts`, and what belongs to vectors and scores.

    `n_out` is the length of a vector; with rank pooling the number of scores, each with its name in
    `labels` (empty: unnamed). `rank_template` is the file's text around `{query}` and `{document}`.
    `bos`, `eos` and `sep` are the tokens that the vocabulary wants around and between two texts;
    None where it wants none. `has_probabilities`: the scores are between 0 and 1 and sum to 1.
    """

    n_out: int = 0
    labels: tuple[str, ...] = ()
    rank_template: str | None = None
    bos: int | None = None
    eos: int | None = None
    sep: int | None = None
    has_probabilities: bool = False


class EmbedBackend(Protocol):
    """A loaded model with an embedding context. All calls but `request_abort` and the tokenizer's
    come from one thread."""

    @property
    def facts(self) -> EmbedFacts: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def pooling(self) -> Pooling: ...

    @property
    def n_ctx(self) -> int:
        """Most tokens in one input."""

    @property
    def n_pack(self) -> int:
        """Most tokens in a batch of several inputs."""

    @property
    def n_seq_max(self) -> int:
        """Most inputs in one batch."""

    @property
    def n_threads(self) -> int: ...

    def compute(self, inputs: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """One row of `facts.n_out` values for each input, computed together. None: stopped by
        `request_abort`. Raises EngineError; the next call starts from nothing again."""

    def set_threads(self, n_threads: int) -> None: ...

    def request_abort(self) -> None:
        """Make this and all later `compute` calls return None soon. Any thread."""

    def close(self) -> None: ...

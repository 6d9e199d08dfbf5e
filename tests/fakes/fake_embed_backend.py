"""An embedding backend that computes nothing: a text's row follows from its tokens alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmrun.engine.embed_shape import Pooling
from llmrun.engine.embed_types import EmbedFacts
from llmrun.errors import EngineError
from tests.fakes.fake_tokenizer import FakeTokenizer

N_VOCAB = 1000


def ideal_row(tokens: Sequence[int]) -> list[float]:
    return [float(sum(tokens)), float(len(tokens)), float(tokens[-1])]


@dataclass
class FakeEmbedBackend:
    """Every batch is written down in `batches`. With `gate` each waits to be let through; `began`
    is set when one has come so far. Inputs with the token `poison` fail."""

    pooling: Pooling = "mean"
    n_ctx: int = 64
    n_pack: int = 32
    n_seq_max: int = 8
    n_threads: int = 2
    labels: tuple[str, ...] = ()
    gate: threading.Semaphore | None = None
    poison: int | None = None
    before: Callable[[], None] | None = None
    batches: list[list[tuple[int, ...]]] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.began = threading.Event()
        self.aborted = threading.Event()
        self.thread_counts: list[int] = []
        self.tokenizer = FakeTokenizer()
        self.facts = EmbedFacts(
            description="fake",
            n_params=1,
            n_bytes=1,
            n_ctx_train=self.n_ctx,
            n_embd=3,
            n_layers=1,
            n_vocab=N_VOCAB,
            n_swa=0,
            is_recurrent=False,
            is_hybrid=False,
            chat_template=None,
            bos_text="",
            eos_text="",
            n_out=3,
            labels=self.labels,
        )

    def compute(self, inputs: Sequence[Sequence[int]]) -> list[list[float]] | None:
        assert not self.is_closed
        assert 1 <= len(inputs) <= self.n_seq_max
        assert len(inputs) == 1 or sum(map(len, inputs)) <= self.n_pack
        self.batches.append([tuple(tokens) for tokens in inputs])
        self.threads.append(threading.current_thread().name)
        if self.before is not None:
            self.before()
        self.began.set()
        if self.gate is not None:
            for _ in range(2000):
                if self.gate.acquire(timeout=0.01):
                    break
                if self.aborted.is_set():
                    return None
            else:
                raise AssertionError("nobody let the batch through or stopped it")
        if self.aborted.is_set():
            return None
        if any(self.poison in tokens for tokens in inputs):
            raise EngineError("poisoned")
        return [ideal_row(tokens) for tokens in inputs]

    def set_threads(self, n_threads: int) -> None:
        self.thread_counts.append(n_threads)

    def request_abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True

"""llama.cpp's vectors in the plainest way: one text, one sequence, one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmrun.engine.binding import import_binding

POOLING = {"mean": 1, "cls": 2, "last": 3, "rank": 4}


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    norm = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm


class PlainEmbeddings:
    def __init__(self, path: Path, pooling: str, *, n_ctx: int = 1024, n_threads: int = 1) -> None:
        self.C: Any = import_binding()
        C = self.C
        C.llama_backend_init()
        self.model = C.llama_model_load_from_file(
            str(path).encode(), C.llama_model_default_params()
        )
        assert self.model
        params = C.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = 0
        params.embeddings = True
        params.pooling_type = POOLING[pooling]
        self.ctx = C.llama_init_from_model(self.model, params)
        assert self.ctx
        n_out = C.llama_model_n_cls_out if pooling == "rank" else C.llama_model_n_embd_out
        self.n_out = n_out(self.model)
        self._batch = C.llama_batch_init(n_ctx, 0, 1)

    def embed(self, tokens: Sequence[int]) -> list[float]:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
        memory = self.C.llama_get_memory(self.ctx)
        if memory:
            self.C.llama_memory_clear(memory, True)
        assert self.C.llama_decode(self.ctx, batch) == 0
        row: list[float] = self.C.llama_get_embeddings_seq(self.ctx, 0)[: self.n_out]
        return row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.C.llama_batch_free(self._batch)
        self.C.llama_free(self.ctx)
        self.C.llama_model_free(self.model)

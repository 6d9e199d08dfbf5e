"""llama.cpp driven in the plainest way, with nothing of the engine but the import.

The oracle for real models: what a prompt gives when its chunks are decoded one after the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmrun.engine.binding import import_binding


class PlainContext:
    """One model, one context of the same shape as the engine's with one sequence."""

    def __init__(self, path: Path, *, n_ctx: int, n_ubatch: int = 512, n_threads: int = 2) -> None:
        self.C: Any = import_binding()
        C = self.C
        C.llama_backend_init()
        self.model = C.llama_model_load_from_file(
            str(path).encode(), C.llama_model_default_params()
        )
        assert self.model
        params = C.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_ubatch
        params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.swa_full = False
        params.kv_unified = True
        self.ctx = C.llama_init_from_model(self.model, params)
        assert self.ctx
        self.vocab = C.llama_model_get_vocab(self.model)
        self.n_vocab = C.llama_vocab_n_tokens(self.vocab)
        self._batch = C.llama_batch_init(n_ubatch, 0, 1)
        self.pos = 0

    def decode(self, tokens: Sequence[int]) -> None:
        """One chunk, logits for its last token."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.pos + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(tokens) - 1
        assert self.C.llama_decode(self.ctx, batch) == 0
        self.pos += len(tokens)

    def read(self, tokens: Sequence[int], n_chunk: int = 512) -> None:
        for start in range(0, len(tokens), n_chunk):
            self.decode(tokens[start : start + n_chunk])

    def cut(self, n_keep: int) -> None:
        memory = self.C.llama_get_memory(self.ctx)
        assert self.C.llama_memory_seq_rm(memory, 0, n_keep or -1, -1)
        self.pos = n_keep

    def logits(self) -> Any:
        import numpy as np

        pointer = self.C.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,))

    def greedy(self, n_tokens: int) -> list[int]:
        """The next tokens, the most probable each time. The last one is not decoded."""
        tokens: list[int] = []
        while len(tokens) < n_tokens:
            if tokens:
                self.decode(tokens[-1:])
            token = int(self.logits().argmax())
            if self.C.llama_vocab_is_eog(self.vocab, token):
                break
            tokens.append(token)
        return tokens

    def greedy_under_grammar(self, gbnf: str, n_tokens: int) -> list[int]:
        """As `greedy`, but the grammar is applied to the whole vocabulary first."""
        C = self.C
        grammar = C.llama_sampler_init_grammar(self.vocab, gbnf.encode(), b"root")
        data = (C.llama_token_data * self.n_vocab)()
        tokens: list[int] = []
        while len(tokens) < n_tokens:
            if tokens:
                self.decode(tokens[-1:])
            logits = self.logits()
            for i in range(self.n_vocab):
                data[i].id, data[i].logit, data[i].p = i, logits[i], 0.0
            array = C.llama_token_data_array(data, self.n_vocab, -1, False)
            C.llama_sampler_apply(grammar, ctypes.byref(array))
            token = max(range(self.n_vocab), key=lambda i: data[i].logit)
            if C.llama_vocab_is_eog(self.vocab, token):
                break
            C.llama_sampler_accept(grammar, token)
            tokens.append(token)
        C.llama_sampler_free(grammar)
        return tokens

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

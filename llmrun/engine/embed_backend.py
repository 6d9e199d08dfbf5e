"""The embedder's backend: llama.cpp with an embedding context, through the low-level binding.

The library aborts the process on many wrong batches, so all that goes into one is checked here.
"""

from __future__ import annotations

import array
import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrun.engine.binding import last_reason, load_library
from llmrun.engine.embed_shape import (
    POOLING_IDS,
    EmbedOptions,
    EmbedShape,
    engine_options,
    shape_context,
)
from llmrun.engine.embed_types import EmbedFacts
from llmrun.engine.model_file import load_model, new_context, read_facts
from llmrun.engine.params import check_options, fill_context_params
from llmrun.engine.types import LoadProgress
from llmrun.engine.vocabulary import LlamaTokenizer
from llmrun.errors import EngineError, UsageError

if TYPE_CHECKING:
    from llmrun.gguf.types import ModelInfo

# Their graphs end in a softmax over the classes (build_pooling of llama.cpp's src/llama-graph.cpp).
_SOFTMAX_ARCHITECTURES = frozenset({"qwen3", "qwen3vl"})


class LlamaEmbedBackend:
    """See `engine.embed_types.EmbedBackend`. Create with `open_embed_backend`; `close` frees
    context, then model."""

    def __init__(
        self, C: Any, model: Any, info: ModelInfo, options: EmbedOptions, shape: EmbedShape
    ) -> None:
        """Takes ownership of `model`. Raises WillNotFitError when the context gets no memory."""
        self._C = C
        self._model = model
        self._ctx = None
        self._vocab = C.llama_model_get_vocab(model)
        self.tokenizer = LlamaTokenizer(C, self._vocab)
        self.pooling = shape.pooling
        self.facts = _read_embed_facts(C, model, self.tokenizer, info, shape)
        self._ctx = _create_context(C, model, options, shape)
        self._memory = C.llama_get_memory(self._ctx)
        self._n_batch = min(C.llama_n_batch(self._ctx), C.llama_n_ubatch(self._ctx))
        if self._memory:
            self._n_batch = min(self._n_batch, C.llama_n_ctx_seq(self._ctx))
        has_encoder = C.llama_model_has_encoder(model)
        self._is_whole = shape.is_whole or has_encoder or not self._memory
        self._run = C.llama_encode if has_encoder else C.llama_decode
        self.n_ctx = min(shape.n_ctx, self._n_batch) if self._is_whole else shape.n_ctx
        self.n_pack = min(shape.n_pack, self._n_batch)
        self.n_seq_max = min(shape.n_seq_max, C.llama_n_seq_max(self._ctx))
        self.n_threads: int = C.llama_n_threads_batch(self._ctx)
        self._rows = _Rows(C, self._n_batch)
        self._install_abort_flag()

    def compute(self, inputs: Sequence[Sequence[int]]) -> list[list[float]] | None:
        self._check(inputs)
        try:
            if len(inputs) == 1:
                return self._compute_long(inputs[0])
            if not self._decode([(tokens, 0) for tokens in inputs]):
                return None
            return [self._read(seq_id) for seq_id in range(len(inputs))]
        finally:
            if self._memory:
                self._C.llama_memory_clear(self._memory, False)

    def set_threads(self, n_threads: int) -> None:
        self._C.llama_set_n_threads(self._ctx, n_threads, n_threads)

    def request_abort(self) -> None:
        self._abort_flag[0] = b"\x01"

    def close(self) -> None:
        if self._ctx is not None:
            self._C.llama_free(self._ctx)
            self._ctx = None
        if self._model is not None:
            self._C.llama_model_free(self._model)
            self._model = None

    def _compute_long(self, tokens: Sequence[int]) -> list[list[float]] | None:
        """An input in as many batches as it needs. A row looks only at those before it, so the
        pieces' rows are those of the whole, and its mean is that of the pieces' means."""
        total: list[float] = []
        for start in range(0, len(tokens), self._n_batch):
            piece = tokens[start : start + self._n_batch]
            if not self._decode([(piece, start)]):
                return None
            row = self._read(0)
            if self.pooling == "cls":
                return [row]
            if self.pooling == "mean" and len(piece) < len(tokens):
                part = len(piece) / len(tokens)
                before = total or [0.0] * len(row)
                row = [sum_ + part * value for sum_, value in zip(before, row, strict=True)]
            total = row
        return [total]

    def _decode(self, parts: Sequence[tuple[Sequence[int], int]]) -> bool:
        """Compute one batch: tokens and first position of each sequence. False: aborted."""
        self._rows.fill(parts)
        code = self._run(self._ctx, self._rows.batch)
        if code == 0:
            return True
        if code == 2:
            return False
        raise EngineError(f"llama.cpp could not compute a batch (code {code})", why=last_reason())

    def _read(self, seq_id: int) -> list[float]:
        pointer = self._C.llama_get_embeddings_seq(self._ctx, seq_id)
        if not pointer:
            raise EngineError("the model gives no vectors", why=last_reason())
        row: list[float] = pointer[: self.facts.n_out]
        if not math.isfinite(sum(row)):
            raise EngineError(
                "the model's vector is not made of numbers",
                why="a computation overflowed, or the file is damaged",
            )
        return row

    def _check(self, inputs: Sequence[Sequence[int]]) -> None:
        n_tokens = sum(len(tokens) for tokens in inputs)
        n_most = self.n_ctx if len(inputs) == 1 else self._n_batch
        if not 1 <= len(inputs) <= self.n_seq_max or n_tokens > n_most:
            raise EngineError(
                f"{len(inputs)} inputs of {n_tokens} tokens break the context's limits of "
                f"{self.n_seq_max} and {n_most}"
            )
        for tokens in inputs:
            if not tokens or min(tokens) < 0 or max(tokens) >= self.facts.n_vocab:
                raise EngineError("an input is empty or has tokens outside the vocabulary")

    def _install_abort_flag(self) -> None:
        # See `llama.LlamaBackend`: a callback that takes no Python, for back ends that ask.
        libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        self._abort_flag = ctypes.create_string_buffer(2)
        self._abort_callback = ctypes.cast(libc.strlen, self._C.ggml_abort_callback)
        self._C.llama_set_abort_callback(
            self._ctx, self._abort_callback, ctypes.cast(self._abort_flag, ctypes.c_void_p)
        )


class _Rows:
    """The arrays of one llama_batch, all of whose rows are outputs."""

    def __init__(self, C: Any, capacity: int) -> None:
        self._token = (ctypes.c_int32 * capacity)()
        self._pos = (ctypes.c_int32 * capacity)()
        self._seq = (ctypes.c_int32 * capacity)()
        self._logits = (ctypes.c_int8 * capacity)(*([1] * capacity))
        self._n_seq = (ctypes.c_int32 * capacity)(*([1] * capacity))
        int_pointer = ctypes.POINTER(ctypes.c_int32)
        start = ctypes.addressof(self._seq)
        self._seq_pointers = (int_pointer * capacity)(
            *(ctypes.cast(start + 4 * row, int_pointer) for row in range(capacity))
        )
        self.batch = C.llama_batch(
            0, self._token, None, self._pos, self._n_seq, self._seq_pointers, self._logits
        )

    def fill(self, parts: Sequence[tuple[Sequence[int], int]]) -> None:
        """Sequences 0, 1, …: their tokens, and the position of the first. They must fit."""
        tokens, positions, seq_ids = array.array("i"), array.array("i"), array.array("i")
        for seq_id, (part, first) in enumerate(parts):
            tokens.extend(part)
            positions.extend(range(first, first + len(part)))
            seq_ids.extend([seq_id] * len(part))
        for target, values in ((self._token, tokens), (self._pos, positions), (self._seq, seq_ids)):
            address, n = values.buffer_info()
            ctypes.memmove(target, address, 4 * n)
        self.batch.n_tokens = len(tokens)


def open_embed_backend(
    path: Path,
    info: ModelInfo,
    options: EmbedOptions,
    *,
    on_progress: LoadProgress | None = None,
) -> LlamaEmbedBackend:
    """Load `path` (the first shard of a split model), whose header is `info`, and create an
    embedding context. Raises as `load_model` does, and UsageError for a model that has no
    vectors of the kind asked for."""
    shape = shape_context(info, options)
    settings = engine_options(options, shape)
    check_options(settings)
    C = load_library()
    model = load_model(C, path, settings, on_progress)
    try:
        if C.llama_model_has_encoder(model) and C.llama_model_has_decoder(model):
            raise UsageError(
                f"{path.name} gives no vectors",
                why="it is a translator: an encoder with a decoder behind it",
            )
        return LlamaEmbedBackend(C, model, info, options, shape)
    except BaseException:
        C.llama_model_free(model)
        raise


def _create_context(C: Any, model: Any, options: EmbedOptions, shape: EmbedShape) -> Any:
    settings = engine_options(options, shape)
    params = fill_context_params(C, settings, n_outputs_max=shape.n_ubatch)
    params.embeddings = True
    params.pooling_type = POOLING_IDS[shape.pooling]
    return new_context(C, model, params, f"inputs of {shape.n_ctx} tokens", shape.n_ctx, 128)


def _read_embed_facts(
    C: Any, model: Any, tokenizer: LlamaTokenizer, info: ModelInfo, shape: EmbedShape
) -> EmbedFacts:
    facts = read_facts(C, model, tokenizer)
    vocab = C.llama_model_get_vocab(model)
    template = C.llama_model_chat_template(model, b"rerank")
    eos = C.llama_vocab_eos(vocab)
    sep = C.llama_vocab_sep(vocab)
    if eos < 0:
        eos = sep

    def wanted(token: int, is_wanted: bool) -> int | None:
        return token if is_wanted and 0 <= token < tokenizer.n_vocab else None

    is_rank = shape.pooling == "rank"
    n_out = C.llama_model_n_cls_out(model) if is_rank else C.llama_model_n_embd_out(model)
    return EmbedFacts(
        **{field.name: getattr(facts, field.name) for field in fields(facts)},
        n_out=n_out,
        labels=tuple(_read_labels(C, model)) if is_rank else (),
        rank_template=template.decode("utf-8", "replace") if template else None,
        bos=wanted(C.llama_vocab_bos(vocab), C.llama_vocab_get_add_bos(vocab)),
        eos=wanted(eos, C.llama_vocab_get_add_eos(vocab)),
        sep=wanted(sep, C.llama_vocab_get_add_sep(vocab)),
        has_probabilities=is_rank and info.architecture in _SOFTMAX_ARCHITECTURES,
    )


def _read_labels(C: Any, model: Any) -> Iterator[str]:
    for i in range(C.llama_model_n_cls_out(model)):
        label = C.llama_model_cls_label(model, i)
        if label is None:
            return
        yield label.decode("utf-8", "replace")

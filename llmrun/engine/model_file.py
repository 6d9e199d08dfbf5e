"""A model's file and contexts of it, made by llama.cpp, and what the file says of itself."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from llmrun.engine.binding import forget_log, last_reason
from llmrun.engine.params import fill_model_params
from llmrun.engine.types import EngineOptions, LoadProgress, ModelFacts
from llmrun.engine.vocabulary import LlamaTokenizer
from llmrun.errors import EngineError, WillNotFitError


def load_model(C: Any, path: Path, options: EngineOptions, on_progress: LoadProgress | None) -> Any:
    """The model in `path` (the first shard of a split one), to be freed by the caller.

    The file's header must have passed `llmrun.gguf` before. Raises EngineError when llama.cpp
    refuses the file, WillNotFitError when memory is short, KeyboardInterrupt when the user stops
    the load.
    """
    params, keep = fill_model_params(C, options)
    watch = _LoadWatch(on_progress)
    params.progress_callback = callback = C.llama_progress_callback(watch.update)
    forget_log()
    model = C.llama_model_load_from_file(os.fsencode(path), params)
    del callback, keep
    if watch.stopped_by is not None:
        if model:
            C.llama_model_free(model)
        raise watch.stopped_by
    if not model:
        why = last_reason()
        if why and "alloc" in why:
            raise WillNotFitError(
                f"not enough memory to load {path.name}",
                why=why,
                hint="use a smaller quant, or fewer layers on the GPU: --gpu-layers 0",
            )
        raise EngineError(f"llama.cpp cannot load {path.name}", why=why)
    return model


def new_context(C: Any, model: Any, params: Any, what: str, n_ctx: int, n_least: int) -> Any:
    """A context for `what`, to be freed by the caller.

    Raises WillNotFitError when it gets no memory, with half of `n_ctx` as the way out, but not less
    than `n_least`; EngineError when llama.cpp refuses the settings.
    """
    forget_log()
    ctx = C.llama_init_from_model(model, params)
    if not ctx:
        why = last_reason()
        if why is None or "alloc" in why:
            raise WillNotFitError(
                f"no memory for {what}", why=why, hint=f"pass --ctx {max(n_least, n_ctx // 2)}"
            )
        raise EngineError("llama.cpp cannot create this context", why=why)
    return ctx


class _LoadWatch:
    """Progress of a load. A Python signal handler can run inside the callback, so everything is
    caught there and raised again once the C call is back."""

    def __init__(self, on_progress: LoadProgress | None) -> None:
        self._on_progress = on_progress
        self.stopped_by: BaseException | None = None

    def update(self, progress: float, _user: Any) -> bool:
        if self.stopped_by is not None:
            return False
        try:
            if self._on_progress is not None and not self._on_progress(progress):
                self.stopped_by = KeyboardInterrupt()
        except BaseException as error:  # noqa: BLE001 - raised again by load_model
            self.stopped_by = error
        return self.stopped_by is None


def read_meta(C: Any, model: Any, key: str) -> str:
    """A value of the model's header as text, empty when it is not there; `{}` in `key` stands for
    the architecture."""
    buffer = ctypes.create_string_buffer(256)

    def read(name: str) -> str:
        n = C.llama_model_meta_val_str(model, name.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if n >= 0 else ""

    return read(key.format(read("general.architecture")))


def read_facts(C: Any, model: Any, tokenizer: LlamaTokenizer) -> ModelFacts:
    vocab = C.llama_model_get_vocab(model)
    buffer = ctypes.create_string_buffer(256)
    C.llama_model_desc(model, buffer, len(buffer))
    template = C.llama_model_chat_template(model, None)

    def special_text(token: int) -> str:
        return tokenizer.piece(token).decode("utf-8", "replace") if token >= 0 else ""

    return ModelFacts(
        description=buffer.value.decode("utf-8", "replace"),
        n_params=C.llama_model_n_params(model),
        n_bytes=C.llama_model_size(model),
        n_ctx_train=C.llama_model_n_ctx_train(model),
        n_embd=C.llama_model_n_embd(model),
        n_layers=C.llama_model_n_layer(model),
        n_vocab=tokenizer.n_vocab,
        n_swa=C.llama_model_n_swa(model),
        is_recurrent=C.llama_model_is_recurrent(model),
        is_hybrid=C.llama_model_is_hybrid(model),
        chat_template=template.decode("utf-8", "replace") if template else None,
        bos_text=special_text(C.llama_vocab_bos(vocab)),
        eos_text=special_text(C.llama_vocab_eos(vocab)),
    )

"""Whether a file can be the draft model of another model, and loading it beside that."""

from __future__ import annotations

from dataclasses import replace

from llmrun.engine.backend import Backend, count_cells
from llmrun.engine.types import EngineOptions, LoadProgress, Tokenizer
from llmrun.errors import UsageError

_MANY_TOKENS = 50_000  # pieces to compare in a tenth of a second


def open_draft_backend(
    options: EngineOptions, target: Backend, on_progress: LoadProgress | None = None
) -> Backend:
    """Load the draft model of `options` beside the model that `target` is.

    Raises UsageError for a file that cannot be one, GgufError, EngineError or WillNotFitError.
    """
    from llmrun.engine.llama import open_backend
    from llmrun.gguf.info import read_info

    if not options.draft_model:
        raise UsageError("no draft model is named", hint="pass --draft-model NAME")
    if target.facts.is_recurrent or target.facts.is_hybrid:
        raise UsageError(
            "this model cannot have its tokens guessed",
            why=f"{target.facts.description} has a recurrent state, which cannot be taken back",
            hint="pass --speculative off",
        )
    info = read_info(options.draft_model)
    check_draft_kind(options.draft_model[0].name, info.kind)
    return open_backend(
        options.draft_model[0],
        replace(
            options,
            n_ctx=count_cells(target),
            kv_unified=True,  # guesses go on from any sequence's cells
            type_k="f16",
            type_v="f16",
            n_gpu_layers=options.draft_gpu_layers,
            n_cpu_moe=0,
            tensor_split=(),
            speculative="off",
        ),
        # The bar is full; it is still asked whether to go on.
        on_progress=None if on_progress is None else lambda _part: on_progress(1.0),
    )


def check_draft_kind(name: str, kind: str) -> None:
    """Raise UsageError for a file of a `kind` (`ModelInfo.kind`) that cannot guess by itself."""
    if kind == "model":
        return
    if kind == "drafter":
        raise UsageError(
            f"{name} is a part of its model that drafts, not a model of its own",
            why="such drafters (MTP, EAGLE and the like) cannot be used yet",
            hint="name a smaller model of the same family, or pass --speculative auto",
        )
    raise UsageError(f"{name} is a file of kind {kind}: it cannot draft")


def check_vocabulary(target: Tokenizer, drafter: Tokenizer) -> None:
    """Raise UsageError unless both vocabularies have as many tokens, and the same ones.

    Of a large vocabulary every so manyth is compared: another one differs nearly everywhere, and a
    guess that means something else costs time, never a token.
    """
    what = "the draft model has another vocabulary"
    hint = "name a smaller model of the same family"
    if target.n_vocab != drafter.n_vocab:
        raise UsageError(
            what, why=f"{drafter.n_vocab} tokens, the model has {target.n_vocab}", hint=hint
        )
    for token in range(0, target.n_vocab, 1 + target.n_vocab // _MANY_TOKENS):
        ours, theirs = target.piece(token), drafter.piece(token)
        if ours != theirs:
            why = f"its token {token} is {theirs!r}, the model's is {ours!r}"
            raise UsageError(what, why=why, hint=hint)

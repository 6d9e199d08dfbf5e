"""How an embedding model is loaded: what its header says, what was asked for, what follows. Pure.

Models without a cache (BERT and its like), and others whose tokens look at those behind them,
compute an input as a whole: a batch must hold the longest one. The rest reads long inputs in
pieces, so that its batches stay small whatever the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrun.engine.types import EngineOptions, FlashAttn, KvType
from llmrun.errors import EngineError, UsageError

if TYPE_CHECKING:
    from llmrun.gguf.types import ModelInfo

Pooling = Literal["mean", "cls", "last", "rank"]
"""How the rows of an input's tokens become its vector: their mean, the first, the last; `rank`: a
classifier behind one of these gives a score."""

POOLING_IDS: dict[Pooling, int] = {"mean": 1, "cls": 2, "last": 3, "rank": 4}  # llama_pooling_type
_POOLING_OF_ID = {number: name for name, number in POOLING_IDS.items()}

# Of these llama.cpp keeps no cache (llama_model::create_memory of its src/llama-model.cpp).
_WITHOUT_CACHE = frozenset(
    {
        "bert",
        "dream",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llada",
        "llada-moe",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "rnd1",
        "t5encoder",
    }
)
# Models with a recurrent state are computed one sequence after the other, whatever is in a batch.
_STATE_KEYS = ("ssm.state_size", "wkv.head_size")

_N_CTX_MAX = 8192  # more has to be asked for
_N_BATCH_MAX = 512
_N_BATCH_MIN = 64
_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
# The library keeps a row of logits for each token of a batch, also where none are computed
# (output_reserve of its src/llama-context.cpp). Batches of several inputs, and the longest input
# that a batch must hold when no length is asked for, stay within these.
_BATCH_LOGITS_BYTES = 256 << 20
_INPUT_LOGITS_BYTES = 2 << 30
# Without FlashAttention a vector hardly depends on what is computed beside it, and the scores of
# all heads lie in memory: left off while they are no more than that.
_SCORES_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """How a model is loaded for vectors or scores. None means: let the embedder choose.

    n_ctx: most tokens in one input; never more than the model was trained for. n_seq_max: most
    inputs in one batch. n_batch: most tokens in a batch of several inputs. pooling "auto" is what
    the file says. flash_attn "auto" is off where that costs little memory. The others are as in
    `engine.types.EngineOptions`.
    """

    n_ctx: int | None = None
    n_seq_max: int = 64
    n_batch: int | None = None
    pooling: Literal["auto", "mean", "cls", "last", "rank"] = "auto"
    n_gpu_layers: int = -1
    n_threads: int | None = None
    type_k: KvType = "f16"
    type_v: KvType = "f16"
    flash_attn: FlashAttn = "auto"
    use_mmap: bool = True
    use_repack: bool = True
    check_tensors: bool = False
    n_cpu_moe: int = 0
    tensor_split: tuple[float, ...] = ()
    steady_threads: bool = True


@dataclass(frozen=True, slots=True)
class EmbedShape:
    """What the memory of an embedding context depends on.

    `n_ctx` is the most tokens in one input, `n_cells` the context's size (nothing without a cache),
    `n_ubatch` the context's batch and micro-batch, all of whose rows are outputs. Batches of
    several inputs have at most `n_pack` tokens. `is_whole`: an input must be in one batch.
    """

    n_ctx: int
    n_cells: int
    n_ubatch: int
    n_pack: int
    n_seq_max: int
    pooling: Pooling
    is_whole: bool
    flash_attn: FlashAttn


def embedding_kind(info: ModelInfo) -> Literal["chat", "embedding", "reranker"]:
    """What the model answers with: text, vectors or scores."""
    if info.kind == "reranker" or (info.kind == "embedder" and "cls.weight" in _names(info)):
        return "reranker"
    return "embedding" if info.kind == "embedder" else "chat"


def shape_context(info: ModelInfo, options: EmbedOptions) -> EmbedShape:
    """Raises UsageError for options that cannot be, EngineError for a file that contradicts
    itself."""
    _check_info(info)
    pooling = _choose_pooling(info, options)
    is_whole = computes_whole(info)
    n_vocab = max(1, info.n_vocab or 1)
    if options.n_ctx is not None and options.n_ctx < 1:
        raise UsageError("the context must have at least one token", hint="pass --ctx 512")
    if options.n_batch is not None and options.n_batch < 1:
        raise UsageError("a batch must have at least one token")
    n_ctx = options.n_ctx
    if n_ctx is None:
        n_ctx = _N_CTX_MAX
        if is_whole:
            n_ctx = min(n_ctx, max(_N_BATCH_MAX, _INPUT_LOGITS_BYTES // (4 * n_vocab)))
    # Learned positions end there, and the library reads on behind them; others give vectors that
    # mean little.
    n_ctx = min(n_ctx, info.n_ctx_train or n_ctx)
    n_pack = options.n_batch or _choose_batch(n_vocab)
    n_ubatch = max(n_pack, n_ctx) if is_whole else n_pack
    n_cells = max(n_ctx, n_ubatch)
    return EmbedShape(
        n_ctx=n_ctx,
        n_cells=n_cells,
        n_ubatch=n_ubatch,
        n_pack=n_pack,
        n_seq_max=_choose_sequences(info, options, n_pack),
        pooling=pooling,
        is_whole=is_whole,
        flash_attn=_choose_attention(info, options, n_ubatch * n_cells),
    )


def engine_options(options: EmbedOptions, shape: EmbedShape) -> EngineOptions:
    """The same for the functions that fill llama.cpp's structures."""
    return EngineOptions(
        n_ctx=shape.n_cells,
        n_seq_max=shape.n_seq_max,
        n_ubatch=shape.n_ubatch,
        n_gpu_layers=options.n_gpu_layers,
        n_threads=options.n_threads,
        n_threads_batch=options.n_threads,
        type_k=options.type_k,
        type_v=options.type_v,
        flash_attn=shape.flash_attn,
        use_mmap=options.use_mmap,
        use_repack=options.use_repack,
        check_tensors=options.check_tensors,
        n_cpu_moe=options.n_cpu_moe,
        tensor_split=options.tensor_split,
        speculative="off",
    )


def computes_whole(info: ModelInfo) -> bool:
    """Whether all tokens of an input look at each other, so that it cannot be read in pieces."""
    if info.architecture in _WITHOUT_CACHE:
        return True
    return info.header.metadata.get(f"{info.architecture}.attention.causal") is False


def check_embedder(path: Path, info: ModelInfo) -> None:
    """Raise UsageError for what is no model that can be asked."""
    if info.kind in ("projector", "adapter", "drafter"):
        raise UsageError(
            f"{path.name} is a {info.kind}, not a model of its own",
            hint="name the model's own file",
        )


def _check_info(info: ModelInfo) -> None:
    """What the library would abort on at the first batch."""
    metadata = info.header.metadata
    n_out = metadata.get(f"{info.architecture}.embedding_length_out")
    widths = {info.n_embd} | {
        metadata.get(f"{info.architecture}.dense_{layer}_feat_out") for layer in (2, 3)
    }
    if isinstance(n_out, int) and n_out and n_out not in widths:
        raise EngineError(
            "the model's vectors have another length than its header says",
            why=f"embedding_length_out is {n_out}, the rows have {info.n_embd} values",
        )


def _choose_pooling(info: ModelInfo, options: EmbedOptions) -> Pooling:
    pooling: Pooling
    if options.pooling != "auto":
        pooling = options.pooling
    elif embedding_kind(info) == "reranker":
        pooling = "rank"
    else:
        number = info.header.metadata.get(f"{info.architecture}.pooling_type")
        # Where nothing is said: encoders are trained for the mean; of a model that reads from left
        # to right only the last token has seen all.
        default: Pooling = "mean" if computes_whole(info) else "last"
        named = _POOLING_OF_ID.get(number) if type(number) is int else None
        pooling = named or default
    if pooling == "rank":
        _check_classifier(info)
    return pooling


def _check_classifier(info: ModelInfo) -> None:
    """Without a classifier the library takes the first of the hidden values for the score."""
    tensors = {tensor.name: tensor for tensor in info.header.tensors}
    last = tensors.get("cls.output.weight") or tensors.get("cls.weight")
    if last is None:
        raise UsageError(
            "this model gives no scores",
            why="its file has no classifier",
            hint="use a reranker that was converted with one, such as bge-reranker-v2-m3",
        )
    n_rows = last.shape[1] if len(last.shape) > 1 else 1
    labels = info.header.metadata.get(f"{info.architecture}.classifier.output_labels")
    n_labels = getattr(labels, "n_values", 0) or 1
    if n_rows != n_labels:
        raise EngineError(
            "the model's classifier is not what its header says",
            why=f"it has {n_rows} outputs and {n_labels} labels",
        )


def _choose_batch(n_vocab: int) -> int:
    n_batch = _N_BATCH_MAX
    while n_batch > _N_BATCH_MIN and 4 * n_vocab * n_batch > _BATCH_LOGITS_BYTES:
        n_batch //= 2
    return n_batch


def _choose_sequences(info: ModelInfo, options: EmbedOptions, n_pack: int) -> int:
    if not 1 <= options.n_seq_max <= _MAX_SEQUENCES:
        raise UsageError(
            f"{options.n_seq_max} inputs in a batch: 1 to {_MAX_SEQUENCES} are possible"
        )
    metadata = info.header.metadata
    if any(f"{info.architecture}.{key}" in metadata for key in _STATE_KEYS):
        return 1
    return min(options.n_seq_max, n_pack)


def _choose_attention(info: ModelInfo, options: EmbedOptions, n_scores: int) -> FlashAttn:
    """`n_scores`: of one head."""
    needs_flash = options.type_v not in ("f16", "f32", "bf16")
    if options.flash_attn != "auto" or needs_flash:
        return options.flash_attn
    n_head = info.header.metadata.get(f"{info.architecture}.attention.head_count")
    if type(n_head) is not int or 4 * n_head * n_scores > _SCORES_BYTES:
        return "auto"
    return "off"


def _names(info: ModelInfo) -> set[str]:
    return {tensor.name for tensor in info.header.tensors}

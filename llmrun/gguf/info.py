"""From checked headers to a `ModelInfo`: what a model is, for people and for the planner."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmrun.errors import GgufError, NotFoundError
from llmrun.gguf.ggml_types import FILE_TYPES
from llmrun.gguf.header import read_header
from llmrun.gguf.naming import shard_of
from llmrun.gguf.source import FileSource
from llmrun.gguf.types import ArrayValue, Header, ModelInfo, TensorInfo
from llmrun.text import escape_line

MAX_SHARDS = 1000
_FILE_TYPE_GUESSED = 1024  # LLAMA_FTYPE_GUESSED, a flag beside the type
_POOLING_RANK = 4  # LLAMA_POOLING_TYPE_RANK

_EMBEDDER_ARCHITECTURES = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
_DRAFTER_ARCHITECTURES = frozenset({"eagle3", "dflash", "dspark"})


def read_info(paths: Sequence[Path], *, thorough: bool = False) -> ModelInfo:
    """The `ModelInfo` of one model in local files: one path, or all its shards.

    For `thorough` see `read_header`.
    Raises GgufError for bad headers or shards that do not belong together, and what `FileSource`
    raises.
    """
    headers = []
    n_bytes = 0
    for path in paths:
        with FileSource(path) as source:
            headers.append(read_header(source, name=path.name, thorough=thorough))
            n_bytes += source.n_bytes
    return build_info(headers, n_bytes)


def find_shards(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` belongs to, in order: itself, or its shards beside it.

    Raises NotFoundError when a shard is missing.
    """
    shard = shard_of(path.name)
    if shard is None or shard.count == 1:
        return (path,)
    suffix = path.name[-len(".gguf") :]
    paths = tuple(
        path.with_name(f"{shard.prefix}-{number:05}-of-{shard.count:05}{suffix}")
        for number in range(1, shard.count + 1)
    )
    missing = [other for other in paths if not other.exists()]
    if missing:
        shown = escape_line(missing[0].name)
        raise NotFoundError(
            f"{len(missing)} of the model's {shard.count} files are missing, such as {shown}",
            hint=f"put all shards into {escape_line(str(path.parent))}, or pull the model again",
        )
    return paths


def build_info(headers: Sequence[Header], n_bytes: int) -> ModelInfo:
    """The `ModelInfo` of one model from the headers of all its files, which have `n_bytes` in all.

    `name` and `licence` are safe to print; `chat_template` and `header.metadata` are raw.
    Shards may come in any order. Raises GgufError when they do not belong together or are not all
    there, or when the file holds no model.
    """
    header = _join_shards(headers)
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        what = "an importance matrix" if metadata.get("general.type") == "imatrix" else "no model"
        raise GgufError(f"the GGUF file holds {what}", why="its header names no architecture")
    mix = Counter[str]()
    for tensor in header.tensors:
        mix[tensor.type_name] += tensor.n_bytes
    quant_mix = tuple(mix.most_common())
    template = metadata.get("tokenizer.chat_template")
    encoder = f"{architecture}.vision" if architecture == "clip" else architecture
    return ModelInfo(
        architecture=architecture,
        name=_label(header, "general.name", "general.basename"),
        kind=_kind(header, architecture),
        quant=_quant(header, quant_mix),
        quant_mix=quant_mix,
        n_params=sum(tensor.n_elements for tensor in header.tensors),
        n_bytes=n_bytes,
        tensor_bytes=sum(tensor.n_bytes for tensor in header.tensors),
        n_layers=_count(header, f"{encoder}.block_count"),
        n_ctx_train=_count(header, f"{architecture}.context_length"),
        n_embd=_count(header, f"{encoder}.embedding_length"),
        n_vocab=_n_vocab(header, architecture),
        n_swa=_count(header, f"{architecture}.attention.sliding_window") or None,
        n_expert=_count(header, f"{architecture}.expert_count") or None,
        n_expert_used=_count(header, f"{architecture}.expert_used_count") or None,
        licence=_label(header, "general.license", "general.license.name"),
        chat_template=template if isinstance(template, str) else None,
        sampling=_sampling(header),
        header=header,
    )


def _join_shards(headers: Sequence[Header]) -> Header:
    """The first shard's header with the tensors of all; each `offset` counts in its own file."""
    if not headers:
        raise ValueError("no headers")
    if len(headers) == 1 and (_count(headers[0], "split.count") or 1) == 1:
        return headers[0]
    by_number: dict[int, Header] = {}
    for header in headers:
        count = _count(header, "split.count")
        number = _count(header, "split.no")
        if count is None or number is None or not number < count <= MAX_SHARDS:
            raise _shard_error("a file has no valid split.no and split.count")
        if count != len(headers):
            raise _shard_error(f"a file says that there are {count}, but {len(headers)} were given")
        if number in by_number:
            raise _shard_error(f"two files say that they are number {number + 1}")
        by_number[number] = header
    ordered = [by_number[number] for number in range(len(headers))]
    tensors: list[TensorInfo] = [tensor for header in ordered for tensor in header.tensors]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _shard_error("a tensor is in two of them")
    for header in ordered:
        n_claimed = _count(header, "split.tensors.count")
        if n_claimed is not None and n_claimed != len(tensors):
            raise _shard_error(f"they hold {len(tensors)} tensors, but {n_claimed} are claimed")
    return replace(ordered[0], tensors=tuple(tensors))


def _shard_error(why: str) -> GgufError:
    return GgufError(
        "the model's files do not belong together, or some are missing",
        why=why,
        hint="put all shards (-00001-of-0000N.gguf and so on) into one folder and name the first",
    )


def _count(header: Header, key: str) -> int | None:
    """A whole number >= 0; of a per-layer array the largest."""
    value = header.metadata.get(key)
    if isinstance(value, ArrayValue):
        numbers = [one for one in value.values or () if type(one) is int]
        value = max(numbers, default=-1)
    return value if type(value) is int and value >= 0 else None


def _label(header: Header, *keys: str) -> str | None:
    """The first of these strings that says something, on one line and safe to print."""
    for key in keys:
        value = header.metadata.get(key)
        if isinstance(value, str) and value.strip():
            return escape_line(value.strip()[:200])
    return None


def _quant(header: Header, quant_mix: tuple[tuple[str, int], ...]) -> str | None:
    file_type = _count(header, "general.file_type")
    if file_type is not None:
        name = FILE_TYPES.get(file_type & ~_FILE_TYPE_GUESSED)
        if name is not None:
            return name
    return quant_mix[0][0] if quant_mix else None


def _n_vocab(header: Header, architecture: str) -> int | None:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, ArrayValue):
        return tokens.n_values
    return _count(header, f"{architecture}.vocab_size")


def _sampling(header: Header) -> dict[str, float | int]:
    """The `general.sampling.*` numbers; what is not a finite number gives no advice."""
    prefix = "general.sampling."
    found: dict[str, float | int] = {}
    for key, value in header.metadata.items():
        if (
            key.startswith(prefix)
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
        ):
            found[key.removeprefix(prefix)] = value
    return found


def _kind(header: Header, architecture: str) -> str:
    general_type = header.metadata.get("general.type")
    if general_type == "adapter" or architecture == "controlvector":
        return "adapter"
    if general_type == "mmproj" or architecture == "clip":
        return "projector"
    names = {tensor.name for tensor in header.tensors}
    if (
        architecture in _DRAFTER_ARCHITECTURES
        or architecture.endswith("-assistant")
        or _has_only_nextn_blocks(header, architecture, names)
    ):
        return "drafter"
    pooling = _count(header, f"{architecture}.pooling_type")
    if pooling == _POOLING_RANK or "cls.output.weight" in names:
        return "reranker"
    if pooling or architecture in _EMBEDDER_ARCHITECTURES:
        return "embedder"
    return "model"


def _has_only_nextn_blocks(header: Header, architecture: str, names: set[str]) -> bool:
    """Whether the file holds the drafting blocks (the last ones) of a model without the rest."""
    if not _count(header, f"{architecture}.nextn_predict_layers"):
        return False
    blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
    return bool(blocks) and "0" not in blocks

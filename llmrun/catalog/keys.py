"""A key that all conversions of one model share, made from a file's or repository's name."""

from __future__ import annotations

import re

from llmrun.gguf.naming import quant_of, shard_of

_ORG_PREFIX = re.compile(
    r"^(?:google|microsoft|nvidia|mistralai|meta-llama|qwen|ibm-granite|zai-org|openai|deepseek-ai"
    r"|huggingfacetb|liquidai)_"
)
_WORDS = re.compile(r"(?<![a-z0-9])(?:ud|i1|qat|gguf|imat)(?![a-z0-9])")
_NOT_WORD = re.compile(r"[^a-z0-9.]+")


def model_key(name: str) -> str:
    """`google_gemma-3-1b-it-Q4_K_M.gguf` and `unsloth/gemma-3-1b-it-GGUF` -> `gemma-3-1b-it`.

    Folders, shard numbers, quant tags, `UD`, `i1`, `QAT`, `GGUF` and the uploader's `<org>_` go;
    case and separators do not count.
    """
    base = name.replace("\\", "/").rpartition("/")[2]
    shard = shard_of(base)
    if shard is not None:
        base = shard.prefix
    elif base.lower().endswith(".gguf"):
        base = base[: -len(".gguf")]
    # The tag is looked for in the name alone: a folder's tag says nothing about this string.
    quant = quant_of(base + ".gguf")
    key = base.lower()
    if quant is not None:
        before, _, after = key.rpartition(quant.lower())
        key = f"{before} {after}"
    key = _ORG_PREFIX.sub("", key.strip(" ._-"))
    key = _WORDS.sub(" ", key)
    return _NOT_WORD.sub("-", key).strip("-.")

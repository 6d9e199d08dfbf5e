"""What the names of model files say: quant, shard, role. Pure functions on repository paths.

The grammar follows what uploaders do: `<Model>-<QUANT>.gguf`, `<Model>.<QUANT>.gguf`,
`<Model>.i1-<QUANT>.gguf`, `<Model>-UD-<QUANT>.gguf`, `<QUANT>/<Model>-00001-of-00003.gguf`, all in
upper, lower or mixed case, and the quant now and then in the middle (`gemma-4-E2B_q4_0-it.gguf`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llmrun.errors import DamagedFileError
from llmrun.text import escape_line

Role = Literal["model", "projector", "drafter", "imatrix", "other"]

_QUANT = (
    r"(?:UD-)?"
    r"(?:IQ[1-9]_(?:NL_[48]_[48]|(?:XXS|XS|NL|S|M|L|KSS|KS|KT|K)(?:_XXL|_XL)?)"
    r"|T?Q[1-9]_(?:[0-9]_[48]_[48]|[0-9]|K_(?:XXS|XS|S|M|L|XL|XXL)|K)"
    r"|MXFP4(?:_MOE)?|NVFP4"
    r"|BF16|FP?(?:16|32))"
)
_QUANT_WHOLE = re.compile(_QUANT, re.IGNORECASE)
_QUANT_IN_NAME = re.compile(rf"(?<![A-Za-z0-9])({_QUANT})(?![A-Za-z0-9])", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE | re.DOTALL)
_DRIVE = re.compile(r"[A-Za-z]:")

# llama.cpp leaves files with these in their names out of a model's choice, in this very case; at
# the start of a name or as a folder they mean a drafter in any case. `-MTP-` inside a name is a
# whole model that carries its own drafting block.
_DRAFTER_MARKS = ("mtp-", "eagle3-", "dflash-", "dspark-")
_DRAFTER_NAME = re.compile(r"gemma-4-.*-assistant\b", re.IGNORECASE)
_DRAFTER_FOLDERS = ("mtp", "eagle3", "dflash", "dspark")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a sharded model: `prefix` with its folder, `number` from 1 to `count`."""

    prefix: str
    number: int
    count: int


def is_quant(tag: str) -> bool:
    """Whether `tag` as a whole is a quant name such as `q4_k_m`, `UD-IQ2_XXS` or `bf16`."""
    return _QUANT_WHOLE.fullmatch(tag) is not None


def quant_of(path: str) -> str | None:
    """The quant tag of a `.gguf` path, in upper case; None when its name tells none.

    The last tag in the file name counts, else the deepest folder that names one. `UD-` belongs to
    the tag (such files differ from their plain namesakes), `i1-` does not.
    """
    folder, _, name = path.rpartition("/")
    if not name.lower().endswith(".gguf"):
        return None
    for part in (name[: -len(".gguf")], *reversed(folder.split("/"))):
        found = _QUANT_IN_NAME.findall(part)
        if found:
            return str(found[-1]).upper()
    return None


def shard_of(path: str) -> Shard | None:
    """The shard that `path` names (`<prefix>-00001-of-00003.gguf`), or None for a whole file."""
    match = _SHARD.fullmatch(path)
    if match is None:
        return None
    number, count = int(match[2]), int(match[3])
    return Shard(match[1], number, count) if 1 <= number <= count else None


def role_of(path: str) -> Role:
    """What a file of a repository is for, by its name alone; the header has the last word."""
    folder, _, name = path.rpartition("/")
    lower = name.lower()
    folders = folder.lower().split("/")
    imatrix_at = lower.rfind("imatrix")
    if not lower.endswith(".gguf"):
        return "imatrix" if imatrix_at >= 0 else "other"
    if "mmproj" in lower or "mmproj" in folders:
        return "projector"
    if imatrix_at >= 0 and _QUANT_IN_NAME.search(lower, imatrix_at) is None:
        return "imatrix"
    if (
        lower.startswith(_DRAFTER_MARKS)
        or any(mark in name for mark in _DRAFTER_MARKS)
        or any(known in folders for known in _DRAFTER_FOLDERS)
        or _DRAFTER_NAME.search(name)
    ):
        return "drafter"
    if lower.startswith("ggml-vocab-"):
        return "other"
    return "model"


def safe_repo_path(path: str) -> str:
    """`path` itself when it is safe to join below a folder on every system.

    Raises DamagedFileError for what could leave the folder, hide itself or not be written: empty
    parts, `.` and `..`, a leading slash, backslashes, drive names, control and reordering
    characters, undecodable bytes, and parts longer than file systems take.
    """
    reason = _unsafe_reason(path)
    if reason is not None:
        shown = escape_line(path[:200]).encode(errors="backslashreplace").decode()
        raise DamagedFileError(
            f"unsafe file name '{shown}'",
            why=reason,
            hint="do not use this repository; tell its owner",
        )
    return path


def _unsafe_reason(path: str) -> str | None:
    try:
        parts = path.encode().split(b"/")
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if path.startswith("/"):
        return "it is an absolute path"
    if "\\" in path:
        return "it contains a backslash"
    if escape_line(path) != path:
        return "it contains control characters"
    if any(not part for part in parts):
        return "it has an empty part"
    # Windows drops trailing dots and spaces, so `.. ` is `..` there.
    if any(not part.strip(b". ") for part in parts):
        return "it points to a folder by dots"
    if any(_DRIVE.match(part) for part in path.split("/")):
        return "it names a drive"
    if any(len(part) > 255 for part in parts) or len(path) > 4096:
        return "it is too long"
    return None

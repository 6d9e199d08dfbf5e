"""A path of the user's own to a model: one file, a shard with its siblings, or a folder."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from llmrun.catalog.choose import QuantChoice, list_choices, pick_drafter, pick_projector
from llmrun.catalog.entries import Catalog
from llmrun.catalog.names import echo
from llmrun.catalog.types import Resolved
from llmrun.errors import DamagedFileError, LlmrunError, NotFoundError, UsageError
from llmrun.gguf.naming import quant_of, shard_of
from llmrun.hub import layout
from llmrun.hub.types import RemoteFile
from llmrun.text import close_names, format_bytes

_MAGIC = b"GGUF"
_LOOKALIKES = (
    (b"", "it is empty"),
    (b"version https://git-lfs", "it is a Git LFS pointer; the file itself was not downloaded"),
    (b"<", "it looks like a web page"),
    (b"{", "it looks like JSON"),
    (b"PK", "it is a zip archive, perhaps PyTorch weights"),
    (b"ggml", "it is an old GGML file; convert it to GGUF"),
    (b"lmgg", "it is an old GGML file; convert it to GGUF"),
    (b"tjgg", "it is an old GGJT file; convert it to GGUF"),
    (b"\0\0\0\0", "it begins with zeros; perhaps its download never finished"),
)
_REPO_IN_PATH = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*/.+\.gguf", re.IGNORECASE)


def resolve_path(path: Path, *, catalog: Catalog, cwd: Path) -> Resolved:
    """The model at `path` (relative to `cwd`), used in place.

    Raises NotFoundError (no such file, a shard that is not there, a folder without a model),
    UsageError (a folder with several models), DamagedFileError (not GGUF by its first bytes).
    """
    # Not resolve(): the names of links, not of what they lead to, tell shards and quants.
    full = Path(os.path.abspath(cwd / path))  # noqa: PTH100
    if not _exists(full):
        raise _no_such_file(path, full)
    if full.is_dir():
        choice, neighbours = _choose_in_folder(full)
        folder = full
    else:
        choice, neighbours, folder = _choose_file(full)
    for file in choice.files:
        _check_magic(folder / file.path)
    repo, commit = _cache_place(folder / choice.path)
    entry = catalog.entry_for(repo, choice.path) or catalog.entry_for(None, folder.name)
    return Resolved(
        reference=str(folder / choice.path),
        title=entry.title if entry is not None else echo(Path(choice.path).stem),
        entry=entry,
        repo=repo,
        revision=None,
        commit=commit,
        quant=choice.quant,
        files=choice.files,
        projector=pick_projector(neighbours, choice, entry),
        drafter=pick_drafter(neighbours, choice, entry),
        local_paths=tuple(folder / file.path for file in choice.files),
        origin="local",
        alternatives=(choice,),
    )


def _exists(path: Path) -> bool:
    """Path.exists() that takes a name which the system cannot hold for one that is not there."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _choose_file(full: Path) -> tuple[QuantChoice, Sequence[RemoteFile], Path]:
    if not stat.S_ISREG(full.stat().st_mode):
        raise UsageError(f"{echo(str(full))} is not a regular file")
    neighbours = _list_folder(full.parent)
    shard = shard_of(full.name)
    if shard is not None:
        for choice in list_choices(neighbours):
            if any(file.path == full.name for file in choice.files):
                if not choice.complete:
                    raise _missing_shards(choice, full.parent)
                return choice, neighbours, full.parent
    # A file that the user names is taken whatever its name says; its header has the last word.
    file = RemoteFile(full.name, full.stat().st_size, None)
    return QuantChoice(quant_of(full.name), file.n_bytes, (file,)), neighbours, full.parent


def _choose_in_folder(folder: Path) -> tuple[QuantChoice, Sequence[RemoteFile]]:
    files = _list_folder(folder)
    choices = list_choices(files)
    whole = [choice for choice in choices if choice.complete]
    if len(whole) == 1:
        return whole[0], files
    shown = echo(str(folder))
    if whole:
        raise UsageError(
            f"{shown} holds {len(whole)} models",
            why=", ".join(f"{echo(c.path)} {format_bytes(c.n_bytes)}" for c in whole[:8]),
            hint=f"llmrun run {_quote(folder / whole[0].path)}",
        )
    if choices:
        raise _missing_shards(choices[0], folder)
    raise NotFoundError(f"{shown} holds no GGUF model", hint="name a .gguf file")


def _list_folder(folder: Path) -> list[RemoteFile]:
    """The `.gguf` files directly in `folder`, by name; what cannot be read is left out."""
    found = []
    try:
        with os.scandir(folder) as items:
            for item in items:
                try:
                    if item.name.lower().endswith(".gguf") and item.is_file():
                        found.append(RemoteFile(item.name, item.stat().st_size, None))
                except OSError:
                    continue
    except OSError as error:
        raise LlmrunError(f"cannot read {echo(str(folder))}", why=error.strerror) from error
    return sorted(found, key=lambda file: file.path)


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise LlmrunError(f"cannot read {echo(str(path))}", why=error.strerror) from error
    if head.startswith(_MAGIC):
        return
    why = "its first bytes are not GGUF's"
    for start, meaning in _LOOKALIKES:
        if head.lstrip().startswith(start) if start else not head:
            why = meaning
            break
    else:
        if head[8:10] == b'{"':
            why = "it is a safetensors file; llmrun runs GGUF files"
    raise DamagedFileError(
        f"{echo(str(path))} is not a GGUF file", why=why, hint="download the file again"
    )


def _missing_shards(choice: QuantChoice, folder: Path) -> NotFoundError:
    shard = shard_of(choice.path)
    prefix = shard.prefix if shard is not None else choice.path
    names = [f"{prefix}-{n:05}-of-{choice.n_shards:05}.gguf" for n in choice.missing]
    n_missing = len(names)
    shown = ", ".join(echo(name) for name in names[:3]) + (", …" if n_missing > 3 else "")
    return NotFoundError(
        f"{n_missing} of {choice.n_shards} parts of the model are missing",
        why=f"not in {echo(str(folder))}: {shown}",
        hint="put all parts into one folder",
    )


def _no_such_file(path: Path, full: Path) -> NotFoundError:
    text = str(path)
    try:
        names = [other.name for other in full.parent.iterdir() if other.suffix.lower() == ".gguf"]
    except (OSError, ValueError):
        names = []
    near = close_names(full.name, names)
    if near:
        return NotFoundError(
            f"no such file: {echo(text)}",
            why="did you mean " + ", ".join(echo(name) for name in near) + "?",
            hint=f"llmrun run {_quote(path.parent / near[0])}",
        )
    if _REPO_IN_PATH.fullmatch(text):
        org, name, file = text.split("/", 2)
        return NotFoundError(
            f"no such file: {echo(text)}",
            why="a file of a hub repository is written with a colon",
            hint=f"llmrun pull {_quote(f'{org}/{name}:{file}')}",
        )
    return NotFoundError(f"no such file: {echo(text)}", hint="llmrun list")


def _quote(path: Path | str) -> str:
    """A path as it can be pasted into a shell; one that begins like a name gets `./`."""
    text = str(path)
    if isinstance(path, Path) and not path.is_absolute() and not text.startswith((".", "~")):
        text = f"./{text}"
    return shlex.quote(echo(text, limit=4096))


def _cache_place(path: Path) -> tuple[str | None, str | None]:
    """(repo, commit) when `path` lies in a snapshot of the shared cache, else (None, None)."""
    parts = path.parts
    for i, part in enumerate(parts[:-3]):
        repo, commit = layout.repo_of_folder(part), parts[i + 2]
        if repo is not None and parts[i + 1] == "snapshots" and layout.COMMIT.fullmatch(commit):
            return repo, commit
    return None, None

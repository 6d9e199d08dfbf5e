"""What a user may write for a model, read into one of three values. Never asks the network.

    gemma-4-e4b   gemma-4-e4b:q8_0                         CatalogRef
    org/name   org/name:Q4_K_M   org/name:file.gguf        RepoRef
    org/name@revision   org/name@revision:Q4_K_M
    hf.co/org/name:Q4_K_M   hf://org/name   huggingface.co/org/name   -hf org/name:Q4_K_M
    https://huggingface.co/org/name[/blob|resolve|raw|tree/REV[/PATH]][?…][#…]
    ./x.gguf   /abs/x.gguf   ~/x.gguf   C:\\x.gguf   file:///x.gguf   any existing path    PathRef

Order of the rules, the first that applies wins:
 1. The text, as a whole, is an existing file, or a folder with a `.gguf` file in it: PathRef.
 2. It is written as a path (`./`, `../`, `/`, `~`, drive, backslash, `file://`): PathRef.
 3. It is a URL or begins with a hub's name: RepoRef. A URL of another host is refused.
 4. `org/name`, with `@revision` and `:tag`: RepoRef.
 5. It ends in `.gguf` and has no `:`: PathRef, which then does not exist; a mistyped file name is
    never asked of the network.
 6. A word: CatalogRef.
Everything else raises UsageError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

from llmrun.errors import UsageError
from llmrun.gguf.naming import is_quant
from llmrun.text import escape_line

MAX_CHARS = 4096
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co")

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO = re.compile(rf"{_PART}/{_PART}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,95}")
_QUANT_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")
_DRIVE = re.compile(r"[A-Za-z]:(?:[\\/]|.*\.gguf$)", re.IGNORECASE | re.DOTALL)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_FLAG = re.compile(r"--?hf(?:-repo|r)?(?:\s+|=)")


@dataclass(frozen=True, slots=True)
class CatalogRef:
    """A name of the catalog (not yet looked up), with a quant or file name as `tag`."""

    name: str
    tag: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class RepoRef:
    """A repository of the hub. `tag`: a quant or a file's name or path. `revision` None is main."""

    repo: str
    tag: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class PathRef:
    """A local file or folder, `~` already replaced. It need not exist."""

    path: Path


Reference = CatalogRef | RepoRef | PathRef


def is_local_model(text: str) -> bool:
    """Whether `text` is an existing file, or a folder that directly holds a `.gguf` file.

    Other folders do not count: a folder named like a model must not hide the model.
    """
    try:
        path = Path(text)
        if path.is_dir():
            return any(item.name.lower().endswith(".gguf") for item in path.iterdir())
        return path.exists()
    except (OSError, ValueError):
        return False


def parse_reference(
    text: str,
    *,
    exists: Callable[[str], bool] = is_local_model,
    hosts: Collection[str] = HUB_HOSTS,
) -> Reference:
    """Read a model reference by the rules above.

    `exists` answers rule 1; `hosts` are the hub's host names (a mirror's may be added). Raises
    UsageError for text that no rule takes; the text is echoed with control characters escaped.
    """
    if text and len(text) <= MAX_CHARS and exists(text):
        return PathRef(Path(text))
    text = text.strip()
    if not text:
        raise UsageError("the model's name is empty", hint="llmrun run smollm2-135m")
    if len(text) > MAX_CHARS:
        _refuse(text, f"it is {len(text)} characters long")
    if escape_line(text) != text:
        _refuse(text, "it contains control characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(text, "it is not valid Unicode")

    flag = _FLAG.match(text)
    if flag is not None:
        text = text[flag.end() :]
    if text.startswith("-"):
        _refuse(text, "it begins like an option")
    if _is_written_as_path(text):
        return PathRef(Path(_expand_home(text)))
    scheme = _SCHEME.match(text)
    if scheme is not None:
        return _parse_url(text, scheme[1].lower(), hosts)
    host, slash, rest = text.partition("/")
    if slash and host.lower() in hosts:
        return _parse_hub_path(text, rest)
    left, _, tag = text.partition(":")
    if "/" in left:
        if left.lower().endswith(".gguf") and not tag:
            return PathRef(Path(text))
        return _parse_repo(text, text)
    if left.lower().endswith(".gguf") and not tag:
        return PathRef(Path(text))
    name, revision, tag_or_none = _split_suffixes(text, text)
    if _NAME.fullmatch(name) is None:
        _refuse(text, "it is neither a catalog name, nor org/name, nor a path")
    return CatalogRef(name, tag_or_none, revision)


def _refuse(text: str, why: str) -> NoReturn:
    raise UsageError(
        f"not a model reference: '{echo(text)}'",
        why=why,
        hint="write a catalog name, org/name:QUANT, a hub URL, or ./file.gguf",
    )


def echo(text: str, limit: int = 120) -> str:
    """`text` in a form that is safe in a message: escaped, encodable and not long."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return escape_line(shown.encode("utf-8", "backslashreplace").decode())


def _is_written_as_path(text: str) -> bool:
    return (
        text in (".", "..")
        or text.startswith(("./", "../", "/", "~", "file:"))
        or ("\\" in text)
        or _DRIVE.match(text) is not None
    )


def _expand_home(text: str) -> str:
    if text.lower().startswith("file:"):
        try:
            url = urlsplit(text)
        except ValueError:
            _refuse(text, "it is not a file URL")
        path = unquote(url.path)
        if url.netloc not in ("", "localhost") or not path or escape_line(path) != path:
            _refuse(text, "it is not a URL of a file on this machine")
        # file:///C:/x.gguf has the path /C:/x.gguf.
        return path[1:] if _DRIVE.match(path[1:]) else path
    try:
        return str(Path(text).expanduser())
    except (ValueError, OSError, RuntimeError):  # RuntimeError: no such user, or no home
        return text


def _parse_url(text: str, scheme: str, hosts: Collection[str]) -> RepoRef:
    if scheme == "hf":
        return _parse_hub_path(text, text.partition("://")[2])
    if scheme not in ("http", "https"):
        _refuse(text, f"addresses of the form {scheme}:// are not known")
    try:
        url = urlsplit(text)
        host, port = (url.hostname or "").lower(), url.port
    except ValueError:
        _refuse(text, "it is not a valid address")
    if host not in hosts and (f"{host}:{port}" not in hosts):
        _refuse(text, f"{echo(host)} is not a model hub; set HF_ENDPOINT to use a mirror")
    return _parse_hub_path(text, url.path + (f"?{url.query}" if url.query else ""))


def _parse_hub_path(text: str, rest: str) -> RepoRef:
    """Read what follows the hub's host: `org/name`, and where in the repository a page points."""
    rest, _, query = rest.partition("#")[0].partition("?")
    parts = [unquote(part) for part in rest.split("/") if part]
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    if parts and parts[0] == "models":
        parts = parts[1:]
    if parts and parts[0] in ("datasets", "spaces", "buckets", "collections", "papers", "docs"):
        _refuse(text, "it does not name a model")
    if len(parts) < 2:
        _refuse(text, "it names no repository (org/name)")
    # Tags and revisions may hold slashes; only `name@revision/file.gguf` reads on as a path.
    is_file = parts[-1].lower().endswith(".gguf")
    if ":" in parts[1] or ("@" in parts[1] and (":" in rest or not is_file)):
        return _parse_repo(text, "/".join(parts))
    base = _parse_repo(text, "/".join(parts[:2]))
    tag, revision = base.tag, base.revision
    where = parts[2:]
    if revision == "refs":
        revision, where = "/".join(["refs", *where[:2]]), where[2:]
    if len(where) >= 2 and where[0] in ("blob", "resolve", "raw", "tree"):
        n_revision = 3 if where[1] == "refs" and len(where) >= 4 else 1
        revision = _checked_revision(text, "/".join(where[1 : 1 + n_revision]))
        inside = where[1 + n_revision :]
        if where[0] == "tree":
            tag = inside[-1] if inside and is_quant(inside[-1]) else tag
        elif inside and inside[-1].lower().endswith(".gguf"):
            tag = _checked_tag(text, "/".join(inside))
    elif where and where[-1].lower().endswith(".gguf"):
        tag = _checked_tag(text, "/".join(where))
    shown = parse_qs(query).get("show_file_info") if query else None
    if shown and shown[0].lower().endswith(".gguf"):
        tag = _checked_tag(text, shown[0])
    return RepoRef(base.repo, tag, None if revision == "main" else revision)


def _parse_repo(text: str, rest: str) -> RepoRef:
    repo, revision, tag = _split_suffixes(text, rest)
    if repo.endswith(".git"):
        repo = repo.removesuffix(".git")
    if _REPO.fullmatch(repo) is None or "--" in repo or ".." in repo or len(repo) > 96:
        _refuse(text, "it is neither org/name nor an existing path")
    return RepoRef(repo, tag, None if revision == "main" else revision)


def _split_suffixes(text: str, rest: str) -> tuple[str, str | None, str | None]:
    """`name[@revision][:tag]`, or `name[:tag][@revision]` -> (name, revision, tag)."""
    name, colon, tag = rest.partition(":")
    name, at, revision = name.partition("@")
    if colon and not at and "@" in tag and not tag.lower().endswith(".gguf"):
        tag, at, revision = tag.partition("@")
    return (
        name,
        _checked_revision(text, revision) if at else None,
        _checked_tag(text, tag) if colon else None,
    )


def _checked_revision(text: str, revision: str) -> str:
    parts = revision.split("/")
    if _REVISION.fullmatch(revision) is None or ".." in revision or not all(parts):
        _refuse(text, "what follows @ is not a branch, tag or commit")
    return revision


def _checked_tag(text: str, tag: str) -> str:
    """A tag that is a quant, or a relative path to a `.gguf` file inside the repository."""
    if _QUANT_TAG.fullmatch(tag) is not None:
        return tag
    parts = tag.split("/")
    harmless = not any(part in ("", ".", "..") for part in parts) and "\\" not in tag
    if tag.lower().endswith(".gguf") and harmless and len(tag) <= 512 and escape_line(tag) == tag:
        return tag
    _refuse(text, "what follows the colon is neither a quant nor a file name")

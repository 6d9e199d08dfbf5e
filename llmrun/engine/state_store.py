"""Saved prefixes on disk: what one process read, another need not read again.

One file holds one sequence:

    magic, lengths, SHA-256 of the head, SHA-256 of the body    fixed size, see `_FIXED`
    head: JSON (key, owner, checkpoints …), then the tokens as little-endian int32
    body: the state, then the states of the checkpoints

The SHA-256 of the head covers the fixed part too, so that every byte of the file is under one of
both. The library below believes a state that it is given: nothing reaches it from a file that is
not, byte for byte, what was written under the very key that is asked for. A file is written beside
its place and moved there, so that a reader, also after a kill, sees all of it or nothing; a power
cut can leave less, which the sums tell.

Any number of processes may use the folder at once. Only the user may look into it: tokens are text.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmrun.engine.prefix_cache import window_allows
from llmrun.engine.radix import common_prefix
from llmrun.engine.types import ModelFacts, SavedPrefix, StateBytes

_MAGIC = b"llmrunP1"
# Magic; bytes of JSON; tokens; bytes of the body; SHA-256 of the head, of the body.
_FIXED = struct.Struct("<8sIIQ32s32s")
_HEAD_SUM_AT = 24  # the first SHA-256 covers what is before it, the second one and the head
_MAX_JSON_BYTES = 1 << 16
_MAX_TOKENS = 1 << 27
_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}\.state")
_UNFINISHED = "unfinished-"
_UNFINISHED_S = 3600.0  # no write takes so long
_SPARE_DISK_BYTES = 512 << 20  # a cache must not be what fills the disk


@dataclass(frozen=True, slots=True)
class PrefixKey:
    """What must be the same for a state to be valid: the model's file (its SHA-256, or what tells
    one file from another), `EngineLike.state_key`, and a hash of the chat template."""

    model: str
    engine: str
    template: str

    @property
    def name(self) -> str:
        return _digest(json.dumps(asdict(self), sort_keys=True))


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """A file of the folder. `title` is the model as the user wrote it, `owner` whose it is; an
    `unfinished` one is what a kill left behind. `used_s`: seconds since the epoch."""

    path: Path
    n_bytes: int
    used_s: float
    title: str = ""
    owner: str = ""
    n_tokens: int = 0
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """A saved prefix that starts as a prompt does: `n_common` tokens are the same, of which
    `n_usable` need not be computed again (less where the model forgets)."""

    path: Path
    n_tokens: int
    n_common: int
    n_usable: int


@dataclass(frozen=True, slots=True)
class _Head:
    key: PrefixKey
    owner: str
    title: str
    pos_min: int
    state_bytes: int
    checkpoints: tuple[tuple[int, int], ...]  # tokens, bytes
    tokens: tuple[int, ...]
    body_bytes: int
    body_sum: bytes


class _DamagedError(Exception):
    """The file is not as it was written."""


class _ForeignError(Exception):
    """The file was never ours, or another version's."""


class StateStore:
    """Saved prefixes in `folder`, of `max_bytes` in all: the least recently used goes first.

    Nothing here raises for the disk's sake: what cannot be read is not there, and what cannot be
    written is not kept. `on_problem` is told of files that were ignored, in a sentence.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        on_problem: Callable[[str], None] = lambda problem: None,
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._on_problem = on_problem

    def find(self, key: PrefixKey, tokens: Sequence[int], facts: ModelFacts) -> Match | None:
        """The saved prefix without an owner that saves the most of reading `tokens`."""
        found: list[Match] = []
        wanted = tuple(tokens)
        for path in self._files(f"{key.name}-*.state"):
            head = self._read_head(path, key, "")
            if head is not None:
                n_common = min(common_prefix(head.tokens, wanted), len(wanted) - 1)
                n_usable = _count_usable(head, n_common, facts)
                found.append(Match(path, len(head.tokens), n_common, n_usable))
        found = [match for match in found if match.n_common > 0]
        return max(found, key=lambda match: (match.n_usable, match.n_common), default=None)

    def load(self, key: PrefixKey, match: Match) -> SavedPrefix | None:
        """All of a match; None when it is damaged, or gone by now. Counts as a use."""
        return self._load(match.path, key, "")

    def load_owned(self, key: PrefixKey, owner: str) -> SavedPrefix | None:
        """What was saved for `owner` under this key, or None. Counts as a use."""
        path = self.folder / _file_name(key, owner)
        return self._load(path, key, owner) if path.exists() else None

    def save(
        self,
        key: PrefixKey,
        saved: SavedPrefix,
        *,
        owner: str = "",
        title: str = "",
        replaces: Match | None = None,
    ) -> bool:
        """Keep `saved`: in place of what `owner` had, or, without one, of `replaces`. False when
        it is too large or cannot be written."""
        head = {
            **asdict(key),
            "owner": owner,
            "title": title[:1000],
            "pos_min": saved.pos_min,
            "state": len(saved.state),
            "checkpoints": [[n, len(state)] for n, state in saved.checkpoints],
        }
        front = _encode_front(head, saved)
        n_bytes = len(front) + saved.n_bytes
        if n_bytes > self.max_bytes:
            return False
        path = self.folder / _file_name(key, owner, saved.tokens)
        fresh = self.folder / f"{_UNFINISHED}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            self._make_room(n_bytes, path)
            if shutil.disk_usage(self.folder).free - n_bytes < _SPARE_DISK_BYTES:
                return False
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb", buffering=0) as out:
                for part in (front, saved.state, *(state for _, state in saved.checkpoints)):
                    _write_all(out, part)
            os.replace(fresh, path)
        except OSError:
            _remove(fresh)
            return False
        except BaseException:
            _remove(fresh)
            raise
        if replaces is not None and replaces.path != path:
            _remove(replaces.path)
        return True

    def forget(self, owner: str) -> None:
        """Delete all that was saved for `owner`, whatever the key."""
        for path in self._files(f"*-{_digest(owner)}.state"):
            _remove(path)

    def list(self) -> tuple[StoredPrefix, ...]:
        """Every file there is, the largest first. What a kill left unfinished counts; what is just
        being written does not."""
        found = []
        for path in self._files("*"):
            try:
                status = path.lstat()
            except OSError:
                continue
            if path.name.startswith(_UNFINISHED):
                if _is_left(path.name, status.st_mtime):
                    found.append(
                        StoredPrefix(path, status.st_size, status.st_mtime, unfinished=True)
                    )
            elif _NAME.fullmatch(path.name):
                head = self._read_head(path)
                found.append(
                    StoredPrefix(path, status.st_size, status.st_mtime)
                    if head is None
                    else StoredPrefix(
                        path,
                        status.st_size,
                        status.st_mtime,
                        head.title,
                        head.owner,
                        len(head.tokens),
                    )
                )
        return tuple(sorted(found, key=lambda stored: (-stored.n_bytes, stored.path.name)))

    def remove(self, stored: Iterable[StoredPrefix]) -> int:
        """Delete these; the bytes freed."""
        return sum(entry.n_bytes for entry in stored if _remove(entry.path))

    # ---- inside

    def _files(self, pattern: str) -> Iterator[Path]:
        # Somebody else's folder could hold anything.
        try:
            owner = self.folder.stat().st_uid
        except OSError:
            return
        if not hasattr(os, "getuid") or owner == os.getuid():
            yield from sorted(self.folder.glob(pattern))

    def _read_head(self, path: Path, key: PrefixKey | None = None, owner: str = "") -> _Head | None:
        """The head of a file, if it is sound and (with a key) what is asked for."""
        with self._opened(path) as file:
            if file is None:
                return None
            head = _read_head(file)
            if key is None or (head.key == key and head.owner == owner):
                return head
            if head.owner == owner:
                raise _ForeignError("it belongs to another model or build")
        return None

    def _load(self, path: Path, key: PrefixKey, owner: str) -> SavedPrefix | None:
        loaded: SavedPrefix | None = None
        with self._opened(path) as file:
            if file is None:
                return None
            head = _read_head(file)
            if head.body_bytes > self.max_bytes:
                return None
            if head.key != key or head.owner != owner:
                raise _ForeignError("it belongs to another model or build")
            loaded = _read_body(file, head)
        if loaded is not None:
            with contextlib.suppress(OSError):
                os.utime(path)
        return loaded

    @contextlib.contextmanager
    def _opened(self, path: Path) -> Iterator[BinaryIO | None]:
        """The file, None when it cannot be read. A damaged one is removed."""
        try:
            handle = os.open(path, _OPEN_FLAGS)
        except OSError:
            yield None
            return
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            yield None
            return
        with os.fdopen(handle, "rb", buffering=0) as file:
            try:
                yield file
                return
            except _ForeignError as error:
                self._on_problem(f"the saved prefix {path.name} is ignored: {error}")
            except _DamagedError as error:
                self._on_problem(
                    f"the saved prefix {path.name} is damaged and was removed: {error}"
                )
                _remove(path)
            except OSError:
                return

    def _make_room(self, n_bytes: int, target: Path) -> None:
        """Let old files go, so that `n_bytes` more, in the place of `target`, are within bounds."""
        entries: list[tuple[float, int, Path]] = []
        with os.scandir(self.folder) as items:
            for item in items:
                path = Path(item.path)
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process is at it as well
                    continue
                if item.name.startswith(_UNFINISHED):
                    if _is_left(item.name, status.st_mtime):
                        _remove(path)
                elif _NAME.fullmatch(item.name) and path != target:
                    entries.append((status.st_mtime, status.st_size, path))
        n_bytes += sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if n_bytes <= self.max_bytes:
                return
            _remove(path)
            n_bytes -= size


# Neither a link nor something that makes the opener wait, whatever lies there.
_OPEN_FLAGS: int = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
    _OPEN_FLAGS |= getattr(os, _name, 0)


def identify_files(paths: Sequence[Path]) -> str:
    """Tells a model's files from all others: their SHA-256 where the hub's cache names them by it,
    else their places, sizes and times."""
    parts = []
    for path in paths:
        real = path.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", real.name):
            parts.append(real.name)
            continue
        status = real.stat()
        parts.append(f"{real}:{status.st_size}:{status.st_mtime_ns}")
    return parts[0] if len(parts) == 1 else _digest("\n".join(parts))


def hash_text(text: str) -> str:
    """A short hash, for the template of a `PrefixKey`."""
    return _digest(text)


def _count_usable(head: _Head, n_common: int, facts: ModelFacts) -> int:
    """Tokens that need not be computed when the first `n_common` are the same; see
    `PrefixCache._usable`, which decides in the end."""
    n_held = len(head.tokens)
    can_cut = not (facts.is_recurrent or facts.is_hybrid)
    if n_common == n_held:
        return n_common
    if can_cut and window_allows(n_common, n_held, head.pos_min, facts.n_swa):
        return n_common
    return max((n for n, _ in head.checkpoints if n <= n_common), default=0)


def _encode_front(head: dict[str, Any], saved: SavedPrefix) -> bytes:
    """All that comes before the body."""
    words = json.dumps(head, sort_keys=True).encode()
    tokens = array.array("i", saved.tokens)
    if sys.byteorder == "big":
        tokens.byteswap()
    body = hashlib.sha256(saved.state)
    for _, state in saved.checkpoints:
        body.update(state)
    lengths = (len(words), len(tokens), saved.n_bytes)
    fixed = _FIXED.pack(_MAGIC, *lengths, bytes(32), body.digest())
    rest = words + tokens.tobytes()
    head_sum = _sum_head(fixed, rest)
    return _FIXED.pack(_MAGIC, *lengths, head_sum, body.digest()) + rest


def _sum_head(fixed: bytes, rest: bytes) -> bytes:
    after = _HEAD_SUM_AT + 32
    return hashlib.sha256(fixed[:_HEAD_SUM_AT] + fixed[after:] + rest).digest()


def _read_head(file: BinaryIO) -> _Head:
    n_bytes = os.fstat(file.fileno()).st_size
    fixed = _read_all(file, _FIXED.size)
    if bytes(fixed[: len(_MAGIC)]) != _MAGIC:
        raise _ForeignError("it is none of this version's")
    _, n_words, n_tokens, body_bytes, head_sum, body_sum = _FIXED.unpack(fixed)
    if n_words > _MAX_JSON_BYTES or n_tokens > _MAX_TOKENS:
        raise _DamagedError("its lengths make no sense")
    if n_bytes != _FIXED.size + n_words + 4 * n_tokens + body_bytes:
        raise _DamagedError("it has another length than it says")
    rest = _read_all(file, n_words + 4 * n_tokens)
    if _sum_head(bytes(fixed), bytes(rest)) != head_sum:
        raise _DamagedError("its SHA-256 is not right")
    tokens = array.array("i", bytes(rest[n_words:]))
    if sys.byteorder == "big":
        tokens.byteswap()
    try:
        words = json.loads(bytes(rest[:n_words]))
        checkpoints = tuple((int(n), int(size)) for n, size in words["checkpoints"])
        head = _Head(
            PrefixKey(words["model"], words["engine"], words["template"]),
            words["owner"],
            words["title"],
            int(words["pos_min"]),
            int(words["state"]),
            checkpoints,
            tuple(tokens),
            body_bytes,
            body_sum,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _DamagedError("its head cannot be read") from error
    if head.state_bytes + sum(size for _, size in checkpoints) != body_bytes:
        raise _DamagedError("its parts do not add up")
    return head


def _read_body(file: BinaryIO, head: _Head) -> SavedPrefix:
    """What follows the head, into one buffer that the parts are views of."""
    body = _read_all(file, head.body_bytes)
    if hashlib.sha256(body).digest() != head.body_sum:
        raise _DamagedError("its SHA-256 is not right")
    parts: list[tuple[int, StateBytes]] = []
    start = head.state_bytes
    for n_tokens, size in head.checkpoints:
        parts.append((n_tokens, body[start : start + size]))
        start += size
    return SavedPrefix(head.tokens, body[: head.state_bytes], head.pos_min, tuple(parts))


def _read_all(file: BinaryIO, n_bytes: int) -> memoryview:
    data = memoryview(bytearray(n_bytes))
    done = 0
    while done < n_bytes:
        n = file.readinto(data[done:])  # type: ignore[attr-defined]
        if not n:
            raise _DamagedError("it ends too early")
        done += n
    return data


def _write_all(file: BinaryIO, data: StateBytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _file_name(key: PrefixKey, owner: str, tokens: Sequence[int] = ()) -> str:
    whose = _digest(owner) if owner else _digest(repr(tuple(tokens)))
    return f"{key.name}-{whose}.state"


def _is_left(name: str, written_s: float) -> bool:
    """Whether nobody writes this unfinished file any more. To be wrong does no harm: a writer whose
    file is gone keeps nothing."""
    pid = name.removeprefix(_UNFINISHED).partition("-")[0]
    if os.name == "posix" and pid.isdecimal():
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:
            pass
    return time.time() - written_s > _UNFINISHED_S


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True

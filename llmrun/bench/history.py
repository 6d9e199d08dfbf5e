"""Earlier runs of `bench`, kept in the state folder, so that one can be held against another.

One SQLite file that several processes may write at once. A file that is damaged is set aside and
begun anew; one that a newer version wrote is left as it is. Both are told through `notify`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmrun.bench.record import from_dict, to_dict
from llmrun.bench.types import BenchRun
from llmrun.errors import LlmrunError, NotFoundError, UsageError

if TYPE_CHECKING:
    import sqlite3

_T = TypeVar("_T")

MAX_RUNS = 500
"""The oldest go first."""

SCHEMA_VERSION = 1

_NAME = "bench.sqlite3"
_LOCK_WAIT_S = 5.0
_MAX_RUN_BYTES = 1 << 20
# What SQLite may have beside a database: a journal of the damaged file must not be applied to the
# new one.
_COMPANIONS = ("", "-journal", "-wal", "-shm")
_LAST = re.compile(r"last(?:~([0-9]{1,4}))?")

_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    started_at REAL NOT NULL,
    model TEXT NOT NULL,
    model_sha256 TEXT,
    target TEXT NOT NULL,
    body TEXT NOT NULL
)
"""
_INSERT = """
INSERT OR REPLACE INTO runs (id, started_at, model, model_sha256, target, body)
VALUES (?, ?, ?, ?, ?, ?)
"""


class _NewerSchemaError(Exception):
    """The file was written by a version that knows more."""


def new_id(started_at: float) -> str:
    """A run's id that sorts by time: `20260131-142501-3fa9` (UTC)."""
    return f"{datetime.fromtimestamp(started_at, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class History:
    """The runs in the folder `state_dir`, which is made when something is added."""

    def __init__(self, state_dir: Path, notify: Callable[[str], None] | None = None) -> None:
        self._state_dir = state_dir
        self._notify = notify or _keep_silent

    @property
    def path(self) -> Path:
        return self._state_dir / _NAME

    def add(self, run: BenchRun) -> bool:
        """Keep a run; one of the same id is replaced. False, with a notice, when it cannot be:
        what was measured must not be lost for that."""
        body = json.dumps(to_dict(run), allow_nan=False)
        if len(body) > _MAX_RUN_BYTES:
            self._notify("this run is too large for the history and is not kept in it")
            return False
        values = (
            _storable(run.id),
            run.started_at,
            _storable(run.model),
            run.model_sha256,
            _storable(run.target),
            body,
        )

        def write(connection: sqlite3.Connection) -> bool:
            connection.execute(_INSERT, values)
            connection.execute(
                "DELETE FROM runs WHERE number NOT IN "
                "(SELECT number FROM runs ORDER BY number DESC LIMIT ?)",
                (MAX_RUNS,),
            )
            return True

        try:
            return self._with_database(write, create=True) or False
        except LlmrunError as error:
            self._notify(f"this run is not kept in the history: {error.why or error.message}")
            return False

    def list(self, model: str | None = None, *, n: int = MAX_RUNS) -> tuple[BenchRun, ...]:
        """The newest `n` runs, the newest first; of `model` alone (its name or sha256) if given.
        Raises LlmrunError when the file cannot be read."""
        where = ""
        values: tuple[object, ...] = (n,)
        if model is not None:
            where = "WHERE model = ?1 OR model_sha256 = ?1"
            values = (_storable(model), n)
        query = f"SELECT id, body FROM runs {where} ORDER BY number DESC LIMIT ?"  # noqa: S608

        def read(connection: sqlite3.Connection) -> list[tuple[object, object]]:
            return connection.execute(query, values).fetchall()

        found = [_parse(body) for _, body in self._with_database(read) or ()]
        runs = tuple(run for run in found if run is not None)
        if len(runs) < len(found):
            self._notify(f"{len(found) - len(runs)} runs of the history cannot be read")
        return runs

    def get(self, reference: str) -> BenchRun:
        """The run of this id, or the only one whose id begins so; "last" is the newest and
        "last~2" the second before it. Raises NotFoundError, UsageError when several begin so, and
        LlmrunError when the file cannot be read."""
        match = _LAST.fullmatch(reference)

        def read(connection: sqlite3.Connection) -> list[tuple[object, object]]:
            if match is not None:
                return connection.execute(
                    "SELECT id, body FROM runs ORDER BY number DESC LIMIT 1 OFFSET ?",
                    (int(match.group(1) or 0),),
                ).fetchall()
            return connection.execute(
                "SELECT id, body FROM runs WHERE id = ?1 OR substr(id, 1, length(?1)) = ?1 "
                "ORDER BY id != ?1, number DESC LIMIT 4",
                (_storable(reference),),
            ).fetchall()

        rows = (self._with_database(read) or []) if reference else []
        if not rows:
            raise NotFoundError(
                f"no run {reference!r} in the history",
                why="" if match is None else "there are not so many",
                hint="llmrun bench history",
            )
        ids = [str(found) for found, _ in rows]
        if len(rows) > 1 and ids[0] != reference:
            raise UsageError(
                f"{reference!r} can mean several runs",
                why=", ".join(ids[:3]) + (", …" if len(ids) > 3 else ""),
                hint="write more of the id",
            )
        run = _parse(rows[0][1])
        if run is None:
            raise LlmrunError(f"the run {ids[0]} of the history cannot be read")
        return run

    def _with_database(
        self, use: Callable[[sqlite3.Connection], _T], *, create: bool = False
    ) -> _T | None:
        """What `use` returns, in one transaction; None where nothing was ever kept, or was lost."""
        import sqlite3

        try:
            if create:
                self._state_dir.mkdir(parents=True, exist_ok=True)
            elif not self.path.exists():
                return None
            try:
                opened = _identity(self.path)
                return self._use(use, create)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._set_aside(opened)
                return self._use(use, create) if create else None
        except _NewerSchemaError:
            raise LlmrunError(
                "the history of bench was written by a newer llmrun",
                why=f"{self.path} has a format that this version does not know",
                hint="upgrade llmrun",
            ) from None
        except (OSError, sqlite3.Error) as error:
            raise LlmrunError(
                "the history of bench cannot be used", why=f"{self.path}: {error}"
            ) from error

    def _use(self, use: Callable[[sqlite3.Connection], _T], create: bool) -> _T | None:
        import sqlite3

        connection = sqlite3.connect(self.path, timeout=_LOCK_WAIT_S, isolation_level=None)
        try:
            # A writer takes the lock at once, so that two never wait for each other.
            connection.execute("BEGIN IMMEDIATE" if create else "BEGIN")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise _NewerSchemaError
            if version < SCHEMA_VERSION:
                if not create:
                    return None
                connection.execute(_TABLE)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
            result = use(connection)
            connection.execute("COMMIT")
            return result
        finally:
            connection.close()

    def _set_aside(self, opened: tuple[int, int] | None) -> None:
        """Move the damaged file away, unless another process already did."""
        if opened is None or _identity(self.path) != opened:
            return
        aside = self.path.with_name(f"{_NAME}.damaged-{time.time_ns()}")
        for ending in _COMPANIONS:
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{ending}", f"{aside}{ending}")
        self._notify(f"the history of bench was damaged; it was moved to {aside} and begun anew")


def _parse(body: object) -> BenchRun | None:
    try:
        return from_dict(json.loads(body)) if isinstance(body, str) else None
    except (ValueError, RecursionError):
        return None


def _storable(text: str) -> str:
    """SQLite has no place for the lone surrogates of undecodable file names."""
    return text.encode("utf-8", "replace").decode()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is at fault, and not its being locked or the disk's being full."""
    import sqlite3

    if not isinstance(error, sqlite3.OperationalError):
        return type(error) is sqlite3.DatabaseError
    return str(error).startswith(("no such column", "no such table", "table runs has no column"))


def _keep_silent(notice: str) -> None:
    pass

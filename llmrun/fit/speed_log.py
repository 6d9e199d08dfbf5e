"""How fast models ran on this machine, kept in the state folder; it replaces forecasts.

One SQLite file that several processes may write at once. It is a convenience: what cannot be read
or written is left out, and a damaged file is replaced by an empty one. Nothing here raises.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from llmrun.fit.speed import forecast

if TYPE_CHECKING:
    import sqlite3

    from llmrun.fit.plan import Plan
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.machine import Machine

_T = TypeVar("_T")

MAX_ROWS = 2000
_NAME = "speed.sqlite3"
_MAX_FILE_BYTES = 8 << 20
_LOCK_WAIT_S = 2.0
# A run of fewer tokens says little about speed.
_LEAST_TOKENS = 16
# So many of the newest runs count.
_LAST_RUNS = 8

_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    machine TEXT NOT NULL,
    build TEXT NOT NULL,
    model TEXT NOT NULL,
    settings TEXT NOT NULL,
    place TEXT NOT NULL,
    tok_s REAL NOT NULL,
    n_tokens INTEGER NOT NULL,
    forecast_tok_s REAL,
    planned_bytes INTEGER,
    measured_bytes INTEGER
)
"""
_INSERT = """
INSERT INTO runs (at, machine, build, model, settings, place, tok_s, n_tokens, forecast_tok_s,
    planned_bytes, measured_bytes)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


@dataclass(frozen=True, slots=True)
class SpeedKey:
    """What a speed was measured for. `build` is the engine's version with its backends. `place`:
    where the layers were, because a machine's CPU and GPU miss their forecasts differently."""

    machine: str
    build: str
    model: str
    settings: str
    place: Literal["gpu", "mixed", "cpu"]

    @classmethod
    def of(cls, machine: Machine, build: str, info: ModelInfo, plan: Plan) -> SpeedKey:
        """The key of running `info` as planned. Free memory and the length of the context are not
        in it: they do not decide the speed."""
        setup, placement = plan.setup, plan.placement
        settings = [
            placement.n_on_gpu,
            setup.n_cpu_moe,
            list(setup.tensor_split),
            setup.type_k,
            setup.type_v,
            setup.flash_attn,
            setup.use_repack,
            plan.n_threads,
        ]
        place: Literal["gpu", "mixed", "cpu"] = "cpu"
        if placement.n_on_gpu:
            place = "gpu" if placement.is_whole else "mixed"
        return cls(_machine_key(machine), build, _model_key(info), json.dumps(settings), place)


@dataclass(frozen=True, slots=True)
class SpeedLog:
    """The log in the folder `state_dir`, which is made when something is recorded."""

    state_dir: Path

    @property
    def path(self) -> Path:
        return self.state_dir / _NAME

    def record(
        self,
        key: SpeedKey,
        *,
        tok_s: float,
        n_tokens: int,
        forecast_tok_s: float | None = None,
        planned_bytes: int | None = None,
        measured_bytes: int | None = None,
    ) -> bool:
        """Keep one run: `n_tokens` were decoded at `tok_s`. `forecast_tok_s` is the middle of the
        uncorrected forecast. False when it was too short to mean anything, or not kept."""
        if n_tokens < _LEAST_TOKENS or not (math.isfinite(tok_s) and tok_s > 0):
            return False
        values = (
            time.time(),
            key.machine,
            key.build,
            key.model,
            key.settings,
            key.place,
            tok_s,
            n_tokens,
            forecast_tok_s,
            planned_bytes,
            measured_bytes,
        )

        def write(connection: sqlite3.Connection) -> bool:
            connection.execute(_INSERT, values)
            connection.execute(
                "DELETE FROM runs WHERE id <= (SELECT MAX(id) FROM runs) - ?", (MAX_ROWS,)
            )
            return True

        return self._with_database(write, create=True) or False

    def lookup(self, key: SpeedKey) -> float | None:
        """Tokens a second that this very combination reached: the median of its last runs."""

        def read(connection: sqlite3.Connection) -> float | None:
            rows = connection.execute(
                "SELECT tok_s FROM runs WHERE machine = ? AND build = ? AND model = ? "
                "AND settings = ? ORDER BY id DESC LIMIT ?",
                (key.machine, key.build, key.model, key.settings, _LAST_RUNS),
            ).fetchall()
            return _median([row[0] for row in rows])

        return self._with_database(read)

    def machine_efficiency(self, key: SpeedKey) -> float | None:
        """How other models in the same kind of place ran here against their forecasts: the median
        over models, 1.0 being as forecast. None when none ran."""

        def read(connection: sqlite3.Connection) -> float | None:
            rows = connection.execute(
                "SELECT model, tok_s / forecast_tok_s FROM runs WHERE machine = ? AND build = ? "
                "AND place = ? AND model != ? AND forecast_tok_s > 0 ORDER BY id DESC LIMIT 200",
                (key.machine, key.build, key.place, key.model),
            ).fetchall()
            ratios: dict[str, list[object]] = {}
            for model, ratio in rows:
                ratios.setdefault(str(model), []).append(ratio)
            medians = [_median(some) for some in ratios.values()]
            return _median([value for value in medians if value is not None])

        return self._with_database(read)

    def improve(self, plan: Plan, machine: Machine, build: str, info: ModelInfo) -> Plan:
        """The plan with the forecast that this log knows better."""
        key = SpeedKey.of(machine, build, info, plan)
        measured = self.lookup(key)
        efficiency = None if measured is not None else self.machine_efficiency(key)
        if measured is None and efficiency is None:
            return plan
        better = forecast(info, plan.placement, machine, measured=measured, efficiency=efficiency)
        return replace(plan, forecast=better)

    def _with_database(
        self, use: Callable[[sqlite3.Connection], _T], *, create: bool = False
    ) -> _T | None:
        """What `use` returns, in one transaction; None when it cannot be had."""
        import sqlite3

        try:
            if create:
                self.state_dir.mkdir(parents=True, exist_ok=True)
            elif not self.path.exists():
                return None
            if self.path.exists() and self.path.stat().st_size > _MAX_FILE_BYTES:
                self.path.unlink()
            try:
                return self._use(use)
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    return None
                self.path.unlink(missing_ok=True)
                return self._use(use) if create else None
        except (OSError, sqlite3.Error):
            return None

    def _use(self, use: Callable[[sqlite3.Connection], _T]) -> _T:
        import sqlite3

        connection = sqlite3.connect(self.path, timeout=_LOCK_WAIT_S)
        try:
            with connection:
                # Losing the last run to a power cut is no loss.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute(_TABLE)
                return use(connection)
        finally:
            connection.close()


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file is at fault, and not its being locked or the disk's being full."""
    import sqlite3

    if not isinstance(error, sqlite3.OperationalError):
        return True
    return str(error).startswith(("no such column", "table runs has no column"))


def _median(values: list[object]) -> float | None:
    numbers = [v for v in values if isinstance(v, float | int) and math.isfinite(v) and v > 0]
    return float(statistics.median(numbers)) if numbers else None


def _machine_key(machine: Machine) -> str:
    return _digest(
        machine.platform,
        machine.arch,
        machine.cpu.name,
        machine.cpu.n_physical,
        machine.memory.total_bytes >> 28,
        [(device.name, device.description, device.total_bytes >> 28) for device in machine.devices],
    )


def _model_key(info: ModelInfo) -> str:
    return _digest(info.architecture, info.name, info.quant, info.n_bytes, info.n_params)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

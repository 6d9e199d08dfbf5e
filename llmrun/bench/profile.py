"""The settings that `bench --tune` found for a model on this machine, kept in the state folder.

One small JSON file a model and machine. What cannot be read, or holds anything but settings within
their bounds, counts as not there: a profile makes things faster, nothing depends on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from llmrun.engine.types import KvType, Speculative
from llmrun.fit.speed_log import SpeedKey

if TYPE_CHECKING:
    from llmrun.fit.plan import Plan
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.machine import Machine

_FORMAT = 1
_FOLDER = "profiles"
_MAX_FILE_BYTES = 1 << 16
_MAX_THREADS = 4096
_MAX_UBATCH = 1 << 16


@dataclass(frozen=True, slots=True)
class Profile:
    """Settings that were the fastest. `build` is the engine's build that they were found with;
    `gain` how much faster than the plan's own settings they were (1.2: a fifth)."""

    n_threads: int
    n_threads_batch: int
    n_ubatch: int
    kv_type: KvType
    speculative: Speculative
    build: str
    gain: float
    tuned_at: float


def save_profile(
    state_dir: Path, machine: Machine, info: ModelInfo, plan: Plan, profile: Profile
) -> Path:
    """Keep it, in the place of an earlier one. Raises OSError."""
    path = _path(state_dir, machine, info, plan)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(
            json.dumps({"format": _FORMAT, "model": info.name, **asdict(profile)}), "utf-8"
        )
        os.replace(fresh, path)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    return path


def load_profile(
    state_dir: Path, machine: Machine, info: ModelInfo, plan: Plan, build: Callable[[], str]
) -> Profile | None:
    """The profile of this model on this machine, if there is one that was found with this build of
    the engine (`build` is asked only then)."""
    path = _path(state_dir, machine, info, plan)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return None
        found = _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    return found if found is not None and found.build == build() else None


def remove_profile(state_dir: Path, machine: Machine, info: ModelInfo, plan: Plan) -> None:
    """So that the plan's own settings are used again. Raises OSError."""
    _path(state_dir, machine, info, plan).unlink(missing_ok=True)


def _path(state_dir: Path, machine: Machine, info: ModelInfo, plan: Plan) -> Path:
    key = SpeedKey.of(machine, "", info, plan)
    return state_dir / _FOLDER / f"{key.model}-{key.machine}.json"


def _parse(value: object) -> Profile | None:
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        return None
    counts = (
        ("n_threads", _MAX_THREADS),
        ("n_threads_batch", _MAX_THREADS),
        ("n_ubatch", _MAX_UBATCH),
    )
    for key, most in counts:
        number = value.get(key)
        if type(number) is not int or not 1 <= number <= most:
            return None
    if value.get("kv_type") not in get_args(KvType):
        return None
    if value.get("speculative") not in get_args(Speculative):
        return None
    numbers = (value.get("gain"), value.get("tuned_at"))
    if not all(type(number) in (int, float) for number in numbers):
        return None
    if not isinstance(value.get("build"), str):
        return None
    return Profile(
        n_threads=value["n_threads"],
        n_threads_batch=value["n_threads_batch"],
        n_ubatch=value["n_ubatch"],
        kv_type=cast(KvType, value["kv_type"]),
        speculative=cast(Speculative, value["speculative"]),
        build=value["build"],
        gain=float(value["gain"]),
        tuned_at=min(float(value["tuned_at"]), time.time()),
    )

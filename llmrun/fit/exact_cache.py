"""Exact answers kept on disk: the same library on the same processor always answers the same.

One JSON file a model; what cannot be read or written is as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from llmrun.fit.types import BufferUse, Measurement, Setup
from llmrun.gguf.types import ModelInfo

_FORMAT = 1
_MAX_FILE_BYTES = 1 << 20
_MAX_ANSWERS = 500
_MAX_FILES = 200
_MAX_BUFFERS = 64


@dataclass(frozen=True, slots=True)
class KnownAnswers:
    """What was measured of one model, and the GPUs that there were."""

    devices: tuple[str, ...]
    measurements: Mapping[Setup, Measurement]


class AnswerFile:
    """The answers for one model with one build on one machine."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / f"{key}.json"

    def load(self, setups: Sequence[Setup]) -> KnownAnswers:
        """The measurements there are for `setups`."""
        devices, answers = self._read()
        found = {}
        for setup in setups:
            buffers = parse_buffers(answers.get(_name(setup)))
            if buffers is not None:
                found[setup] = Measurement(setup, buffers)
        return KnownAnswers(devices, found)

    def add(self, devices: Sequence[str], measurements: Sequence[Measurement]) -> None:
        """Keep these too. Old answers, and files that were not written for long, make room."""
        old_devices, answers = self._read()
        if old_devices != tuple(devices):
            answers = {}
        for measurement in measurements:
            name = _name(measurement.setup)
            answers.pop(name, None)
            answers[name] = [list(astuple(use)) for use in measurement.buffers]
        kept = dict(list(answers.items())[-_MAX_ANSWERS:])
        text = json.dumps({"format": _FORMAT, "devices": list(devices), "answers": kept})
        try:
            self._write(text)
        except OSError:
            return

    def _read(self) -> tuple[tuple[str, ...], dict[str, object]]:
        try:
            with self._path.open("rb") as file:
                content = json.loads(file.read(_MAX_FILE_BYTES))
        except (OSError, ValueError, RecursionError):
            return (), {}
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return (), {}
        devices, answers = content.get("devices"), content.get("answers")
        if not isinstance(devices, list) or not isinstance(answers, dict):
            return (), {}
        return tuple(str(device) for device in devices), answers

    def _write(self, text: str) -> None:
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        others = [path for path in folder.glob("*.json") if path != self._path]
        if len(others) >= _MAX_FILES:
            others.sort(key=lambda path: path.stat().st_mtime)
            for path in others[: len(others) - _MAX_FILES + 1]:
                path.unlink(missing_ok=True)
        fd, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def parse_buffers(value: object) -> tuple[BufferUse, ...] | None:
    """Buffers from JSON: a list of [buffer, device, weights, kv, compute]. None for all else."""
    if not isinstance(value, list) or not 0 < len(value) <= _MAX_BUFFERS:
        return None
    found = []
    for entry in value:
        match entry:
            case [str(buffer), str(device), *sizes] if _are_sizes(sizes):
                found.append(BufferUse(buffer, device, *sizes))
            case _:
                return None
    return tuple(found)


def _are_sizes(values: list[object]) -> bool:
    return len(values) == 3 and all(type(value) is int and value >= 0 for value in values)


def make_key(info: ModelInfo, library_folder: Path | None, device_key: str) -> str | None:
    """A name for all that an answer depends on but the setup: the library's files, how the engine
    is told to use them, the processor, the devices, and the model's metadata and tensors. The
    weights themselves do not matter, nor the vocabulary's words. None when the library is not
    there."""
    if library_folder is None:
        return None
    digest = hashlib.sha256()

    def take(*parts: object) -> None:
        digest.update(repr(parts).encode("utf-8", "surrogatepass"))

    try:
        for path in sorted(library_folder.iterdir()):
            status = path.stat()
            take(path.name, status.st_size, status.st_mtime_ns)
        for path in _find_engine_code():
            digest.update(path.read_bytes())
    except OSError:
        return None
    take(_FORMAT, platform.machine(), _read_processor(), device_key, info.n_bytes)
    take(sorted(info.header.metadata.items()))
    for tensor in info.header.tensors:
        take(tensor.name, tensor.shape, tensor.type_id, tensor.offset)
    return digest.hexdigest()


def _find_engine_code() -> list[Path]:
    """The modules that turn a setup into llama.cpp's parameters and read its answer."""
    folder = Path(__file__).resolve().parent.parent / "engine"
    return [folder / name for name in ("ggml.py", "params.py", "probe.py", "stubs.py")]


def _read_processor() -> str:
    """What the CPU can do decides which weights llama.cpp reorders for it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 13).splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))


def _name(setup: Setup) -> str:
    return json.dumps(astuple(setup), separators=(",", ":"))

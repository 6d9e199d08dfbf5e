"""What the engine's library says it can use, asked in a child process.

A child, because a sick driver hangs or crashes the process that wakes it, and because a driver's
context takes GPU memory until its process ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from llmrun.hardware.machine import Device, DeviceKind
from llmrun.hardware.sources import Probe
from llmrun.text import escape_line

MODULE = "llmrun.engine.probe"
TIME_LIMIT_S = 15.0
_REQUEST = '{"task": "devices"}\n'
_MAX_DEVICES = 64
_MAX_BYTES = 1 << 50
_MAX_WORDS = 200
_KINDS: Mapping[str, DeviceKind] = {kind: kind for kind in get_args(DeviceKind)}
# ggml's registry names that differ from what people say.
_BACKENDS = {"MTL": "Metal", "HIP": "ROCm"}
_LIBRARY = re.compile(r"(?:lib)?ggml-([a-z0-9_]+)[a-z0-9_-]*\.(?:so|dll|dylib)\b", re.IGNORECASE)
# ggml's libraries that compute on this processor, or on another machine when told to.
_CPU_LIBRARIES = frozenset({"base", "cpu", "blas", "rpc", "zdnn", "zendnn"})


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the engine's library can use, in its own words.

    `devices` are as the library lists them, sizes included: see `sharing.settle_devices`.
    `features` are instruction sets and build options ("AVX2", "OPENMP"). `problem` is a sentence
    when the library could not be asked; all else is then empty.
    """

    devices: tuple[Device, ...] = ()
    features: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    version: str | None = None
    supports_gpu_offload: bool | None = None
    problem: str | None = None


def find_libraries(probe: Probe) -> frozenset[str] | None:
    """The ggml libraries of the installed binding by their short names: "base", "cpu", "cuda".
    None when the binding is not installed."""
    folder = probe.library_folder()
    if folder is None:
        return None
    found = (_LIBRARY.match(name) for name in probe.list_names(folder))
    return frozenset(match[1].lower() for match in found if match)


def has_gpu_library(libraries: frozenset[str] | None) -> bool:
    """Whether a build with these libraries may know a GPU. An unknown library may, and so may a
    build that is not laid out as expected."""
    if libraries is None:
        return False
    return "base" not in libraries or not libraries <= _CPU_LIBRARIES


def ask_engine(probe: Probe, *, always: bool = False) -> EngineReport:
    """What the engine's library can use. Never raises.

    A build without GPU libraries is not asked, as it would cost a process start for nothing, unless
    `always`: the report is then empty, without a problem.
    """
    libraries = find_libraries(probe)
    if libraries is None:
        return EngineReport(problem="llama-cpp-python is not installed")
    if not always and not has_gpu_library(libraries):
        return EngineReport()
    reply = probe.ask_module(MODULE, _REQUEST, TIME_LIMIT_S)
    if reply.problem is not None or reply.stdout is None:
        why = reply.problem or "said nothing"
        return EngineReport(problem=f"the process that lists the engine's devices {why}")
    return parse_report(reply.stdout)


def parse_report(text: str) -> EngineReport:
    """A report from the child's output. Never raises; entries that make no sense are left out."""
    # Some drivers greet on stdout: the answer is the last line.
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        answer = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        return EngineReport(problem="the process that lists the engine's devices gave no answer")
    if "error" in answer:
        words = _clean(answer["error"]) or "it did not say why"
        return EngineReport(problem=f"the engine's devices cannot be listed: {words}")
    devices = answer.get("devices")
    if not isinstance(devices, list):
        return EngineReport(problem="the process that lists the engine's devices gave no list")
    parsed = (_parse_device(entry) for entry in devices[:_MAX_DEVICES])
    offload = answer.get("supports_gpu_offload")
    return EngineReport(
        devices=tuple(device for device in parsed if device is not None),
        # Some carry a value: "ARCHS = 890".
        features=tuple(word.partition(" = ")[0] for word in _words(answer.get("features"))),
        backends=tuple(_BACKENDS.get(word, word) for word in _words(answer.get("backends"))),
        version=_clean(answer.get("version")) or None,
        supports_gpu_offload=offload if isinstance(offload, bool) else None,
    )


def _parse_device(entry: object) -> Device | None:
    if not isinstance(entry, dict):
        return None
    name, word = _clean(entry.get("name")), entry.get("type")
    kind = _KINDS.get(word) if isinstance(word, str) else None
    if not name or kind is None:
        return None
    backend = _clean(entry.get("backend"))
    free, total = _size(entry.get("free")), _size(entry.get("total"))
    return Device(
        name=name,
        description=_clean(entry.get("description")) or name,
        kind=kind,
        free_bytes=free if total else 0,
        total_bytes=total,
        backend=_BACKENDS.get(backend, backend),
    )


def _size(value: object) -> int:
    """0 for what is no size."""
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return value if 0 <= value <= _MAX_BYTES else 0


def _clean(value: object) -> str:
    return escape_line(value.strip())[:_MAX_WORDS] if isinstance(value, str) else ""


def _words(value: object) -> tuple[str, ...]:
    words = map(_clean, value[:_MAX_WORDS]) if isinstance(value, list) else ()
    return tuple(word for word in words if word)

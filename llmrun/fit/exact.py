"""The exact tier: llama.cpp's own allocator, asked in a child process.

The child (`engine.probe`) loads the model without allocating it, from its file or from a stand-in
that has nothing but the header, and tells what each buffer would take.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmrun.fit.exact_cache import AnswerFile, make_key, parse_buffers
from llmrun.fit.types import Measurement, Setup
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.engine_devices import MODULE, find_libraries, has_gpu_library
from llmrun.hardware.processes import ask_command, module_command
from llmrun.hardware.sources import Probe, find_library_folder
from llmrun.text import escape_line

TIME_LIMIT_S = 20.0
_WHO = "the process that asks llama.cpp for its memory"
_MAX_WORDS = 300
_MAX_ANSWER_BYTES = 8 << 20


class _ChildFailedError(Exception):
    """The child gave no answer; the text says why, as the rest of a sentence that names it."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of a model: a path, or the first bytes of a file of `n_bytes`."""

    path: Path | None = None
    name: str = ""
    header: bytes = field(default=b"", repr=False)
    n_bytes: int = 0


class ChildAllocator:
    """Measures one model. See `fit.types.Allocator` for the contract.

    `paths` are the model's files, all shards in order. With `cache`, a folder, and the model's
    `info`, answers are kept there and found again by other processes. Where the installed build
    may use a GPU that needs `device_key` too: words that name the GPUs that are there now.
    `limit_s` bounds each call of `measure`. `command` stands in for the child.

    A failure of the child, or a model that llama.cpp cannot read, sets `problem`, and nothing is
    asked again. A setup that llama.cpp refuses only has no answer; `refusal` tells why.
    """

    def __init__(
        self,
        paths: Sequence[Path | str] = (),
        *,
        info: ModelInfo | None = None,
        cache: Path | None = None,
        device_key: str = "",
        limit_s: float = TIME_LIMIT_S,
        command: Sequence[str] | None = None,
    ) -> None:
        self._parts = [_Part(path=Path(path).absolute()) for path in paths]
        self._limit_s = limit_s
        self._command = command
        self._answers: dict[Setup, Measurement | None] = {}
        self._refusals: dict[Setup, str] = {}
        self._devices: tuple[str, ...] | None = None
        self._problem: str | None = None
        self._file: AnswerFile | None = None
        self._may_have_gpu = has_gpu_library(find_libraries(Probe()))
        if cache is not None and info is not None and (device_key or not self._may_have_gpu):
            key = make_key(info, find_library_folder(), device_key)
            self._file = AnswerFile(cache, key) if key else None

    @classmethod
    def of_headers(
        cls,
        headers: Sequence[tuple[str, bytes, int]],
        *,
        info: ModelInfo | None = None,
        cache: Path | None = None,
        device_key: str = "",
        limit_s: float = TIME_LIMIT_S,
        command: Sequence[str] | None = None,
    ) -> ChildAllocator:
        """A model of which only headers are here: (name, first bytes, size of the whole file) of
        each shard in order. The bytes may go beyond the header."""
        allocator = cls(
            info=info, cache=cache, device_key=device_key, limit_s=limit_s, command=command
        )
        allocator._parts = [
            _Part(name=name, header=header, n_bytes=n_bytes) for name, header, n_bytes in headers
        ]
        return allocator

    @property
    def devices(self) -> tuple[str, ...]:
        if self._devices is None and self._may_have_gpu and self._problem is None:
            answer = self._ask({"task": "devices"})
            entries = answer.get("devices")
            found: dict[object, list[str]] = {"gpu": [], "igpu": []}
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict) and entry.get("type") in ("gpu", "igpu"):
                    found[entry["type"]].append(str(entry.get("name")))
            # llama.cpp uses those inside the processor only where there is no other.
            self._devices = tuple(found["gpu"] or found["igpu"])
        return self._devices or ()

    @property
    def problem(self) -> str | None:
        return self._problem

    def refusal(self, setup: Setup) -> str | None:
        """Why llama.cpp refuses `setup`, as far as it was asked."""
        return self._refusals.get(setup)

    def measure(self, setups: Sequence[Setup]) -> tuple[Measurement | None, ...]:
        missing = [setup for setup in dict.fromkeys(setups) if setup not in self._answers]
        if missing and self._file is not None:
            known = self._file.load(missing)
            self._answers |= known.measurements
            if known.measurements:
                self._devices = known.devices
            missing = [setup for setup in missing if setup not in self._answers]
        if missing and self._problem is None:
            self._measure_now(missing)
        return tuple(self._answers.get(setup) for setup in setups)

    def _measure_now(self, setups: list[Setup]) -> None:
        answer = self._ask({"task": "measure", "setups": [asdict(setup) for setup in setups]})
        answers = answer.get("answers")
        if self._problem is not None:
            return
        if not isinstance(answers, list) or len(answers) != len(setups):
            self._problem = f"{_WHO} gave an answer that makes no sense"
            return
        devices = answer.get("devices")
        self._devices = tuple(map(str, devices)) if isinstance(devices, list) else ()
        # Sizes from the log are rounded, and do not know of reordered weights.
        is_rough = answer.get("source") != "breakdown"
        found = []
        for setup, entry in zip(setups, answers, strict=True):
            buffers = parse_buffers(entry.get("buffers")) if isinstance(entry, dict) else None
            self._answers[setup] = None
            if buffers is not None:
                measurement = self._answers[setup] = Measurement(setup, buffers, is_rough)
                if self._is_repeatable(setup) and not is_rough:
                    found.append(measurement)
            else:
                self._refusals[setup] = _clean(entry)
        if found and self._file is not None:
            self._file.add(self._devices, found)

    def _is_repeatable(self, setup: Setup) -> bool:
        """Without a split of its own, llama.cpp divides by the memory that is free at the time."""
        return len(self._devices or ()) < 2 or bool(setup.tensor_split) or not setup.n_gpu_layers

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The child's answer; empty when there is none, and `problem` says why."""
        try:
            with tempfile.TemporaryDirectory(prefix="llmrun-", ignore_cleanup_errors=True) as own:
                answer = self._ask_child(request, own)
        except _ChildFailedError as error:
            self._problem = f"{_WHO} {error}"
            return {}
        except OSError as error:
            self._problem = f"{_WHO} cannot be started: {error.strerror or error}"
            return {}
        if "error" in answer:
            self._problem = _clean(answer)
            return {}
        return answer

    def _ask_child(self, request: dict[str, Any], folder: str) -> dict[str, Any]:
        parts = self._parts if request["task"] == "measure" else []
        files = [
            {"path": os.fspath(part.path)}
            if part.path is not None
            else {"name": part.name, "n_bytes": part.n_bytes, "n_header_bytes": len(part.header)}
            for part in parts
        ]
        # The child ends by itself should this process be killed.
        request = {**request, "files": files, "folder": folder, "limit_s": self._limit_s + 1}
        pieces = [json.dumps(request).encode() + b"\n", *(part.header for part in parts)]
        reply = ask_command(
            self._command or module_command(MODULE),
            pieces,
            self._limit_s,
            environ={**os.environ, "GGML_NO_BACKTRACE": "1"},
            max_bytes=_MAX_ANSWER_BYTES,
        )
        if reply.problem is not None or reply.stdout is None:
            raise _ChildFailedError(reply.problem or "gave no answer")
        lines = reply.stdout.splitlines()
        try:
            answer = json.loads(lines[-1]) if lines else None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise _ChildFailedError("gave an answer that makes no sense")
        return answer


def _clean(answer: object) -> str:
    """The child's words about a failure; they may quote the model's file."""
    words = answer.get("error") if isinstance(answer, dict) else None
    return escape_line(str(words).strip())[:_MAX_WORDS] if words else "it does not say why"

"""Renders chat templates: known-good ones here, all others in a bounded child process.

A template comes with the model's file and is a program. The jinja2 sandbox keeps it from Python's
internals but not from using up memory or time, so an unknown one runs in a child with limits on
memory, CPU time, wall time and output, which is ended when it breaks one of them. The child lives
as long as the renderer, so only the first rendering pays for its start.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmrun.chat.known_templates import KNOWN_GOOD, NativeRenderer
from llmrun.chat.template_child import Renderer as CompiledTemplate
from llmrun.chat.template_child import compile_template, describe_failure
from llmrun.errors import TemplateError

MAX_SOURCE_BYTES = 256 * 1024
_HINT = "the template is part of the model file: try another upload of the model"
_WHY = {
    "refused": "the template says: {detail}",
    "syntax": "the template is not valid: {detail}",
    "memory": "it uses more memory than a template may",
    "depth": "it is nested too deeply",
    "size": "its output is longer than a prompt may be",
    "security": "it does what no template may: {detail}",
    "time": "it did not finish in time",
    "died": "it ended the process that rendered it: too much memory or time",
    "failed": "{detail}",
}
# The child needs these to start, and gets nothing else: no token, no key.
_PASSED_ENVIRONMENT = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
    "SYSTEMROOT", "TEMP", "TMP", "HOME", "USERPROFILE", "APPDATA",
)  # fmt: skip


class RefusedByTemplateError(TemplateError):
    """The template called `raise_exception` about these messages."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one rendering in the child.

    `memory_bytes` is what it may use beyond the interpreter. `output_chars` and `memory_bytes`
    grow with the size of the messages (see `ChildRenderer.render`).
    """

    memory_bytes: int = 128 * 1024 * 1024
    cpu_s: int = 5
    deadline_s: float = 20.0
    output_chars: int = 512 * 1024


class Renderer(Protocol):
    """A compiled template."""

    def start(self) -> None:
        """Begin what takes time, without waiting for it."""

    def render(self, variables: Mapping[str, Any], today: datetime.datetime) -> str:
        """The template's output. Raises TemplateError."""

    def close(self) -> None: ...


def make_renderer(source: str, limits: Limits | None = None) -> Renderer:
    """The right renderer for this source. Raises TemplateError when it is too long."""
    n_bytes = len(source.encode("utf-8", "replace"))
    if n_bytes > MAX_SOURCE_BYTES:
        raise TemplateError(
            f"the chat template has {n_bytes} bytes",
            why=f"no more than {MAX_SOURCE_BYTES} are accepted",
            hint=_HINT,
        )
    digest = hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()
    if digest in KNOWN_GOOD:
        return LocalRenderer(source, KNOWN_GOOD[digest].render)
    return ChildRenderer(source, limits or Limits())


class LocalRenderer:
    """Renders in this process. Only for templates that people have read."""

    def __init__(self, source: str, native: NativeRenderer | None = None) -> None:
        self._source = source
        self._native = native
        self._compiled: CompiledTemplate | None = None

    def start(self) -> None:
        pass

    def render(self, variables: Mapping[str, Any], today: datetime.datetime) -> str:
        if self._native is not None:
            return self._native(variables)
        try:
            if self._compiled is None:
                self._compiled = compile_template(self._source)
            return self._compiled(dict(variables), today, sys.maxsize)
        except Exception as error:
            raise _error_of(*describe_failure(error)) from error

    def close(self) -> None:
        pass


class ChildRenderer:
    """Renders in one child process, which starts when first needed and after each breach."""

    def __init__(self, source: str, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._has_source = False
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            self._running_child()

    def render(self, variables: Mapping[str, Any], today: datetime.datetime) -> str:
        with self._lock:
            return self._render(variables, today)

    def close(self) -> None:
        with self._lock:
            self._end_child()

    def _render(self, variables: Mapping[str, Any], today: datetime.datetime) -> str:
        try:
            values = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(
                "the messages cannot be given to the chat template", why=str(error)
            ) from error
        limits = self._limits
        max_chars = limits.output_chars + 4 * len(values)
        head: dict[str, Any] = {
            "limits": {
                "memory_bytes": limits.memory_bytes + 32 * len(values),
                "cpu_s": limits.cpu_s,
                "output_chars": max_chars,
            },
            "today": today.isoformat(),
        }
        child = self._running_child()
        if not self._has_source:
            head["source"] = self._source
        line = f'{json.dumps(head)[:-1]}, "variables": {values}}}\n'.encode()
        reply, broke = self._exchange(child, line, max_answer_bytes=12 * max_chars + 4096)
        if broke:
            self._end_child()
            raise _error_of(broke, "")
        try:
            answer = json.loads(reply)
            if "ok" in answer:
                self._has_source = True
                return str(answer["ok"])
            kind, detail = str(answer["error"]), str(answer.get("detail", ""))
        except (ValueError, TypeError, KeyError, RecursionError):
            self._end_child()
            raise _error_of("died", "") from None
        if kind == "refused":
            self._has_source = True
        else:
            # A child that ran out of something is in no known state.
            self._end_child()
        raise _error_of(kind, detail)

    def _exchange(
        self, child: subprocess.Popen[bytes], line: bytes, max_answer_bytes: int
    ) -> tuple[bytes, str]:
        """Send a request and read its answer. The second value names a breach, or is empty."""
        assert child.stdin is not None and child.stdout is not None
        done = threading.Event()
        breach: list[str] = []
        watcher = threading.Thread(
            target=_watch, args=(child, self._limits, done, breach), daemon=True
        )
        watcher.start()
        reply = b""
        try:
            with contextlib.suppress(OSError):
                child.stdin.write(line)
                child.stdin.flush()
                reply = child.stdout.readline(max_answer_bytes)
        except BaseException:
            # An interrupt here leaves an answer in the pipe that belongs to nobody.
            self._end_child()
            raise
        finally:
            done.set()
            watcher.join()
        if breach:
            return b"", breach[0]
        if not reply.endswith(b"\n"):
            return b"", "size" if reply else _cause_of_death(child)
        return reply, ""

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._end_child()
        script = Path(__file__).with_name("template_child.py")
        environment = {name: os.environ[name] for name in _PASSED_ENVIRONMENT if name in os.environ}
        try:
            # -P keeps this package's folder, whose modules have common names, off the path.
            child = subprocess.Popen(
                [sys.executable, "-P", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        except OSError as error:
            raise TemplateError(
                "the process that renders chat templates did not start", why=str(error)
            ) from error
        self._child = child
        weakref.finalize(self, _end, child)
        return child

    def _end_child(self) -> None:
        child, self._child = self._child, None
        self._has_source = False
        if child is not None:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process and close its pipes; may be called twice."""
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    child.wait()


def _cause_of_death(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return "died"
    out_of_cpu_time = getattr(signal, "SIGXCPU", None)
    return "time" if out_of_cpu_time is not None and code == -out_of_cpu_time else "died"


def _watch(
    child: subprocess.Popen[bytes], limits: Limits, done: threading.Event, breach: list[str]
) -> None:
    """Kill the child at the deadline or, where the kernel does not bound memory, at that bound."""
    if sys.platform == "linux":
        if not done.wait(limits.deadline_s):
            breach.append("time")
            child.kill()
        return
    n_looks = int(limits.deadline_s / 0.05)
    for _ in range(n_looks):
        if done.wait(0.05):
            return
        if _resident_bytes(child.pid) > limits.memory_bytes * 2:
            breach.append("memory")
            child.kill()
            return
    breach.append("time")
    child.kill()


def _resident_bytes(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _error_of(kind: str, detail: str) -> TemplateError:
    why = _WHY.get(kind, "{detail}").format(detail=detail)
    if kind == "refused":
        return RefusedByTemplateError(
            "the model's chat template refuses these messages", why=why, hint=_HINT
        )
    return TemplateError("the model's chat template failed", why=why, hint=_HINT)

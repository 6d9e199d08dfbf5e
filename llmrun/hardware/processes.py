"""Short-lived processes that answer a question: bounded in time and output, crash contained."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from llmrun.text import escape_line

if TYPE_CHECKING:
    import subprocess

MAX_OUTPUT_BYTES = 1 << 20
_MAX_COMPLAINT_BYTES = 1 << 16
_MAX_COMPLAINT = 200
_AFTERMATH_S = 2.0
# The child imports from where this process does, and never from the folder it is started in.
_START = (
    "import importlib, sys; name, n = sys.argv[1], int(sys.argv[2]); "
    "sys.path[:] = sys.argv[3:3 + n]; del sys.argv[1:]; "
    "importlib.import_module(name).main()"
)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a process answered.

    `stdout` is None when it did not start, ran out of time or said too much. `problem` completes
    the sentence "the process …"; None when it ended by itself with exit code 0.
    """

    stdout: str | None
    problem: str | None = None


def run_command(command: Sequence[str], timeout_s: float) -> str | None:
    """What `command` prints on stdout, also when it then fails; None when it cannot be started or
    is not done in time."""
    return ask_command(command, [], timeout_s).stdout


def ask_module(module: str, text: str, timeout_s: float) -> Reply:
    """Run the `main` of a module in a Python of its own, with `text` on its stdin."""
    return ask_command(module_command(module), [text.encode()], timeout_s)


def module_command(module: str) -> list[str]:
    """The command line that runs the `main` of `module`, importing from where this process does."""
    folders = [folder for folder in sys.path if folder]
    # -P: a json.py in the folder where the user happens to be must not be imported.
    return [sys.executable or "", "-P", "-c", _START, module, str(len(folders)), *folders]


def ask_command(
    command: Sequence[str],
    request: Sequence[bytes],
    timeout_s: float,
    *,
    environ: Mapping[str, str] | None = None,
    max_bytes: int = MAX_OUTPUT_BYTES,
) -> Reply:
    """Run `command` with the pieces of `request` on its stdin.

    It runs in a process group of its own, which is killed when it takes longer than `timeout_s`,
    prints more than `max_bytes`, or when the user interrupts. Its stderr is never shown. A process
    that cannot be killed (stuck in a driver) is left behind.
    """
    import subprocess
    import threading

    more: dict[str, Any] = {"process_group": 0}
    if sys.platform == "win32":
        more = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}
    if not command[0]:
        return Reply(None, "did not start: the Python interpreter is not known")
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if environ is None else dict(environ),
            **more,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Reply(None, f"did not start: {error}")
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    ended = threading.Event()

    def wait() -> None:
        # A wait without a limit does not poll, and is over the moment the process is.
        child.wait()
        ended.set()

    try:
        stdout = _Reader(child.stdout, max_bytes, when_full=lambda: _kill(child))
        stderr = _Reader(child.stderr, _MAX_COMPLAINT_BYTES, when_full=None)
        threading.Thread(target=_write, args=(child.stdin, request), daemon=True).start()
        threading.Thread(target=wait, daemon=True).start()
        is_late = not ended.wait(timeout_s)
    finally:
        if child.returncode is None:
            _kill(child)
            ended.wait(_AFTERMATH_S)
    if stdout.is_full:
        return Reply(None, f"printed more than {max_bytes} bytes")
    if is_late:
        return Reply(None, f"was not done after {timeout_s:g} s")
    return Reply(stdout.finish(), _describe_end(child.returncode, stderr.finish()))


class _Reader:
    """Reads a pipe to its end in a thread, so that no process waits for a reader, and keeps the
    first `limit` bytes. `when_full` is called when there are more, else they are dropped."""

    def __init__(self, stream: IO[bytes], limit: int, when_full: Callable[[], None] | None) -> None:
        import threading

        self.is_full = False
        self._stream = stream
        self._limit = limit
        self._when_full = when_full
        self._kept = bytearray()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def finish(self) -> str:
        """What came. Does not wait for long: a process's own child may hold the pipe open."""
        self._thread.join(_AFTERMATH_S)
        return bytes(self._kept).decode("utf-8", "replace")

    def _read(self) -> None:
        with self._stream:
            while chunk := os.read(self._stream.fileno(), 1 << 16):
                n_free = self._limit - len(self._kept)
                self._kept += chunk[:n_free]
                if len(chunk) > n_free and self._when_full is not None:
                    self.is_full = True
                    self._when_full()
                    return


def _write(stream: IO[bytes], pieces: Sequence[bytes]) -> None:
    try:
        with stream:
            for piece in pieces:
                stream.write(piece)
    except OSError:  # it ended before it read everything
        return


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started."""
    try:
        if sys.platform == "win32":
            child.kill()
        elif child.returncode is None:  # not waited for yet, so its number is still its own
            os.killpg(child.pid, signal.SIGKILL)
    except OSError:  # it has ended
        return


def _describe_end(code: int, complaint: str) -> str | None:
    if code == 0:
        return None
    words = f"ended with code {code}"
    if code < 0:
        try:
            words = f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            words = f"was ended by signal {-code}"
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    # A failed assertion is followed by remarks about it.
    told = [line for line in lines if "ASSERT" in line or "what():" in line] or lines
    return f"{words}: {escape_line(told[-1])[:_MAX_COMPLAINT]}" if told else words

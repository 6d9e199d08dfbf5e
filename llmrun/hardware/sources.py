"""Where the probes get their facts from. Everything outside the process goes through a `Probe`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from platform import machine as read_arch

MAX_FILE_BYTES = 1 << 20


def run_command(command: Sequence[str], timeout_s: float) -> str | None:
    """What `command` prints on stdout, also when it then fails; None when it cannot be started or
    is not done in time."""
    import subprocess

    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def read_affinity() -> frozenset[int] | None:
    """The hardware threads that this process may run on; None where the system cannot tell."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    try:
        import psutil

        return frozenset(psutil.Process().cpu_affinity())
    except (ImportError, AttributeError, OSError):  # no cpu_affinity on macOS and the BSDs
        return None


def read_host_memory() -> tuple[int, int] | None:
    """The host's (total, available) bytes by psutil; None where that cannot tell."""
    try:
        import psutil

        memory = psutil.virtual_memory()
    except (ImportError, OSError, RuntimeError):
        return None
    return int(memory.total), int(memory.available)


def read_n_physical() -> int | None:
    """The host's physical cores by psutil; None where that cannot tell."""
    try:
        import psutil

        n_cores = psutil.cpu_count(logical=False)
    except (ImportError, OSError, RuntimeError):
        return None
    return int(n_cores) if n_cores else None


@dataclass(frozen=True, slots=True)
class Probe:
    """The outside world as the probes see it; the defaults are the real one.

    `root` stands for "/" in every path that is read. `run(command, timeout_s)` is `run_command`.
    """

    root: Path = Path("/")
    platform: str = sys.platform
    arch: str = read_arch()
    run: Callable[[Sequence[str], float], str | None] = run_command
    n_logical: Callable[[], int | None] = os.cpu_count
    affinity: Callable[[], frozenset[int] | None] = read_affinity
    host_memory: Callable[[], tuple[int, int] | None] = read_host_memory
    n_physical: Callable[[], int | None] = read_n_physical

    def read(self, path: str | Path) -> str | None:
        """The text of the file at absolute `path`; None when it cannot be read."""
        try:
            with self._real(path).open("rb") as file:
                return file.read(MAX_FILE_BYTES).decode("utf-8", "replace")
        except (OSError, ValueError):
            return None

    def read_int(self, path: str | Path) -> int | None:
        """The whole number in the file at `path`; None without one (such as "max")."""
        return parse_int(self.read(path))

    def list_names(self, path: str | Path) -> list[str]:
        """Names in the folder at absolute `path`, sorted; empty when it cannot be read."""
        try:
            return sorted(entry.name for entry in self._real(path).iterdir())
        except OSError:
            return []

    def _real(self, path: str | Path) -> Path:
        return self.root / str(path).lstrip("/")


def parse_int(text: str | None) -> int | None:
    """A decimal number with blanks around it; None for anything else."""
    if text is None:
        return None
    word = text.strip()
    return int(word) if word.isascii() and word.isdigit() and len(word) < 40 else None


def parse_fields(text: str, separator: str) -> dict[str, int]:
    """`name<separator>number …` lines, such as those of meminfo, memory.stat and sysctl."""
    fields = {}
    for line in text.splitlines():
        name, _, rest = line.partition(separator)
        words = rest.split()
        value = parse_int(words[0].rstrip(".")) if words else None
        if value is not None:
            fields[name.strip().strip('"')] = value
    return fields

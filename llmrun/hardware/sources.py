"""Where the probes get their facts from. Everything outside the process goes through a `Probe`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from platform import machine as read_arch

from llmrun.hardware.processes import Reply, ask_module, run_command

MAX_FILE_BYTES = 1 << 20


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


def read_disk_free(folder: Path) -> int | None:
    """Bytes that this user can still write where `folder` is, or will be; None when that cannot be
    told."""
    import shutil

    for existing in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(existing).free
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return None
    return None


def find_library_folder() -> Path | None:
    """Where the binding of llama.cpp loads its libraries from; None when it is not installed.
    The binding is not imported."""
    import importlib.util

    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(override)
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except (ImportError, ValueError):
        return None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]) / "lib" if folders else None


@dataclass(frozen=True, slots=True)
class Probe:
    """The outside world as the probes see it; the defaults are the real one.

    `root` stands for "/" in every path that is read. `run(command, timeout_s)` is `run_command`,
    `ask_module(module, text, timeout_s)` is `processes.ask_module`.
    """

    root: Path = Path("/")
    platform: str = sys.platform
    arch: str = read_arch()
    run: Callable[[Sequence[str], float], str | None] = run_command
    n_logical: Callable[[], int | None] = os.cpu_count
    affinity: Callable[[], frozenset[int] | None] = read_affinity
    host_memory: Callable[[], tuple[int, int] | None] = read_host_memory
    n_physical: Callable[[], int | None] = read_n_physical
    ask_module: Callable[[str, str, float], Reply] = ask_module
    library_folder: Callable[[], Path | None] = find_library_folder
    disk_free: Callable[[Path], int | None] = read_disk_free
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def read(self, path: str | Path, n_bytes: int = MAX_FILE_BYTES) -> str | None:
        """The first `n_bytes` of the file at absolute `path` as text; None when it cannot be
        read."""
        try:
            with self._real(path).open("rb") as file:
                return file.read(n_bytes).decode("utf-8", "replace")
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

    def exists(self, path: str | Path) -> bool:
        try:
            return self._real(path).exists()
        except (OSError, ValueError):
            return False

    def may_write(self, path: str | Path) -> bool:
        """Whether this user may read and write the file at absolute `path`."""
        return os.access(self._real(path), os.R_OK | os.W_OK)

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

"""The memory of this process: now, and at its highest."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_PROC = Path("/proc/self")


class ProcessMemory:
    """Bytes in RAM, mapped files that were read included. None where the system does not tell."""

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc

    def begin(self) -> None:
        """Forget the highest value so far, where that can be done."""
        with contextlib.suppress(OSError):
            (self._proc / "clear_refs").write_text("5")  # VmHWM, see proc(5)

    def now(self) -> int | None:
        pages = self._read("statm").split()
        if len(pages) > 1 and pages[1].isdecimal():
            return int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            import psutil

            return int(psutil.Process().memory_info().rss)
        return None

    def peak(self) -> int | None:
        for line in self._read("status").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        if sys.platform == "win32":
            with contextlib.suppress(ImportError, OSError, AttributeError):
                import psutil

                return int(psutil.Process().memory_info().peak_wset)
            return None
        with contextlib.suppress(ImportError, OSError):
            import resource

            highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return highest if sys.platform == "darwin" else highest * 1024
        return None

    def _read(self, name: str) -> str:
        try:
            return (self._proc / name).read_text(encoding="ascii", errors="replace")
        except OSError:
            return ""

"""What `serve` tells a person, who must never keep it waiting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

from llmrun.ui.output import Output

_MAX_JOBS = 1000


class LogOutput(Output):
    """`output`, whose lines for the person go out in a thread of their own from `begin` to `end`.
    What it cannot get rid of (a full pipe, a terminal stopped by Ctrl-S) is dropped beyond N_MAX;
    how much, is told when it goes on."""

    def __init__(self, output: Output, n_max: int = _MAX_JOBS) -> None:
        super().__init__(
            output.environment,
            command=output.command,
            json=output.json,
            quiet=output.quiet,
            verbose=output.verbose,
            yes=output.yes,
        )
        self._n_max = n_max
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._n_waiting = 0
        self._n_dropped = 0
        self._thread: threading.Thread | None = None
        self.is_stuck = False
        """The thread did not end: the stream is its for good, and whoever writes there waits."""

    def begin(self) -> None:
        self._thread = threading.Thread(target=self._run, name="llmrun-log", daemon=True)
        self._thread.start()

    def end(self, wait_s: float) -> None:
        """Write what is left, for so many seconds at most; then see `is_stuck`. Blocks."""
        if self._thread is None:
            return
        self._jobs.put(None)
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self.is_stuck = True
        else:
            self._thread = None

    @property
    def is_idle(self) -> bool:
        """Nothing waits to be written."""
        return self._n_waiting == 0

    def put(self, write: Callable[[], object]) -> None:
        """Have `write` called behind all that came before. From any thread; never waits."""
        if self._thread is None:
            write()
            return
        with self._lock:
            if self._n_waiting >= self._n_max:
                self._n_dropped += 1
                return
            self._n_waiting += 1
        self._jobs.put(write)

    def _to_stderr(self, text: str, style: str = "", end: str = "\n") -> None:
        self.put(partial(super()._to_stderr, text, style, end))

    def _run(self) -> None:
        while (write := self._jobs.get()) is not None:
            with self._lock:
                n_dropped, self._n_dropped = self._n_dropped, 0
            try:
                if n_dropped:
                    super()._to_stderr(f"({n_dropped} lines left out)", "dim")
                write()
            except (OSError, ValueError):  # the reader has gone
                pass
            with self._lock:
                self._n_waiting -= 1

"""How a download shows: bars on a terminal, lines in a file, JSON events, or nothing.

All are `llmrun.hub.types.DownloadProgress`: called from worker threads, and they never raise.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmrun.text import escape_line, format_bytes, format_duration
from llmrun.ui.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from llmrun.hub.types import DownloadProgress, RemoteFile

Clock = Callable[[], float]
LINE_EVERY_S = 10.0
LINES = 10  # of the whole
EVENT_EVERY_S = 0.5


def progress_for(
    output: Output, *, events: bool = False, clock: Clock = time.monotonic
) -> DownloadProgress:
    """The form that fits this output. `events`: the command streams JSON objects with `--json`."""
    if output.json and events:
        return EventProgress(output, clock)
    if output.quiet:
        return NullProgress()
    if output.environment.stderr_is_tty and not output.stderr.is_dumb_terminal:
        return BarProgress(output)
    return LineProgress(output, clock)


class NullProgress:
    """Shows nothing."""

    def begin(self, files: tuple[RemoteFile, ...], n_bytes_present: int) -> None: ...

    def advance(self, path: str, n_bytes: int) -> None: ...

    def finish_file(self, path: str) -> None: ...

    def note(self, message: str) -> None: ...

    def end(self) -> None: ...


class _Counter:
    """Bytes done of one transfer, with the speed since it began. Not locked: the owner locks."""

    def __init__(self, files: tuple[RemoteFile, ...], n_present: int, now: float) -> None:
        self.sizes = {file.path: file.n_bytes for file in files}
        self.n_total = sum(self.sizes.values())
        self.n_present = n_present
        self.n_done = n_present
        self.began = now

    def speed(self, now: float) -> float:
        """Bytes a second over this transfer, without what was there before."""
        elapsed = now - self.began
        return max(0.0, self.n_done - self.n_present) / elapsed if elapsed > 0 else 0.0

    @property
    def share(self) -> float:
        return self.n_done / self.n_total if self.n_total else 1.0


class LineProgress:
    """Plain lines on stderr: at the start, every tenth of the bytes or ten seconds, at the end."""

    def __init__(self, output: Output, clock: Clock = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._lock = threading.Lock()
        self._counter: _Counter | None = None
        self._last_step = 0
        self._last_time = 0.0

    def begin(self, files: tuple[RemoteFile, ...], n_bytes_present: int) -> None:
        with self._lock:
            now = self._clock()
            self._counter = counter = _Counter(files, n_bytes_present, now)
            self._last_time, self._last_step = now, int(counter.share * LINES)
            what = escape_line(files[0].path) if len(files) == 1 else f"{len(files)} files"
            had = f", {format_bytes(n_bytes_present)} already here" if n_bytes_present else ""
            self._output.note(f"downloading {what}: {format_bytes(counter.n_total)}{had}")

    def advance(self, path: str, n_bytes: int) -> None:
        with self._lock:
            counter = self._counter
            if counter is None:
                return
            counter.n_done += n_bytes
            now = self._clock()
            step = int(counter.share * LINES)
            is_due = step > self._last_step or now - self._last_time >= LINE_EVERY_S
            if is_due and counter.n_done < counter.n_total:
                self._last_time, self._last_step = now, step
                self._output.note(_describe(counter, now))

    def finish_file(self, path: str) -> None:
        self._output.note(f"{escape_line(path)}: complete, sha256 checked")

    def note(self, message: str) -> None:
        self._output.note(escape_line(message))

    def end(self) -> None:
        with self._lock:
            self._counter = None


def _describe(counter: _Counter, now: float) -> str:
    speed = counter.speed(now)
    done, total = format_bytes(counter.n_done), format_bytes(counter.n_total)
    text = f"{counter.share:4.0%}  {done} of {total}"
    if speed > 0:
        left = (counter.n_total - counter.n_done) / speed
        text += f"  {format_bytes(round(speed))}/s  {format_duration(left)} left"
    return text


class EventProgress:
    """JSON objects, one a line: begin, progress (twice a second at most), file, note, end."""

    def __init__(self, output: Output, clock: Clock = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._lock = threading.Lock()
        self._counter: _Counter | None = None
        self._last_time = 0.0

    def begin(self, files: tuple[RemoteFile, ...], n_bytes_present: int) -> None:
        with self._lock:
            now = self._clock()
            self._counter, self._last_time = _Counter(files, n_bytes_present, now), now
            self._output.event(
                {
                    "event": "begin",
                    "files": [{"path": file.path, "size": file.n_bytes} for file in files],
                    "done": n_bytes_present,
                    "total": self._counter.n_total,
                }
            )

    def advance(self, path: str, n_bytes: int) -> None:
        with self._lock:
            counter = self._counter
            if counter is None:
                return
            counter.n_done += n_bytes
            now = self._clock()
            if now - self._last_time >= EVENT_EVERY_S:
                self._last_time = now
                self._output.event(
                    {
                        "event": "progress",
                        "done": counter.n_done,
                        "total": counter.n_total,
                        "bytes_per_s": round(counter.speed(now)),
                    }
                )

    def finish_file(self, path: str) -> None:
        with self._lock:
            self._output.event({"event": "file", "path": path})

    def note(self, message: str) -> None:
        with self._lock:
            self._output.event({"event": "note", "message": message})

    def end(self) -> None:
        with self._lock:
            counter, self._counter = self._counter, None
            if counter is not None:
                self._output.event(
                    {"event": "end", "done": counter.n_done, "total": counter.n_total}
                )


class BarProgress:
    """Rich bars on a terminal: one a file, and one for all when there are several."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._sizes: dict[str, int] = {}
        self._total: TaskID | None = None

    def begin(self, files: tuple[RemoteFile, ...], n_bytes_present: int) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        with self._lock:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(compact=True),
                console=self._output.stderr,
            )
            self._sizes = {file.path: file.n_bytes for file in files}
            if len(files) == 1:
                only = files[0]
                self._tasks[only.path] = self._bars.add_task(
                    _short(only.path), total=only.n_bytes, completed=n_bytes_present
                )
            else:
                for file in files:
                    self._tasks[file.path] = self._bars.add_task(
                        _short(file.path), total=file.n_bytes
                    )
                self._total = self._bars.add_task(
                    "total", total=sum(self._sizes.values()), completed=n_bytes_present
                )
            self._bars.start()

    def advance(self, path: str, n_bytes: int) -> None:
        with self._lock:
            if self._bars is None:
                return
            for task in (self._tasks.get(path), self._total):
                if task is not None:
                    self._bars.advance(task, n_bytes)

    def finish_file(self, path: str) -> None:
        with self._lock:
            task = self._tasks.get(path)
            if self._bars is not None and task is not None:
                self._bars.update(task, completed=self._sizes[path])

    def note(self, message: str) -> None:
        with self._lock:
            if self._bars is not None and self._bars.live.is_started:
                from rich.text import Text

                self._bars.console.print(Text(escape_line(message), style="dim"))
            else:
                self._output.note(escape_line(message), style="dim")

    def end(self) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
            self._bars, self._total, self._tasks = None, None, {}


def _short(path: str, width: int = 40) -> str:
    name = escape_line(path.rsplit("/", 1)[-1])
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-width // 2 :]}"


LOAD_SHOWS_AFTER_S = 0.5


@contextlib.contextmanager
def load_progress_for(
    output: Output, clock: Clock = time.monotonic
) -> Iterator[Callable[[float], bool] | None]:
    """A callback for loading a model: a percentage on a terminal once it takes long, else None.

    The line is gone when the block ends.
    """
    stream = output.environment.stderr
    if output.quiet or output.json or output.verbose or not output.environment.stderr_is_tty:
        yield None
        return
    began = clock()
    shown = ""

    def show(share: float) -> bool:
        nonlocal shown
        text = f"loading {share:.0%}"
        if clock() - began >= LOAD_SHOWS_AFTER_S and text != shown:
            shown = text
            stream.write(f"\r{text}")
            stream.flush()
        return True

    try:
        yield show
    finally:
        if shown:
            stream.write("\r" + " " * len("loading 100%") + "\r")
            stream.flush()

"""How far a long measurement is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from llmrun.text import escape_line
from llmrun.ui.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 10.0


class Steps(Protocol):
    """Units are the caller's own; `begin` says how many there are in all."""

    def begin(self, n_units: float) -> None: ...

    def describe(self, text: str) -> None:
        """What is done from here on."""

    def advance(self, n_units: float) -> None: ...


@contextlib.contextmanager
def steps_for(output: Output, clock: Callable[[], float] = time.monotonic) -> Iterator[Steps]:
    """The form that fits this output; nothing of a bar is left when the block ends."""
    is_terminal = output.environment.stderr_is_tty and not output.stderr.is_dumb_terminal
    if output.quiet or not is_terminal:
        yield LineSteps(output, clock)
        return
    bar = BarSteps(output)
    try:
        yield bar
    finally:
        bar.end()


class LineSteps:
    """At the start, and then at most every ten seconds, a line on stderr; with `-q` none."""

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._n_units = self._n_done = 0.0
        self._next_s = clock()

    def begin(self, n_units: float) -> None:
        self._n_units, self._n_done = n_units, 0.0

    def describe(self, text: str) -> None:
        now = self._clock()
        if now >= self._next_s:
            self._next_s = now + LINE_EVERY_S
            share = min(1.0, self._n_done / self._n_units) if self._n_units else 0.0
            self._output.note(f"{share:4.0%}  {escape_line(text)}")

    def advance(self, n_units: float) -> None:
        self._n_done += n_units


class BarSteps:
    """A rich bar with what is done, how far it is and how long it takes; gone after `end`."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, n_units: float) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.end()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._output.stderr,
            transient=True,
        )
        self._task = self._bar.add_task("", total=n_units)
        self._bar.start()

    def describe(self, text: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{escape_line(text):<34.60}")

    def advance(self, n_units: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, n_units)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

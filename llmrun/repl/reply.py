"""One answer on the screen: progress, thinking, text, and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from llmrun.repl.screen import Screen, quiet_keyboard
from llmrun.repl.state import ThinkMode
from llmrun.text import format_duration

if TYPE_CHECKING:
    from llmrun.chat.parsing import Delta
    from llmrun.engine.types import FinishEvent, PromptEvent

SECOND_INTERRUPT_S = 1.0
_MIN_PROMPT_SHOWN = 256

Clock = Callable[[], float]


class LeaveNow(KeyboardInterrupt):
    """Two Ctrl-C within a second. No Exception, so that no cleanup on the way swallows it."""


class Interrupts:
    """Ctrl-C while an answer is generated. The first raises KeyboardInterrupt, but only where the
    loop waits for the model, so that no row is written by half; a second one within a second
    raises LeaveNow wherever it comes."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._at: float | None = None
        self.is_waiting = False
        self.is_pending = False

    def note(self) -> bool:
        """Record a Ctrl-C; True when it is the second one within a second."""
        now = self._clock()
        is_second = self._at is not None and now - self._at <= SECOND_INTERRUPT_S
        self._at = now
        return is_second

    def seen(self) -> None:
        """A KeyboardInterrupt arrived that may not have come through `caught`."""
        self._at = self._clock()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Handle SIGINT here for a while; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.is_pending = self.is_waiting = False
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.note():
            raise LeaveNow
        if self.is_waiting:
            self.is_waiting = False
            raise KeyboardInterrupt
        self.is_pending = True


@dataclass(frozen=True, slots=True)
class Reply:
    """What was shown."""

    thinking: str
    n_answer_chars: int
    is_interrupted: bool


class ReplyView:
    """Shows the deltas of one reply as they come."""

    def __init__(
        self,
        screen: Screen,
        think_mode: ThinkMode,
        count_tokens: Callable[[str], int],
        clock: Clock = time.monotonic,
    ) -> None:
        self._screen = screen
        self._shows_thinking = think_mode == "on" and screen.is_terminal
        self._count_tokens = count_tokens
        self._clock = clock
        self._started = clock()
        self._thinking: list[str] = []
        self._n_answer = 0
        self._kind: str | None = None
        self._answer = screen.make_answer_stream()
        self._dim = screen.make_thinking_stream()

    def on_prompt(self, event: PromptEvent) -> None:
        if event.n_total >= _MIN_PROMPT_SHOWN and event.n_done < event.n_total:
            percent = 100 * event.n_done // event.n_total
            self._screen.status(f"reading prompt {percent} %")

    def show(
        self,
        deltas: Iterator[Delta],
        interrupts: Interrupts,
        on_delta: Callable[[], None] = lambda: None,
    ) -> Reply:
        """Read `deltas` to the end, and call `on_delta` after each. What was begun on the screen is
        ended, whatever is raised.

        Raises LeaveNow, and the LlmrunError of a failing engine.
        """
        is_interrupted = False
        self._screen.status("…")
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet_keyboard())
            stack.enter_context(interrupts.caught())
            stack.callback(self._end)
            close = getattr(deltas, "close", None)
            if close is not None:
                stack.callback(close)
            while not is_interrupted:
                try:
                    interrupts.is_waiting = True
                    delta = next(deltas, None)
                    interrupts.is_waiting = False
                except LeaveNow:
                    raise
                except KeyboardInterrupt:
                    interrupts.is_waiting = False
                    interrupts.seen()
                    is_interrupted = True
                    break
                if delta is None:
                    break
                self._feed(delta)
                on_delta()
                is_interrupted = interrupts.is_pending
        return Reply("".join(self._thinking), self._n_answer, is_interrupted)

    def _feed(self, delta: Delta) -> None:
        if delta.kind == "thinking":
            self._thinking.append(delta.text)
            if self._shows_thinking:
                self._begin("thinking")
                self._dim.feed(delta.text)
            else:
                elapsed = format_duration(self._clock() - self._started)
                self._screen.status(f"thinking … {elapsed}")
            return
        text = delta.text
        if self._n_answer == 0:
            text = text.lstrip("\n")
            if not text:
                return
        self._begin("answer")
        self._n_answer += len(text)
        self._answer.feed(text)

    def _begin(self, kind: str) -> None:
        if self._kind == kind:
            return
        self._screen.clear_status()
        if kind == "answer" and "".join(self._thinking).strip():
            self._end_thinking()
        self._kind = kind

    def _end_thinking(self) -> None:
        """End the shown thinking, or say in one line that there was some."""
        if self._kind == "thinking":
            self._dim.finish()
            self._screen.say()
        elif self._screen.is_terminal:
            n_tokens = self._count_tokens("".join(self._thinking))
            elapsed = format_duration(self._clock() - self._started)
            self._screen.say(f"▸ thought for {elapsed} ({n_tokens} tokens)", "dim")
            self._screen.say()

    def _end(self) -> None:
        self._screen.clear_status()
        if self._kind == "answer":
            self._answer.finish()
        elif "".join(self._thinking).strip():
            self._end_thinking()


def stats_line(finish: FinishEvent, n_used: int, n_ctx: int) -> str:
    """`42 tokens · 118 tok/s · first token 0.21 s · context 512/8192`."""
    rate = finish.timings.decode_tok_s
    parts = [f"{finish.usage.n_completion} tokens"]
    if rate > 0:
        parts.append(f"{rate:.0f} tok/s" if rate >= 10 else f"{rate:.1f} tok/s")
    parts.append(f"first token {finish.timings.ttft_s:.2f} s")
    parts.append(f"context {n_used}/{n_ctx}")
    return " · ".join(parts)

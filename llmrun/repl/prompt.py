"""The input line: prompt_toolkit on a terminal, plain lines elsewhere.

A line reader returns one message and raises EOFError when the user leaves (Ctrl-D) and
KeyboardInterrupt for Ctrl-C at an empty line; with text in the line Ctrl-C only clears it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from llmrun.errors import UsageError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output

PROMPT = ">>> "
CONTINUATION = "... "
PLACEHOLDER = "Send a message (/help for help)"
QUOTES = '"""'

Complete = Callable[[str], Iterable[tuple[str, str]]]
"""From the text of a slash command up to the cursor to (completion of its last word, help)."""


class LineReader(Protocol):
    @property
    def is_interactive(self) -> bool:
        """Whether a person types the lines, who can be asked something."""

    def __call__(self, default: str = "") -> str:
        """Read one message; `default` is in the line already and can be edited."""

    def ask(self, question: str) -> str:
        """Read the answer to a question. Raises as reading a message does."""


def make_line_reader(
    *,
    history_path: Path | None,
    complete: Complete,
    environ: Mapping[str, str] | None = None,
    stdin: TextIO | None = None,
    err: TextIO | None = None,
) -> LineReader:
    """The best line reader for these streams.

    Where the terminal is dumb, is none, or prompt_toolkit cannot be had, lines are read plainly.
    """
    environ = os.environ if environ is None else environ
    stdin = stdin or sys.stdin
    err = err or sys.stderr
    is_dumb = environ.get("TERM", "").lower() in ("dumb", "unknown")
    if stdin.isatty() and sys.stdout.isatty() and not is_dumb:
        with contextlib.suppress(ImportError):
            return RichLineReader(history_path=history_path, complete=complete)
    return PlainLineReader(stdin, err)


def is_open_quote(text: str) -> bool:
    """Whether `text` begins a triple-quoted message that does not end yet."""
    stripped = text.strip()
    return stripped.startswith(QUOTES) and (
        len(stripped) < 2 * len(QUOTES) or not stripped.endswith(QUOTES)
    )


def strip_quotes(text: str) -> str:
    """A message without its triple quotes, should it have them."""
    stripped = text.strip()
    if stripped.startswith(QUOTES) and not is_open_quote(stripped):
        return stripped[len(QUOTES) : -len(QUOTES)].strip("\n")
    return text


class PlainLineReader:
    """Reads lines from a stream; prompts on `err`, and only when the input is a terminal."""

    def __init__(self, stdin: TextIO, err: TextIO) -> None:
        self._stdin = stdin
        self._err = err
        self._is_tty = stdin.isatty()

    def __call__(self, default: str = "") -> str:
        if default and self._is_tty:
            self._err.write("Type the new text of the message.\n")
        text = self._read(PROMPT)
        while is_open_quote(text):
            try:
                text += "\n" + self._read(CONTINUATION)
            except EOFError:
                return text.strip().removeprefix(QUOTES).strip("\n")
        return strip_quotes(text)

    @property
    def is_interactive(self) -> bool:
        return self._is_tty

    def ask(self, question: str) -> str:
        return self._read(question)

    def _read(self, prompt: str) -> str:
        if self._is_tty:
            self._err.write(prompt)
            self._err.flush()
        try:
            line = self._stdin.readline()
        except UnicodeDecodeError as error:
            raise UsageError("stdin is not UTF-8 text", why=str(error)) from error
        if not line:
            raise EOFError
        if any("\ud800" <= char <= "\udfff" for char in line):
            # How Python reads bytes that are no UTF-8 where the locale says nothing.
            raise UsageError("stdin is not UTF-8 text")
        return line.rstrip("\r\n")


class RichLineReader:
    """A prompt_toolkit line: history, completion, several lines, editor."""

    def __init__(
        self,
        *,
        history_path: Path | None,
        complete: Complete,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.formatted_text import FormattedText

        self._input, self._output = input, output

        def placeholder() -> FormattedText:
            # Not drawn once more when the line is left.
            text = "" if self._session.app.is_done else PLACEHOLDER
            return FormattedText([("fg:ansibrightblack", text)])

        def types_command() -> bool:
            return self._session.default_buffer.text.startswith("/")

        self._session: PromptSession[str] = PromptSession(
            history=open_history(history_path),
            completer=make_completer(complete),
            complete_while_typing=Condition(types_command),
            key_bindings=make_key_bindings(),
            multiline=True,
            prompt_continuation=CONTINUATION,
            placeholder=placeholder,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            input=input,
            output=output,
        )

    def __call__(self, default: str = "") -> str:
        text = self._session.prompt(PROMPT, default=default)
        # Bytes that were no UTF-8 arrive as lone surrogates, which no tokenizer takes.
        return strip_quotes(text.encode("utf-8", "replace").decode("utf-8"))

    @property
    def is_interactive(self) -> bool:
        return True

    def ask(self, question: str) -> str:
        from prompt_toolkit import PromptSession

        # A session of its own: answers do not belong into the history of messages.
        session: PromptSession[str] = PromptSession(input=self._input, output=self._output)
        return session.prompt(question)


def make_key_bindings() -> KeyBindings:
    """Enter sends, Alt-Enter breaks the line, Ctrl-C clears, Ctrl-G opens the editor."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open_quote(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _break_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def _clear_or_interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @keys.add("c-g")
    def _edit(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


def make_completer(complete: Complete) -> Completer:
    """Slash commands and their arguments by `complete`; paths in any word that looks like one."""
    from prompt_toolkit.completion import (
        CompleteEvent,
        Completer,
        Completion,
        PathCompleter,
    )
    from prompt_toolkit.document import Document

    class ReplCompleter(Completer):
        def __init__(self) -> None:
            self._paths = PathCompleter(expanduser=True)

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            before = document.text_before_cursor
            word = before[max(before.rfind(" "), before.rfind("\n")) + 1 :]
            if before.startswith("/") and not before.startswith("//") and "\n" not in before:
                for text, help_text in complete(before):
                    yield Completion(text, start_position=-len(word), display_meta=help_text)
                if word == before:
                    return
            if word.startswith(("./", "../", "~/", "/")):
                yield from self._paths.get_completions(Document(word, len(word)), complete_event)

    return ReplCompleter()


def open_history(path: Path | None) -> History:
    """History kept in `path`, which only its owner can read; in memory when that cannot be had."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if path is None or not _make_private_file(path):
        return InMemoryHistory()

    class PrivateFileHistory(FileHistory):
        def store_string(self, string: str) -> None:
            # A full disk must not end the conversation: the line stays in memory.
            with contextlib.suppress(OSError):
                super().store_string(string)

    return PrivateFileHistory(str(path))


def _make_private_file(path: Path) -> bool:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Created with its mode, so that it is at no moment readable for others.
        flags: int = os.O_CREAT | os.O_APPEND | os.O_RDWR | int(getattr(os, "O_NOFOLLOW", 0))
        fd = os.open(path, flags, 0o600)
    except OSError:
        return False
    try:
        fchmod: Any = getattr(os, "fchmod", None)
        if fchmod is not None:
            fchmod(fd, 0o600)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True

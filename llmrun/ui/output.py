"""Everything that is printed goes through here: results, notes, questions, errors, JSON.

stdout is the result and nothing else; stderr is for people. Every string passes through
`llmrun.text.escape_controls` on its way out, so no name, message or model text can drive the
terminal: this is the one choke point.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, runtime_checkable

from llmrun.config import Environment
from llmrun.errors import LlmrunError, UsageError
from llmrun.text import escape_controls, escape_line

if TYPE_CHECKING:
    from rich.console import Console

# What JSON leaves as it is but a terminal would obey (DEL, C1, bidi) or cannot encode (surrogates).
_UNSAFE_IN_JSON = re.compile(
    "[\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


@runtime_checkable
class Result(Protocol):
    """What a command returns: a frozen dataclass. Its fields are the keys of JSON's `data`."""

    def show(self, output: Output) -> None:
        """Print it for a person."""


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """A result that came with errors: the result is shown, then the errors, and the exit code is
    the first error's."""

    result: Result
    errors: tuple[LlmrunError, ...]


class Output:
    """One run's way out. `json` sends one envelope to stdout; `quiet` drops notes."""

    def __init__(
        self,
        environment: Environment,
        *,
        command: str = "",
        json: bool = False,
        quiet: bool = False,
        verbose: int = 0,
        yes: bool = False,
    ) -> None:
        self.environment = environment
        self.command = command
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self.yes = yes

    @cached_property
    def stdout(self) -> Console:
        return self._console(self.environment.stdout)

    @cached_property
    def stderr(self) -> Console:
        return self._console(self.environment.stderr)

    def _console(self, stream: TextIO) -> Console:
        from rich.console import Console

        return Console(
            file=stream,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
            _environ=self.environment.environ,
        )

    def line(self, text: str = "") -> None:
        """One or more lines of the result, on stdout."""
        self.environment.stdout.write(escape_controls(text) + "\n")

    def stream(self, text: str, *, raw: bool = False) -> None:
        """A piece of the result, shown at once. `raw` leaves control characters as they are."""
        self.environment.stdout.write(text if raw else escape_controls(text))
        self.environment.stdout.flush()

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> None:
        """Columns with two spaces between them, never cut. `right` has an `r` for each column
        that is aligned to the right."""
        from rich.cells import cell_len

        cells = [[escape_line(cell) for cell in row] for row in (head, *rows)]
        widths = [max(cell_len(row[i]) for row in cells) for i in range(len(head))]
        for row in cells:
            parts = []
            for i, cell in enumerate(row):
                gap = " " * (widths[i] - cell_len(cell))
                parts.append(gap + cell if right[i : i + 1] == "r" else cell + gap)
            self.environment.stdout.write("  ".join(parts).rstrip() + "\n")

    def note(self, text: str, *, style: str = "") -> None:
        """A line for the person, on stderr; silent with `-q`."""
        if not self.quiet:
            self._to_stderr(text, style)

    def tell(self, text: str) -> None:
        """A line for the person that was asked for, so `-q` does not silence it."""
        self._to_stderr(text)

    def warn(self, text: str) -> None:
        """A note that something is not as wanted: shown also with `-q`."""
        self._to_stderr(f"warning: {text}", "yellow")

    def detail(self, text: str) -> None:
        """A note that only `-v` shows."""
        if self.verbose:
            self._to_stderr(text, "dim")

    def aside(self, text: str, *, style: str = "dim") -> None:
        """A piece of text beside the result (thinking), on stderr without a line end."""
        self._to_stderr(text, style, end="")

    def _to_stderr(self, text: str, style: str = "", end: str = "\n") -> None:
        safe = escape_controls(text)
        if self.environment.stderr_is_tty and style:
            from rich.text import Text

            self.stderr.print(Text(safe, style=style), end=end)
        else:
            self.environment.stderr.write(safe + end)
        self.environment.stderr.flush()

    def confirm(self, question: str, *, agreeing: str = "pass --yes to agree") -> bool:
        """Ask on the terminal; no is the default. Raises UsageError where nobody can be asked, with
        `agreeing`, the command that asks nothing, as its hint."""
        if self.yes:
            return True
        answer = self._ask(f"{question} [y/N] ", agreeing)
        return answer.strip().lower() in ("y", "yes")

    def _ask(self, prompt: str, hint: str) -> str:
        environment = self.environment
        if self.json or not (environment.stdin_is_tty and environment.stderr_is_tty):
            raise UsageError(
                f"this needs an answer: {prompt.removesuffix(' [y/N] ')}",
                why="there is no terminal to ask on" if not self.json else "--json asks nothing",
                hint=hint,
            )
        environment.stderr.write(escape_controls(prompt))
        environment.stderr.flush()
        return environment.stdin.readline()

    def event(self, event: Mapping[str, Any]) -> None:
        """One JSON object on a line of stdout (for commands that stream with `--json`)."""
        self.environment.stdout.write(encode_json(event) + "\n")
        self.environment.stdout.flush()

    def finish(self, outcome: Result | Failed | int | None) -> int:
        """Show what a command returned, as text or as the envelope; the exit code. An int is the
        code of a command that showed everything itself."""
        if isinstance(outcome, int):
            return outcome
        errors = outcome.errors if isinstance(outcome, Failed) else ()
        result = outcome.result if isinstance(outcome, Failed) else outcome
        if self.json:
            self._envelope(as_json(result) if result is not None else {}, errors)
        else:
            if result is not None:
                result.show(self)
            for error in errors:
                self._error_text(error)
        self.environment.stdout.flush()
        return errors[0].exit_code if errors else 0

    def fail(self, error: LlmrunError) -> int:
        """Show an error that ended the command; the exit code."""
        if self.json:
            self._envelope({}, (error,))
            self.environment.stdout.flush()
        else:
            self._error_text(error)
        return error.exit_code

    def _envelope(self, data: Any, errors: Sequence[LlmrunError]) -> None:
        envelope = {
            "llmrun": 1,
            "command": self.command,
            "status": "error" if errors else "ok",
            "data": data,
            "errors": [error_as_json(error) for error in errors],
        }
        self.environment.stdout.write(encode_json(envelope) + "\n")

    def _error_text(self, error: LlmrunError) -> None:
        lines = error_lines(error)
        self._to_stderr(lines[0], "bold red")
        for line in lines[1:]:
            self._to_stderr(line)


def error_lines(error: LlmrunError) -> list[str]:
    """At most four lines: what happened, why (two lines at most), what to try."""
    lines = [f"error: {_one_line(error.message)}"]
    if error.why:
        why = [line.strip() for line in error.why.splitlines() if line.strip()]
        lines += [escape_line(line) for line in why[:1]]
        lines += [_one_line(" ".join(why[1:]))] if len(why) > 1 else []
    if error.hint:
        lines.append(f"try: {_one_line(error.hint)}")
    return lines


def error_as_json(error: LlmrunError) -> dict[str, Any]:
    message = error.message if not error.why else f"{error.message}: {error.why}"
    return {"code": error.code, "message": message, "hint": error.hint}


def _one_line(text: str) -> str:
    return escape_line(" ".join(text.splitlines()))


def as_json(value: Any) -> Any:
    """A result as plain JSON values: dataclasses by their fields, paths as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            entry.name: as_json(getattr(value, entry.name)) for entry in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def encode_json(value: Any) -> str:
    """One line of JSON in which nothing can drive a terminal; strings read back unchanged."""
    text = json.dumps(value, ensure_ascii=False, separators=(", ", ": "), allow_nan=False)
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match.group()):04x}", text)

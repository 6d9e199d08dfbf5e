"""The program: parse with Typer, call one command, show its result or its error.

Exit codes and the JSON envelope are decided here and in `ui.output`, for every command alike.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import Abort, TyperException
from typer.main import get_command

from llmrun import __version__
from llmrun.cli.services import Services
from llmrun.config import Environment, Settings, load_settings
from llmrun.errors import DiskFullError, LlmrunError, UsageError
from llmrun.ui.output import Output

if TYPE_CHECKING:
    from llmrun.cli.options import Parsed


class Interrupted(LlmrunError):
    """Ctrl-C."""

    exit_code = 130
    code = "interrupted"


class Terminated(BaseException):
    """SIGTERM or SIGHUP, raised in the main thread so that every `finally` runs."""


class TerminatedError(LlmrunError):
    """What is shown after SIGTERM."""

    exit_code = 143
    code = "terminated"


def main(
    argv: Sequence[str] | None = None,
    environment: Environment | None = None,
    services: Services | None = None,
) -> int:
    """Run the command line `argv` (without the program's name); the exit code.

    No exception leaves this function but for those of the interpreter itself.
    """
    from llmrun.cli.options import Parsed

    environment = environment or Environment.of_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed = Parsed(environment, services or Services(environment))
    output = _output_before_settings(arguments, environment)
    try:
        with _terminate_as_exception():
            code = _parse(arguments, parsed)
            output.command = parsed.command
            if parsed.verb is None:
                environment.stdout.flush()
                return code
            settings = load_settings(environment, parsed.flags, parsed.reads_config)
            output = _output_for(parsed, settings)
            return _call(parsed, settings, output)
    except (KeyboardInterrupt, Terminated, Exception) as problem:  # noqa: BLE001 - shown below
        output.command = parsed.command or output.command
        return _end_badly(problem, output, arguments)


def _call(parsed: Parsed, settings: Settings, output: Output) -> int:
    from llmrun.cli.options import Invocation

    assert parsed.verb is not None
    invocation = Invocation(parsed.environment, parsed.services, settings, output)
    try:
        return output.finish(parsed.verb(invocation, **parsed.arguments))
    finally:
        parsed.services.close()


def _end_badly(problem: BaseException, output: Output, arguments: Sequence[str]) -> int:
    """Show what ended the command; never raises. The exit code."""
    environment = output.environment
    if isinstance(problem, BrokenPipeError):
        _silence_stdout(environment)
        return 1
    if environment.debug and not isinstance(problem, UsageError):
        traceback.print_exception(problem, file=environment.stderr)
    error = _as_llmrun_error(problem, arguments)
    if isinstance(error, UsageError) and error.hint is None:
        error.hint = f"llmrun {output.command} --help".replace("  ", " ")
    try:
        return output.fail(error)
    except BrokenPipeError:
        _silence_stdout(environment)
        return error.exit_code
    except OSError:  # a full disk behind stdout takes no envelope
        _silence_stdout(environment)
        output.json = False
        with contextlib.suppress(OSError):  # nor does a terminal that is gone take any words
            output.fail(error)
        return error.exit_code


def _as_llmrun_error(problem: BaseException, arguments: Sequence[str]) -> LlmrunError:
    if isinstance(problem, LlmrunError):
        return problem
    if isinstance(problem, KeyboardInterrupt):
        return Interrupted("interrupted")
    if isinstance(problem, Terminated):
        return TerminatedError("terminated")
    # CPython says so when there is no memory for a thread's stack.
    has_no_thread = isinstance(problem, RuntimeError) and "start new thread" in str(problem)
    if isinstance(problem, MemoryError) or has_no_thread:
        return LlmrunError("out of memory", hint="pass --ctx 4096, or take a smaller quant")
    if isinstance(problem, OSError) and problem.filename is not None:
        return LlmrunError(f"{problem.filename}: {problem.strerror}")
    if isinstance(problem, OSError) and _is_disk_full(problem):
        return DiskFullError("the output cannot be written", why=problem.strerror)
    return LlmrunError(
        f"unexpected {type(problem).__name__}: {problem}",
        why="this is a defect of llmrun",
        hint=f"LLMRUN_DEBUG=1 llmrun {shlex.join(arguments)}",
    )


def _is_disk_full(problem: OSError) -> bool:
    from llmrun.hub.mapping import DISK_FULL_ERRNOS

    return problem.errno in DISK_FULL_ERRNOS


def _silence_stdout(environment: Environment) -> None:
    """The reader has gone: let the interpreter's last flush write to nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, environment.stdout.fileno())
        os.close(nowhere)


def _output_before_settings(arguments: Sequence[str], environment: Environment) -> Output:
    """For errors that come before the settings are known: is JSON wanted, and what was called?"""
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    wants_json = environment.environ.get("LLMRUN_JSON", "").lower() in ("1", "true", "yes", "on")
    command = next((word for word in words if not word.startswith("-")), "")
    return Output(environment, command=command, json=wants_json or "--json" in words)


def _output_for(parsed: Parsed, settings: Settings) -> Output:
    return Output(
        parsed.environment,
        command=parsed.command,
        json=settings.json,
        quiet=settings.quiet,
        verbose=settings.verbose,
        yes=settings.yes,
    )


@contextlib.contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """SIGTERM, or the end of the terminal (SIGHUP), raises Terminated once; a second one ends the
    process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # nohup has SIGHUP ignored, and that must stay; Windows has none.
    numbers = [signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:
        numbers.append(hangup)

    def raise_terminated(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise Terminated

    before = [signal.signal(number, raise_terminated) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _parse(arguments: list[str], parsed: Parsed) -> int:
    """Let Typer read the line into `parsed`; its exit code for --help, --version and completion."""
    environment = parsed.environment
    # Typer prints help and completion scripts to sys.stdout by itself.
    with (
        contextlib.redirect_stdout(environment.stdout),
        contextlib.redirect_stderr(environment.stderr),
    ):
        try:
            code = get_command(build_app(arguments))(
                args=arguments or ["--help"],
                prog_name="llmrun",
                standalone_mode=False,
                obj=parsed,
            )
        except TyperException as problem:
            raise _usage_error(problem, parsed) from problem
        except (SystemExit, Abort) as ended:  # shell completion ends so
            code = getattr(ended, "code", 1)
            return code if isinstance(code, int) else 0
    # Help that nobody asked for is how a missing command is answered.
    return 2 if not arguments else code if isinstance(code, int) else 0


def _usage_error(problem: Any, parsed: Parsed) -> UsageError:
    context = getattr(problem, "ctx", None)
    path = context.command_path if context is not None else "llmrun"
    parsed.command = path.partition(" ")[2]
    return UsageError(problem.format_message(), hint=f"{path} --help")


_VERBS = (
    "pull",
    "fit",
    "run",
    "chat",
    "bench",
    "serve",
    "list",
    "show",
    "search",
    "rm",
    "verify",
    "prune",
    "doctor",
    "config",
)


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The Typer application. Imports no heavy module, and of the commands only the one that
    `arguments` begin with; all of them for help, completion and words that are no command."""
    from llmrun.cli.options import PlainGroup

    called = arguments[0] if arguments else ""
    verbs = (called,) if called in _VERBS else _VERBS
    app = typer.Typer(
        name="llmrun",
        cls=PlainGroup,
        help="Run open-weight language models on the machine in front of you.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    app.callback()(_program)
    for verb in verbs:
        importlib.import_module(f"llmrun.cli.{verb}").add_to(app)
    return app


def _show_version(value: bool | None) -> None:
    if value:
        sys.stdout.write(f"llmrun {__version__}\n")
        raise typer.Exit


def _program(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version",
            help="Print the version.",
            callback=_show_version,
            is_eager=True,
            show_default=False,
        ),
    ] = None,
) -> None: ...

"""`llmrun run`: one answer to stdout."""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrun.cli.options import Invocation, ModelArgument, Outcome, register
from llmrun.config import Environment, Settings
from llmrun.errors import ContextOverflowError, LlmrunError, NotFoundError, UsageError
from llmrun.text import format_duration
from llmrun.ui.output import Failed, Output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmrun.chat.parsing import Delta
    from llmrun.chat.session import ChatSession
    from llmrun.cli.open_model import OpenModel
    from llmrun.cli.prefixes import CachingEngine
    from llmrun.engine.types import FinishEvent

# What a chat template adds to a prompt, generously, in tokens.
_TEMPLATE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class UsageData:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted_tokens: int
    accepted_tokens: int


@dataclass(frozen=True, slots=True)
class TimingsData:
    """Seconds, and tokens a second."""

    load_s: float
    ttft_s: float
    prompt_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """The text was streamed already, so a person is shown nothing more."""

    model: str
    text: str
    thinking: str | None
    finish_reason: str
    usage: UsageData
    timings: TimingsData

    def show(self, output: Output) -> None:
        """See `_Answer`."""


def run(
    invocation: Invocation,
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The question; what stdin holds goes before it.",
            show_default=False,
        ),
    ] = None,
) -> Outcome:
    """Print one answer. The prompt is the argument, stdin, or both."""
    from llmrun.chat.session import ChatSession
    from llmrun.cli.open_model import open_model

    settings, output = invocation.settings, invocation.output
    _refuse_contradictions(settings)
    text = read_prompt(invocation.environment, prompt, model)
    grammar = _grammar(invocation)
    opened = open_model(invocation, model, n_ctx_enough=_n_ctx_enough(settings, text))
    try:
        cache = _cache_of(invocation, opened) if settings.prompt_cache else None
        session = ChatSession(
            cache or opened.engine,
            system=None if settings.raw else settings.system,
            sampling=replace(opened.sampling, grammar=grammar),
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            enable_thinking=settings.think,
        )
        with contextlib.closing(session):
            answer = _Answer(output, settings)
            try:
                answer.take(_generate(session, settings, output, text))
            except ContextOverflowError as error:
                _advise_on_overflow(error, opened)
                raise
            finish = session.last_finish
        if cache is not None:
            cache.keep()
    finally:
        opened.close()
    if finish is None:
        raise LlmrunError("the answer stopped before its end")
    result = _result(opened, answer, finish)
    if settings.stats:
        output.tell(stats_line(result))
    return _judge(result, output, settings, opened)


def _cache_of(invocation: Invocation, opened: OpenModel) -> CachingEngine | None:
    from llmrun.cli.prefixes import CachingEngine

    try:
        return CachingEngine(invocation, opened)
    except OSError as error:
        invocation.output.note(f"the prompt is not cached: {error}")
        return None


def _refuse_contradictions(settings: Settings) -> None:
    if settings.json_schema is not None and settings.grammar is not None:
        raise UsageError("--json-schema and --grammar cannot both rule the answer")
    if settings.raw and settings.sources["system"].kind == "flag":
        raise UsageError(
            "--raw takes no --system", why="without the chat template there are no roles"
        )


def read_prompt(environment: Environment, argument: str | None, model: str) -> str:
    """The argument, what stdin holds, or both with stdin first. Raises UsageError for none."""
    piped = ""
    if argument == "-" or not environment.stdin_is_tty:
        try:
            piped = environment.stdin.read()
        except UnicodeDecodeError as error:
            raise UsageError("stdin is not UTF-8 text", why=str(error)) from error
    parts = [piped.rstrip("\n")] if piped.strip() else []
    if argument is not None and argument != "-" and argument.strip():
        parts.append(argument)
    if not parts:
        raise UsageError(
            "there is no prompt",
            why="neither an argument nor anything on stdin",
            hint=f'llmrun run {shlex.quote(model)} "Explain what a hash table is."',
        )
    text = "\n\n".join(parts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not UTF-8 text", why=str(error)) from error
    return text


def _grammar(invocation: Invocation) -> str | None:
    settings = invocation.settings
    if settings.json_schema is not None:
        from llmrun.cli.json_schema import unenforced_keywords

        given = settings.json_schema
        is_text = given.lstrip().startswith(("{", "["))
        schema = given if is_text else _read_text(given, "the JSON schema")
        grammar = invocation.services.grammar_of_schema(schema)
        if unenforced := unenforced_keywords(schema):
            invocation.output.warn(
                f"the JSON schema's {', '.join(unenforced)} cannot be enforced: check the answer"
            )
        return grammar
    return _read_text(settings.grammar, "the grammar") if settings.grammar is not None else None


def _read_text(path: str, what: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"{what}: there is no file {path}") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{what}: cannot read {path}", why=str(error)) from error


def _n_ctx_enough(settings: Settings, text: str) -> int | None:
    """A bound on the tokens of this run, known only when the answer's length is bounded: a token
    is at least a byte."""
    if settings.max_tokens is None:
        return None
    n_prompt = len(text.encode()) + len((settings.system or "").encode())
    return n_prompt + _TEMPLATE_TOKENS + settings.max_tokens


def _generate(
    session: ChatSession, settings: Settings, output: Output, text: str
) -> Iterator[Delta]:
    from llmrun.chat.messages import Message

    if settings.raw:
        return session.complete_text(text)
    if session.is_fallback:
        output.detail("this model has no chat template: it continues the prompt as plain text")
        return session.complete_text("\n\n".join(filter(None, (settings.system, text))))
    system = [Message("system", settings.system)] if settings.system else []
    return session.complete([*system, Message("user", text)])


def _advise_on_overflow(error: ContextOverflowError, opened: OpenModel) -> None:
    """A larger context is no way out where it would leave what the model was trained for."""
    n_ctx_train = opened.acquired.info.n_ctx_train
    if n_ctx_train and error.n_prompt >= n_ctx_train:
        error.why = f"the model was trained for contexts of up to {n_ctx_train} tokens"
        error.hint = "shorten the prompt, or take a model with a longer context"


class _Answer:
    """Collects an answer and shows it as it comes: the answer on stdout, thinking beside it."""

    def __init__(self, output: Output, settings: Settings) -> None:
        self.text = ""
        self.thinking = ""
        self._output = output
        self._raw = settings.raw
        self._streams = not output.json
        self._shows_thinking = (
            self._streams
            and not output.quiet
            and not settings.hide_thinking
            and output.environment.stderr_is_tty
        )
        self._is_beside = False

    def take(self, deltas: Iterator[Delta]) -> None:
        """Read to the end. The stream is closed, and a line ended, also when it breaks off."""
        try:
            with contextlib.closing(deltas):  # type: ignore[type-var]
                for delta in deltas:
                    if delta.kind == "thinking":
                        self._think(delta.text)
                    else:
                        self._say(delta.text)
        finally:
            self._end_line()

    def _think(self, text: str) -> None:
        self.thinking += text
        if self._shows_thinking:
            self._output.aside(text)
            self._is_beside = True

    def _say(self, text: str) -> None:
        if self._is_beside:
            self._output.aside("\n\n")
            self._is_beside = False
        self.text += text
        if self._streams:
            self._output.stream(text, raw=self._raw)

    def _end_line(self) -> None:
        if self._is_beside:
            self._output.aside("\n")
        if self._streams and self.text and not self.text.endswith("\n"):
            self._output.stream("\n")


def _result(opened: OpenModel, answer: _Answer, finish: FinishEvent) -> RunResult:
    usage, timings = finish.usage, finish.timings
    return RunResult(
        model=opened.acquired.reference,
        text=answer.text,
        thinking=answer.thinking or None,
        finish_reason=finish.reason,
        usage=UsageData(
            usage.n_prompt,
            usage.n_completion,
            usage.n_cached,
            usage.n_drafted,
            usage.n_accepted,
        ),
        timings=TimingsData(
            load_s=round(opened.engine.load_s, 4),
            ttft_s=round(timings.ttft_s, 4),
            prompt_tok_s=round(timings.prompt_tok_s, 2),
            decode_tok_s=round(timings.decode_tok_s, 2),
        ),
    )


def _judge(result: RunResult, output: Output, settings: Settings, opened: OpenModel) -> Outcome:
    """Say when the answer was cut; under a JSON schema, text that does not parse is a failure."""
    if result.finish_reason != "length":
        return result if settings.json_schema is None else _judge_json(result)
    n_ctx = opened.engine.n_ctx
    is_full = result.usage.prompt_tokens + result.usage.completion_tokens >= n_ctx
    if settings.json_schema is not None:
        error = LlmrunError(
            "the answer was cut before its JSON was complete",
            why=f"the context of {n_ctx} tokens is full" if is_full else "--max-tokens is reached",
            hint=f"pass --ctx {2 * n_ctx}" if is_full else "pass a larger --max-tokens",
        )
        return Failed(result, (error,))
    if is_full:
        output.note(f"the answer stops here: the context of {n_ctx} tokens is full; pass --ctx N")
    return result


def _judge_json(result: RunResult) -> Outcome:
    """The grammar rules what is generated, but a stop string can cut it."""
    try:
        json.loads(result.text)
    except ValueError as error:
        return Failed(result, (LlmrunError("the answer is not valid JSON", why=str(error)),))
    return result


def stats_line(result: RunResult) -> str:
    usage, timings = result.usage, result.timings
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    guessed = ""
    if usage.drafted_tokens:
        guessed = f" ({usage.accepted_tokens} of {usage.drafted_tokens} guesses right)"
    return (
        f"{usage.prompt_tokens} prompt tokens{cached} at {timings.prompt_tok_s:.1f} tok/s, "
        f"{usage.completion_tokens} tokens{guessed} at {timings.decode_tok_s:.1f} tok/s, "
        f"first after {format_duration(timings.ttft_s)}, "
        f"loaded in {format_duration(timings.load_s)}"
    )


def add_to(app: typer.Typer) -> None:
    register(app, "run", run, "hub", "load", "sampling", "prompt", "run", "prefix")

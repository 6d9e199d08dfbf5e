"""`llmrun chat`: opens a model and hands it to the interactive session."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrun.cli.options import Invocation, OptionalModelArgument, register
from llmrun.config import Settings
from llmrun.errors import LlmrunError, NotFoundError, UsageError
from llmrun.text import format_bytes
from llmrun.ui.output import Output

if TYPE_CHECKING:
    from llmrun.catalog.entries import CatalogEntry
    from llmrun.chat.session import ChatSession
    from llmrun.chat.store import Conversation, SessionStore
    from llmrun.cli.open_model import OpenModel
    from llmrun.cli.prefixes import ChatPrefixes
    from llmrun.fit.ranking import Ranked
    from llmrun.repl.state import Switched


def chat(
    invocation: Invocation,
    model: OptionalModelArgument = None,
    continue_: Annotated[
        bool, typer.Option("--continue", "-c", help="Go on with the last conversation.")
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="ID", help="Go on with this saved conversation."),
    ] = None,
) -> int:
    """Talk to a model. Without MODEL: the configured one, else the last used."""
    from llmrun.chat.store import SessionStore
    from llmrun.cli.prefixes import ChatPrefixes

    if invocation.settings.json:
        raise UsageError(
            "chat is a session for people and has no --json",
            hint='llmrun run MODEL "your question" --json',
        )
    if continue_ and resume is not None:
        raise UsageError("--continue and --resume cannot both be given")
    models = _Models(invocation)
    prefixes = ChatPrefixes(invocation, lambda: models.opened)
    saver = SessionStore(invocation.environment.state_dir, prefixes.forget)
    conversation = saver.resume(resume) if resume else saver.latest() if continue_ else None
    text = model or (conversation.model if conversation else None) or default_model(invocation)
    try:
        session = models.open(text, conversation)
        return _talk(invocation, session, models, text, saver, conversation, prefixes)
    finally:
        models.close()


def _talk(
    invocation: Invocation,
    session: ChatSession,
    models: _Models,
    title: str,
    saver: SessionStore,
    conversation: Conversation | None,
    prefixes: ChatPrefixes,
) -> int:
    from llmrun.repl.loop import Repl
    from llmrun.repl.prompt import make_line_reader

    settings, output, environment = (
        invocation.settings,
        invocation.output,
        invocation.environment,
    )
    shows_markdown = settings.markdown is not False and environment.stdout_is_tty
    repl = Repl(
        session,
        console=output.stdout,
        err_console=output.stderr,
        model_title=title,
        switch_model=models.switch,
        list_models=models.names,
        saver=saver,
        conversation=conversation,
        fixed=fixed_settings(settings),
        prefixes=prefixes,
        drops_oldest=settings.context_shift,
        show_markdown=shows_markdown,
        think_mode="off" if settings.think is False else "hide" if settings.hide_thinking else "on",
    )
    reader = make_line_reader(
        history_path=environment.state_dir / "history",
        complete=repl.complete,
        environ=environment.environ,
        stdin=environment.stdin,
        err=environment.stderr,
    )
    return repl.run(reader)


def fixed_settings(settings: Settings) -> frozenset[str]:
    """What was chosen for this very run, so that no saved conversation changes it."""
    sources = settings.sources.items()
    return frozenset(key for key, source in sources if source.kind in ("flag", "environment"))


@dataclass(slots=True)
class _Models:
    """The model that is open, and how to get another one."""

    invocation: Invocation
    opened: OpenModel | None = None
    session: ChatSession | None = None

    def open(self, text: str, conversation: Conversation | None = None) -> ChatSession:
        from llmrun.cli.open_model import open_model

        return self._start(open_model(self.invocation, text), conversation)

    def _start(self, opened: OpenModel, conversation: Conversation | None = None) -> ChatSession:
        from llmrun.chat.session import ChatSession

        settings = self.invocation.settings
        self.opened = opened
        # The system message of a saved conversation goes before the config file's.
        keeps_system = conversation is not None and "system" not in fixed_settings(settings)
        self.session = ChatSession(
            opened.engine,
            system=None if keeps_system else settings.system,
            sampling=opened.sampling,
            max_tokens=settings.max_tokens,
            stop=settings.stop,
            enable_thinking=settings.think,
            messages=conversation.messages if conversation is not None else (),
        )
        return self.session

    def switch(self, text: str) -> Switched:
        """A session on another model.

        The name is looked up, and a file that is here is looked into, while the old model is still
        open, so that a wrong one costs nothing.
        Then the old one goes before the new one is judged and loaded: a machine that holds either
        need not hold both, and the plan sees the memory that there will be. When the new one fails,
        also by Ctrl-C, the old one is loaded again.
        """
        from llmrun.cli.acquire import read_model_info, resolve_model
        from llmrun.cli.open_model import load_model
        from llmrun.repl.state import Switched

        # Quiet: what there is to note is noted when it is opened.
        quiet = Output(self.invocation.environment, quiet=True)
        resolved = resolve_model(replace(self.invocation, output=quiet), text)
        if resolved.is_on_disk:
            read_model_info(self.invocation, resolved)
        old = self.opened
        self.close()
        try:
            return Switched(self.open(text))
        except (LlmrunError, KeyboardInterrupt) as problem:
            self.close()
            if old is None:
                raise
            error = problem if isinstance(problem, LlmrunError) else LlmrunError("stopped")
            return Switched(self._start(load_model(self.invocation, old.acquired)), error)

    def names(self) -> list[str]:
        stored = self.invocation.services.store().models()
        return [model.reference for model in stored if model.state == "complete"]

    def close(self) -> None:
        session, opened = self.session, self.opened
        self.session = self.opened = None
        if session is not None:
            session.close()
        if opened is not None:
            opened.close()


def default_model(invocation: Invocation) -> str:
    """The configured model, else the last used one that is still here, else a recommendation that
    the person agreed to. Raises NotFoundError when they did not, UsageError when nobody is there
    to ask."""
    from llmrun.cli.judge import describe_speed

    configured = invocation.settings.model
    if configured:
        return configured
    last = _last_used(invocation)
    if last is not None:
        return last
    found = recommend(invocation)
    hint = "llmrun chat smollm2-135m"
    if found is None:
        raise NotFoundError("no model is named, and none was used before", hint=hint)
    entry = found.entry
    size = f" ({format_bytes(found.n_bytes)})"
    fits = "fits this machine" if found.suits else "is the best that runs on this machine"
    speed = found.forecast
    if speed is not None:
        fits += f", {describe_speed(speed.low, speed.high)}"
    try:
        agreed = invocation.output.confirm(
            f"No model yet. {entry.title}{size} {fits}. Download it?"
        )
    except UsageError as error:
        raise UsageError(
            "no model is named, and none was used before",
            why=f"{entry.name}{size} {fits}",
            hint=f"llmrun chat {entry.name}",
        ) from error
    if not agreed:
        raise NotFoundError("no model was chosen", hint=hint)
    return entry.name


def _last_used(invocation: Invocation) -> str | None:
    store = invocation.services.store()
    last = store.last_used()
    if last is None:
        return None
    for model in store.models():
        names = {model.reference, *(str(file.local_path) for file in model.files)}
        if last in names and model.state == "complete":
            return model.reference
    return last if Path(last).is_file() else None


def recommend(invocation: Invocation) -> Ranked[CatalogEntry] | None:
    """The catalog's best chat model for this machine (see `fit.ranking`); None where the memory
    cannot be read or nothing runs."""
    from llmrun.cli.measure import with_ram_bandwidth
    from llmrun.fit.ranking import best_for

    machine = with_ram_bandwidth(invocation.services.machine(), invocation.environment.state_dir)
    return best_for(invocation.services.catalog(), machine)


def add_to(app: typer.Typer) -> None:
    register(app, "chat", chat, "hub", "load", "sampling", "prompt", "chat", "prefix")

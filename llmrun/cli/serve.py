"""`llmrun serve`: the HTTP server."""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from llmrun import __version__
from llmrun.cli.options import Invocation, complete_model, register
from llmrun.cli.serve_log import LogOutput
from llmrun.config import Settings
from llmrun.errors import LlmrunError, NotFoundError, UsageError
from llmrun.text import escape_line, format_count

if TYPE_CHECKING:
    from llmrun.server.guard import GuardOptions
    from llmrun.server.host import Opened
    from llmrun.ui.output import Output

# A thread that computes in Python keeps others waiting this long. The engine's thread must not wait
# the usual 5 ms for the event loop after each of its steps.
_SWITCH_INTERVAL_S = 0.0005

# For the last lines to be written. A terminal that is stopped takes none.
_LAST_LINES_S = 1.0


def serve(
    invocation: Invocation,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Models to load now and keep; without any, all that are here, when asked for.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
    print_config: Annotated[
        str | None,
        typer.Option(
            "--print-config",
            metavar="CLIENT",
            help="Print what to paste into a client's settings (list: which there are), and end.",
        ),
    ] = None,
) -> int | ClientSettings | ClientList:
    """Serve models to OpenAI, Anthropic and Ollama clients."""
    from llmrun.server.guard import check_bind

    settings, output = invocation.settings, invocation.output
    if print_config is not None:
        return _print_config(invocation, print_config, models or [])
    keys = _read_keys(settings, output)
    check_bind(settings.host, bool(keys), settings.insecure)
    guard = _guard_options(settings, keys)
    return _Server(invocation, models or [], guard).run()


def _read_keys(settings: Settings, output: Output) -> tuple[str, ...]:
    from llmrun.server.guard import parse_keys, read_key_file

    keys: list[str] = []
    if settings.api_key is not None:
        try:
            found = parse_keys(settings.api_key)
        except ValueError as error:
            raise UsageError("the API key cannot be used", why=str(error)) from None
        if len(found) != 1:
            raise UsageError("the API key is empty", hint="set LLMRUN_API_KEY to a long word")
        keys += found
        if settings.sources["api_key"].kind == "flag":
            output.note("other users of this machine can see --api-key; LLMRUN_API_KEY is safer")
    if settings.api_key_file is not None:
        from_file, warning = read_key_file(Path(settings.api_key_file).expanduser())
        if warning is not None:
            output.warn(warning)
        keys += from_file
    return tuple(dict.fromkeys(keys))


def _guard_options(settings: Settings, keys: tuple[str, ...]) -> GuardOptions:
    from llmrun.server.guard import GuardOptions, known_hosts, parse_host_name, parse_origin

    named = [parse_host_name(text) for text in settings.allowed_host]
    own = known_hosts(settings.host, socket.gethostname())
    return GuardOptions(
        bound=settings.host,
        hosts=(*named, *own),
        origins=tuple(parse_origin(text, bool(keys)) for text in settings.cors_origin),
        api_keys=keys,
        open_paths=("/", "/health", "/docs", "/openapi.json", "/ui/*"),
        # What runs and what waits is bounded for each model; this bounds what has not come so far.
        max_active=max(512, 4 * settings.max_queue),
    )


class _Server:
    """One run of the server, from its first line to its last."""

    def __init__(self, invocation: Invocation, models: list[str], guard: GuardOptions) -> None:
        self._output = LogOutput(invocation.output)
        self._invocation = replace(invocation, output=self._output)
        self._settings = invocation.settings
        self._models = models
        self._guard = guard
        self._url = ""

    def run(self) -> int:
        from llmrun.cli.open_model import route_logs
        from llmrun.cli.serve_models import ServedModels
        from llmrun.cli.serve_status import StatusLine
        from llmrun.server import lifecycle
        from llmrun.server.app import build_app, encode_error_for
        from llmrun.server.background import run_in_thread
        from llmrun.server.host import HostOptions, ModelHost
        from llmrun.server.limits import GuardMiddleware
        from llmrun.server.page import greetings, pages
        from llmrun.server.service import Service

        settings, output = self._settings, self._output
        keep_alive_s = _read_keep_alive(settings.keep_alive)
        _route_server_logs(output)
        route_logs(output)
        opener = ServedModels(
            self._invocation,
            self._models,
            allow_pull=settings.allow_pull,
            n_parallel=settings.parallel,
        )
        pinned = opener.prepare()
        if not pinned and not settings.allow_pull and not opener.cards():
            raise NotFoundError(
                "there is no model on this machine yet", hint="llmrun serve smollm2-135m"
            )
        import numpy  # noqa: F401 - a tenth of a second that no answer shall wait for

        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        host = self._host = ModelHost(
            opener,
            HostOptions(
                keep_alive_s=keep_alive_s,
                pinned=pinned,
                allow_pull=settings.allow_pull,
                max_queue=settings.max_queue,
            ),
        )
        state = lifecycle.ServerState()
        service = Service(host, state, version=__version__, takes_grammars=settings.allow_grammar)
        status = self._status = StatusLine(output, service)
        app = GuardMiddleware(
            build_app(service, ui=pages() if settings.ui else greetings()),
            self._guard,
            encode_error_for,
            state,
            log=output.detail if output.verbose else None,
        )

        async def stop() -> None:
            try:
                await status.stop()
                await host.close()
            finally:
                await run_in_thread(partial(output.end, _LAST_LINES_S), "llmrun-end")

        code = 1
        try:
            code = lifecycle.serve(
                app,
                lifecycle.ServeOptions(
                    host=settings.host, port=settings.port, drain_s=settings.drain
                ),
                state,
                on_listen=self._note_url,
                on_start=host.start,
                on_ready=self._say_ready,
                on_drain=self._say_drain,
                on_stop=stop,
                on_abort=self._abort,
            )
            self._event({"event": "stopped"})
        except LlmrunError as error:
            code = error.exit_code
            raise
        finally:
            if output.is_stuck:
                # The interpreter's own end would wait for the stream, which nobody reads.
                os._exit(code)
        return code

    # ---- what a person sees

    def _note_url(self, url: str) -> None:
        self._output.begin()
        self._url = url
        if self._models:
            self._output.note(f"{url} listens, loading {', '.join(self._models)}")

    def _say_ready(self, url: str) -> None:
        output, host = self._output, self._host
        loaded = host.opened()
        cards = host.cards()
        self._event(
            {
                "event": "ready",
                "url": url,
                "port": urlsplit(url).port,
                "models": [card.name for card in cards],
                "loaded": [_as_row(opened) for opened in loaded],
            }
        )
        output.note(f"llmrun {__version__} serves at {url} (Ctrl-C ends it)")
        for opened in loaded:
            output.note(f"  {_describe(opened)}")
        if not loaded:
            names = ", ".join(escape_line(card.name) for card in cards[:8])
            more = f" and {len(cards) - 8} more" if len(cards) > 8 else ""
            output.note(f"  loaded when asked for: {names or 'what is downloaded'}{more}")
        if self._settings.ui:
            output.note(f"web chat: {url}/")
        name = loaded[0].card.name if loaded else cards[0].name if cards else "smollm2-135m"
        output.note(f"try: {_curl(url, name, bool(self._guard.api_keys))}")
        self._status.start()

    def _say_drain(self, n_active: int) -> None:
        self._status.pause()
        self._event({"event": "draining", "running": n_active})
        if n_active:
            who = "1 request has" if n_active == 1 else f"{n_active} requests have"
            self._output.note(
                f"ending: {who} {self._settings.drain:g} s to finish (once more to end at once)"
            )

    def _event(self, event: dict[str, object]) -> None:
        if self._output.json:
            self._output.event(event)

    def _abort(self) -> None:
        """The process ends now: no decode may be running when it does."""
        for opened in self._host.opened():
            opened.close()


def _describe(opened: Opened) -> str:
    n, n_ctx = opened.n_parallel, format_count(opened.n_ctx)
    if opened.engine is None:
        what = f"{'vectors' if opened.role == 'embed' else 'scores'}, inputs up to {n_ctx} tokens"
    elif n == 1:
        what = f"1 request at a time, context {n_ctx}"
    else:
        others = "in caches of their own"
        if opened.kv_unified:
            others = f"{format_count(opened.engine.n_ctx)} together"
        what = f"{n} requests at once, context {n_ctx} each, {others}"
    line = f"{opened.card.name}: {what}; {opened.plan_line}; loaded in {opened.load_s:.1f} s"
    return escape_line(line)


def _as_row(opened: Opened) -> dict[str, object]:
    return {
        "model": opened.card.name,
        "role": opened.role,
        "n_ctx": opened.n_ctx,
        "parallel": opened.n_parallel,
        "kv_unified": opened.kv_unified,
        "load_s": round(opened.load_s, 3),
        "memory_bytes": opened.memory_bytes,
    }


def _curl(url: str, name: str, needs_key: bool) -> str:
    """A command line that works as it stands."""
    key = ' -H "Authorization: Bearer $LLMRUN_API_KEY"' if needs_key else ""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hi!"}]})
    return (
        f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)}"
    )


def _read_keep_alive(text: str) -> float:
    from llmrun.server.reading import Fields
    from llmrun.server.types import ApiError
    from llmrun.server.wire_openai_fields import read_keep_alive

    try:
        found = read_keep_alive(Fields({"keep_alive": text}))
    except ApiError as error:
        raise UsageError(f"option --keep-alive: {error.message}", hint="--keep-alive 5m") from None
    return 0.0 if found is None else found


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What `--print-config` prints."""

    client: str
    settings: str

    def show(self, output: Output) -> None:
        output.line(self.settings)


@dataclass(frozen=True, slots=True)
class ClientList:
    """The clients that `--print-config` knows, each with the kind of settings it gets."""

    clients: Mapping[str, str]

    def show(self, output: Output) -> None:
        for name, words in self.clients.items():
            output.line(f"{name:<18} {words}")


def _print_config(
    invocation: Invocation, client: str, models: list[str]
) -> ClientSettings | ClientList:
    from llmrun.server.client_config import client_config, client_names

    settings = invocation.settings
    if client == "list":
        return ClientList(dict(client_names()))
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port or 8080}"
    names = _names_for_clients(invocation, models)
    has_key = settings.api_key is not None or settings.api_key_file is not None
    return ClientSettings(client, client_config(client, url, names, has_key=has_key))


def _names_for_clients(invocation: Invocation, models: list[str]) -> list[str]:
    """What the server would call these models, or those that are here and can answer."""
    from llmrun.catalog.names import is_local_model
    from llmrun.cli.acquire import resolve_model
    from llmrun.cli.serve_cards import CardList, name_of_file

    if models:
        return [
            name_of_file(resolve_model(invocation, model).local_paths[0])
            if is_local_model(model)
            else model
            for model in models
        ]
    cards = [served.card for served in CardList(invocation).served()]
    return [card.name for card in cards if card.can_chat] or ["smollm2-135m"]


class _LogHandler(logging.Handler):
    """The server's own log lines as warnings and notes."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.INFO if output.verbose else logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and self._output.environment.debug:
            text += "\n" + "".join(traceback.format_exception(record.exc_info[1]))
        elif record.exc_info and record.exc_info[1] is not None:
            # Its words may hold a prompt; LLMRUN_DEBUG=1 shows them.
            text += f" ({type(record.exc_info[1]).__name__}; LLMRUN_DEBUG=1 shows more)"
        if record.levelno >= logging.WARNING:
            self._output.warn(text)
        else:
            self._output.detail(text)


def _route_server_logs(output: Output) -> None:
    logger = logging.getLogger("llmrun.server")
    for handler in [h for h in logger.handlers if isinstance(h, _LogHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(_LogHandler(output))
    logger.setLevel(logging.INFO)
    logger.propagate = False


def add_to(app: typer.Typer) -> None:
    register(app, "serve", serve, "hub", "load", "streams", "sampling", "serve")

"""From the option table to Typer: a command names its groups of options and gets `Settings`.

A command is a function `verb(invocation, own arguments…) -> Result | Failed | None`. `register`
adds the options of its groups to the signature that Typer sees. When Typer has parsed the line it
only notes what to call; `cli.app.main` calls it outside of Typer, so that all errors end in one
place.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from llmrun.cli.services import Services
from llmrun.config import Environment, Settings
from llmrun.option_table import OPTIONS, Group, Option
from llmrun.ui.output import Failed, Output, Result

Outcome = Result | Failed | int | None
"""An int is the exit code of a command that showed everything itself."""

Verb = Callable[..., Outcome]


@dataclass(frozen=True, slots=True)
class Invocation:
    """What every command gets."""

    environment: Environment
    services: Services
    settings: Settings
    output: Output


@dataclass(slots=True)
class Parsed:
    """What the command line says: filled in while Typer parses. `reads_config` is False for
    commands that must work while the config file is broken."""

    environment: Environment
    services: Services
    command: str = ""
    verb: Verb | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    reads_config: bool = True


def register(
    app: typer.Typer,
    name: str,
    verb: Verb,
    *groups: Group,
    full_name: str | None = None,
    reads_config: bool = True,
    as_callback: bool = False,
) -> None:
    """Add `verb` to `app` as the command `name`; its docstring is the help.

    `full_name` is what the JSON envelope calls it. `as_callback`: it is what the group itself does
    when no sub-command is named.
    """
    options = {o.key: o for o in OPTIONS if o.group in ("common", *groups) and o.key != "model"}
    hints = typing.get_type_hints(verb, include_extras=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in list(inspect.signature(verb).parameters.values())[1:]
    ]

    def note_call(typer_context: typer.Context, **values: Any) -> None:
        if as_callback and typer_context.invoked_subcommand is not None:
            return
        parsed = typer_context.find_root().obj
        parsed.command = full_name or name
        parsed.verb = verb
        parsed.reads_config = reads_config
        parsed.flags = {key: values.pop(key) for key in options}
        parsed.arguments = values

    note_call.__doc__ = inspect.getdoc(verb)
    note_call.__name__ = verb.__name__
    note_call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                "typer_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
            ),
            *own,
            *(_parameter(option) for option in options.values()),
        ]
    )
    if as_callback:
        app.callback(invoke_without_command=True)(note_call)
    else:
        app.command(name, cls=PlainCommand)(note_call)


class _PlainParameter:
    """Takes the place of Typer's own conversion of one parameter: the words stay as they are."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Typer's contract: a parameter that may be repeated is never None."""
        if value is None and (param.multiple or param.nargs == -1):
            return ()
        return value


class PlainCommand(TyperCommand):
    """A command whose words and flags are not sent through pydantic (see `_without_pydantic`)."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_pydantic(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """A group whose own flags are not sent through pydantic (see `_without_pydantic`)."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_pydantic(super().get_params(ctx))


def _without_pydantic(params: list[Any]) -> list[Any]:
    """Leave words and flags as the parser gives them.

    Typer imports pydantic and builds a validator for each parameter of the command that runs: a
    tenth of a second at every start, for texts that `config.parse_value` reads anyway. Versions of
    Typer that do not know the attribute convert as they always do.
    """
    for param in params:
        descriptor = getattr(param, "type_descriptor", None)
        is_word = getattr(descriptor, "annotation", None) in (str, bool, list[str])
        if is_word or getattr(param, "count", False):
            param._runtime_param = _PlainParameter()
    return params


_KIND_METAVAR = {"int": "N", "float": "X", "text": "TEXT", "texts": "TEXT"}


def _parameter(option: Option) -> inspect.Parameter:
    """Values stay text here: config.parse_value reads them all, whatever source they come from."""
    if option.kind in ("flag", "switch"):
        kind: Any = bool | None
        made = typer.Option(*option.flag_names, help=option.help, show_default=False)
    elif option.kind == "count":
        kind = int
        made = typer.Option(*option.flag_names, help=option.help, count=True, show_default=False)
    else:
        kind = list[str] | None if option.kind == "texts" else str | None
        metavar = option.metavar or _KIND_METAVAR.get(option.kind) or "|".join(option.words)
        made = typer.Option(*option.flag_names, help=option.help, metavar=metavar)
    return inspect.Parameter(
        option.key,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, made],
        default=0 if option.kind == "count" else None,
    )


def complete_stored(ctx: typer.Context, incomplete: str) -> list[str]:
    """Like `complete_model`, stored models only."""
    services: Services = ctx.find_root().obj.services
    try:
        names = [model.reference for model in services.store().models()]
        return [name for name in names if name.startswith(incomplete)]
    except Exception:  # noqa: BLE001 - as in complete_model
        return []


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Model names for shell completion: cache and catalog only, no network, never an error."""
    services: Services = ctx.find_root().obj.services
    try:
        return [name for name in services.known_names() if name.startswith(incomplete)]
    except Exception:  # noqa: BLE001 - nothing may print into the line that is being typed
        return []


ModelArgument = Annotated[
    str,
    typer.Argument(
        help="Catalog name, hub repository or file, with :QUANT if wanted.",
        metavar="MODEL",
        autocompletion=complete_model,
        show_default=False,
    ),
]
OptionalModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="Catalog name, hub repository or file, with :QUANT if wanted.",
        metavar="MODEL",
        autocompletion=complete_model,
    ),
]
ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Catalog names, hub repositories or files, with :QUANT if wanted.",
        metavar="MODEL",
        autocompletion=complete_model,
        show_default=False,
    ),
]
StoredModelsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Models as `llmrun list` shows them, or catalog names.",
        metavar="MODEL",
        autocompletion=complete_stored,
        show_default=False,
    ),
]

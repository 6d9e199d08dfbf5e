"""`llmrun config`: every setting, where it came from, and a way to change the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmrun.cli.config_file import set_in_config_file
from llmrun.cli.options import Invocation, PlainGroup, register
from llmrun.config import Source, parse_value, read_config_file, require_option
from llmrun.option_table import OPTIONS, Option

if TYPE_CHECKING:
    from llmrun.ui.output import Output

import typer


@dataclass(frozen=True, slots=True)
class SettingRow:
    """`source` is default, file, environment or flag; `origin` the file, variable or flag."""

    key: str
    value: Any
    source: str
    origin: str | None


@dataclass(frozen=True, slots=True)
class ConfigResult:
    path: Path
    settings: tuple[SettingRow, ...]

    def show(self, output: Output) -> None:
        output.table(
            ("setting", "value", "from"),
            [
                (row.key, _shown(row.value), f"{row.source} {row.origin or ''}".strip())
                for row in self.settings
            ],
        )
        output.note(f"file: {self.path}")


@dataclass(frozen=True, slots=True)
class ConfigPathResult:
    path: Path
    exists: bool

    def show(self, output: Output) -> None:
        output.line(str(self.path))


@dataclass(frozen=True, slots=True)
class ConfigChangeResult:
    path: Path
    key: str
    value: Any

    def show(self, output: Output) -> None:
        what = "removed" if self.value is None else f"= {_shown(self.value)}"
        output.note(f"{self.key} {what} in {self.path}")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _without_secret(option: Option, value: Any) -> Any:
    return "(set)" if option.is_secret and value is not None else value


def show_config(invocation: Invocation) -> ConfigResult:
    """Show every setting and where it came from."""
    settings = invocation.settings
    rows = []
    for option in OPTIONS:
        source = settings.sources[option.key]
        value = _without_secret(option, getattr(settings, option.key))
        rows.append(SettingRow(option.key, value, source.kind, source.name))
    return ConfigResult(invocation.environment.config_path, tuple(rows))


def show_path(invocation: Invocation) -> ConfigPathResult:
    """Print where the config file is."""
    path = invocation.environment.config_path
    return ConfigPathResult(path, path.exists())


Key = Annotated[str, typer.Argument(metavar="KEY", help="A setting.", show_default=False)]


def set_value(
    invocation: Invocation,
    key: Key,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="Its value.", show_default=False)],
) -> ConfigChangeResult:
    """Write a setting into the config file; comments and other lines stay."""
    option = require_option(key)
    parsed = parse_value(option, value, Source("flag", option.key))
    # "auto" is None inside the program, which TOML cannot say.
    written = option.none_word if parsed is None else parsed
    path = invocation.environment.config_path
    set_in_config_file(path, option.key, written)
    return ConfigChangeResult(path, option.key, _without_secret(option, written))


def unset_value(invocation: Invocation, key: Key) -> ConfigChangeResult:
    """Remove a setting from the config file."""
    path = invocation.environment.config_path
    # A key that is no setting keeps llmrun from starting, so it has to be removable.
    name = key if key in read_config_file(path, any_key=True) else require_option(key).key
    set_in_config_file(path, name, None)
    return ConfigChangeResult(path, name, None)


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(cls=PlainGroup, rich_markup_mode=None, help=show_config.__doc__)
    register(group, "config", show_config, as_callback=True)
    register(group, "set", set_value, full_name="config set", reads_config=False)
    register(group, "unset", unset_value, full_name="config unset", reads_config=False)
    register(group, "path", show_path, full_name="config path", reads_config=False)
    app.add_typer(group, name="config")

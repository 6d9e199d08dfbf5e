"""Machines by name, and from files: for plans for a machine other than this one."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from llmrun.errors import NotFoundError, UsageError
from llmrun.hardware.machine import Machine
from llmrun.hardware.machine_file import (
    MAX_FILE_BYTES,
    dump_machine,
    parse_machine,
    read_machine,
)
from llmrun.text import close_names, escape_line

__all__ = ["describe_names", "dump_machine", "load_machine", "machine_names"]


def machine_names() -> tuple[str, ...]:
    """The names that `load_machine` knows."""
    return tuple(_known())


def describe_names() -> dict[str, str]:
    """What stands behind each name, in words."""
    return {name: title for name, (title, _) in _known().items()}


def load_machine(text: str) -> Machine:
    """The machine that `text` names: a known name, or a file in the form of `machine_file`.

    Raises NotFoundError for neither, UsageError for a file that cannot be used.
    """
    known = _known()
    if found := known.get(text.strip().lower()):
        return found[1]
    path = Path(text).expanduser()
    if not _is_file(path):
        name = escape_line(text)
        if path.suffix in (".toml", ".json") or len(path.parts) > 1:
            if _is_folder(path):
                raise NotFoundError(f"{name} is a folder, not a machine file")
            raise NotFoundError(
                f"there is no machine file {name}",
                hint=f"name a file, or one of: {', '.join(known)}",
            )
        near = close_names(text, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"
        raise NotFoundError(f"there is no machine called {name!r}", hint=hint)
    machine = _read_file(path)
    return machine if machine.name else replace(machine, name=path.stem)


def _read_file(path: Path) -> Machine:
    where = escape_line(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{where} cannot be read", why=error.strerror) from error
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{where} is too large to be a machine file")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where} is no text in UTF-8", why=str(error.reason)) from error
    return parse_machine(content, where, is_json=path.suffix == ".json")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, a NUL in it
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@lru_cache(maxsize=1)
def _known() -> dict[str, tuple[str, Machine]]:
    """Title and machine by name, from the package's file. Read once."""
    text = (files("llmrun.hardware") / "machines.toml").read_text(encoding="utf-8")
    known = {}
    for name, table in tomllib.loads(text).items():
        title = str(table.pop("title"))
        machine = read_machine(table, f"machines.toml, {name}")
        known[name] = (title, replace(machine, name=name))
    return known

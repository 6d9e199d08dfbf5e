"""Writing one setting into the config file without touching the rest of it."""

from __future__ import annotations

import json
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from llmrun.config import read_config_file
from llmrun.errors import UsageError

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_SIMPLE_LINE = (
    r"^(?P<head>[ \t]*{key}[ \t]*=[ \t]*)"
    rf"(?P<value>{_STRING}|\[(?:{_STRING}|[^\"'\[\]{{{{#\n])*\]|[^\"'\[{{{{#\n]*?)"
    r"(?P<tail>[ \t]*(?:#.*)?)$"
)


def set_in_config_file(path: Path, key: str, value: Any) -> None:
    """Write `key = value` (None: remove the key), keeping every other line and all comments.

    Only one-line values are edited. The new text is parsed before it replaces the file; where it
    does not say what was meant, the file stays as it was and UsageError is raised.
    """
    before = read_config_file(path, any_key=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    line = re.compile(_SIMPLE_LINE.format(key=re.escape(key)), re.MULTILINE)
    wanted = {name: old for name, old in before.items() if name != key}
    if value is None:
        new = re.sub(line.pattern + r"\n?", "", text, count=1, flags=re.MULTILINE)
    else:
        wanted[key] = list(value) if isinstance(value, tuple) else value
        written = _toml_value(value)
        new, n_found = line.subn(lambda m: m["head"] + written + m["tail"], text, count=1)
        if not n_found:
            gap = "" if not text or text.endswith("\n") else "\n"
            new = f"{text}{gap}{key} = {written}\n"
    try:
        is_right = tomllib.loads(new) == wanted
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise UsageError(
            f"cannot edit {key!r} in {path} without spoiling the file",
            hint=f"edit {path} by hand",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".config-", delete=False
    ) as out:
        out.write(new)
    os.replace(out.name, path)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are a part of TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)

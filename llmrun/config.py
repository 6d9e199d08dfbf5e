"""Settings: every option of `option_table`, read from flags > environment > config file > defaults.

`Settings` has one field a row of the table; a test compares them.
"""

from __future__ import annotations

import io
import math
import os
import shlex
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from llmrun.errors import UsageError
from llmrun.option_table import MAX_SHARES, OPTION_BY_KEY, OPTIONS, Option
from llmrun.text import close_names


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value came from: `name` is a flag, a variable or a file."""

    kind: Literal["flag", "environment", "file", "default"]
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else self.kind


@dataclass(frozen=True, slots=True)
class Settings:
    """All options with their final values. None: not set, so the model or the engine chooses.

    `sources` has an entry for each field. `ctx`, `threads`, `ubatch` and `parallel` None mean auto,
    as does an empty `tensor_split`. `gpu_layers` and `cpu_moe` are a number, `auto` or `all`.
    """

    json: bool = False
    quiet: bool = False
    verbose: int = 0
    yes: bool = False
    offline: bool = False
    force: bool = False
    ctx: int | None = None
    gpu_layers: int | str = "auto"
    cpu_moe: int | str = "auto"
    tensor_split: tuple[float, ...] = ()
    kv_type: str = "auto"
    flash_attn: str = "auto"
    ubatch: int | None = None
    speculative: str = "auto"
    draft_model: str | None = None
    threads: int | None = None
    kv_unified: str = "auto"
    model: str | None = None
    max_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: tuple[str, ...] = ()
    logit_bias: tuple[str, ...] = ()
    system: str | None = None
    think: bool | None = None
    hide_thinking: bool = False
    raw: bool = False
    json_schema: str | None = None
    grammar: str | None = None
    prompt_cache: bool = False
    stats: bool = False
    markdown: bool | None = None
    context_shift: bool = False
    prefix_gb: float = 2.0
    host: str = "127.0.0.1"
    port: int = 8080
    parallel: int | None = None
    max_queue: int = 64
    keep_alive: str = "5m"
    allow_pull: bool = False
    allow_grammar: bool = False
    api_key: str | None = field(default=None, repr=False)
    api_key_file: str | None = None
    insecure: bool = False
    allowed_host: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()
    drain: float = 30.0
    ui: bool = True
    sources: Mapping[str, Source] = field(default_factory=dict, repr=False)

    def is_set(self, key: str) -> bool:
        """Whether a person chose this value (it is not the default)."""
        return self.sources.get(key, Source("default")).kind != "default"


@dataclass(frozen=True, slots=True)
class Environment:
    """The world around one run of the program; tests pass their own to `cli.app.main`.

    Streams are text streams; whether they are terminals is asked of the streams themselves.
    `state_dir` holds history and conversations, `cache_dir` headers and prefix state, `data_dir`
    models that came out of a package. Other models live in the hub's shared cache.
    """

    stdin: TextIO
    stdout: TextIO
    stderr: TextIO
    environ: Mapping[str, str]
    config_dir: Path
    state_dir: Path
    data_dir: Path
    cache_dir: Path

    @classmethod
    def of_process(cls) -> Environment:
        import platformdirs

        dirs = platformdirs.PlatformDirs("llmrun", appauthor=False)
        # A process may be started without some of its streams.
        stdin = sys.stdin or io.StringIO()
        stdout, stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
        for stream in (stdout, stderr):
            # A terminal that cannot show a character gets an escape, not a UnicodeEncodeError.
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="backslashreplace")
        return cls(
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            environ=os.environ,
            config_dir=dirs.user_config_path,
            state_dir=dirs.user_state_path,
            data_dir=dirs.user_data_path,
            cache_dir=dirs.user_cache_path,
        )

    @property
    def config_path(self) -> Path:
        return self.config_dir / "config.toml"

    @property
    def stdin_is_tty(self) -> bool:
        return _is_tty(self.stdin)

    @property
    def stdout_is_tty(self) -> bool:
        return _is_tty(self.stdout)

    @property
    def stderr_is_tty(self) -> bool:
        return _is_tty(self.stderr)

    @property
    def debug(self) -> bool:
        return self.environ.get("LLMRUN_DEBUG", "") not in ("", "0")


def _is_tty(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # no stream at all (pythonw), or a closed one
        return False


def load_settings(
    environment: Environment, flags: Mapping[str, Any], reads_file: bool = True
) -> Settings:
    """Merge the four sources. `flags` holds raw values by key; None means not given.

    Raises UsageError, naming the source, for a bad value, an unknown key in the file, or a file
    that is no TOML.
    """
    from_file = read_config_file(environment.config_path) if reads_file else {}
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for option in OPTIONS:
        raw, source = _pick(option, flags, environment, from_file)
        sources[option.key] = source
        values[option.key] = (
            option.default if source.kind == "default" else parse_value(option, raw, source)
        )
    return Settings(**values, sources=sources)


def _pick(
    option: Option,
    flags: Mapping[str, Any],
    environment: Environment,
    from_file: Mapping[str, Any],
) -> tuple[Any, Source]:
    given = flags.get(option.key)
    if given is not None and given != [] and not (option.kind == "count" and given == 0):
        return given, Source("flag", option.flag_names[-1].split("/")[0])
    text = environment.environ.get(option.env_name, "")
    if text != "":
        return text, Source("environment", option.env_name)
    if option.key in from_file:
        return from_file[option.key], Source("file", str(environment.config_path))
    return None, Source("default")


_WORDS = {"1": True, "true": True, "yes": True, "on": True,
          "0": False, "false": False, "no": False, "off": False}  # fmt: skip


def parse_value(option: Option, raw: Any, source: Source) -> Any:
    """The value of `option` for `raw`, a string or a TOML value. Raises UsageError."""
    if option.kind in ("flag", "switch"):
        if isinstance(raw, str) and raw.lower() in _WORDS:
            return _WORDS[raw.lower()]
        if isinstance(raw, bool):
            return raw
        raise _refusal(option, raw, source, "true or false")
    if option.kind == "texts":
        items = [raw] if isinstance(raw, str) else raw
        if not isinstance(items, (list, tuple)) or not all(isinstance(i, str) for i in items):
            raise _refusal(option, raw, source, "a list of texts")
        return tuple(items)
    if option.kind == "text":
        if isinstance(raw, str):
            return raw
        raise _refusal(option, raw, source, "a text")
    if option.kind == "choice":
        word = raw.lower() if isinstance(raw, str) else None
        if word in option.words:
            return word
        raise _refusal(option, raw, source, "")
    if option.kind == "shares":
        return _parse_shares(option, raw, source)
    return _parse_number(option, raw, source)


def _parse_shares(option: Option, raw: Any, source: Source) -> tuple[float, ...]:
    """`3,1` -> (3.0, 1.0); "auto" and an empty list are (). One share at least is above 0."""
    if isinstance(raw, str) and raw.lower() in option.words:
        return ()
    items = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(items, (list, tuple)) or len(items) > MAX_SHARES:
        raise _refusal(option, raw, source, "numbers with commas between them")
    one = replace(option, kind="float", words=())
    shares = tuple(float(_parse_number(one, item, source) or 0) for item in items)
    if shares and not any(shares):
        raise _refusal(option, raw, source, "numbers of which one is above 0")
    return shares


def _parse_number(option: Option, raw: Any, source: Source) -> int | float | str | None:
    whole = option.kind in ("int", "count")
    wanted = "a whole number" if whole else "a number"
    if isinstance(raw, str) and raw.lower() in option.words:
        return None if raw.lower() == option.none_word else raw.lower()
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise _refusal(option, raw, source, wanted)
    try:
        number: int | float = int(raw) if whole and not isinstance(raw, float) else float(raw)
        is_right = math.isfinite(number) and (not whole or number == int(number))
    except (ValueError, OverflowError):
        is_right = False
    if not is_right:
        raise _refusal(option, raw, source, wanted)
    low, high = option.minimum, option.maximum
    if (low is not None and number < low) or (high is not None and number > high):
        raise _refusal(option, raw, source, f"{wanted} from {low} to {high}")
    return int(number) if whole else float(number)


def _refusal(option: Option, raw: Any, source: Source, wanted: str) -> UsageError:
    if option.words:
        words = ", ".join(option.words)
        wanted = f"one of {words}" if option.kind == "choice" else f"{wanted}, or {words}"
    where = {
        "flag": f"option {source.name}",
        "environment": f"environment variable {source.name}",
        "file": f'"{option.key}" in {source.name}',
        "default": option.key,
    }[source.kind]
    hint = {"environment": f"unset {source.name}", "file": f"llmrun config unset {option.key}"}
    return UsageError(f"{where}: {str(raw)!r} is not {wanted}", hint=hint.get(source.kind))


def read_config_file(path: Path, *, any_key: bool = False) -> dict[str, Any]:
    """The settings in the config file; empty when there is none. Raises UsageError, also for a key
    that is no setting. `any_key`: all keys as they are written, known or not."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(
            f"cannot read {path}", why=str(problem), hint="llmrun config path"
        ) from problem
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise UsageError(
            f"{path} is not valid TOML", why=str(problem), hint="llmrun config path"
        ) from problem
    if any_key:
        return found
    settings: dict[str, Any] = {}
    for key, value in found.items():
        try:
            settings[require_option(key, f" in {path}").key] = value
        except UsageError as error:
            error.hint = f"llmrun config unset {shlex.quote(key)}"
            raise
    return settings


def require_option(key: str, where: str = "") -> Option:
    """The option called `key` (dashes allowed). Raises UsageError with close names."""
    option = OPTION_BY_KEY.get(key.replace("-", "_"))
    if option is None:
        near = close_names(key, OPTION_BY_KEY)
        why = f"did you mean {', '.join(near)}?" if near else None
        raise UsageError(f"unknown setting {key!r}{where}", why=why, hint="llmrun config")
    return option

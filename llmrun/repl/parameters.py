"""The values that `/set` shows and changes. Ranges are those of the command line's options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from llmrun.chat.store import Conversation
from llmrun.engine.types import SamplingParams
from llmrun.errors import UsageError
from llmrun.option_table import OPTION_BY_KEY
from llmrun.repl.state import ReplState, ThinkMode
from llmrun.text import close_names, escape_line


@dataclass(frozen=True, slots=True)
class Parameter:
    """`name` is a field of SamplingParams, or of the session (`max_tokens`, `stop`)."""

    name: str
    help: str
    is_float: bool
    minimum: float
    maximum: float
    synonyms: tuple[str, ...] = ()


_EXTRA = (
    Parameter("xtc_threshold", "least probability of an excluded choice", True, 0, 1),
    Parameter("dry_base", "growth of the DRY penalty", True, 0, 100),
    Parameter("dry_allowed_length", "repeats up to this length are free", False, 0, 1 << 20),
    Parameter("dry_last_n", "tokens that DRY looks back; -1 is all", False, -1, 1 << 27),
    Parameter("repeat_last_n", "tokens that penalties look back; -1 is all", False, -1, 1 << 27),
)
_SYNONYMS = {
    "temperature": ("temp",),
    "max_tokens": ("num_predict", "n_predict", "n"),
    "repeat_penalty": ("repetition_penalty",),
}
_FROM_OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "frequency_penalty",
    "presence_penalty", "xtc_probability", "dry_multiplier", "seed", "max_tokens",
)  # fmt: skip


def _from_option(key: str) -> Parameter:
    option = OPTION_BY_KEY[key]
    minimum = option.minimum if option.minimum is not None else float("-inf")
    maximum = option.maximum if option.maximum is not None else float("inf")
    help = option.help[0].lower() + option.help[1:].rstrip(".")
    is_float = option.kind == "float"
    return Parameter(key, help, is_float, minimum, maximum, _SYNONYMS.get(key, ()))


PARAMETERS: tuple[Parameter, ...] = (*map(_from_option, _FROM_OPTIONS), *_EXTRA)
PARAMETER_BY_NAME: dict[str, Parameter] = {
    name: parameter for parameter in PARAMETERS for name in (parameter.name, *parameter.synonyms)
}
_MAY_BE_NONE = {"seed": "random", "max_tokens": "no limit"}
_FIXED = {"ctx", "num_ctx", "n_ctx", "context", "gpu_layers", "num_gpu", "threads", "num_thread"}


def show_parameters(state: ReplState) -> None:
    """All values; those that differ from the engine's own defaults are marked."""
    defaults = SamplingParams()
    for parameter in PARAMETERS:
        value = get_parameter(state, parameter.name)
        text = format_value(parameter, value)
        is_changed = value != getattr(defaults, parameter.name, None)
        mark = "*" if is_changed else " "
        state.screen.say(f"{mark} {parameter.name:18} {text:>9}  {parameter.help}")


def format_value(parameter: Parameter, value: float | None) -> str:
    if value is None:
        return _MAY_BE_NONE.get(parameter.name, "none")
    return f"{value:g}" if isinstance(value, float) else str(value)


def get_parameter(state: ReplState, name: str) -> float | None:
    owner = state.session if name == "max_tokens" else state.session.sampling
    value: float | None = getattr(owner, name)
    return value


def set_parameter(state: ReplState, name: str, text: str) -> None:
    """Change one value, or show it when `text` is empty. Raises UsageError."""
    key = name.lower().replace("-", "_")
    parameter = PARAMETER_BY_NAME.get(key)
    if parameter is None:
        raise _unknown(name, key)
    if not text:
        value = get_parameter(state, parameter.name)
        shown = format_value(parameter, value)
        state.screen.say(f"{parameter.name} is {shown}")
        return
    value = _parse(parameter, text)
    if parameter.name == "max_tokens":
        state.session.max_tokens = None if value is None else int(value)
    else:
        change: dict[str, float | int | None] = {
            parameter.name: value if value is None or parameter.is_float else int(value)
        }
        state.session.sampling = dataclasses.replace(
            state.session.sampling,
            **change,  # type: ignore[arg-type]
        )
    shown = format_value(parameter, value)
    state.screen.note(f"{parameter.name} is now {shown}.")


def restore_settings(state: ReplState, conversation: Conversation) -> None:
    """Take over the settings that a conversation was saved with, but for `state.fixed`.

    Its sampling is only taken for the model that it was held with. Values that are no values (the
    file may have been changed by anybody) are left out.
    """
    saved, session = conversation.settings, state.session
    sampling = saved.get("sampling") if conversation.model == state.model else None
    changes: dict[str, float | int | None] = {}
    for parameter in PARAMETERS:
        source = saved if parameter.name == "max_tokens" else sampling
        if parameter.name in state.fixed or not isinstance(source, Mapping):
            continue
        value: Any = source.get(parameter.name, parameter)
        if not _is_value(parameter, value):
            continue
        if parameter.name == "max_tokens":
            session.max_tokens = value
        else:
            changes[parameter.name] = value
    session.sampling = dataclasses.replace(
        session.sampling,
        **changes,  # type: ignore[arg-type]
    )
    stop = saved.get("stop")
    if "stop" not in state.fixed and isinstance(stop, list):
        session.stop = tuple(text for text in stop if isinstance(text, str) and text)
    think: Any = saved.get("think")
    thinks = saved.get("enable_thinking")
    if not state.fixed & {"think", "hide_thinking"}:
        if think in get_args(ThinkMode):
            state.think_mode = think
        if thinks is None or isinstance(thinks, bool):
            session.enable_thinking = thinks


def _is_value(parameter: Parameter, value: object) -> bool:
    if value is None:
        return parameter.name in _MAY_BE_NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not parameter.is_float and not isinstance(value, int):
        return False
    return parameter.minimum <= value <= parameter.maximum


def _parse(parameter: Parameter, text: str) -> float | None:
    if text.lower() in ("default", "none", "auto"):
        default: float | None = getattr(SamplingParams(), parameter.name, None)
        return default
    kind = "a number" if parameter.is_float else "a whole number"
    try:
        value: float = float(text) if parameter.is_float else int(text)
    except ValueError:
        value = float("nan")
    if not parameter.minimum <= value <= parameter.maximum:
        raise UsageError(
            f"{parameter.name} cannot be {escape_line(text[:40])!r}",
            why=f"it is {kind} from {parameter.minimum} to {parameter.maximum}",
            hint=f"/set {parameter.name} default",
        )
    return value


def _unknown(name: str, key: str) -> UsageError:
    if key in _FIXED:
        return UsageError(
            f"{escape_line(name)} is fixed while a model is loaded",
            hint="leave with /bye and start again, for example: llmrun chat --ctx 8192",
        )
    near = close_names(key, PARAMETER_BY_NAME)
    return UsageError(
        f"there is no parameter {escape_line(name)}",
        why=f"did you mean {' or '.join(near)}?" if near else None,
        hint=f"/set {near[0]}" if near else "/set shows all of them",
    )

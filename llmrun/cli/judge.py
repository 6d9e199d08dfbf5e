"""Whether and how a model runs here: which tier is asked, which quant is taken, what is refused.

llama.cpp's own allocator, asked in a child process (`fit.exact`), is right where the closed form is
only close. When it is asked is the rule of docs/adr/0005:

- before a download the allocator is always asked: seconds against minutes of a download that would
  be for nothing;
- for a model on disk the closed form answers where it cannot be wrong enough to matter: no GPU to
  place layers on, an architecture that it knows, and a quarter more than the need within the
  budget. `run` then starts no process. Otherwise the allocator is asked, whose answers are kept on
  disk.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmrun.cli.measure import with_forecast
from llmrun.cli.options import Invocation
from llmrun.errors import EngineError, WillNotFitError
from llmrun.text import escape_line, format_bytes, format_count, format_speed

if TYPE_CHECKING:
    from pathlib import Path

    from llmrun.catalog.choose import QuantChoice
    from llmrun.catalog.types import Resolved
    from llmrun.fit.plan import Plan, Wishes
    from llmrun.fit.quants import QuantOption
    from llmrun.fit.types import Allocator
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.machine import Machine

ROOM_IN_PERCENT = 125
"""A need of so many percent within the budget is far enough from its edge for the closed form."""

# A quant whose real header shows that it does not fit after all is followed by a smaller one.
_MAX_HEADERS = 4


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """What byte ranges of the hub's files say. `headers` are (name, first bytes, size of file)."""

    info: ModelInfo
    headers: tuple[tuple[str, bytes, int], ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """A model that is to be downloaded, with the plan to run it. `allocator` knows its header."""

    resolved: Resolved
    info: ModelInfo
    plan: Plan
    allocator: Allocator
    notes: tuple[str, ...] = ()


def plan_on_disk(
    invocation: Invocation,
    machine: Machine,
    info: ModelInfo,
    paths: Sequence[Path],
    wishes: Wishes,
) -> Plan:
    """The plan for a model that is here, by the tier that the rule above names."""
    from llmrun.fit.plan import plan

    made = plan(machine, info, wishes)
    if not machine.devices and _has_room(made):
        return made
    allocator = invocation.services.allocator_of_files(paths, info, machine)
    return plan(machine, info, wishes, allocator=allocator)


def _has_room(made: Plan) -> bool:
    need = made.estimate
    return (
        made.verdict == "fits"
        and need.source == "formula"
        and need.total_bytes * ROOM_IN_PERCENT <= made.budget_bytes * 100
    )


def judge_download(
    invocation: Invocation,
    resolved: Resolved,
    model: RemoteModel,
    wishes: Wishes,
    machine: Machine,
    find: Callable[[str], tuple[Resolved, RemoteModel | None]],
) -> Judged:
    """Judge a model before a byte of its weights is here. Where no quant was named and the usual
    one does not fit, it is the best that does.

    `find` resolves the name of a quant and reads its header. Raises WillNotFitError unless
    `--force`.
    """
    from llmrun.fit.plan import plan

    allocator = invocation.services.allocator_of_headers(model.headers, model.info, machine)
    made = plan(machine, model.info, wishes, allocator=allocator)
    judged = Judged(resolved, model.info, made, allocator)
    require_known(invocation, model.info, allocator)
    if resolved.tag is None:
        judged = _pick_quant(judged, machine, wishes, invocation, find)
    require_fit(invocation, judged.resolved, judged.info, judged.plan, wishes, machine)
    if judged.allocator.problem is not None:
        invocation.output.note(f"estimated, not measured: {judged.allocator.problem}")
    return replace(judged, plan=with_forecast(invocation, machine, judged.info, judged.plan))


def _pick_quant(
    usual: Judged,
    machine: Machine,
    wishes: Wishes,
    invocation: Invocation,
    find: Callable[[str], tuple[Resolved, RemoteModel | None]],
) -> Judged:
    """The best quant of the repository for this machine; `usual` itself when none is better."""
    from llmrun.fit.plan import plan
    from llmrun.fit.quants import choose_quant

    resolved = usual.resolved
    choices = _smaller_choices(resolved)
    read = {_label(resolved): usual}
    for _ in range(_MAX_HEADERS):
        pick = choose_quant(
            machine,
            _options(usual, choices, read),
            wishes,
            preferred=_label(resolved),
            like=usual.info,
        )
        label = pick.option.label
        if label in read:
            found = read[label]
            return found if found is usual else replace(found, notes=pick.reasons)
        other, model = find(resolved.reference_to(choices[label]))
        if model is None:
            return usual
        allocator = invocation.services.allocator_of_headers(model.headers, model.info, machine)
        made = plan(machine, model.info, wishes, allocator=allocator)
        read[label] = Judged(other, model.info, made, allocator)
    fitting = [found for found in read.values() if found.plan.verdict != "no"]
    return max(fitting, key=lambda found: found.info.n_bytes, default=usual)


def _label(resolved: Resolved) -> str:
    return resolved.quant or resolved.files[0].path


def _smaller_choices(resolved: Resolved) -> dict[str, QuantChoice]:
    """The smaller quants of the same model in its repository, by label, the largest first."""
    from llmrun.catalog.choose import match_tag
    from llmrun.catalog.keys import model_key

    key = model_key(resolved.files[0].path)
    found: dict[str, QuantChoice] = {}
    for choice in sorted(resolved.alternatives, key=lambda choice: -choice.n_bytes):
        if choice.quant is None or not choice.complete or choice.n_bytes >= resolved.n_bytes:
            continue
        is_meant = match_tag(resolved.alternatives, choice.quant, resolved.entry) is choice
        if is_meant and model_key(choice.path) == key:
            found[choice.label] = choice
    return found


def _options(
    usual: Judged, choices: dict[str, QuantChoice], read: dict[str, Judged]
) -> list[QuantOption]:
    from llmrun.fit.quants import QuantOption

    options = [QuantOption(_label(usual.resolved), usual.info.n_bytes, usual.info, usual.allocator)]
    for label, choice in choices.items():
        known = read.get(label)
        if known is None:
            options.append(QuantOption(label, choice.n_bytes, None, None))
        else:
            options.append(QuantOption(label, choice.n_bytes, known.info, known.allocator))
    return options


# ---- refusing

# llama.cpp's words (llama_model_load) for a model of a kind that is newer than itself.
_UNKNOWN = "unknown model architecture"
UPDATE_ENGINE = "pip install --upgrade llama-cpp-python"


def is_unknown(allocator: Allocator) -> bool:
    """Whether the allocator was asked, and this build of llama.cpp has no code for the model."""
    return allocator.problem is not None and _UNKNOWN in allocator.problem


def require_known(invocation: Invocation, info: ModelInfo, allocator: Allocator) -> None:
    """Raise EngineError for a model that this build of llama.cpp cannot run in any amount of
    memory; not with `--force`."""
    if is_unknown(allocator) and not invocation.settings.force:
        raise EngineError(
            "this build of llama.cpp cannot run the model: it does not know the architecture "
            f"'{escape_line(info.architecture)}'",
            why="a newer one may; --force downloads the model all the same",
            hint=UPDATE_ENGINE,
        )


def require_fit(
    invocation: Invocation,
    resolved: Resolved,
    info: ModelInfo,
    made: Plan,
    wishes: Wishes,
    machine: Machine,
) -> None:
    """Raise WillNotFitError, with what would run here, for a plan whose verdict is "no"; not with
    `--force`."""
    from llmrun.fit import plan as planner

    try:
        planner.require_fit(made, force=invocation.settings.force)
    except WillNotFitError as error:
        ways = _ways_out(invocation, resolved, info, made, wishes, machine)
        if ways:
            words = ", or ".join(way.words for way in ways)
            error.why = f"{error.why}\nwhat would run here: {words}; --force tries it all the same"
            error.hint = ways[0].command
        raise


@dataclass(frozen=True, slots=True)
class _Way:
    """Something that would run here, and what to type for it."""

    words: str
    command: str


def _ways_out(
    invocation: Invocation,
    resolved: Resolved,
    info: ModelInfo,
    made: Plan,
    wishes: Wishes,
    machine: Machine,
) -> list[_Way]:
    """A shorter context, what the user fixed left to the planner, a smaller quant, a smaller model:
    those of them that would run, the least painful first."""
    from llmrun.fit.plan import LEAST_N_CTX

    verb = invocation.output.command
    name = shlex.quote(resolved.reference)
    ways = []
    n_ctx = made.n_ctx_that_fits
    if n_ctx is not None:
        words = f"a context of {format_count(n_ctx)}"
        ways.append(_Way(words, f"llmrun {verb} {name} --ctx {n_ctx}"))
    elif (flag := _flag_in_the_way(info, wishes, machine)) is not None:
        ways.append(_Way(f"the same without {flag}", f"llmrun {verb} {name}, without {flag}"))
    if (quant := _smaller_quant(resolved, info, wishes, machine)) is not None:
        reference = resolved.reference_to(quant)
        words = f"the quant {quant.label} ({format_bytes(quant.n_bytes)})"
        ways.append(_Way(words, f"llmrun {verb} {shlex.quote(reference)}"))
    model = _other_model(invocation, resolved, machine) if info.kind == "model" else None
    if model is not None:
        ways.append(_Way(f"the model {model}", f"llmrun {verb} {shlex.quote(model)}"))
    if n_ctx is not None and n_ctx < LEAST_N_CTX and len(ways) > 1:
        ways = [*ways[1:], ways[0]]  # hardly a conversation fits into that
    return ways


def _flag_in_the_way(info: ModelInfo, wishes: Wishes, machine: Machine) -> str | None:
    """The flag without which the model would fit, if it is one of them."""
    from llmrun.fit.plan import plan

    free: tuple[tuple[str, Wishes], ...] = (
        ("--gpu-layers", replace(wishes, n_gpu_layers="auto")),
        ("--cpu-moe", replace(wishes, n_cpu_moe="auto")),
        ("--tensor-split", replace(wishes, tensor_split=())),
        ("--kv-type", replace(wishes, type_k="auto", type_v="auto")),
        ("--ubatch", replace(wishes, n_ubatch=None)),
        ("--flash-attn", replace(wishes, flash_attn="auto")),
    )
    for flag, other in free:
        if other != wishes and plan(machine, info, other).verdict != "no":
            return flag
    return None


def _smaller_quant(
    resolved: Resolved, info: ModelInfo, wishes: Wishes, machine: Machine
) -> QuantChoice | None:
    from llmrun.fit.quants import QuantOption, choose_quant

    choices = _smaller_choices(resolved)
    if not choices:
        return None
    options = [QuantOption(label, c.n_bytes, None, None) for label, c in choices.items()]
    pick = choose_quant(machine, options, wishes, preferred=options[0].label, like=info)
    return None if pick.plan.verdict == "no" else choices[pick.option.label]


def _other_model(invocation: Invocation, resolved: Resolved, machine: Machine) -> str | None:
    """The catalog's best model for this machine beside the one that does not fit."""
    from llmrun.fit.ranking import rank

    if not machine.memory.is_known:
        return None
    for ranked in rank(invocation.services.catalog(), machine):
        if ranked.runs and ranked.entry is not resolved.entry:
            return ranked.entry.name
    return None


# ---- telling

_VERDICTS = {
    "fits": "fits",
    "tight": "fits, but tightly",
    "partly_on_cpu": "fits, partly on the CPU",
    "cpu_only": "fits on the CPU only",
    "no": "does not fit",
}


def describe_memory(made: Plan) -> str:
    """Does it fit, and what it takes: `fits: 981 MB of 23.4 GB free memory`."""
    free = f" of {format_bytes(made.available_bytes)} free" if made.available_bytes else ""
    return f"{_VERDICTS[made.verdict]}: {format_bytes(made.placement.total_bytes)}{free} memory"


def describe_fit(made: Plan) -> str:
    """One line: does it fit, what it takes, at which context, and how fast it may be."""
    line = f"{describe_memory(made)}, context {format_count(made.n_ctx)}"
    if made.forecast is not None:
        line += f", {describe_speed(made.forecast.low, made.forecast.high)}"
    return line


def describe_speed(low: float, high: float) -> str:
    """`9.4` and `21.2` -> `about 9-21 tok/s`, with the digits that `fit` shows."""
    return f"about {format_speed((low, high))} tok/s"


def describe_change(before: Plan, after: Plan) -> str:
    """What the second plan gives up of the first: `context 4096 instead of 8192`."""
    rows = (
        ("context", before.n_ctx, after.n_ctx),
        ("KV cache", before.type_k, after.type_k),
        ("KV cache", _name_cache(before), _name_cache(after)),
        ("GPU layers", _count_layers(before.n_gpu_layers), _count_layers(after.n_gpu_layers)),
        ("layers with experts in RAM", before.n_cpu_moe, after.n_cpu_moe),
        ("ubatch", before.n_ubatch, after.n_ubatch),
    )
    changes = [f"{name} {new} instead of {old}" for name, old, new in rows if old != new]
    if before.use_mmap != after.use_mmap or before.use_repack != after.use_repack:
        changes.append("no second copy of the weights")
    return escape_line(", ".join(changes)) or "the same settings"


def _name_cache(made: Plan) -> str:
    return "for all streams" if made.kv_unified else "for each stream"


def _count_layers(n_gpu_layers: int) -> str:
    return "all" if n_gpu_layers < 0 else str(n_gpu_layers)

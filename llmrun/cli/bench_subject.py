"""What `llmrun bench` measures: a model on this machine, planned and ready to be opened."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrun.bench.ablation import OtherQuant
from llmrun.bench.runner import Subject, Suite
from llmrun.bench.tune import Choice
from llmrun.cli.acquire import Acquired
from llmrun.cli.judge import plan_on_disk
from llmrun.cli.open_model import engine_options, get_model, load_engine, route_logs, with_profile
from llmrun.cli.options import Invocation
from llmrun.engine.types import EngineLike, EngineOptions, KvType
from llmrun.errors import LlmrunError
from llmrun.text import format_bytes

if TYPE_CHECKING:
    from llmrun.fit.plan import Plan, Wishes
    from llmrun.hardware.machine import Machine
    from llmrun.hub.types import StoredModel

_MAX_HASHED_BYTES = 16 << 30
_MAX_QUANTS = 3
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is on this machine, with what names it in the history. `options` are what `run`
    would open it with."""

    invocation: Invocation
    acquired: Acquired
    options: EngineOptions
    machine_words: str
    build: str
    sha256: str | None

    def open(self, options: EngineOptions) -> EngineLike:
        return load_engine(self.invocation.services, self.acquired, options)

    @property
    def settings(self) -> dict[str, str | int | float | bool | None]:
        """Of the engine, as they are kept with the results."""
        options = self.options
        return {
            "n_ctx": options.n_ctx,
            "n_threads": options.n_threads,
            "n_threads_batch": options.n_threads_batch,
            "steady_threads": options.steady_threads,
            "n_ubatch": options.n_ubatch,
            "kv_type": options.type_k,
            "flash_attn": options.flash_attn,
            "speculative": options.speculative,
            "n_gpu_layers": options.n_gpu_layers,
            "profile": "tuned" if self.acquired.profile is not None else None,
        }


def prepare(
    invocation: Invocation,
    text: str,
    *,
    n_ctx_enough: int | None,
    profile: bool = True,
    speculative: Literal["off"] | None = "off",
) -> Prepared:
    """Get the model here and plan it. `profile`: with what was tuned for it. `speculative`: unless
    the user says otherwise; results that depend on how a text repeats itself say little."""
    from llmrun.cli.measure import build_name

    settings = invocation.settings
    acquired = get_model(invocation, text, n_ctx_enough)
    machine = _with_bandwidth(acquired.machine)
    acquired = replace(acquired, machine=machine)
    if profile:
        acquired = with_profile(invocation, acquired)
    for reason in acquired.plan.reasons:
        invocation.output.detail(reason)
    route_logs(invocation.output)
    invocation.services.store().record_use(acquired.paths[0])
    options = engine_options(acquired, settings)
    if speculative is not None and not settings.is_set("speculative"):
        options = replace(options, speculative=speculative)
    return Prepared(
        invocation,
        acquired,
        options,
        describe_machine(machine),
        build_name(),
        _find_sha256(acquired),
    )


def subject_of(prepared: Prepared, suite: Suite) -> Subject:
    """For the standard measurement."""
    from llmrun.fit.pools import HOST
    from llmrun.fit.speed import limit_tok_s

    acquired = prepared.acquired
    info, machine, placement = acquired.info, acquired.machine, acquired.plan.placement
    in_ram = [share.used_bytes for share in acquired.plan.shares if share.device == HOST]
    return Subject(
        prepared.open,
        prepared.options,
        stream_options(prepared, max(suite.n_streams, default=0), suite.n_ctx_streams),
        forecast_bytes=sum(in_ram) or None,
        limit_tok_s=lambda depth: limit_tok_s(info, placement, machine, depth),
    )


def stream_options(prepared: Prepared, n_streams: int, n_ctx: int) -> EngineOptions | None:
    """Options for so many streams of equal length and `n_ctx` tokens together, by the rules of
    `serve` for their cache; None where they would not fit."""
    from llmrun.fit.parallel import is_as_good, list_caches

    if n_streams < 1:
        return None
    acquired = prepared.acquired
    wishes = replace(acquired.wishes, n_seq=n_streams, n_ctx=n_ctx, n_ctx_enough=None)
    plans = [
        made
        for kv_unified in list_caches(acquired.info, wishes, n_ctx // n_streams)
        if (made := _plan(prepared, replace(wishes, kv_unified=kv_unified))) is not None
    ]
    if not plans:
        return None
    made = plans[0] if is_as_good(plans[0], plans[-1]) else plans[-1]
    options = engine_options(replace(acquired, plan=made), prepared.invocation.settings)
    return replace(
        options,
        n_seq_max=n_streams,
        n_ubatch=max(options.n_ubatch, n_streams),
        speculative=prepared.options.speculative,
    )


def other_quants(prepared: Prepared) -> list[OtherQuant]:
    """The same model in other quants that are on this machine and fit, a few at most."""
    resolved = prepared.acquired.resolved
    found: list[OtherQuant] = []
    if resolved.repo is None:
        return found
    for model in prepared.invocation.services.store().models():
        is_other = model.repo == resolved.repo and model.quant not in (None, resolved.quant)
        if is_other and model.state == "complete" and len(found) < _MAX_QUANTS:
            opening = _opening(prepared, model)
            if opening is not None:
                found.append(OtherQuant(model.quant or model.reference, opening))
    return found


def _opening(prepared: Prepared, model: StoredModel) -> Callable[[], EngineLike] | None:
    from llmrun.gguf.info import read_info

    paths = tuple(file.local_path for file in model.files)
    try:
        info = read_info(paths)
    except LlmrunError:
        return None
    if info.kind != "model":
        return None
    other = replace(prepared.acquired, info=info, paths=paths, profile=None)
    wishes = replace(other.wishes, n_ctx=prepared.options.n_ctx, n_ctx_enough=None)
    made = _plan(replace(prepared, acquired=other), wishes)
    if made is None:
        return None
    options = replace(
        engine_options(replace(other, plan=made), prepared.invocation.settings),
        speculative=prepared.options.speculative,
    )
    return lambda: load_engine(prepared.invocation.services, other, options)


def kv_types(prepared: Prepared) -> tuple[KvType, ...]:
    """The types of a KV cache that are worth a try."""
    from llmrun.fit.formula import allows_kv_type

    info, settings = prepared.acquired.info, prepared.invocation.settings
    small: tuple[KvType, ...] = ("q8_0",) if allows_kv_type(info, "q8_0") else ()
    return ("f16", *(small if settings.flash_attn != "off" else ()))


def start_of(prepared: Prepared) -> Choice:
    """The settings that a search begins with: the planned ones."""
    options = prepared.options
    return Choice(
        n_threads=options.n_threads or 1,
        n_threads_batch=options.n_threads_batch or 1,
        n_ubatch=options.n_ubatch,
        kv_type=options.type_k,
        speculative=options.speculative,
    )


def options_of(prepared: Prepared) -> Callable[[Choice], EngineOptions | None]:
    """For a search: the engine's options for a choice, None for one that takes context away or more
    memory than there is."""
    planned = prepared.acquired.plan
    known: dict[tuple[int, KvType], EngineOptions | None] = {}

    def plan_options(n_ubatch: int, kv_type: KvType) -> EngineOptions | None:
        if (n_ubatch, kv_type) == (planned.n_ubatch, planned.type_k):
            return prepared.options
        wishes = replace(
            prepared.acquired.wishes,
            n_ubatch=n_ubatch,
            type_k=kv_type,
            type_v=kv_type,
            n_ctx=planned.n_ctx,
        )
        made = _plan(prepared, wishes)
        if made is None or (made.verdict != planned.verdict and made.verdict != "fits"):
            return None
        return engine_options(replace(prepared.acquired, plan=made), prepared.invocation.settings)

    def find(choice: Choice) -> EngineOptions | None:
        key = (choice.n_ubatch, choice.kv_type)
        if key not in known:
            known[key] = plan_options(*key)
        options = known[key]
        if options is None:
            return None
        return replace(
            options,
            n_threads=choice.n_threads,
            n_threads_batch=choice.n_threads_batch,
            steady_threads=False,
            speculative=choice.speculative,
        )

    return find


def _plan(prepared: Prepared, wishes: Wishes) -> Plan | None:
    """None where it does not fit, or cannot be."""
    acquired = prepared.acquired
    try:
        made = plan_on_disk(
            prepared.invocation, acquired.machine, acquired.info, acquired.paths, wishes
        )
    except LlmrunError:
        return None
    return made if made.runs or prepared.invocation.settings.force else None


def _with_bandwidth(machine: Machine) -> Machine:
    """With the speed of the RAM as it is right now, unless it is known for good."""
    if machine.memory.bandwidth_bytes_s is not None or not machine.memory.is_known:
        return machine
    from llmrun.hardware.bandwidth import measure_ram_bandwidth
    from llmrun.hardware.threads import choose_threads

    speed = measure_ram_bandwidth(
        n_threads=choose_threads(machine.cpu).n_threads,
        available_bytes=machine.memory.available_bytes,
    )
    if speed <= 0:
        return machine
    return replace(machine, memory=replace(machine.memory, bandwidth_bytes_s=speed))


def describe_machine(machine: Machine) -> str:
    """`AMD EPYC 7B13, 2 cores, 8.0 GB RAM, NVIDIA H100`."""
    cpu = machine.cpu
    n = min(cpu.n_physical, cpu.n_affinity)
    parts = [cpu.name or machine.arch, f"{n} core{'s' * (n != 1)}"]
    if cpu.quota is not None:
        parts.append(f"a quota of {cpu.quota:g}")
    if machine.memory.is_known:
        parts.append(f"{format_bytes(machine.memory.total_bytes)} RAM")
    return ", ".join([*parts, *(device.description for device in machine.devices)])


def _find_sha256(acquired: Acquired) -> str | None:
    """Of the model's (first) file: its name in the hub's cache, else computed where it is not too
    large for that."""
    known = acquired.resolved.files[0].sha256 if acquired.resolved.files else None
    if known:
        return known
    path = acquired.paths[0]
    try:
        name = Path(path).resolve().name
        if _SHA256.fullmatch(name):
            return name
        if path.stat().st_size > _MAX_HASHED_BYTES:
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None

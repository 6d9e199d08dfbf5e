"""From machine, model and wishes to settings, with reasons. Pure.

What the user fixed stays fixed. The rest is given up in this order: context length down to 8192,
then a KV cache in q8_0, then the experts of a mixture go to RAM, then layers, then the GPU; and
only where nothing of this helps the context gets shorter than 8192, if that saves anything worth
it. (A smaller quant comes before the GPU is given up: see `quants`.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llmrun.engine.types import CHECKPOINT_BYTES
from llmrun.fit.candidates import (
    LEAST_N_CTX,
    USUAL_N_CTX,
    Candidate,
    Wishes,
    check_wishes,
    choose_n_ubatch,
    list_candidates,
    n_outputs_of,
    setup_of,
)
from llmrun.fit.formula import estimate
from llmrun.fit.gate import require_fit, shrink
from llmrun.fit.measured import measure_needs, verify_placement
from llmrun.fit.placement import Choice, Placement, Share, Task, place
from llmrun.fit.pools import HOST, Pools
from llmrun.fit.speed import Forecast, forecast
from llmrun.fit.types import KV_BLOCKS, Allocator, Estimate, FlashAttn, KvType, Setup, Source
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine
from llmrun.hardware.threads import choose_threads
from llmrun.text import format_bytes

__all__ = [
    "LEAST_N_CTX",
    "USUAL_N_CTX",
    "Placement",
    "Plan",
    "Share",
    "Verdict",
    "Wishes",
    "plan",
    "require_fit",
    "shrink",
]

Verdict = Literal["fits", "tight", "partly_on_cpu", "cpu_only", "no"]

_MAX_ROUNDS = 4
# A context shorter than the usual one has to save this part of the memory, else it is kept for the
# case that nothing longer runs at all.
_LEAST_SAVING = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings for the engine, and how they fit.

    `n_ctx` is for all of the `n_seq` sequences; with `kv_unified` off each has its part for itself.
    `n_gpu_layers`: -1 is all, also where no GPU is known. Weights that the CPU reorders
    (`use_repack`) are a second copy of those mapped from the file (`use_mmap`): both are set only
    where there is room for both, and only the latter where there is too little for reading.
    `budget_bytes` is what may be taken of all memory pools together and `available_bytes` what is
    free in them; 0 when it is not known. `placement` has each memory's share. `n_ctx_that_fits` is
    the largest context that would fit when the planned one does not, None without one.

    Verdict "fits": all in the best place, with a margin (on a machine without a GPU that is the
    RAM). "partly_on_cpu", "cpu_only": with a margin, but not all on the GPU that is there. "tight":
    eats into the margin. "no": does not run.
    """

    n_ctx: int
    n_gpu_layers: int
    type_k: KvType
    type_v: KvType
    flash_attn: FlashAttn
    n_ubatch: int
    n_threads: int
    n_threads_batch: int
    use_mmap: bool
    use_repack: bool
    estimate: Estimate
    budget_bytes: int
    available_bytes: int
    placement: Placement
    verdict: Verdict
    reasons: tuple[str, ...]
    n_ctx_that_fits: int | None = None
    n_cpu_moe: int = 0
    tensor_split: tuple[float, ...] = ()
    n_seq: int = 1
    kv_unified: bool = True
    n_outputs_max: int = 1
    forecast: Forecast | None = None

    @property
    def setup(self) -> Setup:
        """The settings that memory depends on."""
        return Setup(
            self.n_ctx,
            self.type_k,
            self.type_v,
            self.flash_attn,
            n_seq_max=self.n_seq,
            kv_unified=self.kv_unified,
            n_ubatch=self.n_ubatch,
            n_outputs_max=max(self.n_outputs_max, self.n_seq),
            n_gpu_layers=self.n_gpu_layers,
            n_cpu_moe=self.n_cpu_moe,
            tensor_split=self.tensor_split,
            use_repack=self.use_repack,
        )

    @property
    def checkpoint_bytes(self) -> int:
        """For states to which a model that forgets can go back: what the plan leaves of the RAM,
        and no more than is of use."""
        if not self.available_bytes:
            return CHECKPOINT_BYTES
        left = self.placement.slack_bytes
        if self.use_mmap and self.use_repack:
            left -= self.placement.repack_bytes
        return max(0, min(CHECKPOINT_BYTES, left))

    @property
    def source(self) -> Source:
        return self.estimate.source

    @property
    def shares(self) -> tuple[Share, ...]:
        return self.placement.shares

    @property
    def runs(self) -> bool:
        return self.verdict != "no"

    @property
    def quality(self) -> tuple[int, ...]:
        """How good the plan is, for comparing plans of one model: it runs with a margin, then the
        context up to the usual 8192, projector and drafter on the GPU, where the layers are, the
        whole context, the KV cache's bytes, and how much is on the GPU. More memory never makes it
        less."""
        placement = self.placement
        is_cpu_machine = self.verdict == "fits" and not placement.is_whole
        where = 2 if placement.is_whole or is_cpu_machine else int(placement.n_on_gpu > 0)
        return (
            {"no": 0, "tight": 1}.get(self.verdict, 2),
            min(self.n_ctx, USUAL_N_CTX),
            int(placement.companions_device != HOST),
            where,
            self.n_ctx,
            sum(_bits(kv_type) for kv_type in (self.type_k, self.type_v)),
            placement.n_on_gpu,
            -self.n_cpu_moe,
        )


@dataclass(frozen=True, slots=True)
class _Request:
    """All that does not change while a plan is searched. `spare_candidates` are shorter than the
    `candidates`, and save so little that they are for a tight fit only."""

    machine: Machine
    info: ModelInfo
    wishes: Wishes
    n_ubatch: int
    candidates: tuple[Candidate, ...]
    spare_candidates: tuple[Candidate, ...]
    needs: Mapping[Candidate, Estimate]
    notes: tuple[str, ...]

    def task(self, candidate: Candidate) -> Task:
        need = self.needs.get(candidate)
        if need is None:
            need = estimate(self.info, setup_of(self.info, candidate, self.wishes, self.n_ubatch))
        return Task.of(
            need,
            self.info.n_layers,
            tensor_split=self.wishes.tensor_split,
            companions_bytes=self.wishes.companions_bytes,
        )


def plan(
    machine: Machine,
    info: ModelInfo,
    wishes: Wishes | None = None,
    *,
    allocator: Allocator | None = None,
) -> Plan:
    """The best settings for `info` on `machine` within `wishes`. Always a plan, whatever its
    verdict: see `require_fit`.

    With an `allocator`, llama.cpp's own figures for all contexts and KV types in question are asked
    in one call; where its devices are the machine's GPUs, the chosen placement is measured too, and
    planned again when a device would get too much. Where it cannot answer, the closed form does.

    Raises UsageError for wishes that llama.cpp would refuse, and for files that are no model.
    """
    wishes = wishes or Wishes()
    check_wishes(info, wishes)
    n_ubatch = choose_n_ubatch(info, wishes)
    candidates = tuple(list_candidates(info, wishes, n_ubatch))
    formula = {
        candidate: estimate(info, setup_of(info, candidate, wishes, n_ubatch))
        for candidate in candidates
    }
    needs: Mapping[Candidate, Estimate] = formula
    notes: tuple[str, ...] = ()
    if allocator is not None:
        needs, notes = measure_needs(formula, allocator, machine, info, wishes, n_ubatch)
    n_worth = _count_worthwhile(candidates, formula)
    worthwhile, spare = candidates[:n_worth], candidates[n_worth:]
    request = _Request(machine, info, wishes, n_ubatch, worthwhile, spare, needs, notes)
    pools = Pools.of(machine)
    made = _search(request, pools, pools)
    if allocator is None or not pools.has_gpu:
        return made
    return _verify(request, pools, made, allocator)


def _search(request: _Request, pools: Pools, shown: Pools) -> Plan:
    """The first way that fits into `pools`; `shown` are the pools as the user knows them."""
    for candidate, choice in _list_attempts(request, pools):
        placement = _place(request.task(candidate), pools, choice)
        if placement.fits:
            return _settle(request, shown, candidate, placement, _verdict(pools, placement))
    # Only the smallest may be tight: more memory must never end in less context.
    last = request.candidates[-1]
    choices = _list_choices(request, request.task(last), pools)
    whole = pools.without_margin()
    for candidate in (last, *request.spare_candidates):
        found = _place_tightly(request.task(candidate), whole, choices)
        if found is not None:
            placement, is_paged = found
            return _settle(request, shown, candidate, placement, "tight", is_paged)
    last = (last, *request.spare_candidates)[-1]
    hopeful = [choice for choice in choices if choice.n_on_gpu is None] or choices
    placement = place(request.task(last), whole, hopeful[0])
    return _settle(request, shown, last, placement, "no", is_paged=True)


def _place_tightly(
    task: Task, whole: Pools, choices: Sequence[Choice]
) -> tuple[Placement, bool] | None:
    """The first way that fits into all that is free, and whether it is paged (see `_settle`), which
    is preferred where it takes less; None when there is none."""
    for choice in choices:
        placement = _place(task, whole, choice)
        mapped = placement.with_mapped_output()
        if choice.n_on_gpu == 0 and mapped is not placement and mapped.slack_bytes >= 0:
            return placement, True
        if placement.fits:
            return placement, False
    return None


def _count_worthwhile(candidates: Sequence[Candidate], needs: Mapping[Candidate, Estimate]) -> int:
    """How many of the candidates to try: without those below the usual context where not even the
    last of these saves much."""
    last = candidates[-1]
    usual = [
        candidate
        for candidate in candidates
        if candidate.n_ctx >= min(USUAL_N_CTX, candidates[0].n_ctx)
    ]
    most, least = needs[usual[-1]].total_bytes, needs[last].total_bytes
    return len(usual) if (most - least) * _LEAST_SAVING < most else len(candidates)


def _list_attempts(request: _Request, pools: Pools) -> Iterator[tuple[Candidate, Choice]]:
    """What to try, best first. The first choice of a place is tried with every context that is
    usual or longer, the others only with the shortest of these; then all again for each shorter
    context."""
    candidates = request.candidates
    choices = _list_choices(request, request.task(candidates[0]), pools)
    usual = min(USUAL_N_CTX, candidates[0].n_ctx)
    levels: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        levels.setdefault(min(usual, candidate.n_ctx), []).append(candidate)
    for level in levels.values():
        shortest = [candidate for candidate in level if candidate.n_ctx == level[-1].n_ctx]
        for number, choice in enumerate(choices):
            if number == 0:
                some = level
            elif choice.n_on_gpu == 0:
                some = shortest
            else:
                some = shortest[-1:]
            for candidate in some:
                yield candidate, choice


def _list_choices(request: _Request, task: Task, pools: Pools) -> list[Choice]:
    """Where the parts may go, best first. The last one without a GPU has the projector and drafter
    in RAM, too."""
    wishes = request.wishes
    asked = wishes.n_gpu_layers
    may_move_experts = wishes.n_cpu_moe == "auto" and task.has_experts
    if wishes.n_cpu_moe == "auto":
        n_cpu_moe = min(wishes.n_cpu_moe_min, task.n_layers) if task.has_experts else 0
    else:
        n_cpu_moe = task.n_layers if wishes.n_cpu_moe == "all" else wishes.n_cpu_moe
    fixed_moe = 0 if wishes.n_cpu_moe == "auto" else n_cpu_moe
    if not pools.has_gpu or asked == 0:
        return [Choice(0, fixed_moe, companions_on_gpu=False, is_asked=asked == 0)]
    if asked != "auto":
        n = task.n_places if asked == "all" or asked < 0 else asked
        first = Choice(n, n_cpu_moe, is_asked=True)
        found = [first]
        if may_move_experts:
            found.append(replace(first, n_cpu_moe=None, least_cpu_moe=n_cpu_moe))
    else:
        most = task.n_places
        if wishes.n_gpu_layers_max is not None:
            most = max(0, min(most, wishes.n_gpu_layers_max))
        found = []
        if most == task.n_places:
            found.append(Choice(most, n_cpu_moe))
            if may_move_experts:
                found.append(Choice(most, None, least_cpu_moe=n_cpu_moe))
        experts = task.n_layers if may_move_experts else n_cpu_moe
        found.append(Choice(None, experts, most_on_gpu=most))
    if wishes.companions_bytes:
        found += [replace(choice, companions_on_gpu=False) for choice in found[-1:]]
    if asked == "auto":
        found.append(Choice(0, fixed_moe, companions_on_gpu=False))
    return found


def _place(task: Task, pools: Pools, choice: Choice) -> Placement:
    """`place`; layers on a GPU have to be the output and one block that is loaded at least, as
    nothing is gained below that. Where all is in RAM it also fits if it does mapped from the file,
    with what the CPU reorders."""
    placement = place(task, pools, choice)
    if choice.n_on_gpu == 0 and not placement.fits:
        mapped = placement.with_mapped_output()
        return replace(placement, fits=mapped.slack_bytes >= placement.repack_bytes)
    n_least = 2 + task.n_blocks - task.n_layers
    if choice.n_on_gpu is None and placement.n_on_gpu < n_least:
        return replace(placement, fits=False)
    return placement


def _verdict(pools: Pools, placement: Placement) -> Verdict:
    if not pools.has_gpu or placement.is_whole:
        return "fits"
    return "partly_on_cpu" if placement.n_on_gpu else "cpu_only"


def _settle(
    request: _Request,
    pools: Pools,
    candidate: Candidate,
    placement: Placement,
    verdict: Verdict,
    is_paged: bool = False,
) -> Plan:
    """`is_paged`: the weights in RAM are mapped from the file, and the CPU reorders none."""
    wishes, machine = request.wishes, request.machine
    threads = choose_threads(machine.cpu)
    n_threads = wishes.n_threads or threads.n_threads
    placement = replace(placement, n_ctx=candidate.n_ctx, n_threads=n_threads)
    is_hopeless = verdict == "no"
    mapped = placement.with_mapped_output()
    use_mmap = is_paged or not pools.is_known or mapped.slack_bytes >= placement.repack_bytes
    placement = mapped if use_mmap else placement
    n_gpu_layers = placement.n_gpu_layers
    if not pools.has_gpu and not pools.blind:
        # The engine may know more than the probes.
        n_gpu_layers = -1
    if isinstance(wishes.n_gpu_layers, int):
        n_gpu_layers = wishes.n_gpu_layers
    elif wishes.n_gpu_layers == "all":
        n_gpu_layers = -1
    is_short = verdict in ("tight", "no")
    return Plan(
        n_ctx=candidate.n_ctx,
        n_gpu_layers=n_gpu_layers,
        type_k=candidate.type_k,
        type_v=candidate.type_v,
        flash_attn=wishes.flash_attn,
        n_ubatch=request.n_ubatch,
        n_threads=n_threads,
        n_threads_batch=wishes.n_threads or threads.n_threads_batch,
        use_mmap=use_mmap,
        use_repack=not is_paged,
        estimate=placement.estimate,
        budget_bytes=pools.budget_bytes,
        available_bytes=pools.available_bytes,
        placement=placement,
        verdict=verdict,
        reasons=(
            candidate.reason_at_worst if is_short else candidate.reason,
            *placement.reasons,
            *(f"{name} does not tell its memory: it gets nothing" for name in pools.blind),
            *(() if wishes.n_threads else threads.reasons),
            *(_say_paged(placement) if is_paged else () if use_mmap else _say_read(placement)),
            *placement.estimate.notes,
            *request.notes,
            *(() if pools.is_known else ("free memory could not be read: not checked",)),
        ),
        n_ctx_that_fits=_largest_that_fits(request, pools, candidate) if is_hopeless else None,
        n_cpu_moe=placement.n_cpu_moe,
        tensor_split=placement.tensor_split,
        n_seq=wishes.n_seq,
        kv_unified=wishes.shares_cells,
        n_outputs_max=n_outputs_of(request.info, wishes, request.n_ubatch),
        forecast=forecast(request.info, placement, machine),
    )


def _verify(request: _Request, pools: Pools, made: Plan, allocator: Allocator) -> Plan:
    """The plan with the shares that the allocator gives for its very settings. A device that would
    get more than it can take is planned with less, a few times at most; what is over after that is
    judged as it is."""
    budgets = pools
    for number in range(_MAX_ROUNDS):
        if made.verdict == "no":
            break
        placement = verify_placement(made.placement, made.setup, request.machine, allocator)
        if placement is None:
            break
        if placement.worst is None:
            return _with_placement(made, placement, made.verdict)
        if number == _MAX_ROUNDS - 1 or made.verdict == "tight":
            return _judge_excess(made, placement)
        for share, planned in zip(placement.shares, made.placement.shares, strict=True):
            if share.missing_bytes > 0:
                excess = max(share.used_bytes - planned.used_bytes, share.missing_bytes)
                budgets = budgets.reserve(share.device, excess)
        made = _search(request, budgets, pools)
    return made


def _judge_excess(made: Plan, placement: Placement) -> Plan:
    is_within = all(share.used_bytes <= share.free_bytes for share in placement.shares)
    return _with_placement(made, placement, "tight" if is_within else "no")


def _with_placement(made: Plan, placement: Placement, verdict: Verdict) -> Plan:
    return replace(made, placement=placement, estimate=placement.estimate, verdict=verdict)


def _largest_that_fits(request: _Request, pools: Pools, candidate: Candidate) -> int | None:
    """The largest shorter context, in steps of 1024, that the model is made for and that fits with
    the candidate's KV types; where none does with a margin, that runs at all."""
    choices = _list_choices(request, request.task(candidate), pools)
    whole = pools.without_margin()

    def task_of(n_ctx: int) -> Task:
        return request.task(Candidate(n_ctx, candidate.type_k, candidate.type_v, ""))

    def fits(n_ctx: int) -> bool:
        return any(_place(task_of(n_ctx), pools, choice).fits for choice in choices)

    def runs(n_ctx: int) -> bool:
        return _place_tightly(task_of(n_ctx), whole, choices) is not None

    for is_enough in (fits, runs):
        low, high = 0, min(candidate.n_ctx, request.info.n_ctx_train or candidate.n_ctx) // 1024
        while low < high:
            middle = (low + high + 1) // 2
            if is_enough(middle * 1024):
                low = middle
            else:
                high = middle - 1
        if 0 < low * 1024 < candidate.n_ctx:
            return low * 1024
    return None


def _bits(kv_type: KvType) -> int:
    n_values, n_bytes = KV_BLOCKS[kv_type]
    return 8 * n_bytes // n_values


def _say_read(placement: Placement) -> tuple[str, ...]:
    if not placement.repack_bytes:
        return ()
    return (
        "weights are read, not mapped: beside mapped ones the CPU's reordered copy could take up "
        f"to {format_bytes(placement.repack_bytes)}",
    )


def _say_paged(placement: Placement) -> tuple[str, ...]:
    if not placement.repack_bytes:
        return ()
    return ("weights stay in the mapped file, not reordered for the CPU: prompts are read slower",)

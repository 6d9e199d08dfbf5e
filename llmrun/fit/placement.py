"""Which memory holds which part of a model, device by device. Pure.

Layers go to the GPUs from the back, the output first, and are dealt out over several GPUs in their
order, as llama.cpp does it (`load_tensors` in its src/llama-model.cpp): of `n_layer + 1` places the
last `n_gpu_layers` are on GPUs, and place k of these is on the first GPU whose cumulated share of
`tensor_split` is above k / n_gpu_layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from llmrun.fit.pools import HOST, Pool, Pools, join_names
from llmrun.fit.types import Estimate

_BALANCE_STEPS = 1024


@dataclass(frozen=True, slots=True)
class Share:
    """What one memory would hold, and what it can take.

    `free_bytes` is free there now, `budget_bytes` what of it may be planned with, `total_bytes` its
    size, 0 where it could not be read. A GPU that uses the RAM has one share together with it.
    """

    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    budget_bytes: int
    free_bytes: int
    total_bytes: int

    @property
    def used_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.overhead_bytes

    @property
    def missing_bytes(self) -> int:
        """By how much the share is over the budget; negative when there is room, 0 when the size
        of the memory is not known."""
        return self.used_bytes - self.budget_bytes if self.total_bytes else 0


@dataclass(frozen=True, slots=True)
class Placement:
    """The shares of an estimate: RAM first, then each GPU that holds something.

    `n_gpu_layers` is the engine's (-1: all), `n_cpu_moe` and `tensor_split` too. `layer_devices`
    names the share of each layer, `output_device` that of the output; experts of the first
    `n_cpu_moe` layers are in RAM all the same. `companions_device` holds projector and drafter,
    None without such. `fits`: every share is within its budget. `slack_bytes` is what is left of
    the RAM's budget, and `repack_bytes` what a CPU's reordered copy of its part would take more.
    `spared_bytes` of the RAM's weights are not counted: they stay in the file until they are read,
    or are the same pages as others. `estimate` has these taken off, and a duplicated output tensor
    added where the placement causes one.
    `n_ctx` and `n_threads` are what it was made for, 0 where that is not known.
    """

    estimate: Estimate
    n_gpu_layers: int
    shares: tuple[Share, ...]
    fits: bool
    slack_bytes: int
    reasons: tuple[str, ...] = ()
    n_cpu_moe: int = 0
    tensor_split: tuple[float, ...] = ()
    layer_devices: tuple[str, ...] = ()
    output_device: str = HOST
    companions_device: str | None = None
    repack_bytes: int = 0
    spared_bytes: int = 0
    n_on_gpu: int = 0
    is_whole: bool = False
    n_ctx: int = 0
    n_threads: int = 0

    @property
    def worst(self) -> Share | None:
        """The share that lacks most, None when none lacks anything."""
        lacking = [share for share in self.shares if share.missing_bytes > 0]
        return max(lacking, key=lambda share: share.missing_bytes, default=None)

    @property
    def total_bytes(self) -> int:
        return sum(share.used_bytes for share in self.shares)

    def with_mapped_output(self) -> Placement:
        """The same with weights mapped from the file, where an output in RAM can be the same pages
        as the embedding."""
        aliased = self.estimate.aliased_bytes if self.output_device == HOST else 0
        if not aliased:
            return self
        host = self.shares[0]
        return replace(
            self,
            shares=(
                replace(host, weights_bytes=host.weights_bytes - aliased),
                *self.shares[1:],
            ),
            estimate=replace(self.estimate, weights_bytes=self.estimate.weights_bytes - aliased),
            slack_bytes=self.slack_bytes + aliased,
            spared_bytes=self.spared_bytes + aliased,
        )


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be placed. `n_blocks` counts the model's blocks with those that are not loaded
    (llama.cpp numbers its places by it). `tensor_split`: the user's. `companions_bytes`: memory of
    projector and drafter."""

    need: Estimate
    n_blocks: int
    tensor_split: tuple[float, ...] = ()
    companions_bytes: int = 0

    @classmethod
    def of(
        cls,
        need: Estimate,
        n_blocks: int | None,
        *,
        tensor_split: tuple[float, ...] = (),
        companions_bytes: int = 0,
    ) -> Task:
        """`need` without layers is spread evenly over as many as the header tells."""
        if not need.layer_weights and n_blocks and 0 < n_blocks < 1 << 16:
            per_layer = (need.weights_bytes - need.input_bytes) // (n_blocks + 1)
            need = replace(
                need,
                layer_weights=(per_layer,) * n_blocks,
                layer_kv=(need.kv_bytes // n_blocks,) * n_blocks,
                layer_experts=(),
                output_bytes=need.weights_bytes - need.input_bytes - per_layer * n_blocks,
            )
        n_layers = len(need.layer_weights)
        return cls(need, max(n_blocks or 0, n_layers), tensor_split, companions_bytes)

    @property
    def n_places(self) -> int:
        return self.n_blocks + 1

    @property
    def n_layers(self) -> int:
        return len(self.need.layer_weights)

    @property
    def has_experts(self) -> bool:
        return any(self.need.layer_experts)

    def list_places(self, n_on_gpu: int, n_cpu_moe: int) -> list[tuple[int, int]]:
        """(weights, KV) of the last `n_on_gpu` places; what no layer accounts for is the
        output's."""
        need = self.need
        found = []
        for i in range(self.n_places - n_on_gpu, self.n_blocks):
            if i >= self.n_layers:
                found.append((0, 0))
                continue
            experts = need.layer_experts[i] if i < min(n_cpu_moe, len(need.layer_experts)) else 0
            kv = need.layer_kv[i] if i < len(need.layer_kv) else 0
            found.append((need.layer_weights[i] - experts, kv))
        if n_on_gpu:
            kv_left = max(0, need.kv_bytes - sum(need.layer_kv)) if n_on_gpu > 1 else 0
            found.append((need.output_bytes + need.tied_bytes, kv_left))
        return found


@dataclass(frozen=True, slots=True)
class Choice:
    """Where to put what. `n_on_gpu` places (None: the most that fit), the experts of `n_cpu_moe`
    layers in RAM (None: the least that fits), both within the bounds; projector and drafter on the
    GPU or not. `is_asked`: the user fixed the places."""

    n_on_gpu: int | None
    n_cpu_moe: int | None = 0
    companions_on_gpu: bool = True
    most_on_gpu: int | None = None
    least_cpu_moe: int = 0
    is_asked: bool = False


def place(task: Task, pools: Pools, choice: Choice) -> Placement:
    """Place as chosen, whether it fits (`Placement.fits`) or not."""
    n_places = task.n_places if pools.has_gpu else 0
    n_cpu_moe = choice.n_cpu_moe
    if choice.n_on_gpu is not None:
        n_on_gpu = min(choice.n_on_gpu, n_places)
        if n_cpu_moe is None:
            n_cpu_moe = _least(
                choice.least_cpu_moe,
                task.n_layers,
                lambda n: _deal(task, pools, choice, n_on_gpu, n) is not None,
            )
    else:
        experts = task.n_layers if n_cpu_moe is None else n_cpu_moe
        n_cpu_moe = experts
        most = n_places if choice.most_on_gpu is None else min(choice.most_on_gpu, n_places)
        n_on_gpu = most - _least(
            0, most, lambda n: _deal(task, pools, choice, most - n, experts) is not None
        )
    counts = _deal(task, pools, choice, n_on_gpu, n_cpu_moe)
    placement = _settle(
        task, pools, choice, n_cpu_moe, n_on_gpu, counts or _deal_anyhow(task, pools, n_on_gpu)
    )
    return placement if counts is not None else replace(placement, fits=False)


def assign(n_places: int, split: Sequence[float]) -> tuple[int, ...]:
    """How many of `n_places` each GPU gets by llama.cpp's rule."""
    total = sum(split)
    if total <= 0:
        return (n_places, *(0 for _ in split[1:]))
    bounds = [bound / total for bound in accumulate(split)]
    counts = [0] * len(bounds)
    for k in range(n_places):
        counts[min(bisect_right(bounds, k / n_places), len(bounds) - 1)] += 1
    return tuple(counts)


def _least(low: int, high: int, works: Callable[[int], bool]) -> int:
    """The least number from `low` to `high` for which `works`, which holds for all larger ones
    too; `high` when it never does."""
    while low < high:
        middle = (low + high) // 2
        if works(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _deal(
    task: Task, pools: Pools, choice: Choice, n_on_gpu: int, n_cpu_moe: int
) -> tuple[int, ...] | None:
    """How many places each of `pools.gpus` gets so that none is over its budget; None if that
    cannot be. The fastest card alone where it can hold everything, else all of them, equally
    full."""
    if not pools.has_gpu:
        return ()
    costs = [weights + kv for weights, kv in task.list_places(n_on_gpu, n_cpu_moe)]
    companions = task.companions_bytes if choice.companions_on_gpu else 0
    budgets = [pool.budget_bytes for pool in pools.gpus]
    budgets[0] -= companions
    scratch = task.need.compute_bytes
    if budgets[0] < 0:
        return None
    if task.tensor_split:
        counts = _users_counts(task, pools, n_on_gpu)
        return counts if counts and _are_within(counts, costs, budgets, scratch) else None
    if len(budgets) == 1:
        return _fill(costs, budgets, scratch)
    best = _fastest(pools)
    alone = [budget if k == best else 0 for k, budget in enumerate(budgets)]
    counts = _fill(costs, alone, scratch)
    if counts is not None:
        return counts
    if _fill(costs, budgets, scratch) is None:
        return None

    def scaled(step: int) -> list[int]:
        return [
            pool.budget_bytes * step // _BALANCE_STEPS - (companions if k == 0 else 0)
            for k, pool in enumerate(pools.gpus)
        ]

    step = _least(1, _BALANCE_STEPS, lambda step: _fill(costs, scaled(step), scratch) is not None)
    return _fill(costs, scaled(step), scratch)


def _fill(costs: Sequence[int], budgets: Sequence[int], scratch: int) -> tuple[int, ...] | None:
    """Fill the GPUs in order, each as far as it goes; None when something is left over. If any way
    of dealing out fits, this one does."""
    counts = []
    k = 0
    for budget in budgets:
        used, start = scratch, k
        while k < len(costs) and used + costs[k] <= budget:
            used += costs[k]
            k += 1
        counts.append(k - start)
    return tuple(counts) if k == len(costs) else None


def _are_within(
    counts: Sequence[int], costs: Sequence[int], budgets: Sequence[int], scratch: int
) -> bool:
    k = 0
    for count, budget in zip(counts, budgets, strict=True):
        if count and sum(costs[k : k + count]) + scratch > budget:
            return False
        k += count
    return True


def _fastest(pools: Pools) -> int:
    """The GPU to prefer: the fastest where all speeds are known, else the roomiest."""
    known = all(pool.bandwidth_bytes_s is not None for pool in pools.gpus)

    def merit(k: int) -> tuple[float, int, int]:
        pool = pools.gpus[k]
        return (pool.bandwidth_bytes_s or 0.0 if known else 0.0, pool.budget_bytes, -k)

    return max(range(len(pools.gpus)), key=merit)


def _users_counts(task: Task, pools: Pools, n_on_gpu: int) -> tuple[int, ...] | None:
    """Places of each of `pools.gpus` by the user's split; None when it gives some to a GPU that is
    not among them."""
    split = list(task.tensor_split[: pools.n_engine_gpus])
    split += [0.0] * (pools.n_engine_gpus - len(split))
    counts = assign(n_on_gpu, split)
    mine = tuple(counts[pool.place] for pool in pools.gpus)
    return mine if sum(mine) == n_on_gpu else None


def _deal_anyhow(task: Task, pools: Pools, n_on_gpu: int) -> tuple[int, ...]:
    """Places in proportion to free memory, for what does not fit."""
    if not pools.has_gpu:
        return ()
    if task.tensor_split:
        counts = _users_counts(task, pools, n_on_gpu)
        if counts is not None:
            return counts
    return assign(n_on_gpu, [float(pool.free_bytes) for pool in pools.gpus])


def _settle(
    task: Task,
    pools: Pools,
    choice: Choice,
    n_cpu_moe: int,
    n_on_gpu: int,
    counts: Sequence[int],
) -> Placement:
    need = task.need
    n_in_ram = task.n_places - n_on_gpu
    is_all = n_in_ram == 0
    if not task.has_experts and not choice.n_cpu_moe:
        n_cpu_moe = 0
    experts_in_ram = any(need.layer_experts[n_in_ram:n_cpu_moe])
    places = iter(task.list_places(n_on_gpu, n_cpu_moe))
    companions_device = HOST
    if task.companions_bytes and choice.companions_on_gpu and pools.has_gpu:
        companions_device = pools.gpus[0].device
    owners = [HOST] * n_in_ram
    gpus = []
    for pool, count in zip(pools.gpus, counts, strict=True):
        owners += [pool.device] * count
        mine = [next(places) for _ in range(count)]
        overhead = task.companions_bytes if pool.device == companions_device else 0
        if count or overhead:
            share = _share(
                pool,
                sum(weights for weights, _ in mine),
                sum(kv for _, kv in mine),
                need.compute_bytes if count else 0,
                overhead,
            )
            gpus.append(share)
    lazy = min(need.lazy_bytes, need.input_bytes)
    weights = need.weights_bytes - lazy + (need.tied_bytes if n_on_gpu else 0)
    host = _share(
        pools.host,
        weights - sum(share.weights_bytes for share in gpus),
        need.kv_bytes - sum(share.kv_bytes for share in gpus),
        # A step that runs on both needs scratch memory on both; with all layers on GPUs a little
        # is left for the inputs.
        need.compute_bytes // 4 if is_all and not experts_in_ram else need.compute_bytes,
        need.overhead_bytes + (task.companions_bytes if companions_device == HOST else 0),
    )
    shares = (host, *gpus)
    if pools.is_unified and gpus:
        shares = (_unite(host, gpus[0], pools.is_known),)
    slack = pools.host.budget_bytes - shares[0].used_bytes
    return Placement(
        estimate=replace(need, weights_bytes=weights),
        n_gpu_layers=-1 if is_all else n_on_gpu,
        shares=shares,
        fits=all(share.missing_bytes <= 0 for share in shares)
        and (slack >= 0 or not pools.is_known),
        slack_bytes=slack,
        reasons=_describe(
            task, pools, choice, n_on_gpu, n_cpu_moe if experts_in_ram else 0, counts
        ),
        n_cpu_moe=n_cpu_moe,
        tensor_split=_split_of(task, pools, counts),
        layer_devices=tuple(owners[: task.n_layers]),
        output_device=owners[-1],
        companions_device=companions_device if task.companions_bytes else None,
        repack_bytes=_repack_bytes(need, n_in_ram, n_cpu_moe),
        spared_bytes=lazy,
        n_on_gpu=n_on_gpu,
        is_whole=is_all and not experts_in_ram,
    )


def _share(pool: Pool, weights: int, kv: int, compute: int, overhead: int) -> Share:
    return Share(
        pool.device,
        weights,
        kv,
        compute,
        overhead,
        pool.limit_bytes,
        pool.free_bytes,
        pool.total_bytes,
    )


def _unite(host: Share, gpu: Share, ram_is_known: bool) -> Share:
    """One share for RAM and the GPU that uses it. Its budget is the RAM's, or less where the GPU's
    own limit binds: then the GPU's part is over that limit just when all is over the budget."""
    limit = gpu.budget_bytes + host.used_bytes
    ram = host if ram_is_known else gpu
    return Share(
        gpu.device,
        host.weights_bytes + gpu.weights_bytes,
        host.kv_bytes + gpu.kv_bytes,
        host.compute_bytes + gpu.compute_bytes,
        host.overhead_bytes + gpu.overhead_bytes,
        min(host.budget_bytes, limit) if ram_is_known else limit,
        ram.free_bytes,
        ram.total_bytes,
    )


def _split_of(task: Task, pools: Pools, counts: Sequence[int]) -> tuple[float, ...]:
    """Whole numbers of places: their cumulated shares are exact at the borders."""
    if task.tensor_split:
        return task.tensor_split
    if pools.n_engine_gpus < 2 or not any(counts):
        return ()
    split = [0.0] * pools.n_engine_gpus
    for pool, count in zip(pools.gpus, counts, strict=True):
        split[pool.place] = float(count)
    return tuple(split)


def _repack_bytes(need: Estimate, n_in_ram: int, n_cpu_moe: int) -> int:
    """The part of `need.repack_bytes` that belongs to layers and experts in RAM."""
    total = sum(need.layer_weights)
    if not total or n_in_ram > len(need.layer_weights):
        return need.repack_bytes
    in_ram = sum(need.layer_weights[:n_in_ram]) + sum(need.layer_experts[n_in_ram:n_cpu_moe])
    return need.repack_bytes * in_ram // total


def _describe(
    task: Task,
    pools: Pools,
    choice: Choice,
    n_on_gpu: int,
    n_cpu_moe: int,
    counts: Sequence[int],
) -> tuple[str, ...]:
    if not pools.has_gpu:
        return ()
    if not n_on_gpu:
        why = "as asked" if choice.is_asked else f"too little room on {pools.gpu_names}"
        return (f"all layers on the CPU: {why}",)
    used = [(pool.device, count) for pool, count in zip(pools.gpus, counts, strict=True) if count]
    names = join_names([name for name, _ in used])
    if len(used) > 1:
        names += f" ({' + '.join(str(count) for _, count in used)})"
    asked = ", as asked" if choice.is_asked else ""
    reasons = []
    if n_on_gpu == task.n_places:
        reasons.append(f"all layers on {names}{asked}")
    else:
        reasons.append(
            f"{n_on_gpu} of {task.n_places} layers on {names}, the others on the CPU{asked}"
        )
    if n_cpu_moe:
        which = "all layers" if n_cpu_moe >= task.n_layers else f"the first {n_cpu_moe} layers"
        reasons.append(f"the experts of {which} stay in RAM, to leave room on the GPU")
    if task.companions_bytes and not choice.companions_on_gpu:
        reasons.append("what comes beside the model (projector, drafter) stays in RAM")
    return tuple(reasons)

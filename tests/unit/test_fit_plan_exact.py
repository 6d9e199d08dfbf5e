"""The planner with an allocator: what is asked, what is believed, and what is planned again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from llmrun.fit.formula import estimate
from llmrun.fit.placement import assign
from llmrun.fit.plan import Wishes, plan
from llmrun.fit.types import BufferUse, Measurement, Setup
from llmrun.gguf.types import ModelInfo
from tests.fakes.model_shapes import shape_info
from tests.unit.test_fit_plan import BIG, GIB, MIB, machine


class FakeAllocator:
    """Answers from the closed form, with other compute bytes, and `more` on each GPU."""

    def __init__(
        self,
        info: ModelInfo,
        devices: tuple[str, ...] = (),
        *,
        compute: Callable[[Setup], int] = lambda setup: 123 * MIB,
        more: dict[str, int] | None = None,
        problem: str | None = None,
    ) -> None:
        self.info = info
        self.devices = devices
        self.compute = compute
        self.more = more or {}
        self.problem = problem
        self.calls: list[tuple[Setup, ...]] = []

    def measure(self, setups: Sequence[Setup]) -> tuple[Measurement | None, ...]:
        self.calls.append(tuple(setups))
        if self.problem is not None:
            return (None,) * len(setups)
        return tuple(Measurement(setup, self._buffers(setup)) for setup in setups)

    def _buffers(self, setup: Setup) -> tuple[BufferUse, ...]:
        need = estimate(self.info, setup)
        n_layers = len(need.layer_weights)
        n_on_gpu = n_layers + 1 if setup.n_gpu_layers < 0 else setup.n_gpu_layers
        if not self.devices:
            n_on_gpu = 0
        counts = assign(n_on_gpu, setup.tensor_split or (1.0,) * len(self.devices) or (1.0,))
        first = n_layers + 1 - n_on_gpu
        found = []
        for name, count in zip(self.devices, counts, strict=False):
            if count:
                mine = range(first, min(first + count, n_layers))
                is_last = first + count > n_layers
                weights = sum(need.layer_weights[i] for i in mine)
                found.append(
                    BufferUse(
                        name,
                        name,
                        weights + is_last * (need.output_bytes + need.tied_bytes),
                        sum(need.layer_kv[i] for i in mine),
                        self.compute(setup) + self.more.get(name, 0),
                    )
                )
            first += count
        tied = need.tied_bytes if n_on_gpu else 0
        weights = need.weights_bytes + tied - sum(use.weights_bytes for use in found)
        kv = need.kv_bytes - sum(use.kv_bytes for use in found)
        compute = 10 * MIB if found else self.compute(setup)
        return (BufferUse("CPU", "CPU", weights, kv, compute), *found)


def test_all_contexts_and_cache_types_are_asked_in_one_call():
    allocator = FakeAllocator(BIG)
    chosen = plan(machine(64), BIG, allocator=allocator)
    (setups,) = allocator.calls
    assert {(setup.n_ctx, setup.type_k) for setup in setups} == {
        (n_ctx, kv_type) for n_ctx in (8192, 4096, 2048) for kv_type in ("f16", "q8_0")
    }
    # One placement, so that the model is loaded once.
    assert {(setup.n_gpu_layers, setup.n_cpu_moe) for setup in setups} == {(0, 0)}
    assert chosen.source == "exact"
    assert chosen.estimate.compute_bytes == 123 * MIB
    assert not any("not measured" in reason for reason in chosen.reasons)


def test_a_cache_for_each_stream_is_asked_about_as_it_is():
    wishes = Wishes(n_ctx=4096, n_seq=4, kv_unified=False)
    allocator = FakeAllocator(BIG, ("GPU0",))
    chosen = plan(machine(64, 24), BIG, wishes, allocator=allocator)
    asked = [setup for setups in allocator.calls for setup in setups]
    assert {setup.kv_unified for setup in asked} == {False}
    assert asked[-1] == chosen.setup and not chosen.kv_unified


def test_the_plan_follows_the_exact_figures():
    need = estimate(BIG, Setup(8192))
    target = machine((need.total_bytes + 700 * MIB) / GIB)
    assert plan(target, BIG).type_k == "f16"
    costly = FakeAllocator(BIG, compute=lambda setup: need.compute_bytes + 400 * MIB)
    assert plan(target, BIG, allocator=costly).type_k == "q8_0"


def test_without_an_answer_the_closed_form_decides_and_says_so():
    allocator = FakeAllocator(BIG, problem="the child was killed")
    chosen = plan(machine(64), BIG, allocator=allocator)
    assert chosen.source == "formula"
    assert replace(chosen, reasons=()) == replace(plan(machine(64), BIG), reasons=())
    assert "estimated, not measured: the child was killed" in chosen.reasons


def test_a_placement_on_gpus_is_measured_as_it_is():
    allocator = FakeAllocator(BIG, ("GPU0", "GPU1"))
    chosen = plan(machine(16, 3, 5), BIG, allocator=allocator)
    assert allocator.calls[-1] == (chosen.setup,)
    host, first, second = chosen.shares
    assert first.compute_bytes == second.compute_bytes == 123 * MIB
    assert host.compute_bytes == 10 * MIB
    assert host.overhead_bytes == chosen.estimate.overhead_bytes
    assert chosen.source == "exact"
    assert sum(share.weights_bytes for share in chosen.shares) == chosen.estimate.weights_bytes
    assert chosen.verdict == "fits"


def test_candidates_on_gpus_count_a_tied_output_once():
    without = tuple(tensor for tensor in BIG.header.tensors if tensor.name != "output.weight")
    tied = replace(
        BIG,
        header=replace(BIG.header, tensors=without),
        tensor_bytes=sum(tensor.n_bytes for tensor in without),
    )
    chosen = plan(machine(16, 24), tied, allocator=FakeAllocator(tied, ("GPU0",)))
    assert (
        chosen.placement.total_bytes < plan(machine(16, 24), tied).placement.total_bytes + 200 * MIB
    )
    assert chosen.estimate.weights_bytes == tied.tensor_bytes + chosen.estimate.input_bytes


def test_what_stays_in_the_file_is_not_counted_when_measured_either():
    big = shape_info("gemma-3n-e4b", "f16")
    plain = plan(machine(64, 24), big)
    chosen = plan(machine(64, 24), big, allocator=FakeAllocator(big, ("GPU0",)))
    assert chosen.placement.spared_bytes > 4 * GIB
    assert chosen.shares[0].weights_bytes == plain.shares[0].weights_bytes
    assert chosen.shares[0].weights_bytes < big.tensor_bytes - 4 * GIB


def test_other_gpus_than_the_machines_say_nothing_about_its_devices():
    allocator = FakeAllocator(BIG, ("CUDA7",))
    chosen = plan(machine(16, 24), BIG, allocator=allocator)
    assert len(allocator.calls) == 1
    assert chosen.source == "exact"
    assert chosen.verdict == "fits"


def test_a_card_that_would_get_too_much_is_given_less():
    plain = plan(machine(16, 4), BIG)
    allocator = FakeAllocator(BIG, ("GPU0",), more={"GPU0": 600 * MIB})
    chosen = plan(machine(16, 4), BIG, allocator=allocator)
    assert chosen.verdict == "partly_on_cpu"
    assert 0 < chosen.n_gpu_layers < plain.n_gpu_layers
    gpu = chosen.shares[1]
    assert gpu.compute_bytes == 723 * MIB
    assert gpu.missing_bytes <= 0
    assert gpu.budget_bytes == 3 * GIB
    # No more than the layer or two that the rounding costs.
    assert gpu.missing_bytes > -600 * MIB


def test_one_of_two_cards_may_be_at_fault():
    allocator = FakeAllocator(BIG, ("GPU0", "GPU1"), more={"GPU1": 900 * MIB})
    plain = plan(machine(16, 3.4, 5.4), BIG)
    chosen = plan(machine(16, 3.4, 5.4), BIG, allocator=allocator)
    assert all(share.missing_bytes <= 0 for share in chosen.shares)
    assert chosen.tensor_split[1] < plain.tensor_split[1]
    assert chosen.verdict in ("fits", "partly_on_cpu")


def test_planning_again_ends():
    """A device that is always over by more: whatever is planned is too much."""

    class Insatiable(FakeAllocator):
        def measure(self, setups: Sequence[Setup]) -> tuple[Measurement | None, ...]:
            self.more = {"GPU0": (len(self.calls) + 1) * 3 * GIB}
            return super().measure(setups)

    allocator = Insatiable(BIG, ("GPU0",))
    chosen = plan(machine(16, 8), BIG, allocator=allocator)
    assert len(allocator.calls) <= 5
    if chosen.verdict in ("fits", "partly_on_cpu", "cpu_only"):
        assert all(share.missing_bytes <= 0 for share in chosen.shares)


def test_what_is_fixed_and_over_is_judged_not_changed():
    need = plan(machine(16, 24), BIG, Wishes(n_ctx=8192, type_k="f16", type_v="f16"))
    free = need.shares[1].used_bytes / GIB + 1.05
    allocator = FakeAllocator(BIG, ("GPU0",), more={"GPU0": 600 * MIB})
    wishes = Wishes(n_ctx=8192, type_k="f16", type_v="f16", n_gpu_layers="all")
    chosen = plan(machine(16, free), BIG, wishes, allocator=allocator)
    assert chosen.verdict == "tight"
    assert (chosen.n_gpu_layers, chosen.n_ctx) == (-1, 8192)
    allocator = FakeAllocator(BIG, ("GPU0",), more={"GPU0": 1600 * MIB})
    assert plan(machine(16, free), BIG, wishes, allocator=allocator).verdict == "no"


def test_a_card_that_two_backends_list_is_measured_all_the_same():
    """A build for CUDA and Vulkan names it twice; llama.cpp uses the first."""
    target = machine(64, 24)

    class Twice(FakeAllocator):
        def _buffers(self, setup: Setup) -> tuple[BufferUse, ...]:
            return FakeAllocator(self.info, ("GPU0",))._buffers(replace(setup, tensor_split=()))

    for devices in (("GPU0", "Vulkan0"), ("Vulkan0", "GPU0")):
        chosen = plan(target, BIG, allocator=Twice(BIG, devices))
        assert (chosen.source, chosen.shares[0].compute_bytes) == ("exact", 10 * MIB)


def test_an_answer_for_other_devices_is_not_taken_for_the_placement():
    target = machine(64, 24)

    class Elsewhere(FakeAllocator):
        def _buffers(self, setup: Setup) -> tuple[BufferUse, ...]:
            return FakeAllocator(self.info, ("Vulkan0",))._buffers(replace(setup, tensor_split=()))

    chosen = plan(target, BIG, allocator=Elsewhere(BIG, ("Vulkan0", "GPU0")))
    card = next(share for share in chosen.shares if share.device == "GPU0")
    assert card.weights_bytes > 0

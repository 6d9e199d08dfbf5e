"""The refusal, and the next smaller attempt after one that failed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings

from llmrun.errors import WillNotFitError
from llmrun.fit.plan import Plan, Wishes, plan, require_fit, shrink
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine
from tests.fakes.model_shapes import shape_info
from tests.unit.test_fit_plan import BIG, INFOS, NAMES, WISHES, machine, machines

MOE = shape_info("qwen3-30b-a3b")


def steps(target: Machine, info: ModelInfo, wishes: Wishes, n_most: int = 99) -> list[Plan]:
    """The plan, and those of all smaller attempts after it."""
    found = [plan(target, info, wishes)]
    while len(found) <= n_most:
        smaller = shrink(found[-1], wishes, target, info)
        if smaller is None:
            break
        wishes = smaller
        found.append(plan(target, info, wishes))
    return found


def test_a_refusal_names_what_would_run():
    chosen = plan(machine(3), BIG)
    with pytest.raises(WillNotFitError) as caught:
        require_fit(chosen, alternatives=("llmrun run big:q2_k", "llmrun run small"))
    assert caught.value.hint.startswith("llmrun run big:q2_k, llmrun run small, or --force")


def test_a_refusal_names_each_device_that_lacks_memory():
    chosen = plan(machine(1, 3), BIG, Wishes(n_gpu_layers="all"))
    with pytest.raises(WillNotFitError) as caught:
        require_fit(chosen)
    assert "GPU0 would have to hold 4.83 GB" in caught.value.why
    assert "and has 3.22 GB free" in caught.value.why
    assert "RAM would" not in caught.value.why


def test_first_the_context_then_the_cache_then_layers():
    contexts, types, layers = [], [], []
    for chosen in steps(machine(16, 24), BIG, Wishes(), 4):
        contexts.append(chosen.n_ctx)
        types.append(chosen.type_k)
        layers.append(chosen.n_gpu_layers)
    assert contexts == [8192, 6144, 6144, 6144, 6144]
    assert types == ["f16", "f16", "q8_0", "q8_0", "q8_0"]
    assert layers == [-1, -1, -1, 30, 27]


def test_of_a_mixture_experts_go_before_layers():
    moved = [chosen.n_cpu_moe for chosen in steps(machine(60, 24), MOE, Wishes(), 4)]
    assert moved == [0, 0, 0, 4, 8]


def test_a_shorter_context_brings_nothing_back_to_the_gpu():
    target = machine(60, 12.06)
    before, after = steps(target, MOE, Wishes(), 1)[:2]
    assert after.n_ctx < before.n_ctx
    assert before.n_cpu_moe > 0
    assert (after.n_cpu_moe, after.type_k) == (before.n_cpu_moe, before.type_k)
    free = plan(target, MOE, Wishes(n_ctx_max=after.n_ctx))
    assert free.n_cpu_moe < before.n_cpu_moe
    partly, less = steps(machine(16, 4), BIG, Wishes(), 1)[:2]
    assert less.n_gpu_layers == partly.n_gpu_layers
    assert less.shares[1].used_bytes < partly.shares[1].used_bytes


def test_on_a_cpu_contexts_go_on_shrinking():
    contexts = [chosen.n_ctx for chosen in steps(machine(16), BIG, Wishes())]
    assert contexts == [8192, 6144, 6144, 5120, 4096, 3072, 2048]


def test_the_context_shrinks_by_a_tenth_to_a_quarter():
    for n_ctx in range(4096, 40_000, 512):
        chosen = plan(machine(400), BIG, Wishes(n_ctx=n_ctx))
        smaller = shrink(chosen, Wishes(), machine(400), BIG)
        assert smaller is not None
        assert smaller.n_ctx_max % 1024 == 0
        assert 0.75 * n_ctx <= smaller.n_ctx_max <= 0.92 * n_ctx


def test_nothing_is_left_when_the_user_fixed_it_all():
    wishes = Wishes(n_ctx=4096, type_k="f16", type_v="f16", n_gpu_layers="all")
    target = machine(16, 24)
    assert shrink(plan(target, BIG, wishes), wishes, target, BIG) is None


def test_what_was_fixed_never_shrinks():
    for chosen in steps(machine(16, 24), BIG, Wishes(n_ctx=8192)):
        assert chosen.n_ctx == 8192
    for chosen in steps(machine(16, 24), BIG, Wishes(n_gpu_layers="all", type_k="f16")):
        assert (chosen.n_gpu_layers, chosen.type_k) == (-1, "f16")
    for chosen in steps(machine(60, 24), MOE, Wishes(n_cpu_moe=2)):
        assert chosen.n_cpu_moe == 2


@settings(deadline=None)
@given(NAMES, WISHES, machines())
def test_each_attempt_takes_no_more_and_there_is_an_end(name, wishes, target):
    info = INFOS[name]
    made = plan(target, info, wishes)
    if not made.runs:
        return
    attempts = steps(target, info, wishes, 60)
    assert len(attempts) <= 60
    for before, after in pairwise(attempts):
        assert after.n_ctx <= before.n_ctx
        assert after.placement.n_on_gpu <= before.placement.n_on_gpu
        assert after.estimate.kv_bytes <= before.estimate.kv_bytes
        assert after.n_cpu_moe >= before.n_cpu_moe or after.placement.n_on_gpu == 0
        assert after.setup != before.setup

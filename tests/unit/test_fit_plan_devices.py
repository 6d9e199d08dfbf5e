"""Which device gets what: several and unequal GPUs, experts in RAM, unified memory, companions."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.fit.formula import estimate
from llmrun.fit.placement import assign
from llmrun.fit.plan import Plan, Wishes, plan
from llmrun.fit.types import Setup
from llmrun.hardware.machine import Device, Machine, Memory
from tests.fakes.model_shapes import shape_info
from tests.unit.test_fit_plan import BIG, CPU, GIB, INFOS, NAMES, dense_8b, machine, machines

MOE = shape_info("qwen3-30b-a3b")
GEMMA = shape_info("gemma-4-e2b")


def owners_by_llama_cpp(chosen: Plan, n_blocks: int, devices: list[str]) -> list[str]:
    """Each block's device and the output's, with llama.cpp's arithmetic in 32-bit floats."""

    def f32(value: float) -> float:
        return ctypes.c_float(value).value

    n_gpu_layers = n_blocks + 1 if chosen.n_gpu_layers < 0 else chosen.n_gpu_layers
    start = max(n_blocks + 1 - n_gpu_layers, 0)
    n_on_gpu = min(n_gpu_layers, n_blocks + 1)
    total, splits = 0.0, []
    for share in chosen.tensor_split or (1.0,):
        total = f32(total + f32(share))
        splits.append(total)
    splits = [f32(split / total) for split in splits]
    found = []
    for i in range(n_blocks + 1):
        if i < start:
            found.append("RAM")
        else:
            found.append(devices[bisect_right(splits, f32((i - start) / n_on_gpu))])
    return found


@settings(deadline=None)
@given(NAMES, machines())
def test_the_split_makes_llama_cpp_do_what_was_planned(name, target):
    info = INFOS[name]
    chosen = plan(target, info)
    if not chosen.placement.n_on_gpu:
        return
    cards = [device.name for device in target.devices if device.kind == "gpu"]
    if not chosen.tensor_split:
        assert len(cards) == 1
    owners = owners_by_llama_cpp(chosen, info.n_layers, cards)
    n_layers = len(chosen.placement.layer_devices)
    assert owners[:n_layers] == list(chosen.placement.layer_devices)
    assert owners[-1] == chosen.placement.output_device


def test_one_card_that_holds_everything_is_used_alone():
    chosen = plan(machine(16, 8, 24), BIG)
    assert chosen.verdict == "fits"
    assert chosen.tensor_split == (0.0, 33.0)
    assert [share.device for share in chosen.shares] == ["RAM", "GPU1"]


def test_the_fastest_card_comes_before_the_roomiest():
    slow = Device("A", "a", "gpu", 48 * GIB, 48 * GIB, bandwidth_bytes_s=3e11)
    fast = Device("B", "b", "gpu", 12 * GIB, 12 * GIB, bandwidth_bytes_s=9e11)
    target = machine(16).with_devices((slow, fast))
    assert plan(target, BIG).tensor_split == (0.0, 33.0)
    unknown = target.with_devices((slow, replace(fast, bandwidth_bytes_s=None)))
    assert plan(unknown, BIG).tensor_split == (33.0, 0.0)


def test_unequal_cards_get_unequal_parts():
    chosen = plan(machine(16, 3, 5), BIG)
    assert chosen.verdict == "fits"
    assert chosen.n_gpu_layers == -1
    first, second = chosen.tensor_split
    assert first + second == 33
    assert 1.5 < second / first < 3
    _, small, large = chosen.shares
    assert small.used_bytes <= 2 * GIB
    assert large.used_bytes <= 4 * GIB
    # Equally full, so that neither runs over first.
    assert abs(small.used_bytes / (2 * GIB) - large.used_bytes / (4 * GIB)) < 0.1
    assert any(f"GPU0 and GPU1 ({first:.0f} + {second:.0f})" in reason for reason in chosen.reasons)


def test_cards_that_are_too_small_together_get_the_last_layers():
    chosen = plan(machine(16, 2, 3), BIG)
    assert chosen.verdict == "partly_on_cpu"
    assert sum(chosen.tensor_split) == chosen.n_gpu_layers < 33
    devices = chosen.placement.layer_devices
    assert list(devices) == sorted(devices, key=["RAM", "GPU0", "GPU1"].index)
    assert devices[0] == "RAM"
    assert devices[-1] == chosen.placement.output_device == "GPU1"


def test_a_users_split_is_kept_and_judged():
    wishes = Wishes(n_gpu_layers="all", tensor_split=(1.0, 3.0))
    chosen = plan(machine(16, 10, 10), BIG, wishes)
    assert chosen.tensor_split == (1.0, 3.0)
    assert chosen.verdict == "fits"
    assert [chosen.placement.layer_devices.count(name) for name in ("GPU0", "GPU1")] == [9, 23]
    lopsided = plan(machine(16, 10, 2), BIG, wishes)
    assert lopsided.verdict == "no"
    assert lopsided.tensor_split == (1.0, 3.0)


def test_a_users_split_onto_a_blind_card_does_not_fit():
    blind = Device("X", "x", "gpu", 0, 0)
    target = machine(16, 24)
    target = target.with_devices((*target.devices, blind))
    wishes = Wishes(n_gpu_layers="all", tensor_split=(1.0, 1.0))
    assert plan(target, BIG, wishes).verdict == "no"
    assert plan(target, BIG).tensor_split == (33.0, 0.0)


@pytest.mark.parametrize(
    ("n_places", "split", "counts"),
    [
        (33, (1.0, 3.0), (9, 24)),
        (10, (1.0,), (10,)),
        (10, (0.0, 1.0), (0, 10)),
        (10, (1.0, 0.0), (10, 0)),
        (7, (0.0, 0.0), (7, 0)),
        (0, (1.0, 1.0), (0, 0)),
        (3, (1.0, 1.0, 1.0), (1, 1, 1)),
    ],
)
def test_places_by_a_split(n_places, split, counts):
    assert assign(n_places, split) == counts


def test_a_gpu_in_the_processor_is_left_alone_beside_a_card():
    inside = Device("iGPU", "weak", "igpu", 30 * GIB, 32 * GIB, True)
    target = machine(32, 12)
    both = target.with_devices((inside, *target.devices))
    assert plan(both, BIG).placement == plan(target, BIG).placement
    only = plan(target.with_devices((inside,)), BIG)
    assert only.verdict == "fits"
    assert [share.device for share in only.shares] == ["iGPU"]


def test_a_gpu_that_uses_the_ram_is_left_alone_beside_a_card():
    both = machine(32, 12, shared=30)
    chosen = plan(both, BIG)
    assert [share.device for share in chosen.shares] == ["RAM", "GPU0"]
    assert chosen.tensor_split == (33.0, 0.0)
    assert chosen.available_bytes == 44 * GIB


# ---- experts


def test_experts_go_to_ram_before_layers_do():
    chosen = plan(machine(60, 12), MOE)
    assert chosen.verdict == "partly_on_cpu"
    assert chosen.n_gpu_layers == -1
    assert 0 < chosen.n_cpu_moe < 48
    # Not one layer more than has to: the GPU is as full as it can be.
    gpu = chosen.shares[1]
    assert 0 <= -gpu.missing_bytes < chosen.estimate.layer_experts[0]
    assert any(
        f"experts of the first {chosen.n_cpu_moe} layers stay in RAM" in reason
        for reason in chosen.reasons
    )


def test_when_all_experts_are_in_ram_layers_follow():
    chosen = plan(machine(60, 1.8), MOE)
    assert chosen.n_cpu_moe == 48
    assert 2 <= chosen.n_gpu_layers < 49
    assert any("experts of all layers" in reason for reason in chosen.reasons)


def test_experts_stay_where_they_were_asked_to():
    everything = plan(machine(60, 24), MOE, Wishes(n_cpu_moe="all"))
    assert (everything.n_cpu_moe, everything.verdict) == (48, "partly_on_cpu")
    fixed = plan(machine(60, 12), MOE, Wishes(n_cpu_moe=3))
    assert fixed.n_cpu_moe == 3
    assert 0 < fixed.n_gpu_layers < 49  # layers had to go instead
    assert plan(machine(60, 24), MOE, Wishes(n_cpu_moe=0)).n_cpu_moe == 0


def test_experts_in_ram_are_counted_there():
    some = plan(machine(60, 24), MOE, Wishes(n_cpu_moe=10, n_gpu_layers="all"))
    none = plan(machine(60, 24), MOE, Wishes(n_cpu_moe=0, n_gpu_layers="all"))
    moved = sum(none.estimate.layer_experts[:10])
    assert none.shares[1].weights_bytes - some.shares[1].weights_bytes == moved
    assert some.shares[0].weights_bytes - none.shares[0].weights_bytes == moved


def test_a_wish_for_all_layers_still_lets_experts_go():
    chosen = plan(machine(60, 12), MOE, Wishes(n_gpu_layers="all"))
    assert (chosen.n_gpu_layers, chosen.verdict) == (-1, "partly_on_cpu")
    assert chosen.n_cpu_moe > 0


def test_a_dense_model_has_no_experts_to_move():
    chosen = plan(machine(60, 4), BIG)
    assert chosen.n_cpu_moe == 0
    assert 0 < chosen.n_gpu_layers < 33


# ---- the sacrifices, with a GPU


def test_what_is_given_up_in_order_on_a_gpu():
    seen = []
    for tenth in range(250, 0, -1):
        chosen = plan(machine(60, tenth / 10), MOE)
        what = (
            chosen.n_ctx,
            chosen.type_k,
            "experts" if 0 < chosen.n_cpu_moe < 48 else chosen.n_cpu_moe,
            "some" if chosen.n_gpu_layers > 0 else chosen.n_gpu_layers,
            chosen.verdict,
        )
        if not seen or seen[-1] != what:
            seen.append(what)
    assert seen == [
        (32768, "f16", 0, -1, "fits"),
        (16384, "f16", 0, -1, "fits"),
        (8192, "f16", 0, -1, "fits"),
        (8192, "q8_0", 0, -1, "fits"),
        (8192, "q8_0", "experts", -1, "partly_on_cpu"),
        (8192, "q8_0", 48, -1, "partly_on_cpu"),
        (8192, "q8_0", 48, "some", "partly_on_cpu"),
        (8192, "f16", 0, 0, "cpu_only"),
    ]


def test_a_short_context_comes_after_everything_else():
    """Too little RAM for the layers that would stay there: then, and only then, below 8192."""
    need = plan(machine(60, 24), dense_8b(attention__head_count_kv=32), Wishes(n_ctx=4096))
    free = need.shares[1].used_bytes / GIB + 1.05
    info = dense_8b(attention__head_count_kv=32)
    assert plan(machine(60, free), info).n_ctx == 8192
    assert plan(machine(60, free), info).verdict == "partly_on_cpu"
    short = plan(machine(0.6, free), info)
    assert (short.n_ctx, short.verdict) == (4096, "fits")


def test_the_word_for_running_on_the_cpu_needs_a_gpu():
    assert plan(machine(60), BIG).verdict == "fits"
    assert plan(machine(60, 1.2), BIG).verdict == "cpu_only"
    assert plan(machine(60, 24), BIG, Wishes(n_gpu_layers=0)).verdict == "cpu_only"
    assert plan(machine(60, 24), BIG, Wishes(n_gpu_layers=9)).verdict == "partly_on_cpu"


def test_why_the_gpu_is_not_used():
    small = plan(machine(60, 1.2), BIG)
    assert "all layers on the CPU: too little room on GPU0" in small.reasons
    asked = plan(machine(60, 24), BIG, Wishes(n_gpu_layers=0))
    assert "all layers on the CPU: as asked" in asked.reasons
    target = machine(60).with_devices((Device("X", "x", "gpu", 0, 0),))
    blind = plan(target, BIG)
    assert (blind.n_gpu_layers, blind.verdict) == (0, "fits")
    assert "X does not tell its memory: it gets nothing" in blind.reasons


# ---- RAM beside the GPU


def test_the_part_on_the_cpu_has_to_fit_into_ram():
    assert plan(machine(5, 3), BIG).verdict == "partly_on_cpu"
    short = plan(machine(2, 3), BIG)
    assert short.verdict in ("tight", "no")
    assert short.n_ctx == 2048


def test_ram_that_cannot_be_read_does_not_hide_the_gpu():
    target = replace(machine(60, 4), memory=Memory(0, 0, "unknown"))
    chosen = plan(target, BIG)
    assert chosen.verdict == "partly_on_cpu"
    assert chosen.shares[1].missing_bytes <= 0
    assert chosen.shares[0].missing_bytes == 0
    assert chosen.reasons[-1] == "free memory could not be read: not checked"


def test_only_what_the_cpu_keeps_is_reordered_there():
    all_on_gpu = plan(machine(16, 24), BIG)
    assert all_on_gpu.placement.repack_bytes == 0
    assert all_on_gpu.use_mmap
    half = plan(machine(16, 4), BIG).placement.repack_bytes
    assert 0 < half < plan(machine(16), BIG).placement.repack_bytes


# ---- unified memory


def apple(available: float, limit: float, total: float = 16) -> Machine:
    gpu = Device("MTL0", "Apple", "gpu", int(limit * GIB), int(limit * GIB), True, "Metal")
    return Machine(CPU, Memory(int(total * GIB), int(available * GIB)), (gpu,), "darwin", "arm64")


def test_unified_memory_is_one_share_within_both_limits():
    chosen = plan(apple(14, 10.6), BIG)
    (share,) = chosen.shares
    assert (share.device, share.total_bytes, share.free_bytes) == ("MTL0", 16 * GIB, 14 * GIB)
    assert (chosen.verdict, chosen.n_gpu_layers, chosen.tensor_split) == ("fits", -1, ())
    assert share.weights_bytes == chosen.estimate.weights_bytes
    assert chosen.available_bytes == 14 * GIB


def test_the_gpus_own_limit_binds_too():
    chosen = plan(apple(14, 4), BIG)
    assert chosen.verdict == "partly_on_cpu"
    (share,) = chosen.shares
    assert share.missing_bytes <= 0
    assert share.budget_bytes < 14 * GIB - GIB
    fixed = plan(apple(14, 4), BIG, Wishes(n_gpu_layers="all"))
    assert fixed.verdict == "no"


def test_ram_binds_whatever_the_gpu_says():
    assert plan(apple(5, 12), BIG).verdict in ("tight", "no")
    assert plan(apple(4, 12), BIG).verdict == "no"


# ---- companions and tables that stay behind


def test_companions_take_room_on_the_first_gpu():
    free = plan(machine(16, 24), BIG).shares[1].used_bytes / GIB + 1.2
    assert plan(machine(16, free), BIG).verdict == "fits"
    chosen = plan(machine(16, free), BIG, Wishes(companions_bytes=GIB))
    assert chosen.placement.companions_device == "GPU0"
    assert chosen.shares[1].overhead_bytes == GIB
    assert chosen.shares[1].missing_bytes <= 0
    assert chosen.verdict == "partly_on_cpu"


def test_companions_go_to_ram_where_the_gpu_has_no_room_for_them():
    chosen = plan(machine(16, 3), BIG, Wishes(companions_bytes=3 * GIB))
    assert chosen.placement.companions_device == "RAM"
    assert chosen.verdict == "partly_on_cpu"
    assert chosen.shares[0].overhead_bytes == chosen.estimate.overhead_bytes + 3 * GIB
    alone = plan(machine(16), BIG, Wishes(companions_bytes=GIB))
    assert alone.placement.companions_device == "RAM"


def test_tables_for_each_layer_stay_in_ram():
    chosen = plan(machine(16, 12), GEMMA)
    table = next(
        tensor.n_bytes
        for tensor in GEMMA.header.tensors
        if tensor.name == "per_layer_token_embd.weight"
    )
    assert chosen.verdict == "fits"
    assert chosen.shares[0].weights_bytes >= table
    assert chosen.shares[1].weights_bytes < GEMMA.tensor_bytes - table + GIB


def test_a_table_that_is_read_from_the_file_needs_no_ram():
    big = shape_info("gemma-3n-e4b", "f16")
    need = plan(machine(64), big)
    assert need.placement.spared_bytes > 4 * GIB
    assert need.shares[0].weights_bytes < big.tensor_bytes - 3 * GIB
    assert any("read from the file" in reason for reason in need.reasons)


def test_an_output_that_is_the_embedding_is_counted_once_where_the_file_is_mapped():
    need = estimate(GEMMA, Setup(32768))
    assert need.aliased_bytes
    roomy, close = plan(machine(64), GEMMA), plan(machine(4.5), GEMMA)
    assert (roomy.use_mmap, close.use_mmap) == (True, False)
    assert roomy.shares[0].weights_bytes == need.weights_bytes - need.aliased_bytes
    assert close.shares[0].weights_bytes == need.weights_bytes
    # A copy for the GPU is a copy.
    on_gpu = plan(machine(64, 12), GEMMA)
    assert sum(share.weights_bytes for share in on_gpu.shares) == need.weights_bytes


def test_blocks_that_are_not_loaded_count_as_places():
    info = INFOS["mtp"]
    chosen = plan(machine(16, 4), info)
    assert chosen.verdict == "partly_on_cpu"
    owners = owners_by_llama_cpp(chosen, 33, ["GPU0"])
    assert owners[:32] == list(chosen.placement.layer_devices)
    assert any(f"{chosen.n_gpu_layers} of 34 layers" in reason for reason in chosen.reasons)


@settings(deadline=None)
@given(
    NAMES,
    st.lists(
        st.builds(
            Device,
            st.sampled_from(["A", "B", "C"]),
            st.just(""),
            st.sampled_from(["cpu", "gpu", "igpu", "accel"]),
            st.integers(-1, 1 << 40),
            st.integers(0, 1 << 40),
            st.booleans(),
        ),
        max_size=4,
        unique_by=lambda device: device.name,
    ),
    st.builds(Memory, st.integers(0, 1 << 40), st.integers(-1, 1 << 40)),
)
def test_there_is_a_plan_for_any_machine(name, devices, memory):
    plan(Machine(CPU, memory, tuple(devices)), INFOS[name])

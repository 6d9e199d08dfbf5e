"""How many streams a model is loaded for, and the context they share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.fit.parallel import LEAST_STREAM_N_CTX, choose_parallel, list_caches, request_limit
from llmrun.fit.plan import Plan, Wishes, plan
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Machine
from tests.fakes.model_shapes import shape_info
from tests.unit.test_fit_formula import LLAMA, make_info
from tests.unit.test_fit_plan import BIG, GIB, dense_8b, machine

CHEAP = dense_8b(attention__head_count_kv=1)
SHORT = dense_8b(context_length=4096)


def choose(
    where: Machine, info: ModelInfo, wishes: Wishes | None = None, n: int | None = None
) -> tuple[Plan, Plan]:
    """(the plan for one stream, the chosen one)"""
    wishes = wishes or Wishes()
    alone = plan(where, info, wishes)
    made = choose_parallel(info, wishes, alone, lambda w: plan(where, info, w), n_streams=n)
    return alone, made


def test_a_cpu_with_room_gets_four_streams():
    alone, made = choose(machine(64), BIG)
    assert (alone.n_seq, alone.n_ctx) == (1, 8192)
    assert (made.n_seq, made.n_ctx) == (4, 4 * 4096)
    assert made.verdict == "fits"
    assert made.reasons[0] == "context 16384: 4096 for each of 4 requests at once"
    assert made.reasons[1:] == alone.reasons[1:]


def test_a_gpu_that_holds_all_gets_eight():
    _, made = choose(machine(32, 24), BIG)
    assert (made.n_seq, made.n_ctx) == (8, 8 * 4096)
    assert made.placement.is_whole


def test_a_small_cache_gets_the_usual_context_for_each():
    _, made = choose(machine(64), CHEAP)
    assert (made.n_seq, made.n_ctx) == (4, 4 * 8192)


def test_memory_bounds_the_streams_and_not_the_place_nor_the_cache():
    alone, made = choose(machine(32, 8), BIG)
    assert alone.placement.is_whole
    assert (made.n_seq, made.n_ctx) == (5, 5 * 4096)
    assert made.placement.is_whole
    assert made.type_k == alone.type_k == "f16"


def test_streams_never_have_less_than_is_useful():
    alone, made = choose(machine(6), BIG)
    assert alone.n_ctx == 8192
    assert (made.n_seq, made.n_ctx) == (2, 8192)


def test_a_tight_fit_has_one_stream():
    alone, made = choose(machine(5), BIG)
    assert alone.verdict == "tight"
    assert made is alone


def test_a_model_that_does_not_fit_has_one_stream():
    alone, made = choose(machine(2), BIG)
    assert made is alone
    assert made.verdict == "no"


def test_a_short_model_has_its_own_limit_for_each_stream():
    short = dense_8b(context_length=1024)
    _, made = choose(machine(64), short)
    assert (made.n_seq, made.n_ctx) == (4, 4096)
    assert request_limit(short, Wishes(), made) == 1024


def test_the_context_that_was_asked_for_is_each_streams():
    wishes = Wishes(n_ctx=10_000)
    alone, made = choose(machine(64), BIG, wishes)
    assert alone.n_ctx == 10_000
    assert (made.n_seq, made.n_ctx) == (4, 40_000)
    assert request_limit(BIG, wishes, made) == 10_000


def test_streams_asked_for_are_given_and_share_what_fits():
    _, made = choose(machine(64), BIG, Wishes(n_ctx=16384), n=8)
    assert (made.n_seq, made.n_ctx) == (8, 8 * 16384)
    _, made = choose(machine(10), BIG, Wishes(n_ctx=16384), n=8)
    assert (made.n_seq, made.n_ctx) == (8, 2 * 16384)
    assert made.verdict == "fits"


def test_many_streams_get_less_context_each_rather_than_a_giant_cache():
    _, made = choose(machine(512), BIG, n=32)
    assert made.n_seq == 32
    assert made.n_ctx == 32 * LEAST_STREAM_N_CTX // 4
    _, made = choose(machine(512), BIG, n=200)
    assert (made.n_seq, made.n_ctx) == (200, 8192)


def test_streams_asked_for_where_they_do_not_fit_are_still_planned_for():
    _, made = choose(machine(2), BIG, n=8)
    assert (made.n_seq, made.verdict) == (8, "no")


def test_one_stream_asked_for_is_the_plan_itself():
    alone, made = choose(machine(64), BIG, n=1)
    assert made is alone


def test_a_request_may_have_all_of_the_cache_up_to_what_the_model_knows():
    _, made = choose(machine(64), BIG)
    assert request_limit(BIG, Wishes(), made) == made.n_ctx == 16384
    assert request_limit(dense_8b(context_length=8192), Wishes(), made) == 8192


# ---- one cache for all, or one for each


def test_each_stream_has_a_cache_of_its_own_where_no_request_loses_by_it():
    _, made = choose(machine(64), SHORT)
    assert (made.n_seq, made.n_ctx, made.kv_unified) == (4, 4 * 4096, False)
    assert request_limit(SHORT, Wishes(), made) == made.setup.n_ctx_seq == 4096
    assert made.reasons[0] == (
        "context 16384: 4096 for each of 4 requests at once, in a cache of its own"
    )


def test_the_context_that_was_asked_for_is_in_a_cache_of_its_own():
    wishes = Wishes(n_ctx=10_000)
    _, made = choose(machine(64), BIG, wishes)
    assert (made.n_seq, made.n_ctx, made.kv_unified) == (4, 40_000, False)
    # llama.cpp pads each to 256.
    assert made.setup.n_ctx_seq == 10_240
    assert request_limit(BIG, wishes, made) == 10_000


def test_where_a_request_may_have_more_than_its_part_all_share_one_cache():
    _, made = choose(machine(64), BIG)
    assert (made.n_seq, made.kv_unified) == (4, True)
    _, made = choose(machine(64), dense_8b(context_length=8192))
    assert (made.n_seq, made.kv_unified) == (4, True)
    # Eight of 16384 were asked for, and there is room for two.
    _, made = choose(machine(10), BIG, Wishes(n_ctx=16384), n=8)
    assert (made.n_seq, made.n_ctx, made.kv_unified) == (8, 2 * 16384, True)


def test_a_model_that_does_not_say_its_limit_may_have_all_of_the_cache():
    info = dense_8b(context_length=0)
    _, made = choose(machine(64), info)
    assert made.n_seq == 4 and made.kv_unified
    assert request_limit(info, Wishes(), made) == made.n_ctx


def test_one_stream_has_one_cache_whatever_is_asked():
    for asked in (None, True, False):
        alone, made = choose(machine(64), SHORT, Wishes(kv_unified=asked), n=1)
        assert made is alone and made.kv_unified and made.setup.kv_unified
        assert request_limit(SHORT, Wishes(), made) == 4096


@pytest.mark.parametrize("name", ["qwen3.5-0.8b", "lfm2-1.2b", "mamba-2.8b", "jamba-3b"])
def test_recurrent_states_are_in_one_cache(name):
    info = shape_info(name)
    _, made = choose(machine(64), info, Wishes(n_ctx=4096))
    assert made.n_seq > 1 and made.kv_unified


def test_so_is_a_model_of_which_nothing_is_known():
    info = make_info("brand-new", **LLAMA)
    assert list_caches(info, Wishes(n_seq=4, n_ctx=4096), 1024) == (True,)
    assert list_caches(BIG, Wishes(n_seq=4, n_ctx=4096), 1024) == (False, True)


def test_a_draft_models_cache_follows_the_sequences_in_one():
    _, made = choose(machine(64), SHORT, Wishes(speculative="draft"))
    assert made.n_seq == 4 and made.kv_unified
    _, made = choose(machine(64), SHORT, Wishes(speculative="ngram"))
    assert not made.kv_unified


@pytest.mark.parametrize("asked", [None, False])
def test_caches_of_their_own_that_do_not_fit_as_well_are_not_chosen(asked):
    def make(wishes: Wishes) -> Plan:
        made = plan(machine(64), SHORT, wishes)
        return made if made.kv_unified else replace(made, verdict="tight")

    wishes = Wishes(kv_unified=asked)
    alone = plan(machine(64), SHORT, wishes)
    made = choose_parallel(SHORT, wishes, alone, make)
    # What was asked for is not given up; then it is streams that are not to be had.
    assert (made.n_seq, made.kv_unified) == ((4, True) if asked is None else (1, True))
    assert choose_parallel(SHORT, wishes, alone, make, n_streams=3).kv_unified is (asked is None)


def test_caches_of_their_own_that_were_asked_for_bound_a_request():
    wishes = Wishes(kv_unified=False)
    _, made = choose(machine(64), BIG, wishes)
    assert (made.n_seq, made.n_ctx, made.kv_unified) == (4, 4 * 4096, False)
    assert request_limit(BIG, wishes, made) == 4096
    wishes = Wishes(n_ctx=16384, kv_unified=False)
    _, made = choose(machine(10), BIG, wishes, n=7)
    assert (made.n_seq, made.n_ctx, made.kv_unified) == (7, 2 * 16384, False)
    # 32768 / 7 = 4681.1, in steps of 256.
    assert request_limit(BIG, wishes, made) == 4864


def test_one_cache_that_was_asked_for_is_given():
    wishes = Wishes(kv_unified=True)
    _, made = choose(machine(64), SHORT, wishes)
    assert made.n_seq == 4 and made.kv_unified
    assert made.reasons[0] == "context 16384: 4096 for each of 4 requests at once"


def test_windows_of_their_own_cost_memory_that_is_counted():
    info = shape_info("gemma-3-4b")
    wishes = Wishes(n_ctx=16384, n_seq=4)
    shared = plan(machine(64), info, replace(wishes, kv_unified=True))
    apart = plan(machine(64), info, replace(wishes, kv_unified=False))
    assert shared == plan(machine(64), info, wishes)
    assert apart.estimate.kv_bytes > shared.estimate.kv_bytes
    assert (apart.setup.kv_unified, shared.setup.kv_unified) == (False, True)


def test_each_stream_costs_its_rows_of_logits_and_windows():
    """The plan counts the sequences: with the same context more of them need more memory."""
    one = plan(machine(64), BIG, Wishes(n_ctx=8192))
    eight = plan(machine(64), BIG, Wishes(n_ctx=8192, n_seq=8))
    assert eight.placement.total_bytes > one.placement.total_bytes
    assert eight.setup.n_seq_max == 8


@settings(max_examples=60, deadline=None)
@given(
    ram=st.integers(1, 64),
    gpu=st.integers(0, 32),
    n_ctx=st.none() | st.integers(256, 40_000),
    n=st.none() | st.integers(1, 64),
    heads=st.sampled_from([1, 2, 8]),
    trained=st.sampled_from([2048, 8192, 131072]),
)
def test_whatever_is_chosen_runs_where_one_stream_runs(ram, gpu, n_ctx, n, heads, trained):
    where = machine(ram, *([gpu] if gpu else []))
    wishes = Wishes(n_ctx=n_ctx)
    info = dense_8b(attention__head_count_kv=heads, context_length=trained)
    alone, made = choose(where, info, wishes, n)
    assert 1 <= made.n_seq <= (n or 8)
    if n is not None:
        assert made.n_seq == n
    if n is None:
        assert made.verdict == alone.verdict
        assert made.n_ctx >= alone.n_ctx
    if not made.kv_unified:
        assert request_limit(info, wishes, made) == (n_ctx or info.n_ctx_train)
    if made.n_seq > 1 and made.verdict == "fits" and alone.verdict == "fits":
        assert made.placement.total_bytes <= (ram + gpu) * GIB
    again = plan(where, info, replace(wishes, n_seq=1))
    assert again == alone


@pytest.mark.parametrize("verdict", ["tight", "no"])
def test_no_plan_is_asked_for_where_not_even_one_stream_fits_well(verdict):
    alone = replace(plan(machine(64), BIG), verdict=verdict)

    def fail(_wishes: Wishes) -> Plan:
        raise AssertionError("asked")

    assert choose_parallel(BIG, Wishes(), alone, fail) is alone

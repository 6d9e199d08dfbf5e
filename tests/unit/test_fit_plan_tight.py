"""The planner where memory is short: what is tight, what is refused, and what would run instead."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings

from llmrun.errors import WillNotFitError
from llmrun.fit.plan import Plan, Wishes, plan, require_fit
from tests.fakes.model_shapes import shape_info
from tests.unit.test_fit_plan import BIG, GIB, INFOS, NAMES, WISHES, machine, machines

SLIDING = shape_info("gemma-4-26b-a4b", "q2_k")
"""A small KV cache, a tied output of 0.6 GB, and weights that a CPU reorders."""
UNPACKED = shape_info("gemma-4-e4b", "bf16")
"""The same in a type that no CPU reorders."""


def test_a_context_that_saves_little_is_not_given_up():
    seen = []
    for hundredth in range(1300, 800, -1):
        chosen = plan(machine(hundredth / 100), SLIDING)
        step = (chosen.n_ctx, chosen.verdict)
        if not seen or seen[-1] != step:
            seen.append(step)
    assert seen == [
        (32768, "fits"),
        (16384, "fits"),
        (8192, "fits"),
        (8192, "tight"),
        (4096, "tight"),
        (2048, "tight"),
        (2048, "no"),
    ]


def test_the_reason_of_a_tight_context_is_true():
    usual = next(made for made in shrinking(SLIDING) if made.verdict == "tight")
    assert usual.reasons[0].startswith("context 8192: memory is short, but less context would save")
    shortest = next(made for made in shrinking(BIG) if made.verdict == "tight")
    assert shortest.reasons[0].startswith("context 2048: the shortest that is chosen unasked")


def shrinking(info) -> list[Plan]:
    return [plan(machine(hundredth / 100), info) for hundredth in range(1300, 300, -5)]


def test_weights_stay_in_the_file_where_that_makes_room():
    paged = next(made for made in shrinking(SLIDING) if made.verdict == "tight")
    assert (paged.use_mmap, paged.use_repack) == (True, False)
    assert any("prompts are read slower" in reason for reason in paged.reasons)
    (share,) = paged.shares
    assert share.weights_bytes == paged.estimate.weights_bytes
    assert share.weights_bytes < SLIDING.tensor_bytes * 1.001  # the output is no second copy


def test_a_mapped_file_fits_where_only_a_copy_of_its_output_would_not():
    need = plan(machine(64), UNPACKED, Wishes(n_ctx=8192)).placement.total_bytes / GIB
    chosen = plan(machine(need + 1.1), UNPACKED, Wishes(n_ctx=8192, type_k="f16", type_v="f16"))
    assert (chosen.verdict, chosen.use_mmap, chosen.use_repack) == ("fits", True, True)


def test_a_context_that_runs_without_a_margin_is_named_too():
    target = machine(11)
    chosen = plan(target, SLIDING, Wishes(n_ctx=262144))
    assert chosen.verdict == "no"
    assert chosen.n_ctx_that_fits is not None
    shorter = plan(target, SLIDING, Wishes(n_ctx=chosen.n_ctx_that_fits))
    assert shorter.verdict == "tight"
    longer = plan(target, SLIDING, Wishes(n_ctx=chosen.n_ctx_that_fits + 1024))
    assert longer.verdict == "no"


def test_a_refusal_never_names_one_figure_twice():
    need = plan(machine(64), BIG, Wishes(n_ctx=8192)).placement.total_bytes / GIB
    fixed = Wishes(n_ctx=8192, type_k="f16", type_v="f16")
    with pytest.raises(WillNotFitError) as caught:
        require_fit(plan(machine(need - 0.0002), BIG, fixed))
    needed, free = re.findall(r"[\d.]+ [kMG]?B", caught.value.message)
    assert needed != free
    assert f"{free} less are free" in caught.value.message


@settings(deadline=None, max_examples=200)
@given(NAMES, WISHES, machines())
def test_what_runs_is_within_what_is_free_and_what_does_not_is_over(name, wishes, target):
    chosen = plan(target, INFOS[name], wishes)
    over = [share for share in chosen.shares if share.used_bytes > share.free_bytes]
    if chosen.runs:
        assert not over
        return
    limits = {device.name: device.free_bytes for device in target.devices}
    beyond = [
        share
        for share in chosen.shares
        if share.device in limits and share.used_bytes > limits[share.device]
    ]
    assert over or beyond


@pytest.mark.parametrize("info", [SLIDING, UNPACKED, BIG], ids=["sliding", "unpacked", "big"])
def test_more_context_never_takes_less(info):
    for ram in (9, 10, 11, 12, 13):
        wishes = Wishes(type_k="q8_0", type_v="q8_0")
        made = [
            plan(machine(ram), info, replace(wishes, n_ctx=n)) for n in (4096, 8192, 16384, 32768)
        ]
        needs = [each.placement.total_bytes for each in made if each.verdict in ("tight", "no")]
        assert needs == sorted(needs)

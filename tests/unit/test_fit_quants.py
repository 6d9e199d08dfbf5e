"""Which quant is taken where none was named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.fit.plan import Wishes, plan
from llmrun.fit.quants import QuantOption, QuantPick, choose_quant, derive_info
from tests.fakes.model_shapes import shape_info
from tests.unit.test_fit_plan import machine, machines, richer

LIKE = shape_info("llama-3.1-8b")
SIZES = {
    "F16": 3.27,
    "Q8_0": 1.74,
    "Q6_K": 1.34,
    "Q5_K_M": 1.16,
    "Q4_K_M": 1.0,
    "Q3_K_M": 0.82,
    "IQ3_XXS": 0.66,
    "Q2_K": 0.65,
    "IQ1_S": 0.41,
}
OPTIONS = [QuantOption(label, int(LIKE.n_bytes * size)) for label, size in SIZES.items()]


def choose(target, wishes=None, options=OPTIONS, preferred="Q4_K_M"):
    return choose_quant(target, options, wishes, preferred=preferred, like=LIKE)


@pytest.mark.parametrize(
    ("target", "label", "verdict"),
    [
        (machine(64), "Q4_K_M", "fits"),
        (machine(64, 24), "Q4_K_M", "fits"),
        (machine(64, 6), "Q4_K_M", "fits"),
        # At least half of the layers on the GPU will do; with less a smaller one is taken.
        (machine(64, 5), "Q4_K_M", "partly_on_cpu"),
        (machine(64, 3.4), "Q3_K_M", "partly_on_cpu"),
        (machine(64, 3), "IQ3_XXS", "partly_on_cpu"),
        # Where no quant of 3 bits does well, the preferred one is as good as any.
        (machine(64, 2), "Q4_K_M", "partly_on_cpu"),
        (machine(64, 1.2), "Q4_K_M", "cpu_only"),
        (machine(5.6), "Q3_K_M", "fits"),
        (machine(4.6), "IQ3_XXS", "fits"),
        # Under 3 bits only when nothing else runs.
        (machine(3.2), "IQ1_S", "fits"),
        (machine(1.0), "Q4_K_M", "no"),
    ],
)
def test_the_quant_for_a_machine(target, label, verdict):
    pick = choose(target)
    assert (pick.option.label, pick.plan.verdict) == (label, verdict)
    assert pick.runs is (verdict != "no")
    assert pick.plan == {option.label: made for option, made in pick.plans}[label]


def test_a_smaller_quant_comes_before_a_short_context():
    pick = choose(machine(6.2))
    assert (pick.option.label, pick.plan.n_ctx) == ("Q4_K_M", 8192)
    short = choose(machine(5.7))
    assert plan(machine(5.7), LIKE).n_ctx < 8192
    assert (short.option.label, short.plan.n_ctx) == ("Q3_K_M", 8192)
    # Where there is no smaller one the short context has to do.
    alone = choose(machine(5.7), options=OPTIONS[:5])
    assert (alone.option.label, alone.plan.runs) == ("Q4_K_M", True)
    assert alone.plan.n_ctx < 8192


def test_a_larger_quant_is_named_but_never_taken():
    pick = choose(machine(64, 24))
    assert pick.option.label == "Q4_K_M"
    assert pick.reasons == ("F16 would fit as well",)
    assert choose(machine(64, 13)).reasons == ("Q8_0 would fit as well",)
    assert choose(machine(64, 6.2)).reasons == ()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (machine(64, 3.4), "Q3_K_M instead of Q4_K_M, which leaves 19 of 33 layers on the CPU"),
        (machine(4.6), "IQ3_XXS instead of Q4_K_M, which does not run here"),
        (machine(5.7), "Q3_K_M instead of Q4_K_M, which leaves room for a context of 4096 only"),
    ],
)
def test_why_the_preferred_quant_is_not_taken(target, words):
    assert choose(target).reasons[0] == words


def test_what_was_asked_for_counts():
    pick = choose(machine(64, 8), Wishes(n_ctx=65536, type_k="f16", type_v="f16"))
    assert pick.plan.n_ctx == 65536
    short = choose(machine(5.6), Wishes(n_ctx=2048))
    assert (short.option.label, short.plan.n_ctx) == ("Q4_K_M", 2048)


def test_a_header_that_was_read_counts_more_than_a_scaled_one():
    other = shape_info("llama-3.1-8b", "q8_0")
    options = [QuantOption("Q4_K_M", LIKE.n_bytes, other), *OPTIONS[5:]]
    assert choose(machine(6.4), options=options).option.label == "Q3_K_M"
    assert choose(machine(6.4)).option.label == "Q4_K_M"


def test_a_preferred_quant_that_is_not_there_is_the_first():
    assert choose(machine(64), preferred="Q9").option.label == "F16"
    with pytest.raises(ValueError, match="no quants"):
        choose(machine(64), options=[])


def test_labels_that_are_file_names_and_those_that_tell_nothing():
    options = [
        QuantOption("model-q4_k_m.gguf", LIKE.n_bytes),
        QuantOption("UD-IQ2_XXS", int(LIKE.n_bytes * 0.5)),
        QuantOption("tiny.gguf", int(LIKE.n_bytes * 0.45)),
        QuantOption("MXFP4", int(LIKE.n_bytes * 0.4)),
    ]
    # Four bits by its name, though it is the smallest.
    pick = choose(machine(3.2), options=options, preferred="model-q4_k_m.gguf")
    assert pick.option.label == "MXFP4"


def test_a_derived_header_is_the_model_in_another_size():
    derived = derive_info(LIKE, LIKE.n_bytes * 2, "Q8_0")
    assert (derived.n_bytes, derived.quant) == (LIKE.n_bytes * 2, "Q8_0")
    assert derived.tensor_bytes == pytest.approx(2 * LIKE.tensor_bytes, rel=0.001)
    real = shape_info("llama-3.1-8b", "q8_0")
    derived = derive_info(LIKE, real.n_bytes, "Q8_0")
    ours, theirs = (plan(machine(64, 24), info).estimate for info in (derived, real))
    assert (ours.kv_bytes, ours.compute_bytes) == (theirs.kv_bytes, theirs.compute_bytes)
    assert ours.weights_bytes == pytest.approx(theirs.weights_bytes, rel=0.001)
    assert derive_info(LIKE, 0, "?").tensor_bytes == 0


def test_a_quant_is_planned_once_with_its_own_allocator():
    class Silent:
        devices: tuple[str, ...] = ()
        problem = "not here"

        def __init__(self) -> None:
            self.n_calls = 0

        def measure(self, setups):
            self.n_calls += 1
            return (None,) * len(setups)

    allocator = Silent()
    options = [QuantOption("Q4_K_M", LIKE.n_bytes, LIKE, allocator), *OPTIONS[5:]]
    pick = choose(machine(5.0), options=options)
    assert pick.option.label != "Q4_K_M"
    assert allocator.n_calls == 1


def merit(pick: QuantPick) -> tuple[bool, bool, int, int]:
    """It runs, with 3 bits or more, as well as can be, in the largest quant."""
    made = pick.plan
    if not made.runs:
        return (False, True, 0, 0)
    if made.verdict == "tight" or made.n_ctx < 8192:
        grade = 0
    else:
        half = 2 * made.placement.n_on_gpu >= 33
        grade = 2 if made.verdict == "fits" or half else 1
    return (True, pick.option.label not in ("Q2_K", "IQ1_S"), grade, pick.option.n_bytes)


@settings(deadline=None, max_examples=60)
@given(machines(), st.floats(0, 20), st.lists(st.floats(0, 20), min_size=3, max_size=3))
def test_more_memory_never_gives_a_worse_quant(less, ram, extras):
    poor, rich = choose(less), choose(richer(less, ram, extras))
    assert merit(rich) >= merit(poor)
    assert rich.option.n_bytes <= LIKE.n_bytes


def test_the_budget_is_kept():
    for tenth in range(10, 120, 3):
        pick = choose(machine(tenth / 10, tenth / 20))
        if pick.plan.verdict in ("fits", "partly_on_cpu", "cpu_only"):
            assert sum(share.used_bytes for share in pick.plan.shares) <= pick.plan.budget_bytes

"""The fit table: its rows, the one recommended, and how seldom the allocator is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from llmrun.errors import UsageError
from llmrun.fit.formula import estimate
from llmrun.fit.plan import Wishes
from llmrun.fit.quants import QuantOption
from llmrun.fit.table import ask_at_once, build_rows, list_contexts
from llmrun.fit.types import BufferUse, Measurement, Setup
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.known import load_machine, machine_names
from tests.fakes.model_shapes import shape_info

E4B = {quant: shape_info("gemma-4-e4b", quant) for quant in ("q2_k", "q4_k_m", "q8_0")}


class FormulaAllocator:
    """Answers as the closed form does, and counts how often it had to work."""

    devices: tuple[str, ...] = ()
    problem: str | None = None

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self.n_calls = 0
        self._known: dict[Setup, Measurement] = {}

    def measure(self, setups: Sequence[Setup]) -> tuple[Measurement | None, ...]:
        if any(setup not in self._known for setup in setups):
            self.n_calls += 1
        for setup in setups:
            need = estimate(self._info, setup)
            use = BufferUse("CPU", "CPU", need.weights_bytes, need.kv_bytes, need.compute_bytes)
            self._known[setup] = Measurement(setup, (use,))
        return tuple(self._known[setup] for setup in setups)


def options(*, exact: str = "q4_k_m", derived: Sequence[str] = ()) -> list[QuantOption]:
    made = []
    for quant, info in E4B.items():
        allocator = FormulaAllocator(info) if quant == exact else None
        own = None if quant in derived else info
        made.append(QuantOption(quant, info.n_bytes, own, allocator))
    return made


def test_contexts_end_at_the_models_limit() -> None:
    info = E4B["q4_k_m"]
    assert list_contexts(info) == (4096, 8192, 32768, 131072)
    assert list_contexts(replace(info, n_ctx_train=262144))[-2:] == (131072, 262144)
    assert list_contexts(replace(info, n_ctx_train=40960)) == (4096, 8192, 32768, 40960)
    assert list_contexts(replace(info, n_ctx_train=2048)) == (2048,)
    assert list_contexts(replace(info, n_ctx_train=None)) == (4096, 8192)
    assert list_contexts(info, 5000) == (5000,)


@pytest.mark.parametrize("name", machine_names())
def test_exactly_one_row_is_recommended_unless_none_runs(name: str) -> None:
    machine = load_machine(name)
    for n_ctx in (None, 4096, 131072):
        table = build_rows(
            machine, options(), Wishes(n_ctx=n_ctx), preferred="q4_k_m", like=E4B["q4_k_m"]
        )
        marked = [row for row in table.rows if row.is_recommended]
        assert len(marked) == (1 if table.pick.plan.runs else 0)
        if marked:
            assert table.recommended is marked[0]
            assert marked[0].plan == table.pick.plan
            assert marked[0].option.label == table.pick.option.label
        else:
            assert table.recommended is None
        keys = [(row.option.label, row.plan.n_ctx) for row in table.rows]
        assert len(set(keys)) == len(keys)
        if n_ctx is not None:
            assert {row.plan.n_ctx for row in table.rows} == {n_ctx}


def test_every_quant_has_every_context_in_order() -> None:
    machine = load_machine("rtx-4090-24gb")
    like = E4B["q4_k_m"]
    table = build_rows(machine, options(), Wishes(), preferred="q4_k_m", like=like)
    for quant in E4B:
        own = [row.plan.n_ctx for row in table.rows if row.option.label == quant]
        assert own == sorted(own) and set(list_contexts(like)) <= set(own)


def test_a_longer_context_never_takes_less() -> None:
    machine = load_machine("h100-80gb")
    like = E4B["q4_k_m"]
    table = build_rows(machine, options(), Wishes(), preferred="q4_k_m", like=like)
    for quant in E4B:
        plans = [row.plan for row in table.rows if row.option.label == quant]
        totals = [plan.placement.total_bytes for plan in plans]
        assert totals == sorted(totals)


def test_sources_tell_what_is_known() -> None:
    machine = load_machine("rtx-3060-12gb")
    like = E4B["q4_k_m"]
    table = build_rows(machine, options(derived=["q8_0"]), Wishes(), preferred="q4_k_m", like=like)
    for row in table.rows:
        assert row.plan.source == ("exact" if row.option.label == "q4_k_m" else "formula")
        assert row.is_derived == (row.option.label == "q8_0")
    by_header = {
        (r.option.label, r.plan.n_ctx): r.plan.placement.total_bytes
        for r in build_rows(machine, options(), Wishes(), preferred="q4_k_m", like=like).rows
    }
    for row in table.rows:
        if row.is_derived:
            real = by_header[row.option.label, row.plan.n_ctx]
            assert abs(row.plan.placement.total_bytes - real) < real * 0.1


def test_the_allocator_is_asked_once_for_all_rows() -> None:
    for name in ("cpu-16gb", "rtx-3060-12gb", "m2-8gb"):
        machine, like = load_machine(name), E4B["q4_k_m"]
        some = options()
        asked = next(option for option in some if option.allocator is not None)
        assert isinstance(asked.allocator, FormulaAllocator)
        for option in some:
            ask_at_once(machine, option, Wishes())
        assert asked.allocator.n_calls == 1
        build_rows(machine, some, Wishes(), preferred="q4_k_m", like=like)
        assert asked.allocator.n_calls == 1, name


def test_what_the_user_fixed_is_in_every_row() -> None:
    wishes = Wishes(type_k="q8_0", type_v="q8_0", n_gpu_layers=3)
    like = E4B["q4_k_m"]
    table = build_rows(
        load_machine("rtx-4090-24gb"), options(), wishes, preferred="q4_k_m", like=like
    )
    for row in table.rows:
        assert (row.plan.type_k, row.plan.n_gpu_layers) == ("q8_0", 3)


def test_a_projector_alone_is_refused() -> None:
    like = replace(E4B["q4_k_m"], kind="projector")
    with pytest.raises(UsageError):
        build_rows(
            load_machine("cpu-16gb"),
            [QuantOption("x", like.n_bytes, like)],
            Wishes(),
            preferred="x",
            like=like,
        )

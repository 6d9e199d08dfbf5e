"""What each setting buys, on the fake backend. No time is looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmrun.bench.ablation import AblationRun, OtherQuant, Sizes, list_switches
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions
from llmrun.errors import EngineError
from tests.fakes.fake_backend import FakeBackend, endless_token
from tests.unit.test_bench_runner import Patient, Watch

SIZES = Sizes(
    n_prompt=24,
    n_answer=4,
    n_edit=4,
    n_parallel=3,
    n_parallel_prompt=4,
    n_parallel_tokens=3,
    n_repeats=2,
)
OPTIONS = EngineOptions(n_ctx=96, n_threads=2, n_threads_batch=2)
STREAMS = EngineOptions(n_ctx=96, n_seq_max=3)


class Bed:
    def __init__(self) -> None:
        self.opened: list[EngineOptions] = []
        self.backends: list[FakeBackend] = []
        self.refuse: str | None = None

    def open(self, options: EngineOptions) -> Engine:
        if options.flash_attn == self.refuse:
            raise EngineError("this device has no FlashAttention")
        self.opened.append(options)
        backend = FakeBackend(
            n_ctx=options.n_ctx if options.kv_unified else options.n_ctx // options.n_seq_max,
            n_seq_max=options.n_seq_max,
            kv_unified=options.kv_unified,
            next_token=endless_token,
            n_batch=64,
        )
        self.backends.append(backend)
        return Patient(backend, checks=True)

    def run(self, watch: Watch | None = None, **changes) -> AblationRun:
        values = {"stream_options": STREAMS, **changes}
        switches = list_switches(self.open, OPTIONS, SIZES, **values)
        run = AblationRun(switches, 2, watch)
        if watch is not None:
            watch.begin(run.n_units)
        run.run()
        return run


def test_each_setting_off_and_on() -> None:
    bed, watch = Bed(), Watch()
    run = bed.run(watch, others=[OtherQuant("Q8_0", lambda: bed.open(replace(OPTIONS, n_ctx=95)))])
    found = [(ablation.setting, ablation.workload) for ablation in run.ablations]
    assert found == [
        ("prefix cache", "first token behind 8"),
        ("FlashAttention", "reading 24"), ("FlashAttention", "answering"),
        ("KV cache in q8_0", "reading 24"), ("KV cache in q8_0", "answering"),
        ("speculation", "copying a text"), ("speculation", "writing a new one"),
        ("batching", "3 requests"),
        ("2 threads instead of 1", "reading 24"), ("2 threads instead of 1", "answering"),
        ("steady threads", "reading 24"), ("steady threads", "answering"),
        ("quant Q8_0 instead", "reading 24"), ("quant Q8_0 instead", "answering"),
    ]  # fmt: skip
    for ablation in run.ablations:
        assert len(ablation.off.values) == len(ablation.on.values) == 2 and ablation.gain > 0
        assert ablation.off.higher_is_better == (ablation.off.unit == "tok/s")
    assert run.notes == [] and watch.n_done == watch.n_units
    assert all(backend.n_closed == 1 and not backend.violations for backend in bed.backends)


def test_the_sides_differ_in_one_setting_and_the_turns_alternate() -> None:
    bed = Bed()
    bed.run()

    def changes_of(name: str) -> list[object]:
        return [getattr(options, name) for options in bed.opened]

    assert [v for v in changes_of("flash_attn") if v != "auto"] == ["off", "on", "on", "off"]
    assert changes_of("type_k").count("q8_0") == 2
    assert changes_of("speculative").count("auto") == 2
    counts = [options for options in bed.opened if not options.steady_threads]
    assert sorted(options.n_threads for options in counts) == [1, 1, 2, 2, 2, 2]
    assert changes_of("n_seq_max").count(3) == 2


def test_a_draft_model_is_measured_where_one_is_wanted() -> None:
    bed = Bed()
    wanted = replace(OPTIONS, speculative="draft", draft_model=(Path("draft.gguf"),))
    switches = list_switches(bed.open, wanted, SIZES)
    switches = [switch for switch in switches if switch.setting == "a draft model"]
    AblationRun(switches, 2).run()
    assert [options.speculative for options in bed.opened] == ["off", "draft", "draft", "off"]
    assert {options.draft_model for options in bed.opened} == {wanted.draft_model}


def test_the_prefix_cache_is_what_its_row_measures() -> None:
    bed = Bed()
    bed.run()
    # The first engine: warm-up; all 24 tokens without; 8, then 16 behind them with.
    chunks = [(c.pos, len(c.tokens)) for batch in bed.backends[0].batches for c in batch]
    long = [chunk for chunk in chunks if chunk[1] > 2]
    assert long[0] == (0, 8) and long[-1] == (8, 16)
    assert [n for pos, n in long if pos <= 1 and n > 20] in ([24], [23])


def test_batching_is_what_its_row_measures() -> None:
    bed = Bed()
    bed.run()
    backend = next(backend for backend in bed.backends if backend.n_seq_max == 3)
    widths = [len(batch) for batch in backend.batches]
    # Warm-up and one request after the other, against all of them.
    assert widths.count(1) >= 3 * 3 and max(widths) == 3


def test_caches_of_their_own_are_compared_with_one_for_all() -> None:
    bed = Bed()
    run = bed.run(stream_options=replace(STREAMS, kv_unified=False))
    found = {ablation.setting: ablation for ablation in run.ablations}
    own = found["a KV cache for each stream"]
    assert own.workload == found["batching"].workload == "3 requests"
    assert len(own.off.values) == len(own.on.values) == 2
    opened = [options for options in bed.opened if options.n_seq_max == 3]
    # Batching twice; then the two sides in turns.
    assert [options.kv_unified for options in opened[2:]] == [True, False, False, True]
    widths = [max(map(len, backend.batches)) for backend in bed.backends if backend.n_seq_max == 3]
    assert widths == 6 * [3]
    assert run.notes == [] and not any(backend.violations for backend in bed.backends)


def test_what_cannot_be_measured_is_noted_and_the_rest_goes_on() -> None:
    bed, watch = Bed(), Watch()
    bed.refuse = "on"
    run = bed.run(watch, small_kv=None, stream_options=None)
    assert run.notes == ["FlashAttention: not measured: this device has no FlashAttention"]
    settings = {ablation.setting for ablation in run.ablations}
    assert "FlashAttention" not in settings and "steady threads" in settings
    assert not settings & {"batching", "KV cache in q8_0"}
    assert watch.n_done == watch.n_units


def test_an_interrupt_keeps_what_has_both_sides() -> None:
    class Stopping(Watch):
        def describe(self, text: str) -> None:
            if text == "KV cache in q8_0, on (1 of 2)":
                raise KeyboardInterrupt

    bed = Bed()
    switches = list_switches(bed.open, OPTIONS, SIZES)
    run = AblationRun(switches, 2, Stopping())
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert {ablation.setting for ablation in run.ablations} == {"prefix cache", "FlashAttention"}
    assert all(backend.n_closed == 1 for backend in bed.backends)


def test_sizes_follow_the_context() -> None:
    sizes = Sizes().within(128)
    assert (sizes.n_prompt, sizes.n_answer, sizes.n_edit) == (64, 32, 32)
    assert Sizes().within(8192) == Sizes()

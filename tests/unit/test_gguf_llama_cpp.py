"""llama.cpp itself as the reference: its own header parser, its type table, and the tiny llama."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrun.engine.binding import import_binding
from llmrun.gguf.ggml_types import REMOVED_TENSOR_TYPES, TENSOR_TYPES
from llmrun.gguf.header import FileSource, read_header
from llmrun.gguf.types import ArrayValue
from tests.fakes import models
from tests.fakes.gguf_builder import CHATML, tiny_llama, tiny_llama_builder, write_shards

SCALARS = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    6: ("f32", ctypes.c_float),
    7: ("bool", ctypes.c_bool),
    8: ("str", ctypes.c_char_p),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
    12: ("f64", ctypes.c_double),
}
ARRAY = 9


class InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@pytest.fixture(scope="module")
def ggml() -> Callable[..., Any]:
    """`ggml(name, result type, *arguments)` calls a function of libggml-base."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    (path, *_) = sorted(folder.glob("*ggml-base*"))
    library = ctypes.CDLL(str(path))

    def call(name: str, result: Any, *arguments: Any) -> Any:
        function = library[name]
        function.restype = result
        return function(*arguments)

    return call


def indices(n: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(i) for i in range(n)]


def test_tensor_types_are_those_of_ggml(ggml: Callable[..., Any]) -> None:
    for type_id, kind in TENSOR_TYPES.items():
        name = ggml("ggml_type_name", ctypes.c_char_p, type_id).decode()
        assert name.lower() == kind.name.lower()
        assert ggml("ggml_blck_size", ctypes.c_int64, type_id) == kind.block_elements
        assert ggml("ggml_type_size", ctypes.c_size_t, type_id) == kind.block_bytes
    for type_id in REMOVED_TENSOR_TYPES:
        assert ggml("ggml_type_size", ctypes.c_size_t, type_id) == 0
    assert len(TENSOR_TYPES) + len(REMOVED_TENSOR_TYPES) == max(TENSOR_TYPES) + 1


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "built"])
def test_agrees_with_llama_cpps_parser(ggml: Callable[..., Any], tmp_path: Path, name: str) -> None:
    if name == "built":
        path = tiny_llama(tmp_path / "m.gguf", chat_template=CHATML)
    else:
        path = {"smollm2": models.smollm2_path, "gemma3": models.gemma3_path}[name]()
    with FileSource(path) as source:
        header = read_header(source)
    raw = ggml("gguf_init_from_file", ctypes.c_void_p, str(path).encode(), InitParams(True, None))
    assert raw
    context = ctypes.c_void_p(raw)
    try:
        assert ggml("gguf_get_data_offset", ctypes.c_size_t, context) == header.data_offset
        n_kv = ggml("gguf_get_n_kv", ctypes.c_int64, context)
        assert n_kv == len(header.metadata)
        for i, (key, value) in zip(indices(n_kv), header.metadata.items(), strict=True):
            assert ggml("gguf_get_key", ctypes.c_char_p, context, i).decode() == key
            kind = ggml("gguf_get_kv_type", ctypes.c_int, context, i)
            if kind == ARRAY:
                assert isinstance(value, ArrayValue)
                assert ggml("gguf_get_arr_n", ctypes.c_size_t, context, i) == value.n_values
                element = ggml("gguf_get_arr_type", ctypes.c_int, context, i)
                assert SCALARS[element][0].replace("str", "string")[0] == value.type_name[0]
                continue
            suffix, result = SCALARS[kind]
            theirs = ggml(f"gguf_get_val_{suffix}", result, context, i)
            assert (theirs.decode() if isinstance(theirs, bytes) else theirs) == value
        n_tensors = ggml("gguf_get_n_tensors", ctypes.c_int64, context)
        assert n_tensors == len(header.tensors)
        for i, tensor in zip(indices(n_tensors), header.tensors, strict=True):
            found = ggml("gguf_get_tensor_name", ctypes.c_char_p, context, i).decode()
            assert found == tensor.name
            assert ggml("gguf_get_tensor_type", ctypes.c_int, context, i) == tensor.type_id
            assert ggml("gguf_get_tensor_offset", ctypes.c_size_t, context, i) == tensor.offset
            assert ggml("gguf_get_tensor_size", ctypes.c_size_t, context, i) == tensor.n_bytes
    finally:
        ggml("gguf_free", None, context)


def load(path: Path) -> tuple[Any, Any]:
    lib = import_binding()
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model
    return lib, model


def tokenize(lib: Any, model: Any, text: str, special: bool) -> list[int]:
    raw = text.encode()
    out = (lib.llama_token * 200)()
    vocab = lib.llama_model_get_vocab(model)
    n = lib.llama_tokenize(vocab, raw, len(raw), out, 200, True, special)
    return list(out[:n])


def piece(lib: Any, model: Any, token: int) -> bytes:
    buffer = ctypes.create_string_buffer(64)
    vocab = lib.llama_model_get_vocab(model)
    n = lib.llama_token_to_piece(vocab, token, buffer, 64, 0, True)
    return buffer.raw[:n]


def greedy(lib: Any, model: Any, tokens: list[int], n: int) -> list[int]:
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    context = lib.llama_init_from_model(model, params)
    sampler = lib.llama_sampler_init_greedy()
    found: list[int] = []
    try:
        while len(found) < n:
            step = tokens if not found else found[-1:]
            batch = (lib.llama_token * len(step))(*step)
            assert lib.llama_decode(context, lib.llama_batch_get_one(batch, len(step))) == 0
            found.append(lib.llama_sampler_sample(sampler, context, -1))
    finally:
        lib.llama_sampler_free(sampler)
        lib.llama_free(context)
    return found


@pytest.mark.parametrize("file_type", [0, 1, 2, 7])
def test_the_tiny_llama_loads_tokenizes_and_decodes(tmp_path: Path, file_type: int) -> None:
    path = tiny_llama(tmp_path / "m.gguf", chat_template=CHATML, file_type=file_type)
    assert path.stat().st_size < 500_000
    lib, model = load(path)
    try:
        text = "Hello, bada bing\n\té \U0001f600 <|im_start|>"
        plain = tokenize(lib, model, text, special=False)
        assert b"".join(piece(lib, model, token) for token in plain[1:]).decode() == text
        assert tokenize(lib, model, text, special=True)[-1] == 3
        answer = greedy(lib, model, plain, 24)
        assert answer == greedy(lib, model, plain, 24)
        assert len(set(answer)) > 4
    finally:
        lib.llama_model_free(model)


def test_the_tiny_llama_is_the_same_every_time(tmp_path: Path) -> None:
    first = tiny_llama(tmp_path / "a.gguf").read_bytes()
    assert tiny_llama(tmp_path / "b.gguf").read_bytes() == first
    assert tiny_llama(tmp_path / "c.gguf", seed=2).read_bytes() != first


def test_the_tiny_llama_in_shards_answers_alike(tmp_path: Path) -> None:
    whole = tiny_llama(tmp_path / "m.gguf")
    (first, *_) = write_shards(tiny_llama_builder(), tmp_path, "m", 3)
    answers = []
    for path in (whole, first):
        lib, model = load(path)
        answers.append(greedy(lib, model, tokenize(lib, model, "bada", special=False), 16))
        lib.llama_model_free(model)
    assert answers[0] == answers[1]

"""The closed form against figures that llama.cpp's own allocator gave for the same shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.fit.formula import allows_kv_type, estimate, needs_one_kv_type
from llmrun.fit.types import Estimate, Setup
from llmrun.gguf.info import build_info, read_info
from llmrun.gguf.types import ArrayValue, Header, ModelInfo, TensorInfo
from tests.fakes.model_shapes import shape_info
from tests.fakes.models import gemma3_path, smollm2_path

MIB = 1 << 20
N_VOCAB = 1000


def tensor(name: str, n_rows: int, n_columns: int, type_name: str = "F16") -> TensorInfo:
    """Two bytes a value, whatever the type: only the sums matter here."""
    n_bytes = 2 * n_rows * n_columns
    return TensorInfo(name, (n_columns, n_rows), 1, type_name, 0, n_bytes)


def make_info(
    architecture: str,
    tensors: tuple[TensorInfo, ...] = (),
    n_vocab: int = N_VOCAB,
    **keys: object,
) -> ModelInfo:
    """A header with `keys` under the architecture's prefix; lists become arrays, "__" a dot."""
    metadata: dict[str, object] = {
        "general.architecture": architecture,
        f"{architecture}.vocab_size": n_vocab,
    }
    for key, value in keys.items():
        if isinstance(value, list):
            is_flag = bool(value) and isinstance(value[0], bool)
            value = ArrayValue("bool" if is_flag else "int32", len(value), tuple(value))
        metadata[f"{architecture}.{key.replace('__', '.')}"] = value
    tensors = tensors or (
        tensor("token_embd.weight", n_vocab, 64),
        tensor("output_norm.weight", 1, 64),
        *(tensor(f"blk.{i}.attn_q.weight", 64, 64) for i in range(int(keys["block_count"]))),
    )
    header = Header(3, metadata, tensors, 0, 0)
    return build_info([header], sum(tensor.n_bytes for tensor in tensors))


GEMMA4 = {
    name: shape_info(f"gemma-4-{name.lower()}") for name in ("E2B", "E4B", "12B", "26B-A4B", "31B")
}


def need(info: ModelInfo, n_ctx: int, **settings) -> Estimate:
    return estimate(info, Setup(n_ctx, **settings))


def kv_mib(info: ModelInfo, **settings) -> float:
    return need(info, **settings).kv_bytes / MIB


@pytest.mark.parametrize(
    ("name", "at_4k", "at_8k", "at_32k", "at_128k", "q8_0_at_32k", "four_at_32k"),
    [
        ("E2B", 36, 60, 204, 780, 108.375, 222),
        ("E4B", 104, 168, 552, 2088, 293.25, 612),
        ("12B", 544, 608, 992, 2528, 527, None),
        ("26B-A4B", 380, 460, 940, 2860, 499.375, 1540),
        ("31B", 1520, 1840, 3760, 11440, 1997.5, 6160),
    ],
)
def test_kv_cache_of_gemma_4(name, at_4k, at_8k, at_32k, at_128k, q8_0_at_32k, four_at_32k):
    info = GEMMA4[name]
    found = [kv_mib(info, n_ctx=n_ctx) for n_ctx in (4096, 8192, 32768, 131072)]
    assert found == [at_4k, at_8k, at_32k, at_128k]
    assert kv_mib(info, n_ctx=32768, type_k="q8_0", type_v="q8_0") == q8_0_at_32k
    if four_at_32k is not None:
        assert kv_mib(info, n_ctx=32768, n_seq_max=4) == four_at_32k


def test_kv_cache_of_gemma_4_12b_without_flash_attention():
    assert kv_mib(GEMMA4["12B"], n_ctx=32768, flash_attn="off") == 1760


@pytest.mark.parametrize(
    ("name", "settings", "mib"),
    [
        ("E2B", {"n_ctx": 4096}, 114.5),
        ("E2B", {"n_ctx": 32768}, 142.5),
        ("E2B", {"n_ctx": 131072}, 238.5),
        ("E2B", {"n_ctx": 32768, "n_ubatch": 2048}, 576),
        ("E2B", {"n_ctx": 32768, "flash_attn": "off"}, 647),
        ("E4B", {"n_ctx": 4096}, 117),
        ("E4B", {"n_ctx": 32768, "n_ubatch": 2048}, 586),
        ("12B", {"n_ctx": 32768}, 162),
        ("12B", {"n_ctx": 32768, "n_ubatch": 2048}, 654),
        ("12B", {"n_ctx": 32768, "flash_attn": "off"}, 1162),
        ("12B", {"n_ctx": 32768, "n_outputs_max": 2048}, 535),
        ("26B-A4B", {"n_ctx": 32768}, 129.5),
        ("26B-A4B", {"n_ctx": 32768, "n_ubatch": 2048}, 524),
        ("31B", {"n_ctx": 4096}, 179),
        ("31B", {"n_ctx": 32768, "n_ubatch": 2048}, 834),
        ("31B", {"n_ctx": 32768, "flash_attn": "off"}, 2243),
    ],
)
def test_compute_buffer_of_gemma_4_is_within_a_tenth(name, settings, mib):
    found = need(GEMMA4[name], **settings).compute_bytes / MIB
    assert 0.97 * mib <= found <= 1.1 * mib


@pytest.mark.parametrize(
    ("n_ctx", "kv", "compute"),
    [(512, 11.25, 14.01), (2048, 45, 15.51), (8192, 180, 21.51), (32768, 720, 45.51)],
)
def test_smollm2_as_llama_cpp_logs_it(n_ctx, kv, compute):
    found = need(read_info([smollm2_path()]), n_ctx=n_ctx)
    assert found.kv_bytes == kv * MIB
    assert found.weights_bytes == 96_576_768
    assert found.compute_bytes == pytest.approx(compute * MIB, rel=0.03)
    assert found.source == "formula"


@pytest.mark.parametrize(
    ("n_ctx", "kv", "compute"),
    [(512, 9, 18.77), (2048, 21, 20.77), (8192, 39, 26.77), (32768, 111, 50.77)],
)
def test_gemma_3_as_llama_cpp_logs_it(n_ctx, kv, compute):
    found = need(read_info([gemma3_path()]), n_ctx=n_ctx)
    assert found.kv_bytes == kv * MIB
    assert compute * MIB <= found.compute_bytes <= 1.16 * compute * MIB


LLAMA = {
    "block_count": 4,
    "context_length": 8192,
    "embedding_length": 512,
    "feed_forward_length": 1024,
    "attention__head_count": 8,
    "attention__head_count_kv": 2,
}


def llama(**changes) -> ModelInfo:
    return make_info("llama", **(LLAMA | changes))


def test_cells_are_padded_and_split_between_sequences():
    row = 2 * 2 * 64 * 2 * 4  # K and V, 2 heads of 64, f16, 4 layers
    assert need(llama(), n_ctx=1).kv_bytes == 256 * row
    assert need(llama(), n_ctx=2100).kv_bytes == 2304 * row
    assert need(llama(), n_ctx=2100, n_seq_max=4).kv_bytes == 2304 * row
    assert need(llama(), n_ctx=2100, n_seq_max=4, kv_unified=False).kv_bytes == 3072 * row
    assert Setup(2100, n_seq_max=4, kv_unified=False).n_ctx_seq == 768
    assert Setup(2100, n_seq_max=4).n_ctx_seq == Setup(2100, kv_unified=False).n_ctx_seq == 2100


def test_head_sizes_and_counts_default_as_in_llama_cpp():
    plain = need(llama(attention__head_count_kv=8), n_ctx=256).kv_bytes
    changed = LLAMA.copy()
    del changed["attention__head_count_kv"]
    assert need(make_info("llama", **changed), n_ctx=256).kv_bytes == plain
    wide = llama(attention__key_length=128, attention__value_length=32)
    assert need(wide, n_ctx=256).kv_bytes == 256 * 4 * 2 * (128 + 32) * 2


def test_heads_per_layer():
    info = llama(attention__head_count_kv=[1, 2, 4, 8])
    assert need(info, n_ctx=256).kv_bytes == 256 * 15 * 64 * 2 * 2


def test_a_window_of_llama_is_ignored_as_llama_cpp_does():
    assert need(llama(attention__sliding_window=128), n_ctx=8192) == need(llama(), n_ctx=8192)


def test_gpt_oss_slides_in_every_second_layer():
    keys = LLAMA | {"attention__sliding_window": 128, "attention__key_length": 64}
    info = make_info("gpt-oss", **keys)
    row = 2 * 2 * 64 * 2
    assert need(info, n_ctx=8192).kv_bytes == row * 2 * (8192 + 768)


def test_latent_attention_stores_only_keys():
    info = make_info(
        "deepseek2",
        **LLAMA
        | {
            "attention__head_count_kv": 1,
            "attention__key_length": 576,
            "attention__value_length": 512,
            "attention__key_length_mla": 192,
            "attention__value_length_mla": 128,
        },
    )
    assert need(info, n_ctx=1024).kv_bytes == 4 * 576 * 2 * 1024


def test_hybrid_models_keep_a_state_beside_the_cache():
    keys = LLAMA | {
        "ssm__conv_kernel": 4,
        "ssm__inner_size": 1024,
        "ssm__state_size": 128,
        "ssm__group_count": 2,
        "full_attention_interval": 4,
    }
    info = make_info("qwen35moe", **keys)
    state = 4 * (3 * (1024 + 2 * 2 * 128) + 128 * 1024)
    row = 2 * 2 * 64 * 2
    assert need(info, n_ctx=1024).kv_bytes == 3 * state + row * 1024
    assert need(info, n_ctx=1024, n_seq_max=3).kv_bytes == 9 * state + row * 1024


def test_mamba_needs_the_same_for_any_context():
    info = make_info(
        "mamba",
        block_count=3,
        embedding_length=64,
        ssm__conv_kernel=4,
        ssm__inner_size=128,
        ssm__state_size=16,
    )
    assert need(info, n_ctx=256).kv_bytes == 3 * 4 * (3 * 128 + 16 * 128)
    assert need(info, n_ctx=65536) == need(info, n_ctx=512)


def test_working_memory_as_llama_cpp_logs_it_for_small_shapes():
    """Figures of a model with 4 layers of 4 heads, n_embd 256, n_ff 1024 and 2048 tokens."""
    keys = LLAMA | {"embedding_length": 256, "attention__head_count": 4}
    info = make_info("llama", n_vocab=2048, **keys)

    def mib(**settings) -> float:
        return need(info, **settings).compute_bytes / MIB

    assert mib(n_ctx=2048) == pytest.approx(10.01, rel=0.02)
    assert mib(n_ctx=8192, n_seq_max=4) == pytest.approx(16.01, rel=0.02)
    split = {"n_seq_max": 4, "kv_unified": False, "n_ubatch": 256, "flash_attn": "off"}
    assert mib(n_ctx=8192, **split) == pytest.approx(11.5, rel=0.1)


def test_lfm2_keeps_convolutions_where_it_has_no_heads():
    info = make_info(
        "lfm2", **LLAMA | {"attention__head_count_kv": [0, 2, 0, 2], "shortconv__l_cache": 3}
    )
    assert need(info, n_ctx=256).kv_bytes == 2 * 4 * 512 * 2 + 2 * 256 * 2 * 2 * 64 * 2


def test_an_encoder_keeps_no_cache():
    info = make_info("bert", **LLAMA)
    assert info.kind == "embedder"
    assert need(info, n_ctx=512).kv_bytes == 0


def test_an_encoder_computes_no_logits_but_has_room_for_them():
    """llama.cpp's buffer of output rows holds a row of the vocabulary for each of them, even so."""
    changes = {"n_ctx": 512, "n_ubatch": 512, "n_outputs_max": 512}
    logits_bytes = 4 * 511 * 100_000
    encoder, decoder = (make_info(name, n_vocab=100_000, **LLAMA) for name in ("bert", "llama"))
    for info, grows in ((encoder, False), (decoder, True)):
        many, few = need(info, **changes), need(info, **changes | {"n_outputs_max": 1})
        assert many.overhead_bytes - few.overhead_bytes == logits_bytes
        assert (many.compute_bytes > few.compute_bytes) == grows


def test_prediction_layers_are_not_loaded():
    info = llama(nextn_predict_layers=1)
    found = need(info, n_ctx=256)
    assert len(found.layer_weights) == 3
    assert found.weights_bytes == info.tensor_bytes - 2 * 64 * 64
    assert "multi-token" in found.notes[0]


def test_the_split_by_layer_adds_up():
    found = need(llama(), n_ctx=1024)
    assert sum(found.layer_kv) == found.kv_bytes
    parts = sum(found.layer_weights) + found.input_bytes + found.output_bytes
    assert parts == found.weights_bytes
    assert found.tied_bytes == found.input_bytes == 2 * N_VOCAB * 64


def test_an_output_of_its_own_is_not_tied():
    tensors = (tensor("token_embd.weight", 10, 64), tensor("output.weight", 10, 64))
    found = need(make_info("llama", tensors, **LLAMA), n_ctx=256)
    assert (found.tied_bytes, found.output_bytes, found.input_bytes) == (0, 1280, 1280)


def named(info: ModelInfo, name: str) -> TensorInfo:
    return next(tensor for tensor in info.header.tensors if tensor.name == name)


@pytest.mark.parametrize("name", ["gemma-4-e4b", "gemma-4-31b", "gemma-3n-e4b"])
@pytest.mark.parametrize("use_repack", [True, False])
def test_gemma_4_and_3n_load_their_embedding_twice(name, use_repack):
    info = shape_info(name)
    found = need(info, 4096, use_repack=use_repack)
    embedding = named(info, "token_embd.weight").n_bytes
    assert found.tied_bytes == 0
    assert found.aliased_bytes == embedding < found.output_bytes
    small = sum(tensor.n_bytes % 32 and 28 for tensor in info.header.tensors)
    assert found.weights_bytes == info.tensor_bytes + embedding + small


def test_a_tied_embedding_that_the_cpu_reorders_is_stored_twice():
    def at(type_name: str, **settings) -> Estimate:
        tensors = (tensor("token_embd.weight", 10, 64, type_name),)
        return need(make_info("llama", tensors, **LLAMA), 256, **settings)

    assert (at("Q4_K").tied_bytes, at("Q4_K").output_bytes) == (0, 1280)
    assert at("Q4_K").weights_bytes == 2560
    assert at("Q4_K", use_repack=False) == at("Q6_K", use_repack=False)
    assert (at("Q6_K").tied_bytes, at("Q6_K").output_bytes) == (1280, 0)


def test_the_per_layer_table_stays_in_ram_and_is_mapped_when_it_is_large():
    small, large = (shape_info("gemma-4-e2b", quant) for quant in ("q8_0", "f16"))
    for info in (small, large):
        found = need(info, 4096)
        tables = ("token_embd.weight", "per_layer_token_embd.weight")
        assert found.input_bytes == sum(named(info, name).n_bytes for name in tables)
        projection = named(info, "per_layer_model_proj.weight").n_bytes
        assert found.layer_weights[0] > found.layer_weights[1] + projection
    assert need(small, 4096).lazy_bytes == 0
    assert need(large, 4096).lazy_bytes == named(large, "per_layer_token_embd.weight").n_bytes
    assert "read from the file" in need(large, 4096).notes[0]


def test_experts_are_counted_by_layer():
    info = shape_info("gemma-4-26b-a4b")
    found = need(info, 4096)
    assert len(found.layer_experts) == len(found.layer_weights) == 30
    names = [f"blk.7.ffn_{part}_exps.weight" for part in ("gate_up", "down")]
    scale = named(info, "blk.7.ffn_down_exps.scale").n_bytes
    assert found.layer_experts[7] == sum(named(info, name).n_bytes for name in names) + scale
    assert 0.8 < sum(found.layer_experts) / info.tensor_bytes < 0.95
    assert need(GEMMA4["31B"], 4096).layer_experts == ()
    oss = shape_info("gpt-oss-20b")
    biases = [t.n_bytes for t in oss.header.tensors if t.name.startswith("blk.0.ffn_gate_exps.")]
    assert len(biases) == 2
    shared = need(shape_info("deepseek-v2-lite"), 4096)
    assert shared.layer_experts[0] == 0 < shared.layer_experts[1]


@pytest.mark.parametrize(
    ("name", "settings", "mib"),
    [
        ("mamba-2.8b", {"n_ctx": 4096}, 65.4),
        ("nemotron-nano-9b", {"n_ctx": 4096}, 154.3),
        ("gemma-3n-e4b", {"n_ctx": 4096}, 156.0),
        # The latent values are copied where FlashAttention is off.
        ("deepseek-v2-lite", {"n_ctx": 163840, "n_ubatch": 256, "flash_attn": "off"}, 2909.1),
    ],
)
def test_compute_buffer_of_other_builds_is_within_a_tenth(name, settings, mib):
    found = need(shape_info(name), **settings).compute_bytes / MIB
    assert 0.96 * mib <= found <= 1.1 * mib


def test_no_more_is_computed_at_once_than_the_context_holds():
    found = need(shape_info("lfm2-1.2b"), 300, n_ubatch=2048)
    assert found.compute_bytes == pytest.approx(35.5 * MIB, rel=0.1)
    assert found == need(shape_info("lfm2-1.2b"), 300, n_ubatch=300)


def test_weights_that_a_cpu_may_reorder_are_bounded():
    tensors = (
        tensor("token_embd.weight", 10, 64, "Q4_K"),
        tensor("blk.0.attn_q.weight", 64, 64, "Q4_K"),
        tensor("blk.0.ffn_up.weight", 64, 64, "F16"),
        tensor("blk.0.attn_norm.weight", 1, 64, "F32"),
    )
    assert need(make_info("llama", tensors, **LLAMA), n_ctx=256).repack_bytes == 2 * 64 * 64


def test_an_unknown_architecture_is_answered_from_the_files_size():
    info = make_info("brand-new", **LLAMA)
    found = need(info, n_ctx=4096)
    assert found.source == "filesize"
    assert found.weights_bytes == info.n_bytes * 21 // 20
    assert found.kv_bytes == 2 * 4 * 128 * 2 * 4096
    split = need(info, n_ctx=4096, n_seq_max=3, kv_unified=False)
    assert split.kv_bytes == 2 * 4 * 128 * 2 * 3 * 1536
    assert "brand-new" in found.notes[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_length": 0},
        {"attention__head_count": 0},
        {"attention__head_count_kv": [1, 2]},
        {"attention__head_count_kv": "two"},
        {"block_count": 10**9},
        {"attention__indexer__head_count": 4},
    ],
)
def test_a_header_without_sense_is_answered_all_the_same(changes):
    tensors = (tensor("token_embd.weight", 10, 64),)
    found = need(make_info("llama", tensors, **LLAMA | changes), n_ctx=4096)
    if changes == {"attention__head_count_kv": "two"}:
        assert found.source == "formula"
    else:
        assert found.source == "filesize"


def test_an_array_that_was_not_kept_is_not_guessed():
    info = llama()
    metadata = dict(info.header.metadata)
    metadata["llama.attention.head_count_kv"] = ArrayValue("int32", 4, None)
    changed = build_info([Header(3, metadata, info.header.tensors, 0, 0)], info.n_bytes)
    assert need(changed, n_ctx=256).source == "filesize"


def test_a_projector_is_its_weights_and_a_working_space():
    info = make_info("clip", block_count=2)
    assert info.kind == "projector"
    found = need(info, n_ctx=4096)
    assert (found.weights_bytes, found.kv_bytes) == (info.tensor_bytes, 0)
    assert found.compute_bytes == 512 * MIB


def test_quantised_caches_need_whole_blocks():
    assert allows_kv_type(llama(), "q8_0")
    assert not allows_kv_type(llama(attention__key_length=80), "q8_0")
    assert allows_kv_type(llama(attention__key_length=80), "f16")
    assert not allows_kv_type(make_info("brand-new", **LLAMA), "q8_0")


def test_latent_attention_needs_one_kv_type():
    assert needs_one_kv_type(shape_info("deepseek-v2-lite"))
    assert not needs_one_kv_type(llama())
    assert not needs_one_kv_type(make_info("brand-new", **LLAMA))


def parts(found: Estimate) -> tuple[int, int, int]:
    return found.weights_bytes, found.kv_bytes, found.compute_bytes


SHAPES = [
    *GEMMA4.values(),
    llama(),
    *map(shape_info, ("qwen3.5-35b-a3b", "deepseek-v2-lite", "gemma-3n-e4b", "nemotron-nano-9b")),
    make_info("brand-new", **LLAMA),
]


@given(
    info=st.sampled_from(SHAPES),
    n_ctx=st.integers(1, 300_000),
    more=st.integers(0, 300_000),
    n_ubatch=st.integers(1, 4096),
    more_rows=st.integers(0, 4096),
    flash_attn=st.sampled_from(["auto", "off"]),
    n_seq=st.integers(1, 8),
)
def test_more_is_never_less(info, n_ctx, more, n_ubatch, more_rows, flash_attn, n_seq):
    def at(n_ctx: int, n_ubatch: int) -> tuple[int, int, int]:
        settings = {"n_ubatch": n_ubatch, "flash_attn": flash_attn, "n_seq_max": n_seq}
        return parts(need(info, n_ctx=n_ctx, **settings))

    small = at(n_ctx, n_ubatch)
    for larger in (at(n_ctx + more, n_ubatch), at(n_ctx, n_ubatch + more_rows)):
        assert all(a <= b for a, b in zip(small, larger, strict=True))

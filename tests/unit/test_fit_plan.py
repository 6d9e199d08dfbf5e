"""The planner: what it chooses, what it gives up and in which order, and what it says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.errors import UsageError, WillNotFitError
from llmrun.fit.formula import estimate
from llmrun.fit.plan import Wishes, plan, require_fit
from llmrun.fit.types import Setup
from llmrun.gguf.info import read_info
from llmrun.gguf.types import ModelInfo
from llmrun.hardware.machine import Cpu, Device, Machine, Memory
from tests.fakes.model_shapes import shape_info
from tests.fakes.models import smollm2_path
from tests.unit.test_fit_formula import LLAMA, llama, make_info, tensor

MIB = 1 << 20
GIB = 1 << 30
CPU = Cpu(16, 16, 8)


def machine(ram: float, *gpus: float, shared: float | None = None, total: float = 512) -> Machine:
    """`ram`, `gpus` and `shared` are free GiB."""
    devices = [
        Device(f"GPU{i}", "a card", "gpu", int(free * GIB), 128 * GIB)
        for i, free in enumerate(gpus)
    ]
    if shared is not None:
        devices.append(Device("Metal", "M", "gpu", int(shared * GIB), 512 * GIB, True))
    return Machine(CPU, Memory(int(total * GIB), int(ram * GIB)), tuple(devices))


def dense_8b(**changes: object) -> ModelInfo:
    """The shape of an 8 B Llama in 4 bits: 4.6 GiB of weights, 128 KiB of KV cache a token."""
    keys = {
        "block_count": 32,
        "context_length": 131072,
        "embedding_length": 4096,
        "feed_forward_length": 14336,
        "attention__head_count": 32,
        "attention__head_count_kv": 8,
    }
    layers = [tensor(f"blk.{i}.ffn_up.weight", 16384, 4096, "Q4_K") for i in range(32)]
    ends = [tensor(f"{name}.weight", 32768, 4096, "Q6_K") for name in ("token_embd", "output")]
    return make_info("llama", (*layers, *ends), n_vocab=128256, **(keys | changes))


BIG = dense_8b()


def test_a_roomy_machine_gets_the_usual_context():
    chosen = plan(machine(64), BIG)
    assert (chosen.n_ctx, chosen.type_k, chosen.type_v) == (8192, "f16", "f16")
    assert chosen.verdict == "fits"
    assert chosen.n_ubatch == 512
    assert (chosen.n_threads, chosen.n_threads_batch) == (8, 8)
    assert "--ctx takes up to 131072" in chosen.reasons[0]


def test_a_cheap_cache_gets_a_longer_context():
    cheap = dense_8b(attention__head_count_kv=1)
    assert plan(machine(64), cheap).n_ctx == 32768
    assert plan(machine(64), dense_8b(attention__head_count_kv=2)).n_ctx == 16384 * 2
    assert plan(machine(64), dense_8b(attention__head_count_kv=4)).n_ctx == 16384


def test_the_models_own_limit_is_kept_and_named():
    chosen = plan(machine(64), llama(context_length=1536))
    assert chosen.n_ctx == 1536
    assert chosen.reasons[0] == "context 1536: the model's own limit"


def test_a_model_that_does_not_say_its_limit():
    keys = LLAMA.copy()
    del keys["context_length"]
    chosen = plan(machine(64), make_info("llama", **keys))
    assert chosen.n_ctx == 4096
    assert "does not say" in chosen.reasons[0]


def test_the_real_small_model_gets_its_whole_context():
    chosen = plan(machine(4), read_info([smollm2_path()]))
    assert (chosen.n_ctx, chosen.verdict) == (8192, "fits")


def test_a_one_off_run_takes_no_more_than_it_needs():
    assert plan(machine(64), BIG, Wishes(n_ctx_enough=700)).n_ctx == 2048
    chosen = plan(machine(64), BIG, Wishes(n_ctx_enough=3000))
    assert chosen.n_ctx == 3072
    assert "enough for this prompt" in chosen.reasons[0]
    assert plan(machine(64), BIG, Wishes(n_ctx_enough=10**7)).n_ctx == 8192
    assert plan(machine(64), BIG, Wishes(n_ctx_enough=700, n_ctx=5000)).n_ctx == 5000


def test_what_is_given_up_in_order():
    """Less and less memory: each step gives up the next thing and no earlier one again."""
    seen = []
    for hundredth in range(800, 400, -1):
        chosen = plan(machine(hundredth / 100), BIG)
        step = (chosen.n_ctx, chosen.type_k, chosen.verdict)
        if not seen or seen[-1] != step:
            seen.append(step)
    assert seen == [
        (8192, "f16", "fits"),
        (8192, "q8_0", "fits"),
        (4096, "f16", "fits"),
        (4096, "q8_0", "fits"),
        (2048, "f16", "fits"),
        (2048, "q8_0", "fits"),
        (2048, "q8_0", "tight"),
        (2048, "q8_0", "no"),
    ]


def test_wishes_are_kept():
    wishes = Wishes(n_ctx=20000, type_k="q4_0", type_v="f16", n_threads=3, n_ubatch=128)
    chosen = plan(machine(64), BIG, wishes)
    assert (chosen.n_ctx, chosen.type_k, chosen.type_v) == (20000, "q4_0", "f16")
    assert (chosen.n_threads, chosen.n_threads_batch, chosen.n_ubatch) == (3, 3, 128)
    assert chosen.reasons[0] == "context 20000: as asked"


def test_an_asked_context_stays_and_only_the_cache_type_gives_way():
    need = estimate(BIG, Setup(65536)).total_bytes / GIB
    chosen = plan(machine(need), BIG, Wishes(n_ctx=65536))
    assert (chosen.n_ctx, chosen.type_k, chosen.verdict) == (65536, "q8_0", "fits")
    assert "q8_0 to save memory" in chosen.reasons[0]


def test_an_asked_cache_type_never_gives_way():
    chosen = plan(machine(5.6), BIG, Wishes(type_k="f16", type_v="f16"))
    assert (chosen.type_k, chosen.type_v) == ("f16", "f16")


def test_a_context_beyond_the_training_is_possible_but_said():
    chosen = plan(machine(64), llama(), Wishes(n_ctx=16384))
    assert chosen.n_ctx == 16384
    assert "beyond the 8192" in chosen.reasons[0]


def test_the_cache_is_not_quantised_where_llama_cpp_would_refuse():
    odd = make_info("llama", **LLAMA | {"attention__key_length": 80})
    starved = machine(0.06, total=1)
    assert plan(starved, odd).type_k == "f16"
    assert plan(starved, llama(), Wishes(flash_attn="off")).type_v == "f16"


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        (Wishes(type_v="q8_0", flash_attn="off"), "FlashAttention"),
        (Wishes(type_k="q8_0"), "blocks"),
        (Wishes(n_ctx=0), "--ctx"),
        (Wishes(n_threads=-1), "--threads"),
    ],
)
def test_wishes_that_cannot_be(wishes, words):
    odd = make_info("llama", **LLAMA | {"attention__key_length": 80})
    with pytest.raises(UsageError) as caught:
        plan(machine(64), odd, wishes)
    assert words in f"{caught.value.message} {caught.value.why}"


def test_a_quantised_key_alone_needs_no_flash_attention():
    chosen = plan(machine(64), llama(), Wishes(type_k="q8_0", flash_attn="off"))
    assert (chosen.type_k, chosen.type_v) == ("q8_0", "f16")


def test_a_projector_is_no_model():
    with pytest.raises(UsageError, match="projector"):
        plan(machine(64), make_info("clip", block_count=1))


def test_an_embedder_reads_a_text_in_one_piece():
    chosen = plan(machine(64), make_info("bert", **LLAMA))
    assert chosen.n_ctx == chosen.n_ubatch == 2048
    short = plan(machine(64), make_info("bert", **LLAMA | {"context_length": 512}))
    assert short.n_ctx == short.n_ubatch == 512


def test_weights_are_mapped_only_where_a_reordered_copy_has_room_too():
    roomy = plan(machine(64), BIG)
    assert (roomy.use_mmap, roomy.use_repack) == (True, True)
    close = plan(machine(8), BIG)
    assert close.verdict == "fits"
    assert (close.use_mmap, close.use_repack) == (False, True)
    assert any("read, not mapped" in reason for reason in close.reasons)
    hopeless = plan(machine(2), BIG)
    assert (hopeless.use_mmap, hopeless.use_repack) == (True, False)


def test_memory_that_cannot_be_read_is_not_checked():
    chosen = plan(Machine(CPU, Memory(0, 0, "unknown")), BIG)
    assert (chosen.verdict, chosen.n_ctx) == ("fits", 8192)
    assert "not checked" in chosen.reasons[-1]


def test_an_unknown_architecture_still_gets_a_plan():
    chosen = plan(machine(64), make_info("brand-new", **LLAMA))
    assert chosen.estimate.source == "filesize"
    assert any("brand-new" in reason for reason in chosen.reasons)


def test_without_a_known_gpu_the_engine_decides():
    assert plan(machine(64), BIG).n_gpu_layers == -1
    assert plan(machine(64), BIG, Wishes(n_gpu_layers="all")).n_gpu_layers == -1
    assert plan(machine(64), BIG, Wishes(n_gpu_layers=7)).n_gpu_layers == 7


def test_a_large_gpu_takes_everything():
    chosen = plan(machine(16, 24), BIG)
    assert chosen.n_gpu_layers == -1
    host, gpu = chosen.placement.shares
    assert gpu.weights_bytes == BIG.tensor_bytes - chosen.estimate.input_bytes
    assert host.weights_bytes == chosen.estimate.input_bytes
    assert host.kv_bytes == 0
    assert gpu.kv_bytes == chosen.estimate.kv_bytes
    assert "all layers on GPU0" in chosen.reasons


def test_a_small_gpu_takes_some_layers_from_the_back():
    chosen = plan(machine(16, 4), BIG)
    assert 0 < chosen.n_gpu_layers < 33
    assert chosen.n_ctx == 8192
    host, gpu = chosen.placement.shares
    assert gpu.used_bytes <= 3 * GIB
    assert host.weights_bytes + gpu.weights_bytes == BIG.tensor_bytes
    assert any(f"{chosen.n_gpu_layers} of 33 layers" in reason for reason in chosen.reasons)


def test_a_shorter_cache_comes_before_layers_on_the_cpu():
    need = estimate(BIG, Setup(8192))
    free = (need.total_bytes - need.overhead_bytes - need.input_bytes) / GIB + 1 - 0.3
    chosen = plan(machine(16, free), BIG)
    assert (chosen.n_gpu_layers, chosen.n_ctx, chosen.type_k) == (-1, 8192, "q8_0")


def test_two_gpus_are_one_pool():
    assert plan(machine(16, 4.5, 4.5), BIG).n_gpu_layers == -1


def test_a_gpu_that_tells_no_memory_gets_nothing():
    blind = replace(machine(16), devices=(Device("X", "x", "gpu", 0, 0),))
    assert plan(blind, BIG).placement == plan(machine(16), BIG).placement


def test_a_tied_output_is_copied_to_the_gpu():
    without = [tensor for tensor in BIG.header.tensors if tensor.name != "output.weight"]
    tied = replace(
        BIG,
        header=replace(BIG.header, tensors=tuple(without)),
        tensor_bytes=sum(tensor.n_bytes for tensor in without),
    )
    chosen = plan(machine(16, 24), tied)
    assert chosen.estimate.weights_bytes == tied.tensor_bytes + chosen.estimate.input_bytes


def test_unified_memory_is_counted_once():
    chosen = plan(machine(7.5, shared=7.5), BIG)
    assert chosen.available_bytes == int(7.5 * GIB)
    assert sum(share.used_bytes for share in chosen.placement.shares) <= chosen.budget_bytes
    short = plan(machine(4.5, shared=24), BIG)
    assert short.verdict == "no"


def test_a_fixed_number_of_layers_is_placed_as_asked():
    chosen = plan(machine(16, 24), BIG, Wishes(n_gpu_layers=5))
    assert chosen.n_gpu_layers == 5
    _, gpu = chosen.placement.shares
    assert gpu.weights_bytes == sum(chosen.estimate.layer_weights[-4:]) + tensor_bytes("output")
    none = plan(machine(16, 24), BIG, Wishes(n_gpu_layers=0))
    assert none.n_gpu_layers == 0
    assert [share.device for share in none.placement.shares] == ["RAM"]


def tensor_bytes(name: str) -> int:
    return next(t.n_bytes for t in BIG.header.tensors if t.name == f"{name}.weight")


def test_a_model_that_fits_is_let_through():
    require_fit(plan(machine(64), BIG))
    tight = plan(machine(5), BIG)
    assert tight.verdict == "tight"
    require_fit(tight)


def test_a_model_that_does_not_fit_is_refused_with_numbers_and_a_way_out():
    chosen = plan(machine(3), BIG)
    with pytest.raises(WillNotFitError) as caught:
        require_fit(chosen)
    assert caught.value.exit_code == 5
    assert re.search(r"needs 5\.\d+ GB .* 3\.22 GB are free", caught.value.message)
    assert "weights 4.83 GB" in caught.value.why
    assert "smaller quant" in caught.value.hint
    assert "--force" in caught.value.hint
    require_fit(chosen, force=True)


def test_a_context_that_does_not_fit_is_refused_with_one_that_does():
    target = machine(8)
    chosen = plan(target, BIG, Wishes(n_ctx=131072))
    assert chosen.n_ctx_that_fits is not None
    with pytest.raises(WillNotFitError) as caught:
        require_fit(chosen)
    assert f"--ctx {chosen.n_ctx_that_fits}" in caught.value.hint
    assert plan(target, BIG, Wishes(n_ctx=chosen.n_ctx_that_fits)).verdict == "fits"
    assert plan(target, BIG, Wishes(n_ctx=chosen.n_ctx_that_fits + 1024)).verdict != "fits"


def test_the_device_that_lacks_memory_is_named():
    chosen = plan(machine(64, 3), BIG, Wishes(n_gpu_layers="all"))
    assert chosen.verdict == "no"
    with pytest.raises(WillNotFitError) as caught:
        require_fit(chosen)
    assert "GPU0 would have to hold" in caught.value.why


def test_plans_of_one_model_can_be_compared():
    ranked = [
        plan(machine(2), BIG),
        plan(machine(5), BIG),
        plan(machine(5.6), BIG),
        plan(machine(6.2), BIG),
        plan(machine(64), BIG),
    ]
    assert [chosen.verdict for chosen in ranked] == ["no", "tight", "fits", "fits", "fits"]
    assert [chosen.n_ctx for chosen in ranked] == [2048, 2048, 4096, 8192, 8192]
    qualities = [chosen.quality for chosen in ranked]
    assert qualities == sorted(qualities)
    assert len(set(qualities)) == len(qualities)


def test_the_setup_is_what_the_engine_gets():
    wishes = Wishes(n_ctx=4096, type_k="q8_0", n_seq=4, n_ubatch=256, n_gpu_layers=7)
    setup = plan(machine(64, 24), BIG, wishes).setup
    assert setup == Setup(
        4096,
        "q8_0",
        "f16",
        n_seq_max=4,
        n_ubatch=256,
        n_outputs_max=4 + 31,
        n_gpu_layers=7,
    )


def test_room_for_guesses_is_planned_by_the_engines_rule():
    def n_outputs(info, **wishes):
        return plan(machine(64), info, Wishes(n_ctx=4096, **wishes)).setup.n_outputs_max

    assert n_outputs(BIG) == n_outputs(BIG, speculative="draft") == 32
    assert n_outputs(BIG, speculative="off", n_seq=2) == 2
    assert n_outputs(BIG, n_ubatch=16) == 16
    assert n_outputs(shape_info("jamba-3b"), n_seq=2) == 2
    guessing, plain = (
        plan(machine(64), BIG, Wishes(n_ctx=4096, speculative=word)).estimate.total_bytes
        for word in ("auto", "off")
    )
    assert guessing - plain == 31 * 4 * BIG.n_vocab


def test_states_to_go_back_to_get_what_the_plan_leaves():
    assert plan(machine(0), BIG).checkpoint_bytes == 256 * MIB
    assert plan(machine(64), BIG).checkpoint_bytes == 256 * MIB
    sizes = [n / 10 for n in range(50, 90)]
    plans = [plan(machine(size), BIG) for size in sizes]
    assert min(chosen.checkpoint_bytes for chosen in plans) < 64 * MIB
    for chosen in plans:
        host = chosen.placement.shares[0]
        assert chosen.checkpoint_bytes <= max(0, host.budget_bytes - host.used_bytes)


def test_many_sequences_get_a_row_each():
    assert plan(machine(64), BIG, Wishes(n_seq=600)).n_ubatch == 600


INFOS = {
    "dense": BIG,
    "small": llama(),
    "unknown": make_info("brand-new", **LLAMA),
    "mtp": dense_8b(block_count=33, nextn_predict_layers=1),
    **{
        name: shape_info(name)
        for name in ("gemma-4-e2b", "gemma-4-26b-a4b", "qwen3.5-9b", "gpt-oss-20b", "jamba-3b")
    },
}
NAMES = st.sampled_from(sorted(INFOS))
WISHES = st.builds(
    Wishes,
    n_ctx=st.none() | st.integers(1, 200_000),
    n_gpu_layers=st.sampled_from(["auto", "auto", "all", -1, 0, 5, 99]),
    type_k=st.sampled_from(["auto", "f16", "f32"]),
    type_v=st.sampled_from(["auto", "f16"]),
    flash_attn=st.sampled_from(["auto", "on", "off"]),
    n_seq=st.integers(1, 4),
    n_ubatch=st.none() | st.sampled_from([128, 512, 2048]),
    n_ctx_enough=st.none() | st.integers(1, 50_000),
    n_cpu_moe=st.sampled_from(["auto", "auto", "all", 0, 3]),
    companions_bytes=st.sampled_from([0, 0, GIB]),
)
AMOUNT = st.floats(0, 40, allow_nan=False)


@st.composite
def machines(draw) -> Machine:
    """None to three cards, unequal, some that tell nothing; or a GPU in the RAM, with its limit."""
    ram = draw(AMOUNT) + 0.01
    kind = draw(st.sampled_from(["none", "cards", "cards", "unified", "both"]))
    if kind == "none":
        return machine(ram)
    if kind == "unified":
        return machine(ram, shared=draw(AMOUNT))
    amounts = draw(st.lists(AMOUNT, min_size=1, max_size=3))
    made = machine(ram, *amounts, shared=draw(AMOUNT) if kind == "both" else None)
    blind = Device("GPU9", "tells nothing", "gpu", 0, 0)
    return made.with_devices((*made.devices, blind)) if draw(st.booleans()) else made


def richer(less: Machine, ram: float, extras: list[float]) -> Machine:
    """The same devices with more free memory, the first as the first of `extras` and so on."""
    free = less.memory.available_bytes + int(ram * GIB)
    devices = [
        replace(device, free_bytes=device.free_bytes + int(extra * GIB))
        if device.total_bytes
        else device
        for device, extra in zip(less.devices, extras + [0.0] * 9, strict=False)
    ]
    memory = replace(less.memory, available_bytes=free)
    return replace(less, memory=memory, devices=tuple(devices))


@settings(deadline=None)
@given(NAMES, WISHES, machines())
def test_what_fits_is_within_the_budgets(name, wishes, target):
    chosen = plan(target, INFOS[name], wishes)
    if chosen.verdict not in ("fits", "partly_on_cpu", "cpu_only"):
        return
    assert all(share.missing_bytes <= 0 for share in chosen.shares)
    assert sum(share.used_bytes for share in chosen.shares) <= chosen.budget_bytes
    assert chosen.placement.slack_bytes >= 0
    assert chosen.estimate.total_bytes <= chosen.placement.total_bytes
    by_name = {device.name: device for device in target.devices}
    for share in chosen.shares:
        if share.device in by_name and not by_name[share.device].shares_host_memory:
            assert share.used_bytes <= max(0, by_name[share.device].free_bytes - GIB)


@settings(deadline=None)
@given(NAMES, WISHES, machines())
def test_the_shares_add_up_and_blind_devices_get_nothing(name, wishes, target):
    chosen = plan(target, INFOS[name], wishes)
    shares = chosen.shares
    assert sum(share.weights_bytes for share in shares) == chosen.estimate.weights_bytes
    assert sum(share.kv_bytes for share in shares) == chosen.estimate.kv_bytes
    assert all(
        min(share.weights_bytes, share.kv_bytes, share.compute_bytes, share.overhead_bytes) >= 0
        for share in shares
    )
    blind = {device.name for device in target.devices if not device.total_bytes}
    assert blind.isdisjoint(share.device for share in shares)
    cards = [device for device in target.devices if device.kind == "gpu"]
    for device, share in zip(cards, chosen.tensor_split, strict=False):
        assert device.total_bytes or not share


@settings(deadline=None, max_examples=200)
@given(NAMES, WISHES, machines(), AMOUNT, st.lists(AMOUNT, min_size=3, max_size=3))
def test_more_memory_is_never_worse(name, wishes, less, ram, extras):
    info = INFOS[name]
    poor, rich = plan(less, info, wishes), plan(richer(less, ram, extras), info, wishes)
    assert rich.quality >= poor.quality
    assert rich.runs >= poor.runs
    assert min(rich.n_ctx, 8192) >= min(poor.n_ctx, 8192)


@settings(deadline=None)
@given(NAMES, WISHES, machines())
def test_what_was_asked_for_is_what_is_planned(name, wishes, target):
    chosen = plan(target, INFOS[name], wishes)
    for key in ("n_ctx", "n_ubatch", "type_k", "type_v", "n_cpu_moe", "n_gpu_layers"):
        asked = getattr(wishes, key)
        if asked not in (None, "auto", "all"):
            assert getattr(chosen, key) == asked, key
    if wishes.n_gpu_layers == "all":
        assert chosen.n_gpu_layers == -1
    if wishes.n_cpu_moe == "all":
        assert chosen.n_cpu_moe == len(chosen.placement.layer_devices)
    assert (chosen.flash_attn, chosen.n_seq) == (wishes.flash_attn, wishes.n_seq)


@settings(deadline=None)
@given(NAMES, AMOUNT, st.integers(1, 200_000), st.integers(0, 200_000))
def test_a_longer_context_is_never_easier(name, ram, n_ctx, more):
    def runs(n_ctx: int) -> tuple[int, ...]:
        wishes = Wishes(n_ctx=n_ctx, type_k="f16", type_v="f16")
        return plan(machine(ram + 0.01), INFOS[name], wishes).quality[:1]

    assert runs(n_ctx + more) <= runs(n_ctx)


@settings(deadline=None)
@given(NAMES, st.integers(1, 200_000), st.integers(0, 200_000), st.integers(1, 3))
def test_the_need_grows_with_context_and_micro_batch(name, n_ctx, more, times):
    def need(n_ctx: int, n_ubatch: int) -> int:
        wishes = Wishes(n_ctx=n_ctx, n_ubatch=n_ubatch, type_k="f16", type_v="f16")
        return plan(machine(4000, total=4096), INFOS[name], wishes).placement.total_bytes

    assert need(n_ctx, 512) <= need(n_ctx + more, 512)
    assert need(n_ctx, 512) <= need(n_ctx, 512 * times)


class TestOneKvTypeForBoth:
    """A latent cache (MLA) is key and value at once."""

    info = shape_info("deepseek-v2-lite")

    @pytest.mark.parametrize("wish", [{"type_k": "q8_0"}, {"type_v": "q8_0"}])
    def test_one_that_is_asked_stands_for_the_other(self, wish):
        chosen = plan(machine(64), self.info, Wishes(**wish))
        assert (chosen.type_k, chosen.type_v) == ("q8_0", "q8_0")
        plain = plan(machine(64), dense_8b(), Wishes(**wish))
        assert {plain.type_k, plain.type_v} == {"q8_0", "f16"}

    def test_what_is_asked_is_not_undone_to_save_memory(self):
        need = estimate(self.info, Setup(131072)).total_bytes / GIB
        wishes = Wishes(n_ctx=131072, type_v="f16")
        chosen = plan(machine(need - 1), self.info, wishes)
        assert (chosen.type_k, chosen.type_v) == ("f16", "f16")
        free = plan(machine(need - 1), self.info, Wishes(n_ctx=131072))
        assert (free.type_k, free.type_v) == ("q8_0", "q8_0")

    def test_two_types_are_refused(self):
        with pytest.raises(UsageError, match="keys in q8_0 and values in f16") as caught:
            plan(machine(64), self.info, Wishes(type_k="q8_0", type_v="f16"))
        assert "--kv-type" in (caught.value.hint or "")
        plan(machine(64), dense_8b(), Wishes(type_k="q8_0", type_v="f16"))

    def test_without_flash_attention_neither_is_quantised(self):
        with pytest.raises(UsageError, match="FlashAttention"):
            plan(machine(64), self.info, Wishes(type_k="q8_0", flash_attn="off"))

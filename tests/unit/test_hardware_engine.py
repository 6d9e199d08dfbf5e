"""Devices as the engine sees them: the child's answer, and what of it can be planned with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.hardware.engine_devices import (
    EngineReport,
    ask_engine,
    find_libraries,
    has_gpu_library,
    parse_report,
)
from llmrun.hardware.machine import Cpu, Device, Machine, Memory
from llmrun.hardware.probe import detect_machine
from llmrun.hardware.processes import Reply
from llmrun.hardware.sharing import settle_devices
from tests.fakes.probes import GIB, MIB, Child, amd_card, answer, device, fake_probe, meminfo

CUDA = ("base", "cpu", "cuda")
VULKAN = ("base", "cpu", "vulkan")
PC = meminfo(32 * GIB, 24 * GIB)


def machine_with(tmp_path: Path, *devices, files=PC, libraries=CUDA, **changes) -> Machine:
    probe = fake_probe(tmp_path, files, libraries=libraries, child=answer(*devices), **changes)
    return detect_machine(probe, devices=True)


# The child


def test_a_cpu_build_starts_no_child(tmp_path):
    child = Child(answer())
    probe = fake_probe(tmp_path, PC, child=child)
    assert detect_machine(probe, devices=True).devices == ()
    assert child.requests == []
    assert ask_engine(probe) == EngineReport()
    ask_engine(probe, always=True)
    assert len(child.requests) == 1


def test_devices_are_only_asked_for_when_wanted(tmp_path):
    child = Child(answer())
    detect_machine(fake_probe(tmp_path, PC, libraries=CUDA, child=child))
    assert child.requests == []


def test_a_gpu_build_asks_once_and_names_the_task(tmp_path):
    child = Child(answer())
    detect_machine(fake_probe(tmp_path, PC, libraries=CUDA, child=child), devices=True)
    ((module, text),) = child.requests
    assert module == "llmrun.engine.probe"
    assert json.loads(text) == {"task": "devices"}
    assert text.endswith("\n")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["libggml.so", "libggml-base.so", "libggml-cpu.so", "libllama.so"], False),
        (["libggml-base.so.0", "libggml-cpu-haswell.so", "libggml-blas.so"], False),
        (["ggml-base.dll", "ggml-cpu.dll", "ggml-cuda.dll"], True),
        (["libggml-base.dylib", "libggml-cpu.dylib", "libggml-metal.dylib"], True),
        (["libggml-base.so", "libggml-hip.so.0.25"], True),
        (["libggml-base.so", "libggml-sycl.so"], True),
        (["libggml-base.so", "libggml-future.so"], True),
        (["libllama.so"], True),
        ([], True),
    ],
)
def test_gpu_libraries_are_known_by_their_names(tmp_path, names, expected):
    probe = fake_probe(tmp_path, {f"/somewhere/{name}": "" for name in names}, libraries=None)
    probe = replace(probe, library_folder=lambda: Path("/somewhere"))
    assert has_gpu_library(find_libraries(probe)) is expected


def test_without_the_binding_there_are_no_devices_and_a_reason(tmp_path):
    machine = detect_machine(fake_probe(tmp_path, PC, libraries=None), devices=True)
    assert machine.devices == ()
    assert machine.notes == ("llama-cpp-python is not installed",)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(None, "was not done after 15 s"), "not done after 15 s"),
        (Reply("", "was ended by SIGABRT: GGML_ASSERT failed"), "GGML_ASSERT"),
        (Reply("", "ended with code 1"), "code 1"),
        (Reply(""), "gave no answer"),
        (Reply("[1, 2]"), "gave no answer"),
        (Reply("{" * 100_000), "gave no answer"),
        (Reply("9" * 10_000), "gave no answer"),
        (Reply("{}"), "gave no list"),
        (Reply('{"devices": 7}'), "gave no list"),
        (Reply('{"error": "no library\\u001b[31m"}'), "no library\\x1b[31m"),
        (Reply('{"error": 3}'), "did not say why"),
    ],
)
def test_a_child_that_fails_leaves_no_devices_and_a_note(tmp_path, reply, words):
    probe = fake_probe(tmp_path, PC, libraries=CUDA, child=reply)
    machine = detect_machine(probe, devices=True)
    assert machine.devices == ()
    (note,) = machine.notes
    assert words in note


def test_what_drivers_print_before_the_answer_is_skipped():
    reply = answer(device("CUDA0", "x", 1, 2))
    report = parse_report(f"ggml_cuda_init: found 1 device\n\n{reply.stdout}\n")
    assert report.problem is None
    assert [entry.name for entry in report.devices] == ["CUDA0", "CPU"]


def test_a_report_holds_what_doctor_shows():
    text = answer(features=["AVX2", "ARCHS = 890"], backends=["MTL", "CPU", 3]).stdout
    report = parse_report(text)
    assert report.features == ("AVX2", "ARCHS")
    assert report.backends == ("Metal", "CPU")
    assert report.version == "0.5.0"
    assert report.supports_gpu_offload is False


@pytest.mark.parametrize(
    "entry",
    [
        3,
        {},
        device("", "x", 1, 1),
        device("A", "x", 1, 1, kind="meta"),
        device("A", "x", 1, 1) | {"type": ["gpu"]},
        device("A", "x", 1, 1) | {"name": 4},
    ],
)
def test_entries_without_sense_are_left_out(entry):
    report = parse_report(json.dumps({"devices": [entry, device("B", "x", 1, 2)]}))
    assert [entry.name for entry in report.devices] == ["B"]


@pytest.mark.parametrize("size", [-1, 1.5, True, "9", None, 1 << 64, [], float("inf")])
def test_sizes_without_sense_count_as_nothing(size):
    entry = device("A", "x", 5, 10)
    (parsed,) = parse_report(json.dumps({"devices": [entry | {"total": size}]})).devices
    assert (parsed.free_bytes, parsed.total_bytes) == (0, 0)
    (parsed,) = parse_report(json.dumps({"devices": [entry | {"free": size}]})).devices
    assert (parsed.free_bytes, parsed.total_bytes) == (0, 10)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["devices", "features", "name", "description", "backend", "type", "free", "total"]
            )
            | st.text(max_size=5),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(st.one_of(st.text(), json_values.map(json.dumps)))
def test_no_answer_makes_the_parser_raise(text):
    report = parse_report(text)
    assert report.problem is None or report.devices == ()


@given(st.lists(json_values, max_size=3), st.sampled_from(["linux", "darwin", "win32"]))
def test_no_list_of_devices_makes_a_device_with_more_free_than_it_has(entries, platform):
    report = parse_report(json.dumps({"devices": entries}))
    host = Machine(Cpu(8, 8, 8), Memory(16 * GIB, 8 * GIB), platform=platform)
    settled, _ = settle_devices(
        report.devices, host, fake_probe(Path("/nowhere-at-all"), None, libraries=None)
    )
    assert all(0 <= gpu.free_bytes <= gpu.total_bytes for gpu in settled)


# Machines


@pytest.mark.parametrize(
    ("description", "total", "free", "bandwidth"),
    [
        ("NVIDIA GeForce RTX 3060", 12035 * MIB, 11500 * MIB, 360e9),
        ("NVIDIA GeForce RTX 4090", 24080 * MIB, 22000 * MIB, 1008e9),
        ("NVIDIA H100 80GB HBM3", 81079 * MIB, 80500 * MIB, 3350e9),
    ],
)
def test_one_cuda_card(tmp_path, description, total, free, bandwidth):
    machine = machine_with(tmp_path, device("CUDA0", description, free, total))
    assert machine.devices == (
        Device("CUDA0", description, "gpu", free, total, False, "CUDA", bandwidth),
    )
    assert machine.notes == ()


def test_two_unequal_cards_keep_the_engines_order(tmp_path):
    machine = machine_with(
        tmp_path,
        device("CUDA0", "NVIDIA GeForce RTX 4090", 22 * GIB, 24 * GIB),
        device("CUDA1", "NVIDIA GeForce RTX 3060", 11 * GIB, 12 * GIB),
    )
    assert [gpu.name for gpu in machine.devices] == ["CUDA0", "CUDA1"]
    assert [gpu.total_bytes for gpu in machine.devices] == [24 * GIB, 12 * GIB]


def test_two_equal_cards_are_two(tmp_path):
    cards = [device(f"CUDA{i}", "NVIDIA RTX A6000", 40 * GIB, 48 * GIB) for i in range(2)]
    assert len(machine_with(tmp_path, *cards).devices) == 2


def test_cards_seen_by_two_backends_count_once_each(tmp_path):
    name = "NVIDIA GeForce RTX 3090"
    machine = machine_with(
        tmp_path,
        device("CUDA0", name, 23 * GIB, 24 * GIB),
        device("CUDA1", name, 22 * GIB, 24 * GIB),
        device("Vulkan0", name, 24 * GIB, 24 * GIB + 200 * MIB),
        device("Vulkan1", name, 24 * GIB, 24 * GIB + 200 * MIB),
        device("Vulkan2", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 20 * GIB, 24 * GIB),
        libraries=(*CUDA, "vulkan"),
    )
    assert [gpu.name for gpu in machine.devices] == ["CUDA0", "CUDA1", "Vulkan2"]


def test_an_equal_card_that_only_one_backend_may_see_counts(tmp_path):
    name = "NVIDIA GeForce RTX 3090"
    cards = [device(n, name, 23 * GIB, 24 * GIB) for n in ("CUDA0", "Vulkan0", "Vulkan1")]
    machine = machine_with(tmp_path, *cards)
    assert [gpu.name for gpu in machine.devices] == ["CUDA0", "Vulkan1"]


def test_a_card_named_by_its_driver_and_not_by_the_other_is_one(tmp_path):
    machine = machine_with(
        tmp_path,
        device("ROCm0", "AMD Radeon Graphics", 20 * GIB, 24 * GIB),
        device("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 20 * GIB, 24 * GIB),
    )
    assert [gpu.name for gpu in machine.devices] == ["ROCm0"]


def test_an_integrated_gpu_is_not_used_beside_a_card(tmp_path):
    machine = machine_with(
        tmp_path,
        device("Vulkan0", "Intel(R) UHD Graphics 770", 12 * GIB, 16 * GIB, kind="igpu"),
        device("Vulkan1", "NVIDIA GeForce RTX 4060", 7 * GIB, 8 * GIB),
        libraries=VULKAN,
    )
    assert [gpu.name for gpu in machine.devices] == ["Vulkan1"]
    assert machine.notes == ("Vulkan0 is integrated and not used beside another GPU",)


def test_a_device_without_sizes_is_given_nothing(tmp_path):
    machine = machine_with(tmp_path, device("Vulkan0", "Odd GPU", 0, 0), libraries=VULKAN)
    (gpu,) = machine.devices
    assert (gpu.free_bytes, gpu.total_bytes) == (0, 0)
    assert machine.notes == ("Vulkan0 does not tell its memory: not used",)


def test_accelerators_and_software_gpus_are_no_devices(tmp_path):
    machine = machine_with(
        tmp_path,
        device("BLAS", "OpenBLAS", 0, 0, kind="accel"),
        device("Vulkan0", "llvmpipe (LLVM 17.0.6, 256 bits)", 30 * GIB, 32 * GIB),
        libraries=VULKAN,
    )
    assert machine.devices == ()


def test_the_dgx_spark_is_one_pool(tmp_path):
    files = meminfo(119 * GIB, 110 * GIB)
    gpu = device("CUDA0", "NVIDIA GB10", 114 * GIB, 122 * GIB)
    machine = machine_with(tmp_path, gpu, files=files, arch="aarch64")
    assert machine.devices == (
        Device("CUDA0", "NVIDIA GB10", "gpu", 110 * GIB, 119 * GIB, True, "CUDA", 273e9),
    )


def test_strix_halo_leaves_the_system_two_gib(tmp_path):
    files = meminfo(125 * GIB, 80 * GIB) | amd_card(512 * MIB, 96 * GIB, gtt_used=GIB)
    name = "Radeon 8060S Graphics (RADV GFX1151)"
    gpu = device("Vulkan0", name, 96 * GIB, 96 * GIB, kind="igpu")
    machine = machine_with(tmp_path, gpu, files=files, libraries=VULKAN)
    expected = Device("Vulkan0", name, "igpu", 78 * GIB, 96 * GIB, True, "Vulkan", 256e9)
    assert machine.devices == (expected,)


def test_strix_halo_is_bound_by_what_the_kernel_still_gives(tmp_path):
    files = meminfo(125 * GIB, 120 * GIB) | amd_card(512 * MIB, 96 * GIB, gtt_used=90 * GIB)
    gpu = device("Vulkan0", "Radeon 8060S", 90 * GIB, 96 * GIB, kind="igpu")
    machine = machine_with(tmp_path, gpu, files=files, libraries=VULKAN)
    assert machine.devices[0].free_bytes == 6 * GIB


def test_rocm_names_strix_halo_like_a_card_but_the_kernel_knows(tmp_path):
    cpuinfo = {"/proc/cpuinfo": "model name\t: AMD RYZEN AI MAX+ 395 w/ Radeon 8060S\n"}
    files = meminfo(125 * GIB, 100 * GIB) | amd_card(512 * MIB, 118 * GIB) | cpuinfo
    # As seen in the field: more free than there is.
    gpu = device("ROCm0", "AMD Radeon Graphics", 121 * GIB, 117 * GIB)
    (found,) = machine_with(tmp_path, gpu, files=files, libraries=("base", "hip")).devices
    assert found.shares_host_memory
    assert (found.free_bytes, found.total_bytes) == (98 * GIB, 117 * GIB)
    assert found.bandwidth_bytes_s == 256e9


def test_a_large_carve_out_is_memory_of_its_own(tmp_path):
    files = meminfo(31 * GIB, 28 * GIB) | amd_card(96 * GIB, 15 * GIB, vram_used=GIB)
    gpu = device("Vulkan0", "Radeon 8060S", 110 * GIB, 111 * GIB, kind="igpu")
    (found,) = machine_with(tmp_path, gpu, files=files, libraries=VULKAN).devices
    assert not found.shares_host_memory
    assert (found.free_bytes, found.total_bytes) == (95 * GIB, 96 * GIB)


def test_a_carve_out_on_windows_is_told_by_its_size(tmp_path):
    gpu = device("Vulkan0", "AMD Radeon(TM) 8060S Graphics", 110 * GIB, 112 * GIB, kind="igpu")
    memory = {"host_memory": lambda: (32 * GIB, 26 * GIB)}
    (found,) = machine_with(
        tmp_path, gpu, files={}, libraries=VULKAN, platform="win32", **memory
    ).devices
    assert not found.shares_host_memory
    assert (found.free_bytes, found.total_bytes) == (94 * GIB, 96 * GIB)


def test_an_amd_card_does_not_share(tmp_path):
    files = PC | amd_card(24 * GIB, 16 * GIB)
    gpu = device("ROCm0", "AMD Radeon RX 7900 XTX", 22 * GIB, 24 * GIB)
    (found,) = machine_with(tmp_path, gpu, files=files, libraries=("base", "hip")).devices
    assert not found.shares_host_memory
    assert (found.free_bytes, found.bandwidth_bytes_s) == (22 * GIB, 960e9)


def test_a_small_amd_card_is_still_a_card(tmp_path):
    files = PC | amd_card(4 * GIB, 16 * GIB)
    gpu = device("Vulkan0", "AMD Radeon RX 6400 (RADV NAVI24)", 3 * GIB, 4 * GIB)
    (found,) = machine_with(tmp_path, gpu, files=files, libraries=VULKAN).devices
    assert not found.shares_host_memory
    assert found.free_bytes == 3 * GIB


def test_vulkan_without_a_budget_is_corrected_by_the_kernel(tmp_path):
    files = PC | amd_card(24 * GIB, 16 * GIB, vram_used=5 * GIB)
    gpu = device("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 24 * GIB, 24 * GIB)
    machine = machine_with(tmp_path, gpu, files=files, libraries=VULKAN)
    assert machine.devices[0].free_bytes == 19 * GIB
    assert machine.notes == ()


def test_vulkan_without_a_budget_is_corrected_by_nvidia_smi(tmp_path):
    gpu = device("Vulkan0", "NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB)
    smi = {"nvidia-smi": "0, NVIDIA GeForce RTX 4090, 24564, 20000\n"}
    machine = machine_with(tmp_path, gpu, libraries=VULKAN, commands=smi)
    assert machine.devices[0].free_bytes == 20000 * MIB


def test_of_equal_cards_the_fullest_counts_where_vulkan_does_not_tell(tmp_path):
    files = PC | amd_card(24 * GIB, 1) | amd_card(24 * GIB, 1, vram_used=8 * GIB, card="card1")
    names = ("Vulkan0", "Vulkan1")
    gpus = [device(name, "AMD Radeon RX 7900 XTX", 24 * GIB, 24 * GIB) for name in names]
    machine = machine_with(tmp_path, *gpus, files=files, libraries=VULKAN)
    assert [gpu.free_bytes for gpu in machine.devices] == [16 * GIB] * 2


def test_vulkan_without_a_budget_and_without_a_witness_is_noted(tmp_path):
    gpu = device("Vulkan0", "Intel(R) Arc(TM) A770 Graphics", 16 * GIB, 16 * GIB)
    machine = machine_with(tmp_path, gpu, libraries=VULKAN)
    assert machine.devices[0].bandwidth_bytes_s == 560e9
    assert machine.notes == ("Vulkan0 does not tell how much of its memory other programs use",)


@pytest.mark.parametrize(
    "name",
    [
        "AMD Radeon 780M Graphics (RADV PHOENIX)",
        "AMD Radeon(TM) 890M Graphics",
        "Intel(R) Iris(R) Xe Graphics",
        "Intel(R) Arc(TM) Graphics",
        "Intel(R) Arc(TM) 140V GPU (16GB)",
        "Intel(R) UHD Graphics 620",
        "Qualcomm Adreno X1-85",
        "NVIDIA Jetson AGX Orin",
    ],
)
def test_gpus_of_processors_are_known_by_name_where_the_type_does_not_say(tmp_path, name):
    (gpu,) = machine_with(tmp_path, device("X0", name, 20 * GIB, 28 * GIB)).devices
    assert gpu.shares_host_memory


@pytest.mark.parametrize(
    "name", ["Intel(R) Arc(TM) B580 Graphics", "AMD Radeon RX 6800", "NVIDIA GeForce RTX 2080"]
)
def test_cards_do_not_share(tmp_path, name):
    (gpu,) = machine_with(tmp_path, device("X0", name, 7 * GIB, 8 * GIB)).devices
    assert not gpu.shares_host_memory


def test_wsl_is_noted_and_its_card_is_used(tmp_path):
    release = {"/proc/sys/kernel/osrelease": "5.15.167.4-microsoft-standard-WSL2\n"}
    gpu = device("CUDA0", "NVIDIA GeForce RTX 4070", 10 * GIB, 12 * GIB)
    machine = machine_with(tmp_path, gpu, files=meminfo(15 * GIB, 13 * GIB) | release)
    assert machine.devices[0].bandwidth_bytes_s == 504e9
    assert machine.notes == ("this is WSL: its RAM is what Windows lends it",)


@pytest.mark.parametrize(
    "group",
    [
        {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n"},
        {
            "/proc/self/cgroup": "4:memory:/docker/abc/inner\n",
            "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{4 * GIB}\n",
        },
    ],
    ids=["v2", "v1 ancestor"],
)
def test_a_small_container_on_a_large_host(tmp_path, group):
    files = meminfo(64 * GIB, 50 * GIB) | group
    gpu = device("CUDA0", "NVIDIA GB10", 50 * GIB, 64 * GIB)
    machine = machine_with(tmp_path, gpu, files=files)
    assert machine.memory.total_bytes == machine.memory.available_bytes == 4 * GIB
    assert machine.devices[0].total_bytes == 4 * GIB
    assert machine.notes == ("a limit gives this process 4.29 GB of the machine's 68.7 GB",)


VM_STAT = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free: {}.\n"


def mac(tmp_path: Path, chip: str, ram_gib: int, available: int, *listed, libraries=None, **more):
    lines = [
        f"hw.memsize: {ram_gib * GIB}",
        "hw.logicalcpu: 8",
        "hw.physicalcpu: 8",
        f"machdep.cpu.brand_string: {chip}",
        "hw.optional.arm64: 1",
        "hw.optional.arm.FEAT_DotProd: 1",
    ]
    commands = {"sysctl": "\n".join(lines), "vm_stat": VM_STAT.format(available // 16384)}
    return fake_probe(
        tmp_path,
        commands=commands,
        platform="darwin",
        arch="arm64",
        libraries=libraries or ("base", "cpu", "metal", "blas"),
        child=answer(*listed),
        **more,
    )


@pytest.mark.parametrize(
    ("chip", "ram_gib", "limit", "available", "bandwidth"),
    [
        ("Apple M1", 8, 5461 * MIB, 5 * GIB, 68e9),
        ("Apple M2", 16, 10922 * MIB, 12 * GIB, 100e9),
        ("Apple M3 Pro", 36, 27648 * MIB, 20 * GIB, 150e9),
        ("Apple M4 Max", 64, 51 * GIB, 60 * GIB, 546e9),
        ("Apple M4 Max", 36, 27 * GIB, 30 * GIB, 410e9),
    ],
)
def test_macs(tmp_path, chip, ram_gib, limit, available, bandwidth):
    metal = device("MTL0", chip, limit, limit, backend="MTL")
    machine = detect_machine(mac(tmp_path, chip, ram_gib, available, metal), devices=True)
    assert machine.devices == (
        Device("MTL0", chip, "gpu", min(limit, available), limit, True, "Metal", bandwidth),
    )
    assert machine.cpu.features == ("NEON", "DOTPROD")


def test_a_mac_that_is_not_asked_guesses_as_much(tmp_path):
    machine = detect_machine(mac(tmp_path, "Apple M2", 16, 12 * GIB))
    (metal,) = machine.devices
    assert (metal.name, metal.backend, metal.total_bytes) == ("MTL0", "Metal", 16 * GIB * 2 // 3)


def test_a_mac_with_a_cpu_build_has_no_gpu(tmp_path):
    probe = mac(tmp_path, "Apple M2", 16, 12 * GIB, libraries=("base", "cpu"))
    assert detect_machine(probe).devices == ()
    assert detect_machine(probe, devices=True).devices == ()


def test_an_intel_macs_card_does_not_share(tmp_path):
    probe = fake_probe(
        tmp_path,
        commands={"sysctl": f"hw.memsize: {16 * GIB}\n"},
        platform="darwin",
        libraries=("base", "metal"),
        child=answer(device("MTL0", "AMD Radeon Pro 5500M", 7 * GIB, 8 * GIB, backend="MTL")),
    )
    assert not detect_machine(probe, devices=True).devices[0].shares_host_memory

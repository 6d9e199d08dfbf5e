"""What is wrong on a machine, and the command that mends it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.hardware.advice import Problem, find_problems
from llmrun.hardware.engine_devices import ask_engine
from llmrun.hardware.install import find_cuda_wheels, name_gfx_target, write_build_command
from llmrun.hardware.probe import detect_machine
from llmrun.hardware.processes import Reply
from tests.fakes.probes import GIB, MIB, Child, amd_card, answer, device, fake_probe, meminfo

PC = meminfo(32 * GIB, 24 * GIB)
AVX2 = {"/proc/cpuinfo": "model name\t: x\nflags\t: pni avx avx2 fma f16c\n"}
SMI = "nvidia-smi --query-gpu=index,name,memory.total,memory.free --format=csv,noheader,nounits"
CARD = "0, NVIDIA GeForce RTX 4090, 24564, 23000\n"
GREETING = "| NVIDIA-SMI 550.54.14    Driver Version: 550.54.14    CUDA Version: {}     |\n"
BUILD = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
CUDA_BUILD = f'CMAKE_ARGS="-DGGML_CUDA=on" {BUILD}'


def nvidia(cuda: str = "12.4", cards: str = CARD, **more: str) -> dict[str, str]:
    return {SMI: cards, "nvidia-smi": GREETING.format(cuda)} | more


def problems_of(tmp_path: Path, files=PC, *, child=None, **changes) -> tuple[Problem, ...]:
    probe = fake_probe(tmp_path, files, child=child or answer(), **changes)
    return find_problems(detect_machine(probe, devices=True), probe)


def problem_of(tmp_path: Path, files=PC, **changes) -> Problem:
    (problem,) = problems_of(tmp_path, files, **changes)
    return problem


def test_a_machine_with_nothing_wrong(tmp_path):
    assert problems_of(tmp_path, PC | AVX2) == ()


def test_a_gpu_that_is_used_is_no_problem(tmp_path):
    gpu = device("CUDA0", "NVIDIA GeForce RTX 4090", 23 * GIB, 24 * GIB)
    changes = {"child": answer(gpu), "libraries": ("base", "cpu", "cuda"), "commands": nvidia()}
    assert problems_of(tmp_path, **changes) == ()


def test_an_nvidia_card_that_vulkan_uses_is_no_problem(tmp_path):
    gpu = device("Vulkan0", "NVIDIA GeForce RTX 4090", 23 * GIB, 24 * GIB)
    changes = {"child": answer(gpu), "libraries": ("base", "cpu", "vulkan"), "commands": nvidia()}
    assert problems_of(tmp_path, **changes) == ()


def test_an_nvidia_card_and_a_cpu_build(tmp_path):
    problem = problem_of(tmp_path, commands=nvidia())
    assert problem.what == (
        "NVIDIA GeForce RTX 4090 is there, but this build of llama.cpp cannot use it"
    )
    assert "built without CUDA" in problem.why
    assert "nvcc" not in problem.hint
    assert "CUDA toolkit" in problem.why
    assert "index cu124" in problem.why
    assert problem.hint == CUDA_BUILD
    assert problem.severity == "problem"


def test_the_toolkit_is_not_missed_where_it_is(tmp_path):
    problem = problem_of(tmp_path, commands=nvidia(nvcc="release 12.4"))
    assert "toolkit" not in problem.why


def test_the_command_is_for_the_shell_of_the_platform(tmp_path):
    memory = {"host_memory": lambda: (32 * GIB, 24 * GIB)}
    problem = problem_of(
        tmp_path, {}, commands=nvidia("13.1"), platform="win32", arch="AMD64", **memory
    )
    assert problem.hint == f'$env:CMAKE_ARGS="-DGGML_CUDA=on"; {BUILD}'
    assert "index cu130" in problem.why


def test_there_are_no_cuda_wheels_for_arm(tmp_path):
    spark = nvidia("13.0", "0, NVIDIA GB10, [Not Supported], [Not Supported]\n")
    problem = problem_of(tmp_path, commands=spark, arch="aarch64")
    assert problem.what.startswith("NVIDIA GB10 is there")
    assert "index" not in problem.why


def test_several_cards_are_counted(tmp_path):
    cards = CARD + "1, NVIDIA GeForce RTX 3060, 12288, 12000\n"
    assert "(and 1 more)" in problem_of(tmp_path, commands=nvidia(cards=cards)).what


def test_a_cuda_build_that_sees_no_card(tmp_path):
    problem = problem_of(tmp_path, commands=nvidia("12.2"), libraries=("base", "cpu", "cuda"))
    assert "does not see it" in problem.what
    assert "550.54.14 supports CUDA up to 12.2" in problem.why
    assert problem.hint == CUDA_BUILD


@pytest.mark.parametrize("value", ["", "-1"])
def test_a_hidden_card(tmp_path, value):
    environ = {"CUDA_VISIBLE_DEVICES": value}
    problem = problem_of(
        tmp_path, commands=nvidia(), environ=environ, libraries=("base", "cpu", "cuda")
    )
    assert problem.hint == "unset CUDA_VISIBLE_DEVICES"


def test_a_driver_that_is_too_old(tmp_path):
    problem = problem_of(tmp_path, commands=nvidia("11.4"))
    assert "too old" in problem.what
    assert "11.4" in problem.why


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "again"),
        (
            "Failed to initialize NVML: Driver/library version mismatch",
            "restart the machine: the driver",
        ),
    ],
)
def test_a_sick_driver(tmp_path, text, hint):
    problem = problem_of(tmp_path, commands={"nvidia-smi": text})
    assert problem.what == "the NVIDIA driver does not work"
    assert text in problem.why
    assert hint in problem.hint


PCI = {
    "/sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "/sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
}


def test_a_card_without_a_driver(tmp_path):
    problem = problem_of(tmp_path, PC | PCI)
    assert problem.what == "there is an NVIDIA GPU without its driver"
    assert "install NVIDIA's driver" in problem.hint


def test_a_card_that_a_container_was_not_given(tmp_path):
    assert "--gpus all" in problem_of(tmp_path, PC | PCI | {"/.dockerenv": ""}).hint


def test_the_sound_device_of_a_card_is_no_card(tmp_path):
    sound = {path: text.replace("0x0300", "0x0403") for path, text in PCI.items()}
    assert problems_of(tmp_path, PC | sound) == ()


def test_an_amd_card_without_rocm_gets_vulkan(tmp_path):
    problem = problem_of(tmp_path, PC | amd_card(24 * GIB, 16 * GIB))
    assert problem.hint == f'CMAKE_ARGS="-DGGML_VULKAN=on" {BUILD}'
    assert "index vulkan" in problem.why


def test_an_amd_card_with_rocm_gets_its_target(tmp_path):
    node = "/sys/class/kfd/kfd/topology/nodes"
    files = amd_card(24 * GIB, 16 * GIB) | {
        "/opt/rocm/bin/hipcc": "",
        f"{node}/0/properties": "cpu_cores_count 16\ngfx_target_version 0\n",
        f"{node}/1/properties": "simd_count 96\ngfx_target_version 110000\n",
    }
    problem = problem_of(tmp_path, PC | files)
    expected = '"-DGGML_HIP=on -DAMDGPU_TARGETS=gfx1100"'
    assert problem.hint == f"CMAKE_ARGS={expected} {BUILD}"


def test_a_processors_own_amd_gpu_is_only_advice(tmp_path):
    problem = problem_of(tmp_path, PC | amd_card(512 * MIB, 16 * GIB))
    assert problem.severity == "advice"


def test_an_amd_card_that_the_user_may_not_open(tmp_path, monkeypatch):
    files = PC | amd_card(24 * GIB, 16 * GIB) | {"/dev/dri/renderD128": "", "/dev/dri/card0": ""}
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("renderD128"))
    problem = problem_of(tmp_path, files, libraries=("base", "cpu", "vulkan"))
    assert problem.why == "/dev/dri/renderD128 cannot be opened"
    assert problem.hint.startswith("sudo usermod -aG render,video")


def test_an_amd_card_without_a_vulkan_driver(tmp_path):
    files = PC | amd_card(24 * GIB, 16 * GIB) | {"/dev/dri/renderD128": ""}
    problem = problem_of(tmp_path, files, libraries=("base", "cpu", "vulkan"))
    assert "llama.cpp does not see it" in problem.what


def intel(slot: str) -> dict[str, str]:
    folder = "/sys/class/drm/card1/device"
    return PC | {
        f"{folder}/vendor": "0x8086\n",
        f"{folder}/uevent": f"DRIVER=xe\nPCI_SLOT_NAME={slot}\n",
    }


def test_an_intel_card(tmp_path):
    problem = problem_of(tmp_path, intel("0000:03:00.0"))
    assert "-DGGML_VULKAN=on" in problem.hint


def test_an_intel_card_with_oneapi(tmp_path):
    files = intel("0000:03:00.0") | {"/opt/intel/oneapi/setvars.sh": ""}
    assert "-DGGML_SYCL=on -DCMAKE_C_COMPILER=icx" in problem_of(tmp_path, files).hint


def test_a_processors_own_intel_gpu_is_not_worth_a_word(tmp_path):
    assert problems_of(tmp_path, intel("0000:00:02.0")) == ()


MAC = f"hw.memsize: {16 * GIB}\nhw.optional.arm64: 1\nmachdep.cpu.brand_string: Apple M2\n"


def mac(tmp_path: Path, **changes) -> tuple[Problem, ...]:
    fields = {"platform": "darwin", "arch": "arm64", "commands": {"sysctl": MAC}}
    fields["host_memory"] = lambda: (16 * GIB, 10 * GIB)
    return problems_of(tmp_path, {}, **(fields | changes))


def test_a_mac_without_metal(tmp_path):
    (problem,) = mac(tmp_path)
    assert problem.hint == f'CMAKE_ARGS="-DGGML_METAL=on" {BUILD}'


def test_a_mac_with_metal(tmp_path):
    gpu = device("MTL0", "Apple M2", 10 * GIB, 10 * GIB, backend="MTL")
    assert mac(tmp_path, libraries=("base", "cpu", "metal"), child=answer(gpu)) == ()


def test_a_python_in_rosetta(tmp_path):
    (problem,) = mac(tmp_path, arch="x86_64")
    assert "Rosetta" in problem.what


def test_a_build_without_simd(tmp_path):
    problem = problem_of(tmp_path, PC | AVX2, child=answer(features=[]))
    assert "several times slower" in problem.what
    assert "without AVX2" in problem.why
    assert problem.hint == f'CMAKE_ARGS="-DGGML_NATIVE=on" {BUILD}'


def test_a_build_without_simd_keeps_its_gpu_and_loses_the_epoch(tmp_path):
    gpu = device("CUDA0", "NVIDIA GeForce RTX 4090", 23 * GIB, 24 * GIB)
    problem = problem_of(
        tmp_path,
        PC | AVX2,
        child=answer(gpu, features=["SSE3"]),
        libraries=("base", "cpu", "cuda"),
        commands=nvidia(),
        environ={"SOURCE_DATE_EPOCH": "0"},
    )
    assert "as it is here" in problem.why
    expected = 'env -u SOURCE_DATE_EPOCH CMAKE_ARGS="-DGGML_CUDA=on -DGGML_NATIVE=on"'
    assert problem.hint == f"{expected} {BUILD}"


def test_a_processor_without_avx2_misses_nothing(tmp_path):
    old = {"/proc/cpuinfo": "flags\t: pni ssse3\n"}
    assert problems_of(tmp_path, PC | old, child=answer(features=["SSE3"])) == ()


def test_the_binding_is_missing(tmp_path):
    problem = problem_of(tmp_path, libraries=None, commands=nvidia())
    assert problem.what == "llama-cpp-python is not installed"
    assert problem.hint == BUILD


def test_the_library_crashes(tmp_path):
    child = Reply("", "was ended by SIGILL")
    problem = problem_of(tmp_path, child=child, libraries=("base", "cpu", "cuda"))
    assert "SIGILL" in problem.why
    assert problem.hint == CUDA_BUILD


def test_a_small_container(tmp_path):
    files = meminfo(64 * GIB, 50 * GIB) | {
        "/.dockerenv": "",
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
    }
    problem = problem_of(tmp_path, files)
    assert problem.what == "a limit gives this process 4.29 GB of the machine's 68.7 GB"
    assert problem.hint == "docker update --memory 32g --memory-swap -1 CONTAINER"
    assert problem.severity == "advice"


def test_wsl_says_where_its_limit_is(tmp_path):
    problem = problem_of(tmp_path, PC | {"/proc/sys/kernel/osrelease": "x-Microsoft-y"})
    assert ".wslconfig" in problem.hint


@pytest.mark.parametrize(
    ("available", "swap_free", "n_problems"), [(2, 0, 1), (20, 0, 0), (2, 8, 0)]
)
def test_swap_counts_where_memory_is_short(tmp_path, available, swap_free, n_problems):
    files = meminfo(32 * GIB, available * GIB, SwapTotal=8 * GIB, SwapFree=swap_free * GIB)
    assert len(problems_of(tmp_path, files)) == n_problems


def test_unreadable_memory(tmp_path):
    assert "cannot be read" in problem_of(tmp_path, {}).what


def test_a_cache_that_is_not_shared(tmp_path):
    problem = problem_of(tmp_path, environ={"LLAMA_CACHE": "/models\x1b", "HOME": "/home/me"})
    assert problem.what == "LLAMA_CACHE is set: /models\\x1b"
    assert problem.hint == "unset LLAMA_CACHE"


@pytest.mark.parametrize(
    "environ",
    [
        {"HF_HUB_CACHE": "/models"},
        {"HF_HOME": "/", "LLAMA_CACHE": "/hub"},
        {"XDG_CACHE_HOME": "/c", "LLAMA_CACHE": "/c/huggingface/hub"},
        {"HOME": "/home/me", "LLAMA_CACHE": "/home/me/.cache/huggingface/hub"},
    ],
)
def test_a_cache_that_is_the_shared_one(tmp_path, environ):
    assert problems_of(tmp_path, environ={"LLAMA_CACHE": "/models"} | environ) == ()


def test_a_library_from_elsewhere(tmp_path):
    problem = problem_of(tmp_path, environ={"LLAMA_CPP_LIB_PATH": "/build"})
    assert problem.hint == "unset LLAMA_CPP_LIB_PATH"


def test_problems_come_before_advice(tmp_path):
    found = problems_of(tmp_path, commands=nvidia(), environ={"LLAMA_CACHE": "/x"})
    assert [problem.severity for problem in found] == ["problem", "advice"]


def test_an_engine_that_was_asked_is_not_asked_again(tmp_path):
    child = Child(answer())
    probe = fake_probe(tmp_path, PC, child=child)
    report = ask_engine(probe, always=True)
    find_problems(detect_machine(probe), probe, engine=report)
    assert len(child.requests) == 1


def test_no_sentence_ends_with_a_full_stop_or_names_nothing(tmp_path):
    files = PC | PCI | AVX2 | amd_card(24 * GIB, 16 * GIB) | intel("0000:03:00.0")
    environ = {"LLAMA_CACHE": "/x", "LLAMA_CPP_LIB_PATH": "/y"}
    found = problems_of(tmp_path, files, child=answer(features=[]), environ=environ)
    assert len(found) == 6
    for problem in found:
        for words in (problem.what, problem.why, problem.hint):
            assert words
            assert not words.endswith(".")


@pytest.mark.parametrize(
    ("cuda", "name"),
    [
        ((11, 4), None),
        ((11, 8), "cu118"),
        ((12, 0), "cu118"),
        ((12, 3), "cu123"),
        ((12, 9), "cu125"),
        ((13, 1), "cu130"),
        ((14, 0), "cu132"),
    ],
)
def test_wheels_by_the_drivers_cuda(cuda, name):
    assert find_cuda_wheels(cuda, "x86_64") == name
    assert find_cuda_wheels(cuda, "aarch64") is None


@pytest.mark.parametrize(
    ("number", "name"),
    [(110000, "gfx1100"), (110501, "gfx1151"), (90010, "gfx90a"), (100306, "gfx1036"), (0, None)],
)
def test_amd_targets(number, name):
    assert name_gfx_target(number) == name


def test_build_commands():
    assert write_build_command("linux") == BUILD
    assert write_build_command("win32") == BUILD
    assert write_build_command("win32", "-Dx", without_epoch=True) == (
        f'Remove-Item Env:SOURCE_DATE_EPOCH; $env:CMAKE_ARGS="-Dx"; {BUILD}'
    )


@settings(max_examples=60)
@given(st.text(), st.text(), st.sampled_from(["linux", "win32", "darwin"]), st.booleans())
def test_garbage_from_drivers_is_survived(one, other, platform, has_cuda):
    commands = {SMI: CARD + one, "nvidia-smi": other, "sysctl": one, "vm_stat": other, "nvcc": one}
    probe = fake_probe(
        Path("/nowhere-at-all"),
        commands=commands,
        platform=platform,
        libraries=None,
        child=Reply(one),
        library_folder=(lambda: Path("/nowhere")) if has_cuda else (lambda: None),
    )
    for problem in find_problems(detect_machine(probe, devices=True), probe):
        assert problem.what
        assert problem.hint


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(sorted({*PCI, *amd_card(1, 1), *intel("x"), *AVX2})),
        st.text(alphabet=st.characters(codec="utf-8")),
    )
)
def test_garbage_from_the_kernel_is_survived(tmp_path_factory, files):
    probe = fake_probe(tmp_path_factory.mktemp("root"), files, child=answer())
    find_problems(detect_machine(probe, devices=True), probe)

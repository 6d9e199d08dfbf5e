"""Macs, Windows and GPUs, from canned command output; threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmrun.hardware.machine import Cpu, Device, Machine, Memory
from llmrun.hardware.probe import Probe, detect_devices, detect_machine
from llmrun.hardware.processes import run_command
from llmrun.hardware.threads import choose_threads

GIB = 1 << 30
MIB = 1 << 20
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               65536.
Pages active:                            200000.
Pages inactive:                          131072.
Pages speculative:                        65536.
Pages throttled:                              0.
"File-backed pages":                        123.
"""
M2 = """hw.memsize: 17179869184
hw.logicalcpu: 8
hw.physicalcpu: 8
hw.perflevel0.physicalcpu: 4
iogpu.wired_limit_mb: 0
machdep.cpu.brand_string: Apple M2
"""
NVIDIA = "nvidia-smi"


def make_probe(outputs: dict[str, str], platform: str, arch: str, **changes) -> Probe:
    fields = {
        "root": Path("/nonexistent-root-of-a-test"),
        "platform": platform,
        "arch": arch,
        "run": lambda command, timeout_s: outputs.get(command[0]),
        "n_logical": lambda: 8,
        "affinity": lambda: None,
        "host_memory": lambda: None,
        "n_physical": lambda: None,
    }
    return Probe(**(fields | changes))


def mac(sysctl: str, vm_stat: str | None = VM_STAT, arch: str = "arm64", **changes) -> Machine:
    outputs = {"sysctl": sysctl} | ({"vm_stat": vm_stat} if vm_stat is not None else {})
    return detect_machine(make_probe(outputs, "darwin", arch, **changes))


def test_apple_silicon():
    machine = mac(M2)
    assert machine.cpu == Cpu(8, 8, 8, None, n_performance=4, name="Apple M2")
    assert machine.memory == Memory(16 * GIB, 4 * GIB)
    assert machine.name == "Apple M2"
    (metal,) = machine.devices
    assert metal.shares_host_memory
    assert metal.total_bytes == 16 * GIB * 2 // 3
    assert metal.free_bytes == 4 * GIB


def test_instruction_sets_of_macs():
    silicon = "hw.optional.arm64: 1\nhw.optional.arm.FEAT_I8MM: 1\nhw.optional.arm.FEAT_SME: 0\n"
    assert mac(M2 + silicon).cpu.features == ("NEON", "MATMUL_INT8")
    intel = (
        "machdep.cpu.features: FPU SSE3 AVX1.0 FMA F16C\n"
        "machdep.cpu.leaf7_features: BMI2 AVX2 AVX512F\n"
    )
    expected = ("SSE3", "AVX", "AVX2", "F16C", "FMA", "BMI2", "AVX512")
    assert mac(M2 + intel, arch="x86_64").cpu.features == expected


def test_a_large_mac_gives_its_gpu_three_quarters():
    machine = mac(M2.replace("17179869184", str(64 * GIB)))
    assert machine.devices[0].total_bytes == 48 * GIB
    machine = mac(M2.replace("17179869184", str(36 * GIB)))
    assert machine.devices[0].total_bytes == 27 * GIB


def test_the_wired_limit_of_the_owner_wins():
    machine = mac(M2.replace("wired_limit_mb: 0", "wired_limit_mb: 14336"))
    assert machine.devices[0].total_bytes == 14 * GIB


def test_an_intel_mac_has_no_metal_pool_and_no_performance_cores():
    text = "hw.memsize: 8589934592\nhw.logicalcpu: 8\nhw.physicalcpu: 4\n"
    machine = mac(text, arch="x86_64")
    assert machine.devices == ()
    assert machine.cpu == Cpu(8, 8, 4)


def test_a_mac_without_vm_stat_asks_psutil():
    machine = mac(M2, vm_stat=None, host_memory=lambda: (16 * GIB, 5 * GIB))
    assert machine.memory == Memory(16 * GIB, 5 * GIB)


def test_a_mac_that_answers_nothing():
    machine = mac("", vm_stat="")
    assert not machine.memory.is_known
    assert machine.cpu == Cpu(8, 8, 8)
    assert machine.devices == ()


def test_windows_by_psutil():
    probe = make_probe(
        {},
        "win32",
        "AMD64",
        n_logical=lambda: 16,
        n_physical=lambda: 8,
        affinity=lambda: frozenset(range(4)),
        host_memory=lambda: (32 * GIB, 20 * GIB),
    )
    machine = detect_machine(probe)
    assert machine.cpu == Cpu(16, 4, 2)
    assert machine.memory == Memory(32 * GIB, 20 * GIB)


def test_windows_without_psutil():
    machine = detect_machine(make_probe({}, "win32", "AMD64"))
    assert machine.cpu == Cpu(8, 8, 8)
    assert machine.memory.limit_source == "unknown"


HOST = Machine(Cpu(8, 8, 8), Memory(128 * GIB, 100 * GIB))


def nvidia(text: str | None) -> tuple[Device, ...]:
    outputs = {} if text is None else {NVIDIA: text}
    return detect_devices(HOST, make_probe(outputs, "win32", "AMD64"))


def test_nvidia_cards():
    devices = nvidia(
        "0, NVIDIA GeForce RTX 4090, 24564, 23000\n1, NVIDIA GeForce RTX 3060, 12288, 12000\n"
    )
    assert devices == (
        Device("CUDA0", "NVIDIA GeForce RTX 4090", "gpu", 23000 * MIB, 24564 * MIB),
        Device("CUDA1", "NVIDIA GeForce RTX 3060", "gpu", 12000 * MIB, 12288 * MIB),
    )


def test_an_nvidia_gpu_without_own_memory_shares_the_ram():
    (device,) = nvidia("0, NVIDIA GB10, [N/A], [N/A]\n")
    assert device.shares_host_memory
    assert (device.free_bytes, device.total_bytes) == (100 * GIB, 128 * GIB)


@pytest.mark.parametrize(
    "text", [None, "", "NVIDIA-SMI has failed because it couldn't communicate, a, b, c\n", "0, x\n"]
)
def test_no_or_sick_nvidia_driver(text):
    assert nvidia(text) == ()


def drm(tmp_path: Path, cards: dict[str, dict[str, str]]) -> tuple[Device, ...]:
    for card, files in cards.items():
        folder = tmp_path / "sys/class/drm" / card / "device"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")
    return detect_devices(HOST, make_probe({}, "linux", "x86_64", root=tmp_path))


def test_an_amd_card(tmp_path):
    card = {
        "vendor": "0x1002",
        "mem_info_vram_total": str(24 * GIB),
        "mem_info_vram_used": str(GIB),
        "mem_info_gtt_total": str(32 * GIB),
        "mem_info_gtt_used": "0",
    }
    devices = drm(tmp_path, {"card1": card, "card1-DP-1": card, "renderD128": card})
    assert devices == (Device("card1", "AMD GPU", "gpu", 23 * GIB, 24 * GIB),)


def test_an_amd_processors_own_gpu_uses_ram(tmp_path):
    card = {
        "vendor": "0x1002",
        "mem_info_vram_total": str(GIB),
        "mem_info_gtt_total": str(120 * GIB),
        "mem_info_gtt_used": str(GIB),
    }
    (device,) = drm(tmp_path, {"card0": card})
    assert device == Device("card0", "AMD GPU", "igpu", 100 * GIB, 120 * GIB, True)


def test_a_gpu_that_tells_no_memory_has_none(tmp_path):
    (device,) = drm(tmp_path, {"card0": {"vendor": "0x8086"}})
    assert (device.free_bytes, device.total_bytes) == (0, 0)


def test_other_vendors_are_left_out(tmp_path):
    assert drm(tmp_path, {"card0": {"vendor": "0x10de"}, "card1": {}}) == ()


def test_commands_that_cannot_run_give_none():
    assert run_command(["llmrun-no-such-command"], 1.0) is None
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert run_command(sleeper, 0.05) is None
    failing = [sys.executable, "-c", "print('half'); raise SystemExit(3)"]
    assert run_command(failing, 30.0) == "half" + ("\r\n" if sys.platform == "win32" else "\n")


def test_the_real_machine_is_seen_without_heavy_imports():
    code = (
        "import sys\n"
        "from llmrun.hardware.probe import detect_machine\n"
        "machine = detect_machine()\n"
        "assert machine.cpu.n_physical >= 1\n"
        "assert machine.memory.total_bytes >= machine.memory.available_bytes > 0\n"
        "heavy = {'llama_cpp', 'numpy', 'huggingface_hub'}\n"
        "if sys.platform == 'linux':\n"
        "    heavy |= {'psutil', 'subprocess'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (Cpu(16, 16, 8), 8),
        (Cpu(16, 3, 2), 2),
        (Cpu(8, 8, 8, None, 4), 4),
        (Cpu(16, 16, 8, 2.9), 2),
        (Cpu(16, 16, 8, 0.5), 1),
        (Cpu(16, 16, 8, 64.0), 8),
        (Cpu(8, 8, 8, 3.0, 6), 3),
        (Cpu(1, 1, 1), 1),
    ],
)
def test_threads(cpu, expected):
    threads = choose_threads(cpu)
    assert (threads.n_threads, threads.n_threads_batch) == (expected, expected)
    assert str(expected) in threads.reasons[0]


def test_the_reason_names_what_bounded_the_threads():
    assert "quota is 1.5 cores" in choose_threads(Cpu(8, 8, 8, 1.5)).reasons[0]
    assert "performance" in choose_threads(Cpu(8, 8, 8, None, 4)).reasons[0]
    assert "2 of 8 CPUs" in choose_threads(Cpu(8, 2, 2)).reasons[0]

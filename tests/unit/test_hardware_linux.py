"""Cores and memory of Linux machines, from fake /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrun.hardware.machine import Cpu, Memory
from llmrun.hardware.probe import Probe, detect_machine

GIB = 1 << 30
MEMINFO = "MemTotal: 67108864 kB\nMemFree: 1000 kB\nMemAvailable: 33554432 kB\nCached: 50 kB\n"


def never_run(command, timeout_s):
    raise AssertionError(f"no process may be started: {command}")


def make_probe(root: Path, files: dict[str, str], *, n_logical=4, affinity=None, **changes):
    for path, text in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    fields = {
        "root": root,
        "platform": "linux",
        "arch": "x86_64",
        "run": never_run,
        "n_logical": lambda: n_logical,
        "affinity": lambda: affinity,
        "host_memory": lambda: None,
        "n_physical": lambda: None,
    }
    return Probe(**(fields | changes))


def memory_of(root: Path, files: dict[str, str]) -> Memory:
    return detect_machine(make_probe(root, {"/proc/meminfo": MEMINFO} | files)).memory


def cpu_of(root: Path, files: dict[str, str], **changes) -> Cpu:
    return detect_machine(make_probe(root, files, **changes)).cpu


def topology(siblings: dict[int, str]) -> dict[str, str]:
    return {
        f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text + "\n"
        for cpu, text in siblings.items()
    }


V2 = {"/proc/self/cgroup": "0::/user.slice/app.scope\n"}
V2_LEAF = "/sys/fs/cgroup/user.slice/app.scope"
V1_MOUNTS = (
    "30 25 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "31 25 0:31 /docker/abc /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
V1 = {
    "/proc/self/cgroup": "5:memory:/docker/abc/inner\n3:cpu,cpuacct:/docker/abc\n",
    "/proc/self/mountinfo": V1_MOUNTS,
}


def test_memory_is_what_the_kernel_calls_available(tmp_path):
    assert memory_of(tmp_path, {}) == Memory(64 * GIB, 32 * GIB, "system")


def test_memory_of_an_old_kernel_is_free_and_cached(tmp_path):
    old = "MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 20 kB\nCached: 300 kB\n"
    assert memory_of(tmp_path, {"/proc/meminfo": old}).available_bytes == 420 * 1024


def test_memory_limit_of_a_v2_group_counts_inactive_files_as_free(tmp_path):
    memory = memory_of(
        tmp_path,
        V2
        | {
            f"{V2_LEAF}/memory.max": f"{4 * GIB}\n",
            f"{V2_LEAF}/memory.high": "max\n",
            f"{V2_LEAF}/memory.current": f"{3 * GIB}\n",
            f"{V2_LEAF}/memory.stat": f"anon 5\ninactive_file {2 * GIB}\nactive_file 7\n",
        },
    )
    assert memory == Memory(4 * GIB, 3 * GIB, f"cgroup {V2_LEAF}")


def test_memory_limit_of_a_v2_ancestor_binds(tmp_path):
    memory = memory_of(
        tmp_path,
        V2
        | {
            f"{V2_LEAF}/memory.max": "max\n",
            "/sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}\n",
            "/sys/fs/cgroup/user.slice/memory.current": f"{GIB}\n",
        },
    )
    assert memory == Memory(8 * GIB, 7 * GIB, "cgroup /sys/fs/cgroup/user.slice")


def test_memory_high_of_v2_is_a_limit_too(tmp_path):
    limits = {f"{V2_LEAF}/memory.max": f"{8 * GIB}\n", f"{V2_LEAF}/memory.high": f"{2 * GIB}\n"}
    assert memory_of(tmp_path, V2 | limits).available_bytes == 2 * GIB


def test_memory_without_a_v2_limit_is_the_systems(tmp_path):
    limits = {f"{V2_LEAF}/memory.max": "max\n", f"{V2_LEAF}/memory.high": "max\n"}
    assert memory_of(tmp_path, V2 | limits).limit_source == "system"


def test_memory_limit_of_a_namespaced_v2_container(tmp_path):
    files = {"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": f"{GIB}\n"}
    assert memory_of(tmp_path, files) == Memory(GIB, GIB, "cgroup /sys/fs/cgroup")


def test_a_path_outside_the_namespace_reads_the_mount_itself(tmp_path):
    files = {
        "/proc/self/cgroup": "0::/../other\n",
        "/sys/fs/cgroup/memory.max": f"{GIB}\n",
        "/sys/fs/other/memory.max": "4096\n",
    }
    assert memory_of(tmp_path, files).total_bytes == GIB


def test_memory_limit_of_v1_below_the_mounts_root(tmp_path):
    inner = "/sys/fs/cgroup/memory/inner"
    memory = memory_of(
        tmp_path,
        V1
        | {
            f"{inner}/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
            "/sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
        },
    )
    assert memory == Memory(4 * GIB, 3 * GIB, "cgroup /sys/fs/cgroup/memory")


def test_an_overdrawn_limit_leaves_nothing(tmp_path):
    limits = {f"{V2_LEAF}/memory.max": "1000\n", f"{V2_LEAF}/memory.current": "5000\n"}
    assert memory_of(tmp_path, V2 | limits).available_bytes == 0


def test_without_proc_psutil_answers_and_without_it_nobody(tmp_path):
    known = make_probe(tmp_path, {}, host_memory=lambda: (100, 60))
    assert detect_machine(known).memory == Memory(100, 60, "system")
    unknown = detect_machine(make_probe(tmp_path, {})).memory
    assert unknown == Memory(0, 0, "unknown")
    assert not unknown.is_known


@pytest.mark.parametrize("text", ["", "garbage", "MemTotal:\n", "MemTotal: -5 kB\n", "\x00" * 40])
def test_broken_meminfo_is_survived(tmp_path, text):
    assert not memory_of(tmp_path, {"/proc/meminfo": text}).is_known


def test_cores_with_two_threads_count_once(tmp_path):
    files = topology({0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2,6", 3: "3,7"})
    cpu = cpu_of(tmp_path, files, n_logical=8, affinity=frozenset({0, 4, 1, 5}))
    assert cpu == Cpu(n_logical=8, n_affinity=4, n_physical=2)


def test_one_thread_of_each_core_in_the_mask_is_all_cores(tmp_path):
    files = topology({cpu: f"{cpu},{cpu + 4}" for cpu in range(4)})
    cpu = cpu_of(tmp_path, files, n_logical=8, affinity=frozenset(range(4)))
    assert (cpu.n_affinity, cpu.n_physical) == (4, 4)


def test_cores_come_from_cpuinfo_without_topology(tmp_path):
    blocks = [f"processor\t: {i}\nphysical id\t: 0\ncore id\t\t: {i % 2}\n" for i in range(4)]
    cpu = cpu_of(tmp_path, {"/proc/cpuinfo": "\n".join(blocks)})
    assert (cpu.n_affinity, cpu.n_physical) == (4, 2)


def test_cores_of_two_sockets_are_not_confused(tmp_path):
    blocks = [f"processor\t: {i}\nphysical id\t: {i}\ncore id\t\t: 0\n" for i in range(4)]
    assert cpu_of(tmp_path, {"/proc/cpuinfo": "\n".join(blocks)}).n_physical == 4


def test_without_proc_and_sys_each_thread_is_a_core(tmp_path):
    assert cpu_of(tmp_path, {}, n_logical=6) == Cpu(6, 6, 6)


def test_an_unknown_count_is_one(tmp_path):
    assert cpu_of(tmp_path, {}, n_logical=None) == Cpu(1, 1, 1)


def test_fast_cores_of_a_mixed_processor_are_found(tmp_path):
    siblings = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5"}
    files = topology(siblings) | {"/sys/devices/cpu_core/cpus": "0-3\n"}
    cpu = cpu_of(tmp_path, files, n_logical=6)
    assert (cpu.n_physical, cpu.n_performance) == (4, 2)


def test_quota_of_v2_is_the_smallest_of_the_ancestors(tmp_path):
    files = {
        f"{V2_LEAF}/cpu.max": "400000 100000\n",
        "/sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/cpu.max": "max 100000\n",
    }
    assert cpu_of(tmp_path, V2 | files).quota == 1.5


def test_quota_of_v1(tmp_path):
    folder = "/sys/fs/cgroup/cpu,cpuacct"
    files = {
        f"{folder}/docker/abc/cpu.cfs_quota_us": "250000\n",
        f"{folder}/docker/abc/cpu.cfs_period_us": "100000\n",
        f"{folder}/cpu.cfs_quota_us": "-1\n",
        f"{folder}/cpu.cfs_period_us": "100000\n",
    }
    assert cpu_of(tmp_path, V1 | files).quota == 2.5


@pytest.mark.parametrize("text", ["max 100000\n", "", "1\n", "100000 0\n", "-1 100000\n"])
def test_no_quota(tmp_path, text):
    assert cpu_of(tmp_path, V2 | {f"{V2_LEAF}/cpu.max": text}).quota is None


def test_name_and_instruction_sets_of_an_x86_processor(tmp_path):
    text = (
        "processor\t: 0\nmodel name\t: AMD Ryzen 7 7700X 8-Core Processor\n"
        "flags\t\t: fpu pni ssse3 fma avx f16c avx2 bmi2 avx512f avx512_vnni avx512vbmi\n\n"
        "processor\t: 1\nmodel name\t: another\nflags\t\t: amx_int8\n"
    )
    cpu = cpu_of(tmp_path, {"/proc/cpuinfo": text})
    assert cpu.name == "AMD Ryzen 7 7700X 8-Core Processor"
    expected = "SSE3 SSSE3 AVX AVX2 F16C FMA BMI2 AVX512 AVX512_VBMI AVX512_VNNI"
    assert cpu.features == tuple(expected.split())


def test_name_and_instruction_sets_of_an_arm_processor(tmp_path):
    files = {
        "/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp i8mm\n",
        "/sys/firmware/devicetree/base/model": "Raspberry Pi 5 Model B\x00",
    }
    cpu = cpu_of(tmp_path, files)
    assert cpu.name == "Raspberry Pi 5 Model B"
    assert cpu.features == ("NEON", "DOTPROD", "FP16_VA", "MATMUL_INT8")


def test_a_processors_name_cannot_drive_the_terminal(tmp_path):
    text = "model name\t: evil\x1b[31m" + "x" * 500
    name = cpu_of(tmp_path, {"/proc/cpuinfo": text}).name
    assert name.startswith("evil\\x1b[31mxx")
    assert len(name) == 200


def test_looking_at_linux_starts_no_process_and_asks_no_psutil(tmp_path):
    def never():
        raise AssertionError("psutil is not needed here")

    probe = make_probe(tmp_path, {"/proc/meminfo": MEMINFO}, host_memory=never, n_physical=never)
    machine = detect_machine(probe)
    assert machine.devices == ()
    assert machine.platform == "linux"

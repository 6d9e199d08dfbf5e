"""Memory bandwidth: the table, and measuring."""

from __future__ import annotations

import sys
from itertools import count

import pytest

from llmrun.hardware import bandwidth as module
from llmrun.hardware.bandwidth import bandwidth_of, measure_ram_bandwidth
from tests.fakes.probes import GIB, MIB


@pytest.mark.parametrize(
    ("description", "gb_s"),
    [
        ("NVIDIA GeForce RTX 4070", 504),
        ("NVIDIA GeForce RTX 4070 SUPER", 504),
        ("NVIDIA GeForce RTX 4070 Ti", 504),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 672),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 256),
        ("NVIDIA GeForce RTX 4080 SUPER", 736),
        ("NVIDIA GeForce RTX 3060 Ti", 448),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA A100-PCIE-40GB", 1555),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H200", 4800),
        ("Tesla T4", 320),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 1792),
        ("NVIDIA GB10", 273),
        ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 960),
        ("AMD Radeon RX 7900 XT", 800),
        ("AMD Instinct MI300X", 5300),
        ("Radeon 8060S Graphics (RADV GFX1151)", 256),
        ("AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", 256),
        ("Intel(R) Arc(TM) B580 Graphics", 456),
        ("Apple M1", 68),
        ("Apple M2 Ultra", 800),
        ("Apple M4 Pro", 273),
    ],
)
def test_known_names(description, gb_s):
    assert bandwidth_of(description) == gb_s * 1e9


@pytest.mark.parametrize(
    "description",
    [
        "",
        "RTX",
        "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
        "NVIDIA GeForce RTX 4070 Ti SUPER Mega",
        "NVIDIA GeForce RTX 40700",
        "NVIDIA Quadro RTX 6000 Max-Q",
        "AMD Radeon Graphics",
        "AMD Ryzen 7 5800X 8-Core Processor",
        "Apple M9",
        "Apple Paravirtual device",
        "Intel(R) UHD Graphics 620",
        "((((",
    ],
)
def test_other_names_are_not_guessed_at(description):
    assert bandwidth_of(description) is None


@pytest.mark.parametrize(
    ("description", "total", "gb_s"),
    [
        ("NVIDIA GeForce RTX 3060", 8 * GIB, 240),
        ("NVIDIA GeForce RTX 3060", 12035 * MIB, 360),
        ("NVIDIA GeForce RTX 3080", 10 * GIB, 760),
        ("NVIDIA GeForce RTX 3080", 12035 * MIB, 912),
        ("Apple M3 Max", 36 * GIB, 300),
        ("Apple M3 Max", 64 * GIB, 400),
        ("Apple M3 Max", 96 * GIB, 300),
        ("Apple M4 Max", 36 * GIB, 410),
        ("Apple M4 Max", 128 * GIB, 546),
        ("Apple M4 Max", 0, 410),
    ],
)
def test_versions_of_a_name_are_told_apart_by_size(description, total, gb_s):
    assert bandwidth_of(description, total) == gb_s * 1e9


def test_measuring_gives_a_rate():
    measured = measure_ram_bandwidth(0.02, n_threads=2)
    assert 1e7 < measured < 1e14


def test_measuring_stays_within_small_memory():
    assert measure_ram_bandwidth(0.01, n_threads=2, available_bytes=128 * MIB) > 0
    assert measure_ram_bandwidth(0.01, n_threads=2, available_bytes=16 * MIB) == 0.0


def test_measuring_without_numpy_gives_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert measure_ram_bandwidth() == 0.0


def test_measuring_without_memory_gives_nothing(monkeypatch):
    import numpy as np

    def refuse(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(np, "ones", refuse)
    assert measure_ram_bandwidth(n_threads=3) == 0.0


def test_other_programs_on_the_processor_do_not_slow_the_memory_down(monkeypatch):
    """The thread runs for 5 ms of the 100 ms in which it reads ten parts of 4 MiB."""
    wall, cpu = count(), count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(wall) * 0.01)
    monkeypatch.setattr(module.time, "thread_time", lambda: next(cpu) * 0.005)
    monkeypatch.setattr(module, "_HAS_FINE_CLOCK", True)
    n_read = 10 * 4 * MIB
    assert measure_ram_bandwidth(0.095, n_threads=1) == pytest.approx(n_read / 0.005)
    monkeypatch.setattr(module, "_HAS_FINE_CLOCK", False)
    assert measure_ram_bandwidth(0.095, n_threads=1) == pytest.approx(n_read / 0.1)

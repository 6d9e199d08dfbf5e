"""Runs of `bench` for tests of what is made of them."""

from __future__ import annotations

from dataclasses import replace

from llmrun.bench.types import Ablation, BenchRun, Measure, Unit

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m|`*_[x](http://h)\n\u202e\ufffe\uffff=1+1"


def measure(
    name: str, unit: Unit = "tok/s", *values: float, group: str = "generation", **how: int
) -> Measure:
    is_better = unit in ("tok/s", "share")
    return Measure(name, unit, values or (10.0, 10.1, 9.9), is_better, group, how)


def make_run(run_id: str = "20260131-142501-3fa9", factor: float = 1.0, **changes) -> BenchRun:
    """Everything that a bench can measure, `factor` times as fast as usual."""

    def about(value: float) -> tuple[float, ...]:
        return tuple(value * part for part in (0.99, 1.0, 1.02, 1.01, 0.98))

    speeds = [
        measure(name, "tok/s", *about(value * factor), group=group)
        for name, value, group in (
            ("pp128", 620.0, "prompt"),
            ("pp512", 705.0, "prompt"),
            ("pp512@4096", 420.0, "prompt"),
            ("tg128", 87.0, "generation"),
            ("tg128@4096", 52.0, "generation"),
            ("streams1", 80.0, "streams"),
            ("streams4", 190.0, "streams"),
            ("streams8", 262.0, "streams"),
        )
    ]
    times = [
        measure(name, unit, *about(value / factor), group=group)
        for name, unit, value, group in (
            ("ttft_cold", "s", 0.73, "latency"),
            ("ttft_warm", "s", 0.041, "latency"),
            ("itl_p50", "ms", 11.4, "latency"),
            ("itl_p99", "ms", 18.0, "latency"),
            ("load", "s", 0.31, "load"),
        )
    ]
    memory = [measure("memory_peak", "bytes", 412e6, group="memory")]
    ablations = (
        Ablation("prefix cache", "again", _work(1.0), _work(9.2)),
        Ablation("speculation", "edit", _work(87.0), _work(171.0)),
        Ablation("speculation", "new text", _work(87.0), _work(86.6)),
        Ablation("KV q8_0", "generation", _work(87.0), _work(60.0)),
    )
    run = BenchRun(
        id=run_id,
        started_at=1769869501.0,
        model="smollm2-135m",
        model_sha256="b179" * 16,
        quant="Q4_1",
        machine="A Machine, 2 cores",
        build="llama-cpp-python 0.3.36",
        target="engine",
        settings={"n_ctx": 8192, "flash_attn": "auto", "use_mmap": True, "seed": None},
        measures=(*speeds, *times, *memory),
        ablations=ablations,
    )
    return replace(run, **changes)


def hostile_run() -> BenchRun:
    """Text that means harm wherever there can be text."""
    bad = Measure(HOSTILE, "tok/s", (1.0, 2.0), True, HOSTILE, {HOSTILE: HOSTILE})
    return make_run(
        HOSTILE,
        model=HOSTILE,
        model_sha256=HOSTILE,
        quant=HOSTILE,
        machine=HOSTILE,
        build=HOSTILE,
        target=HOSTILE,
        settings={HOSTILE: HOSTILE},
        measures=(bad, measure("tg128"), measure("tg128@4096")),
        ablations=(Ablation(HOSTILE, HOSTILE, bad, bad), Ablation(HOSTILE, "x", bad, bad)),
        notes=(HOSTILE,),
    )


def _work(middle: float) -> Measure:
    return measure("work", "tok/s", middle * 0.99, middle, middle * 1.01, group="what pays")

"""Hundreds of short requests on a real model, many of them cancelled, leave nothing behind."""

from __future__ import annotations

import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions, Request, SamplingParams
from tests.fakes.models import smollm2_path
from tests.unit.test_engine_loop import read

N_REQUESTS = 360
N_WARM = 120
N_CALLERS = 4


def resident_bytes() -> int:
    """Of this process; 0 where the system has no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def test_a_soak_on_a_real_model_leaves_nothing_behind() -> None:
    n_threads = threading.active_count()
    options = EngineOptions(n_ctx=512, n_seq_max=4, n_threads=2, speculative="ngram")
    engine = Engine.open([smollm2_path()], options)
    engine._checks = True  # the books are compared with the library whenever nothing runs
    start = engine.tokenizer.tokenize(
        "One two three four five six seven.", add_special=True, parse_special=False
    )

    def ask(seed: int) -> str:
        rng = random.Random(seed)
        more = [rng.randrange(1000, 30000) for _ in range(rng.randrange(1, 8))]
        request = Request(
            (*start[: rng.randrange(1, len(start))], *more),
            SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=seed),
            rng.randrange(0, 10),
            ignore_eog=True,
        )
        stream = engine.submit(request)
        if rng.random() < 0.4:
            timer = threading.Timer(rng.random() / 10, stream.cancel)
            timer.start()
            timer.join()
        return read(stream).finish.reason

    with engine:
        with ThreadPoolExecutor(N_CALLERS) as pool:
            ends = list(pool.map(ask, range(N_WARM)))
            gc.collect()
            before = resident_bytes()
            ends += pool.map(ask, range(N_WARM, N_REQUESTS))
        gc.collect()
        n_grown = resident_bytes() - before
        closing = read(engine.submit(Request(tuple(start), SamplingParams(temperature=0), 4)))
    assert closing.finish.reason in ("length", "stop")
    assert len(ends) == N_REQUESTS
    assert set(ends) == {"length", "cancelled"}
    assert ends.count("cancelled") > 20 and ends.count("length") > 150
    assert n_grown < 8 << 20, f"{n_grown / 2**20:.1f} MiB more"
    assert engine._failure is None
    assert engine._answers.streams == {} and engine._core.active == []
    assert len(engine._core.residents) == 0
    assert threading.active_count() == n_threads

"""Decode speed beside busy programs: steady threads against fixed counts, in one run.

    python scripts/bench_busy.py MODEL.gguf [--seconds 6] [--rounds 2] [--json FILE] [--cases …]

Cases: `idle`; `one-busy` (a process that only counts); `busy-per-core` (one for each core);
`two-models` (two of these processes at once; the slower one's rate counts); `second-model` (one
more in the process, which has answered and does nothing). In each, every setting runs alone in its
own process, in turns (A B C A B C …), for the same time: `steady` (what llmrun does), fixed counts
of threads, and `native`: the largest count, and threads that spin as long as OpenMP lets them
(llmrun changes that, see `engine.binding`).

Printed for each case: medians in tok/s, steady against native, and steady against the best fixed
count. A machine that is busy with something else spoils the first case most of all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROMPT = "Once upon a time, in a village by the sea, there lived a clockmaker who"
_OPENMP_SPINS = "300000"  # libgomp's own count when nothing is set
CASES = ("idle", "one-busy", "busy-per-core", "two-models", "second-model")


def generate(model: Path, threads: str, seconds: float, *, with_second: bool) -> None:
    """The measured process: says it is ready, waits for a line, generates, prints its rate."""
    from llmrun.engine.llama import default_threads
    from llmrun.engine.loop import Engine
    from llmrun.engine.types import EngineOptions, FinishEvent, Request, SamplingParams

    is_steady = threads == "steady"
    options = EngineOptions(
        n_ctx=4096,
        n_threads=default_threads() if is_steady else int(threads),
        steady_threads=is_steady,
    )
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine.open([model], options))
        prompt = tuple(engine.tokenizer.tokenize(PROMPT, add_special=True, parse_special=False))
        if with_second:
            second = stack.enter_context(Engine.open([model], options))
            list(second.submit(Request(prompt, SamplingParams(temperature=0), 8, ignore_eog=True)))
        print("ready", flush=True)
        sys.stdin.readline()
        stream = engine.submit(Request(prompt, SamplingParams(temperature=0), ignore_eog=True))
        ends_s = time.perf_counter() + seconds
        for event in stream:
            if isinstance(event, FinishEvent):
                timings, usage = event.timings, event.usage
            elif time.perf_counter() >= ends_s:
                stream.cancel()
    print(json.dumps({"tok_s": timings.decode_tok_s, "n_tokens": usage.n_completion}))


@contextlib.contextmanager
def busy_processes(n: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(
    model: Path, threads: str, seconds: float, *, n_processes: int, with_second: bool
) -> float:
    """tok/s; of the slowest when there are several, and at least one in the whole time."""
    environment = dict(os.environ)
    if threads == "native":
        from llmrun.engine.llama import default_threads

        environment["GOMP_SPINCOUNT"] = _OPENMP_SPINS
        threads = str(default_threads())
    command = [sys.executable, __file__, str(model), "--child", threads, "--seconds", str(seconds)]
    if with_second:
        command.append("--second")
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(n_processes)
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit("a measured process did not start")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    slowest = min(
        json.loads(process.communicate()[0].splitlines()[-1])["tok_s"] for process in processes
    )
    return max(slowest, 1 / seconds)


def run_case(case: str, args: argparse.Namespace, counts: list[int]) -> dict[str, object]:
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    n_busy = {"one-busy": 1, "busy-per-core": n_cores or 1}.get(case, 0)
    n_processes = 2 if case == "two-models" else 1
    rates: dict[str, list[float]] = {name: [] for name in ["steady", "native", *map(str, counts)]}
    with busy_processes(n_busy):
        for _ in range(args.rounds):
            for threads, found in rates.items():
                rate = measure(
                    args.model,
                    threads,
                    args.seconds,
                    n_processes=n_processes,
                    with_second=case == "second-model",
                )
                found.append(rate)
    median = {threads: statistics.median(found) for threads, found in rates.items()}
    best = max(map(str, counts), key=lambda threads: median[threads])
    return {
        "case": case,
        "tok_s": median,
        "all_tok_s": rates,
        "best_fixed": int(best),
        "steady_to_native": median["steady"] / median["native"],
        "steady_to_best": median["steady"] / median[best],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each generation")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--second", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        generate(args.model, args.child, args.seconds, with_second=args.second)
        return
    from llmrun.engine.governor import thread_counts
    from llmrun.engine.llama import default_threads

    counts = list(thread_counts(default_threads()))
    print(f"{args.model.name}, {default_threads()} threads, load {os.getloadavg()[0]:.1f}")
    results = []
    for case in args.cases:
        result = run_case(case, args, counts)
        results.append(result)
        rates = ", ".join(f"{threads}: {rate:.1f}" for threads, rate in result["tok_s"].items())  # type: ignore[attr-defined]
        print(
            f"{case:14} tok/s {rates}   steady/native {result['steady_to_native']:.2f}, "
            f"steady/best {result['steady_to_best']:.2f}",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

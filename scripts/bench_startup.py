"""Whole-process time of `llmrun run` for one token against a bare low-level script, in one run.

    python scripts/bench_startup.py MODEL.gguf [--reference smollm2-135m] [--rounds 9]

Both answer the same prompt with the same model file, in turns. `--reference` is what `llmrun run`
is given (default: the file itself); with a catalog name its lookup in the cache counts too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    bare_script = Path(__file__).with_name("bare_low_level.py")
    bare = [sys.executable, str(bare_script), str(args.model), "Hi", "1"]
    llmrun = [sys.executable, "-m", "llmrun", "run", args.reference or str(args.model), "Hi"]
    llmrun += ["--max-tokens", "1", "--temperature", "0"]
    times: dict[str, list[float]] = {"bare": [], "llmrun": []}
    for command in (bare, llmrun):
        timed(command)  # file cache and bytecode
    for _ in range(args.rounds):
        times["bare"].append(timed(bare))
        times["llmrun"].append(timed(llmrun))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"bare {medians['bare']:.3f} s, llmrun {medians['llmrun']:.3f} s, "
        f"ratio {medians['llmrun'] / medians['bare']:.2f} (median of {args.rounds})"
    )


if __name__ == "__main__":
    main()

"""The exact tier against real loads: what llama.cpp logs, and what the system counts.

    python scripts/exact_vs_log.py [--work] [--only smollm2|gemma3]

For each model and setup, MiB: what the child process says without loading (from the header alone),
what llama.cpp logs on a real load, and the anonymous memory that the real load adds to a process
beside one that allocates nothing (so that the vocabulary does not count) against weights + KV.
`--work` also reads a prompt and compares with weights + KV + compute. Ends with the worst
deviations. Linux only, for the anonymous memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmrun.fit.exact import ChildAllocator
from llmrun.fit.types import MIB, Setup
from llmrun.gguf.info import read_info
from tests.fakes.models import gemma3_path, smollm2_path
from tests.fakes.real_load import load_really
from tests.fakes.setups import REAL_SETUPS

_STEP = 0.005  # half of the log's last digit


def describe(setup: Setup) -> str:
    unified = "" if setup.kv_unified or setup.n_seq_max == 1 else " split"
    return (
        f"{setup.n_ctx:6} {setup.type_k:>4}/{setup.type_v:<4} fa {setup.flash_attn:4} "
        f"seq {setup.n_seq_max}{unified:6} ub {setup.n_ubatch:4}"
        f"{'' if setup.use_repack else ' no repack'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", action="store_true", help="read a prompt in each real load")
    parser.add_argument("--only", choices=("smollm2", "gemma3"))
    options = parser.parse_args()
    worst_log = worst_ready = worst_worked = 0.0
    n_same = n_all = 0
    for name, find in (("smollm2", smollm2_path), ("gemma3", gemma3_path)):
        if options.only not in (None, name):
            continue
        path = find()
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(read_info([path]).header.data_offset)
        started = time.perf_counter()
        allocator = ChildAllocator.of_headers([(path.name, header, n_bytes)])
        answers = allocator.measure(REAL_SETUPS)
        took = time.perf_counter() - started
        if allocator.problem:
            print(allocator.problem)
            return 1
        print(f"{name}: {len(answers)} setups from a header of {len(header)} bytes in {took:.2f} s")
        print(f"{'':46}{'weights':>18}{'KV':>18}{'compute':>18}  RssAnon/W+KV", end="")
        print("  worked/all" if options.work else "")
        for setup, answer in zip(REAL_SETUPS, answers, strict=True):
            assert answer is not None, allocator.refusal(setup)
            real = load_really(path, setup, work=options.work)
            empty = load_really(path, setup, is_real=False)
            cells = []
            is_same = True
            for kind, exact in (
                ("weights", answer.weights_bytes / MIB),
                ("kv", answer.kv_bytes / MIB),
                ("compute", answer.compute_bytes / MIB),
            ):
                logged = sum(getattr(real, kind).values())
                difference = abs(logged - exact)
                worst_log = max(worst_log, difference)
                is_same &= difference <= _STEP * real.n_lines[kind] + 1e-9
                cells.append(f"{exact:8.2f} {logged:8.2f}")
            n_all += 1
            n_same += is_same
            held = answer.weights_bytes + answer.kv_bytes
            ready = (real.ready - empty.ready) / held - 1
            worst_ready = max(worst_ready, abs(ready))
            line = f"{describe(setup):46}{cells[0]:>18}{cells[1]:>18}{cells[2]:>18}  {ready:+.2%}"
            if options.work:
                worked = (real.worked - empty.ready) / (held + answer.compute_bytes) - 1
                worst_worked = max(worst_worked, abs(worked))
                line += f"  {worked:+12.2%}"
            print(line if is_same else line + "  DIFFERS", flush=True)
    print(f"{n_same} of {n_all} the same as the log; largest difference {worst_log:.3f} MiB")
    print(f"anonymous memory against weights + KV: at most {worst_ready:.2%} off")
    if options.work:
        print(f"after a prompt, against weights + KV + compute: at most {worst_worked:.2%} off")
    return 0 if n_same == n_all else 1


if __name__ == "__main__":
    sys.exit(main())

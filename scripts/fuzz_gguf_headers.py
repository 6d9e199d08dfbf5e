"""Throws broken headers at the GGUF reader: each must end as a GgufError or as a valid header.

    python scripts/fuzz_gguf_headers.py --count 20000
    python scripts/fuzz_gguf_headers.py --count 5000 --seed 7 real.gguf other.gguf

Mutates a small built header, and the headers of the files that are named (half of the tries). Every
fifteenth try is traced for its peak of memory (not timed: tracing is slow). Prints what was
tried and what became of it; exit code 1 on any other outcome, with the mutant saved beside it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
import tracemalloc
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmrun.errors import GgufError, LlmrunError
from llmrun.gguf.header import BytesSource, FileSource, read_header
from llmrun.gguf.info import build_info
from tests.fakes.gguf_builder import CHATML, GgufBuilder, tiny_llama_builder
from tests.fakes.gguf_mutations import check_invariants, mutate

MIB = 1024 * 1024
TRACE_EVERY = 15  # odd, so that built and real headers are both traced


def build_seeds() -> list[tuple[bytes, int]]:
    """Headers of built files and how large their files are."""
    every_type = GgufBuilder()
    for i, name in enumerate(
        ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
    ):
        every_type.add(f"scalar.{i}", i, name).add(f"array.{i}", list(range(9)), name)
    every_type.add("f32", 1.5).add("f64", 2.5, "float64").add("flag", True)
    every_type.add("flags", [True, False]).add("text", "text").add("texts", ["a", "bc", ""])
    for i in range(8):
        every_type.tensor(f"t{i}", (256, 2), (0, 1, 2, 8, 12, 26)[i % 6])
    builders = [tiny_llama_builder(chat_template=CHATML, n_vocab=356), every_type]
    return [(builder.header(), len(builder.build())) for builder in builders]


def read_real(path: Path) -> tuple[bytes, int]:
    with FileSource(path) as source:
        header = read_header(source)
        return source.read(0, header.data_offset), source.n_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", type=Path, default=Path("failing.gguf"))
    parser.add_argument("files", type=Path, nargs="*", help="real model files")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    small = build_seeds()
    real = [read_real(path) for path in options.files]

    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    slowest = {"built": 0.0, "real": 0.0}
    peak_ratio = 0.0
    peak_most = 0
    started = time.perf_counter()
    for i in range(options.count):
        is_real = bool(real) and i % 2 == 1
        data, n_file_bytes = rng.choice(real if is_real else small)
        mutant = mutate(data, rng)
        # What comes after the header moves along, or (sometimes) all of it is cut off.
        n_file = n_file_bytes + len(mutant) - len(data) if rng.random() < 0.9 else len(mutant)
        n_file = max(n_file, len(mutant))
        traced = i % TRACE_EVERY == 0
        if traced:
            tracemalloc.start()
        begin = time.process_time()
        try:
            header = read_header(BytesSource(mutant, n_file), thorough=True)
        except GgufError as error:
            outcomes["refused"] += 1
            reasons["".join(c for c in str(error.why) if not c.isdigit())[:30]] += 1
            header = None
        except Exception:
            traceback.print_exc()
            outcomes["CRASHED"] += 1
            options.save.write_bytes(mutant)
            header = None
        spent = time.process_time() - begin
        if traced:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            peak_most = max(peak_most, peak)
            peak_ratio = max(peak_ratio, peak / (len(mutant) + MIB))
        else:
            kind = "real" if is_real else "built"
            slowest[kind] = max(slowest[kind], spent)
        if header is None:
            continue
        outcomes["accepted"] += 1
        try:
            check_invariants(header, n_file)
            build_info([header], n_file)
        except LlmrunError:
            outcomes["accepted, but no model"] += 1
        except Exception:
            traceback.print_exc()
            outcomes["UNSAFE"] += 1
            options.save.write_bytes(mutant)
    spent = time.perf_counter() - started

    print(f"tried     {options.count} in {spent:.0f} s, seed {options.seed}")
    for name, n in sorted(outcomes.items()):
        print(f"{name:<9} {n}")
    cpu_ms = {kind: round(spent * 1000, 1) for kind, spent in slowest.items()}
    print(f"CPU time  at most {cpu_ms['built']} ms built, {cpu_ms['real']} ms real")
    print(f"peak      {peak_most / MIB:.1f} MiB, at most {peak_ratio:.2f} x (header + 1 MiB)")
    print(f"reasons   {len(reasons)} kinds; most frequent:")
    for reason, n in reasons.most_common(12):
        print(f"  {n:6} {reason}")
    return 1 if outcomes["CRASHED"] or outcomes["UNSAFE"] else 0


if __name__ == "__main__":
    sys.exit(main())

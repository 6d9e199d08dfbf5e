"""`llmrun serve` against llama.cpp's own HTTP server of the same build, over the same wire.

    python scripts/bench_serve.py MODEL.gguf [MODEL.gguf …] [--rounds 5] [--streams 1 8 32]
        [--only streams shared-prefix cost] [--json FILE] [--wait-quiet SECONDS]

Both sides get the same requests from the same client (streamed `/v1/completions`, prompts as
tokens, greedy, to exactly as many tokens as asked), in turns (A B, B A, …). Rows:

  streams-N      N unrelated 64-token prompts at once, 128 new tokens each: all new tokens by the
                 whole time
  shared-prefix  16 requests with one new 600-token beginning and 12 tokens more, 32 new tokens
                 each, 8 at a time
  cost           what HTTP and Python cost while 8 streams run: CPU time of the server's event loop
                 by the engine's time in decoding (no other side). Linux only

A ratio above 1 is better for llmrun. The client reads answers without looking into them, so that it
takes as little as can be of the two sides' processors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import native_tools

_START_S = 120.0


@dataclass(slots=True)
class Row:
    """One comparison; `ours` and `theirs` are tokens a second, in the rounds' order."""

    row: str
    model: str
    aim: float
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    def show(self) -> str:
        ratios = self.ratios
        middle = statistics.median(ratios)
        verdict = "met" if middle >= self.aim else "MISSED"
        return (
            f"{self.row:<14} {self.model:<22} {statistics.median(self.ours):8.1f} "
            f"{statistics.median(self.theirs):8.1f} tok/s  {middle:5.2f} "
            f"({min(ratios):.2f}..{max(ratios):.2f})  aim {self.aim:g}: {verdict}"
        )


# ---- the two sides


@contextmanager
def serve_ours(model: Path, *, n_slots: int, n_ctx: int) -> Iterator[tuple[int, int]]:
    """`llmrun serve`; its port and its process. `n_ctx` is the context of all streams together."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "GOMP_SPINCOUNT": "1000"}
        command = [
            sys.executable, "-m", "llmrun", "serve", str(model), "--port", "0", "--no-ui",
            "--parallel", str(n_slots), "--ctx", str(n_ctx // n_slots), "--max-queue", "64",
            "--speculative", "off", "--json",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("llmrun serve does not start")
            yield int(json.loads(line)["port"]), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()


# ---- the client


async def _ask(port: int, body: bytes) -> bytes:
    """One request on a connection of its own; the end of its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    tail = b""
    try:
        while data := await reader.read(1 << 16):
            tail = (tail + data)[-8192:]
    finally:
        writer.close()
    return tail


def _tokens_said(tail: bytes) -> int:
    found = re.findall(rb'"completion_tokens":\s*(\d+)', tail)
    if not found:
        raise SystemExit(f"no usage in the answer: {tail[-300:]!r}")
    return int(found[-1])


def run_requests(port: int, prompts: Sequence[list[int]], n_new: int, n_at_once: int) -> float:
    """Ask all of them; all new tokens by the whole time."""
    bodies = [
        json.dumps(
            {
                "prompt": prompt, "max_tokens": n_new, "temperature": 0, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True}, "cache_prompt": True,
            }
        ).encode()
        for prompt in prompts
    ]  # fmt: skip

    async def run() -> float:
        gate = asyncio.Semaphore(n_at_once)

        async def one(body: bytes) -> int:
            async with gate:
                return _tokens_said(await _ask(port, body))

        started = time.perf_counter()
        counts = await asyncio.gather(*(one(body) for body in bodies))
        wall_s = time.perf_counter() - started
        if any(count != n_new for count in counts):
            raise SystemExit(f"answers of other lengths than {n_new}: {sorted(set(counts))}")
        return sum(counts) / wall_s

    return asyncio.run(run())


# ---- measuring


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.native = native_tools.find_tools(spin_count="1000")
        self.random = random.Random(20_240)
        self.rows: list[Row] = []

    def tokens(self, n: int) -> list[int]:
        return [self.random.randrange(1000, 30_000) for _ in range(n)]

    def wait_for_quiet(self) -> None:
        import psutil

        ends_s = time.monotonic() + self.args.wait_quiet
        psutil.cpu_percent()
        while time.monotonic() < ends_s:
            time.sleep(0.5)
            if psutil.cpu_percent() / 100 * (os.cpu_count() or 1) < 0.2:
                return

    def compare(
        self,
        row: Row,
        model: Path,
        make_prompts: Callable[[], list[list[int]]],
        n_new: int,
        n_at_once: int,
    ) -> None:
        n_ctx = 1024 * max(n_at_once, 2)
        ours = serve_ours(model, n_slots=n_at_once, n_ctx=n_ctx)
        theirs = native_tools.serve(
            self.native, model, n_slots=n_at_once, n_ctx=n_ctx, n_threads=self.args.threads, more=[]
        )
        with ours as (port, _), theirs as server:
            for n_round in range(-1, self.args.rounds):
                prompts = make_prompts()
                sides = [("ours", port), ("theirs", server.port)]
                for side, at in sides if n_round % 2 == 0 else reversed(sides):
                    self.wait_for_quiet()
                    rate = run_requests(at, prompts, n_new, n_at_once)
                    if n_round >= 0:  # the first is for pages, threads and what is learnt
                        getattr(row, side).append(rate)
        self.rows.append(row)
        print(row.show(), flush=True)

    def streams(self, model: Path, n: int) -> None:
        n_new = 128 if n < 32 else 64
        self.compare(
            Row(f"streams-{n}", model.name, 1.0),
            model,
            lambda: [self.tokens(64) for _ in range(n)],
            n_new,
            n,
        )

    def shared_prefix(self, model: Path) -> None:
        def prompts() -> list[list[int]]:
            beginning = self.tokens(600)
            return [beginning + self.tokens(12) for _ in range(16)]

        self.compare(Row("shared-prefix", model.name, 4.0), model, prompts, 32, 8)

    def cost(self, model: Path) -> None:
        """The event loop's CPU time by the engine's time, while 8 streams run."""
        with serve_ours(model, n_slots=8, n_ctx=8192) as (port, pid):
            shares, per_token = [], []
            for n_round in range(-1, self.args.rounds):
                self.wait_for_quiet()
                before = _cpu_s(pid), _counters(port)
                run_requests(port, [self.tokens(64) for _ in range(8)], 128, 8)
                after = _cpu_s(pid), _counters(port)
                loop_s = after[0] - before[0]
                decode_s = after[1]["decode_seconds"] - before[1]["decode_seconds"]
                n_tokens = after[1]["generated_tokens"] - before[1]["generated_tokens"]
                if n_round >= 0:
                    shares.append(loop_s / decode_s)
                    per_token.append(loop_s / n_tokens * 1e6)
        middle = statistics.median(shares)
        print(
            f"{'cost':<14} {model.name:<22} {middle:.1%} of the engine's time "
            f"({min(shares):.1%}..{max(shares):.1%}), {statistics.median(per_token):.0f} µs a "
            f"token  aim < 5 %: {'met' if middle < 0.05 else 'MISSED'}",
            flush=True,
        )


def _cpu_s(pid: int) -> float:
    """CPU time of the process's first thread, which runs the event loop."""
    parts = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def _counters(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^llmrun_(\w+?)(?:_total)?\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--only", nargs="*", choices=["streams", "shared-prefix", "cost"],
        default=["streams", "shared-prefix", "cost"],
    )  # fmt: skip
    parser.add_argument("--wait-quiet", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    bench = Bench(args)
    for model in args.models:
        if "streams" in args.only:
            for n in args.streams:
                bench.streams(model, n)
        if "shared-prefix" in args.only:
            bench.shared_prefix(model)
        if "cost" in args.only:
            bench.cost(model)
    if args.json is not None:
        rows: list[dict[str, Any]] = [{**asdict(row), "ratios": row.ratios} for row in bench.rows]
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

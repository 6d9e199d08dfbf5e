"""llmrun's engine against llama.cpp's own tools of the same build, in one run.

    python scripts/bench_vs_native.py MODEL.gguf [MODEL.gguf …] [--only ROW …] [--rounds 5]
        [--json FILE] [--quick] [--wait-quiet SECONDS]

The tools are built first, once (`native_tools.py`), and run on the installed binding's libraries.

Each row measures two sides in turns (A B, B A, A B, …) and prints the median ratio of the rounds
and the smallest and largest one; above 1 is better for llmrun. Rows:

  pp512, tg128     prompt processing and generation against llama-bench, which does not sample
  one-shot         a whole process with one raw answer against llama-completion
  streams-1/-4/-8  that many unrelated prompts at once against llama-server with as many slots:
                   all new tokens by the whole time
  shared-prefix    16 requests with one new 600-token beginning and 12 tokens more, 32 new tokens
                   each, 8 at a time, against llama-server with 8 slots. Where every row costs the
                   same, (8·612 + 8·12 + 16·32) / (612 + 15·12 + 16·32) = 4.2 is what can be had.
                   The 16·32 are made in steps of 8 rows on both sides and cost more each (three
                   times a prompt's row on Gemma 3 270M, with its vocabulary: then 2.8 can be had);
                   beside the ratio stands this bound, by the measured cost of both kinds of rows
  ngram-edit, -list, -novel
                   speculation on against off: a text copied that was to be changed, a list
                   continued (lines of 21 tokens, alike but for a number in two places; SmolLM2
                   ends it at 20, half a line before the last token), and sampled text that repeats
                   nothing
  high-level       decoding against the binding's `Llama` class
  python-time      Python around the C calls, of each generated token (no ratio but its share)
  busy-…           steady threads beside busy programs, see `bench_busy.py`

Set alike on both sides: threads (--threads), GOMP_SPINCOUNT (--spins), micro-batch 512, f16 KV
cache, FlashAttention auto, size of the context, which both split among their streams (--unified:
llmrun does not). llmrun's threads are steady, as it ships them (--pinned: not), and speculation is
off but in its own rows. An absolute rate says little on a shared machine; a ratio is of one run.
What other programs used meanwhile is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import bench_busy
import native_tools

_WORKER = Path(__file__).with_name("bench_worker.py")
_SERVER_ROWS = ("streams-1", "streams-4", "streams-8", "shared-prefix")
_NATIVE_ROWS = ("pp512", "tg128", "one-shot", *_SERVER_ROWS)
_NGRAM_ROWS = ("ngram-edit", "ngram-list", "ngram-novel")
_BUSY_ROWS = tuple(f"busy-{case}" for case in bench_busy.CASES)
ROWS = (*_NATIVE_ROWS, *_NGRAM_ROWS, "high-level", "python-time", *_BUSY_ROWS)

# Least ratio that the project wants; where the models differ, by a word in the file's name.
_AIMS: dict[str, float | dict[str, float]] = {
    "pp512": 0.98,
    "tg128": 0.98,
    "streams-8": 1.0,
    "shared-prefix": 4.0,
    "ngram-edit": {"gemma": 2.0, "smol": 1.3},
    "ngram-list": {"gemma": 2.0, "smol": 1.3},
    "ngram-novel": 0.98,
    "busy-idle": 0.95,
    "busy-one-busy": 1.5,
    "busy-busy-per-core": 4.0,
}

_TEXT = """\
The harbour of Brennick lies between two arms of grey rock, and the lamp on the northern arm has \
burned every night for a hundred and forty years. Its first keeper was a retired schoolteacher who \
wrote down the weather, the passing ships and the price of coal in a ledger bound in green cloth. \
When the ledger was full she sewed a new one from sailcloth, and the keepers after her did the \
same, so that eleven of them now stand on the shelf above the stove. In the winter of the great \
storm the glass of the lamp broke twice in one night. The keeper's son carried burning tar up the \
stairs in an iron kettle, and two herring boats found their way home by it. The council paid him \
four silver coins and a new coat. Today the lamp is electric and nobody needs to climb the stairs, \
but the keeper still goes up at dusk, looks at the water for a while, and writes a line about it.
"""
_EDIT = f"""\
A text:
{_TEXT}
The same text again, with every "keeper" replaced by "warden" and nothing else changed:
The harbour of Brennick lies between two arms of grey rock, and the lamp on the northern arm has \
burned every night for a hundred and forty years. Its first warden was a retired schoolteacher"""
_LIST = "".join(
    f"{n}. The value of item {n} is unknown to the reader of this long list.\n"
    for n in range(1, 12)
)
_NOVEL = "Once upon a time, in a village by the sea, there lived a clockmaker who"


@dataclass(slots=True)
class Row:
    """One comparison on one model. `ours` and `theirs` are the rounds in order, in `unit`."""

    row: str
    model: str
    unit: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    lower_is_better: bool = False
    is_share: bool = False  # `ours` is a part of `theirs`, and their quotient is what is shown
    aim: float | None = None
    against: str = ""
    notes: list[str] = field(default_factory=list)
    others_busy: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.ours, self.theirs, strict=True)
        if self.lower_is_better:
            return [theirs / ours for ours, theirs in pairs]
        return [ours / theirs for ours, theirs in pairs]

    def as_json(self) -> dict[str, object]:
        ratios = self.ratios
        found = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        return {**asdict(self), "ratios": ratios, "ratio": found}

    def as_line(self) -> str:
        ratios = self.ratios
        middle = statistics.median(ratios)
        aim = f"aim {self.aim:g}: " if self.aim is not None else ""
        verdict = "" if self.aim is None else ("met" if middle >= self.aim else "MISSED")
        n_digits = 4 if self.is_share else 2
        sides = f"{statistics.median(self.ours):8.4g} {statistics.median(self.theirs):8.4g}"
        return (
            f"{self.row:18} {self.model[:18]:18} {sides} {self.unit:6} "
            f"{middle:6.{n_digits}f} ({min(ratios):.{n_digits}f}..{max(ratios):.{n_digits}f})  "
            f"{aim}{verdict}" + "".join(f"\n{'':20}{note}" for note in self.notes)
        )


class Bench:
    """What all rows share: the settings, the tools, and the list that results go to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[Row] = []
        spins = None if args.spins == "library" else args.spins
        needs_tools = any(row in _NATIVE_ROWS for row in args.only)
        self.tools = native_tools.find_tools(spin_count=spins) if needs_tools else None
        self.environment = dict(os.environ)
        self.environment.pop("GOMP_SPINCOUNT", None)
        if spins is not None:
            self.environment["GOMP_SPINCOUNT"] = spins
        self.random = random.Random(args.seed)

    @property
    def native(self) -> native_tools.NativeTools:
        assert self.tools is not None
        return self.tools

    def tokens(self, n: int) -> list[int]:
        """A prompt that no cache has seen. Ordinary tokens in all the vocabularies at hand."""
        return [self.random.randrange(1000, 30000) for _ in range(n)]

    def take_turns(self, row: Row, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
        """Measure both sides in every round, and note the row."""
        self._say(f"{row.row} on {row.model}")
        for number in range(self.args.rounds):
            row.others_busy.append(self._wait_for_quiet())
            sides = [(row.ours, ours), (row.theirs, theirs)]
            for found, measure in sides if number % 2 == 0 else reversed(sides):
                found.append(measure())
        self.note(row)

    def note(self, row: Row) -> None:
        aim = _AIMS.get(row.row)
        if isinstance(aim, dict):
            aim = next((x for name, x in aim.items() if name in row.model.lower()), None)
        row.aim = aim
        self.rows.append(row)
        print(row.as_line(), flush=True)
        self._save()

    def remark(self, text: str) -> None:
        """More about the last row."""
        self.rows[-1].notes.append(text)
        print(f"{'':20}{text}", flush=True)
        self._save()

    def _save(self) -> None:
        if self.args.json:
            self.args.json.write_text(json.dumps(self.as_json(), indent=1))

    def as_json(self) -> dict[str, object]:
        import importlib.metadata

        args = self.args
        return {
            "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
            "binding": importlib.metadata.version("llama-cpp-python"),
            "libraries": self.tools.libraries if self.tools else None,
            "settings": {
                "threads": args.threads,
                "spins": args.spins,
                "rounds": args.rounds,
                "steady_threads": not args.pinned,
                "kv_unified": args.unified,
                "server_args": args.server_args,
                "quick": args.quick,
            },
            "rows": [row.as_json() for row in self.rows],
        }

    @contextlib.contextmanager
    def engine(self, model: Path, **options: Any) -> Iterator[Callable[[dict[str, Any]], Any]]:
        """An engine in a process of its own; the value does a job, see `bench_worker.py`."""
        given = {"n_threads": self.args.threads, "steady_threads": not self.args.pinned}
        command = [sys.executable, str(_WORKER), "engine", str(model)]
        process = subprocess.Popen(
            [*command, json.dumps({"speculative": "off", **given, **options})],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def do(job: dict[str, Any]) -> Any:
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
            line = stdout.readline()
            if not line:
                raise SystemExit("llmrun's side ended before its time")
            return json.loads(line)

        try:
            if not stdout.readline():
                raise SystemExit("llmrun's side does not start")
            yield do
        finally:
            native_tools.stop(process)
            stdin.close()
            stdout.close()

    def once(self, what: str, model: Path, **options: Any) -> dict[str, float]:
        """One measured process of `bench_worker.py`."""
        options = {"n_threads": self.args.threads, **options}
        command = [sys.executable, str(_WORKER), what, str(model), json.dumps(options)]
        out = subprocess.run(
            command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        found: dict[str, float] = json.loads(out.splitlines()[-1])
        return found

    def _wait_for_quiet(self) -> float:
        """Cores that other programs keep busy just now, after waiting for few as long as told."""
        import psutil

        ends_s = time.monotonic() + self.args.wait_quiet
        psutil.cpu_percent()
        while True:
            time.sleep(0.5)
            n_busy = psutil.cpu_percent() / 100 * (os.cpu_count() or 1)
            if n_busy < 0.2 or time.monotonic() > ends_s:
                return round(n_busy, 2)

    def _say(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K… {text}", end="\r", file=sys.stderr, flush=True)


def measure_alone(bench: Bench, model: Path, rows: list[str]) -> None:
    """pp512 and tg128: one stream, nothing else."""
    repeats = 1 if bench.args.quick else 3
    with bench.engine(model, n_ctx=1024) as do:
        do({"prompts": [bench.tokens(64)], "n_new": 16, "n_at_once": 1})

        def prefill() -> float:
            prompts = [bench.tokens(512) for _ in range(repeats)]
            found = do({"prompts": prompts, "n_new": 1, "n_at_once": 1})
            return 512 / statistics.median(found["ttft_s"])

        def generation() -> float:
            prompts = [bench.tokens(2) for _ in range(repeats)]
            found = do({"prompts": prompts, "n_new": 129, "n_at_once": 1})
            return float(statistics.median(found["decode_tok_s"]))

        def native(n_prompt: int, n_gen: int) -> float:
            found = native_tools.bench(
                bench.native,
                model,
                n_prompt=n_prompt,
                n_gen=n_gen,
                n_threads=bench.args.threads,
                repeats=repeats,
            )
            return statistics.median(found["pp" if n_prompt else "tg"])

        against = "llama-bench (no sampling)"
        if "pp512" in rows:
            row = Row("pp512", model.name, "tok/s", against=against)
            bench.take_turns(row, prefill, lambda: native(512, 0))
        if "tg128" in rows:
            row = Row("tg128", model.name, "tok/s", against=against)
            bench.take_turns(row, generation, lambda: native(0, 128))


def measure_one_shot(bench: Bench, model: Path) -> None:
    n_new, n_ctx, n_threads = 64, 2048, bench.args.threads
    ours = [sys.executable, "-m", "llmrun", "run", "--raw", "--temperature", "0"]
    ours += ["--max-tokens", str(n_new), "--ctx", str(n_ctx), "--threads", str(n_threads)]
    ours += [str(model), _NOVEL]
    theirs = native_tools.completion_command(
        bench.native, model, _NOVEL, n_new=n_new, n_threads=n_threads, n_ctx=n_ctx
    )
    texts: dict[str, str] = {}

    def timed(side: str, command: list[str], environment: dict[str, str]) -> float:
        started = time.perf_counter()
        done = subprocess.run(
            command, env=environment, check=True, capture_output=True, stdin=subprocess.DEVNULL
        )
        elapsed_s = time.perf_counter() - started
        texts[side] = done.stdout.decode("utf-8", "replace").strip()
        return elapsed_s

    def run_ours() -> float:
        return timed("ours", ours, bench.environment)

    def run_theirs() -> float:
        return timed("theirs", theirs, bench.native.environment)

    run_ours(), run_theirs()  # file cache and bytecode
    row = Row("one-shot", model.name, "s", lower_is_better=True, against="llama-completion")
    if texts["ours"].split() != texts["theirs"].split():
        a, b = (len(texts[side]) for side in ("ours", "theirs"))
        row.notes.append(f"the two answers differ ({a} and {b} characters)")
    bench.take_turns(row, run_ours, run_theirs)


def measure_streams(bench: Bench, model: Path, row_name: str) -> None:
    """Requests at once through the engine against llama-server, over HTTP on the loopback."""
    args = bench.args
    is_shared = row_name == "shared-prefix"
    n_at_once = 8 if is_shared else int(row_name.rpartition("-")[2])
    n_ctx = 1024 * n_at_once
    n_new = 32 if is_shared or args.quick else 128

    def prompts() -> list[list[int]]:
        if is_shared:
            beginning = bench.tokens(600)
            return [beginning + bench.tokens(12) for _ in range(16)]
        return [bench.tokens(64) for _ in range(n_at_once)]

    serving = native_tools.serve(
        bench.native,
        model,
        n_slots=n_at_once,
        n_ctx=n_ctx,
        n_threads=args.threads,
        more=args.server_args.split(),
    )
    engine = bench.engine(
        model, n_ctx=n_ctx, n_seq_max=n_at_once, kv_unified=args.unified or n_at_once == 1
    )
    with engine as do, serving as server:
        n_cached: dict[str, int] = {}
        drawn: dict[str, list[list[int]]] = {}

        def next_prompts(side: str) -> list[list[int]]:
            """Both sides get the same, one after the other."""
            if not drawn:
                drawn.update(dict.fromkeys(("ours", "theirs"), prompts()))
            return drawn.pop(side)

        def engine_rate() -> float:
            asked = next_prompts("ours")
            found = do({"prompts": asked, "n_new": n_new, "n_at_once": n_at_once})
            n_cached["llmrun"] = found["n_cached"]
            return float(len(asked) * n_new / found["wall_s"])

        def server_rate() -> float:
            asked = next_prompts("theirs")
            with ThreadPoolExecutor(n_at_once) as pool:
                started = time.perf_counter()
                answers = list(pool.map(lambda prompt: server.complete(prompt, n_new), asked))
                wall_s = time.perf_counter() - started
            n_cached["server"] = sum(answer["n_cached"] for answer in answers)
            return len(asked) * n_new / wall_s

        engine_rate(), server_rate()  # pages, threads, what is learnt
        row = Row(row_name, model.name, "tok/s", against=f"llama-server, {n_at_once} slots")
        bench.take_turns(row, engine_rate, server_rate)
        if is_shared:
            bench.remark(
                f"tokens not read again in the last round: {n_cached['llmrun']}, "
                f"server {n_cached['server']}, of {16 * 612}"
            )
            bench.remark(f"by what rows cost here, {_shared_bound(bench, do):.1f} can be had")


def _shared_bound(bench: Bench, do: Callable[[dict[str, Any]], Any]) -> float:
    """The best ratio for `shared-prefix`: both sides make the same answers, in steps of 8 rows
    behind 612 tokens each, but one of them reads the beginning 8 times."""
    reading, writing = [], []
    for _ in range(3):
        beginning = bench.tokens(600)

        def ask(n_prompts: int, n_new: int, beginning: list[int] = beginning) -> Any:
            prompts = [beginning + bench.tokens(12) for _ in range(n_prompts)]
            return do({"prompts": prompts, "n_new": n_new, "n_at_once": n_prompts})

        reading.append(ask(1, 1)["ttft_s"][0] / 612)
        ask(8, 1)  # the beginning comes to every stream
        writing.append(1 / sum(ask(8, 33)["decode_tok_s"]))
    read_s, write_s = statistics.median(reading), statistics.median(writing)
    theirs_s = (8 * 612 + 8 * 12) * read_s + 16 * 32 * write_s
    return theirs_s / ((612 + 15 * 12) * read_s + 16 * 32 * write_s)


def measure_ngram(bench: Bench, model: Path, rows: list[str]) -> None:
    n_new = 64 if bench.args.quick else 200
    texts = {"ngram-edit": _EDIT, "ngram-list": _LIST, "ngram-novel": _NOVEL}
    with (
        bench.engine(model, n_ctx=2048, speculative="ngram") as on,
        bench.engine(model, n_ctx=2048) as off,
    ):
        for name in rows:
            job: dict[str, Any] = {"n_new": n_new, "n_at_once": 1}
            job["prompts"] = [on({"text": texts[name]})["tokens"]]
            if name == "ngram-novel":
                # Greedy, small models soon go round in circles; this does not.
                job["sampling"] = {"temperature": 1.0, "top_k": 0, "seed": 1}
            last: dict[str, Any] = {}

            def rate(do: Callable[..., Any], job: dict[str, Any], last: dict[str, Any]) -> float:
                last.update(do(job))
                return float(last["decode_tok_s"][0])

            rate_on = functools.partial(rate, on, job, last)
            rate_off = functools.partial(rate, off, job, {})
            rate_on(), rate_off()
            row = Row(name, model.name, "tok/s", against="speculative off")
            bench.take_turns(row, rate_on, rate_off)
            bench.remark(f"{last['n_accepted']} of {last['n_drafted']} guesses right")


def measure_high_level(bench: Bench, model: Path, rows: list[str]) -> None:
    if "high-level" in rows:
        row = Row("high-level", model.name, "tok/s", against="llama_cpp.Llama")
        bench.take_turns(
            row,
            lambda: bench.once("python-time", model, n_ctx=1024, speculative="off")["tok_s"],
            lambda: bench.once("high-level", model, n_ctx=1024)["tok_s"],
        )
    if "python-time" in rows:
        bench._say(f"python-time on {model.name}")
        row = Row("python-time", model.name, "ms", against="whole step", is_share=True)
        for _ in range(bench.args.rounds):
            row.others_busy.append(bench._wait_for_quiet())
            found = bench.once("python-time", model, n_ctx=1024, speculative="off")
            row.ours.append(found["python_ms"])
            row.theirs.append(1000 / found["tok_s"])
        is_met = statistics.median(row.ratios) < 0.02 or statistics.median(row.ours) < 0.06
        row.notes.append(f"aim < 0.02, or < 0.06 ms: {'met' if is_met else 'MISSED'}")
        bench.note(row)


def measure_busy(bench: Bench, model: Path, case: str) -> None:
    """Steady threads against the default fixed count; idle: against the best fixed count."""
    from llmrun.engine.governor import thread_counts

    args = bench.args
    bench._say(f"busy-{case} on {model.name}")
    others = bench._wait_for_quiet()
    given = argparse.Namespace(
        model=model, rounds=args.rounds, seconds=3.0 if args.quick else args.busy_seconds
    )
    found = bench_busy.run_case(case, given, list(thread_counts(args.threads)))
    rates: dict[str, list[float]] = found["all_tok_s"]  # type: ignore[assignment]
    other = str(found["best_fixed"]) if case == "idle" else "native"
    row = Row(f"busy-{case}", model.name, "tok/s", rates["steady"], rates[other])
    row.against = f"{other} threads fixed" if case == "idle" else "default count, spinning"
    row.others_busy.append(others)
    medians = ", ".join(f"{name} {rate:.1f}" for name, rate in found["tok_s"].items())  # type: ignore[attr-defined]
    row.notes.append(f"tok/s by threads: {medians}")
    if case == "two-models":
        steady, native = statistics.median(rates["steady"]), statistics.median(rates["native"])
        row.notes.append(
            f"the slower of both makes {steady:.1f}, native {native:.1f}; aim >= 30 each: "
            + ("met" if steady >= 30 else "MISSED")
        )
    bench.note(row)


def measure_model(bench: Bench, model: Path) -> None:
    only = bench.args.only

    def wanted(*rows: str) -> list[str]:
        return [row for row in rows if row in only]

    if wanted("pp512", "tg128"):
        measure_alone(bench, model, only)
    if wanted("one-shot"):
        measure_one_shot(bench, model)
    for name in wanted(*_SERVER_ROWS):
        measure_streams(bench, model, name)
    if rows := wanted(*_NGRAM_ROWS):
        measure_ngram(bench, model, rows)
    if rows := wanted("high-level", "python-time"):
        measure_high_level(bench, model, rows)
    for name in wanted(*_BUSY_ROWS):
        measure_busy(bench, model, name.removeprefix("busy-"))


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _end(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--models", nargs="+", type=Path, dest="more_models", default=[])
    parser.add_argument("--only", nargs="+", metavar="ROW", default=list(ROWS), help="these rows")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="shorter answers, fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--threads", type=int, default=0, help="default: what llmrun chooses")
    parser.add_argument(
        "--spins", default="1000", help="GOMP_SPINCOUNT of both sides, or `library` (default 1000)"
    )
    parser.add_argument("--pinned", action="store_true", help="llmrun without steady threads")
    parser.add_argument("--unified", action="store_true", help="one cache for all of its streams")
    parser.add_argument("--server-args", default="", help="more arguments for llama-server")
    parser.add_argument("--busy-seconds", type=float, default=6.0, metavar="S")
    parser.add_argument(
        "--wait-quiet", type=float, default=0.0, metavar="S",
        help="before each round, wait up to S seconds for others to be idle",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    args = parser.parse_args()
    args.models += args.more_models
    if not args.models:
        parser.error("name a model file")
    for row in args.only:
        if row not in ROWS:
            parser.error(f"there is no row {row}; there are {', '.join(ROWS)}")
    args.rounds = args.rounds or (2 if args.quick else 5)
    if not args.threads:
        from llmrun.engine.llama import default_threads

        args.threads = default_threads()
    # Both also where the shell has them ignored, so that servers and engines always end.
    signal.signal(signal.SIGINT, _end)
    signal.signal(signal.SIGTERM, _end)
    try:
        run(args)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run(args: argparse.Namespace) -> None:
    bench = Bench(args)
    libraries = f", libraries {bench.tools.libraries}" if bench.tools else ""
    print(
        f"{_cpu_name()}, {args.threads} threads, GOMP_SPINCOUNT {args.spins}, "
        f"steady threads {'off' if args.pinned else 'on'}{libraries}, "
        f"load {os.getloadavg()[0]:.1f}, {args.rounds} rounds\n"
        f"{'row':18} {'model':18} {'llmrun':>8} {'other':>8} {'':6} {'ratio':>6} (min..max)",
        flush=True,
    )
    for model in args.models:
        measure_model(bench, model)
    n_busy = [busy for row in bench.rows for busy in row.others_busy]
    if n_busy and statistics.median(n_busy) > 0.3:
        print(
            f"other programs kept {statistics.median(n_busy):.1f} cores busy (up to "
            f"{max(n_busy):.1f}): these figures are indications"
        )


if __name__ == "__main__":
    main()

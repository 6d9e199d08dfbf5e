"""Decode speed of llmrun's engine against the same build's high-level `Llama` class, in one run.

    python scripts/bench_vs_native.py MODEL.gguf [MODEL.gguf …] [--tokens 512] [--rounds 3]

Each side runs alone in its own process, in turns (A B A B …), on the same prompt, greedy, with the
end token ignored so that both make the same number of tokens. Printed: the median decode rate of
each side, their ratio, and for llmrun the Python time a token around the C calls (the engine
thread's own CPU time outside `llama_decode` and `llama_sampler_sample`).

An absolute rate says little on a shared machine; the ratio is of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "Once upon a time, in a village by the sea, there lived a clockmaker who"


def run_llmrun(model: Path, n_tokens: int, n_threads: int) -> dict[str, float]:
    """One generation through `llmrun.engine`, consumed as `llmrun run` does."""
    from llmrun.engine.loop import Engine
    from llmrun.engine.types import EngineOptions, FinishEvent, Request, SamplingParams, TextEvent

    options = EngineOptions(n_ctx=1024, n_threads=n_threads)
    with Engine.open([model], options) as engine:
        in_c = _time_c_calls(engine)
        prompt = tuple(engine.tokenizer.tokenize(PROMPT, add_special=True, parse_special=False))
        request = Request(prompt, SamplingParams(temperature=0), n_tokens, ignore_eog=True)
        finish = None
        with Path("/dev/null").open("w") as sink:
            for event in engine.submit(request):
                if isinstance(event, TextEvent):
                    sink.write(event.text)
                    sink.flush()
                elif isinstance(event, FinishEvent):
                    finish = event
    assert finish is not None and finish.usage.n_completion == n_tokens
    return {
        "tok_s": finish.timings.decode_tok_s,
        "python_ms_per_token": in_c["python_s"] / n_tokens * 1000,
    }


def _time_c_calls(engine: object) -> dict[str, float]:
    """Count the engine thread's time between the end of one C call and the start of the next.

    Wall time would also count waiting for a busy core, so this is the thread's CPU time.
    """
    backend = engine._backend  # type: ignore[attr-defined]
    total = {"python_s": 0.0}
    last = {"end": None}

    def timed(function):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            now = time.thread_time()
            if last["end"] is not None:
                total["python_s"] += now - last["end"]
            try:
                return function(*args)
            finally:
                last["end"] = time.thread_time()

        return call

    backend._decode = timed(backend._decode)
    new_sampler = backend.new_sampler

    def new_timed_sampler(params, seed):  # type: ignore[no-untyped-def]
        sampler = new_sampler(params, seed)
        sampler.sample = timed(sampler.sample)
        return sampler

    backend.new_sampler = new_timed_sampler
    return total


def run_high_level(model: Path, n_tokens: int, n_threads: int) -> dict[str, float]:
    """One streamed completion through `llama_cpp.Llama` with its own defaults."""
    import llama_cpp
    from llama_cpp import Llama

    # Both sides must make the same number of tokens, so neither may stop at an end token.
    llama_cpp.llama_vocab_is_eog = lambda vocab, token: False
    llama = Llama(str(model), n_ctx=1024, n_threads=n_threads, verbose=False)
    prompt = llama.tokenize(PROMPT.encode())
    stamps = []
    with Path("/dev/null").open("w") as sink:
        stream = llama.create_completion(
            prompt, max_tokens=n_tokens, temperature=0, stream=True, stop=[]
        )
        for chunk in stream:
            stamps.append(time.perf_counter())
            sink.write(chunk["choices"][0]["text"])
            sink.flush()
    n_made = llama.n_tokens - len(prompt) + 1  # the last token is never decoded
    assert abs(n_made - n_tokens) <= 1, n_made
    return {"tok_s": (n_tokens - 1) / (stamps[-1] - stamps[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="default: what llmrun chooses")
    parser.add_argument("--side", choices=["llmrun", "high-level"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.threads:
        from llmrun.engine.llama import default_threads

        args.threads = default_threads()
    if args.side:
        side = run_llmrun if args.side == "llmrun" else run_high_level
        print(json.dumps(side(args.models[0], args.tokens, args.threads)))
        return
    for model in args.models:
        results: dict[str, list[dict[str, float]]] = {"llmrun": [], "high-level": []}
        for _ in range(args.rounds):
            for side_name, rows in results.items():
                command = [sys.executable, __file__, str(model), "--side", side_name]
                command += ["--tokens", str(args.tokens), "--threads", str(args.threads)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
        ours = statistics.median(row["tok_s"] for row in results["llmrun"])
        theirs = statistics.median(row["tok_s"] for row in results["high-level"])
        python_ms = statistics.median(row["python_ms_per_token"] for row in results["llmrun"])
        print(
            f"{model.name}: llmrun {ours:.1f} tok/s, high-level {theirs:.1f} tok/s, "
            f"ratio {ours / theirs:.2f}; Python {python_ms:.4f} ms a token"
        )


if __name__ == "__main__":
    main()

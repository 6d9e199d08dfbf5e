"""llmrun's side of `bench_vs_native.py`: an engine in its own process that is told what to do.

    python scripts/bench_worker.py engine MODEL OPTIONS     jobs on stdin, results on stdout (JSON)
    python scripts/bench_worker.py python-time MODEL OPTIONS   one generation, C calls timed
    python scripts/bench_worker.py high-level MODEL OPTIONS    the binding's own `Llama` class

OPTIONS is JSON: fields of `EngineOptions`. A job is {"prompts": [[token, …], …], "n_new": n,
"n_at_once": n} and may hold "sampling": fields of `SamplingParams` (default: greedy); or
{"text": "…"}, to be tokenized. Every answer has exactly n_new tokens.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PROMPT = "Once upon a time, in a village by the sea, there lived a clockmaker who"
_N_TOKENS = 512


def serve_jobs(model: Path, options: dict[str, Any]) -> None:
    from llmrun.engine.loop import Engine
    from llmrun.engine.types import EngineOptions

    with Engine.open([model], EngineOptions(**options)) as engine:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            print(json.dumps(_do(engine, json.loads(line))), flush=True)


def _do(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    if "text" in job:
        tokens = engine.tokenizer.tokenize(job["text"], add_special=True, parse_special=False)
        return {"tokens": tokens}
    from llmrun.engine.types import FinishEvent, Request, SamplingParams

    sampling = SamplingParams(**job.get("sampling", {"temperature": 0}))

    def answer(prompt: list[int]) -> FinishEvent:
        request = Request(tuple(prompt), sampling, job["n_new"], ignore_eog=True)
        for event in engine.submit(request):
            finish = event
        assert isinstance(finish, FinishEvent)
        assert finish.usage.n_completion == job["n_new"]
        return finish

    with ThreadPoolExecutor(job["n_at_once"]) as pool:
        started = time.perf_counter()
        finishes = list(pool.map(answer, job["prompts"]))
        wall_s = time.perf_counter() - started
    return {
        "wall_s": wall_s,
        "ttft_s": [finish.timings.ttft_s for finish in finishes],
        "decode_tok_s": [finish.timings.decode_tok_s for finish in finishes],
        "n_cached": sum(finish.usage.n_cached for finish in finishes),
        "n_drafted": sum(finish.usage.n_drafted for finish in finishes),
        "n_accepted": sum(finish.usage.n_accepted for finish in finishes),
    }


def time_python(model: Path, options: dict[str, Any]) -> dict[str, float]:
    """One generation, consumed as `llmrun run` does, with the Python time around the C calls."""
    from llmrun.engine.loop import Engine
    from llmrun.engine.types import EngineOptions, FinishEvent, Request, SamplingParams, TextEvent

    with Engine.open([model], EngineOptions(**options)) as engine:
        in_python = _time_c_calls(engine)
        prompt = tuple(engine.tokenizer.tokenize(_PROMPT, add_special=True, parse_special=False))
        request = Request(prompt, SamplingParams(temperature=0), _N_TOKENS, ignore_eog=True)
        finish = None
        with Path("/dev/null").open("w") as sink:
            for event in engine.submit(request):
                if isinstance(event, TextEvent):
                    sink.write(event.text)
                    sink.flush()
                elif isinstance(event, FinishEvent):
                    finish = event
    assert finish is not None and finish.usage.n_completion == _N_TOKENS
    return {
        "tok_s": finish.timings.decode_tok_s,
        "python_ms": in_python["seconds"] / _N_TOKENS * 1000,
    }


def _time_c_calls(engine: Any) -> dict[str, float]:
    """Count the engine thread's time between the end of one C call and the start of the next.

    Wall time would also count waiting for a busy core, so this is the thread's CPU time.
    """
    backend = engine._backend
    total = {"seconds": 0.0}
    last: dict[str, float | None] = {"end": None}

    def timed(function: Any) -> Any:
        def call(*args: Any) -> Any:
            now = time.thread_time()
            if last["end"] is not None:
                total["seconds"] += now - last["end"]
            try:
                return function(*args)
            finally:
                last["end"] = time.thread_time()

        return call

    backend._decode = timed(backend._decode)
    new_sampler = backend.new_sampler

    def new_timed_sampler(params: Any, seed: int) -> Any:
        sampler = new_sampler(params, seed)
        sampler.sample = timed(sampler.sample)
        return sampler

    backend.new_sampler = new_timed_sampler
    return total


def run_high_level(model: Path, options: dict[str, Any]) -> dict[str, float]:
    """One streamed completion through `llama_cpp.Llama` with its own defaults."""
    import llama_cpp
    from llama_cpp import Llama

    # Both sides must make the same number of tokens, so neither may stop at an end token.
    llama_cpp.llama_vocab_is_eog = lambda vocab, token: False
    llama = Llama(str(model), n_ctx=options["n_ctx"], n_threads=options["n_threads"], verbose=False)
    prompt = llama.tokenize(_PROMPT.encode())
    stamps = []
    with Path("/dev/null").open("w") as sink:
        stream = llama.create_completion(
            prompt, max_tokens=_N_TOKENS, temperature=0, stream=True, stop=[]
        )
        for chunk in stream:
            stamps.append(time.perf_counter())
            sink.write(chunk["choices"][0]["text"])
            sink.flush()
    n_made = llama.n_tokens - len(prompt) + 1  # the last token is never decoded
    assert abs(n_made - _N_TOKENS) <= 1, n_made
    return {"tok_s": (_N_TOKENS - 1) / (stamps[-1] - stamps[0])}


def main() -> None:
    what, model, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if what == "engine":
        serve_jobs(model, options)
    elif what == "python-time":
        print(json.dumps(time_python(model, options)))
    else:
        print(json.dumps(run_high_level(model, options)))


if __name__ == "__main__":
    main()

"""Time to the first token of a long chat that is resumed, against reading it again, in one run.

    python scripts/bench_resume.py MODEL.gguf [--tokens 3000] [--rounds 3] [--json FILE]

A conversation of so many tokens is held and saved once. Then each round starts two fresh processes
in turn, which load the model and ask the next question: one puts the saved state back, the other
reads all again. What counts is the time from "the model is loaded" to the first token; for the
resumed one that includes finding, reading, checking and restoring the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmrun.chat.messages import Message
from llmrun.chat.session import ChatSession
from llmrun.engine.loop import Engine
from llmrun.engine.state_store import PrefixKey, StateStore, hash_text, identify_files
from llmrun.engine.types import EngineOptions, SamplingParams

OWNER = "bench"
LARGE = 1 << 40
TOPICS = "the tide, a clock, two bridges, the winter market, salt, old maps, a lamp, the harbour"


def open_engine(arguments: argparse.Namespace) -> Engine:
    options = EngineOptions(
        n_ctx=arguments.tokens + 1024,
        n_threads=arguments.threads,
        steady_threads=False,
        speculative="off",
    )
    return Engine.open([arguments.model], options)


def key_of(engine: Engine, model: Path) -> PrefixKey:
    template = hash_text(engine.facts.chat_template or "")
    return PrefixKey(identify_files([model]), engine.state_key, template)


def session_of(engine: Engine, messages: list[Message], n_answer: int) -> ChatSession:
    sampling = SamplingParams(temperature=0)
    return ChatSession(engine, messages=messages, sampling=sampling, max_tokens=n_answer)


def hold(arguments: argparse.Namespace) -> dict[str, object]:
    """Write the conversation and its state into the folder."""
    with open_engine(arguments) as engine:
        messages: list[Message] = []
        session = session_of(engine, messages, 32)
        n = 0
        while session.context_used < arguments.tokens - 100:
            n += 1
            text = f"Part {n} of the story tells of {TOPICS}, and of {n * 7} people who saw it. "
            messages += [Message("user", text * 2), Message("assistant", f"Part {n}: " + text)]
            session = session_of(engine, messages, 32)
        list(session.send("What was in the first part?"))
        started = time.perf_counter()
        saved = engine.save_prefix(session.tokens, LARGE)
        assert saved is not None
        taken_s = time.perf_counter() - started
        store = StateStore(arguments.folder, LARGE)
        assert store.save(key_of(engine, arguments.model), saved, owner=OWNER)
        save_s = time.perf_counter() - started
        words = [{"role": m.role, "content": m.content} for m in session.messages]
        (arguments.folder / "messages.json").write_text(json.dumps(words))
        return {
            "n_tokens": len(saved.tokens),
            "n_bytes": saved.n_bytes,
            "take_s": taken_s,
            "save_s": save_s,
        }


def ask(arguments: argparse.Namespace) -> dict[str, object]:
    words = json.loads((arguments.folder / "messages.json").read_text())
    messages = [Message(word["role"], word["content"]) for word in words]
    with open_engine(arguments) as engine:
        session = session_of(engine, messages, 8)
        _ = session.context_used  # the template's process is up
        started = time.perf_counter()
        restored_s = 0.0
        if arguments.step == "resume":
            store = StateStore(arguments.folder, LARGE, sys.exit)
            saved = store.load_owned(key_of(engine, arguments.model), OWNER)
            assert saved is not None and engine.restore_prefix(saved)
            session.recall(saved.tokens)
            restored_s = time.perf_counter() - started
        answer = ""
        first_s = 0.0
        for delta in session.send("And in the second?"):
            first_s = first_s or time.perf_counter() - started
            answer += delta.text
        finish = session.last_finish
        assert finish is not None
        # The text is handed out thirty times a second; the engine's own time is what counts.
        total_s = min(first_s, restored_s + finish.timings.ttft_s)
        return {
            "ttft_s": total_s,
            "restore_s": restored_s,
            "n_prompt": finish.usage.n_prompt,
            "n_cached": finish.usage.n_cached,
            "answer": answer,
        }


def run_step(step: str, arguments: argparse.Namespace) -> dict[str, object]:
    command = [sys.executable, __file__, str(arguments.model), "--step", step]
    command += ["--folder", str(arguments.folder), "--tokens", str(arguments.tokens)]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--step", choices=("hold", "resume", "reread"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(hold(arguments) if arguments.step == "hold" else ask(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        held = run_step("hold", arguments)
        print(
            f"{arguments.model.name}: {held['n_tokens']} tokens, {held['n_bytes'] / 1e6:.1f} MB, "
            f"saved in {held['save_s']:.3f} s"
        )
        rows: dict[str, list[dict[str, object]]] = {"resume": [], "reread": []}
        for _ in range(arguments.rounds):
            for step, results in rows.items():
                results.append(run_step(step, arguments))
        median = {s: statistics.median(float(r["ttft_s"]) for r in rows[s]) for s in rows}
        for step, results in rows.items():
            times = ", ".join(f"{float(r['ttft_s']):.3f}" for r in results)
            last = results[-1]
            print(
                f"{step}: first token after {median[step]:.3f} s ({times}); "
                f"{last['n_cached']} of {last['n_prompt']} tokens not read"
            )
        ratio = median["resume"] / median["reread"]
        is_same = len({str(r["answer"]) for results in rows.values() for r in results}) == 1
        print(f"resume / reread = {ratio:.4f} = 1/{1 / ratio:.0f}; same answers: {is_same}")
        if arguments.json:
            result = {"model": arguments.model.name, "held": held, "runs": rows, "ratio": ratio}
            arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

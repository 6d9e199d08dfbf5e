"""What only a process of its own can show: silence, interrupts, memory, exits, and which calls of
the library end the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.models import smollm2_path

ROOT = Path(__file__).parents[2]

START = """
import sys
from pathlib import Path
from llmrun.engine.loop import Engine
from llmrun.engine.types import *
path = Path(sys.argv[1])
options = EngineOptions(n_ctx=512, n_threads=2)
def prompt(engine, text="Once upon a time"):
    return tuple(engine.tokenizer.tokenize(text, add_special=True, parse_special=False))
"""


def start(script: str, **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START + script, str(smollm2_path())],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,  # type: ignore[call-overload]
    )


def run(script: str, **more: object) -> tuple[int, str, str]:
    with start(script, **more) as child:
        out, err = child.communicate(timeout=120)
    return child.returncode, out, err


def test_from_load_to_close_nothing_is_printed() -> None:
    script = """
with Engine.open([path], options) as engine:
    list(engine.submit(Request(prompt(engine), max_tokens=4)))
    cut = engine.submit(Request(prompt(engine)))
    next(cut)
    cut.cancel()
    list(cut)
    for grammar in ("root ::= [", "root ::= root", 'root ::= "a"'):
        try:
            list(engine.submit(Request(prompt(engine), SamplingParams(grammar=grammar), 2)))
        except Exception:
            pass
    aborted = engine.submit(Request(prompt(engine, "A fox. " * 60)))
    aborted.cancel()
try:
    Engine.open([path], EngineOptions(n_ctx=512, type_v="q8_0", flash_attn="off"))
except Exception:
    pass
try:
    Engine.open([path], options, on_progress=lambda progress: 1 / 0)
except ZeroDivisionError:
    pass
from llmrun.engine.llama import open_backend
try:
    open_backend(Path(__import__("os").devnull), options)
except Exception:
    pass
"""
    assert run(script) == (0, "", "")


def test_a_process_without_stderr_can_use_grammars() -> None:
    script = """
sys.stderr = None
with Engine.open([path], options) as engine:
    events = list(engine.submit(Request(prompt(engine), SamplingParams(grammar='root ::= "abc"'))))
print("".join(event.text for event in events if isinstance(event, TextEvent)))
"""
    assert run(script, preexec_fn=lambda: os.close(2))[:2] == (0, "abc\n")


def test_an_interrupt_in_mid_answer_ends_in_130() -> None:
    script = """
engine = Engine.open([path], options)
stream = engine.submit(Request(prompt(engine), SamplingParams(temperature=0), ignore_eog=True))
try:
    for event in stream:
        if isinstance(event, TextEvent):
            print("running", flush=True)
except KeyboardInterrupt:
    stream.cancel()
    rest = list(stream)
    engine.close()
    print(rest[-1].reason)
    sys.exit(130)
"""
    with start(script) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "")
    assert out.endswith("cancelled\n")


def test_an_interrupt_while_a_long_prompt_is_read() -> None:
    """The main thread only waits, so the interrupt comes at once."""
    script = """
engine = Engine.open([path], EngineOptions(n_ctx=4096, n_threads=2))
tokens = prompt(engine, " ".join(str(n) for n in range(1200)))[:4000]
stream = engine.submit(Request(tokens))
try:
    print("running", flush=True)
    list(stream)
except KeyboardInterrupt:
    stream.cancel()
    print([type(event).__name__ for event in stream][-1])
    engine.close()
    sys.exit(130)
"""
    with start(script) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "FinishEvent\n", "")


@pytest.mark.parametrize("text", ["Hi", "A fox. " * 70])
def test_leaving_without_close_is_quiet(text: str) -> None:
    """Otherwise Python's exit frees the library's memory under the running thread."""
    script = f"""
engine = Engine.open([path], options)
stream = engine.submit(Request(prompt(engine, {text!r}), ignore_eog=True))
{"next(stream)" if text == "Hi" else ""}
"""
    for _ in range(2):
        assert run(script) == (0, "", "")


def test_ten_rounds_of_open_and_close_keep_no_memory() -> None:
    script = """
import gc, weakref
def rss_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
for n in range(13):
    with Engine.open([path], options) as engine:
        sampling = SamplingParams(grammar='root ::= "a"+', dry_multiplier=1.0)
        for _ in range(3):
            list(engine.submit(Request(prompt(engine), sampling, max_tokens=2)))
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    if n == 2:
        before = rss_mib()
print(rss_mib() - before)
"""
    code, out, err = run(script)
    assert (code, err) == (0, "")
    assert float(out) < 25


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from llmrun.errors import WillNotFitError
try:
    Engine.open([path], EngineOptions(n_ctx=2_000_000))
except WillNotFitError as error:
    print(error.exit_code, error.message, error.hint)
"""
    code, out, err = run(script)
    assert (code, err) == (0, "")
    assert out.startswith("5 no memory for a context of 2000000 tokens pass --ctx ")


RAW_START = """
import ctypes, sys
from llmrun.engine.llama import open_backend
from llmrun.engine.types import *
from llmrun.engine.backend import Chunk
from pathlib import Path
b = open_backend(Path(sys.argv[1]), EngineOptions(
    n_ctx=256, n_ubatch=64, n_threads=1, speculative="off"))
C, ctx, vocab = b._C, b._ctx, b._vocab
memory = C.llama_get_memory(ctx)
def raw_batch(n, n_logits):
    batch = C.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i in range(n):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = 1, i, 1, 0
        batch.logits[i] = i >= n - n_logits
    return C.llama_decode(ctx, batch)
"""
FATAL = {
    "a batch over n_batch": "raw_batch(65, 1)",
    "more logits than n_outputs_max": "raw_batch(8, 2)",
    "sampling a row without logits": (
        "raw_batch(8, 1); s = C.llama_sampler_init_greedy(); C.llama_sampler_sample(s, ctx, 0)"
    ),
    "a position of sequence 300": "C.llama_memory_seq_pos_min(memory, 300)",
    "a piece beyond the vocabulary": (
        "C.llama_token_to_piece(vocab, 10**6, ctypes.create_string_buffer(8), 8, 0, True)"
    ),
    "accepting what a grammar forbids": (
        "g = C.llama_sampler_init_grammar(vocab, b'root ::= \"a\"', b'root');"
        "C.llama_sampler_accept(g, 5000)"
    ),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_the_wrapper_keeps_away_ends_a_process(name: str) -> None:
    """When this fails, the library has become kinder and a check of ours may go."""
    with start(RAW_START + FATAL[name]) as child:
        child.communicate(timeout=60)
    assert child.returncode in (-signal.SIGABRT, -signal.SIGSEGV)

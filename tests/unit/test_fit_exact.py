"""The allocator's side of the child: whatever the child does, there is an answer or a sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from llmrun.fit.exact import ChildAllocator
from llmrun.fit.types import BufferUse, Measurement, Setup
from llmrun.hardware import processes

ROOT = Path(__file__).resolve().parents[2]
SETUP = Setup(512)
GOOD = (
    '{"answers": [{"buffers": [["CPU", "CPU", 10, 20, 30]]}], "devices": [], "source": "breakdown"}'
)


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def says(text: str) -> list[str]:
    return python(f"import sys; sys.stdin.read(); print({text!r})")


def ask(command: list[str], *, limit_s: float = 30.0) -> tuple[object, str]:
    allocator = ChildAllocator(["model.gguf"], command=command, limit_s=limit_s)
    (answer,) = allocator.measure([SETUP])
    return answer, allocator.problem or ""


def is_alive(pid: int) -> bool:
    """Whether `pid` runs; an ended process that nobody waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_good_answer() -> None:
    answer, problem = ask(says(GOOD))
    assert answer == Measurement(SETUP, (BufferUse("CPU", "CPU", 10, 20, 30),))
    assert problem == ""


def test_what_drivers_print_before_the_answer_does_no_harm() -> None:
    assert ask(says("hello from the driver\n" + GOOD))[1] == ""


def test_the_child_is_told_all_of_each_setup(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    command = python(f"import sys; open({str(seen)!r}, 'wb').write(sys.stdin.buffer.read())")
    setups = [SETUP, Setup(1024, "q8_0", "q4_0", "off", 3, False, 64, 5, 7, 2, (1.0, 2.0), False)]
    allocator = ChildAllocator.of_headers([("a", b"AB\n", 100), ("b", b"CD", 50)], command=command)
    allocator.measure([*setups, SETUP])
    line, rest = seen.read_bytes().split(b"\n", 1)
    request = json.loads(line)
    assert request["setups"] == [json.loads(json.dumps(asdict(setup))) for setup in setups]
    assert request["files"] == [
        {"name": "a", "n_bytes": 100, "n_header_bytes": 3},
        {"name": "b", "n_bytes": 50, "n_header_bytes": 2},
    ]
    assert rest == b"AB\nCD"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not JSON",
        "[1, 2]",
        "{}",
        '{"answers": 5}',
        '{"answers": []}',
        '{"answers": [{}, {}]}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:12] or "nothing",
)
def test_garbage_is_no_answer(text: str) -> None:
    answer, problem = ask(says(text))
    assert answer is None
    assert problem == (
        "the process that asks llama.cpp for its memory gave an answer that makes no sense"
    )


@pytest.mark.parametrize(
    "buffers",
    [
        "[]",
        "5",
        '[["CPU", "CPU", 1, 2]]',
        '[["CPU", "CPU", 1, 2, -3]]',
        '[["CPU", "CPU", 1, 2, 3.5]]',
        '[["CPU", 7, 1, 2, 3]]',
        '[["CPU", "CPU", 1, 2, true]]',
        "[" + ",".join(['["CPU", "CPU", 1, 2, 3]'] * 100) + "]",
    ],
)
def test_buffers_that_make_no_sense_are_no_answer(buffers: str) -> None:
    answer, _ = ask(says(GOOD.replace('[["CPU", "CPU", 10, 20, 30]]', buffers)))
    assert answer is None


def test_a_refused_setup_leaves_the_others(tmp_path: Path) -> None:
    text = json.dumps(
        {
            "answers": [{"error": "no \x1b[31mway"}, {"buffers": [["CPU", "CPU", 1, 2, 3]]}],
            "devices": [],
            "source": "breakdown",
        }
    )
    allocator = ChildAllocator(["model.gguf"], command=says(text))
    refused, answered = allocator.measure([SETUP, Setup(1024)])
    assert refused is None and answered is not None
    assert allocator.problem is None
    assert allocator.refusal(SETUP) == "no \\x1b[31mway"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
        (
            "sys.stderr.write('x.cpp:1: GGML_ASSERT(n > 0) failed\\nmore\\n'); "
            "sys.stderr.flush(); signal.signal(signal.SIGABRT, signal.SIG_DFL); os.abort()",
            "was ended by SIGABRT: x.cpp:1: GGML_ASSERT(n > 0) failed",
        ),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("sys.exit(3)", "ended with code 3"),
        (f"print({GOOD!r}, flush=True); os.kill(os.getpid(), signal.SIGTERM)", "SIGTERM"),
        ("print('x' * (9 << 20))", "printed more than"),
        ("sys.stderr.write('\\x1b]0;' + 'e' * (1 << 22)); sys.exit(1)", "ended with code 1"),
    ],
)
def test_a_crash_is_a_sentence(script: str, words: str) -> None:
    answer, problem = ask(python(f"import os, signal, sys; {script}"))
    assert answer is None
    assert words in problem
    assert problem.isprintable() and len(problem) < 400


def test_a_child_that_cannot_be_started() -> None:
    assert "did not start" in ask(["/nonexistent/python"])[1]


def test_a_python_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    allocator = ChildAllocator(["model.gguf"])
    assert allocator.measure([SETUP]) == (None,)
    assert "interpreter is not known" in (allocator.problem or "")


def test_a_hang_ends_with_all_that_the_child_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"""
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({str(pids)!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{other.pid}}")
time.sleep(600)
"""
    # Long enough for the child to start, which a test must not bet on: asked again until it did.
    for limit_s in (2.0, 10.0, 30.0):
        answer, problem = ask(python(script), limit_s=limit_s)
        assert answer is None
        assert f"was not done after {limit_s:g} s" in problem
        if pids.exists():
            break
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: not is_alive(pid))


def test_an_answer_is_asked_for_once(tmp_path: Path) -> None:
    count = tmp_path / "count"
    script = f"""
import json, sys
open({str(count)!r}, "a").write("x")
setups = json.loads(sys.stdin.readline())["setups"]
answers = [{{"buffers": [["CPU", "CPU", s["n_ctx"], 2, 3]]}} for s in setups]
print(json.dumps({{"answers": answers, "devices": [], "source": "breakdown"}}))
"""
    allocator = ChildAllocator(["model.gguf"], command=python(script))
    first = allocator.measure([Setup(512), Setup(1024), Setup(512)])
    assert [answer.weights_bytes for answer in first if answer] == [512, 1024, 512]
    assert allocator.measure([Setup(1024), Setup(512)]) == (first[1], first[0])
    assert count.read_text() == "x"
    allocator.measure([Setup(1024), Setup(2048)])
    assert count.read_text() == "xx"


def test_after_a_failure_nothing_is_asked_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    allocator = ChildAllocator(
        ["model.gguf"], command=python(f"open({str(count)!r}, 'a').write('x')")
    )
    assert allocator.measure([SETUP]) == (None,)
    assert allocator.measure([Setup(1024)]) == (None,)
    assert count.read_text() == "x"


def test_devices_are_the_childs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrun.fit.exact.has_gpu_library", lambda _: True)
    text = '{"devices": [{"name": "CUDA0", "type": "gpu"}, {"name": "CPU", "type": "cpu"}]}'
    assert ChildAllocator(["model.gguf"], command=says(text)).devices == ("CUDA0",)
    inside = text.replace("[", '[{"name": "Vulkan0", "type": "igpu"}, ')
    assert ChildAllocator(["model.gguf"], command=says(inside)).devices == ("CUDA0",)
    alone = inside.replace('"gpu"', '"accel"')
    assert ChildAllocator(["model.gguf"], command=says(alone)).devices == ("Vulkan0",)
    broken = ChildAllocator(["model.gguf"], command=python("import os; os.abort()"))
    assert broken.devices == ()
    assert broken.problem is not None
    answered = ChildAllocator(["model.gguf"], command=says(GOOD.replace("[]", '["Metal"]')))
    answered.measure([SETUP])
    assert answered.devices == ("Metal",)


def test_a_build_without_gpus_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmrun.fit.exact.has_gpu_library", lambda _: False)
    assert ChildAllocator(["model.gguf"], command=["/nonexistent"]).devices == ()


def test_the_child_finds_the_program_but_nothing_in_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('taken over')")
    (tmp_path / "llmrun").mkdir()
    (tmp_path / "llmrun" / "__init__.py").write_text("raise SystemExit('taken over')")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from llmrun.fit.exact import ChildAllocator
from llmrun.fit.types import Setup
allocator = ChildAllocator(["missing.gguf"])
print(allocator.measure([Setup(512)]), allocator.problem)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert "failed to open GGUF file" in done.stdout


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "parent only"])
def test_an_interrupt_ends_parent_and_child_quietly(tmp_path: Path, whole_group: bool) -> None:
    started = tmp_path / "pid"
    hang = (
        "import os, time; "
        f"open({str(started)!r} + '.new', 'w').write(str(os.getpid())); "
        f"os.rename({str(started)!r} + '.new', {str(started)!r}); time.sleep(600)"
    )
    script = f"""
import sys
from llmrun.fit.exact import ChildAllocator
from llmrun.fit.types import Setup
try:
    ChildAllocator(["model.gguf"], command=[sys.executable, "-c", {hang!r}], limit_s=500).measure(
        [Setup(512)]
    )
except KeyboardInterrupt:
    print("interrupted")
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as parent:
        wait_until(started.exists)
        pid = int(started.read_text())
        assert is_alive(pid)
        if whole_group:
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.send_signal(signal.SIGINT)
        out, err = parent.communicate(timeout=60)
    assert (parent.returncode, out, err) == (0, "interrupted\n", "")
    wait_until(lambda: not is_alive(pid))


def test_a_child_that_reads_nothing_does_not_block(tmp_path: Path) -> None:
    header = bytes(4 << 20)
    allocator = ChildAllocator.of_headers(
        [("big", header, len(header))], command=python(f"print({GOOD!r})")
    )
    assert allocator.measure([SETUP])[0] is not None


def test_the_limit_is_passed_on_so_that_an_orphan_ends(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    command = python(f"import sys; open({str(seen)!r}, 'w').write(sys.stdin.readline())")
    ChildAllocator(["model.gguf"], command=command, limit_s=7).measure([SETUP])
    assert json.loads(seen.read_text())["limit_s"] == 8


def test_no_threads_are_left(tmp_path: Path) -> None:
    import threading

    before = set(threading.enumerate())
    ask(says(GOOD))
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_the_command_names_no_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/a", "/b"])
    assert processes.module_command("m")[-3:] == ["2", "/a", "/b"]

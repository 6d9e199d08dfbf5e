"""Processes that answer: bounded in time and output, and their end in words."""

from __future__ import annotations

import os
import signal
import socket
import sys

from llmrun.hardware.processes import Reply, ask_command, ask_module
from llmrun.hardware.sources import Probe, find_library_folder

LONG_S = 60.0


def ask(code: str, text: str = "", timeout_s: float = LONG_S, **changes) -> Reply:
    return ask_command([sys.executable, "-c", code], [text.encode()], timeout_s, **changes)


def test_a_question_and_its_answer():
    code = "import sys; print(sys.stdin.read()[::-1], end='')"
    assert ask(code, "abc") == Reply("cba")


def test_a_process_that_does_not_read():
    assert ask("pass", "x" * 4096).problem is None


def test_a_hang_is_ended():
    reply = ask("import time; time.sleep(600)", timeout_s=0.2)
    assert reply == Reply(None, "was not done after 0.2 s")


def test_an_endless_answer_is_ended():
    code = "import sys\nwhile True: sys.stdout.write('x' * 4096)"
    assert ask(code, max_bytes=1000) == Reply(None, "printed more than 1000 bytes")


def test_a_process_that_goes_on_after_too_long_an_answer_is_ended():
    code = (
        "import os, time\n"
        "try:\n"
        "    while True: os.write(1, b'x' * 4096)\n"
        "except OSError: time.sleep(600)"
    )
    assert ask(code, timeout_s=30.0, max_bytes=1000).problem == "printed more than 1000 bytes"


def test_an_endless_complaint_does_not_block_it():
    code = "import sys; sys.stderr.write('x' * (1 << 20)); print('done')"
    assert ask(code).stdout.strip() == "done"


def test_a_crash_is_told_with_its_last_words():
    code = (
        "import os, sys; print('half', flush=True); sys.stderr.write('GGML_ASSERT(x)\\x1b[0m\\n'); "
        f"sys.stderr.flush(); os.kill(os.getpid(), {int(signal.SIGABRT)})"
    )
    reply = ask(code)
    assert reply.stdout.strip() == "half"
    assert "GGML_ASSERT(x)\\x1b[0m" in reply.problem
    if os.name != "nt":
        assert reply.problem.startswith("was ended by SIGABRT: ")


def test_a_failure_is_told_with_its_code():
    assert ask("raise SystemExit(3)").problem == "ended with code 3"


def test_a_command_that_is_not_there():
    reply = ask_command(["llmrun-no-such-command"], [], 1.0)
    assert reply.stdout is None
    assert reply.problem.startswith("did not start: ")


def test_a_grandchild_that_holds_the_pipe_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as server:
        # It outlives its parent until this test hangs up.
        waits = f"import socket; socket.create_connection({server.getsockname()!r}).recv(1)"
        code = (
            "import subprocess, sys; "
            f"subprocess.Popen([sys.executable, '-c', {waits!r}], stdin=subprocess.DEVNULL); "
            "print('done', flush=True)"
        )
        reply = ask(code)
        connection, _ = server.accept()
        connection.close()
    assert reply.problem is None
    assert reply.stdout.strip() == "done"


def test_a_module_runs_in_a_python_that_ignores_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('taken from the wrong folder')")
    monkeypatch.chdir(tmp_path)
    # The module and its own imports came from the library.
    reply = ask_module("json.tool", "{}", LONG_S)
    assert (reply.stdout or "").strip() == "{}" and reply.problem is None
    assert ask_module("llmrun.engine.probe", "{}", LONG_S).problem is None


def test_the_library_folder_can_be_overridden(monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/build/lib")
    assert str(find_library_folder()) == os.path.normpath("/build/lib")
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH")
    folder = find_library_folder()
    assert folder is not None
    assert folder.parts[-2:] == ("llama_cpp", "lib")


def test_the_binding_is_not_imported_to_find_it():
    code = (
        "import sys; from llmrun.hardware.probe import *; detect_machine(devices=True);"
        "print([m for m in sys.modules if m.startswith('llama_cpp')])"
    )
    reply = ask_command(
        [sys.executable, "-c", code], [], LONG_S,
        environ=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert (reply.stdout or "").strip() == "[]", reply.problem


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    free = Probe().disk_free
    assert free(tmp_path / "a" / "b") > 0
    assert free(tmp_path / ("x" * 5000)) is None

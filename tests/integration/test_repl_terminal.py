"""The session in a process of its own on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from llmrun.chat.store import SessionStore

CHILD = """
import sys, threading
from pathlib import Path
from rich.console import Console
from llmrun.chat.session import ChatSession
from llmrun.chat.store import SessionStore
from llmrun.repl.loop import Repl
from llmrun.repl.prompt import make_line_reader
from tests.fakes.fake_engine import FakeEngine, FakeStream

original = FakeStream._run

def hang(self):
    # After its text this answer waits until somebody cancels it.
    for event in original(self):
        yield event
        if getattr(event, "text", "").endswith("~"):
            while not self.cancelled:
                threading.Event().wait(0.01)

FakeStream._run = hang
state = Path(sys.argv[1])
repl = Repl(
    ChatSession(FakeEngine(["first **bold** ~", "second"])),
    console=Console(markup=False), err_console=Console(stderr=True, markup=False),
    model_title="fake", saver=SessionStore(state),
)
code = repl.run(make_line_reader(history_path=state / "history", complete=repl.complete))
print("exit code", code)
sys.exit(code)
"""

DEADLINE_S = 60


class Terminal:
    def __init__(self, tmp_path):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (30, 100))
        environ = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": os.getcwd()}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(slave), os.O_RDWR)),
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def type(self, keys):
        os.write(self.master, keys)

    def wait_for(self, text):
        """Read until `text` is shown, and return what was shown before it."""
        end = time.monotonic() + DEADLINE_S
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, self.seen
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # the other end is closed
                    data = b""
                assert data, self.seen
                # The input line asks where the cursor is.
                for _ in range(data.count(b"\x1b[6n")):
                    self.type(b"\x1b[1;1R")
                self.seen += data
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def test_stop_an_answer_go_on_and_leave(terminal, tmp_path):
    terminal.wait_for(b">>> ")
    terminal.type(b"hi\r")
    terminal.wait_for(b"~")
    terminal.type(b"typed ahead\x03")
    stopped = terminal.wait_for(b"Stopped; what came is kept.")
    assert b"typed" not in stopped and b"^C" not in stopped
    terminal.wait_for(b">>> ")
    terminal.type(b"\x1b[200~two\nlines\x1b[201~\r")
    terminal.wait_for(b"second")
    terminal.wait_for(b">>> ")
    terminal.type(b"\x04")
    terminal.wait_for(b"exit code 0")
    assert terminal.process.wait(DEADLINE_S) == 0
    (saved,) = SessionStore(tmp_path).list()
    messages = SessionStore(tmp_path).load(saved.id).messages
    assert [message.content for message in messages] == [
        "hi",
        "first **bold** ~",
        "two\nlines",
        "second",
    ]
    assert messages[1].interrupted

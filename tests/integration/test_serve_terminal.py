"""`llmrun serve` as a process whose lines nobody takes, be it a terminal that Ctrl-S stopped or a
pipe that is full: it answers, and it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.raw_http import Client

pty = pytest.importorskip("pty")

LIMIT_S = 60
CTRL_S = b"\x13"
# With as long a path as the log shows, a pipe is full after some 300 requests.
LONG_PATH = "/" + "x" * 199
N_REQUESTS = 500


@contextlib.contextmanager
def serving(home: Path, stderr: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server without any model. `stderr` is closed here."""
    environment = {**os.environ, "HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}
    # As users have it: where streams have no buffer, nobody waits for one at the end.
    environment.pop("PYTHONUNBUFFERED", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrun", "serve", "--allow-pull", "--port", "0", "-v"],
        env={**environment, "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )
    os.close(stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read_port(stream: int, last: bytes) -> int:
    """The port, once the server has said `last`."""
    shown = b""
    while last not in shown:
        shown += os.read(stream, 65536)
    port = re.search(rb"http://127\.0\.0\.1:(\d+)", shown)
    assert port is not None
    return int(port[1])


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_nobody_waits_for_lines_that_are_not_taken(tmp_path: Path, kind: str) -> None:
    ours, theirs = pty.openpty() if kind == "terminal" else os.pipe()
    try:
        with serving(tmp_path, theirs) as process:
            port = read_port(ours, b"idle" if kind == "terminal" else b"try: ")
            if kind == "terminal":
                os.write(ours, CTRL_S)
            for _ in range(N_REQUESTS):
                client = Client(("127.0.0.1", port))
                client.request(f"GET {LONG_PATH}")
                assert client.read_answer().status == 404
                client.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) == 0
    finally:
        os.close(ours)

"""Downloads in processes of their own: killed, interrupted, out of disk, three at once."""

from __future__ import annotations

import hashlib
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun.hub.layout import RepoPaths
from llmrun.hub.parts import load_done
from tests.fakes.loopback_hub import LoopbackHub

SIZE = 6_000_000
MODEL = random.Random(7).randbytes(SIZE)
SHA = hashlib.sha256(MODEL).hexdigest()
FILE = "big-Q4_0.gguf"
PATIENCE_S = 60.0


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub({"org/big": {FILE: MODEL}}) as hub:
        yield hub


class Puller:
    """Child processes that pull org/big into a cache below the test's folder."""

    def __init__(self, server: LoopbackHub, folder: Path) -> None:
        self.environment = server.environment(folder)
        self.paths = RepoPaths(folder / "hf" / "hub", "org/big")

    def start(self, limit_file_bytes: int | None = None) -> subprocess.Popen[str]:
        def limit() -> None:
            if limit_file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_file_bytes, limit_file_bytes))

        return subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.puller", "org/big"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )

    def on_disk(self) -> int:
        done = load_done(self.paths.parts(SHA), self.paths.partial(SHA), SIZE)
        return sum(end - start for start, end in done)

    def wait_for(self, process: subprocess.Popen[str], n_bytes: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.on_disk() < n_bytes:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def finish(self, process: subprocess.Popen[str]) -> str:
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err
        assert Path(out.strip()).read_bytes() == MODEL
        assert [path.name for path in (self.paths.root / "blobs").iterdir()] == [SHA]
        return err


@pytest.fixture
def puller(server: LoopbackHub, tmp_path: Path) -> Puller:
    return Puller(server, tmp_path)


def test_killed_again_and_again_it_loses_next_to_nothing(
    server: LoopbackHub, puller: Puller
) -> None:
    server.chunk_bytes, server.delay_s = 8192, 0.004
    for n_bytes in (1_000_000, 2_500_000, 4_500_000):
        process = puller.start()
        puller.wait_for(process, n_bytes)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert puller.on_disk() >= n_bytes
    server.delay_s = 0.0
    puller.finish(puller.start())
    assert server.served[FILE] < 1.05 * SIZE


def test_ctrl_c_ends_with_130_and_the_next_run_continues(
    server: LoopbackHub, puller: Puller
) -> None:
    server.chunk_bytes, server.delay_s = 8192, 0.004
    process = puller.start()
    puller.wait_for(process, 1_000_000)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    kept = puller.on_disk()
    assert kept >= 1_000_000
    server.delay_s = 0.0
    server.requests.clear()
    puller.finish(puller.start())
    asked = [str(r.range).removeprefix("bytes=").split("-") for r in server.gets(FILE)]
    assert sum(int(last) - int(first) + 1 for first, last in asked) == SIZE - kept


def test_three_at_once_make_one_download(server: LoopbackHub, puller: Puller) -> None:
    server.delay_s = 0.02
    first = puller.start()
    puller.wait_for(first, 1)
    processes = [first, puller.start(), puller.start()]
    notes = [puller.finish(process) for process in processes]
    assert server.served[FILE] == SIZE
    assert sum("another process is downloading" in note for note in notes) == 2


def test_a_full_disk_is_final_and_keeps_what_came(server: LoopbackHub, puller: Puller) -> None:
    process = puller.start(limit_file_bytes=3_000_000)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 5, err
    assert "cannot write to" in err and "Traceback" not in err
    kept = puller.on_disk()
    assert kept > 0
    server.served.clear()
    puller.finish(puller.start())
    assert server.served[FILE] == SIZE - kept


def test_the_hubs_own_library_waits_for_the_same_lock(server: LoopbackHub, puller: Puller) -> None:
    server.delay_s = 0.02
    process = puller.start()
    puller.wait_for(process, 1)
    code = (
        f"from huggingface_hub import hf_hub_download\nprint(hf_hub_download('org/big', {FILE!r}))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        env=puller.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert Path(other.stdout.strip()).read_bytes() == MODEL
    puller.finish(process)
    assert server.served[FILE] == SIZE

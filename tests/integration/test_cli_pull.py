"""`pull`, `show`, `run` and `search` against a hub on loopback, with the real hub library."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.cli import model_bytes
from tests.fakes.loopback_hub import LoopbackHub

REPO = "org/tiny-GGUF"


@pytest.fixture(scope="module")
def content() -> bytes:
    return model_bytes(file_type=0)


@pytest.fixture
def hub(content: bytes) -> Iterator[LoopbackHub]:
    files = {"tiny-F32.gguf": content, "tiny-Q8_0.gguf": model_bytes(), "README.md": b"# tiny\n"}
    with LoopbackHub({REPO: files}) as hub:
        yield hub


def llmrun(hub: LoopbackHub, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmrun", *words], env=hub.environment(folder), timeout=120,
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_pull_prints_the_path_and_tells_the_rest_on_stderr(
    hub: LoopbackHub, content: bytes, tmp_path: Path
) -> None:
    done = llmrun(hub, tmp_path, "pull", f"{REPO}:f32")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.rstrip("\n")).read_bytes() == content
    assert "fits: " in done.stderr and "sha256 checked" in done.stderr
    again = llmrun(hub, tmp_path, "pull", f"{REPO}:f32")
    assert again.stdout == done.stdout and "already here" in again.stderr
    # The header's bytes, then the file, and nothing the second time.
    assert hub.served["tiny-F32.gguf"] < 2.5 * len(content)


def test_pull_json_is_events_then_one_envelope(hub: LoopbackHub, tmp_path: Path) -> None:
    done = llmrun(hub, tmp_path, "pull", REPO, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and "downloading" not in done.stderr
    assert all("event" in line for line in lines[:-1])
    assert lines[0]["event"] == "begin" and lines[-2]["event"] == "end"
    envelope = lines[-1]
    assert (envelope["llmrun"], envelope["command"], envelope["status"]) == (1, "pull", "ok")
    (model,) = envelope["data"]["models"]
    assert model["downloaded"] and Path(model["path"]).exists()
    assert model["quant"] == "Q8_0" and len(model["files"][0]["sha256"]) == 64
    assert model["fit"]["verdict"] == "fits" and model["fit"]["source"] == "exact"


def test_what_will_not_fit_is_refused_before_the_weights(
    hub: LoopbackHub, content: bytes, tmp_path: Path
) -> None:
    done = llmrun(hub, tmp_path, "pull", f"{REPO}:f32", "--ctx", "100000000")
    assert done.returncode == 5 and "--force" in done.stderr and done.stdout == ""
    assert not (tmp_path / "hf" / "hub" / "models--org--tiny-GGUF" / "snapshots").exists()
    assert hub.served["tiny-F32.gguf"] <= len(content)


def test_show_of_a_remote_model_downloads_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    done = llmrun(hub, tmp_path, "show", REPO, "--json")
    assert done.returncode == 0, done.stdout
    data = json.loads(done.stdout)["data"]
    assert data["path"] is None and data["origin"] == "hub" and data["layers"] == 2
    assert {row["tag"] for row in data["alternatives"]} == {"F32", "Q8_0"}
    assert len(data["files"][0]["sha256"]) == 64
    listed = json.loads(llmrun(hub, tmp_path, "list", "--json").stdout)
    assert listed["data"]["models"] == []


def test_run_pulls_what_is_missing_and_prints_only_the_answer(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    words = ["run", REPO, "Hi", "--max-tokens", "4", "--temperature", "0"]
    first = llmrun(hub, tmp_path, *words)
    assert first.returncode == 0, first.stderr
    assert "downloading" in first.stderr
    n_requests = len(hub.requests)
    second = llmrun(hub, tmp_path, *words)
    assert second.stdout == first.stdout and second.stderr == ""
    assert len(hub.requests) == n_requests  # a stored model asks nobody


def test_run_json_with_a_download_is_one_line(hub: LoopbackHub, tmp_path: Path) -> None:
    done = llmrun(hub, tmp_path, "run", REPO, "Hi", "--max-tokens", "4", "--json")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["data"]["model"] == f"{REPO}:Q8_0"


def test_rm_after_pull_frees_the_blob(hub: LoopbackHub, tmp_path: Path) -> None:
    llmrun(hub, tmp_path, "pull", REPO)
    done = llmrun(hub, tmp_path, "rm", f"{REPO}:Q8_0", "--yes", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["data"]["freed"] > 0
    assert json.loads(llmrun(hub, tmp_path, "list", "--json").stdout)["data"]["models"] == []


@pytest.mark.parametrize(
    ("reference", "code"), [(f"{REPO}:q3_k_m", 3), ("org/none-GGUF", 3), (f"{REPO}:Q9", 3)]
)
def test_what_the_hub_does_not_have(
    hub: LoopbackHub, reference: str, code: int, tmp_path: Path
) -> None:
    done = llmrun(hub, tmp_path, "pull", reference)
    lines = done.stderr.splitlines()
    assert done.returncode == code and lines[0].startswith("error: ")
    assert len(lines) <= 4 and lines[-1].startswith("try: ")


def test_a_damaged_download_is_7_and_leaves_no_file(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.inject("corrupt", match="tiny-Q8_0.gguf")
    done = llmrun(hub, tmp_path, "pull", REPO, "--json")
    envelope = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 7 and envelope["status"] == "error"
    assert not list((tmp_path / "hf").rglob("snapshots/*/*.gguf"))


def test_ctrl_c_in_mid_download_keeps_the_bytes(
    hub: LoopbackHub, content: bytes, tmp_path: Path
) -> None:
    hub.chunk_bytes, hub.delay_s = 8192, 0.02
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrun", "pull", f"{REPO}:f32", "--json"],
        env=hub.environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["event"] != "progress":
        pass  # bytes are on the disk now
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in err and "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["errors"][0]["code"] == "interrupted"
    (partial,) = json.loads(llmrun(hub, tmp_path, "list", "--json").stdout)["data"]["models"]
    assert partial["state"] == "partial" and 0 < partial["size"] < len(content)
    hub.delay_s = 0
    hub.served.clear()
    done = llmrun(hub, tmp_path, "pull", f"{REPO}:f32")
    assert done.returncode == 0 and "already here" in done.stderr
    assert Path(done.stdout.strip()).read_bytes() == content


def test_a_hub_that_is_down_is_6(hub: LoopbackHub, tmp_path: Path) -> None:
    environ = hub.environment(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-m", "llmrun", "pull", REPO], env=environ, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 6 and done.stdout == "" and "Traceback" not in done.stderr

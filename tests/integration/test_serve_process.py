"""`llmrun serve` as a process of its own, on a real small model: start, answer, end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.models import smollm2_path

LIMIT_S = 120


@contextmanager
def _serving(home: Path, *more: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), **variables}
    command = [sys.executable, "-m", "llmrun", "serve", str(smollm2_path()), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--ctx", "512", "--parallel", "2", *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _wait_ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    found: dict[str, Any] = json.loads(line)
    assert found["event"] == "ready"
    return found


def _post(url: str, body: object, **headers: str) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        return json.load(answer)


def test_it_answers_and_ends_with_zero(tmp_path: Path) -> None:
    with _serving(tmp_path, "--json") as process:
        ready = _wait_ready(process)
        model = ready["loaded"][0]["model"]
        assert ready["loaded"][0]["parallel"] == 2
        body = {
            "model": model,
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "Say hi."}],
        }
        answer = _post(f"{ready['url']}/v1/chat/completions", body)
        assert answer["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, err
        assert [json.loads(line)["event"] for line in out.splitlines()] == ["draining", "stopped"]
        assert "Traceback" not in err


def test_what_it_tells_a_person_works_when_pasted(tmp_path: Path) -> None:
    """The printed curl line: its address, headers and body, with a key in the environment."""
    with _serving(tmp_path, LLMRUN_API_KEY="a-key-of-some-length") as process:
        assert process.stderr is not None
        lines = []
        while not lines or not lines[-1].startswith("try: "):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        words = shlex.split(lines[-1].removeprefix("try: "))
        assert words[0] == "curl"
        headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
        assert headers["Authorization"] == "Bearer $LLMRUN_API_KEY"
        headers["Authorization"] = "Bearer a-key-of-some-length"
        body = json.loads(words[words.index("-d") + 1])
        answer = _post(words[1], {**body, "max_tokens": 3}, **headers)
        assert answer["choices"][0]["message"]["role"] == "assistant"
        del headers["Authorization"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            _post(words[1], body, **headers)
        assert caught.value.code == 401
        caught.value.close()
        assert "a-key-of-some-length" not in "".join(lines)


def test_ctrl_c_while_it_loads_ends_it_without_a_traceback(tmp_path: Path) -> None:
    with _serving(tmp_path) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "listens" in line
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)
        # Between listening and ready there may be next to nothing on a fast machine.
        assert process.returncode in (0, 130)
        assert "Traceback" not in err

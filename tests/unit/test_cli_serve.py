"""`serve` before it listens: what it refuses, and what it prints instead of serving."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llmrun.cli.serve import _as_row, _describe
from llmrun.cli.serve_status import describe_status
from llmrun.engine.types import EngineCounters
from llmrun.server.opener import Opened
from llmrun.server.types import ModelCard
from tests.fakes.cli import Cli
from tests.fakes.fake_engine import FakeEngine


def test_an_address_of_the_network_needs_a_key(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("serve", cli.model(), "--host", "0.0.0.0")
    assert run.code == 2
    assert "--api-key" in run.err and "--insecure" in run.err


@pytest.mark.parametrize(
    ("flag", "value", "word"),
    [
        ("--api-key", "two words", "API key"),
        ("--api-key", "", "API key"),
        ("--api-key-file", "/nowhere/keys", "key file"),
        ("--keep-alive", "soon", "--keep-alive"),
        ("--allowed-host", "*", "DNS rebinding"),
        ("--cors-origin", "*", "every web page"),
        ("--port", "70000", "--port"),
        ("--parallel", "0", "--parallel"),
        ("--kv-unified", "perhaps", "one of auto, on, off"),
    ],
)
def test_a_bad_value_is_told_before_anything_loads(
    tmp_path: Path, flag: str, value: str, word: str
) -> None:
    cli = Cli(tmp_path)
    run = cli("serve", cli.model(), flag, value)
    assert run.code == 2, run.err
    assert word in run.err
    assert cli.services is not None and cli.services.opened == []


def test_a_port_in_use_is_told_with_a_way_out(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = cli("serve", cli.model(), "--port", str(taken.getsockname()[1]))
    assert run.code == 1
    assert "--port" in run.err
    assert cli.services is not None and cli.services.opened == []


def test_without_any_model_it_says_how_to_get_one(tmp_path: Path) -> None:
    run = Cli(tmp_path)("serve")
    assert run.code == 3
    assert "llmrun serve smollm2-135m" in run.err


def test_the_key_shows_nowhere(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.environ["LLMRUN_API_KEY"] = "hunter2hunter2"
    assert "hunter2" not in cli("config").out
    assert "hunter2" not in cli("config", "--json").out
    assert "hunter2" not in cli("serve", "--print-config", "curl").out
    assert "hunter2" not in cli("config", "set", "api_key", "hunter2").err


def test_client_settings_are_printed_and_nothing_is_served(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("serve", "qwen3-4b", "--print-config", "curl", "--port", "9000")
    assert run.code == 0
    assert "http://127.0.0.1:9000/v1/chat/completions" in run.out and "qwen3-4b" in run.out
    assert run.err == ""
    assert "opencode" in cli("serve", "--print-config", "list").out
    assert cli("serve", "--print-config", "emacsen").code == 2


def test_the_status_line_says_what_runs() -> None:
    busy = EngineCounters(n_ctx=16384, n_seq_max=4, n_running=2, n_waiting=3, n_cells=1234)
    line = describe_status([busy], 118.4, ["loading other 40%"])
    assert line == "2 streams · 118 tok/s · KV 1234/16384 (7 %) · 3 waiting · loading other 40%"
    assert describe_status([], 0.0, []) == "idle"


@pytest.mark.parametrize(
    ("n_parallel", "kv_unified", "words"),
    [
        (1, True, "1 request at a time, context 8K;"),
        (4, True, "4 requests at once, context 8K each, 16K together;"),
        (4, False, "4 requests at once, context 8K each, in caches of their own;"),
    ],
)
def test_a_ready_model_says_what_each_request_can_have(
    n_parallel: int, kv_unified: bool, words: str
) -> None:
    opened = Opened(
        ModelCard("tiny", 1),
        "chat",
        8192,
        lambda: None,
        FakeEngine(n_ctx=16384 if kv_unified else 8192),
        n_parallel=n_parallel,
        kv_unified=kv_unified,
    )
    assert _describe(opened).startswith(f"tiny: {words}")
    assert _as_row(opened)["kv_unified"] is kv_unified

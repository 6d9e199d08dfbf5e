"""The tests' own fences (tests/conftest.py)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import platformdirs
import pytest


def test_no_folder_of_the_user_is_in_reach() -> None:
    home = Path(os.environ["HOME"])
    assert home.name.startswith("llmrun-tests-")
    assert Path.home() == home
    for folder in (
        platformdirs.user_config_path("llmrun"),
        platformdirs.user_state_path("llmrun"),
        platformdirs.user_cache_path("llmrun"),
        Path(os.environ["HF_HOME"]),
        Path(os.environ["HF_HUB_CACHE"]),
    ):
        assert folder.is_relative_to(home)
    assert not Path(os.environ["LLMRUN_TEST_MODELS"]).is_relative_to(home)
    assert "HF_TOKEN" not in os.environ


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "example.invalid"])
def test_nothing_but_loopback_is_reached(address: str) -> None:
    with pytest.raises(OSError, match="tests"):
        socket.create_connection((address, 80))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(family, kind) as made, pytest.raises(OSError, match="tests"):
            made.connect((address, 80))


def test_loopback_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, port)).close()

"""What `serve --print-config` names is what the server answers to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.cli import Cli


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_goes_by_the_name_that_the_server_gives_it(tmp_path: Path, is_folder: bool) -> None:
    cli = Cli(tmp_path)
    path = Path(cli.model())
    if is_folder:
        folder = path.parent / "own"
        folder.mkdir()
        path = path.rename(folder / path.name)
    given = str(path.parent if is_folder else path)
    run = cli("serve", given, "--print-config", "openai-python")
    assert run.code == 0
    assert f"model={json.dumps(path.name.removesuffix('.gguf'))}" in run.out
    assert str(path.parent) not in run.out


def test_settings_come_as_json_too(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    run = cli("serve", "qwen3-4b", "--print-config", "env", "--json")
    data = json.loads(run.out)["data"]
    assert data["client"] == "env" and "OLLAMA_HOST=http://127.0.0.1:8080" in data["settings"]
    listed = json.loads(cli("serve", "--print-config", "list", "--json").out)["data"]
    assert listed["clients"]["curl"] == "a command"

"""What `serve --print-config` prints is what the named program can read."""

from __future__ import annotations

import ast
import json
import shlex
import tomllib

import pytest
import yaml

from llmrun.errors import UsageError
from llmrun.server.client_config import client_config, client_names

URL = "http://127.0.0.1:8080"
MODELS = ("org/repo:Q4_K_M", "it's")


def _config(client: str, has_key: bool = False) -> str:
    return client_config(client, URL, MODELS, has_key=has_key)


@pytest.mark.parametrize("name", [name for name, _ in client_names()])
@pytest.mark.parametrize("has_key", [False, True])
def test_every_client_gets_the_address_and_the_first_model(name: str, has_key: bool) -> None:
    text = _config(name, has_key)
    assert "127.0.0.1:8080" in text
    if name not in ("open-webui", "env"):
        assert "org/repo:Q4_K_M" in text
    # The key itself is never printed; where one is needed its variable is named.
    assert ("LLMRUN_API_KEY" in text) == has_key or name == "zed"


@pytest.mark.parametrize("name", ["opencode", "zed"])
def test_json_settings_are_json_with_all_models(name: str) -> None:
    json.loads(_config(name))
    assert "it's" in _config(name)


def test_the_yaml_settings_name_every_model_and_a_base() -> None:
    found = yaml.safe_load(_config("continue"))
    assert [model["model"] for model in found["models"]] == list(MODELS)
    assert {model["apiBase"] for model in found["models"]} == {f"{URL}/v1"}


def test_the_toml_settings_name_a_provider_that_they_define() -> None:
    found = tomllib.loads(_config("codex", has_key=True))
    assert found["model_providers"][found["model_provider"]]["env_key"] == "LLMRUN_API_KEY"


@pytest.mark.parametrize("name", ["claude-code", "aider", "open-webui", "env"])
def test_shell_settings_are_words_a_shell_takes_apart(name: str) -> None:
    for line in _config(name).splitlines():
        assert shlex.split(line)
    exports = [line for line in _config(name).splitlines() if line.startswith("export ")]
    assert all(len(shlex.split(line)) == 2 for line in exports)


@pytest.mark.parametrize("name", ["openai-python", "anthropic-python", "ollama-python"])
@pytest.mark.parametrize("has_key", [False, True])
def test_programs_are_python(name: str, has_key: bool) -> None:
    tree = ast.parse(_config(name, has_key))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}  # fmt: skip
    assert ("os" in imported) == has_key


def test_an_unknown_client_is_refused_with_the_way_to_the_list() -> None:
    with pytest.raises(UsageError) as caught:
        _config("opencod")
    assert "opencode" in (caught.value.why or "")
    assert caught.value.hint == "llmrun serve --print-config list"

"""No text of a request becomes a path: neither to open a file nor to learn that one is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrun.cli.serve_models import ServedModels
from llmrun.errors import LlmrunError, NotFoundError
from llmrun.text import escape_line
from tests.fakes.cli import Cli
from tests.fakes.served import served


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """A server whose working folder is full of models that nobody serves."""
    home = tmp_path / "home"
    for name in ("secret.gguf", "tiny-model/secret.gguf", "org/name/secret.gguf", "gemma-3/a.gguf"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(Path(Cli(home).model()).read_bytes())
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    return Cli(tmp_path)


def requests_for(home: str) -> list[str]:
    return [
        "secret.gguf",
        "secret",
        "./secret.gguf",
        "../home/secret.gguf",
        f"{home}/secret.gguf",
        f"file://{home}/secret.gguf",
        "~/secret.gguf",
        "tiny-model",
        "org/name",
        "org/name:secret.gguf",
        "org/name:../../secret.gguf",
        "gemma-3",
        "/etc/passwd",
        "/dev/zero",
        "C:\\secret.gguf",
        "\\\\host\\share\\secret.gguf",
        "secret.gguf\x00",
    ]


def test_files_that_are_not_served_are_not_found(cli: Cli):
    models = served(cli)
    for text in requests_for(os.getcwd()):
        with pytest.raises(NotFoundError):
            models.find(text)
    assert cli.services.opened == []


def test_pulls_take_no_files_and_ask_nobody_for_them(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    models = served(cli, allow_pull=True)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("went on")

    monkeypatch.setattr("llmrun.cli.serve_models.acquire", fail)
    for text in requests_for(os.getcwd()):
        if text in ("secret", "org/name:secret.gguf"):
            continue  # names like any other; nothing here is called so
        with pytest.raises(LlmrunError):
            models.pull(text, lambda _share: None)


def test_what_there_is_cannot_be_told_from_the_answer(cli: Cli):
    models = served(cli, allow_pull=True)

    def answer(text: str) -> str:
        with pytest.raises(LlmrunError) as caught:
            models.find(text)
        return caught.value.message.replace(text, "X")

    assert answer("secret.gguf") == answer("absent.gguf")
    assert answer("/etc/passwd") == answer("/etc/absent")
    assert answer("org/name") == answer("org/absent")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> ServedModels:
    cli = Cli(tmp_path_factory.mktemp("names"))
    cli.store_model()
    return served(cli)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=60) | st.from_regex(r"[./~\\a-z:@-]{1,40}", fullmatch=True))
def test_any_text_is_a_name_or_not_found(listed: ServedModels, text: str):
    try:
        card = listed.find(text)
    except NotFoundError as error:
        assert escape_line(error.message) == error.message
    else:
        assert card.name == "org/tiny-GGUF:Q8_0"

"""No string from outside can drive the terminal: model text, names, metadata, messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrun.errors import LlmrunError
from llmrun.hub.types import SearchHit
from tests.fakes.cli import Cli
from tests.fakes.fake_engine import FakeEngine, fake_facts
from tests.unit.test_ui_output import err_of, make_output, out_of

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SGR = re.compile("\x1b\\[[0-9;]*m")
EVIL = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\x9d52;c;eA==\x9ce\rf\u202eg\x08h"


def is_clean(text: str) -> bool:
    """Only our own colours are left when a terminal is written to."""
    return UNSAFE.search(SGR.sub("", text)) is None


@pytest.mark.parametrize("tty", [False, True])
def test_model_text_and_thinking(tty: bool, tmp_path: Path) -> None:
    facts = fake_facts("{# <think> #}{{ messages[0].content }}")
    for chunk in (1, 3, 1000):
        engine = FakeEngine([f"<think>{EVIL}</think>{EVIL}"], facts=facts, chunk=chunk)
        cli = Cli(tmp_path, engine)
        run = cli("run", cli.model(), "Hi", tty=tty)
        assert run.code == 0 and "\\x1b]0;owned\\x07" in run.out
        assert is_clean(run.out) and is_clean(run.err)
        as_json = cli("run", cli.model(), "Hi", "--json", tty=tty)
        assert as_json.data["text"] == EVIL and is_clean(as_json.out)


@pytest.mark.parametrize("code", [*range(32), *range(127, 160), 0x202E, 0x2066])
def test_every_control_character(code: int, tmp_path: Path) -> None:
    text = f"<{chr(code)}>"
    output = make_output(tmp_path, tty=True, verbose=1)
    output.line(text)
    output.stream(text)
    output.table(("h",), [(text,)])
    for say in (output.note, output.tell, output.warn, output.detail, output.aside):
        say(text)
    output.fail(LlmrunError(text, why=text, hint=text))
    output.event({"x": text})
    assert is_clean(out_of(output)) and is_clean(err_of(output))


@given(st.text())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_error_is_four_clean_lines(tmp_path: Path, text: str) -> None:
    output = make_output(tmp_path)
    output.fail(LlmrunError(text, why=text, hint=text))
    assert is_clean(err_of(output)) and err_of(output).count("\n") <= 4


def test_metadata_of_a_model(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model(name=EVIL, metadata={"general.license.name": EVIL})
    for words in (["show", model], ["show", model, "--json"], ["run", model, "Hi", "-v"]):
        run = cli(*words)
        assert run.code == 0 and is_clean(run.out) and is_clean(run.err)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_names_of_files_and_words_of_users(flags: list[str], tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.store_model(name="x\x1b[31m\u202e-Q8_0.gguf")
    path = Path(cli.model())
    evil = path.rename(path.with_name("y\x1b]0;z\x07.gguf"))
    for words in (
        ["list"], ["verify"], ["show", EVIL], ["run", EVIL, "Hi"], ["rm", EVIL, "--yes"],
        [EVIL], ["run", "--" + EVIL], ["config", "set", EVIL, EVIL], ["pull", str(evil)],
        ["run", str(evil), "Hi", "--json-schema", EVIL], ["chat", "--resume", EVIL],
    ):  # fmt: skip
        run = cli(*words, *flags)
        assert is_clean(run.out) and is_clean(run.err), words


def test_search_hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def search(self, text: str, limit: int) -> tuple[SearchHit, ...]:
            return (SearchHit(EVIL, 1, 1, EVIL, 5, EVIL, 5, False, ((EVIL, 5),)),)

    monkeypatch.setattr("llmrun.cli.services.Services.hub", lambda self, *, offline: Hub())
    run = Cli(tmp_path)("search", "x")
    assert run.code == 0 and is_clean(run.out) and is_clean(run.err)


def test_values_of_the_config_file(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    cli.write_config('system = "\\u001b[2J\\u009b"\n')
    for words in (["config"], ["config", "--json"]):
        run = cli(*words)
        assert run.code == 0 and is_clean(run.out) and is_clean(run.err)
    cli.write_config('"\\u001b[2J" = 1\n')
    run = cli("config")
    assert run.code == 2 and is_clean(run.err)


def test_prompts_are_not_in_errors_or_details(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(n_ctx=30))
    run = cli("run", cli.model(), "CANARY" * 20, "--system", "CANARY", "-vv")
    assert run.code == 1 and "CANARY" not in run.err

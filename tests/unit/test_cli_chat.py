"""`llmrun chat`: which model it opens, and what it hands to the session."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrun.errors import EngineError
from tests.fakes.cli import GB, Cli
from tests.fakes.fake_engine import FakeEngine, fake_facts


def test_a_piped_conversation(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(["One.", "Two."]))
    run = cli("chat", cli.model(), "--system", "Be brief.", stdin="Hi\nAgain\n")
    assert run.code == 0
    assert run.out.split() == ["One.", "Two."]
    assert "Be brief." in cli.engine.prompt_text() and "Hi" in cli.engine.prompt_text()
    assert cli.engine.closed


def test_a_conversation_can_be_continued(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(["One.", "Two."]))
    model = cli.model()
    assert cli("chat", "--continue").code == 3
    cli("chat", model, stdin="Hi\n")
    assert cli("chat", "--continue", stdin="Again\n").code == 0
    assert "Hi" in cli.engine.prompt_text() and "One." in cli.engine.prompt_text()
    (saved,) = (tmp_path / "state" / "sessions").glob("*.json")
    assert cli("chat", "--resume", saved.stem[:15], stdin="More\n").code == 0
    assert "Again" in cli.engine.prompt_text()
    assert cli("chat", "--resume", "no-such").code == 3
    assert cli("chat", "--resume", "x", "--continue").code == 2


def test_json_is_wrong_usage(tmp_path: Path) -> None:
    run = Cli(tmp_path)("chat", "--json")
    assert run.code == 2 and run.envelope["errors"][0]["code"] == "usage"


def test_without_a_name_the_configured_model_is_taken(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    used, configured = cli.model("used.gguf"), cli.model("configured.gguf")
    cli("run", used, "Hi")
    cli("chat", stdin="Hi\n")
    assert cli.services.opened[0][0] == (Path(used),)
    cli.write_config(f'model = "{configured}"\n')
    cli("chat", stdin="Hi\n")
    assert cli.services.opened[0][0] == (Path(configured),)


def test_the_last_used_stored_model_is_taken(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    link = cli.store_model()
    cli("run", "org/tiny-GGUF:Q8_0", "Hi", "--offline")
    assert cli("chat", "--offline", stdin="Hi\n").code == 0
    assert cli.services.opened[0][0] == (link,)


def test_a_last_used_model_that_is_gone_is_not_taken(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model()
    cli("run", model, "Hi")
    Path(model).unlink()
    run = cli("chat")
    assert run.code == 2 and "no model is named" in run.err


def test_a_recommendation_asks_before_it_downloads(tmp_path: Path) -> None:
    cli = Cli(tmp_path, memory=16 * GB)
    run = cli("chat", tty=True, stdin="n\n")
    assert run.code == 3 and "fits this machine. Download it? [y/N]" in run.err
    assert not (tmp_path / "hub").exists()
    # Nobody to ask: say what could be done, fetch nothing.
    run = cli("chat")
    assert run.code == 2 and "would fit this machine" in run.err and "llmrun chat " in run.err


@pytest.mark.parametrize(("memory", "limit"), [(2 * GB, 1 * GB), (16 * GB, 8 * GB)])
def test_the_recommendation_leaves_half_of_the_memory(
    memory: int, limit: int, tmp_path: Path
) -> None:
    from llmrun.catalog.load import load_catalog

    cli = Cli(tmp_path, memory=memory)
    err = cli("chat", tty=True, stdin="n\n").err
    (entry,) = [e for e in load_catalog().entries() if f"yet. {e.title} (" in err]
    assert entry.n_bytes <= limit
    assert not entry.has("embedding") and not entry.has("rerank")


def test_no_recommendation_without_memory(tmp_path: Path) -> None:
    run = Cli(tmp_path, memory=1000)("chat", tty=True, stdin="y\n")
    assert run.code == 3 and "smollm2-135m" in run.err


def test_model_can_be_switched_and_failure_keeps_the_old_one(tmp_path: Path) -> None:
    engines = [FakeEngine(["One."]), FakeEngine(["Two."])]
    left = list(engines)

    def open_next() -> FakeEngine:
        if not left:
            raise EngineError("it does not load")
        return left.pop(0)

    cli = Cli(tmp_path, open_next)
    one, two = cli.model("one.gguf"), cli.model("two.gguf")
    run = cli("chat", one, stdin=f"Hi\n/model {two}\nAgain\n/model {one}\nMore\n")
    assert run.out.split() == ["One.", "Two.", "Two."]
    assert "it does not load" in run.err
    assert all(engine.closed for engine in engines)


def test_thinking_options(tmp_path: Path) -> None:
    facts = fake_facts(
        "{% if enable_thinking %}T{% endif %}{# <think> #}U{{ messages[0].content }}"
    )
    cli = Cli(tmp_path, FakeEngine(["<think>hm</think>Yes."], facts=facts))
    model = cli.model()
    assert cli("chat", model, "--no-think", stdin="Hi\n").code == 0
    assert not cli.engine.prompt_text().startswith("T")
    assert cli("chat", model, "--think", stdin="Hi\n").code == 0
    assert cli.engine.prompt_text().startswith("T")

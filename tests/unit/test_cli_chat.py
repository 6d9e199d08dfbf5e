"""`llmrun chat`: which model it opens, and what it hands to the session."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrun.errors import EngineError
from llmrun.hardware.machine import Cpu, Machine, Memory
from tests.fakes.cli import GB, Cli, FakeServices
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
    assert run.code == 3 and " fits this machine, about " in run.err
    assert " tok/s. Download it? [y/N]" in run.err
    assert not (tmp_path / "hub").exists()
    # Nobody to ask: say what could be done, fetch nothing.
    run = cli("chat")
    assert run.code == 2 and " fits this machine, " in run.err and "try: llmrun chat " in run.err


@pytest.mark.parametrize("memory", [2 * GB, 16 * GB, 64 * GB])
def test_the_recommendation_is_that_of_the_ranking(memory: int, tmp_path: Path) -> None:
    from llmrun.catalog.load import load_catalog
    from llmrun.fit.ranking import rank

    cli = Cli(tmp_path, memory=memory)
    err = cli("chat", tty=True, stdin="n\n").err
    best = next(each for each in rank(load_catalog(), cli.services.machine()) if each.runs)
    assert f"No model yet. {best.entry.title} (" in err
    assert best.needed_bytes <= memory
    assert not best.entry.has("embedding") and not best.entry.has("rerank")


def test_where_nothing_is_fluent_the_best_that_runs_is_recommended(tmp_path: Path) -> None:
    class Slow(FakeServices):
        def machine(self) -> Machine:
            return Machine(Cpu(1, 1, 1), Memory(8 * GB, 8 * GB, bandwidth_bytes_s=1e8))

    run = Cli(tmp_path, services=Slow)("chat", tty=True, stdin="n\n")
    assert run.code == 3 and " is the best that runs on this machine, about 0." in run.err


def test_no_recommendation_without_memory(tmp_path: Path) -> None:
    run = Cli(tmp_path, memory=1000)("chat", tty=True, stdin="y\n")
    assert run.code == 3 and "smollm2-135m" in run.err


class Engines:
    """Opens one fake engine after the other; the most that were open at once is in `n_max`."""

    def __init__(self, *made: FakeEngine | BaseException) -> None:
        self.made = list(made)
        self.opened: list[FakeEngine] = []
        self.n_max = 0

    def __call__(self) -> FakeEngine:
        made = self.made.pop(0)
        if isinstance(made, BaseException):
            raise made
        self.opened.append(made)
        self.n_max = max(self.n_max, sum(not engine.closed for engine in self.opened))
        return made


def test_model_can_be_switched_and_one_is_open_at_a_time(tmp_path: Path) -> None:
    engines = Engines(FakeEngine(["One."]), FakeEngine(["Two."]))
    cli = Cli(tmp_path, engines)
    one, two = cli.model("one.gguf"), cli.model("two.gguf")
    run = cli("chat", one, stdin=f"Hi\n/model {two}\nAgain\n")
    assert run.out.split() == ["One.", "Two."]
    assert engines.n_max == 1 and all(engine.closed for engine in engines.opened)


@pytest.mark.parametrize("failure", [EngineError("it does not load"), KeyboardInterrupt()])
def test_a_failing_switch_opens_the_old_model_again(failure: BaseException, tmp_path: Path) -> None:
    engines = Engines(FakeEngine(["One."]), failure, FakeEngine(["Back."]))
    cli = Cli(tmp_path, engines)
    one, two = cli.model("one.gguf"), cli.model("two.gguf")
    run = cli("chat", one, stdin=f"Hi\n/model {two}\nAgain\n")
    assert run.out.split() == ["One.", "Back."]
    assert ("it does not load" if isinstance(failure, EngineError) else "stopped") in run.err
    assert cli.services.opened[2][0] == (Path(one),)
    assert "Hi" in engines.opened[1].prompt_text()
    assert engines.n_max == 1 and all(engine.closed for engine in engines.opened)


def test_a_switch_to_what_is_no_model_leaves_the_old_one_open(tmp_path: Path) -> None:
    engines = Engines(FakeEngine(["One.", "Two."]))
    cli = Cli(tmp_path, engines)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no GGUF")
    lines = f"Hi\n/model no-such-model\n/model {broken}\nAgain\n"
    run = cli("chat", cli.model(), stdin=lines)
    assert run.out.split() == ["One.", "Two."]
    assert len(engines.opened) == 1
    assert "no-such-model" in run.err and "is not a GGUF file" in run.err


def test_a_continued_conversation_keeps_its_settings(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    model = cli.model()
    cli.write_config('system = "From the file."\ntemperature = 1.5\n')
    flags = ("--temperature", "0.3", "--top-k", "7", "--max-tokens", "9", "--system", "Be brief.")
    cli("chat", model, *flags, stdin="Hi\n")
    cli("chat", "--continue", "--top-k", "5", stdin="Again\n")
    request = cli.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, request.max_tokens) == (0.3, 5, 9)
    assert "Be brief." in cli.engine.prompt_text()
    cli("chat", "--continue", "--system", "Be long.", stdin="Again\n")
    assert "Be long." in cli.engine.prompt_text()
    assert "Be brief." not in cli.engine.prompt_text()


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

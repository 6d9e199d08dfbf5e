"""What `run --prompt-cache` and `chat` keep on disk of what was read, and `prune` of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrun.engine.types import Request
from llmrun.errors import EngineError
from tests.fakes.cli import Cli
from tests.fakes.fake_engine import FakeEngine, fake_facts

DOCUMENT = "A long text that is asked about again and again. " * 4


class Fresh:
    """A Cli whose every call is a new process: an engine that has read nothing."""

    def __init__(self, folder: Path, **facts: object) -> None:
        self.facts = fake_facts(**facts)
        self.engines: list[FakeEngine] = []
        self.answers = ["Yes."]
        self.cli = Cli(folder, self.open)
        self.folder = folder / "cache" / "prefixes"

    def open(self) -> FakeEngine:
        self.engines.append(FakeEngine(self.answers, facts=self.facts))
        return self.engines[-1]

    def cached(self, *arguments: str, **more: object) -> int:
        """Tokens that `run` need not read."""
        run = self.cli("run", *arguments, "--json", stdin_tty=True, **more)
        assert run.code == 0, run.err
        self.err = run.err
        return int(run.data["usage"]["cached_tokens"])

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*"))


@pytest.fixture
def fresh(tmp_path: Path) -> Fresh:
    return Fresh(tmp_path)


# ---- run


def test_a_second_run_reads_only_what_is_new(fresh: Fresh) -> None:
    model = fresh.cli.model()
    assert fresh.cached(model, DOCUMENT + "What?", "--prompt-cache") == 0
    n = fresh.cached(model, DOCUMENT + "Why?", "--prompt-cache")
    assert n > len(DOCUMENT)
    assert len(fresh.files) == 1  # too little was new
    assert fresh.cached(model, DOCUMENT * 2 + "Why?", "--prompt-cache") > len(DOCUMENT)
    assert len(fresh.files) == 2
    assert fresh.cached(model, DOCUMENT * 2 + "Who?", "--prompt-cache") > 2 * len(DOCUMENT)


def test_without_the_flag_nothing_is_kept_or_used(fresh: Fresh) -> None:
    model = fresh.cli.model()
    fresh.cached(model, DOCUMENT)
    assert fresh.files == []
    fresh.cached(model, DOCUMENT, "--prompt-cache")
    assert fresh.cached(model, DOCUMENT) == 0
    assert fresh.cached(model, "short", "--prompt-cache") < 30
    assert len(fresh.files) == 1


def test_a_grown_prompt_takes_the_place_of_its_beginning(fresh: Fresh) -> None:
    model = fresh.cli.model()
    fresh.cached(model, DOCUMENT, "--prompt-cache", "--raw")
    (before,) = fresh.files
    longer = DOCUMENT + "Yes." + DOCUMENT
    assert fresh.cached(model, longer, "--prompt-cache", "--raw") >= len(DOCUMENT)
    (after,) = fresh.files
    assert after != before


def test_another_model_or_template_gets_nothing(fresh: Fresh) -> None:
    fresh.cached(fresh.cli.model(), DOCUMENT, "--prompt-cache")
    assert fresh.cached(fresh.cli.model("other-Q8_0.gguf"), DOCUMENT, "--prompt-cache") == 0
    fresh.facts = fake_facts(fresh.facts.chat_template + " ")
    assert fresh.cached(fresh.cli.model(), DOCUMENT, "--prompt-cache") == 0


def test_a_damaged_file_is_told_and_read_again(fresh: Fresh) -> None:
    model = fresh.cli.model()
    fresh.cached(model, DOCUMENT, "--prompt-cache")
    (path,) = fresh.files
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert fresh.cached(model, DOCUMENT, "--prompt-cache") == 0
    assert "damaged" in fresh.err
    assert fresh.cached(model, DOCUMENT, "--prompt-cache") > 0
    assert fresh.err == ""


def test_with_no_space_nothing_is_kept(fresh: Fresh) -> None:
    model = fresh.cli.model()
    fresh.cached(model, DOCUMENT, "--prompt-cache", "--prefix-gb", "0")
    assert fresh.files == []


def test_where_prompts_part_a_model_that_forgets_keeps_its_state(tmp_path: Path) -> None:
    fresh = Fresh(tmp_path, is_recurrent=True)
    model = fresh.cli.model()

    def asked() -> Request:
        return fresh.engines[-1].requests[-1]

    fresh.cached(model, DOCUMENT + "What?", "--prompt-cache")
    assert asked().come_back_to == ()
    fresh.cached(model, DOCUMENT + "Why?", "--prompt-cache")
    (n,) = asked().come_back_to
    text = bytes(asked().prompt[i] for i in range(n) if asked().prompt[i] < 256).decode()
    assert text == "user\n" + DOCUMENT + "Wh"
    assert len(fresh.files) == 2


# ---- chat


def test_a_conversation_is_not_read_again(fresh: Fresh) -> None:
    model = fresh.cli.model()
    fresh.cli("chat", model, stdin=DOCUMENT + "\n")
    assert len(fresh.files) == 1
    run = fresh.cli("chat", "--continue", "-v", stdin="More\n")
    assert run.code == 0 and "need not be read again" in run.err
    held = fresh.engines[-1].streams[-1]._n_cached
    assert held > len(DOCUMENT)
    assert len(fresh.files) == 1  # its own, in place of the old one
    fresh.cli("chat", "--continue", stdin="And\n")
    assert fresh.engines[-1].streams[-1]._n_cached > held


def test_a_conversation_that_was_only_looked_at_is_left_as_it_was(fresh: Fresh) -> None:
    fresh.cli("chat", fresh.cli.model(), stdin=DOCUMENT + "\n")
    before = fresh.files[0].read_bytes()
    assert fresh.cli("chat", "--continue", stdin="").code == 0
    assert fresh.files[0].read_bytes() == before


def test_a_short_conversation_is_not_worth_a_file(fresh: Fresh) -> None:
    fresh.cli("chat", fresh.cli.model(), stdin="Hi\n")
    assert fresh.files == []


def test_a_long_turn_is_kept_at_once(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the session ends: a kill then takes nothing."""
    fresh.answers = ["Yes.", KeyError("killed")]
    monkeypatch.setattr("llmrun.cli.prefixes._LONG_TURN_TOKENS", 100)
    run = fresh.cli("chat", fresh.cli.model(), stdin=DOCUMENT + "\nMore\n")
    assert run.code == 1
    assert len(fresh.files) == 1


def test_with_its_conversation_the_prefix_goes(fresh: Fresh) -> None:
    fresh.cli("chat", fresh.cli.model(), stdin=DOCUMENT + "\n")
    assert len(fresh.files) == 1
    assert fresh.cli("chat", "--continue", stdin="/undo\n").code == 0
    assert list((fresh.folder.parents[1] / "state" / "sessions").glob("*.json")) == []
    assert fresh.files == []


def test_clear_and_load_keep_each_conversation(fresh: Fresh) -> None:
    model = fresh.cli.model()
    lines = [DOCUMENT, "/save one", "/clear", "Second. " + DOCUMENT, "/load one", "More"]
    assert fresh.cli("chat", model, stdin="\n".join(lines) + "\n").code == 0
    assert len(fresh.files) == 2
    # The engine of the test holds one conversation at a time.
    assert fresh.engines[-1].streams[-1]._n_cached > len(DOCUMENT)


def test_a_damaged_state_does_not_stop_a_conversation(fresh: Fresh) -> None:
    fresh.cli("chat", fresh.cli.model(), stdin=DOCUMENT + "\n")
    fresh.files[0].write_bytes(fresh.files[0].read_bytes()[:-1])
    run = fresh.cli("chat", "--continue", stdin="More\n")
    assert run.code == 0 and "damaged" in run.err and run.out == "Yes.\n"
    assert len(fresh.files) == 1


def test_an_engine_that_fails_does_not_stop_the_session(fresh: Fresh, monkeypatch) -> None:
    def fail(*_args: object) -> None:
        raise EngineError("no memory")

    monkeypatch.setattr(FakeEngine, "save_prefix", fail)
    assert fresh.cli("chat", fresh.cli.model(), stdin=DOCUMENT + "\n").code == 0
    assert fresh.files == []


# ---- the oldest exchanges


def test_only_when_asked_the_oldest_exchanges_go(tmp_path: Path) -> None:
    def cli(folder: Path) -> Cli:
        return Cli(folder, FakeEngine(["Yes."], n_ctx=600))

    lines = "\n".join([f"Question {i}. " + "x" * 150 for i in range(4)]) + "\n"
    refused = cli(tmp_path / "a")
    (tmp_path / "a").mkdir()
    run = refused("chat", refused.model(), "--system", "Be brief.", stdin=lines)
    assert run.code == 1 and "more than the context of 600" in run.err
    (tmp_path / "b").mkdir()
    shifting = cli(tmp_path / "b")
    run = shifting(
        "chat", shifting.model(), "--system", "Be brief.", "--context-shift", stdin=lines
    )
    assert run.code == 0 and "Dropped 2 messages" in run.err
    prompt = shifting.engine.prompt_text()
    assert "Be brief." in prompt and "Question 3" in prompt and "Question 0" not in prompt


# ---- prune


def test_prune_shows_and_frees_it(fresh: Fresh) -> None:
    model = fresh.cli.model()
    fresh.cached(model, DOCUMENT, "--prompt-cache")
    data = fresh.cli("prune", "--dry-run", "--json").data
    (row,) = data["files"]
    assert row["kind"] == "prefix" and row["path"] == str(fresh.files[0])
    assert row["repo"] == model and row["size"] == data["total"] > 0
    run = fresh.cli("prune", "--yes")
    assert run.code == 0 and "freed" in run.err and fresh.files == []

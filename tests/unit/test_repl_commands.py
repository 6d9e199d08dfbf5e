"""Slash commands on a session over the fake engine."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llmrun.chat.session import ChatSession
from llmrun.chat.store import Conversation, SessionStore
from llmrun.engine.types import SamplingParams
from llmrun.errors import EngineError, LlmrunError, NotFoundError, UsageError
from llmrun.repl.commands import (
    COMMANDS,
    complete_command,
    is_command,
    run_command,
    unescape_message,
)
from llmrun.repl.parameters import PARAMETERS, restore_settings
from llmrun.repl.screen import Screen
from llmrun.repl.state import ReplState, Switched
from tests.fakes.fake_engine import CHATML, FakeEngine, fake_facts

THINKING = CHATML + "{# <think> </think> enable_thinking #}"


class Bench:
    def __init__(self, tmp_path, answers=("Hello!",), template=CHATML, **changes):
        self.engine = FakeEngine(answers, facts=fake_facts(template))
        self.out, self.err = io.StringIO(), io.StringIO()
        screen = Screen(
            Console(file=self.out, width=80), Console(file=self.err, width=80), show_markdown=False
        )
        session = ChatSession(self.engine, system="Be brief.")
        store = SessionStore(tmp_path)
        self.state = ReplState(session, "fake-1b", screen, store=store, **changes)

    def run(self, line):
        """What the command printed on both streams."""
        self.out.truncate(self.out.seek(0))
        self.err.truncate(self.err.seek(0))
        self.outcome = run_command(self.state, line)
        return self.out.getvalue() + self.err.getvalue()

    def talk(self, *questions):
        for question in questions:
            list(self.state.session.send(question))
        self.state.n_answers += len(questions)
        self.state.save()

    @property
    def contents(self):
        return [message.content for message in self.state.session.messages]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_what_is_a_command():
    assert is_command("/help") and not is_command("//help") and not is_command("help")
    assert unescape_message("//etc is a folder") == "/etc is a folder"
    assert unescape_message("plain") == "plain"


def test_the_commands_of_the_contract_exist(bench):
    text = bench.run("/help")
    names = (
        "help set show system think clear undo retry edit save load list model stats context bye"
    )
    for name in (*names.split(" "), "context"):
        assert f"/{name} " in text
    assert bench.run("/?") == text
    assert "also: /regen" in bench.run("/help retry")
    for command in COMMANDS:
        assert command.help[0].islower() and not command.help.endswith(".")


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit", "/q", "/BYE"])
def test_leave(bench, line):
    bench.run(line)
    assert bench.outcome.action == "leave"


def test_unknown_command(bench):
    with pytest.raises(UsageError) as caught:
        bench.run("/hlep")
    assert caught.value.why == "did you mean /help?"
    with pytest.raises(UsageError) as caught:
        bench.run("/zzzz\x1b[2J")
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.2", "temperature", 0.2),
        ("/set temp 0", "temperature", 0.0),
        ("/set parameter top_k 20", "top_k", 20),
        ("/set TOP-P 0.5", "top_p", 0.5),
        ("/set seed 1", "seed", 1),
        ("/set seed none", "seed", None),
        ("/set repeat_last_n -1", "repeat_last_n", -1),
        ("/set temperature default", "temperature", 0.8),
    ],
)
def test_set(bench, line, name, value):
    bench.run(line)
    found = getattr(bench.state.session.sampling, name)
    assert found == value and type(found) is type(value)
    bench.talk("Hi")
    assert getattr(bench.engine.requests[-1].sampling, name) == value


def test_set_max_tokens(bench):
    assert "max_tokens is now 3" in bench.run("/set max_tokens 3")
    bench.talk("Hi")
    assert bench.engine.requests[-1].max_tokens == 3
    bench.run("/set num_predict none")
    assert bench.state.session.max_tokens is None


@pytest.mark.parametrize(
    "line",
    [
        "/set temperature hot",
        "/set temperature -1",
        "/set temperature nan",
        "/set temperature inf",
        "/set top_k 1.5",
        "/set top_p 2",
        "/set seed -1",
        "/set max_tokens 0",
        "/set tempreature 1",
        "/set num_ctx 8192",
    ],
)
def test_set_refuses(bench, line):
    before = bench.state.session.sampling
    with pytest.raises(UsageError) as caught:
        bench.run(line)
    assert caught.value.hint
    assert bench.state.session.sampling == before


def test_set_alone_shows_all(bench):
    bench.run("/set temp 0.25")
    text = bench.run("/set")
    for parameter in PARAMETERS:
        assert parameter.name in text
    assert "* temperature             0.25" in text
    assert "top_k is 40" in bench.run("/set top_k")


def test_system(bench):
    assert "Be brief." in bench.run("/system")
    bench.run("/system You are a pirate.")
    bench.talk("Hi")
    assert "You are a pirate." in bench.engine.prompt_text()
    bench.run("/set system none")
    assert bench.state.session.system is None


def test_think(tmp_path):
    bench = Bench(tmp_path, template=THINKING)
    bench.run("/think off")
    assert bench.state.session.enable_thinking is False and bench.state.think_mode == "off"
    bench.run("/think hide")
    assert bench.state.session.enable_thinking is True and bench.state.think_mode == "hide"
    with pytest.raises(UsageError):
        bench.run("/think loudly")
    with pytest.raises(UsageError):
        bench.run("/think show")
    bench.state.last_thinking = "so and so"
    assert "so and so" in bench.run("/think show")


def test_think_on_a_model_that_does_not(bench):
    assert "does not think" in bench.run("/think on")
    assert bench.state.session.enable_thinking is None


def test_undo_and_clear_are_saved(bench):
    bench.talk("one", "two")
    assert "Taken back: two" in bench.run("/undo")
    assert bench.contents == ["Be brief.", "one", "Hello!"]
    name = bench.state.conversation.id
    assert len(bench.state.store.load(name).messages) == 3
    bench.run("/clear")
    assert bench.contents == ["Be brief."]
    bench.talk("three")
    assert len(bench.state.store.load(name).messages) == 3
    assert len(bench.state.store.list()) == 2
    bench.run("/undo")
    with pytest.raises(UsageError):
        bench.run("/undo")


def test_retry_and_edit_need_a_question(bench):
    for line in ("/retry", "/edit", "/regen"):
        with pytest.raises(UsageError):
            bench.run(line)
    bench.talk("one")
    bench.run("/regen")
    assert bench.outcome.action == "retry"
    bench.run("/edit")
    assert (bench.outcome.action, bench.outcome.text) == ("edit", "one")


def test_save_names_the_conversation(bench):
    with pytest.raises(UsageError):
        bench.run("/save early")
    bench.talk("one")
    automatic = bench.state.conversation.id
    assert "Saved as trip" in bench.run("/save trip")
    assert [saved.id for saved in bench.state.store.list()] == ["trip"]
    bench.talk("two")
    assert len(bench.state.store.load("trip").messages) == 5
    with pytest.raises(NotFoundError):
        bench.state.store.load(automatic)
    bench.run("/save branch")
    assert {saved.id for saved in bench.state.store.list()} == {"trip", "branch"}


def test_save_does_not_overwrite_another_conversation(bench):
    bench.talk("one")
    bench.run("/save trip")
    bench.run("/clear")
    bench.talk("two")
    with pytest.raises(UsageError) as caught:
        bench.run("/save trip")
    assert caught.value.hint.startswith("/save trip force")
    assert "one" in bench.state.store.load("trip").title
    bench.run("/save trip force")
    assert "two" in bench.state.store.load("trip").title


@pytest.mark.parametrize("name", ["../x", "../../x", "/etc/x", "a/b", "..", "con", "x\x1b"])
def test_save_and_load_refuse_paths(bench, tmp_path, name):
    bench.talk("one")
    with pytest.raises(UsageError):
        bench.run(f"/save {name}")
    with pytest.raises(LlmrunError):
        bench.run(f"/load {name}")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parent == tmp_path / "sessions" for path in written)


def test_load_and_list(bench):
    assert "No saved" in bench.run("/list")
    bench.talk("where to go?")
    bench.run("/save trip")
    bench.run("/clear")
    bench.run("/set temp 0.1")
    text = bench.run("/load trip")
    assert "Loaded trip: 3 messages." in text and "where to go?" in text
    assert bench.contents == ["Be brief.", "where to go?", "Hello!"]
    assert bench.state.session.sampling.temperature == 0.8
    assert "trip" in bench.run("/list")
    bench.talk("and then?")
    assert len(bench.state.store.load("trip").messages) == 5
    with pytest.raises(NotFoundError) as caught:
        bench.run("/load nowhere")
    assert caught.value.hint == "/list"
    with pytest.raises(UsageError):
        bench.run("/load")


def test_a_saved_title_cannot_drive_the_terminal(bench):
    bench.talk("\x1b]0;pwned\x07 \x9b2J")
    bench.run("/save evil")
    assert "\x1b" not in bench.run("/list") and "\x9b" not in bench.run("/load evil")


def test_model(tmp_path):
    other = FakeEngine(["I am the other."])
    bench = Bench(
        tmp_path,
        switch_model=lambda name: Switched(ChatSession(other)),
        list_models=lambda: ["fake-1b", "other-2b"],
    )
    bench.talk("one")
    text = bench.run("/model")
    assert "fake-1b (in use)\nother-2b\n" in text
    bench.run("/set max_tokens 50")
    bench.run("/model other-2b")
    assert bench.state.model == "other-2b"
    bench.talk("two")
    assert bench.contents == ["Be brief.", "one", "Hello!", "two", "I am the other."]
    assert other.requests[-1].max_tokens == 50
    assert bench.state.conversation.model == "other-2b"


def test_a_switch_to_a_model_without_a_template_is_told(tmp_path):
    other = FakeEngine(facts=fake_facts(None))
    bench = Bench(tmp_path, switch_model=lambda name: Switched(ChatSession(other)))
    assert "no chat template" in bench.run("/model base")


def test_a_failing_switch_leaves_the_session_as_it_was(tmp_path):
    def fail(name):
        raise NotFoundError("there is no model x", hint="llmrun list")

    bench = Bench(tmp_path, switch_model=fail)
    with pytest.raises(NotFoundError):
        bench.run("/model x")
    bench.talk("still there?")
    assert bench.state.model == "fake-1b"
    bench.state.switch_model = None
    with pytest.raises(UsageError):
        bench.run("/model x")


def test_show_stats_context(bench):
    with pytest.raises(NotFoundError):
        bench.run("/stats")
    bench.talk("one")
    text = bench.run("/stats")
    assert "50.0 tok/s" in text and "1234" in text
    text = bench.run("/show")
    assert "fake 1B Q4_0" in text and "4096 tokens" in text and "Be brief." in text
    text = bench.run("/context")
    assert f"{bench.state.session.context_used} of 4096 tokens" in text


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("/th", "/think"),
        ("/", "/help"),
        ("/reg", "/regen"),
        ("/think o", "off"),
        ("/set temp", "temperature"),
        ("/set temperature d", "default"),
        ("/load tr", "trip"),
        ("/model o", "other"),
        ("/help cl", "clear"),
    ],
)
def test_completion(tmp_path, before, expected):
    bench = Bench(tmp_path, list_models=lambda: ["other"])
    bench.talk("one")
    bench.run("/save trip")
    assert expected in [text for text, _ in complete_command(bench.state, before)]


def test_completion_of_nothing(bench):
    assert complete_command(bench.state, "/nosuch x") == []
    assert complete_command(bench.state, "/think on o") == []


def test_load_brings_back_the_settings_but_those_of_the_command_line(tmp_path):
    bench = Bench(tmp_path, template=THINKING, fixed=frozenset({"top_k"}))
    for line in ("temp 0.25", "top_k 9", "seed 5", "max_tokens 77", "think hide"):
        bench.run(f"/set {line}")
    bench.state.session.stop = ("END",)
    bench.talk("one")
    bench.run("/save trip")
    bench.run("/clear")
    for line in ("temp 0.5", "top_k 3", "seed none", "max_tokens none", "think off"):
        bench.run(f"/set {line}")
    bench.state.session.stop = ()
    bench.run("/load trip")
    state, sampling = bench.state, bench.state.session.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.25, 3, 5)
    assert (state.session.max_tokens, state.session.stop) == (77, ("END",))
    assert (state.think_mode, state.session.enable_thinking) == ("hide", True)


def test_saved_sampling_is_for_its_model_only(bench):
    bench.run("/set temp 0.25")
    bench.talk("one")
    bench.run("/save trip")
    bench.state.model = "other-2b"
    bench.run("/set temp 0.5")
    bench.run("/load trip")
    assert bench.state.session.sampling.temperature == 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": {"temperature": "hot", "top_k": -5, "seed": True, "min_p": None, "x": 1}},
        {"sampling": {"temperature": float("nan"), "top_k": 1.5, "dry_base": [1]}},
        {"sampling": [1], "max_tokens": "all", "stop": "x", "think": "much", "enable_thinking": 3},
        {"stop": [1, ""], "think": ["on"], "max_tokens": -1},
    ],
)
def test_saved_settings_that_are_no_values_are_left_out(bench, settings):
    before = bench.state.session.sampling
    conversation = Conversation("trip", "fake-1b", (), settings)
    restore_settings(bench.state, conversation)
    session = bench.state.session
    assert session.sampling == before
    assert (session.max_tokens, session.stop, bench.state.think_mode) == (None, (), "on")


def test_a_switch_keeps_what_was_set_and_takes_the_rest_from_the_new_model(tmp_path):
    advice = SamplingParams(temperature=0.1, top_k=64)
    bench = Bench(
        tmp_path,
        switch_model=lambda name: Switched(ChatSession(FakeEngine(), sampling=advice)),
    )
    bench.run("/set temp 0.6")
    bench.run("/model other-2b")
    sampling = bench.state.session.sampling
    assert (sampling.temperature, sampling.top_k) == (0.6, 64)


def test_a_switch_is_saved_at_once(tmp_path):
    bench = Bench(tmp_path, switch_model=lambda name: Switched(ChatSession(FakeEngine())))
    bench.talk("one")
    bench.run("/model other-2b")
    assert bench.state.store.latest().model == "other-2b"


def test_a_failed_switch_goes_on_with_the_old_model_reopened(tmp_path):
    again = FakeEngine(["I am back."])
    bench = Bench(
        tmp_path,
        switch_model=lambda name: Switched(ChatSession(again), EngineError("it does not load")),
    )
    bench.talk("one")
    bench.run("/set temp 0.6")
    bench.engine.close()
    with pytest.raises(EngineError):
        bench.run("/model other-2b")
    bench.talk("two")
    assert bench.contents == ["Be brief.", "one", "Hello!", "two", "I am back."]
    assert bench.state.model == "fake-1b" and bench.state.session.sampling.temperature == 0.6


def test_the_model_in_use_is_not_loaded_again(tmp_path):
    bench = Bench(tmp_path, switch_model=None)
    bench.state.switch_model = lambda name: pytest.fail("loaded")
    assert "in use already" in bench.run("/model fake-1b")


def test_an_undone_conversation_leaves_no_empty_file(bench):
    bench.talk("one")
    bench.run("/undo")
    assert bench.state.store.list() == ()
    bench.talk("one")
    bench.run("/save mine")
    bench.run("/undo")
    assert [saved.id for saved in bench.state.store.list()] == ["mine"]


def test_the_conversation_in_use_can_be_loaded(bench):
    bench.talk("one")
    bench.run("/save mine")
    list(bench.state.session.send("two"))
    bench.run("/load mine")
    assert bench.contents == ["Be brief.", "one", "Hello!", "two", "Hello!"]
    bench.talk("three")
    assert [saved.id for saved in bench.state.store.list()] == ["mine"]

"""Whole sessions: scripted lines, the fake engine, and what streams and store then hold."""

from __future__ import annotations

import io
import signal

import pytest
from rich.console import Console

from llmrun.chat.session import ChatSession
from llmrun.chat.store import SessionStore
from llmrun.engine.types import PromptEvent
from llmrun.errors import EngineError
from llmrun.repl.loop import Repl
from llmrun.repl.state import Switched
from tests.fakes.fake_engine import CHATML, FakeEngine, FakeStream, fake_facts

THINKING = CHATML + "{# <think> </think> enable_thinking #}"


class Lines:
    """A person who types these lines; an exception in them is raised. `asked` are the questions."""

    def __init__(self, lines, answers=(), is_interactive=True):
        self.lines = list(lines)
        self.answers = list(answers)
        self.asked = []
        self.defaults = []
        self.is_interactive = is_interactive

    def __call__(self, default=""):
        self.defaults.append(default)
        return self._next(self.lines)

    def ask(self, question):
        self.asked.append(question)
        return self._next(self.answers)

    def _next(self, lines):
        if not lines:
            raise EOFError
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line() if callable(line) else line


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Run:
    def __init__(self, tmp_path, lines, answers=("Hello!",), **options):
        is_terminal = options.pop("is_terminal", False)
        self.engine = FakeEngine(
            answers,
            n_ctx=options.pop("n_ctx", 4096),
            facts=fake_facts(options.pop("template", CHATML)),
        )
        self.session = ChatSession(self.engine, max_tokens=options.pop("max_tokens", None))
        self.store = SessionStore(tmp_path)
        self.out, self.err = io.StringIO(), io.StringIO()
        self.lines = lines if isinstance(lines, Lines) else Lines(lines)
        self.clock = options.setdefault("clock", Clock())
        self.code = Repl(
            self.session,
            console=self._console(self.out, is_terminal),
            err_console=self._console(self.err, is_terminal),
            model_title="fake-1b",
            saver=self.store,
            **options,
        ).run(self.lines)

    @staticmethod
    def _console(file, is_terminal):
        return Console(
            file=file, width=100, height=20, force_terminal=is_terminal, color_system="standard",
            _environ={},
        )  # fmt: skip

    @property
    def stdout(self):
        return self.out.getvalue()

    @property
    def stderr(self):
        return self.err.getvalue()

    @property
    def contents(self):
        return [message.content for message in self.session.messages]


def test_a_conversation(tmp_path):
    run = Run(tmp_path, ["Hi", "", "  ", "//etc?", "/bye", "never"], ["Hello!", "A **folder**."])
    assert run.code == 0
    assert run.stdout == "Hello!\nA **folder**.\n"
    assert run.contents == ["Hi", "Hello!", "/etc?", "A **folder**."]
    assert "6 tokens · 50 tok/s · first token 0.05 s · context " in run.stderr
    assert "fake-1b · context 4096" in run.stderr
    (saved,) = run.store.list()
    assert run.store.load(saved.id).messages == run.session.messages


def test_markdown_on_a_terminal_and_plain_on_request(tmp_path):
    run = Run(tmp_path, ["Hi"], ["A **folder**."], is_terminal=True)
    assert "\x1b[1mfolder\x1b[0m" in run.stdout
    run = Run(tmp_path, ["Hi"], ["A **folder**."], is_terminal=True, show_markdown=False)
    assert run.stdout == "A **folder**.\n"


def test_piped_input_gives_answers_only(tmp_path):
    run = Run(tmp_path, Lines(["Hi"], is_interactive=False))
    assert (run.code, run.stdout, run.stderr) == (0, "Hello!\n", "")
    run = Run(tmp_path, Lines(["/nosuch", "Hi"], is_interactive=False))
    assert (run.code, run.stdout) == (1, "Hello!\n")
    assert run.stderr.startswith("error: there is no command /nosuch\n")


def test_saved_after_every_turn(tmp_path):
    seen = []
    store = SessionStore(tmp_path)

    def look():
        (saved,) = store.list()
        seen.append([m.content for m in store.load(saved.id).messages])
        return "two"

    Run(tmp_path, ["one", look])
    assert seen == [["one", "Hello!"]]


def test_a_store_that_fails_is_told_once_and_the_session_goes_on(tmp_path):
    (tmp_path / "sessions").write_text("a file where the folder should be")
    run = Run(tmp_path, ["one", "two"])
    assert run.code == 0 and len(run.contents) == 4
    assert run.stderr.count("could not be saved") == 1


def test_an_error_in_a_turn_is_shown_and_the_session_goes_on(tmp_path):
    failure = EngineError("llama_decode failed", why="code -3", hint="try less context")
    run = Run(tmp_path, ["one", "two"], [["Hel", failure], "Hello!"])
    assert "error: llama_decode failed\ncode -3\ntry: try less context\n" in run.stderr
    assert run.stdout == "Hel\nHello!\n"
    assert run.code == 0


# ---- Ctrl-C


def test_ctrl_c_keeps_what_came(tmp_path):
    run = Run(tmp_path, ["one", "two"], [["Hel", KeyboardInterrupt(), "lo"], "Fine."])
    assert run.code == 0
    assert run.stdout == "Hel\nFine.\n"
    assert "Stopped; what came is kept." in run.stderr
    assert run.session.messages[1].interrupted
    assert run.session.messages[1].content.startswith("Hel")
    assert run.contents[2:] == ["two", "Fine."]


def test_ctrl_c_ends_a_script_and_keeps_what_came(tmp_path):
    lines = Lines(["one", "two"], is_interactive=False)
    run = Run(tmp_path, lines, [["Hel", KeyboardInterrupt(), "lo"], "Fine."])
    assert run.code == 130
    assert run.stdout == "Hel\n"
    assert run.session.messages[1].interrupted


def test_ctrl_c_before_the_first_word_gives_the_question_back(tmp_path):
    run = Run(tmp_path, ["one"], [[KeyboardInterrupt()]])
    assert run.contents == []
    assert run.lines.defaults == ["", "one"]
    assert "tok/s" not in run.stderr and "first token" not in run.stderr


@pytest.mark.parametrize(("wait_s", "code"), [(0.5, 130), (1.5, 0)])
def test_second_ctrl_c_within_a_second_leaves(tmp_path, wait_s, code):
    clock = Clock()

    def press_again():
        clock.now += wait_s
        raise KeyboardInterrupt

    run = Run(tmp_path, ["one", press_again], [["Hel", KeyboardInterrupt()]], clock=clock)
    assert run.code == code
    assert ("Ctrl-D to leave" in run.stderr.partition("Stopped")[2]) == (code == 0)
    assert run.store.load(run.store.list()[0].id).messages[-1].interrupted


def test_ctrl_c_at_an_empty_prompt_is_a_hint(tmp_path):
    run = Run(tmp_path, [KeyboardInterrupt(), lambda: "/bye"])
    assert run.code == 0
    assert "Ctrl-D to leave, /help for help." in run.stderr


def test_a_real_signal_stops_the_answer_and_the_handler_goes_back(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    original = FakeStream.__next__
    calls = []

    def signalled(self):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(FakeStream, "__next__", signalled)
    run = Run(tmp_path, ["one"], ["Hello there!"])
    assert run.engine.streams[0].cancelled and run.engine.streams[0].finished
    assert run.session.messages[1].interrupted
    assert signal.getsignal(signal.SIGINT) is before


def test_two_real_signals_leave_at_once(tmp_path, monkeypatch):
    original = FakeStream.__next__
    calls = []

    def signalled(self):
        calls.append(1)
        if len(calls) in (4, 5):  # the second one comes while the stream is being drained
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(FakeStream, "__next__", signalled)
    run = Run(tmp_path, ["one", "two"], ["Hello there!"])
    assert run.code == 130
    assert len(run.engine.requests) == 1


# ---- thinking


ANSWER = "<think>\nLet me see.\n</think>\n\nHello!"


def test_thinking_is_shown_dim(tmp_path):
    run = Run(tmp_path, ["Hi"], [ANSWER], template=THINKING, is_terminal=True)
    assert "\x1b[2mLet me see.\x1b[0m" in run.stdout
    assert run.stdout.index("see.") < run.stdout.index("Hello!")
    assert run.session.messages[1].content == "Hello!"


def test_thinking_is_folded(tmp_path):
    run = Run(
        tmp_path, ["Hi", "/think show"], [ANSWER], template=THINKING, is_terminal=True,
        think_mode="hide",
    )  # fmt: skip
    before, _, after = run.stdout.partition("Hello!")
    assert "Let me see." not in before and "Let me see." in after
    assert "▸ thought for" in before and "tokens)" in before


def test_thinking_is_off(tmp_path):
    run = Run(tmp_path, ["Hi"], ["Hello!"], template=THINKING, think_mode="off")
    assert run.session.enable_thinking is False


def test_thinking_never_reaches_a_pipe(tmp_path):
    run = Run(tmp_path, ["Hi"], [ANSWER], template=THINKING)
    assert run.stdout == "Hello!\n"


# ---- retry and edit


def test_retry_and_edit(tmp_path):
    run = Run(tmp_path, ["one", "/retry", "/edit", "two"], ["A", "B", "C"])
    assert run.contents == ["two", "C"]
    assert run.stdout == "A\nB\nC\n"
    assert "one" in run.lines.defaults


def test_edit_can_be_left(tmp_path):
    run = Run(tmp_path, ["one", "/edit", KeyboardInterrupt()], ["A"])
    assert run.contents == ["one", "A"]
    assert run.code == 0


# ---- a full context


def long_talk(tmp_path, answers, **options):
    lines = Lines(["a" * 60, "b" * 60, "c" * 60, "d"], answers, **options)
    return Run(tmp_path, lines, ["x" * 60], n_ctx=350)


def test_overflow_drop(tmp_path):
    run = long_talk(tmp_path, ["d", "l"])
    assert "[d]rop" in run.lines.asked[0]
    assert "Dropped 4 messages (" in run.stderr
    assert run.contents == ["c" * 60, "x" * 60, "d", "x" * 60]


def test_overflow_clear(tmp_path):
    run = long_talk(tmp_path, ["clear"])
    assert run.contents == ["c" * 60, "x" * 60, "d", "x" * 60]
    assert len(run.store.list()) == 2, "the old conversation stays saved"


def test_overflow_leave(tmp_path):
    run = long_talk(tmp_path, ["l", "l"])
    assert "Not sent; your message is in the line again." in run.stderr
    assert "c" * 60 in run.lines.defaults
    assert "a" * 60 in run.contents and "c" * 60 not in run.contents


def test_overflow_of_one_message_asks_nothing(tmp_path):
    run = Run(tmp_path, Lines(["hi", "z" * 500]), n_ctx=200)
    assert run.lines.asked == []
    assert "more than the context of 200 can hold" in run.stderr
    assert run.contents == ["hi", "Hello!"]


def test_overflow_with_nobody_to_ask(tmp_path):
    run = long_talk(tmp_path, [], is_interactive=False)
    assert run.code == 1
    assert "error: the prompt has" in run.stderr
    assert "a" * 60 in run.contents


def test_an_answer_cut_by_the_context_is_told(tmp_path):
    run = Run(tmp_path, Lines(["hi", "/bye"], ["and what now?"]), ["y" * 500], n_ctx=200)
    assert "The context is full (200 of 200 tokens)" in run.stderr
    assert run.lines.defaults[1] == "and what now?", "typed instead of a choice: not lost"


def test_an_answer_cut_by_max_tokens_is_told(tmp_path):
    run = Run(tmp_path, ["hi"], max_tokens=3)
    assert "Cut at max_tokens 3" in run.stderr
    assert run.lines.asked == []


# ---- other things


def test_progress_of_a_long_prompt_is_shown_and_erased(tmp_path, monkeypatch):
    original = FakeStream._run

    def with_progress(self):
        yield PromptEvent(400, 1000)
        yield from original(self)

    monkeypatch.setattr(FakeStream, "_run", with_progress)
    run = Run(tmp_path, ["hi"], is_terminal=True)
    _, found, rest = run.stderr.partition("reading prompt 40 %")
    assert found and "\r\x1b[K" in rest.partition("\n")[0]


def test_switch_model(tmp_path):
    other = FakeEngine(["I am new."])
    run = Run(
        tmp_path,
        ["hi", "/model new", "who?"],
        switch_model=lambda name: Switched(ChatSession(other)),
    )
    assert run.stdout == "Hello!\nI am new.\n"
    assert len(other.requests) == 1


def test_a_continued_conversation_keeps_its_name(tmp_path):
    first = Run(tmp_path, ["one"])
    (saved,) = first.store.list()
    engine = FakeEngine(["again"])
    conversation = first.store.load(saved.id)
    repl = Repl(
        ChatSession(engine, messages=conversation.messages),
        console=Console(file=io.StringIO()),
        err_console=Console(file=io.StringIO()),
        model_title="fake-1b",
        saver=first.store,
        conversation=conversation,
    )
    code = repl.run(Lines(["two"]))
    assert code == 0
    (saved,) = first.store.list()
    assert saved.n_messages == 4


def test_a_model_without_a_template_says_what_is_done(tmp_path):
    run = Run(tmp_path, ["hi"], template=None)
    assert "has no chat template" in run.stderr


def test_names_and_errors_cannot_drive_the_terminal(tmp_path):
    engine = FakeEngine(
        [[EngineError("bad \x1b[2J", why="\x9b2J", hint="\x1b]0;x\x07")], "\x1b]0;pwned\x07ok"]
    )
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, _environ={})
    Repl(
        ChatSession(engine),
        console=console,
        err_console=console,
        model_title="evil\x1b]0;pwned\x07\nname",
    ).run(Lines(["one", "two", "/show"]))
    assert "\x1b]" not in out.getvalue() and "\x1b[2J" not in out.getvalue()
    assert "\x9b" not in out.getvalue() and "\x07" not in out.getvalue()


# ---- a full context, told and asked


def saved_contents(store):
    (saved,) = store.list()
    return [message.content for message in store.load(saved.id).messages]


def test_a_message_typed_at_the_question_is_not_lost(tmp_path):
    run = long_talk(tmp_path, ["what is this?", "d"])
    assert len(run.lines.asked) == 2
    assert run.contents == ["c" * 60, "x" * 60, "d", "x" * 60]


def test_a_choice_that_is_not_offered_is_asked_again(tmp_path):
    lines = Lines(["a"], ["d", "c"])
    run = Run(tmp_path, lines, ["x" * 400], n_ctx=128)
    assert len(run.lines.asked) == 2 and run.lines.defaults == ["", ""]
    assert run.contents == []


def test_an_edited_question_that_is_too_long_offers_the_choices(tmp_path):
    lines = Lines(["a" * 60, "b" * 60, "/edit", "c" * 250], ["d"])
    run = Run(tmp_path, lines, ["x" * 60], n_ctx=400)
    assert run.lines.asked and run.contents == ["c" * 250, "x" * 60]
    lines = Lines(["a" * 60, "b" * 60, "/edit", "c" * 250], ["l"])
    run = Run(tmp_path / "2", lines, ["x" * 60], n_ctx=400)
    assert saved_contents(run.store) == ["a" * 60, "x" * 60, "b" * 60, "x" * 60]
    assert run.lines.defaults[-1] == "c" * 250


def test_a_message_that_fits_no_context_is_in_the_line_again(tmp_path):
    run = Run(tmp_path, ["a" * 900], n_ctx=350)
    assert "shorten the message" in run.stderr
    assert run.lines.defaults == ["", "a" * 900]


def test_a_message_that_failed_is_in_the_line_again(tmp_path):
    run = Run(tmp_path, ["one"], [EngineError("llama_decode failed")])
    assert run.lines.defaults == ["", "one"]
    assert run.store.list() == ()

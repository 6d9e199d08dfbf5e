"""What is left of a session after a kill, and beside another one on the same conversation."""

from __future__ import annotations

import io
from dataclasses import replace

from llmrun.chat.messages import Message
from llmrun.chat.session import ChatSession
from llmrun.chat.store import Conversation, SessionStore
from llmrun.repl.loop import Repl
from tests.fakes.fake_engine import FakeEngine, FakeStream
from tests.integration.test_repl_session import Clock, Lines, Run, saved_contents


def test_the_question_is_saved_before_the_answer_and_that_while_it_comes(tmp_path, monkeypatch):
    store, clock, seen = SessionStore(tmp_path), Clock(), []
    original = FakeStream.__next__

    def look(self):
        clock.now += 1.5
        seen.append(saved_contents(store))
        return original(self)

    monkeypatch.setattr(FakeStream, "__next__", look)
    run = Run(tmp_path, ["one"], ["abcd"], clock=clock)
    assert seen[0] == ["one"]
    assert ["one", "abc"] in seen
    assert saved_contents(store) == ["one", "abcd"] == run.contents


def continue_saved(tmp_path, lines, messages, **options):
    conversation = SessionStore(tmp_path).save(Conversation("trip", "fake-1b", messages))
    run = Run.__new__(Run)
    run.engine, run.store = FakeEngine(["Again."]), SessionStore(tmp_path)
    run.session = ChatSession(run.engine, messages=messages)
    run.out, run.err = io.StringIO(), io.StringIO()
    run.lines = Lines(lines, **options)
    run.code = Repl(
        run.session, console=Run._console(run.out, False),
        err_console=Run._console(run.err, False), model_title="fake-1b", saver=run.store,
        conversation=conversation,
    ).run(run.lines)  # fmt: skip
    return run


def test_a_question_without_an_answer_is_in_the_line_again(tmp_path):
    messages = (
        Message("user", "one"),
        Message("assistant", "Hello!"),
        Message("user", "two\x1b[2J"),
    )
    run = continue_saved(tmp_path, [], messages)
    assert run.lines.defaults == ["two\x1b[2J"]
    assert "got no answer" in run.stderr and "\x1b[2J" not in run.stderr
    # Leaving does not take it.
    assert SessionStore(tmp_path).load("trip").messages == messages
    run = continue_saved(tmp_path, ["three"], messages)
    assert run.contents == ["one", "Hello!", "three", "Again."]
    assert [m.content for m in SessionStore(tmp_path).load("trip").messages] == run.contents
    run = continue_saved(tmp_path, ["three"], messages, is_interactive=False)
    assert run.contents == ["one", "Hello!", "three", "Again."]


def test_a_cut_answer_is_told_on_return(tmp_path):
    messages = (Message("user", "one"), Message("assistant", "Hel", interrupted=True))
    run = continue_saved(tmp_path, [], messages)
    assert "2 messages that began with: one" in run.stderr and "was cut off" in run.stderr


def test_two_sessions_on_one_conversation_lose_no_turn(tmp_path):
    messages = (Message("user", "one"), Message("assistant", "Hello!"))

    def other_program():
        store = SessionStore(tmp_path)
        theirs = store.load("trip")
        more = (*theirs.messages, Message("user", "theirs"), Message("assistant", "Yes."))
        store.save(replace(theirs, messages=more))
        return "mine"

    run = continue_saved(tmp_path, [other_program, "more"], messages)
    assert run.stderr.count("was changed by another program") == 1
    kept = {s.id: [m.content for m in run.store.load(s.id).messages] for s in run.store.list()}
    assert kept.pop("trip") == ["one", "Hello!", "theirs", "Yes."]
    assert list(kept.values()) == [["one", "Hello!", "mine", "Again.", "more", "Again."]]

"""The conversation: turns, cancelling, taking back, the context's end, thinking and grammars."""

from __future__ import annotations

import contextlib

import pytest

from llmrun.chat.messages import Message
from llmrun.chat.parsing import Delta
from llmrun.chat.session import FALLBACK_NOTICE, ChatSession
from llmrun.chat.template import ChatTemplate
from llmrun.engine.types import SamplingParams
from llmrun.errors import ContextOverflowError, EngineError, TemplateError, UsageError
from tests.fakes.fake_engine import CHATML, FakeEngine, fake_facts
from tests.fakes.fake_tokenizer import FakeTokenizer

THINKING = CHATML.replace(
    "{{ '<|im_start|>assistant\\n' }}",
    "{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
)
STARTS_INSIDE = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{% endfor %}<|start|>assistant{# <|channel|> #}"
)
HARMONY_TOKENIZER = FakeTokenizer(
    control=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    eog=("<|return|>",),
)


@pytest.fixture
def make():
    """Makes a session on a fake engine; closes both."""
    with contextlib.ExitStack() as stack:

        def make(answers=("Hello!",), *, template=CHATML, engine_options=None, **options):
            engine = FakeEngine(
                answers, facts=fake_facts(chat_template=template), **(engine_options or {})
            )
            session = ChatSession(engine, **options)
            stack.callback(session.close)
            return session

        yield make


def say(reply) -> str:
    return "".join(delta.text for delta in reply if delta.kind == "answer")


def contents(session) -> list[str]:
    return [message.content for message in session.messages]


def test_a_turn_is_streamed_and_kept(make):
    session = make(["Hel<|im_start|>lo!<|im_end|>junk"], system="Be kind.")
    deltas = list(session.send("Hi"))
    assert "".join(d.text for d in deltas) == "Hello!"
    assert len(deltas) == 6
    assert session.messages == (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello!"),
    )
    assert session.last_finish.reason == "stop"
    assert session.engine.prompt_text() == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_next_turn_holds_the_history_and_begins_with_the_last_turns_tokens(make):
    session = make(["Hello!<|im_end|>", "Bye."])
    say(session.send("Hi"))
    first = session.engine.requests[0].prompt
    say(session.send("Bye"))
    second = session.engine.requests[1].prompt
    assert session.engine.prompt_text().endswith(
        "user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>"
        "\n<|im_start|>assistant\n"
    )
    assert second[: len(first)] == first
    assert session.last_finish.usage.n_cached == len(first) + len("Hello!")


def test_sampled_tokens_are_kept_where_the_text_would_split_differently(make):
    """The model may sample "<", "b", ">" one by one where the tokenizer has one token for it."""
    tokenizer = FakeTokenizer(user_defined=("<b>",))
    session = make(["x"], engine_options={"tokenizer": tokenizer})
    stream_tokens = [ord(c) for c in "<b>"]
    prompt = session._render([Message("user", "Hi")])[0]
    tokens = session._history.tokenize(prompt)
    session._history.remember(prompt, tokens, stream_tokens)
    longer = session._render(
        [Message("user", "Hi"), Message("assistant", "<b>"), Message("user", "ok")]
    )[0]
    reused = session._history.tokenize(longer)
    assert reused[: len(tokens) + 3] == (*tokens, *stream_tokens)
    assert b"".join(map(tokenizer.piece, reused)).decode() == longer.text
    other = session._render([Message("user", "Ho"), Message("assistant", "<b>")])[0]
    assert tokenizer.id_of["<b>"] in session._history.tokenize(other)


def test_sampling_options_reach_the_engine(make):
    sampling = SamplingParams(temperature=0, seed=7)
    session = make(["Hello world"], sampling=sampling, max_tokens=5, stop=("zz",))
    assert say(session.send("Hi")) == "Hello"
    request = session.engine.requests[0]
    assert (request.sampling, request.max_tokens, request.stop) == (sampling, 5, ("zz",))
    assert session.last_finish.reason == "length"
    assert not session.messages[-1].interrupted


def test_an_answer_that_meets_the_contexts_end_says_so(make):
    session = make(["x" * 500], engine_options={"n_ctx": 100})
    answer = say(session.send("Hi"))
    assert session.last_finish.reason == "length"
    assert 0 < len(answer) < 100
    assert session.context_used == session.last_finish.usage.n_prompt + len(answer)


def test_a_prompt_longer_than_the_context_is_an_error_before_anything(make):
    session = make(engine_options={"n_ctx": 50}, system="S")
    with pytest.raises(ContextOverflowError) as caught:
        session.send("x" * 100)
    assert caught.value.n_ctx == 50
    assert caught.value.n_prompt > 100
    assert session.engine.requests == []
    assert contents(session) == ["S"]


def test_a_reply_that_is_never_read_leaves_no_trace(make):
    session = make()
    session.send("Hi")
    assert session.messages == ()
    assert session.engine.requests == []


def test_closing_the_reply_stops_the_model_and_keeps_what_came(make):
    session = make(["Hello world"])
    with contextlib.closing(session.send("Hi")) as reply:
        for delta in reply:
            if delta.text == "o":
                break
    stream = session.engine.streams[0]
    assert stream.cancelled
    assert stream.finished
    assert session.messages[-1] == Message("assistant", "Hello", interrupted=True)
    assert session.last_finish.reason == "cancelled"
    # The conversation goes on from there.
    say(session.send("More"))
    assert "Hello<|im_end|>" in session.engine.prompt_text()


def test_ctrl_c_while_the_model_works_keeps_what_came(make):
    session = make([["Hel", KeyboardInterrupt(), "lo world"]])
    got = []
    with pytest.raises(KeyboardInterrupt):
        got.extend(delta.text for delta in session.send("Hi"))
    assert "".join(got) == "Hel"
    assert session.messages[-1].interrupted
    assert session.messages[-1].content.startswith("Hel")
    assert session.engine.streams[0].finished


def test_ctrl_c_before_the_first_word_takes_the_question_back(make):
    session = make([KeyboardInterrupt(), "Hello"])
    with pytest.raises(KeyboardInterrupt):
        list(session.send("Hi"))
    assert session.messages == ()
    assert say(session.send("Again")) == "Hello"


def test_a_failing_engine_keeps_the_partial_answer_and_raises(make):
    session = make([["Hel", EngineError("broken")]])
    with pytest.raises(EngineError, match="broken"):
        list(session.send("Hi"))
    assert session.messages[-1] == Message("assistant", "Hel", interrupted=True)


def test_undo_retry_edit_and_clear(make):
    session = make(["one", "two", "three", "four"], system="S")
    say(session.send("a"))
    say(session.send("b"))
    assert session.undo() == "b"
    assert contents(session) == ["S", "a", "one"]
    assert say(session.retry()) == "three"
    assert contents(session) == ["S", "a", "three"]
    assert say(session.edit("c")) == "four"
    assert contents(session) == ["S", "c", "four"]
    session.clear()
    assert contents(session) == ["S"]
    assert session.undo() is None
    with pytest.raises(UsageError):
        session.retry()
    with pytest.raises(UsageError):
        session.edit("x")


def test_an_interrupted_retry_without_text_keeps_the_old_answer(make):
    session = make(["one", KeyboardInterrupt()])
    say(session.send("a"))
    with pytest.raises(KeyboardInterrupt):
        list(session.retry())
    assert contents(session) == ["a", "one"]


def test_the_system_message_can_be_set_replaced_and_removed(make):
    session = make()
    session.set_system("A")
    session.set_system("B")
    assert contents(session) == ["B"]
    say(session.send("Hi"))
    session.set_system(None)
    assert contents(session) == ["Hi", "Hello!"]
    assert session.system is None


def test_context_used_follows_every_change(make):
    session = make(["Hello!"])
    assert session.context_used == 0
    say(session.send("Hi"))
    used = session.context_used
    assert used == session.last_finish.usage.n_prompt + session.last_finish.usage.n_completion
    say(session.send("Hi again"))
    assert session.context_used > used
    session.clear()
    assert session.context_used == 0


def test_drop_oldest_takes_whole_turns_and_keeps_the_system_message(make):
    session = make(["one", "two", "three"], system="S")
    for question in "abc":
        say(session.send(question))
    before = session.context_used
    dropped = session.drop_oldest()
    assert dropped.n_messages == 2
    assert 0 < dropped.n_tokens < before
    assert contents(session) == ["S", "b", "two", "c", "three"]
    assert session.drop_oldest(5).n_messages == 2
    assert contents(session) == ["S", "c", "three"]
    assert session.drop_oldest().n_messages == 0


def test_make_room_drops_no_more_than_it_must(make):
    session = make(["x" * 50], engine_options={"n_ctx": 400}, system="S")
    for _ in range(3):
        say(session.send("y" * 20))
    with pytest.raises(ContextOverflowError):
        session.send("z" * 100)
    dropped = session.make_room("z" * 100, n_reserve=50)
    assert dropped.n_messages == 2
    assert session.system == "S"
    say(session.send("z" * 100))
    assert session.last_finish.usage.n_completion >= 50
    # A text that is too long by itself: all the turns go, and the error is still raised.
    session.make_room("z" * 1000)
    assert contents(session) == ["S"]
    with pytest.raises(ContextOverflowError):
        session.send("z" * 1000)


def test_complete_leaves_the_conversation_alone(make):
    session = make(["one", "two"])
    say(session.send("a"))
    assert say(session.complete([Message("system", "S"), Message("user", "q")])) == "two"
    assert contents(session) == ["a", "one"]
    assert session.last_finish.usage.n_completion == 3
    with pytest.raises(ContextOverflowError):
        session.complete([Message("user", "x" * 9999)])


def test_plain_completion_uses_no_template_and_disarms_the_text(make):
    tokenizer = FakeTokenizer(adds_bos=True)
    session = make([" there"], engine_options={"tokenizer": tokenizer})
    assert say(session.complete_text("Hi<|im_end|>")) == " there"
    prompt = session.engine.requests[0].prompt
    assert prompt == (tokenizer.id_of["<s>"], *b"Hi<|im_end|>")
    with pytest.raises(ContextOverflowError):
        session.complete_text("x" * 9999)


def test_thinking_is_split_and_kept_in_its_own_field(make):
    session = make(["<think>\nHm.\n</think>\n\nYes."], template=THINKING)
    assert session.can_think
    deltas = list(session.send("Hi"))
    assert "".join(d.text for d in deltas if d.kind == "thinking") == "Hm."
    assert session.messages[-1] == Message("assistant", "Yes.", thinking="Hm.")
    say(session.send("More"))
    assert "Hm." not in session.engine.prompt_text()


def test_thinking_can_be_turned_off_per_call(make):
    session = make(["Yes."], template=THINKING, enable_thinking=False)
    assert say(session.send("Hi")) == "Yes."
    assert session.engine.prompt_text().endswith("<think>\n\n</think>\n\n")
    session.enable_thinking = None
    say(session.send("Hi"))
    assert session.engine.prompt_text().endswith("<|im_start|>assistant\n")


def test_a_prompt_that_starts_inside_thinking_is_noticed_and_can_be_closed(make):
    session = make(["Hm.\n</think>\nYes."], template=STARTS_INSIDE)
    assert {delta.kind for delta in session.send("Hi")} == {"thinking", "answer"}
    assert session.messages[-1] == Message("assistant", "Yes.", thinking="Hm.")
    session = make(["Yes."], template=STARTS_INSIDE, enable_thinking=False)
    assert say(session.send("Hi")) == "Yes."
    assert session.engine.prompt_text().endswith("assistant\n<think>\n\n</think>\n\n")


def test_thinking_only_and_interrupted_is_kept(make):
    session = make([["Hm", KeyboardInterrupt()]], template=STARTS_INSIDE)
    with pytest.raises(KeyboardInterrupt):
        list(session.send("Hi"))
    assert session.messages[-1] == Message("assistant", "", thinking="Hm", interrupted=True)


def test_gpt_oss_channels_need_the_control_tokens_as_text(make):
    answer = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
        "Yes.<|return|>"
    )
    options = {"tokenizer": HARMONY_TOKENIZER}
    session = make([answer], template=HARMONY, engine_options=options)
    assert say(session.send("Hi")) == "Yes."
    assert session.engine.requests[0].show_special
    assert session.messages[-1].thinking == "Hm."


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (THINKING, "<think>\n\n</think>\n\n"),
        (STARTS_INSIDE, "<think>\n\n</think>\n\n"),
        (HARMONY, "<|start|>assistant<|channel|>final<|message|>"),
        (CHATML, "<|im_start|>assistant\n"),
    ],
)
def test_with_a_grammar_the_output_begins_outside_thinking(make, template, end):
    session = make(
        ['{"a": "<think>"}'],
        template=template,
        enable_thinking=True,
        sampling=SamplingParams(grammar='root ::= "{}"'),
        engine_options={"tokenizer": HARMONY_TOKENIZER} if template is HARMONY else None,
    )
    assert say(session.send("Hi")) == '{"a": "<think>"}'
    assert session.engine.prompt_text().endswith(end)
    assert session.engine.requests[0].sampling.grammar


def test_a_model_without_a_template_chats_as_a_transcript_and_says_so(make):
    session = make([" Hello.\nUser: more", " Bye."], template=None, system="A talk.")
    assert session.is_fallback
    assert "no chat template" in FALLBACK_NOTICE
    assert say(session.send("Hi")) == "Hello."
    say(session.send("Bye"))
    assert session.engine.prompt_text() == (
        "A talk.\n\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"
    )
    assert session.engine.requests[0].stop == ("\nUser:",)
    assert not make().is_fallback


def test_a_broken_template_raises_at_once_and_changes_nothing(make):
    session = make(template="{{ raise_exception('no') }}")
    with pytest.raises(TemplateError):
        session.send("Hi")
    assert session.messages == ()


def test_a_conversation_can_be_continued(make):
    session = make(
        messages=[Message("system", "S"), Message("user", "a"), Message("assistant", "b")]
    )
    assert session.system == "S"
    say(session.send("c"))
    assert contents(session) == ["S", "a", "b", "c", "Hello!"]


def test_progress_of_reading_the_prompt_is_reported(make):
    seen = []
    session = make()
    say(session.send("Hi", on_prompt=seen.append))
    assert seen[-1].n_done == seen[-1].n_total == len(session.engine.requests[0].prompt)


def test_a_given_template_is_used(make):
    template = ChatTemplate("Q: {{ messages[-1].content }} A:", bos_text="", eos_text="")
    session = make(template=CHATML)
    session.close()
    session = ChatSession(session.engine, template=template)
    assert Delta("answer", "H") in list(session.send("Hi"))
    assert session.engine.prompt_text() == "Q: Hi A:"
    session.close()


def test_absurdly_long_input_is_refused_before_it_is_tokenized(make, monkeypatch):
    monkeypatch.setattr("llmrun.chat.session.MAX_PROMPT_CHARS", 10)
    session = make()
    with pytest.raises(UsageError):
        session.send("x" * 11)
    with pytest.raises(UsageError):
        session.complete_text("x" * 11)

"""The interactive session: read a line, run a command or answer a message, again and again.

code = run_repl(session, console=…, err_console=…, read_line=make_line_reader(…),
                model_title="smollm2-135m")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from llmrun.chat.messages import Message
from llmrun.chat.session import FALLBACK_NOTICE, ChatSession, Dropped, OnPrompt
from llmrun.chat.store import Conversation, SessionStore
from llmrun.errors import ContextOverflowError, LlmrunError
from llmrun.repl.commands import complete_command, is_command, run_command, unescape_message
from llmrun.repl.parameters import restore_settings
from llmrun.repl.prompt import LineReader
from llmrun.repl.reply import Clock, Interrupts, LeaveNow, Reply, ReplyView, stats_line
from llmrun.repl.screen import Screen
from llmrun.repl.state import PrefixKeeper, ReplState, SwitchModel, ThinkMode
from llmrun.text import escape_line

if TYPE_CHECKING:
    from rich.console import Console

    from llmrun.chat.parsing import Delta

EXIT_INTERRUPTED = 130
_NEARLY_FULL = 0.9
# While an answer comes, the conversation is saved this often: a kill takes no more than that.
_SAVE_EVERY_S = 2.0
_CHOICE_WORDS = {"drop": "d", "clear": "c", "leave": "l"}

Ask = Callable[[OnPrompt], "Iterator[Delta]"]
"""Starts a generation. Raises ContextOverflowError or TemplateError at once."""


class Repl:
    """One session; `complete` is for the input line's completion.

    `saver` None: nothing is saved. `conversation` is the saved form of `session` when that goes on
    with one: its settings hold, but for those named in `fixed`, which the command line gave.
    `list_models` gives the names that /model offers. `drops_oldest`: when the context is full, the
    oldest exchanges go, and that is told, instead of asking. The caller closes the session.
    """

    def __init__(
        self,
        session: ChatSession,
        *,
        console: Console,
        err_console: Console,
        model_title: str,
        switch_model: SwitchModel | None = None,
        list_models: Callable[[], Iterable[str]] | None = None,
        saver: SessionStore | None = None,
        conversation: Conversation | None = None,
        show_markdown: bool = True,
        think_mode: ThinkMode = "on",
        fixed: Collection[str] = (),
        prefixes: PrefixKeeper | None = None,
        drops_oldest: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._screen = Screen(console, err_console, show_markdown=show_markdown)
        self._clock = clock
        self._drops_oldest = drops_oldest
        self._interrupts = Interrupts(clock)
        self._has_save_failed = False
        self._n_failed = 0
        self._prefill = ""  # what the next input line begins with
        self.state = ReplState(
            session,
            model_title,
            self._screen,
            store=saver,
            conversation=conversation,
            think_mode=think_mode,
            switch_model=switch_model,
            list_models=list_models,
            fixed=frozenset(fixed),
            prefixes=prefixes,
        )
        if conversation is not None:
            restore_settings(self.state, conversation)
            self.state.restore_prefix()
        if self.state.think_mode == "off" and session.can_think:
            session.enable_thinking = False

    def complete(self, before: str) -> Iterable[tuple[str, str]]:
        return complete_command(self.state, before)

    def run(self, read_line: LineReader) -> int:
        """Until the user leaves. Returns the exit code: 0, 130 after two Ctrl-C (one where
        input is no terminal), or 1 when nobody could be asked and a turn or command failed."""
        self._read_line = read_line
        self._greet()
        self._take_unanswered()
        try:
            while self._take_line():
                pass
        except LeaveNow:
            self._screen.clear_status()
            self._leave()
            return EXIT_INTERRUPTED
        self._leave()
        return 1 if self._n_failed and not read_line.is_interactive else 0

    # ---- lines

    def _greet(self) -> None:
        if not self._read_line.is_interactive:
            return
        state = self.state
        self._screen.note(
            f"{escape_line(state.model)} · context {state.session.n_ctx} · /help for help, "
            "Ctrl-D to leave"
        )
        if state.session.is_fallback:
            self._screen.note(FALLBACK_NOTICE)
        n_messages = sum(message.role != "system" for message in state.session.messages)
        if n_messages:
            title = Conversation("", "", state.session.messages).title
            self._screen.note(
                f"Continuing a conversation of {n_messages} message{'s' if n_messages > 1 else ''} "
                f"that began with: {escape_line(title)}"
            )
            if state.session.messages[-1].interrupted:
                self._screen.note("Its last answer was cut off; /retry answers anew.")

    def _take_unanswered(self) -> None:
        """Give back a question that was saved without an answer, so that it can be sent again:
        most templates refuse two questions in a row."""
        messages = self.state.session.messages
        if not messages or messages[-1].role != "user":
            return
        question = self.state.unanswered = self.state.session.undo() or ""
        if self._read_line.is_interactive:
            self._prefill = question
            self._screen.note("The last question got no answer; it is in the line again.")
        else:
            self._screen.note("The last question got no answer and was taken back.")

    def _take_line(self) -> bool:
        """One line and what it asks for; errors are shown. False: leave."""
        try:
            prefill, self._prefill = self._prefill, ""
            line = self._read_line(prefill)
        except EOFError:
            return False
        except KeyboardInterrupt:
            if self._interrupts.note():
                raise LeaveNow from None
            self._screen.note("Ctrl-D to leave, /help for help.")
            return True
        if not line.strip():
            return True
        try:
            if is_command(line):
                return self._run_command(line)
            self._send(unescape_message(line))
        except LlmrunError as error:
            self._fail(error)
        except LeaveNow:
            raise
        except KeyboardInterrupt:
            self._interrupts.seen()
            self._screen.note("Stopped.")
        return True

    def _run_command(self, line: str) -> bool:
        outcome = run_command(self.state, line)
        if outcome.action == "leave":
            return False
        self._take_unanswered()
        session = self.state.session
        if outcome.action == "retry":
            self._answer_again(lambda on_prompt: session.retry(on_prompt=on_prompt), outcome.text)
        elif outcome.action == "edit":
            try:
                text = self._read_line(default=outcome.text)
            except (EOFError, KeyboardInterrupt):
                self._screen.note("Left as it was.")
                return True
            if text.strip():
                self._answer_again(lambda on_prompt: session.edit(text, on_prompt=on_prompt), text)
        return True

    # ---- answers

    def _send(self, text: str) -> None:
        def ask(on_prompt: OnPrompt) -> Iterator[Delta]:
            return self.state.session.send(text, on_prompt=on_prompt)

        if self._drops_oldest and self._fits_alone(text):
            self._tell_dropped(self.state.session.make_room(text))
        n_before = len(self.state.session.messages)
        try:
            try:
                reply = self._answer(ask)
            except ContextOverflowError as error:
                if not self._make_room(error, text):
                    return
                n_before = len(self.state.session.messages)
                reply = self._answer(ask)
        except LlmrunError:
            if len(self.state.session.messages) == n_before:
                self._prefill = text
            raise
        if reply.is_interrupted and not reply.n_answer_chars and not reply.thinking:
            self._prefill = text

    def _answer_again(self, ask: Ask, text: str) -> None:
        """Answer `text` in the place of the last question."""
        try:
            self._answer(ask)
        except ContextOverflowError as error:
            before = self.state.session.messages
            self.state.session.undo()
            try:
                is_sent = self._make_room(error, text)
            except LlmrunError:
                self.state.put_messages(before)
                raise
            if is_sent:
                self._send(text)
            else:
                self.state.put_messages(before)

    def _answer(self, ask: Ask) -> Reply:
        """Generate, show and save one answer."""
        state = self.state
        view = ReplyView(self._screen, state.think_mode, state.count_tokens, self._clock)
        deltas = ask(view.on_prompt)
        state.unanswered = None
        saved_at = self._clock()
        # A failure is told at the end: here it would stand in the middle of the answer.
        self._save(is_quiet=True)

        def keep() -> None:
            nonlocal saved_at
            if self._clock() - saved_at >= _SAVE_EVERY_S:
                self._save(is_quiet=True)
                saved_at = self._clock()

        try:
            reply = view.show(deltas, self._interrupts, keep)
        finally:
            self._save()
        state.keep_prefix()
        self._tell_end(reply)
        if reply.is_interrupted and not self._read_line.is_interactive:
            raise LeaveNow  # a script's Ctrl-C means the script, not this answer
        return reply

    def _tell_end(self, reply: Reply) -> None:
        state, screen = self.state, self._screen
        session = state.session
        finish = session.last_finish
        state.last_thinking = reply.thinking
        if reply.is_interrupted:
            kept = (
                "what came is kept"
                if reply.n_answer_chars or reply.thinking
                else ("nothing had come, so the question was taken back")
            )
            screen.note(f"Stopped; {kept}.")
        if finish is None or (reply.is_interrupted and finish.usage.n_completion == 0):
            return
        if not reply.is_interrupted and not reply.n_answer_chars:
            screen.note("The model gave an empty answer.")
        state.n_answers += 1
        state.n_tokens_total += finish.usage.n_completion
        state.busy_s_total += finish.timings.total_s
        # The last sampled token needs no place in the cache.
        n_used = min(finish.usage.n_prompt + finish.usage.n_completion, session.n_ctx)
        if self._read_line.is_interactive:
            is_tight = n_used >= _NEARLY_FULL * session.n_ctx
            screen.note(stats_line(finish, n_used, session.n_ctx), "yellow" if is_tight else "dim")
            screen.note()
        if finish.reason == "length":
            limit = session.max_tokens
            if n_used < session.n_ctx and limit is not None:
                screen.note(f"Cut at max_tokens {limit}; /set max_tokens none lifts that.")
            else:
                self._tell_full(n_used)

    # ---- a full context

    def _tell_full(self, n_used: int) -> None:
        session, screen = self.state.session, self._screen
        screen.note(
            f"The context is full ({n_used} of {session.n_ctx} tokens): the answer was cut here.",
            "yellow",
        )
        if session.n_ctx < session.engine.facts.n_ctx_train:
            screen.note(f"For longer ones start with llmrun chat --ctx {2 * session.n_ctx}.")
        if self._drops_oldest:
            screen.note("The oldest exchanges go with your next message.")
            return
        self._choose_room(None)

    def _make_room(self, error: ContextOverflowError, text: str) -> bool:
        """Let the user choose what goes so that `text` can be sent. True: send it again."""
        screen = self._screen
        if not self._read_line.is_interactive:
            raise error
        if not self._fits_alone(text):
            raise ContextOverflowError(
                error.n_prompt,
                error.n_ctx,
                hint="shorten the message, or start with a larger --ctx",
            )
        screen.note(
            f"With this message the conversation has {error.n_prompt} tokens; the context holds "
            f"{error.n_ctx}.",
            "yellow",
        )
        if self._choose_room(text):
            return True
        screen.note("Not sent; your message is in the line again.")
        self._prefill = self._prefill or text
        return False

    def _fits_alone(self, text: str) -> bool:
        """Whether `text` could be sent in a new conversation."""
        session = self.state.session
        system = [Message("system", session.system)] if session.system else []
        try:
            # The check happens before the first `next`: nothing is generated.
            session.complete([*system, Message("user", text)])
        except ContextOverflowError:
            return False
        return True

    def _choose_room(self, text: str | None) -> bool:
        """Ask what goes: to send `text`, or, when that is None, to go on at all."""
        session = self.state.session
        if not self._read_line.is_interactive:
            return False
        can_drop = text is not None or sum(m.role == "user" for m in session.messages) > 1
        options = ["[c]lear the conversation", "[l]eave it as it is"]
        if can_drop:
            options.insert(0, "[d]rop the oldest exchanges")
        letters = "dcl" if can_drop else "cl"
        typed, answer = "", ""
        while answer not in tuple(letters):
            try:
                typed = self._read_line.ask(f"{', '.join(options)}? ").strip()
            except (EOFError, KeyboardInterrupt):
                return False
            answer = _CHOICE_WORDS.get(typed.lower(), typed.lower())
            if not typed:
                return False
            if len(answer) > 1 and text is None:
                # No answer to the question, so it was meant as the next message.
                self._prefill = typed
                return False
        if answer == "d":
            self._tell_dropped(
                session.make_room(text) if text is not None else session.drop_oldest()
            )
            return True
        if answer == "c":
            run_command(self.state, "/clear")
            return True
        return False

    def _tell_dropped(self, dropped: Dropped) -> None:
        if dropped.n_messages:
            self._screen.note(f"Dropped {dropped.n_messages} messages ({dropped.n_tokens} tokens).")

    # ---- saving

    def _leave(self) -> None:
        self._save()
        self.state.keep_prefix(is_last=True)

    def _save(self, *, is_quiet: bool = False) -> None:
        """Save the conversation; a failure is told once, unless `is_quiet`, and does not end the
        session."""
        try:
            self.state.save()
        except LlmrunError as error:
            if is_quiet:
                return
            if not self._has_save_failed:
                self._screen.error(error)
            self._has_save_failed = True
        else:
            self._has_save_failed = False
        state = self.state
        if state.forked_from is not None and state.conversation is not None and not is_quiet:
            self._screen.note(
                f"{state.forked_from} was changed by another program meanwhile; this conversation "
                f"is saved as {state.conversation.id}.",
                "yellow",
            )
            state.forked_from = None

    def _fail(self, error: LlmrunError) -> None:
        self._n_failed += 1
        self._screen.clear_status()
        self._screen.error(error)

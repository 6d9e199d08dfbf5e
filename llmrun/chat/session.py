"""A conversation with a model: messages in, a stream of thinking and answer out.

    session = ChatSession(engine, system="Be brief.")
    with contextlib.closing(session.send("Hi")) as reply:
        for delta in reply:
            ...
    session.last_finish.usage

Nothing is cut in silence: a prompt that is longer than the context raises ContextOverflowError
before anything happens, and the caller decides what `drop_oldest` or `make_room` may take out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from llmrun.chat.history import TokenHistory
from llmrun.chat.messages import Message
from llmrun.chat.parsing import (
    Delta,
    ThinkingFormat,
    detect_format,
    make_splitter,
    needs_special_text,
)
from llmrun.chat.prompting import render_chat
from llmrun.chat.protect import RenderedPrompt, tokenize_plain
from llmrun.chat.template import PromptTemplate, template_for
from llmrun.engine.types import (
    EngineLike,
    FinishEvent,
    PromptEvent,
    Request,
    SamplingParams,
    StreamLike,
    TextEvent,
)
from llmrun.errors import ContextOverflowError, UsageError

FALLBACK_NOTICE = (
    "This model has no chat template, so it was not trained to chat. The conversation is given to "
    "it as a plain transcript (User: … Assistant: …) that it continues; for plain completion use "
    "`llmrun run`."
)

# No context holds this much; it keeps the tokenizer and the template from absurd input.
MAX_PROMPT_CHARS = 32 * 1024 * 1024

OnPrompt = Callable[[PromptEvent], None]
Reply = Generator[Delta, None, None]
"""Close it (`contextlib.closing`) when it may be left before its end: that stops the model."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What was taken out of a conversation to make room."""

    n_messages: int
    n_tokens: int


@dataclass(slots=True)
class _Generation:
    """A prompt that passed the checks, and what comes of it."""

    prompt: RenderedPrompt | None
    tokens: tuple[int, ...]
    fmt: ThinkingFormat | None
    starts_inside: bool
    stop: tuple[str, ...]
    trims_start: bool = False
    answer: str = ""
    thinking: str = ""

    def as_message(self, *, interrupted: bool) -> Message:
        return Message(
            "assistant", self.answer, thinking=self.thinking or None, interrupted=interrupted
        )


class ChatSession:
    """One conversation on one engine. Not for use from two threads at once.

    `sampling`, `max_tokens`, `template_args` and `enable_thinking` may be changed between turns.
    `enable_thinking` None leaves it to the model. With a grammar in `sampling` there is no
    thinking: the grammar holds from the first token, so that the output always obeys it.
    `last_finish` is the end of the last generation: its reason `length` means that max_tokens or
    the context's end cut the answer.
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        template: PromptTemplate | None = None,
        system: str | None = None,
        sampling: SamplingParams | None = None,
        template_args: Mapping[str, object] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        enable_thinking: bool | None = None,
        messages: Sequence[Message] = (),
    ) -> None:
        """`template` None: the model's own. `messages` continues a conversation; a leading system
        message among them counts as `system` unless that is given."""
        self.engine = engine
        self.template = template or template_for(engine.facts)
        self.template.start()
        self.sampling = sampling or SamplingParams()
        self.template_args = dict(template_args or {})
        self.max_tokens = max_tokens
        self.stop = tuple(stop)
        self.enable_thinking = enable_thinking
        self.last_finish: FinishEvent | None = None
        self._messages = list(messages)
        self._history = TokenHistory(engine.tokenizer)
        self._fmt = detect_format(self.template.source, engine.tokenizer)
        self._n_used: int | None = None
        self._running: tuple[list[Message], _Generation] | None = None
        if system is not None:
            self.set_system(system)

    # ---- what it holds

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation, the system message first if there is one."""
        return tuple(self._messages)

    @property
    def messages_so_far(self) -> tuple[Message, ...]:
        """The conversation as it would be if the running turn ended here: what a kill must not
        take. Before the first word of the answer it ends with the question; a retry or an edit
        shows the old turn until then."""
        if self._running is None:
            return self.messages
        messages, generation = self._running
        if generation.answer or generation.thinking:
            return (*messages, generation.as_message(interrupted=True))
        return tuple(messages) if len(messages) > len(self._messages) else self.messages

    @property
    def system(self) -> str | None:
        first = self._messages[:1]
        return first[0].content if first and first[0].role == "system" else None

    @property
    def is_fallback(self) -> bool:
        """Whether the model has no chat template; then `FALLBACK_NOTICE` says what is done."""
        return self.template.is_fallback

    @property
    def can_think(self) -> bool:
        return self._fmt is not None

    @property
    def n_ctx(self) -> int:
        return self.engine.n_ctx

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far; 0 for an empty one. Raises TemplateError."""
        if self._n_used is None:
            self._n_used = self._count(self._messages)
        return self._n_used

    @property
    def tokens(self) -> tuple[int, ...]:
        """The last turn as the engine read and wrote it; empty before the first."""
        return self._history.tokens

    def recall(self, tokens: Sequence[int]) -> None:
        """The tokens that this conversation had when it was held: where they spell the same text,
        the next prompt begins with them, so that the engine can use what it has of them."""
        self._history.recall(tokens)

    # ---- changing it

    def set_system(self, text: str | None) -> None:
        """Set, replace or (None or empty) remove the system message."""
        if self.system is not None:
            del self._messages[0]
        if text:
            self._messages.insert(0, Message("system", text))
        self._n_used = None

    def clear(self) -> None:
        """Forget all but the system message."""
        self._messages = self._messages[:1] if self.system is not None else []
        self.last_finish = None
        self._n_used = None

    def undo(self) -> str | None:
        """Take back the last question and its answer; the question's text, None without one."""
        start = self._last_question()
        if start is None:
            return None
        question = self._messages[start].content
        del self._messages[start:]
        self._n_used = None
        return question

    def drop_oldest(self, n_turns: int = 1) -> Dropped:
        """Take out the oldest questions with their answers, but never the last one."""
        kept = list(self._messages)
        for _ in range(n_turns):
            questions = [i for i, message in enumerate(kept) if message.role == "user"]
            if len(questions) < 2:
                break
            start = 1 if self.system is not None else 0
            kept = kept[:start] + kept[questions[1] :]
        return self._keep(kept)

    def make_room(self, text: str, n_reserve: int = 256) -> Dropped:
        """Take out oldest turns until `text` can be sent with `n_reserve` tokens for the answer.

        When the text alone is too long, everything but the system message goes and `send` raises
        ContextOverflowError.
        """
        start = 1 if self.system is not None else 0
        limit = max(self.n_ctx - n_reserve, self.n_ctx // 2)
        kept = list(self._messages)
        while len(kept) > start and self._count([*kept, Message("user", text)]) > limit:
            later = [i for i in range(start + 1, len(kept)) if kept[i].role == "user"]
            kept = kept[:start] + (kept[later[0] :] if later else [])
        return self._keep(kept)

    # ---- generating

    def send(self, text: str, *, on_prompt: OnPrompt | None = None) -> Reply:
        """Ask, and stream the reply; the turn is in `messages` when the stream has ended.

        Checked at once: ContextOverflowError, TemplateError. The rest happens while iterating:
        closing the iterator or a KeyboardInterrupt stops the model and keeps what came, marked
        as interrupted; when nothing had come, the question is taken back as well. An error of the
        engine does the same and is raised.
        """
        return self._turn([*self._messages, Message("user", text)], on_prompt)

    def retry(self, *, on_prompt: OnPrompt | None = None) -> Reply:
        """Answer the last question anew; the old answer stays if nothing comes.

        Raises UsageError when there is no question yet.
        """
        start = self._last_question()
        if start is None:
            raise UsageError("there is no question to answer again")
        return self._turn(self._messages[: start + 1], on_prompt)

    def edit(self, text: str, *, on_prompt: OnPrompt | None = None) -> Reply:
        """Put `text` in the place of the last question and answer it. Raises like `retry`."""
        start = self._last_question()
        if start is None:
            raise UsageError("there is no question to edit")
        return self._turn([*self._messages[:start], Message("user", text)], on_prompt)

    def complete(self, messages: Sequence[Message], *, on_prompt: OnPrompt | None = None) -> Reply:
        """Reply to these messages alone; the conversation is not touched. Checks as `send`."""
        generation = self._prepare(list(messages))
        return self._generate(generation, on_prompt)

    def complete_text(self, text: str, *, on_prompt: OnPrompt | None = None) -> Reply:
        """Continue plain text, without any template. Checks as `send`."""
        self._check_size(len(text))
        tokens = tokenize_plain(text, self.engine.tokenizer)
        self._check_room(tokens)
        generation = _Generation(None, tokens, None, False, self.stop)
        return self._generate(generation, on_prompt)

    def close(self) -> None:
        """End the template's process; the engine stays."""
        self.template.close()

    # ---- inside

    def _turn(self, messages: list[Message], on_prompt: OnPrompt | None) -> Reply:
        generation = self._prepare(messages)
        self._running = messages, generation

        def run() -> Reply:
            finished = False
            try:
                with contextlib.closing(self._generate(generation, on_prompt)) as deltas:
                    yield from deltas
                finished = self.last_finish is not None and self.last_finish.reason != "cancelled"
            finally:
                self._running = None
                self._keep_turn(messages, generation, interrupted=not finished)

        return run()

    def _keep_turn(
        self, messages: list[Message], generation: _Generation, *, interrupted: bool
    ) -> None:
        if interrupted and not generation.answer and not generation.thinking:
            return
        self._messages = [*messages, generation.as_message(interrupted=interrupted)]
        finish = self.last_finish
        self._n_used = finish.usage.n_prompt + finish.usage.n_completion if finish else None

    def _prepare(self, messages: list[Message]) -> _Generation:
        prompt, fmt, inside = self._render(messages)
        tokens = self._history.tokenize(prompt)
        self._check_room(tokens)
        stop = (*self.template.stop, *self.stop)
        return _Generation(prompt, tokens, fmt, inside, stop, self.is_fallback)

    def _render(
        self, messages: Sequence[Message]
    ) -> tuple[RenderedPrompt, ThinkingFormat | None, bool]:
        self._check_size(sum(len(message.content) for message in messages))
        found = render_chat(
            self.template,
            self.engine.tokenizer,
            messages,
            fmt=self._fmt,
            thinks=self.enable_thinking,
            has_grammar=self.sampling.grammar is not None,
            template_args=self.template_args,
        )
        return found.prompt, found.fmt, found.starts_inside

    def _generate(self, generation: _Generation, on_prompt: OnPrompt | None) -> Reply:
        """Stream one reply into `generation` and out. Sets `last_finish`."""
        fmt = generation.fmt
        self.last_finish = None
        stream = self.engine.submit(
            Request(
                prompt=generation.tokens,
                sampling=self.sampling,
                max_tokens=self.max_tokens,
                stop=generation.stop,
                show_special=fmt is not None and needs_special_text(fmt, self.engine.tokenizer),
            )
        )
        splitter = make_splitter(fmt, generation.starts_inside)
        sampled: list[int] = []
        finish: FinishEvent | None = None
        try:
            for event in stream:
                if isinstance(event, TextEvent):
                    sampled += event.tokens
                    yield from self._record(generation, splitter.feed(event.text))
                elif isinstance(event, FinishEvent):
                    finish = event
                elif on_prompt is not None:
                    on_prompt(event)
        finally:
            if finish is None:
                finish = _stop(stream, lambda text: self._record(generation, splitter.feed(text)))
            rest = self._record(generation, splitter.flush())
            self.last_finish = finish
            if generation.prompt is not None:
                self._history.remember(generation.prompt, generation.tokens, sampled)
        yield from rest

    def _record(self, generation: _Generation, deltas: list[Delta]) -> list[Delta]:
        result = []
        for delta in deltas:
            if delta.kind == "thinking":
                generation.thinking += delta.text
            else:
                if generation.trims_start and not generation.answer:
                    delta = Delta("answer", delta.text.lstrip())
                generation.answer += delta.text
            if delta.text:
                result.append(delta)
        return result

    def _count(self, messages: Sequence[Message]) -> int:
        if not messages:
            return 0
        return len(self._history.tokenize(self._render(messages)[0]))

    def _keep(self, kept: list[Message]) -> Dropped:
        n_messages = len(self._messages) - len(kept)
        if n_messages == 0:
            return Dropped(0, 0)
        n_before = self.context_used
        self._messages, self._n_used = kept, None
        return Dropped(n_messages, max(n_before - self.context_used, 0))

    def _last_question(self) -> int | None:
        questions = [i for i, message in enumerate(self._messages) if message.role == "user"]
        return questions[-1] if questions else None

    def _check_room(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self.n_ctx:
            raise ContextOverflowError(len(tokens), self.n_ctx)

    def _check_size(self, n_chars: int) -> None:
        if n_chars > MAX_PROMPT_CHARS:
            raise UsageError(
                f"the prompt has {n_chars} characters",
                why=f"no more than {MAX_PROMPT_CHARS} are accepted",
                hint="give a part of it",
            )


def _stop(stream: StreamLike, take: Callable[[str], object]) -> FinishEvent | None:
    """Cancel a stream and read it to its end; what it still said goes to `take`.

    The stream may itself have failed: then there is no FinishEvent.
    """
    stream.cancel()
    try:
        for event in stream:
            if isinstance(event, TextEvent):
                take(event.text)
            elif isinstance(event, FinishEvent):
                return event
    except Exception:  # noqa: BLE001 - the first failure is on its way to the caller already
        return None
    return None

"""What a running session knows, and what its commands change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal, Protocol

from llmrun.chat.messages import Message
from llmrun.chat.session import ChatSession
from llmrun.chat.store import Conversation, SessionStore, is_new_id, new_id
from llmrun.engine.types import SamplingParams
from llmrun.errors import LlmrunError, NotFoundError

if TYPE_CHECKING:
    from llmrun.repl.screen import Screen

ThinkMode = Literal["on", "hide", "off"]
"""`on`: thinking is shown dim. `hide`: one line in its place. `off`: the model does not think."""


@dataclass(frozen=True, slots=True)
class Switched:
    """What came of changing the model: a fresh session on the new one. With an `error` the new one
    could not be loaded, and the session is a fresh one on the old model."""

    session: ChatSession
    error: LlmrunError | None = None


class PrefixKeeper(Protocol):
    """Keeps what the engine has read of a conversation for the next time it is opened."""

    def restore(self, session: ChatSession, conversation_id: str) -> None:
        """Give the engine what was kept of this conversation, if anything was."""

    def keep(self, session: ChatSession, conversation_id: str, *, is_last: bool) -> None:
        """After a turn, or (`is_last`) before the conversation is left."""


SwitchModel = Callable[[str], Switched]
"""Loads another model; closing the old engine is its business. Raises LlmrunError when nothing
was changed and the old session is still usable."""

_UNSAVED_SAMPLING = ("grammar", "logit_bias", "dry_breakers")
SAVED_SAMPLING = tuple(
    field.name for field in fields(SamplingParams) if field.name not in _UNSAVED_SAMPLING
)


@dataclass(slots=True)
class ReplState:
    """`conversation` is the saved form of `session`; its id changes with /save, /load and /clear.

    `last_thinking` is the thinking of the last answer, `n_tokens_total` counts this session's.
    `unanswered` is a question that was loaded without an answer; it stays saved until the next one.
    `forked_from` is the name of a conversation that another program has changed since, so that this
    one goes on under a new name; the loop tells that once.
    `fixed` names the settings that the command line gave, which no saved conversation changes.
    `base_sampling` is the sampling that the model came with, before anything was changed here.
    """

    session: ChatSession
    model: str
    screen: Screen
    store: SessionStore | None = None
    conversation: Conversation | None = None
    think_mode: ThinkMode = "on"
    switch_model: SwitchModel | None = None
    list_models: Callable[[], Iterable[str]] | None = None
    unanswered: str | None = None
    forked_from: str | None = None
    last_thinking: str = ""
    n_answers: int = 0
    n_tokens_total: int = 0
    busy_s_total: float = 0.0
    fixed: frozenset[str] = frozenset()
    prefixes: PrefixKeeper | None = None
    base_sampling: SamplingParams = field(init=False)

    def __post_init__(self) -> None:
        self.base_sampling = self.session.sampling

    def save(self) -> None:
        """Write the conversation to the store, if there is one. Raises LlmrunError.

        One that holds no question any more goes, unless the user gave it a name.
        """
        if self.store is None:
            return
        messages = self.session.messages_so_far
        if self.unanswered is not None:
            messages = (*messages, Message("user", self.unanswered))
        if not any(message.role == "user" for message in messages):
            if self.conversation is None:
                return
            if is_new_id(self.conversation.id):
                with contextlib.suppress(NotFoundError):
                    self.store.delete(self.conversation.id)
                self.conversation = None
                return
        if self.conversation is None:
            self.conversation = Conversation(new_id(), self.model, ())
        saved = self.conversation
        if saved.stamp is not None and self.store.stamp(saved.id) not in (None, saved.stamp):
            # Both go on from here, and neither takes the other's turns away.
            self.conversation = replace(saved, id=new_id(), created=None)
            self.forked_from = saved.id
        self.conversation = self.store.save(
            replace(
                self.conversation,
                model=self.model,
                messages=messages,
                settings=self._settings(),
            )
        )

    def keep_prefix(self, *, is_last: bool = False) -> None:
        """See `PrefixKeeper.keep`; nothing for a conversation that is not saved."""
        if self.prefixes is not None and self.conversation is not None:
            self.prefixes.keep(self.session, self.conversation.id, is_last=is_last)

    def restore_prefix(self) -> None:
        """See `PrefixKeeper.restore`."""
        if self.prefixes is not None and self.conversation is not None:
            self.prefixes.restore(self.session, self.conversation.id)

    def begin_conversation(self) -> None:
        """What follows is saved under a new name."""
        self.conversation = None
        self.unanswered = None
        self.last_thinking = ""

    def put_messages(self, messages: Iterable[Message]) -> None:
        """Replace the session's messages, all else unchanged."""
        self.session = self._copy(self.session, self.session.sampling, messages)

    def adopt(self, session: ChatSession) -> None:
        """Go on with the conversation on the engine of `session`. What was changed here stays
        changed; what the old model came with gives way to what the new one came with."""
        old = self.session
        changed = {
            name: getattr(old.sampling, name)
            for name in SAVED_SAMPLING
            if getattr(old.sampling, name) != getattr(self.base_sampling, name)
        }
        self.base_sampling = session.sampling
        sampling = replace(session.sampling, **changed)
        self.session = self._copy(session, sampling, old.messages)

    def _copy(
        self, session: ChatSession, sampling: SamplingParams, messages: Iterable[Message]
    ) -> ChatSession:
        """A session on the engine of `session`, with the settings of now."""
        return ChatSession(
            session.engine,
            template=session.template,
            sampling=sampling,
            template_args=session.template_args,
            max_tokens=self.session.max_tokens,
            stop=self.session.stop,
            enable_thinking=self.session.enable_thinking,
            messages=tuple(messages),
        )

    def count_tokens(self, text: str) -> int:
        tokenizer = self.session.engine.tokenizer
        return len(tokenizer.tokenize(text, add_special=False, parse_special=False))

    def _settings(self) -> dict[str, object]:
        session = self.session
        return {
            "sampling": {name: getattr(session.sampling, name) for name in SAVED_SAMPLING},
            "max_tokens": session.max_tokens,
            "stop": list(session.stop),
            "think": self.think_mode,
            "enable_thinking": session.enable_thinking,
        }

"""What a running session knows, and what its commands change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from llmrun.chat.session import ChatSession
from llmrun.chat.store import Conversation, SessionStore, new_id

if TYPE_CHECKING:
    from llmrun.chat.messages import Message
    from llmrun.repl.screen import Screen

ThinkMode = Literal["on", "hide", "off"]
"""`on`: thinking is shown dim. `hide`: one line in its place. `off`: the model does not think."""

SwitchModel = Callable[[str], ChatSession]
"""Loads another model and returns a fresh session on it; closing the old engine is its business.
Raises LlmrunError when that does not work, and then the old session must still be usable."""

_UNSAVED_SAMPLING = ("grammar", "logit_bias", "dry_breakers")


@dataclass(slots=True)
class ReplState:
    """`conversation` is the saved form of `session`; its id changes with /save, /load and /clear.

    `last_thinking` is the thinking of the last answer, `n_tokens_total` counts this session's.
    """

    session: ChatSession
    model: str
    screen: Screen
    store: SessionStore | None = None
    conversation: Conversation | None = None
    think_mode: ThinkMode = "on"
    switch_model: SwitchModel | None = None
    list_models: Callable[[], Iterable[str]] | None = None
    last_thinking: str = ""
    n_answers: int = 0
    n_tokens_total: int = 0
    busy_s_total: float = 0.0
    default_sampling: dict[str, object] = field(default_factory=dict)

    def save(self) -> None:
        """Write the conversation to the store, if there is one. Raises LlmrunError."""
        if self.store is None:
            return
        if self.conversation is None:
            if not any(message.role == "user" for message in self.session.messages):
                return
            self.conversation = Conversation(new_id(), self.model, ())
        self.conversation = self.store.save(
            replace(
                self.conversation,
                model=self.model,
                messages=self.session.messages,
                settings=self._settings(),
            )
        )

    def begin_conversation(self) -> None:
        """What follows is saved under a new name."""
        self.conversation = None
        self.last_thinking = ""

    def put_messages(self, messages: Iterable[Message]) -> None:
        """Replace the session's messages, all else unchanged."""
        self.adopt(self.session, messages)

    def adopt(self, session: ChatSession, messages: Iterable[Message]) -> None:
        """Go on with these messages on the engine of `session`, with the settings of now."""
        old = self.session
        is_same = session is old
        self.session = ChatSession(
            session.engine,
            template=session.template,
            sampling=old.sampling if is_same else session.sampling,
            template_args=session.template_args,
            max_tokens=old.max_tokens,
            stop=old.stop,
            enable_thinking=old.enable_thinking,
            messages=tuple(messages),
        )

    def count_tokens(self, text: str) -> int:
        tokenizer = self.session.engine.tokenizer
        return len(tokenizer.tokenize(text, add_special=False, parse_special=False))

    def _settings(self) -> dict[str, object]:
        sampling = asdict(self.session.sampling)
        for key in _UNSAVED_SAMPLING:
            del sampling[key]
        return {
            "sampling": sampling,
            "max_tokens": self.session.max_tokens,
            "think": self.think_mode,
        }

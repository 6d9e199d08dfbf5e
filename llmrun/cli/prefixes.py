"""What a model has read, kept on disk from one run of the program to the next."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from llmrun.cli.wrapped_engine import WrappedEngine
from llmrun.engine.radix import common_prefix
from llmrun.engine.state_store import Match, PrefixKey, StateStore, hash_text, identify_files
from llmrun.engine.types import Request, StreamLike
from llmrun.errors import LlmrunError

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmrun.chat.session import ChatSession
    from llmrun.cli.open_model import OpenModel
    from llmrun.cli.options import Invocation

MIN_TOKENS = 64
"""Fewer are read again sooner than a file is found."""
# A turn that made a conversation longer by so much is saved at once: a kill takes no more.
_LONG_TURN_TOKENS = 1024
_BYTES_PER_GB = 10**9


def open_store(invocation: Invocation) -> StateStore:
    """The folder of saved prefixes; files in it that were ignored are told as notes."""
    return StateStore(
        invocation.environment.cache_dir / "prefixes",
        int(invocation.settings.prefix_gb * _BYTES_PER_GB),
        invocation.output.note,
    )


def key_of(opened: OpenModel) -> PrefixKey:
    """Raises OSError when the model's files are gone."""
    engine = opened.engine
    return PrefixKey(
        identify_files(opened.acquired.paths),
        engine.state_key,
        hash_text(engine.facts.chat_template or ""),
    )


class CachingEngine(WrappedEngine):
    """An engine for one prompt: before it is read, the longest saved prefix is put back. `keep`
    saves it afterwards. See `engine.types.EngineLike`; the caller closes the model."""

    def __init__(self, invocation: Invocation, opened: OpenModel) -> None:
        """Raises OSError like `key_of`."""
        super().__init__(opened.engine)
        self._output = invocation.output
        self._opened = opened
        self._store = open_store(invocation)
        self._key = key_of(opened)
        self._match: Match | None = None
        self._prompt: tuple[int, ...] = ()

    def submit(self, request: Request) -> StreamLike:
        self._prompt = request.prompt
        self._match = match = self._store.find(self._key, request.prompt, self.facts)
        if match is not None and match.n_usable:
            saved = self._store.load(self._key, match)
            if saved is None or not self._engine.restore_prefix(saved):
                self._match = match = None
        if match is not None and match.n_common > match.n_usable:
            # The model forgets, and two prompts have parted there: others will as well.
            request = replace(request, come_back_to=(match.n_common,))
        return self._engine.submit(request)

    def keep(self) -> None:
        """Save what the engine has read, if that is worth a file."""
        saved = self._engine.save_prefix(self._prompt, self._store.max_bytes)
        if saved is None or len(saved.tokens) < MIN_TOKENS:
            return
        match, replaces = self._match, None
        if match is not None and match.n_usable == match.n_common:
            n_new = len(saved.tokens) - match.n_common
            if n_new < max(MIN_TOKENS, len(saved.tokens) // 8):
                return
            can_go_back = not (self.facts.n_swa or self.facts.is_recurrent or self.facts.is_hybrid)
            if can_go_back and match.n_common == match.n_tokens:
                replaces = match
        title = self._opened.acquired.reference
        if self._store.save(self._key, saved, title=title, replaces=replaces):
            self._output.detail(f"{len(saved.tokens)} tokens are kept for the next run")

    def close(self) -> None:
        """Nothing: the caller closes the model."""


class ChatPrefixes:
    """See `repl.state.PrefixKeeper`. `opened` gives the model of now."""

    def __init__(self, invocation: Invocation, opened: Callable[[], OpenModel | None]) -> None:
        self._output = invocation.output
        self._store = open_store(invocation)
        self._opened = opened
        self._kept: tuple[str, tuple[int, ...]] = ("", ())
        self._writer: threading.Thread | None = None

    def restore(self, session: ChatSession, conversation_id: str) -> None:
        opened = self._opened()
        if opened is None or self._store.max_bytes == 0:
            return
        try:
            saved = self._store.load_owned(key_of(opened), conversation_id)
            n_tokens = opened.engine.restore_prefix(saved) if saved is not None else 0
        except (LlmrunError, OSError) as error:
            self._output.detail(f"the conversation is read again: {error}")
            return
        if saved is None or n_tokens == 0:
            return
        session.recall(saved.tokens)
        self._kept = conversation_id, saved.tokens
        self._output.detail(f"{n_tokens} tokens of the conversation need not be read again")

    def keep(self, session: ChatSession, conversation_id: str, *, is_last: bool) -> None:
        opened, tokens = self._opened(), session.tokens
        if opened is None or self._store.max_bytes == 0 or len(tokens) < MIN_TOKENS:
            return
        owner, kept = self._kept
        n_new = len(tokens) - (common_prefix(kept, tokens) if owner == conversation_id else 0)
        # The last token of an answer is in no cache, so it cannot be kept.
        if n_new <= 1 or (n_new < _LONG_TURN_TOKENS and not is_last):
            return
        self._wait()
        try:
            key = key_of(opened)
            saved = opened.engine.save_prefix(tokens, self._store.max_bytes)
        except (LlmrunError, OSError) as error:
            self._output.detail(f"the conversation's state is not kept: {error}")
            return
        if saved is None:
            return
        self._kept = conversation_id, saved.tokens
        title = opened.acquired.reference

        def write() -> None:
            self._store.save(key, saved, owner=conversation_id, title=title)

        # The disk may be slow, and the person wants to type.
        self._writer = threading.Thread(target=write, name="llmrun-prefix")
        self._writer.start()
        if is_last:
            self._wait()

    def forget(self, conversation_id: str) -> None:
        """The conversation is deleted."""
        self._wait()
        self._store.forget(conversation_id)

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None

"""Keeps a conversation's tokens stable from turn to turn.

An answer that is tokenized again from its text can split into other tokens than the ones that were
sampled, and from there on the cache of the conversation would be of no use. So the tokens of the
last turn are kept, and when the next prompt begins with exactly its text, they are its beginning.
What an earlier program run kept of a conversation is used in the same way.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from llmrun.chat.protect import (
    RenderedPrompt,
    Segment,
    split_known,
    tokenize_prompt,
    tokenize_segments,
)
from llmrun.engine.types import Tokenizer


class TokenHistory:
    """The last turn as text and as tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prompt: tuple[Segment, ...] = ()
        self._answer = ""
        self._tokens: tuple[int, ...] = ()
        self._recalled: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Those of the last turn; none before the first."""
        return self._tokens

    def recall(self, tokens: Sequence[int]) -> None:
        """What the conversation's tokens were when it was saved."""
        self._recalled = tuple(tokens)

    def remember(
        self, prompt: RenderedPrompt, prompt_tokens: Sequence[int], answer_tokens: Sequence[int]
    ) -> None:
        """Keep a turn: its prompt, and the sampled tokens without an end token."""
        self._tokens = (*prompt_tokens, *answer_tokens)
        answer = b"".join(self._tokenizer.piece(token) for token in answer_tokens)
        try:
            self._answer = answer.decode("utf-8")
        except UnicodeDecodeError:
            self._prompt = ()
            return
        self._prompt = prompt.segments

    def go_on(self, prompt: RenderedPrompt) -> tuple[int, ...] | None:
        """The prompt's tokens if it begins with the last turn, which are then the first of them."""
        rest = self._behind_last_turn(prompt)
        if rest is None:
            return None
        return (*self._tokens, *tokenize_segments(rest, self._tokenizer, is_start=False))

    def tokenize(self, prompt: RenderedPrompt) -> tuple[int, ...]:
        """The prompt's tokens, the last turn's where it begins with that."""
        tokens = self.go_on(prompt)
        if tokens is not None:
            return tokens
        if self._recalled:
            n_known, rest = split_known(prompt, self._recalled, self._tokenizer)
            if n_known:
                known = self._recalled[:n_known]
                return (*known, *tokenize_segments(rest, self._tokenizer, is_start=False))
        return tokenize_prompt(prompt, self._tokenizer)

    def _behind_last_turn(self, prompt: RenderedPrompt) -> list[Segment] | None:
        """What follows the last turn in `prompt`; None when it does not begin with that turn.

        The answer must lie in one piece of unprotected text: where it spells a special token, the
        rule of `protect` goes before the cache.
        """
        n = len(self._prompt)
        if n == 0 or len(prompt.segments) < n or prompt.segments[: n - 1] != self._prompt[:-1]:
            return None
        old, new = self._prompt[-1], prompt.segments[n - 1]
        known = old.text + self._answer
        if old.is_literal or new.is_literal or not new.text.startswith(known):
            return None
        rest = Segment(new.text[len(known) :], False)
        return [*([rest] if rest.text else []), *prompt.segments[n:]]


class RecentTurns:
    """The last turns of many conversations that nobody names, as a server sees them: clients send
    a conversation's text again with each question. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, n_max: int = 64) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._turns: deque[TokenHistory] = deque(maxlen=n_max)

    def remember(
        self, prompt: RenderedPrompt, prompt_tokens: Sequence[int], answer_tokens: Sequence[int]
    ) -> None:
        """Keep a turn; the oldest goes for it."""
        turn = TokenHistory(self._tokenizer)
        turn.remember(prompt, prompt_tokens, answer_tokens)
        with self._lock:
            self._turns.append(turn)

    def tokenize(self, prompt: RenderedPrompt) -> tuple[int, ...]:
        """The prompt's tokens; the longest kept turn's where it begins with one."""
        with self._lock:
            turns = sorted(self._turns, key=lambda turn: -len(turn.tokens))
        for turn in turns:
            tokens = turn.go_on(prompt)
            if tokens is not None:
                return tokens
        return tokenize_prompt(prompt, self._tokenizer)

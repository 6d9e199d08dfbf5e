"""What the model is given to read while it is measured: the same for everybody, for any vocabulary.

Speed does not depend on what a text says, but it does on whether one repeats an earlier one (prefix
cache) or itself (speculation). So there are three kinds of prompts: of ordinary tokens drawn at
random, with a common beginning, and one that asks for a text again.
"""

from __future__ import annotations

import random
from itertools import count

from llmrun.engine.types import Tokenizer

_N_WORDS = 2000
_MAX_DRAWS = 40_000
_FEW = 16

# A text of its own to be edited: everyday words, no line twice.
_TEXT = """The ferry leaves the old harbour at seven in the morning and reaches the island at nine.
Most of its passengers are teachers, who go over on Monday and come home for the weekend.
In winter the crossing takes longer, and the captain keeps a kettle on the stove for them.
The island has one shop, two bakeries, a school with forty children and a small museum.
Its keeper, a tall woman named Ruth, shows visitors the tools of the clockmakers.
They came here three hundred years ago, because the sand of the bay made excellent glass.
Today nobody builds clocks any more, yet every house still has one in the hall.
On the first Sunday of May all of them are stopped for an hour, and the island is silent.
Then the children run from door to door, wind the springs and set the hands again.
Whoever hears the first bell may ask the mayor for a wish, as long as it costs nothing.
"""


class Workloads:
    """Makes prompts for one vocabulary. Each `fresh` one is new to every prefix cache; two objects
    with the same seed and vocabulary make the same ones in the same order."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 1) -> None:
        self._tokenizer = tokenizer
        self._words = ordinary_tokens(tokenizer)
        self._seed = seed
        self._numbers = count()
        begin = tokenizer.tokenize("", add_special=True, parse_special=False)
        self._begin = tuple(begin[:1]) if tokenizer.adds_bos else ()

    def fresh(self, n_tokens: int) -> tuple[int, ...]:
        """`n_tokens` ordinary tokens in all, the first one BOS where the model wants it."""
        begin = self._begin[:n_tokens]
        return begin + self._draw(n_tokens - len(begin))

    def after(self, prefix: tuple[int, ...], n_tokens: int) -> tuple[int, ...]:
        """`prefix` and `n_tokens` that never followed it before."""
        return prefix + self._draw(n_tokens)

    def edit(self, n_tokens_max: int) -> tuple[int, ...]:
        """A text that has been written out once, and the start of it again: what follows is in
        the prompt. Shortened to `n_tokens_max` tokens, from its beginning."""
        head = f"Letter {next(self._numbers)}\n\n"
        text = f"{head}{_TEXT}\nThe same letter once more, with Ruth called Judith:\n\n{_TEXT[:89]}"
        tokens = self._tokenizer.tokenize(text, add_special=True, parse_special=False)
        return tuple(tokens[-n_tokens_max:])

    def _draw(self, n_tokens: int) -> tuple[int, ...]:
        chosen = random.Random(f"{self._seed}/{next(self._numbers)}")  # noqa: S311 - not a secret
        return tuple(chosen.choices(self._words, k=max(0, n_tokens)))


def ordinary_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Up to two thousand tokens that are words or parts of words; other plain tokens where the
    vocabulary has too few of these. Never a control or an end token."""
    n_vocab = tokenizer.n_vocab
    if n_vocab <= _MAX_DRAWS:
        order = list(range(n_vocab))
        random.Random(0).shuffle(order)  # noqa: S311 - not a secret
    else:
        order = random.Random(0).sample(range(n_vocab), _MAX_DRAWS)  # noqa: S311
    words: list[int] = []
    others: list[int] = []
    for token in order:
        if tokenizer.is_control(token) or tokenizer.is_eog(token):
            continue
        piece = tokenizer.piece(token)
        is_word = piece.isascii() and piece.strip().isalpha()
        (words if is_word else others).append(token)
        if len(words) == _N_WORDS:
            break
    return tuple(words if len(words) >= _FEW else words + others) or (0,)

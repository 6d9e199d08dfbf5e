"""A byte tokenizer with special tokens, after the rules of llama.cpp.

Tokens 0 … 255 are bytes; the special tokens follow in the order they were given: `control`,
then `user_defined`. As in llama.cpp, USER_DEFINED texts are matched always and CONTROL texts only
with `parse_special`; the longest match at a place wins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmrun.engine.types import SpecialLiteral

N_BYTES = 256


class FakeTokenizer:
    """Implements `engine.types.Tokenizer`. `bos` and `eog` must be among `control`.

    `space_prefix` imitates vocabularies that put a space in front of each text they tokenize.
    """

    def __init__(
        self,
        control: Sequence[str] = ("<s>", "</s>", "<|im_start|>", "<|im_end|>"),
        user_defined: Sequence[str] = (),
        *,
        bos: str = "<s>",
        eog: Sequence[str] = ("</s>", "<|im_end|>"),
        adds_bos: bool = False,
        space_prefix: bool = False,
    ) -> None:
        self.control = tuple(control)
        self.user_defined = tuple(user_defined)
        self.specials = self.control + self.user_defined
        self.id_of = {text: N_BYTES + i for i, text in enumerate(self.specials)}
        self._bos = self.id_of.get(bos)
        self._eog = {self.id_of[text] for text in eog if text in self.id_of}
        self._adds_bos = adds_bos
        self._space_prefix = space_prefix

    @property
    def n_vocab(self) -> int:
        return N_BYTES + len(self.specials)

    @property
    def adds_bos(self) -> bool:
        return self._adds_bos

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = [self._bos] if add_special and self._adds_bos and self._bos is not None else []
        if self._space_prefix and text:
            text = " " + text
        known = self.specials if parse_special else self.user_defined
        for part in _split(text, known):
            if part in self.id_of and part in known:
                tokens.append(self.id_of[part])
            else:
                tokens.extend(part.encode("utf-8", "replace"))
        return tokens

    def piece(self, token: int) -> bytes:
        if token < N_BYTES:
            return bytes([token])
        return self.specials[token - N_BYTES].encode()

    def is_eog(self, token: int) -> bool:
        return token in self._eog

    def is_control(self, token: int) -> bool:
        return N_BYTES <= token < N_BYTES + len(self.control)

    def special_literals(self, text: str) -> tuple[SpecialLiteral, ...]:
        return tuple(
            SpecialLiteral(special, is_control=special in self.control)
            for special in self.specials
            if special in text
        )


def _split(text: str, known: Sequence[str]) -> list[str]:
    if not known:
        return [text]
    pattern = "|".join(re.escape(special) for special in sorted(known, key=len, reverse=True))
    return re.split(f"({pattern})", text)

"""The tokenizer of a loaded model, on llama.cpp's vocabulary calls (thread-safe there)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from llmrun.engine.types import SpecialLiteral
from llmrun.errors import EngineError

# llama_token_attr bits
_UNKNOWN = 1
_CONTROL = 8
_USER_DEFINED = 16
_SPECIAL = _UNKNOWN | _CONTROL | _USER_DEFINED

_INT32_MIN = -(2**31)
_PIECE_CHARS = 32 * 1024


class LlamaTokenizer:
    """See `engine.types.Tokenizer`. `C` is the binding's low-level module, `vocab` its pointer."""

    def __init__(self, C: Any, vocab: Any) -> None:
        self._C = C
        self._vocab = vocab
        self.n_vocab: int = C.llama_vocab_n_tokens(vocab)
        self.adds_bos: bool = bool(C.llama_vocab_get_add_bos(vocab))
        self._attributes: dict[int, int] = {}
        self._literals: tuple[SpecialLiteral, ...] | None = None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        # Lone surrogates (undecodable bytes from argv or stdin) have no UTF-8 form.
        data = text.encode("utf-8", "replace")
        # One token a byte is the most a tokenizer makes, and BOS and EOS come on top.
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        n = self._C.llama_tokenize(
            self._vocab, data, len(data), buffer, room, add_special, parse_special
        )
        if n < 0 and n != _INT32_MIN:
            buffer = (ctypes.c_int32 * -n)()
            n = self._C.llama_tokenize(
                self._vocab, data, len(data), buffer, -n, add_special, parse_special
            )
        if n < 0:
            raise EngineError(f"the text of {len(data)} bytes cannot be tokenized")
        return buffer[:n]

    def piece(self, token: int) -> bytes:
        return self.render(token, special=True)

    def render(self, token: int, *, special: bool) -> bytes:
        """The token's bytes; with `special` False those of control tokens are empty."""
        self._check(token)
        size = 128
        while True:
            buffer = ctypes.create_string_buffer(size)
            n: int = self._C.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_eog(self, token: int) -> bool:
        self._check(token)
        return bool(self._C.llama_vocab_is_eog(self._vocab, token))

    def is_control(self, token: int) -> bool:
        return bool(self._attribute(token) & (_CONTROL | _UNKNOWN))

    def special_literals(self, text: str) -> tuple[SpecialLiteral, ...]:
        # Text that spells a special token always gets one when specials are parsed, so harmless
        # text is told by one tokenization. Only other text needs the list of all special tokens:
        # matches hide one another where they overlap, so the tokens found are not the answer.
        if not any(map(self._spells_special, self._pieces(text))):
            return ()
        return tuple(literal for literal in self._all_literals() if literal.text in text)

    def _pieces(self, text: str) -> Iterator[str]:
        """Parts of a long text that overlap by what a literal may have: the library takes time
        by the square of the number of special tokens."""
        if len(text) <= _PIECE_CHARS:
            yield text
            return
        n_over = max((len(literal.text) for literal in self._all_literals()), default=0)
        for start in range(0, len(text), _PIECE_CHARS):
            yield text[start : start + _PIECE_CHARS + n_over]

    def _spells_special(self, text: str) -> bool:
        tokens = set(self.tokenize(text, add_special=False, parse_special=True))
        return any(self._attribute(token) & _SPECIAL for token in tokens)

    def _all_literals(self) -> tuple[SpecialLiteral, ...]:
        """Every special token of the vocabulary, read once (0.2 s for 262,144 tokens)."""
        if self._literals is None:
            control_of: dict[str, bool] = {}
            for token in range(self.n_vocab):
                attribute = int(self._C.llama_vocab_get_attr(self._vocab, token))
                if not attribute & _SPECIAL:
                    continue
                literal = self.piece(token).decode("utf-8", "replace")
                is_control = not attribute & _USER_DEFINED or bool(attribute & _CONTROL)
                if literal:
                    control_of[literal] = control_of.get(literal, False) or is_control
            self._literals = tuple(SpecialLiteral(*item) for item in control_of.items())
        return self._literals

    def _check(self, token: int) -> None:
        # Out of range, the library throws a C++ exception that ends the process.
        if not 0 <= token < self.n_vocab:
            raise EngineError(f"token {token} is outside the vocabulary of {self.n_vocab}")

    def _attribute(self, token: int) -> int:
        attribute = self._attributes.get(token)
        if attribute is None:
            self._check(token)
            attribute = int(self._C.llama_vocab_get_attr(self._vocab, token))
            self._attributes[token] = attribute
        return attribute

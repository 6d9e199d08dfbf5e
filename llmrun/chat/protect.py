"""Text from people and tools that spells a special token stays text.

A chat template joins the scaffolding of control tokens and the text of users into one string, and
tokenizing that string with `parse_special` would make a control token of `<|im_end|>` in a user's
text. So each such literal is exchanged for one private-use character before the template renders,
and afterwards the string is cut there: what lies between is tokenized with specials, the literals
without. Text that spells no special token is not touched, so that its prompt is byte for byte and
token for token what the template makes of it.

llama.cpp matches USER_DEFINED tokens even without `parse_special`. Their literals are cut inside,
after the first character, and the parts tokenized apart: the same bytes, no special token.
Vocabularies also hold natural words as USER_DEFINED tokens (Gemma: runs of newlines, `<table>`),
and those must stay what the model was trained on: see `Guard`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmrun.engine.types import SpecialLiteral, Tokenizer
from llmrun.errors import TemplateError

T = TypeVar("T")

# <|…>, <…|>, <|…|> and [UPPER_CASE]: how models spell their markers. DeepSeek's bar is U+FF5C.
_MARKER = re.compile(r"<[|\uff5c][^\s<>]*>|<[^\s<>]*[|\uff5c]>|\[/?[A-Z][A-Z_]*\]")

# Markers of other shapes, which no natural text has as a word. A vocabulary may hold them while
# the file's template does not name them.
KNOWN_MARKERS = frozenset(
    {
        "<bos>", "<eos>", "<s>", "</s>", "<pad>", "<unk>",
        "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
        "<think>", "</think>", "<tool_call>", "</tool_call>",
        "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>",
        "<arg_value>", "</arg_value>", "<seed:think>", "</seed:think>",
    }
)  # fmt: skip

_TAG_SIGNS = frozenset("<>[]|")  # a word such as "user" is in many templates and is no tag

_PLACEHOLDERS = range(0xF0000, 0xFFFFE)  # private-use plane 15
_N_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a prompt. `is_literal`: text that must not become a special token."""

    text: str
    is_literal: bool


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A rendered conversation, ready for `tokenize_prompt`."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    def append(self, scaffolding: str) -> RenderedPrompt:
        if self.segments and not self.segments[-1].is_literal:
            last = Segment(self.segments[-1].text + scaffolding, False)
            return RenderedPrompt((*self.segments[:-1], last))
        return RenderedPrompt((*self.segments, Segment(scaffolding, False)))


class Guard:
    """Exchanges the literals of special tokens in values, for one rendering.

    `template_source` decides, with the shape, which USER_DEFINED tokens are markers.
    """

    def __init__(self, tokenizer: Tokenizer, template_source: str) -> None:
        self._tokenizer = tokenizer
        self._source = template_source
        self._placeholder_of: dict[str, str] = {}

    def protect(self, value: T) -> T:
        """`value` with placeholders for the literals in all its strings, also in nested ones.

        Characters that are no text (lone surrogates) become U+FFFD. Call it once: a placeholder
        is a character that occurs nowhere in `value` or the template.
        """
        strings = list(_strings_in(value))
        literals: set[str] = set()
        for text in strings:
            literals.update(dangerous_literals(text, self._tokenizer, self._source))
        if literals:
            self._choose_placeholders(literals, strings)
        return _map_strings(value, self._exchange)  # type: ignore[return-value]

    def restore(self, rendered: str) -> RenderedPrompt:
        """The rendered text, cut at the placeholders.

        A template may have put a placeholder through JSON with ASCII escapes; that is recognised
        as well. Literals that the template left out are simply not there.
        """
        if not self._placeholder_of:
            return RenderedPrompt((Segment(rendered, False),) if rendered else ())
        literal_of = {mark: literal for literal, mark in self._placeholder_of.items()}
        literal_of |= {json.dumps(mark)[1:-1]: literal for mark, literal in literal_of.items()}
        pattern = "|".join(re.escape(mark) for mark in literal_of)
        segments = []
        for part in re.split(f"({pattern})", rendered):
            literal = literal_of.get(part)
            if part:
                segments.append(Segment(literal or part, literal is not None))
        return RenderedPrompt(tuple(segments))

    def _choose_placeholders(self, literals: set[str], strings: Sequence[str]) -> None:
        import secrets

        taken = set(self._source).union(*strings)
        for literal in sorted(literals):
            for _ in range(_N_TRIES):
                mark = chr(secrets.choice(_PLACEHOLDERS))
                if mark not in taken:
                    break
            else:
                raise TemplateError(
                    "the text of the prompt cannot be told apart from markers",
                    why="it uses nearly all private-use characters of Unicode",
                )
            taken.add(mark)
            self._placeholder_of[literal] = mark

    def _exchange(self, text: str) -> str:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not self._placeholder_of:
            return text
        longest_first = sorted(self._placeholder_of, key=len, reverse=True)
        pattern = "|".join(re.escape(literal) for literal in longest_first)
        return re.sub(pattern, lambda match: self._placeholder_of[match.group()], text)


def dangerous_literals(text: str, tokenizer: Tokenizer, template_source: str = "") -> list[str]:
    """The special tokens' texts in `text` that must be kept from becoming these tokens."""
    return [
        literal.text
        for literal in tokenizer.special_literals(text)
        if literal.is_control or is_marker(literal, template_source)
    ]


def is_marker(literal: SpecialLiteral, template_source: str = "") -> bool:
    """Whether a USER_DEFINED token is scaffolding, not a natural word of the vocabulary."""
    text = literal.text
    if not text.strip() or len(text) < 2:
        return False
    if _MARKER.fullmatch(text) or text in KNOWN_MARKERS:
        return True
    return text in template_source and not _TAG_SIGNS.isdisjoint(text)


def tokenize_prompt(rendered: RenderedPrompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt's tokens: scaffolding with specials, literals without.

    A BOS token that the model wants and the template does not write is put in front.
    """
    tokens: list[int] = []
    if tokenizer.adds_bos:
        bos = tokenizer.tokenize("", add_special=True, parse_special=False)[:1]
        spelled = b"".join(tokenizer.piece(token) for token in bos).decode("utf-8", "replace")
        first = rendered.segments[0] if rendered.segments else Segment("", False)
        if first.is_literal or not first.text.startswith(spelled):
            tokens += bos
    return (*tokens, *tokenize_segments(rendered.segments, tokenizer, is_start=True))


def tokenize_segments(
    segments: Sequence[Segment], tokenizer: Tokenizer, *, is_start: bool
) -> list[int]:
    """Tokens of a part of a prompt, without BOS. `is_start`: nothing comes before it."""
    tokens: list[int] = []
    # A text can be made of one literal a hundred thousand times.
    literals = _KnownLiterals(tokenizer)
    for i, segment in enumerate(segments):
        if segment.is_literal:
            tokens += literals[segment.text]
        elif is_start and i == 0:
            tokens += tokenizer.tokenize(segment.text, add_special=False, parse_special=True)
        else:
            tokens += _without_space_prefix(segment.text, tokenizer, parse_special=True)
    return tokens


def split_known(
    rendered: RenderedPrompt, known: Sequence[int], tokenizer: Tokenizer
) -> tuple[int, list[Segment]]:
    """How many of the tokens `known` the prompt can begin with, and the segments behind these.

    They must spell the prompt's text, with the very control tokens in the places where it gets them
    here, and with the very tokens of literals, so that other tokens of the same text never stand in
    for these. Where `known` and the prompt part, all after the last control token is left to the
    tokenizer: only there does every text split alike.
    """
    n = _n_unspelled(rendered, known, tokenizer)
    safe: tuple[int, list[Segment]] = (0, [])
    for i, segment in enumerate(rendered.segments if n is not None else ()):
        assert n is not None
        later = list(rendered.segments[i + 1 :])
        own = tokenize_segments((segment,), tokenizer, is_start=i == 0)
        if segment.is_literal:
            if n + len(own) > len(known):
                return (n, [segment, *later]) if n == len(known) else safe
            if list(known[n : n + len(own)]) != own:
                return safe
            n += len(own)
            continue
        data, start = segment.text.encode("utf-8", "replace"), 0
        controls = _places_of_controls(own, tokenizer)
        while start < len(data):
            if n == len(known):
                if 0x80 <= data[start] < 0xC0:  # inside a character, which no token says
                    return safe
                return n, [Segment(data[start:].decode("utf-8", "replace"), False), *later]
            token = known[n]
            piece = tokenizer.piece(token) if 0 <= token < tokenizer.n_vocab else b""
            end = start + len(piece)
            wanted = [controls[place] for place in range(start, end) if place in controls]
            has = [token] if tokenizer.is_control(token) else []
            if not piece or not data.startswith(piece, start) or wanted != has:
                return safe
            n, start = n + 1, end
            if has:
                tail = data[start:].decode("utf-8", "replace")
                safe = n, [*([Segment(tail, False)] if tail else []), *later]
    return (n, []) if n == len(known) else safe


def _n_unspelled(
    rendered: RenderedPrompt, known: Sequence[int], tokenizer: Tokenizer
) -> int | None:
    """1 for a BOS in front that the text does not spell, 0 without one; None when `known` has not
    what the prompt gets."""
    bare = RenderedPrompt(rendered.segments[:1])
    first = tokenize_segments(bare.segments, tokenizer, is_start=True)
    n = len(tokenize_prompt(bare, tokenizer)) - len(first)
    if n and list(known[:1]) != list(tokenize_prompt(bare, tokenizer)[:1]):
        return None
    return n


def _places_of_controls(tokens: Sequence[int], tokenizer: Tokenizer) -> dict[int, int]:
    """Where in the text, in bytes, control tokens begin."""
    places, start = {}, 0
    for token in tokens:
        if tokenizer.is_control(token):
            places[start] = token
        start += len(tokenizer.piece(token))
    return places


def tokenize_plain(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens of plain text for a completion: BOS as the model wants it, no special token from
    the text itself."""
    guard = Guard(tokenizer, "")
    parts = guard.restore(guard.protect(text)).segments
    literals = _KnownLiterals(tokenizer)
    tokens: list[int] = []
    if not parts or parts[0].is_literal:
        tokens += tokenizer.tokenize("", add_special=True, parse_special=False)
    for i, part in enumerate(parts):
        if part.is_literal:
            tokens += literals[part.text]
        elif i == 0:
            tokens += tokenizer.tokenize(part.text, add_special=True, parse_special=False)
        else:
            tokens += _without_space_prefix(part.text, tokenizer, parse_special=False)
    return tuple(tokens)


class _KnownLiterals(dict[str, list[int]]):
    """The tokens of each literal, made once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, text: str) -> list[int]:
        self[text] = tokens = _tokenize_literal(text, self._tokenizer)
        return tokens


def _tokenize_literal(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of `text` with no special token among them, wherever that is possible."""
    markers = [
        literal.text
        for literal in tokenizer.special_literals(text)
        if not literal.is_control and len(literal.text) > 1
    ]
    if not markers:
        return _without_space_prefix(text, tokenizer, parse_special=False)
    cut = min(text.index(marker) for marker in markers) + 1
    head = _without_space_prefix(text[:cut], tokenizer, parse_special=False)
    return head + _tokenize_literal(text[cut:], tokenizer)


def _without_space_prefix(text: str, tokenizer: Tokenizer, *, parse_special: bool) -> list[int]:
    """Tokens of a text inside a prompt.

    Some vocabularies put a space before any text. At a cut that space would be an addition, so
    the text is tokenized behind a newline, which never merges, and the newline is taken off.
    """
    tokens = tokenizer.tokenize(text, add_special=False, parse_special=parse_special)
    if not tokens or not tokenizer.piece(tokens[0]).startswith(b" "):
        return tokens
    if not _adds_space_prefix(tokenizer):
        return tokens
    behind = tokenizer.tokenize("\n" + text, add_special=False, parse_special=parse_special)
    head = b""
    for i, token in enumerate(behind):
        if head == b" \n":
            return behind[i:]
        head += tokenizer.piece(token)
    return tokens


def _adds_space_prefix(tokenizer: Tokenizer) -> bool:
    letter = tokenizer.tokenize("a", add_special=False, parse_special=False)
    return b"".join(tokenizer.piece(token) for token in letter) == b" a"


def _strings_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings_in(key)
            yield from _strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings_in(item)


def _map_strings(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _map_strings(key, change): _map_strings(item, change) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
